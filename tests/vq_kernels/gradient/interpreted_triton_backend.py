"""The Triton gradient under TRITON_INTERPRET=1. test_triton_backend.py runs this file in a separate process."""

import pytest
import torch
from torch import Tensor

from vq_kernels.gradient.triton_backend import SEGMENT_ROWS, codebook_gradient

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


def make(n: int, k: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x, codebook = torch.randn(n, d, generator=generator), torch.randn(k, d, generator=generator)
    return x, codebook, torch.randint(0, k, (n,), generator=generator)


def check(x: Tensor, codebook: Tensor, indices: Tensor, deterministic: bool) -> None:
    means, counts = codebook_gradient(x, codebook, indices, max(x.shape[0], 1), deterministic)
    difference = codebook.double()[indices] - x.double()
    expected = torch.zeros(codebook.shape, dtype=torch.float64).index_add_(0, indices, difference)
    magnitude = torch.zeros(codebook.shape, dtype=torch.float64).index_add_(0, indices, difference.abs())
    assert (means.dtype, counts.dtype) == (torch.float32, torch.int64)
    assert torch.equal(counts, torch.bincount(indices, minlength=codebook.shape[0]))
    difference = (means.double() * max(x.shape[0], 1) - expected).abs()
    assert (difference <= expected.abs() * (2.0**-24 + 1e-12) + 1e-12 * magnitude).all()  # rounded only once


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dims", [(1, 1, 1), (63, 7, 3), (1000, 5, 70), (200, 300, 64), (0, 4, 3)])
def test_against_float64(dims: tuple[int, int, int], deterministic: bool):
    check(*make(*dims), deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("rows", [SEGMENT_ROWS - 1, SEGMENT_ROWS, SEGMENT_ROWS + 1, 40 * SEGMENT_ROWS])
def test_one_code_has_all_rows(rows: int, deterministic: bool):
    x, codebook, indices = make(rows, 6, 5)
    check(x, codebook, torch.full_like(indices, 3), deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
def test_dtypes_and_strides(deterministic: bool):
    x, codebook, indices = make(90, 8, 12)
    check(x.half()[:, ::2], codebook.bfloat16()[:, 1::2], indices, deterministic)
    check(x.T.contiguous().T, codebook.T.contiguous().T, indices.repeat_interleave(2)[::2], deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
def test_sums_do_not_cancel_for_good_codes(deterministic: bool):
    """Rows within a millionth of their codes, for which n c - sum(x) in float32 loses everything."""
    x, codebook, indices = make(300, 4, 6)
    check(1000.0 + codebook[indices] + 1e-4 * x, 1000.0 + codebook, indices, deterministic)


@pytest.mark.parametrize("deterministic", [True, False])
def test_float32_holds_the_mean_of_a_sum_that_it_does_not_hold(deterministic: bool):
    check(torch.full((200, 3), 3e37), torch.zeros(2, 3), torch.arange(200) % 2, deterministic)


def test_two_runs_give_the_same_bits():
    x, codebook, indices = make(700, 9, 20)
    first, second = (codebook_gradient(x, codebook, indices, 1, True)[0] for _ in range(2))
    assert torch.equal(first.view(torch.int32), second.view(torch.int32))
