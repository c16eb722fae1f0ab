"""The matrix unit's accumulator: a sum that starts at -h stays within (D + 16) 2**-23 M, as the certificate assumes.

M = ||a|| ||b|| + h. A Hopper accumulator that keeps 25 bits below the largest exponent gives at most 0.33 of the bound,
one that keeps 24 bits 0.69. The interpreter loses nothing, so there this only checks the test itself.
"""

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor

from tests.gpu.device import DEVICE, MARKS, SMALL

pytestmark = MARKS
ROWS, CODES = (16, 16) if SMALL else (128, 64)


@triton.jit
def _product_kernel(
    a_ptr, b_ptr, h_ptr, out_ptr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr
):
    offs_n, offs_k, offs_d = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_N, BLOCK_K], tl.float32) - tl.load(h_ptr + offs_k)[None, :]
    for start in range(0, D, BLOCK_D):
        a = tl.load(a_ptr + offs_n[:, None] * D + start + offs_d[None, :])
        b = tl.load(b_ptr + offs_k[:, None] * D + start + offs_d[None, :])
        acc = tl.dot(a, tl.trans(b), acc)
    tl.store(out_ptr + offs_n[:, None] * BLOCK_K + offs_k[None, :], acc)


def share_of_bound(a: Tensor, b: Tensor, h: Tensor, block_d: int) -> float:
    """The largest error of a @ b.T - h [ROWS, CODES] over its bound."""
    a, b, h = a.half().to(DEVICE), b.half().to(DEVICE), h.to(DEVICE)
    found = torch.empty(ROWS, CODES, device=DEVICE)
    _product_kernel[(1,)](
        a, b, h, found, D=a.shape[1], BLOCK_N=ROWS, BLOCK_K=CODES, BLOCK_D=block_d, num_warps=8, enable_fp_fusion=True
    )
    exact = a.double() @ b.double().t() - h.double()
    magnitude = a.double().norm(dim=1)[:, None] * b.double().norm(dim=1) + h.double()
    return ((found.double() - exact).abs() / ((a.shape[1] + 16) * 2.0**-23 * magnitude)).max().item()


@pytest.mark.parametrize(("d", "block_d"), [(16, 16), (64, 64), (512, 64), *([] if SMALL else [(4096, 64)])])
def test_products_far_smaller_than_the_start(d: int, block_d: int) -> None:
    """Every product is 2**-q (1 - 2**-9) beside an h near 1: at which q it is lost shows how many bits are kept."""
    worst = max(
        share_of_bound(
            torch.full((ROWS, d), 2.0 ** -(q - 12) * (1 - 2.0**-9)),
            torch.full((CODES, d), sign * 2.0**-12),
            torch.full((CODES,), h),
            block_d,
        )
        for h in (1.0, 1.0 + 2.0**-23, 2 - 2.0**-23)
        for q in ((20, 24, 27) if SMALL else range(20, 29))
        for sign in (1.0, -1.0)
    )
    assert worst <= 1, f"{worst:.3f} of the bound"


@pytest.mark.parametrize(("d", "block_d"), [(16, 16), (512, 64)])
def test_random_magnitudes(d: int, block_d: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(rows: int) -> Tensor:
        exponents = torch.randint(-24, 13, (rows, d), generator=generator)
        return torch.randn(rows, d, generator=generator) * torch.exp2(exponents.float())

    for _ in range(2 if SMALL else 20):
        h = torch.exp2(torch.randint(-30, 40, (CODES,), generator=generator).float())
        share = share_of_bound(draw(ROWS), draw(CODES), h, block_d)
        assert share <= 1, f"{share:.3f} of the bound"
