"""What the kernels of the search share: constants, a row's margin, the certificate, and the outputs of a row.

The margin. In units scaled by 2**(e_x + e_c), let X = (x - mu) 2**e_x and C_k = (c_k - mu) 2**e_c before rounding, and
h_k = 0.5 ||C_k||**2 ratio with ratio = 2**(e_x - e_c). The true score X . C_k - h_k and the score in the scan differ by
at most

    E = r_x C                                   rounding of the row: |(X - x') . C_k| <= ||X - x'|| ||C_k||
      + ||x'|| R                                rounding of the codes: |x' . (C_k - c'_k)|
      + (D + 16) 2**-23 (||x'|| C' + H ratio)   the tensor core's accumulator, which starts at -h and truncates
      + 2**(b - 23) (||x'|| C' + H ratio)       the position of the code, in the b lowest mantissa bits
      + 2**-23 H ratio                          rounding of h to float32
      + H ratio, only if the ratio was raised to 2**-40 (h is then far below the other terms)
      + 2**-60                                  underflow

The margin is 2 E, computed in float32 and rounded up. docs/explanations/exactness.md has the proof. Source of the
accumulator's term: Blanchard et al., Mixed Precision Block Fused Multiply-Add, SIAM J. Sci. Comput. 42 (2020), with
truncation instead of rounding.

The certificate. The state of a row over some codes is its four best scores with their codes, in order, and `hidden`,
the best score that is not among the four. States of parts of a codebook merge into one. With m = 2 E a row is

    certified    if v0 - max(v1, hidden) > m; strictly, so equal scores are never certified
    reranked     else if v0 - hidden > m: the nearest code is among the four
    exhaustive   otherwise: any code may be the nearest
"""

from contextlib import AbstractContextManager, nullcontext
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

# Half norm of a code that must never win (NaN, Inf, past K). A row scales it by 2**-40 to 2**20, which leaves it
# finite and at least 2**64. True scores stay below 2**60.
LARGE_HALF_NORM = tl.constexpr(2.0**104)
# The best score of a row is below this only if no code is finite.
NO_FINITE_CODE = tl.constexpr(-(2.0**62))
# Below every score, packed or not; finite, so that differences are never NaN.
LOWEST_SCORE = tl.constexpr(-3.0e38)
# Marks a row with NaN or Inf; true margins are positive.
ROW_NOT_FINITE = tl.constexpr(-1.0)
# The index that marks a row for the exhaustive search, below every complement of two candidates.
EXHAUSTIVE = tl.constexpr(-(2**63))
# Whether the compiler may fuse a product and a sum into one multiply-add. Every launch states it, because Triton 3.10
# changes the default; up to 3.9 it is True. A fused operation rounds once instead of twice, so the error bounds hold
# either way (docs/explanations/exactness.md).
ENABLE_FP_FUSION = True


class Outputs(NamedTuple):
    """The results for N rows."""

    indices: Tensor  # [N] int64
    codes: Tensor  # [N, D], in x's dtype
    sq_distances: Tensor  # [N] float64


