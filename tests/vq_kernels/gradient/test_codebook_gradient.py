"""The gradient of the codebook on the CPU, against float64."""

import functools
from collections.abc import Callable

import pytest
import torch

from vq_kernels.gradient import llvm_backend
from vq_kernels.gradient.autograd import codebook_gradient, codebook_gradient_op

BY_TORCH = functools.partial(codebook_gradient, deterministic=True)


def case(
    num_rows: int, num_codes: int, code_dim: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    x = (torch.randn(num_rows, code_dim, generator=generator) + 100).to(dtype)
    codebook = (torch.randn(num_codes, code_dim, generator=generator) + 100).to(dtype)
    indices = torch.randint(num_codes, (num_rows,), generator=generator) ** 2 % num_codes  # uneven, some unused
    return x, codebook, indices


@pytest.mark.parametrize(
    "gradient", [BY_TORCH, functools.partial(codebook_gradient, deterministic=False), llvm_backend.codebook_gradient]
)
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
    x = x.t().contiguous().t()
    means, counts = gradient(x, codebook, indices, 7)
    difference = codebook.double()[indices] - x.double()
    expected = torch.zeros(num_codes, code_dim, dtype=torch.float64).index_add_(0, indices, difference)
    assert means.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(means.double() * 7, expected, rtol=1e-7, atol=1e-10)
    assert torch.equal(counts, torch.bincount(indices, minlength=num_codes))


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
