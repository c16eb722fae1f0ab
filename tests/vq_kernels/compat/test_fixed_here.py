"""What vector_quantize_pytorch 1.32.0 gets wrong and this library gets right, side by side."""

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.vq_kernels.compat.side_by_side import (
    DIM,
    LEARNABLE,
    MODES,
    NUM_CODES,
    OWN_CODES,
    Theirs,
    assert_all_close,
    assert_close,
    draw,
    draw_input,
    pair,
    step,
)
from vq_kernels import VectorQuantize
from vq_kernels.search.reference import brute_force_nearest

MASKED_MODES = {
    "projection": {"codebook_dim": 6},
    "heads": {"heads": 2, "codebook_dim": 8},
    "heads, projection": {"heads": 3, "codebook_dim": 5},
    "heads with own codes": OWN_CODES,
    "cosine": {"use_cosine_sim": True},
    "learnable, projection": {**LEARNABLE, "codebook_dim": 6},
}


def fit_codes(layer: Any, codes: Tensor) -> None:
    state = layer.state_dict()
    state["_codebook.embed"] = codes[None]
    layer.load_state_dict(state)


@pytest.mark.parametrize("offset", [0.0, 100.0, 1000.0])
def test_nearest_code_of_data_with_an_offset(offset: float, wrong_rows: list[str]) -> None:
    x, codes = offset + draw(1, 2000, DIM), offset + draw(NUM_CODES, DIM, seed=1)
    nearest = brute_force_nearest(x[0], codes)
    wrong = []
    for layer in pair():
        fit_codes(layer, codes)
        wrong.append(int((layer.eval()(x)[1][0] != nearest).sum()))
    wrong_rows.append(f"VectorQuantize, offset {offset:g}: wrong codes for {wrong[0]} of 2000 rows, theirs {wrong[1]}")
    assert wrong[0] == 0
    assert wrong[1] > 0 or not offset


def test_most_similar_of_close_codes(wrong_rows: list[str]) -> None:
    x = draw(1, 2000, DIM)
    codes = F.normalize(draw(1, DIM, seed=1) + 1e-6 * draw(NUM_CODES, DIM, seed=2), dim=1)
    rows = F.normalize(x[0], dim=1, eps=1e-6)
    most_similar = (rows.double() @ codes.double().t()).argmax(dim=1)
    wrong = []
    for layer in pair(use_cosine_sim=True):
        fit_codes(layer, codes)
        wrong.append(int((layer.eval()(x)[1][0] != most_similar).sum()))
    wrong_rows.append(f"VectorQuantize, close cosines: wrong codes for {wrong[0]} of 2000 rows, theirs {wrong[1]}")
    assert wrong[0] == 0
    assert wrong[1] > 0


@pytest.mark.parametrize("mode", MASKED_MODES)
def test_masked_results_equal_those_without_padding(mode: str) -> None:
    keywords = MASKED_MODES[mode]
    ours, theirs = pair(**keywords)
    x = draw(3, 20, DIM)
    mask = torch.rand(3, 20, generator=torch.Generator().manual_seed(1)) < 0.7

    with_mask, alone = ours, theirs
    padded = x.clone().masked_fill(~mask[..., None], torch.nan).requires_grad_()
    quantized, indices, loss = with_mask(padded, mask=mask)
    weights = draw(3, 20, DIM, seed=7)
    ((quantized * weights).sum() + loss).backward()

    packed = x[mask][None].requires_grad_()
    expected_quantized, expected_indices, expected_loss = alone(packed)
    ((expected_quantized * weights[mask]).sum() + expected_loss).backward()

    assert torch.equal(indices[mask], expected_indices[0])
    assert (indices[~mask] == -1).all()
    assert_close(quantized[mask].detach(), expected_quantized[0].detach())
    assert not quantized[~mask].any()
    assert_close(loss.detach(), expected_loss.detach())
    assert padded.grad is not None
    assert packed.grad is not None
    assert_close(padded.grad[mask], packed.grad[0])
    assert not padded.grad[~mask].any()
    assert_all_close(
        {name: value.grad for name, value in with_mask.named_parameters() if value.grad is not None},
        {name: value.grad for name, value in alone.named_parameters() if value.grad is not None},
    )
    assert_all_close(with_mask.state_dict(), alone.state_dict())


