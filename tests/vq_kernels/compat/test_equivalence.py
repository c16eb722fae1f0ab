"""The results, losses and gradients of vector_quantize_pytorch 1.32.0, in every supported mode."""

from importlib.metadata import version
from typing import Any

import pytest
import torch

from tests.vq_kernels.compat.side_by_side import (
    DIM,
    LEARNABLE,
    MODES,
    NUM_CODES,
    OWN_CODES,
    assert_all_close,
    assert_close,
    assert_same_step,
    draw,
    draw_input,
    pair,
    step,
)
from vq_kernels import VectorQuantize
from vq_kernels.compat.keywords import AT_CONSTRUCTION, WITHOUT_EFFECT

WITH_PLAIN_MASKS = ["default", "straight-through", "learnable", "static", "slow and smooth", "frozen"]
"""Modes in which theirs handles masks correctly."""


@pytest.mark.parametrize("mode", MODES)
def test_plain_attributes(mode: str) -> None:
    layers = pair(**MODES[mode])
    ours, theirs = (
        {name: value for name, value in vars(layer).items() if isinstance(value, bool | int | float)}
        for layer in layers
    )
    unsupported = {*AT_CONSTRUCTION, *WITHOUT_EFFECT, "has_codebook_diversity_loss"}
    properties = {"has_commitment_loss", "has_codebook_orthogonal_loss"}
    theirs = {name: value for name, value in theirs.items() if name[0] != "_" and name not in unsupported}
    assert theirs.keys() - ours.keys() == properties
    assert {name: getattr(layers[0], name) for name in theirs}.items() <= theirs.items()


def test_the_stated_version_is_installed() -> None:
    assert version("vector-quantize-pytorch") == "1.32.0"


@pytest.mark.parametrize("mode", MODES)
def test_ten_training_steps_and_an_evaluation(mode: str) -> None:
    ours, theirs = pair(**MODES[mode])
    for seed in range(10):
        x = draw_input(MODES[mode], seed)
        assert_same_step(step(ours, x, seed), step(theirs, x, seed))
    ours.eval()
    theirs.eval()
    x = draw_input(MODES[mode], 11)
    for found, expected in zip(ours(x), theirs(x), strict=True):
        assert_close(found, expected)


@pytest.mark.parametrize("mode", MODES)
def test_state_dicts_load_both_ways(mode: str) -> None:
    _, theirs = pair(**MODES[mode])
    for seed in range(3):
        step(theirs, draw_input(MODES[mode], seed), seed)
    torch.manual_seed(1)
    ours = VectorQuantize(DIM, NUM_CODES, **MODES[mode])
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x = draw_input(MODES[mode], 5)
    found, expected = ours.eval()(x), theirs.eval()(x)
    assert torch.equal(found[1], expected[1])
    assert_close(found[0], expected[0])
    assert_close(ours.codebook, theirs.codebook)


@pytest.mark.parametrize("mode", ["default", "projection", "heads with own codes", "channel first", "cosine"])
def test_single_vectors(mode: str) -> None:
    ours, theirs = pair(**MODES[mode])
    x = draw(40, DIM)
    assert_same_step(step(ours, x), step(theirs, x))


@pytest.mark.parametrize("mode", WITH_PLAIN_MASKS)
@pytest.mark.parametrize("zeros", [True, False])
def test_masks(mode: str, zeros: bool) -> None:
    keywords = {**MODES[mode], "return_zeros_for_masked_padding": zeros}
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.7
    ours, theirs = pair(**keywords)
    for seed in range(3):
        x = draw_input(keywords, seed)
        found = step(ours, x, seed, mask=mask)
        assert_same_step(found, step(theirs, x, seed, mask=mask))
    assert (found.indices[~mask] == -1).all()
    assert torch.equal(found.quantized[~mask], 0 * x[~mask] if zeros else x[~mask])


def test_lens() -> None:
    ours, theirs = pair()
    lens = torch.tensor([20, 0, 7])
    assert_same_step(step(ours, draw(3, 20, DIM), lens=lens), step(theirs, draw(3, 20, DIM), lens=lens))