def ceil_div(numerator: int, denominator: int) -> int:
    """numerator / denominator, rounded up."""
    return -(-numerator // denominator)


def device_of(tensor: Tensor) -> AbstractContextManager[object]:
    """Make a CUDA tensor's device the current one, on which Triton launches. Does nothing for a CPU tensor."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


@triton.jit
def load_shifted(row_ptrs, in_rows, columns, stride_d, shift_ptr, D: tl.constexpr):
    """Columns of x [BLOCK_N, BLOCK_D] float32, x - mu, the rounding error of x - mu (TwoSum), and whether it is finite.

    Entries of x - mu that are not finite become 0, so that no NaN enters the scan.
    """
    mask = in_rows[:, None] & (columns < D)[None, :]
    values = tl.load(row_ptrs + columns.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=columns < D, other=0.0)[None, :]
    shifted = values - shift
    back = shifted - values
    lost = (values - (shifted - back)) - (shift + back)
    in_range = tl.abs(shifted) < float("inf")
    return values, tl.where(in_range, shifted, 0.0), tl.where(in_range, lost, 0.0), in_range


@triton.jit
def _power_of_two(exponent):
    """2**exponent as float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_exponent(largest, code_exponent):
    """The exponent e_x of each row's scale: largest * 2**e_x < 2**14.

    At most 20 above the codes' exponent: rows that are tiny compared to the codes need no more, and h * ratio stays in
    range.
    """
    binary_exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(13 - binary_exponent, tl.minimum(code_exponent + 20, 126))


@triton.jit
def round_rows(shifted, lost, exponent):
    """x' [BLOCK_N, BLOCK_D] float16, and per row the sums of squares of (x - mu) 2**e_x - x' and of x'."""
    scale = _power_of_two(exponent)[:, None]
    scaled = shifted * scale
    rounded = scaled.to(tl.float16)
    # Exact but for the last sum: the first difference has no more bits than `scaled`.
    residual = (scaled - rounded.to(tl.float32)) + lost * scale
    widened = rounded.to(tl.float32)
    return rounded, tl.sum(residual * residual, axis=1), tl.sum(widened * widened, axis=1)


@triton.jit
def half_norm_ratio(exponent, code_exponent):
    """2**(e_x - e_c), the scale of the half norms for a row; at least 2**-40, below which h does not matter."""
    return _power_of_two(tl.maximum(exponent - code_exponent, -40))


@triton.jit
def row_margin(residual_square, rounded_square, exponent, code_exponent, bounds_ptr, tile_mask, D: tl.constexpr):
    """2 E of each row, every term rounded up. The terms are in the order of this file's docstring."""
    code_norm = tl.load(bounds_ptr)  # C
    code_residual = tl.load(bounds_ptr + 1)  # R
    code_rounded = tl.load(bounds_ptr + 2)  # C'
    half_norm = tl.load(bounds_ptr + 3) * half_norm_ratio(exponent, code_exponent)  # H ratio
    raise_by: tl.constexpr = 1.0 + (D + 32) * 2.0**-23
    residual_norm = tl.sqrt(residual_square) * raise_by + 2.0**-60
    rounded_norm = tl.sqrt(rounded_square) * raise_by + 2.0**-60
    # Note: the accumulator starts at -h and is truncated in proportion to h too, so H belongs in `magnitude`.
    magnitude = rounded_norm * code_rounded + half_norm
    error = residual_norm * code_norm + rounded_norm * code_residual
    error += magnitude * ((D + 16) * 2.0**-23)
    error += magnitude * ((tile_mask + 1).to(tl.float32) * 2.0**-23)
    error += half_norm * 2.0**-23
    error += tl.where(exponent - code_exponent < -40, half_norm, 0.0)
    error += 2.0**-60
    return 2.0 * (error * (1.0 + 2.0**-18))


@triton.jit
def mark_margin(margin, finite, in_range):
    """The margin; ROW_NOT_FINITE for rows with NaN or Inf, +inf (certifies nothing) for rows that overflow shifted."""
    return tl.where(finite == 0, ROW_NOT_FINITE, tl.where(in_range == 0, float("inf"), margin))


@triton.jit
def is_settled(v0, margin):
    """Whether the index is 0 whatever the scores are: no code is finite, or the row is not."""
    return (v0 < NO_FINITE_CODE) | (margin < 0)


@triton.jit
def certify(
    v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, indices_ptr, sq_distances_ptr,
):  # fmt: skip
    """The index of each row, and whether it is certified.

    Other rows are marked in their outputs by a negative index: EXHAUSTIVE, or the complement of two candidates, with
    two more in place of the distance. Candidates beyond the margin are replaced by the best.
    """
    settled = is_settled(v0, margin)
    certified = settled | (v0 - tl.maximum(v1, hidden) > margin)
    complete = v0 - hidden > margin  # False if the margin is NaN
    first = _pack(i0, tl.where(v0 - v1 <= margin, i1, i0))
    second = _pack(tl.where(v0 - v2 <= margin, i2, i0), tl.where(v0 - v3 <= margin, i3, i0))
    marked = in_rows & (certified == 0)
    tl.store(indices_ptr + offs_n, tl.where(complete, ~first, EXHAUSTIVE), mask=marked)
    tl.store(sq_distances_ptr + offs_n, second.to(tl.float64, bitcast=True), mask=marked)
    return tl.where(settled, 0, i0), certified


@triton.jit
def _pack(low, high):
    """Two codes in an int64, which is not negative."""
    return low.to(tl.int64) | (high.to(tl.int64) << 32)


@triton.jit
def round_to(code, dtype: tl.constexpr):
    """A gathered code in x's dtype, rounded to nearest even.

    bfloat16 is rounded by its bits first, because Triton's interpreter truncates where the hardware rounds.
    """
    code = code.to(tl.float32)
    if dtype == tl.bfloat16:
        bits = code.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000
        code = tl.where(tl.abs(code) < float("inf"), bits.to(tl.float32, bitcast=True), code)
    return code.to(dtype)


@triton.jit
def write_rows(
    index, margin, offs_n, in_rows, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd, indices_ptr,
    codes_ptr, sq_distances_ptr, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Write index, code and squared distance of BLOCK_N rows.

    The differences are rounded to float32. Their squares are summed in float64, where they neither overflow nor
    underflow.
    """
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_n.to(tl.int64)
    sq_distance = tl.zeros([BLOCK_N], tl.float64)
    for start_d in range(0, D, BLOCK_D):
        columns = (start_d + offs_d).to(tl.int64)[None, :]
        mask = in_rows[:, None] & (columns < D)
        values = tl.load(x_ptr + rows[:, None] * stride_xn + columns * stride_xd, mask=mask, other=0.0)
        source = codebook_ptr + index.to(tl.int64)[:, None] * stride_ck + columns * stride_cd
        code = tl.load(source, mask=mask, other=0.0)
        tl.store(codes_ptr + rows[:, None] * D + columns, round_to(code, codes_ptr.dtype.element_ty), mask=mask)
        difference = (code.to(tl.float32) - values.to(tl.float32)).to(tl.float64)
        sq_distance += tl.sum(difference * difference, axis=1)
    sq_distance = tl.where(margin < 0, float("nan"), sq_distance)  # a row with NaN or Inf
    tl.store(indices_ptr + rows, index.to(tl.int64), mask=in_rows)
    tl.store(sq_distances_ptr + rows, sq_distance, mask=in_rows)
