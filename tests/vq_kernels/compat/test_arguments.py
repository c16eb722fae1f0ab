"""Every keyword is supported or rejected, and errors name the argument, the rule and the value."""

import inspect
from typing import Any

import pytest
import torch

from tests.vq_kernels.compat.side_by_side import DIM, NUM_CODES, OWN_CODES, Theirs, draw
from vq_kernels import VectorQuantize
from vq_kernels.compat.keywords import AT_CONSTRUCTION, IN_A_CALL, WITHOUT_EFFECT

OTHER_VALUES = {
    "in_place_codebook_optimizer": torch.optim.SGD,
    "codebook_transform_fn": torch.nn.Identity(),
}


def another_value(name: str, default: Any) -> Any:
    if name in OTHER_VALUES:
        return OTHER_VALUES[name]
    return True if default is False else default + 0.5


def defaults(function: Any) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    return {one.name: one.default for one in parameters if one.kind != inspect.Parameter.VAR_KEYWORD}


def test_every_constructor_keyword_is_supported_or_rejected() -> None:
    ours, theirs = defaults(VectorQuantize), defaults(Theirs)
    refused = {name: default for name, ((default, *_), _) in AT_CONSTRUCTION.items()}
    theirs = {name: default for name, default in theirs.items() if name not in WITHOUT_EFFECT}
    assert theirs.keys() == (ours.keys() | refused.keys()) - {"backend"}
    assert all((refused[name] if name in refused else ours[name]) == default for name, default in theirs.items())
    assert list(ours)[:18] == list(theirs)[:18]  # by position, too


def test_every_call_keyword_is_supported_or_rejected() -> None:
    ours, theirs = defaults(VectorQuantize.forward), defaults(Theirs.forward)
    refused = {name: default for name, ((default, *_), _) in IN_A_CALL.items()}
    assert theirs.keys() == ours.keys() | refused.keys()
    assert all((refused[name] if name in refused else ours[name]) == default for name, default in theirs.items())
    assert list(ours)[:9] == list(theirs)[:9]


@pytest.mark.parametrize("name", AT_CONSTRUCTION)
def test_an_unsupported_keyword_raises_at_construction(name: str) -> None:
    (default,), instead = AT_CONSTRUCTION[name]
    VectorQuantize(DIM, NUM_CODES, **{name: default})
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported") as raised:
        VectorQuantize(DIM, NUM_CODES, **{name: another_value(name, default)})
    assert instead in str(raised.value)


def test_options_of_unsupported_keywords_have_no_effect() -> None:
    torch.manual_seed(0)
    plain = VectorQuantize(DIM, NUM_CODES)
    torch.manual_seed(0)
    other = VectorQuantize(DIM, NUM_CODES, **dict.fromkeys(WITHOUT_EFFECT, 0.3), sync_kmeans=False, kmeans_iters=3)
    for found, expected in zip(other(draw(4, DIM), sample_codebook_temp=0.1), plain(draw(4, DIM)), strict=True):
        assert torch.equal(found, expected)
    with pytest.raises(TypeError, match="no argument 'sync_affine_param'"):
        plain(draw(4, DIM), sync_affine_param=True)


@pytest.mark.parametrize("name", IN_A_CALL)
def test_an_unsupported_keyword_raises_in_a_call(name: str) -> None:
    layer = VectorQuantize(DIM, NUM_CODES)
    (default,), instead = IN_A_CALL[name]
    layer(draw(4, DIM), **{name: default})
    with pytest.raises(NotImplementedError, match=f"^{name} is not supported") as raised:
        layer(draw(4, DIM), **{name: another_value(name, default)})
    assert instead in str(raised.value)


def test_lens() -> None:
    indices = VectorQuantize(DIM, NUM_CODES)(draw(3, 3, DIM), lens=torch.tensor([0, 2, 5]))[1]
    assert (indices >= 0).tolist() == [[False] * 3, [True, True, False], [True] * 3]


