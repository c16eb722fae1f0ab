"""Losses and gradients that float32 holds although the sum behind them does not fit."""

import math

import pytest
import torch

from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, vector_quantize
from vq_kernels.compat import VectorQuantize

ROWS = 10_000


@pytest.mark.parametrize("commitment_weight", [0.0, 0.25])
def test_loss_and_gradients(commitment_weight: float) -> None:
    x = torch.full((ROWS, 2), 1.5e19, requires_grad=True)  # the squared distance of a row, 4.5e38, does not fit either
    codebook = torch.zeros(3, 2, requires_grad=True)
    loss = vector_quantize(x, codebook, commitment_weight=commitment_weight).loss
    loss.backward()
    assert loss.item() == pytest.approx((1 + commitment_weight) * 2.25e38, rel=1e-6)
    torch.testing.assert_close(codebook.grad[0], torch.full((2,), -1.5e19), rtol=1e-6, atol=0)
    assert not codebook.grad[1:].any()
    if commitment_weight:
        torch.testing.assert_close(x.grad[0], torch.full((2,), 0.25 * 1.5e19 / ROWS), rtol=1e-6, atol=0)


@pytest.mark.parametrize("deterministic", [False, True])
def test_gradient_of_the_codebook(deterministic: bool) -> None:
    x, codebook = torch.full((ROWS, 2), 3e35), torch.zeros(3, 2, requires_grad=True)
    torch.use_deterministic_algorithms(deterministic)
    try:
        vector_quantize(x, codebook).loss.backward(torch.tensor(0.5))
    finally:
        torch.use_deterministic_algorithms(False)
    torch.testing.assert_close(codebook.grad[0], torch.full((2,), -1.5e35), rtol=1e-6, atol=0)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["plain", "residual", "drop-in"])
def test_modules(kind: str, masked: bool) -> None:
    x = torch.full((1, ROWS, 8), 1e19, requires_grad=True)  # the squared distance of a row does not fit either
    mask = torch.ones(1, ROWS, dtype=torch.bool)
    mask[:, ::2] = not masked
    quantizers = {
        "plain": lambda: VectorQuantizer(3, 8, init=torch.zeros(3, 8), commitment_weight=1.0, ema_decay=None),
        "residual": lambda: ResidualVectorQuantizer(
            2, 3, 8, init=torch.zeros(2, 3, 8), commitment_weight=1.0, ema_decay=None
        ),
        "drop-in": lambda: VectorQuantize(8, 3, commitment_weight=2.0, freeze_codebook=True),
    }
    _, _, loss = quantizers[kind]()(x, mask=mask if masked else None)
    loss.sum().backward()
    assert loss.item() == pytest.approx(2e38, rel=1e-5)
    counted = ROWS // 2 if masked else ROWS
    expected = torch.full((8,), 2e19 / counted / 8 * (2 if kind == "drop-in" else 1))
    torch.testing.assert_close(x.grad[0, 1], expected, rtol=1e-5, atol=0)


def test_losses_of_the_nearest_codes() -> None:
    losses = VectorQuantize(8, 3).eval()(torch.full((1, 4, 8), 1e19), topk=2)[2]
    torch.testing.assert_close(losses, torch.full((1, 4, 2), 1e38), rtol=1e-5, atol=0)


def test_tiny_means_do_not_underflow() -> None:
    x, codebook = torch.full((ROWS, 2), 1e-20), torch.zeros(1, 2)
    assert vector_quantize(x, codebook).loss.item() == pytest.approx(1e-40, rel=1e-4)


def test_a_mean_beyond_float32_is_infinite() -> None:
    assert math.isinf(vector_quantize(torch.full((1, 2), 3e19), torch.zeros(1, 2)).loss.item())