@pytest.mark.parametrize("mode", ["projection", "heads", "heads with own codes"])
def test_theirs_fails_on_masks_with_heads_or_a_projection(mode: str) -> None:
    _, theirs = pair(**MASKED_MODES[mode])
    with pytest.raises(RuntimeError), pytest.warns(UserWarning, match="target size"):
        theirs(draw(3, 20, DIM), mask=torch.ones(3, 20, dtype=torch.bool))


def test_masked_cosine_loss_uses_unit_vectors() -> None:
    mask = torch.ones(3, 20, dtype=torch.bool)
    x = draw(3, 20, DIM)
    masked, plain = (pair(use_cosine_sim=True) for _ in range(2))
    assert_close(step(masked[0], x, mask=mask).loss, step(plain[0], x).loss)
    assert (step(masked[1], x, mask=mask).loss - step(plain[1], x).loss).abs() > 1e-2


def test_lens_of_channel_first_sequences() -> None:
    lens = torch.tensor([20, 0, 7])
    ours, theirs = pair(channel_last=False)
    x = draw(3, DIM, 20)
    found, expected = step(ours, x, lens=lens), step(pair()[0], x.transpose(1, 2), lens=lens)
    assert torch.equal(found.indices, expected.indices)
    assert_close(found.loss, expected.loss)
    with pytest.raises(RuntimeError, match="must match the size"):
        theirs(x, lens=lens)


@pytest.mark.parametrize("mode", ["default", "heads with own codes", "projection"])
def test_padding_decodes_to_zero(mode: str) -> None:
    ours, theirs = pair(**MODES[mode])
    indices = ours.eval()(draw(3, 20, DIM), lens=torch.tensor([20, 0, 7]))[1]
    assert (indices == -1).any()
    padding = indices == -1 if indices.dim() == 2 else (indices == -1).all(dim=-1)
    assert not ours.get_codes_from_indices(indices)[padding].any()
    assert not ours.get_output_from_indices(indices)[padding].any()
    if mode == "default":
        assert torch.equal(theirs.get_codes_from_indices(indices)[padding], theirs.codebook[-1].expand(33, -1))


@pytest.mark.parametrize("mode", MODES)
def test_indices_decode_to_the_eval_output(mode: str) -> None:
    ours, _ = pair(**MODES[mode])
    x = draw_input(MODES[mode])
    ours(x)
    quantized, indices, _ = ours.eval()(x)
    assert torch.equal(ours.get_output_from_indices(indices), quantized)
    if x.dim() == 3:
        lens = torch.tensor([20, 0, 7])
        quantized, indices, _ = ours(x, lens=lens)
        assert torch.equal(ours.get_output_from_indices(indices), quantized)


def test_theirs_cannot_decode_shared_heads_or_projected_channels() -> None:
    for keywords in (MODES["heads, projection, cosine"], {"channel_last": False, "codebook_dim": 6}):
        _, theirs = pair(**keywords)
        indices = theirs.eval()(draw_input(keywords))[1]
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            theirs.get_output_from_indices(indices)
    _, theirs = pair(**MODES["heads"])
    assert theirs.get_output_from_indices(theirs(draw(3, 20, DIM))[1]).shape == (3, 20, 2, 8)


@pytest.mark.parametrize("keywords", [{}, {"codebook_dim": 5}, {"heads": 2, "codebook_dim": 5}, OWN_CODES])
def test_single_vectors_decode_to_the_eval_output(keywords: dict[str, Any]) -> None:
    for channel_last in (True, False):
        ours = VectorQuantize(DIM, NUM_CODES, channel_last=channel_last, **keywords).eval()
        quantized, indices, _ = ours(draw(9, DIM))
        assert quantized.shape == (9, DIM)
        assert torch.equal(ours.get_output_from_indices(indices), quantized)


@pytest.mark.parametrize("keywords", [{}, {"use_cosine_sim": True}, {"threshold_ema_dead_code": 2}, OWN_CODES])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nonfinite_row_does_not_spoil_the_codebook(value: float, keywords: dict[str, Any]) -> None:
    ours, theirs = pair(**keywords)
    x = draw(1, 20, DIM)
    x[0, 3, 5] = value
    assert not ours(x)[2].isfinite()  # the loss shows the row
    assert all(tensor.isfinite().all() for tensor in ours.state_dict().values())
    theirs(x)
    assert not theirs.codebook.isfinite().all()


