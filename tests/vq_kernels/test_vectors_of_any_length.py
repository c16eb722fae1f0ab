"""The cosine and the dot product of vectors of any length, and of codes of very different lengths."""

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from vq_kernels import VectorQuantize, VectorQuantizer, most_similar_code
from vq_kernels.cosine import unit
from vq_kernels.gradient.autograd import rotation_trick

SCALES = [1e-44, 1e-38, 1e-22, 1e-10, 1.0, 1e10, 1e19, 3e37]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def check_exact(x: Tensor, codebook: Tensor) -> None:
    """Compare with the products in rational numbers."""
    codes = [[Fraction(value) for value in code] for code in codebook.tolist()]
    expected = []
    for row in x.tolist():
        fractions = [Fraction(value) for value in row]
        products = [sum(a * b for a, b in zip(fractions, code, strict=True)) for code in codes]
        expected.append(products.index(max(products)))
    assert most_similar_code(x, codebook).indices.tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("scale", [4e-40, *SCALES[1:], 3e38])
def test_every_finite_row_but_0_has_a_direction(scale: float, dtype: torch.dtype) -> None:
    x = (scale * torch.tensor([[0.5, 0.5, -0.5, 0.5], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])).to(dtype)
    expected = torch.tensor([[0.5, 0.5, -0.5, 0.5], [0.0, 0.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]]).to(dtype)
    torch.testing.assert_close(unit(x), expected, rtol=1e-5 if dtype == torch.float64 else 1e-2, atol=0)
    if dtype == torch.float32 and 1e-37 < scale < 1e37:
        rows = scale * draw(50, 7)
        torch.testing.assert_close(unit(rows), unit(rows.double()).float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("scale", [5e-324, 1e-200, 1e200, 1.7e308])
def test_float64_rows(scale: float) -> None:
    x = scale * torch.tensor([[1.0, 1.0, 1.0, -1.0]], dtype=torch.float64)
    assert unit(x).tolist() == [[0.5, 0.5, 0.5, -0.5]]


@pytest.mark.parametrize("scale", [1e-20, 1e20])
def test_gradient_of_a_direction(scale: float) -> None:
    x = (scale * draw(5, 3).double()).requires_grad_()
    narrow = x.detach().float().requires_grad_()
    upstream = draw(5, 3, seed=1)
    unit(x).backward(upstream.double())
    unit(narrow).backward(upstream)
    expected = torch.autograd.grad((x / x.norm(dim=1, keepdim=True)), x, upstream.double())[0]
    torch.testing.assert_close(x.grad, expected, rtol=1e-10, atol=0)
    torch.testing.assert_close(narrow.grad.double(), expected, rtol=1e-3, atol=0)
    zero = torch.zeros(1, 3, requires_grad=True)
    unit(zero).sum().backward()
    assert zero.grad.isfinite().all()


@pytest.mark.parametrize("scale", SCALES[1:])
def test_quantizers_choose_by_the_direction(scale: float) -> None:
    x = draw(1000, 8)
    plain = VectorQuantizer(64, 8, metric="cosine", init=draw(64, 8, seed=1)).eval()
    drop_in = VectorQuantize(8, 64, use_cosine_sim=True).eval()
    for quantizer in (plain, drop_in):
        near, far = quantizer(x.view(1, 1000, 8))[1], quantizer(scale * x.view(1, 1000, 8))[1]
        assert (near != far).sum() <= (5 if scale < 1e-35 else 0)  # subnormal entries round
        assert near.unique().numel() > 40


@pytest.mark.parametrize("code_scale", SCALES)
@pytest.mark.parametrize("row_scale", SCALES)
def test_products_that_overflow_or_underflow(row_scale: float, code_scale: float) -> None:
    check_exact(row_scale * draw(30, 5), code_scale * draw(20, 5, seed=1))


def test_codes_longer_than_float32_holds() -> None:
    codebook = torch.full((5, 4), 3e38) * torch.tensor([[1.0], [-1.0], [0.1], [1.0], [0.0]])
    x = torch.tensor([[1.0, 1, 1, 1], [-1, -1, -1, -1], [1e-38, 0, 0, 0], [0, 0, 0, 0]])
    found = most_similar_code(x, codebook)
    assert found.indices.tolist() == [0, 1, 0, 0]
    assert found.similarities.tolist() == [torch.inf, torch.inf, pytest.approx(3.0), 0.0]


@pytest.mark.parametrize("length", [1e4, 1e8, 1e16, 1e37])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_one_very_long_code(length: float, dtype: torch.dtype) -> None:
    codebook = unit(draw(40, 6)).to(dtype)
    codebook[3] *= length
    check_exact(draw(200, 6, seed=1).to(dtype), codebook)


@pytest.mark.parametrize("decades", [5, 20, 37])
def test_codes_and_rows_of_all_lengths(decades: int) -> None:
    generator = torch.Generator().manual_seed(decades)
    x, codebook = draw(100, 4), draw(50, 4, seed=1)
    x *= 10 ** (decades * (2 * torch.rand(100, 1, generator=generator) - 1))
    codebook *= 10 ** (decades * (2 * torch.rand(50, 1, generator=generator) - 1))
    codebook[7] = codebook[3]
    check_exact(x, codebook)
    check_exact(x.double(), codebook)
    check_exact(x, codebook.double())


def test_entries_of_very_different_sizes() -> None:
    x = torch.tensor([[3e38, 1e-30], [1e-30, 3e38], [3e38, -1e-30]])
    check_exact(x, torch.tensor([[0.0, -1.0], [0.0, 1.0], [-1.0, 0.0], [0.0, 1e-20]]))


def test_similarities_are_those_of_float64() -> None:
    x, codebook = torch.tensor([[1e30, 1.0], [1e-30, 0.0], [1e20, 0.0]]), torch.tensor([[1e-25, 0.0], [0.0, -1.0]])
    found = most_similar_code(x, codebook)
    assert found.indices.tolist() == [0, 0, 0]
    torch.testing.assert_close(found.similarities, (x.double() @ codebook[0].double()).float(), rtol=1e-6, atol=1e-44)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_rotated_gradient(scale: float) -> None:
    x, codes, upstream = scale * draw(6, 4), scale * draw(6, 4, seed=1), draw(6, 4, seed=2)
    expected = []
    for rows, targets in ((x, codes), (x.double() / scale, codes.double() / scale)):
        rows.requires_grad_()
        rotation_trick(rows, targets).backward(upstream.to(rows.dtype))
        expected.append(rows.grad)
    if scale > 1:
        torch.testing.assert_close(expected[0].double(), expected[1], rtol=1e-4, atol=1e-5)
    else:  # ‖x‖ counts as 1e-6 in the ratio
        assert 0 < expected[0].abs().amax() < 1e-20


@pytest.mark.parametrize("case", ["units", "lengths", "copies", "not finite"])
def test_many_rows_and_codes(case: str) -> None:
    """More products than are held at a time, against float64."""
    x, codebook = unit(draw(3000, 8)), unit(draw(700, 8, seed=1))
    if case == "lengths":
        codebook *= 10 ** (15 * torch.rand(700, 1, generator=torch.Generator().manual_seed(2)))
        x[::3] *= 1e-30
    if case == "copies":
        codebook[40:] = codebook[:20].repeat(33, 1)
        x[:5] = 0
    if case == "not finite":
        codebook[::7, 3], codebook[1::7, 2], x[::9, 0] = torch.nan, torch.inf, torch.inf
    found = most_similar_code(x, codebook)
    products = x.double() @ codebook.double().t()
    products[:, ~codebook.isfinite().all(dim=1)] = -torch.inf
    expected = products.argmax(dim=1)
    finite = x.isfinite().all(dim=1)
    assert not found.indices[~finite].any()
    assert found.similarities[~finite].isnan().all()
    found_products, largest = (products.gather(1, indices[:, None])[:, 0] for indices in (found.indices, expected))
    lengths = x.double().norm(dim=1) * codebook.double()[found.indices].norm(dim=1)
    assert (largest - found_products <= 1e-15 * lengths)[finite].all()
    if case == "copies":
        assert found.indices.max() < 40
        assert not found.indices[:5].any()
