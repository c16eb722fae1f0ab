"""The gradient of the codebook on the CPU, against float64."""

import functools
from collections.abc import Callable

import pytest
import torch

from vq_kernels.gradient import llvm_backend
from vq_kernels.gradient.autograd import codebook_gradient, codebook_gradient_op

BY_TORCH = functools.partial(codebook_gradient, deterministic=True)
GRADIENTS = (BY_TORCH, functools.partial(codebook_gradient, deterministic=False), llvm_backend.codebook_gradient)


def case(
    num_rows: int, num_codes: int, code_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(num_rows, code_dim, generator=generator) + 100).to(dtype)
    codebook = (torch.randn(num_codes, code_dim, generator=generator) + 100).to(dtype)
    indices = torch.randint(num_codes, (num_rows,), generator=generator) ** 2 % num_codes  # uneven, some unused
    return x, codebook, indices


@pytest.mark.parametrize("gradient", GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize(("num_rows", "num_codes", "code_dim"), [(0, 3, 5), (1, 1, 1), (1000, 7, 3), (5000, 300, 64)])
def test_sums_and_counts(
    gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]],
    dtype: torch.dtype,
    num_rows: int,
    num_codes: int,
    code_dim: int,
) -> None:
    if gradient is llvm_backend.codebook_gradient and dtype == torch.float64:
        pytest.skip("PyTorch sums float64 rows")
    x, codebook, indices = case(num_rows, num_codes, code_dim, dtype)
    x, codebook, indices = x.t().contiguous().t(), codebook.t().contiguous().t(), indices.repeat_interleave(2)[::2]
    means, counts = gradient(x, codebook, indices, 7)
    difference = codebook.double()[indices] - x.double()
    expected = torch.zeros(num_codes, code_dim, dtype=torch.float64).index_add_(0, indices, difference)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(means.double() * 7, expected, rtol=1e-7, atol=1e-10)
    assert torch.equal(counts, torch.bincount(indices, minlength=num_codes))


@pytest.mark.parametrize("gradient", GRADIENTS)
def test_differences_are_not_rounded(gradient: Callable[..., tuple[torch.Tensor, torch.Tensor]]) -> None:
    x = torch.tensor([[2.0**24], [-(2.0**24)]])  # float32 does not hold 1 + 2²⁴
    means, _ = gradient(x, torch.ones(1, 1), torch.zeros(2, dtype=torch.int64), 1)
    assert means.item() == 2


def test_deterministic_sums_repeat_bit_for_bit_over_several_tiles() -> None:
    x, codebook, indices = case(40_000, 50, 64, torch.float32)  # three tiles of 2²⁰ numbers
    first, _ = BY_TORCH(x, codebook, indices, 1)
    second, _ = BY_TORCH(x, codebook, indices, 1)
    assert torch.equal(first, second)


def test_the_operator_dispatches() -> None:
    x, codebook, indices = case(100, 9, 4, torch.float32)
    found, counts = codebook_gradient_op(x, codebook, indices, 1, "auto")
    expected, expected_counts = llvm_backend.codebook_gradient(x, codebook, indices, 1)
    assert torch.equal(found, expected)
    assert torch.equal(counts, expected_counts)


def test_operator_is_well_formed() -> None:
    x, codebook, _ = case(5, 7, 3, torch.float32)
    indices = torch.tensor([0, 3, 3, 1, 6])
    torch.library.opcheck(torch.ops.vq_kernels.codebook_gradient.default, (x, codebook, indices, 3, "torch"))