def test_a_nonfinite_row_does_not_count() -> None:
    keywords = {"codebook_dim": DIM, "threshold_ema_dead_code": 0.1}
    with_nan, without = pair(**keywords)[0], pair(**keywords)[0]
    x = draw(1, 20, DIM)
    without(x[:, 1:])
    x[0, 0] = torch.nan
    with_nan(x)
    assert_all_close(with_nan.state_dict(), without.state_dict())


def test_k_means_ignores_nonfinite_rows() -> None:
    ours, theirs = pair(kmeans_init=True)
    x = draw(1, 60, DIM)
    x[0, ::2] = torch.nan
    ours(x)
    assert all(tensor.isfinite().all() for tensor in ours.state_dict().values())
    theirs(x)
    assert not theirs.codebook.isfinite().all()


def test_dead_codes_are_reset_to_rows_of_the_whole_batch() -> None:
    x = torch.arange(3.0)[:, None, None].expand(3, 200, DIM)
    ours, theirs = pair(threshold_ema_dead_code=2)
    for layer, samples in ((ours, 3), (theirs, 1)):
        layer.expire_codes_(x)
        assert layer.codebook.unique().numel() == samples


@pytest.mark.parametrize("mode", ["default", "straight-through"])
def test_quantized_equals_the_code_in_training(mode: str) -> None:
    ours, theirs = pair(**MODES[mode])
    x = draw(3, 20, DIM)
    x[0, 0] = 0  # has no direction
    before = ours.codebook.clone()
    quantized, indices, _ = ours(x.requires_grad_())
    assert torch.equal(quantized, before[indices])
    assert theirs(x)[0][0, 0].any() == (mode == "straight-through")


def test_cross_entropy_gradient_uses_the_searched_codebook() -> None:
    targets = torch.randint(NUM_CODES, (3, 20), generator=torch.Generator().manual_seed(0))
    gradients = {}
    for freeze in (True, False):
        for name, layer in zip(("ours", "theirs"), pair(), strict=True):
            x = draw(3, 20, DIM).requires_grad_()
            layer(x, indices=targets, freeze_codebook=freeze)[1].backward()
            gradients[name, freeze] = x.grad
    assert torch.equal(gradients["ours", False], gradients["ours", True])
    assert (gradients["theirs", False] - gradients["theirs", True]).abs().max() > 1e-5


def test_activation_checkpointing_learns_once() -> None:
    codebooks = {}
    for checkpointed in (False, True):
        for name, layer in zip(("ours", "theirs"), pair(), strict=True):

            def loss_of(x: Tensor, layer: Any = layer) -> Tensor:
                loss: Tensor = layer(x)[2]
                return loss

            x = draw(3, 20, DIM).requires_grad_()
            (checkpoint(loss_of, x, use_reentrant=False) if checkpointed else loss_of(x)).sum().backward()
            codebooks[name, checkpointed] = layer.codebook
    assert torch.equal(codebooks["ours", True], codebooks["ours", False])
    assert (codebooks["theirs", True] - codebooks["theirs", False]).abs().max() > 0.1


@pytest.mark.parametrize("mode", ["projection", "heads", "images", "channel first", "heads with own codes"])
def test_quantized_beside_the_cross_entropy_has_the_shape_of_x(mode: str) -> None:
    ours, _ = pair(**MODES[mode])
    x = draw_input(MODES[mode])
    quantized, indices, _ = ours.eval()(x)
    beside_loss, loss = ours(x, indices=indices)
    assert torch.equal(beside_loss, quantized)
    assert loss.shape == ()


def test_a_code_that_was_set_stays_if_no_row_chooses_it() -> None:
    codes = torch.cat([draw(1, DIM, seed=3), 100 + draw(NUM_CODES - 1, DIM, seed=4)])
    ours = VectorQuantize(DIM, NUM_CODES)
    for seed in range(3):
        ours(draw(3, 20, DIM, seed=seed))
    ours.codebook = codes
    assert torch.equal(ours.codebook, codes)
    ours(draw(3, 20, DIM))  # all near the first code
    torch.testing.assert_close(ours.codebook[1:], codes[1:], rtol=1e-5, atol=0)  # eps changes them slightly
    theirs = Theirs(DIM, NUM_CODES)
    theirs.codebook = codes
    theirs(draw(3, 20, DIM))
    assert (theirs.codebook[1:] - codes[1:]).abs().min() > 50
