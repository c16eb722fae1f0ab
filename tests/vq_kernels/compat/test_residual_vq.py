"""`ResidualVQ` and `GroupedResidualVQ` beside those of vector_quantize_pytorch 1.32.0, call by call."""

import copy
from typing import Any

import pytest
import torch
import vector_quantize_pytorch
from torch import Tensor

from tests.vq_kernels.compat.side_by_side import (
    DIM,
    LEARNABLE,
    NUM_CODES,
    assert_all_close,
    assert_close,
    assert_same_step,
    draw,
    step,
)
from vq_kernels import nearest_code
from vq_kernels.compat import GroupedResidualVQ, ResidualVQ

NUM_STAGES = 4
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "shared": {"shared_codebook": True},
    "shared, cosine": {"shared_codebook": True, "use_cosine_sim": True},
    "shared, learnable": {"shared_codebook": True, **LEARNABLE},
    "cosine": {"use_cosine_sim": True},
    "low-dim": {"codebook_dim": 6},
    "unequal sizes": {"codebook_size": (5, 32, 8, 20), "num_quantizers": None},
    "straight-through": {"rotation_trick": False},
    "slow and smooth": {"decay": 0.99, "eps": 1e-2, "commitment_weight": 0.25},
    "learnable": LEARNABLE,
    # A row alone at its code has a residual of rounding errors, whose direction the rotation trick would use.
    "k-means": {"kmeans_init": True, "codebook_size": 6, "rotation_trick": False},
    "dropout": {"quantize_dropout": True},
    "dropout, cutoff": {"quantize_dropout": True, "quantize_dropout_cutoff_index": 2},
    "dropout, in pairs": {"quantize_dropout": True, "quantize_dropout_multiple_of": 2, "shared_codebook": True},
    "gradient to earlier codes": {"quant_grad_frac": 0.3, **LEARNABLE},
    "DiVeQ": {"diveq": True},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
    "orthogonal": {"orthogonal_reg_weight": 2.0},
    "images": {"accept_image_fmap": True},
    "images, shared": {"accept_image_fmap": True, "shared_codebook": True},
    "one stage": {"num_quantizers": 1, "quantize_dropout": True},
}
GROUPED = {f"groups, {mode}": {"groups": 2, **MODES[mode]} for mode in MODES if "images" not in mode}


def both(**keywords: Any) -> tuple[Any, Any]:
    """Returns both layers with the same state."""
    name = "GroupedResidualVQ" if "groups" in keywords else "ResidualVQ"
    keywords = {"dim": DIM, "num_quantizers": NUM_STAGES, "codebook_size": NUM_CODES, **keywords}
    layers = []
    for one in (GroupedResidualVQ if "groups" in keywords else ResidualVQ, getattr(vector_quantize_pytorch, name)):
        torch.manual_seed(0)
        layers.append(one(**keywords))
    return layers[0], layers[1]


def inputs(keywords: dict[str, Any], seed: int = 0) -> Tensor:
    """Images are [b, n, n, n], the only shape of images that theirs takes."""
    return draw(2, DIM, DIM, DIM, seed=seed) if "accept_image_fmap" in keywords else draw(3, 20, DIM, seed=seed)


