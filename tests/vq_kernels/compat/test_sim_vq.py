"""`SimVQ`, `ResidualSimVQ` and `RandomProjectionQuantizer` beside those of vector_quantize_pytorch 1.32.0."""

import copy
from typing import Any

import pytest
import torch
import vector_quantize_pytorch
from torch import Tensor, nn

from tests.vq_kernels.compat.side_by_side import (
    DIM,
    NUM_CODES,
    assert_all_close,
    assert_close,
    assert_same_step,
    draw,
    step,
)
from vq_kernels import compat, nearest_code

MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "straight-through": {"rotation_trick": False},
    "weights": {"commitment_weight": 0.3, "input_to_quantize_commit_loss_weight": 2.0},
    "low-dim": {"frozen_codebook_dim": 6},
    "own codes": {"init_fn": lambda codes: codes.sign()},
    "channels first": {"channel_first": True},
    "a transform": {"codebook_transform": nn.Sequential(nn.Linear(DIM, 24), nn.ReLU(), nn.Linear(24, DIM))},
}
RESIDUAL_MODES = {
    **{name: {**mode, "num_quantizers": 4} for name, mode in MODES.items()},
    "dropout": {"num_quantizers": 4, "quantize_dropout": True, "quantize_dropout_cutoff_index": 1},
    "dropout, in pairs": {
        **{"num_quantizers": 5, "quantize_dropout": True, "quantize_dropout_multiple_of": 2},
        "channel_first": True,
    },
}
EVERY = [*MODES.values(), *RESIDUAL_MODES.values()]
NAMES = [*MODES, *(f"residual, {mode}" for mode in RESIDUAL_MODES)]


def both(name: str | None = None, **keywords: Any) -> tuple[Any, Any]:
    """Returns both layers with the same state."""
    name = name or ("ResidualSimVQ" if "num_quantizers" in keywords else "SimVQ")
    layers = []
    for module in (compat, vector_quantize_pytorch):
        torch.manual_seed(0)
        layers.append(getattr(module, name)(dim=DIM, codebook_size=NUM_CODES, **copy.deepcopy(keywords)))
    return layers[0], layers[1]


def inputs(keywords: dict[str, Any], seed: int = 0) -> Tensor:
    return draw(3, DIM, 4, 5, seed=seed) if "channel_first" in keywords else draw(3, 20, DIM, seed=seed)