def test_unknown_keywords() -> None:
    with pytest.raises(TypeError, match="no argument 'codebok_dim'"):
        VectorQuantize(DIM, NUM_CODES, codebok_dim=4)
    with pytest.raises(TypeError, match="no argument 'masks'"):
        VectorQuantize(DIM, NUM_CODES)(draw(4, DIM), masks=None)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"dim": 0}, "dim must be >= 1, got 0"),
        ({"codebook_size": 0}, "codebook_size must be >= 1, got 0"),
        ({"codebook_dim": 0}, "codebook_dim must be >= 1, got 0"),
        ({"heads": 0}, "heads must be >= 1, got 0"),
        ({"kmeans_iters": 0}, "kmeans_iters must be >= 1, got 0"),
        ({"decay": -0.1}, r"decay must be in \[0, 1\], got -0.1"),
        ({"decay": 1.5}, r"decay must be in \[0, 1\], got 1.5"),
        ({"eps": float("nan")}, "eps must be >= 0, got nan"),
        ({"threshold_ema_dead_code": -1}, "threshold_ema_dead_code must be >= 0, got -1"),
        ({"commitment_weight": -1.0}, "commitment_weight must be >= 0, got -1.0"),
        ({"backend": "cuda"}, "backend must be one of auto, triton, llvm, torch, got 'cuda'"),
        ({"learnable_codebook": True}, "learnable_codebook=True needs ema_update=False"),
        ({"learnable_codebook": True, "ema_update": False, "use_cosine_sim": True}, "needs use_cosine_sim=False"),
        ({"accept_image_fmap": True, "accept_3d_fmap": True}, "must not both be True"),
    ],
)
def test_invalid_arguments(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantize(**{"dim": DIM, "codebook_size": NUM_CODES, **keywords})


@pytest.mark.parametrize(
    ("keywords", "shape", "message"),
    [
        ({}, (3, 20, 15), r"x must be \[b, n, 16\] or \[b, 16\], got \(3, 20, 15\)"),
        ({}, (3, 4, 5, 16), r"x must be \[b, n, 16\] or \[b, 16\], got \(3, 4, 5, 16\)"),
        ({"channel_last": False}, (3, 20, 16), r"x must be \[b, 16, n\] or \[b, 16\], got \(3, 20, 16\)"),
        ({"accept_image_fmap": True}, (3, 16, 4), r"x must be \[b, 16, h, w\], got \(3, 16, 4\)"),
        ({"accept_3d_fmap": True}, (3, 16, 4, 5), r"x must be \[b, 16, d, h, w\], got \(3, 16, 4, 5\)"),
    ],
)
def test_invalid_shapes(keywords: dict[str, Any], shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VectorQuantize(DIM, NUM_CODES, **keywords)(torch.zeros(shape))


def test_invalid_tensors() -> None:
    layer, x = VectorQuantize(DIM, NUM_CODES), draw(3, 20, DIM)
    mask, lens = torch.ones(3, 20, dtype=torch.bool), torch.tensor([1, 2, 3])
    with pytest.raises(TypeError, match=r"x must be float32, .* got torch.int64"):
        layer(x.long())
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.float32"):
        layer(x, mask=mask.float())
    with pytest.raises(ValueError, match=r"mask must be \(3, 20\) to match x, got \(3, 19\)"):
        layer(x, mask=mask[:, 1:])
    with pytest.raises(ValueError, match="mask and lens must not both be given"):
        layer(x, mask=mask, lens=lens)
    with pytest.raises(ValueError, match=r"lens must be \[b\] for sequences \[b, n\], got \(2,\) for \(3, 20\)"):
        layer(x, lens=lens[:2])
    with pytest.raises(ValueError, match=r"lens must be \[b\] for sequences \[b, n\], got \(3,\) for \(3,\)"):
        layer(x[:, 0], lens=lens)
    with pytest.raises(ValueError, match=r"indices must be \(3, 20\) to match x, got \(3, 19\)"):
        layer(x, indices=torch.zeros(3, 19, dtype=torch.int64))
    with pytest.raises(TypeError, match=r"indices must be int64, got torch.float32"):
        layer(x, indices=torch.zeros(3, 20))
    with pytest.raises(ValueError, match=r"codebook must be \(32, 16\), got \(31, 16\)"):
        layer.codebook = torch.zeros(31, DIM)
    with pytest.raises(ValueError, match=r"indices must be \[..., 2\], one for each head, got \(3, 20\)"):
        VectorQuantize(DIM, NUM_CODES, **OWN_CODES).get_codes_from_indices(torch.zeros(3, 20, dtype=torch.int64))