@pytest.mark.parametrize("keywords", [*MODES.values(), *GROUPED.values()], ids=[*MODES, *GROUPED])
def test_four_training_steps_and_an_evaluation(keywords: dict[str, Any]) -> None:
    ours, theirs = both(**keywords)
    assert_all_close(ours.state_dict(), theirs.state_dict())
    for seed in range(4):
        x = inputs(keywords, seed)
        assert_same_step(step(ours, x, seed), step(theirs, x, seed))
    results = []
    for layer in (ours, theirs):
        layer.eval()
        torch.manual_seed(0)
        quantized, indices, losses, codes = layer(inputs(keywords, 5), return_all_codes=True)
        codes = torch.stack(codes) if "groups" in keywords else codes
        decoded = layer.get_output_from_indices(indices)
        results.append([one.detach() for one in (quantized, indices, losses, codes, decoded)])
    for one, other in zip(*results, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("keywords", [*MODES.values(), *GROUPED.values()], ids=[*MODES, *GROUPED])
def test_state_dicts_load_both_ways(keywords: dict[str, Any]) -> None:
    ours, theirs = both(**keywords)
    step(theirs, inputs(keywords))
    saved = copy.deepcopy(theirs.state_dict())
    ours.load_state_dict(saved, strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_all_close(ours.state_dict(), saved)
    assert_all_close(ours.state_dict(), theirs.state_dict())
    if "groups" in keywords and isinstance(keywords.get("codebook_size"), tuple):
        return  # theirs raises here
    found, expected = ours.codebooks, theirs.codebooks
    for one, other in zip(found, expected, strict=True):
        for mine, their in zip(one, other, strict=True):
            assert torch.equal(mine, their)


def test_plain_attributes() -> None:
    for keywords in ({}, MODES["shared"], MODES["low-dim"], MODES["dropout, cutoff"], MODES["unequal sizes"]):
        ours, theirs = both(**keywords)
        for name, value in vars(theirs).items():
            if isinstance(value, bool | int | float | tuple) and name not in ("implicit_neural_codebook", "mlps"):
                assert getattr(ours, name) == value, name
        assert ours.codebook_size == theirs.codebook_size
        assert len(ours.layers) == len(theirs.layers)


@pytest.mark.parametrize("mode", ["default", "shared", "unequal sizes", "cosine", "groups, default", "dropout"])
@pytest.mark.parametrize("zeros", [True, False])
def test_masks(mode: str, zeros: bool) -> None:
    """With a mask, theirs compares codes of the cosine with inputs that are not normalised, so the loss differs."""
    keywords = {**{**MODES, **GROUPED}[mode], "return_zeros_for_masked_padding": zeros}
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    ours, theirs = both(**keywords, **({"commitment_weight": 0.0} if mode == "cosine" else {}))
    for seed in range(3):
        x = inputs(keywords, seed)
        found = step(ours, x, seed, mask=mask)
        assert_same_step(found, step(theirs, x, seed, mask=mask))
    assert (found.indices[..., ~mask, :] == -1).all()


@pytest.mark.parametrize("keywords", [{}, {"codebook_dim": 6}, {"accept_image_fmap": True}, {"groups": 2}])
def test_padding_may_hold_anything(keywords: dict[str, Any]) -> None:
    """Theirs returns NaN, or does not take a mask of images."""
    image = "accept_image_fmap" in keywords
    mask = torch.arange(20).view(1, 4, 5).expand(3, 4, 5) % 3 > 0
    x = draw(3, 4, 5, DIM)
    steps = []
    for padding in (0.0, torch.nan):
        ours, _ = both(**keywords)
        filled = torch.where(mask[..., None], x, padding)
        flat = filled.movedim(-1, 1) if image else filled.flatten(1, 2)
        steps.append(step(ours, flat, mask=mask if image else mask.flatten(1)))
    assert_same_step(*steps)


def test_images_of_any_size_equal_sequences() -> None:
    """Theirs takes square images alone, with as many channels as rows, and no projection."""
    for keywords in ({}, {"codebook_dim": 6}, {"groups": 2}):
        images, _ = both(**keywords, accept_image_fmap=True)
        sequences, _ = both(**keywords)
        x = draw(3, 4, 5, DIM)
        found = images(x.movedim(-1, 1), return_all_codes=True)
        expected = sequences(x.flatten(1, 2), return_all_codes=True)
        assert_close(found[0].detach().movedim(1, -1).flatten(1, 2), expected[0].detach())
        assert torch.equal(found[1].flatten(-4 + 1, -4 + 2), expected[1])
        assert_close(found[2].detach(), expected[2].detach())
        for one, other in zip(found[3], expected[3], strict=True):
            assert_close(one.detach().flatten(-3, -2), other.detach())
        decoded = images.eval().get_output_from_indices(found[1])
        assert decoded.shape == x.shape


@pytest.mark.parametrize("keywords", [{}, {"groups": 2}])
def test_single_vectors(keywords: dict[str, Any]) -> None:
    ours, theirs = both(**keywords)
    assert_same_step(step(ours, draw(40, DIM)), step(theirs, draw(40, DIM)))


def test_each_index_is_the_nearest_to_its_residual() -> None:
    """With an offset, theirs chooses other codes, because it expands the distance in float32."""
    ours, theirs = both()
    x = draw(1, 500, DIM) + 100
    for layer in (ours, theirs):
        layer.eval()
        for stage in layer.layers:
            stage._codebook.embed.copy_(draw(1, NUM_CODES, DIM, seed=3) + (100 if stage is layer.layers[0] else 0))
    wrong = []
    for layer in (ours, theirs):
        residual, count = x[0], 0
        indices = layer(x)[1][0]
        for stage, chosen in zip(layer.layers, indices.unbind(-1), strict=True):
            count += int((chosen != nearest_code(residual, stage.codebook).indices).sum())
            residual = residual - stage.codebook[chosen]
        wrong.append(count)
    assert wrong[0] == 0
    assert wrong[1] > 0


def test_decoding_the_first_stages() -> None:
    ours, theirs = both(quantize_dropout=True)
    indices = torch.randint(-1, NUM_CODES, (3, 20, 2), generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    assert_close(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))
    with pytest.raises(ValueError, match=r"indices must be \[..., q\] with q <= 4, got \(3, 5\)"):
        ours.get_codes_from_indices(torch.zeros(3, 5, dtype=torch.int64))


def test_the_seed_of_dropout_may_be_given() -> None:
    ours, theirs = both(quantize_dropout=True)
    counts = set()
    for seed in range(12):
        found, expected = (layer(inputs({}), rand_quantize_dropout_fixed_seed=seed)[1] for layer in (ours, theirs))
        assert torch.equal(found, expected)
        counts.add(int((found[0, 0] >= 0).sum()))
    assert counts == {1, 2, 3, 4}


def test_dead_codes_of_a_shared_codebook_become_residuals_of_any_stage() -> None:
    """Theirs draws from the first batch element, and after each stage too."""
    ours, _ = both(shared_codebook=True, threshold_ema_dead_code=2, ema_update=False)
    x = draw(3, 20, DIM)
    codebook = ours.codebooks[0]
    before, residual, residuals = codebook.clone(), x.flatten(0, 1), []
    for _ in range(NUM_STAGES):
        residuals.append(residual)
        residual = residual - nearest_code(residual, before).codes
    ours(x)
    changed = (ours.codebooks[0] != before).any(dim=1)
    assert changed.any()
    distances = torch.cdist(ours.codebooks[0][changed], torch.cat(residuals))
    assert distances.amin(dim=1).max() < 1e-3
    assert (distances.argmin(dim=1) // 60).unique().numel() > 1


@pytest.mark.parametrize("shared", [False, True])
def test_freezing(shared: bool) -> None:
    for at_construction in (False, True):
        ours, _ = both(shared_codebook=shared, freeze_codebook=at_construction, threshold_ema_dead_code=2)
        before = copy.deepcopy(ours.state_dict())
        ours(inputs({}), freeze_codebook=not at_construction)
        assert_all_close(ours.state_dict(), before)


@pytest.mark.parametrize("shared", [False, True])
def test_activation_checkpointing_learns_once(shared: bool) -> None:
    keywords = {"shared_codebook": shared, "threshold_ema_dead_code": 2, "quantize_dropout": True}
    results = []
    for checkpoint in (False, True):
        layer, _ = both(**keywords)
        torch.manual_seed(0)
        x = inputs({}).requires_grad_()
        for _ in range(2):

            def block(x: Tensor, layer: Any = layer) -> tuple[Tensor, Tensor]:
                quantized, _, losses = layer(x)
                return torch.dropout(quantized, 0.5, train=True), losses  # needs the random state of the original pass

            quantized, losses = (
                torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False) if checkpoint else block(x)
            )
            ((quantized * draw(*x.shape, seed=2)).sum() + losses.sum()).backward()
        assert x.grad is not None
        results.append({"x": x.grad, **layer.state_dict()})
    assert_all_close(*results)


def test_compiled() -> None:
    eager, _ = both(codebook_dim=6)
    compiled = copy.deepcopy(eager)
    run = torch.compile(compiled, fullgraph=True, backend="aot_eager")
    for seed in range(2):
        assert_same_step(step(eager, inputs({}, seed)), step(_Wrapped(run, compiled), inputs({}, seed)))


def test_keywords_without_effect() -> None:
    keywords = {"mlp_kwargs": {"depth": 2}, "beam_size": 1, "beam_score_quantizer_weights": [0.5] * NUM_STAGES}
    ours, theirs = both(**keywords, sample_codebook_temp=0.1)
    assert_same_step(step(ours, inputs({}), beam_size=1), step(theirs, inputs({}), beam_size=1))


class _Wrapped:
    """A compiled layer with the methods that `step` calls, those of the layer."""

    def __init__(self, run: Any, layer: Any) -> None:
        self.run, self.layer = run, layer

    def __call__(self, x: Tensor) -> Any:
        return self.run(x)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.layer, name)


@pytest.mark.parametrize(
    ("keywords", "error", "message"),
    [
        ({"heads": 2}, ValueError, "heads must be 1, got 2"),
        ({"num_quantizers": None}, ValueError, "num_quantizers must be given unless codebook_size is a tuple, got 32"),
        ({"codebook_size": (3, 4)}, ValueError, r"codebook_size must have 4 numbers, got \(3, 4\)"),
        ({"num_quantizers": 0}, ValueError, "num_quantizers must be >= 1, got 0"),
        ({"codebook_size": (8, 8, 8, 9), "shared_codebook": True}, ValueError, "needs stages of one codebook_size"),
        ({"quantize_dropout_cutoff_index": -1}, ValueError, "quantize_dropout_cutoff_index must be >= 0, got -1"),
        (
            {"quantize_dropout": True, "quantize_dropout_cutoff_index": 4},
            ValueError,
            "quantize_dropout_cutoff_index must be < 4, the number of stages, got 4",
        ),
        ({"implicit_neural_codebook": True}, NotImplementedError, "implicit_neural_codebook is not supported"),
        ({"stochastic_sample_codes": True}, NotImplementedError, "stochastic_sample_codes is not supported"),
        ({"beam_size": 2}, NotImplementedError, "beam_size is not supported; it must be None or 1, got 2"),
        ({"codebok_size": 2}, TypeError, "no argument 'codebok_size'"),
    ],
)
def test_invalid_arguments(keywords: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        ResidualVQ(**{"dim": DIM, "num_quantizers": NUM_STAGES, "codebook_size": NUM_CODES, **keywords})


def test_invalid_calls() -> None:
    ours, _ = both()
    with pytest.raises(ValueError, match=r"x must be \[b, n, 16\] or \[b, 16\], got \(3, 20, 15\)"):
        ours(draw(3, 20, 15))
    with pytest.raises(ValueError, match=r"x must be \[b, 16, h, w\], got \(3, 6, 4, 5\)"):
        both(codebook_dim=6, accept_image_fmap=True)[0](draw(3, 6, 4, 5))
    with pytest.raises(ValueError, match=r"indices must be in \[0, 32\), or -1 for padding, got 32"):
        ours.get_codes_from_indices(torch.full((3, 20, 4), 32))
    with pytest.raises(NotImplementedError, match="indices is not supported"):
        ours(inputs({}), indices=torch.zeros(3, 20, 4, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"mask must be \(3, 20\) to match x, got \(3, 19\)"):
        ours(inputs({}), mask=torch.ones(3, 19, dtype=torch.bool))
    with pytest.raises(ValueError, match="dim must be a multiple of groups=3, got 16"):
        GroupedResidualVQ(dim=DIM, groups=3, num_quantizers=2, codebook_size=8)
    grouped, _ = both(groups=2)
    with pytest.raises(ValueError, match=r"x must have 16 channels in dimension -1, got \(3, 20, 8\)"):
        grouped(draw(3, 20, 8))


def test_residuals_beyond_half_precision() -> None:
    layer = ResidualVQ(dim=2, num_quantizers=2, codebook_size=3).half()
    for stage in layer.layers:
        stage._codebook.embed.fill_(-50_000)
    x = torch.full((1, 4, 2), 50_000.0, dtype=torch.float16, requires_grad=True)
    quantized, _, losses = layer(x)
    losses.sum().backward()
    assert quantized.dtype == torch.float16
    assert losses.isfinite().all()
    assert x.grad is not None
    assert x.grad.isfinite().all()