@pytest.mark.parametrize("at_construction", [False, True])
@pytest.mark.parametrize("mode", ["default", "learnable"])
def test_freezing_in_a_call(mode: str, at_construction: bool) -> None:
    keywords = {**MODES[mode], "freeze_codebook": at_construction}
    ours, theirs = pair(**keywords)
    x = draw_input(keywords)
    for freeze in (True, False, None):
        assert_same_step(step(ours, x, freeze_codebook=freeze), step(theirs, x, freeze_codebook=freeze))


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("commitment_weight", [0.0, 0.25])
def test_loss_breakdown(training: bool, commitment_weight: float) -> None:
    ours, theirs = (layer.train(training) for layer in pair(commitment_weight=commitment_weight))
    x = draw(3, 20, DIM)
    found, expected = ours(x, return_loss_breakdown=True), theirs(x, return_loss_breakdown=True)
    assert found[3]._fields == expected[3]._fields
    for part, other in zip((found[2], *found[3]), (expected[2], *expected[3]), strict=True):
        assert_close(part.detach(), other.detach())
    assert found[2].requires_grad == expected[2].requires_grad


@pytest.mark.parametrize("mode", ["default", "learnable", "projection"])
def test_input_without_a_gradient(mode: str) -> None:
    results = []
    for layer in pair(**MODES[mode]):
        quantized, _, loss = layer(draw(3, 20, DIM))
        (quantized.sum() + loss).backward()
        results.append({name: value.grad for name, value in layer.named_parameters() if value.grad is not None})
    assert_all_close(*results)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "keywords",
    [
        {},
        {"use_cosine_sim": True},
        LEARNABLE,
        {"codebook_dim": 6, **LEARNABLE},
        OWN_CODES,
        {"heads": 2, "codebook_dim": 8},
    ],
)
def test_cross_entropy(keywords: dict[str, Any], training: bool) -> None:
    targets = torch.randint(
        -1, NUM_CODES, (3, 20, keywords.get("heads", 1)), generator=torch.Generator().manual_seed(0)
    )
    targets = targets if "heads" in keywords else targets[..., 0]
    results = []
    for layer in pair(freeze_codebook="learnable_codebook" not in keywords, **keywords):
        layer.train(training)
        x = draw(3, 20, DIM).requires_grad_()
        _, loss = layer(x, indices=targets)
        loss.backward()
        gradients = {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
        results.append({"loss": loss.detach(), "x": x.grad, **gradients})
    assert_all_close(*results)


def test_cross_entropy_also_returns_quantized() -> None:
    ours, theirs = pair()
    x, targets = draw(3, 20, DIM).requires_grad_(), torch.zeros(3, 20, dtype=torch.int64)
    assert_close(ours(x, indices=targets)[0].detach(), theirs(x, indices=targets)[0].detach())


@pytest.mark.parametrize("cosine", [False, True])
@pytest.mark.parametrize("training", [True, False])
def test_expire_codes(training: bool, cosine: bool) -> None:
    states = []
    for layer in pair(threshold_ema_dead_code=2, use_cosine_sim=cosine):
        layer.train(training)
        torch.manual_seed(3)
        layer.expire_codes_(draw(1, 60, DIM))
        states.append(layer.state_dict())
    assert_all_close(*states)


@pytest.mark.parametrize("mode", ["default", "heads with own codes"])
def test_decoding(mode: str) -> None:
    ours, theirs = pair(**MODES[mode])
    indices = theirs(draw(3, 20, DIM))[1]
    ours.load_state_dict(theirs.state_dict())
    assert torch.equal(ours.get_codes_from_indices(indices), theirs.get_codes_from_indices(indices))
    assert torch.equal(ours.get_output_from_indices(indices), theirs.get_output_from_indices(indices))


def test_attributes_that_models_use() -> None:
    for ours, theirs in (pair(), pair(codebook_dim=5, heads=2), pair(**LEARNABLE)):
        for name in ("dim", "codebook_size", "heads", "has_projections", "ema_update", "learnable_codebook"):
            assert getattr(ours, name) == getattr(theirs, name)
