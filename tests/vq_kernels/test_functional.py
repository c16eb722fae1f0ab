"""vector_quantize: its gradients, against explicit formulas."""

import pytest
import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import nearest_code, vector_quantize


def random_case(dtype: torch.dtype = torch.float32, *shape: int, num_codes: int = 40) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)
    codebook = torch.randn(num_codes, shape[-1], generator=generator, dtype=torch.float64).to(dtype)
    return x.requires_grad_(), codebook.requires_grad_()


@pytest.mark.parametrize("shape", [(16,), (30, 16), (2, 5, 7, 16), (0, 16)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x, codebook = random_case(torch.float32, *shape)
    quantized, indices, loss = vector_quantize(x, codebook)
    assert quantized.shape == shape
    assert indices.shape == shape[:-1]
    assert indices.dtype == torch.int64
    assert loss.shape == ()
    assert loss.item() == pytest.approx((x - codebook[indices]).square().mean().item() if x.numel() else 0.0, rel=1e-5)
    assert torch.equal(quantized, codebook[indices])


@pytest.mark.parametrize("masked", [False, True])
def test_second_derivatives_equal_those_of_the_formula(masked: bool) -> None:
    x, codebook = random_case(torch.float64, 60, 16)
    quantizer = vector_quantizer(40, 16, commitment_weight=0.25).eval()
    counted = torch.arange(60) % 3 > 0 if masked else torch.ones(60, dtype=torch.bool)

    def ours(x: Tensor, codebook: Tensor) -> Tensor:
        loss: Tensor = functional_call(quantizer, {"codebook": codebook}, (x, counted if masked else None)).loss
        return loss

    def formula(x: Tensor, codebook: Tensor) -> Tensor:
        codes, rows = codebook[nearest_code(x, codebook).indices][counted], x[counted]
        return F.mse_loss(codes, rows.detach()) + 0.25 * F.mse_loss(rows, codes.detach())

    second = []
    for loss_of in (ours, formula):
        first = torch.autograd.grad(loss_of(x, codebook), (x, codebook), create_graph=True)
        directions = sum((part.sin() * part).sum() for part in first)
        second += [torch.autograd.grad(directions, (x, codebook))]
    torch.testing.assert_close(*second)


def test_x_gets_the_gradient_of_quantized_unchanged_and_nothing_of_the_loss() -> None:
    x, codebook = random_case(torch.float32, 200, 16)
    quantized, _, loss = vector_quantize(x, codebook)
    upstream = torch.randn(200, 16, generator=torch.Generator().manual_seed(1))
    torch.autograd.backward([quantized, loss], [upstream, torch.tensor(3.0)])
    assert torch.equal(x.grad, upstream)


def test_codebook_gets_the_gradient_of_the_loss_and_nothing_of_quantized() -> None:
    x, codebook = random_case(torch.float32, 200, 16)
    quantized, indices, loss = vector_quantize(x, codebook)
    torch.autograd.backward([quantized, loss], [torch.ones(200, 16), torch.tensor(3.0)])
    expected = torch.zeros(40, 16, dtype=torch.float64)
    for row, code in enumerate(indices.tolist()):  # 3 · d/dc of mean (x - c)²
        expected[code] += 3 * 2 / (200 * 16) * (codebook[code].double() - x[row].double()).detach()
    torch.testing.assert_close(codebook.grad.double(), expected, rtol=2e-7, atol=1e-12)
    unused = torch.bincount(indices, minlength=40) == 0
    assert unused.any()
    assert not codebook.grad[unused].any()


def test_commitment_term_and_gradient() -> None:
    x, codebook = random_case(torch.float64, 50, 8)
    quantized, indices, loss = vector_quantize(x, codebook, commitment_weight=0.25)
    (2 * quantized.sum() + loss).backward()
    difference = (x - codebook[indices]).detach()
    torch.testing.assert_close(loss.detach(), 1.25 * difference.square().mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(x.grad, 2 + 0.25 * 2 / 400 * difference, rtol=1e-12, atol=0)
    sums = torch.zeros(40, 8, dtype=torch.float64).index_add_(0, indices, -difference)
    torch.testing.assert_close(codebook.grad, 2 / 400 * sums, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_keeps_its_dtype(dtype: torch.dtype) -> None:
    x, _ = random_case(dtype, 60, 16)
    _, codebook = random_case(torch.float32, 60, 16)
    quantized, indices, loss = vector_quantize(x, codebook)
    assert quantized.dtype == dtype
    assert loss.dtype == torch.float32
    (quantized.float().sum() + loss).backward()
    assert x.grad.dtype == dtype
    assert torch.equal(x.grad, torch.ones_like(x))
    expected = (codebook[indices].double() - x.double()).square().mean()
    assert loss.item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_codebook_far_from_the_origin_has_the_gradient_of_float64() -> None:
    x, codebook = random_case(torch.float32, 5000, 4)
    x, codebook = (x.detach() + 1000).requires_grad_(), (codebook.detach() + 1000).requires_grad_()
    _, indices, loss = vector_quantize(x, codebook)
    loss.backward()
    difference = codebook.detach().double()[indices] - x.detach().double()
    expected = torch.zeros(40, 4, dtype=torch.float64).index_add_(0, indices, difference) * 2 / x.numel()
    torch.testing.assert_close(codebook.grad.double(), expected, rtol=2e-7, atol=1e-12)


def test_invalid_arguments() -> None:
    x, codebook = random_case(torch.float32, 5, 16)
    with pytest.raises(ValueError, match=r"commitment_weight must be >= 0, got -1"):
        vector_quantize(x, codebook, commitment_weight=-1)
    with pytest.raises(ValueError, match=r"x must be \[..., 16\] to match codebook \(40, 16\), got \(5, 15\)"):
        vector_quantize(x[:, :15], codebook)
    with pytest.raises(TypeError, match=r"x must be float32, .*, got torch.int64"):
        vector_quantize(x.long(), codebook)


def test_retained_graph_and_inference_mode() -> None:
    x, codebook = random_case(torch.float32, 20, 16)
    _, _, loss = vector_quantize(x, codebook)
    loss.backward(retain_graph=True)
    first = codebook.grad.clone()
    loss.backward()
    assert torch.equal(codebook.grad, 2 * first)
    with torch.inference_mode():
        assert not vector_quantize(x, codebook).loss.requires_grad