@pytest.mark.parametrize("keywords", EVERY, ids=NAMES)
def test_training_steps_state_and_decoding(keywords: dict[str, Any]) -> None:
    ours, theirs = both(**keywords)
    for seed in range(3):
        x = inputs(keywords, seed)
        assert_same_step(step(ours, x, seed), step(theirs, x, seed))
        for layer in (ours, theirs):
            torch.optim.SGD(layer.parameters(), 0.1).step()
    saved = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict(saved, strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_all_close(ours.state_dict(), saved)
    x = inputs(keywords, 5)
    options = {"return_all_codes": True} if "num_quantizers" in keywords else {}
    results = []
    for layer in (ours.eval(), theirs.eval()):
        quantized, indices, loss, *codes = layer(x, **options)
        decode = layer.get_output_from_indices if options else layer.indices_to_codes
        results.append([quantized, indices, loss, *codes, decode(indices), getattr(layer, "codebooks", x)])
        assert_close(decode(indices).detach(), quantized.detach())
    for one, other in zip(*results, strict=True):
        assert_close(one.detach(), other.detach())


def test_gradients_of_decoded_codes() -> None:
    gradients = []
    for layer in both(num_quantizers=2):
        codes = layer.get_codes_from_indices(torch.tensor([[[3, 5], [3, -1]]]))
        (codes * draw(*codes.shape)).sum().backward()
        gradients.append({name: value.grad for name, value in layer.named_parameters()})
    assert_all_close(*gradients)


def test_each_index_is_the_nearest() -> None:
    """With an offset, theirs chooses other codes, because it expands the distance in float32."""
    ours, theirs = both(init_fn=lambda codes: codes + 100)
    for layer in (ours, theirs):
        nn.init.eye_(layer.code_transform.weight)
    x = draw(1, 500, DIM) + 100
    nearest = nearest_code(x, ours.codebook.detach()).indices
    assert torch.equal(ours(x)[1], nearest)
    assert not torch.equal(theirs(x)[1], nearest)


def test_half_precision_loses_no_loss() -> None:
    layer, _ = both(num_quantizers=2)
    quantized, _, losses = layer.half()(torch.full((1, 4, DIM), 50_000.0, dtype=torch.float16))
    assert quantized.dtype == torch.float16
    assert losses.isfinite().all()


def test_the_number_of_stages_of_dropout() -> None:
    """Theirs cannot stack the indices of images with the channels last."""
    ours, theirs = both(num_quantizers=4, quantize_dropout=True)
    counts = set()
    for seed in range(12):
        found, expected = (layer(inputs({}), rand_quantize_dropout_fixed_seed=seed)[1] for layer in (ours, theirs))
        assert torch.equal(found, expected)
        counts.add(int((found[0, 0] >= 0).sum()))
    assert counts == {1, 2, 3, 4}
    found = ours(inputs({}).view(3, 4, 5, DIM), rand_quantize_dropout_fixed_seed=0)[1]
    assert torch.equal(found.flatten(1, 2), ours(inputs({}), rand_quantize_dropout_fixed_seed=0)[1])


def test_compiled() -> None:
    for keywords in ({}, {"num_quantizers": 2}):
        layer, _ = both(**keywords)
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        for found, expected in zip(compiled(inputs({})), layer(inputs({})), strict=True):
            assert_close(found.detach(), expected.detach())


PROJECTIONS: dict[str, dict[str, Any]] = {
    "one": {"codebook_dim": 8},
    "three": {"codebook_dim": 8, "num_codebooks": 3},
    "without norm": {"codebook_dim": 8, "num_codebooks": 2, "norm": False},
}


@pytest.mark.parametrize("keywords", PROJECTIONS.values(), ids=PROJECTIONS)
def test_random_projections(keywords: dict[str, Any]) -> None:
    ours, theirs = both("RandomProjectionQuantizer", **keywords)
    assert_all_close(ours.state_dict(), theirs.state_dict())
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, results = draw(3, 20, DIM), []
    targets = torch.randint(0, NUM_CODES, ours(x).shape, generator=torch.Generator().manual_seed(0))
    for layer in (ours, theirs):
        rows = x.clone().requires_grad_()
        loss = layer.train()(rows, indices=targets)
        loss.backward()
        results.append({"indices": layer(x), "loss": loss.detach(), "x": rows.grad, **layer.state_dict()})
    assert_all_close(*results)


def test_sequential_of_theirs_takes_ours() -> None:
    for layer in (both()[0], both(num_quantizers=2)[0]):
        model = vector_quantize_pytorch.Sequential(nn.Linear(DIM, DIM), layer)
        assert model(inputs({}))[0].shape == (3, 20, DIM)


@pytest.mark.parametrize(
    ("name", "keywords", "error", "message"),
    [
        ("SimVQ", {"frozen_codebook_dim": 0}, ValueError, "frozen_codebook_dim must be >= 1, got 0"),
        ("SimVQ", {"commitment_weight": -1}, ValueError, "commitment_weight must be >= 0, got -1"),
        ("SimVQ", {"backend": "numpy"}, ValueError, "backend must be one of auto, triton, llvm, torch, got 'numpy'"),
        ("ResidualSimVQ", {"num_quantizers": 0}, ValueError, "num_quantizers must be >= 1, got 0"),
        ("ResidualSimVQ", {"num_quantizers": 2, "heads": 2}, ValueError, "heads must be 1, got 2"),
        ("ResidualSimVQ", {"num_quantizers": 2, "decay": 0.5}, TypeError, "unexpected keyword argument 'decay'"),
        ("RandomProjectionQuantizer", {"codebook_dim": 0}, ValueError, "codebook_dim must be >= 1, got 0"),
        ("RandomProjectionQuantizer", {"codebook_dim": 4, "heads": 2}, TypeError, "heads must not be given"),
        ("SimVQ", {"rotation_trick": "no"}, TypeError, "rotation_trick must be True or False, got 'no'"),
        (
            "RandomProjectionQuantizer",
            {"codebook_dim": 4, "affine_param": True},
            NotImplementedError,
            "affine_param is not supported; it must be False, got True",
        ),
    ],
)
def test_invalid_arguments(name: str, keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        getattr(compat, name)(dim=DIM, codebook_size=NUM_CODES, **keywords)


def test_invalid_calls() -> None:
    with pytest.raises(ValueError, match=r"x must be \[b, ..., 16\], got \(3, 20, 15\)"):
        both()[0](draw(3, 20, 15))
    with pytest.raises(ValueError, match=r"x must be \[b, 16, ...\], got \(3, 20, 16\)"):
        both(channel_first=True)[0](draw(3, 20, DIM))
    with pytest.raises(ValueError, match=r"indices must be \[..., q\] with q <= 2, got \(3, 3\)"):
        both(num_quantizers=2)[0].get_codes_from_indices(torch.zeros(3, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"x must be \[b, n, 16\], got \(20, 16\)"):
        both("RandomProjectionQuantizer", codebook_dim=4)[0](draw(20, DIM))
