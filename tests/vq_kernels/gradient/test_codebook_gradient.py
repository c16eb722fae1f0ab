"""The gradient of the codebook in PyTorch, against float64."""

import pytest
import torch

from vq_kernels.gradient.autograd import codebook_gradient, codebook_gradient_op


def case(
    num_rows: int, num_codes: int, code_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(num_rows, code_dim, generator=generator) + 100).to(dtype)
    codebook = (torch.randn(num_codes, code_dim, generator=generator) + 100).to(dtype)
    indices = torch.randint(num_codes, (num_rows,), generator=generator) ** 2 % num_codes  # uneven, some unused
    return x, codebook, indices


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("num_rows", "num_codes", "code_dim"), [(0, 3, 5), (1, 1, 1), (1000, 7, 3), (5000, 300, 64)])
def test_sums_and_counts(deterministic: bool, dtype: torch.dtype, num_rows: int, num_codes: int, code_dim: int) -> None:
    x, codebook, indices = case(num_rows, num_codes, code_dim, dtype)
    means, counts = codebook_gradient(x, codebook, indices, 7, deterministic)
    difference = codebook.double()[indices] - x.double()
    expected = torch.zeros(num_codes, code_dim, dtype=torch.float64).index_add_(0, indices, difference)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(means.double() * 7, expected, rtol=1e-7, atol=1e-10)
    assert torch.equal(counts, torch.bincount(indices, minlength=num_codes))


def test_deterministic_sums_repeat_bit_for_bit_over_several_tiles() -> None:
    x, codebook, indices = case(40_000, 50, 64, torch.float32)  # three tiles of 2²⁰ numbers
    first, _ = codebook_gradient(x, codebook, indices, 1, deterministic=True)
    second, _ = codebook_gradient(x, codebook, indices, 1, deterministic=True)
    assert torch.equal(first, second)


def test_the_operator_dispatches() -> None:
    x, codebook, indices = case(100, 9, 4, torch.float32)
    found, counts = codebook_gradient_op(x, codebook, indices, 1, "auto")
    expected, expected_counts = codebook_gradient(x, codebook, indices, 1, deterministic=True)
    assert torch.equal(found, expected)
    assert torch.equal(counts, expected_counts)


def test_operator_is_well_formed() -> None:
    x, codebook, _ = case(5, 7, 3, torch.float32)
    indices = torch.tensor([0, 3, 3, 1, 6])
    torch.library.opcheck(torch.ops.vq_kernels.codebook_gradient.default, (x, codebook, indices, 3, "torch"))
