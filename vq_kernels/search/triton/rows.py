# Kernels are Python that Triton compiles, so their tensors carry no types.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""The rows' half of the scan: x' = fp16((x - mu) * 2**e_x), and the margin that proves a winner.

The bound. In units scaled by 2**(e_x + e_c), with X = (x - mu) 2**e_x and C_k = (c_k - mu) 2**e_c before rounding and
h_k = 0.5 ||C_k||**2 * ratio, ratio = 2**(e_x - e_c), the true score X . C_k - h_k and the packed one the scan compares
differ by at most

    E = r_x C                                   rounding of the row: |(X - x') . C_k| <= ||X - x'|| ||C_k||
      + ||x'|| R                                rounding of the codes: |x' . (C_k - c'_k)|
      + (D + 16) 2**-23 (||x'|| C' + H ratio)   the tensor core's accumulator, which starts at -h and truncates
      + 2**(b - 23) (||x'|| C' + H ratio)       b low mantissa bits replaced by the place of the code
      + 2**-23 H ratio                          h's own rounding to float32
      + H ratio, only where the ratio was raised to 2**-40 (then h is far below the other terms)
      + 2**-60                                  whatever underflows

so best - runner-up > 2 E proves the best. r_x and ||x'|| are float32 sums of D squares: each is raised by
(D + 32) 2**-23 relative and 2**-60 absolute, which holds the hardware's square root too (within 2**-23, of subnormals
0); C, R, C' and H come rounded up; E itself is raised by 2**-18 for its own
dozen roundings and for that of the difference best - runner-up. Source of the accumulator's term: Blanchard et al.,
Mixed Precision Block Fused Multiply-Add, SIAM J. Sci. Comput. 42 (2020), with truncation in place of rounding.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import ENABLE_FP_FUSION, ROW_NOT_FINITE, ceil_div, device_of
from vq_kernels.search.triton.plan import SearchPlan
from vq_kernels.search.triton.prepare import TritonCodebook, row_pitch


@triton.jit
def shift_rows(values, shift):
    """values - shift [BLOCK_N, BLOCK_D], what that subtraction lost (TwoSum), and where it is finite.

    Entries whose shifted value is not finite become 0, so that no NaN enters the scan.
    """
    shifted = values - shift
    back = shifted - values
    lost = (values - (shifted - back)) - (shift + back)
    in_range = tl.abs(shifted) < float("inf")
    return tl.where(in_range, shifted, 0.0), tl.where(in_range, lost, 0.0), in_range


@triton.jit
def _load_shifted(rows, in_rows, columns, stride_d, shift_ptr, D: tl.constexpr):
    """Columns of the rows [BLOCK_N, BLOCK_D] float32 as they are, and what `shift_rows` makes of them."""
    mask = in_rows[:, None] & (columns < D)[None, :]
    values = tl.load(rows + columns.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + columns, mask=columns < D, other=0.0)
    shifted, lost, in_range = shift_rows(values, shift[None, :])
    return values, shifted, lost, in_range


@triton.jit
def power_of_two(exponent):
    """2**exponent as float32, for -126 <= exponent <= 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit
def row_exponent(largest, code_exponent):
    """The exponent e_x of each row's scale: largest * 2**e_x < 2**14.

    At most 20 above the codes' own: a row that is tiny beside them does not decide, and h * ratio stays in range.
    """
    binary_exponent = (largest.to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(13 - binary_exponent, tl.minimum(code_exponent + 20, 126))


@triton.jit
def round_rows(shifted, lost, exponent):
    """x' [BLOCK_N, BLOCK_D] float16, and per row the sums of squares of (x - mu) 2**e_x - x' and of x'."""
    scale = power_of_two(exponent)[:, None]
    scaled = shifted * scale
    rounded = scaled.to(tl.float16)
    # Exact but for the last sum: the first difference has no more bits than `scaled`.
    residual = (scaled - rounded.to(tl.float32)) + lost * scale
    widened = rounded.to(tl.float32)
    return rounded, tl.sum(residual * residual, axis=1), tl.sum(widened * widened, axis=1)


@triton.jit
def half_norm_ratio(exponent, code_exponent):
    """2**(e_x - e_c), by which a row scales the half norms; raised to 2**-40, below which h no longer matters."""
    return power_of_two(tl.maximum(exponent - code_exponent, -40))


@triton.jit
def row_margin(residual_square, rounded_square, exponent, code_exponent, bounds_ptr, tile_mask, D: tl.constexpr):
    """2 E of each row, every term rounded up. The terms stand in the order of this file's docstring."""
    code_norm = tl.load(bounds_ptr)  # C
    code_residual = tl.load(bounds_ptr + 1)  # R
    code_rounded = tl.load(bounds_ptr + 2)  # C'
    half_norm = tl.load(bounds_ptr + 3) * half_norm_ratio(exponent, code_exponent)  # H ratio
    raise_by: tl.constexpr = 1.0 + (D + 32) * 2.0**-23
    residual_norm = tl.sqrt(residual_square) * raise_by + 2.0**-60
    rounded_norm = tl.sqrt(rounded_square) * raise_by + 2.0**-60
    # Trap: the accumulator starts at -h and is truncated in proportion to h too, so H belongs in `magnitude`.
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
    """ROW_NOT_FINITE for rows with NaN or Inf; +inf, which proves nothing, for finite rows that overflow shifted."""
    return tl.where(finite == 0, ROW_NOT_FINITE, tl.where(in_range == 0, float("inf"), margin))


@triton.jit(do_not_specialize=["N", "tile_mask"])
def _rows_kernel(
    x_ptr,  # [N, D], any strides
    stride_n,
    stride_d,
    shift_ptr,  # [D] float32
    exponent_ptr,  # [1] int32
    bounds_ptr,  # [4] float32
    rows16_ptr,  # [N padded to BLOCK_N, PITCH] float16
    ratios_ptr,  # [N] float32
    margins_ptr,  # [N] float32
    N,
    tile_mask,
    D: tl.constexpr,
    PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """x', ratio and margin of each row, for codes too long to keep a tile of x' on the chip. Two passes over x."""
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    in_rows = offs_n < N
    rows = x_ptr + offs_n.to(tl.int64)[:, None] * stride_n
    finite = tl.full([BLOCK_N], 1, tl.int32)
    in_range = tl.full([BLOCK_N], 1, tl.int32)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        values, shifted, _, shifted_in_range = _load_shifted(rows, in_rows, start_d + offs_d, stride_d, shift_ptr, D)
        finite = tl.minimum(finite, tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1))
        in_range = tl.minimum(in_range, tl.min(shifted_in_range.to(tl.int32), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(shifted), axis=1))
    code_exponent = tl.load(exponent_ptr)
    exponent = row_exponent(largest, code_exponent)
    residual_square = tl.zeros([BLOCK_N], tl.float32)
    rounded_square = tl.zeros([BLOCK_N], tl.float32)
    for start_d in range(0, PITCH, BLOCK_D):
        columns = start_d + offs_d
        _, shifted, lost, _ = _load_shifted(rows, in_rows, columns, stride_d, shift_ptr, D)
        rounded, residual_part, rounded_part = round_rows(shifted, lost, exponent)
        residual_square += residual_part
        rounded_square += rounded_part
        target = rows16_ptr + offs_n.to(tl.int64)[:, None] * PITCH + columns[None, :]
        tl.store(target, rounded, mask=(columns < PITCH)[None, :])
    margin = row_margin(residual_square, rounded_square, exponent, code_exponent, bounds_ptr, tile_mask, D)
    tl.store(ratios_ptr + offs_n, half_norm_ratio(exponent, code_exponent), mask=in_rows)
    tl.store(margins_ptr + offs_n, mark_margin(margin, finite, in_range), mask=in_rows)


def launch_rows(x: Tensor, prepared: TritonCodebook, plan: SearchPlan) -> tuple[Tensor, Tensor, Tensor]:
    """x' [N padded to a tile, pitch] float16, ratios [N] and margins [N] float32, for a scan that loops over D."""
    num_rows, code_dim = x.shape
    block_n = 16
    padded = ceil_div(num_rows, plan.config.block_n) * plan.config.block_n
    rows16 = x.new_empty((padded, row_pitch(code_dim)), dtype=torch.float16)
    ratios = x.new_empty((num_rows,), dtype=torch.float32)
    margins = torch.empty_like(ratios)
    with device_of(x):
        _rows_kernel[(padded // block_n,)](
            x, *x.stride(), prepared.shift, prepared.exponent, prepared.bounds, rows16, ratios, margins, num_rows,
            plan.tile_mask, D=code_dim, PITCH=row_pitch(code_dim), BLOCK_N=block_n, BLOCK_D=128,
            enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
    return rows16, ratios, margins
