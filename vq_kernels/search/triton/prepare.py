"""Prepares the codes for the scan: shifted, scaled, rounded to float16, with their norms.

    mu   = mean over the finite codes                          (float64 sum, stored as float32)
    e    = the exponent for which max |c_k - mu| * 2**e < 2**14
    c'_k = fp16((c_k - mu) * 2**e)
    h_k  = 0.5 * ||(c_k - mu) * 2**e||**2                      (float64 sum, stored as float32)
    C, R, C', H = max ||(c_k - mu) * 2**e||, max ||(c_k - mu) * 2**e - c'_k||, max ||c'_k||, max h_k, rounded up

The codebook takes two launches, which read it three times and write 2 bytes per entry and 4 bytes per code; there is
no float64 copy. Nothing waits for the device.

Distances do not depend on mu, so any float32 mu is right. A 16-bit codebook whose mean is small compared to its spread
gets mu = 0, and is then represented exactly.

Source of the bound on rounding to fp16: Higham, Accuracy and Stability of Numerical Algorithms, 2nd ed., section 2.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import (
    ENABLE_FP_FUSION,
    LARGE_HALF_NORM,
    ceil_div,
)
from vq_kernels.search.triton.plan import CODE_PADDING, row_pitch

_BLOCK_K = 32
_BLOCK_D = 64
# Programs that sum the columns, and the columns of all of them, at most (2 MiB). The next launch's programs read all.
_MAX_PARTIALS, _MAX_SUMS = 64, 2**16
_BLOCK_P = 16  # partial sums combined at once
# The compiler aims for fewer on its own, and then spills for some dtypes.
_STATISTICS_REGISTERS, _ROUND_REGISTERS = 224, 128


class TritonCodebook(NamedTuple):
    """The prepared tensors of a codebook, in the order in which they are passed as a list."""

    codes16: Tensor  # [K padded to 128, pitch] float16, c'; rows past K and codes with NaN or Inf are 0
    half_norms: Tensor  # [K padded to 128] float32, h; 2**104 past K and for codes with NaN or Inf
    scaling: Tensor  # [D + 5] float32, mu; C, R, C' and H in scaled units, rounded up, of the finite codes; e

    @property
    def shift(self) -> Tensor:
        """[D] float32, mu."""
        return self.scaling[:-5]

    @property
    def bounds(self) -> Tensor:
        """[4] float32, C, R, C' and H."""
        return self.scaling[-5:-1]

    @property
    def exponent(self) -> int:
        """e."""
        return int(self.scaling[-1])


@triton.jit(do_not_specialize=["K", "codes_per_program"])
def _column_statistics_kernel(
    codebook_ptr, stride_k, stride_d,  # [K, D], any strides
    half_norms_ptr,  # [K padded] float32: receives 0 for a finite code, LARGE_HALF_NORM for another
    partials_ptr,  # [programs, 4, D] float64: sum, least, greatest, number of finite codes
    scaling_ptr,  # [D + 5] float32: the bounds receive zeros, which the next launch raises
    K, D, codes_per_program, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program == 0:
        tl.store(scaling_ptr + D + tl.arange(0, 4), tl.zeros([4], tl.float32))
    first = program * codes_per_program
    last = tl.minimum(first + codes_per_program, K)
    offs_d = tl.arange(0, BLOCK_D)
    num_finite = tl.zeros([BLOCK_K], tl.float64)
    for start in range(first, last, BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        rows = codebook_ptr + offs_k.to(tl.int64)[:, None] * stride_k
        finite = tl.full([BLOCK_K], 1, tl.int32)
        for start_d in range(0, D, BLOCK_D):
            columns = start_d + offs_d
            mask = (offs_k < last)[:, None] & (columns < D)[None, :]
            values = tl.load(rows + columns.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float32)
            finite = tl.minimum(finite, tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1))
        tl.store(half_norms_ptr + offs_k, tl.where(finite == 1, 0.0, LARGE_HALF_NORM), mask=offs_k < last)
        num_finite += tl.where((finite == 1) & (offs_k < last), 1.0, 0.0)
    tl.debug_barrier()  # other threads of this program read the marks below
    count = tl.sum(num_finite, axis=0)
    for start_d in range(0, D, BLOCK_D):
        columns = start_d + offs_d
        total = tl.zeros([BLOCK_D], tl.float64)
        least = tl.full([BLOCK_D], float("inf"), tl.float64)
        greatest = tl.full([BLOCK_D], float("-inf"), tl.float64)
        for start in range(first, last, BLOCK_K):
            offs_k = start + tl.arange(0, BLOCK_K)
            mark = tl.load(half_norms_ptr + offs_k, mask=offs_k < last, other=1.0)
            mask = (mark == 0.0)[:, None] & (columns < D)[None, :]
            addresses = codebook_ptr + offs_k.to(tl.int64)[:, None] * stride_k
            values = tl.load(addresses + columns.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float64)
            total += tl.sum(values, axis=0)
            least = tl.minimum(least, tl.min(tl.where(mask, values, float("inf")), axis=0))
            greatest = tl.maximum(greatest, tl.max(tl.where(mask, values, float("-inf")), axis=0))
        partial = partials_ptr + program * 4 * D + columns
        tl.store(partial, total, mask=columns < D)
        tl.store(partial + D, least, mask=columns < D)
        tl.store(partial + 2 * D, greatest, mask=columns < D)
        tl.store(partial + 3 * D, count + tl.zeros([BLOCK_D], tl.float64), mask=columns < D)


@triton.jit
def _combine_columns(partials_ptr, columns, D, num_partials, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr):
    """The mean as float32, and the greatest |c| and |c - mean| of each column."""
    offs_p = tl.arange(0, BLOCK_P)
    total = tl.zeros([BLOCK_P, BLOCK_D], tl.float64)
    count = tl.zeros([BLOCK_P, BLOCK_D], tl.float64)
    least = tl.full([BLOCK_P, BLOCK_D], float("inf"), tl.float64)
    greatest = tl.full([BLOCK_P, BLOCK_D], float("-inf"), tl.float64)
    for start_p in range(0, num_partials, BLOCK_P):
        source = partials_ptr + (start_p + offs_p)[:, None] * 4 * D + columns[None, :]
        mask = (start_p + offs_p < num_partials)[:, None] & (columns < D)[None, :]
        total += tl.load(source, mask=mask, other=0.0)
        least = tl.minimum(least, tl.load(source + D, mask=mask, other=float("inf")))
        greatest = tl.maximum(greatest, tl.load(source + 2 * D, mask=mask, other=float("-inf")))
        count += tl.load(source + 3 * D, mask=mask, other=0.0)
    num_finite, lowest, highest = tl.sum(count, axis=0), tl.min(least, axis=0), tl.max(greatest, axis=0)
    known = num_finite > 0
    mean = tl.where(known, tl.sum(total, axis=0) / tl.maximum(num_finite, 1.0), 0.0).to(tl.float32)
    centre = mean.to(tl.float64)
    unshifted = tl.where(known, tl.maximum(tl.abs(lowest), tl.abs(highest)), 0.0)
    shifted = tl.where(known, tl.maximum(highest - centre, centre - lowest), 0.0)
    return mean, unshifted, shifted


@triton.jit
def _choose_shift(
    partials_ptr, shift_ptr, D, num_partials, SIXTEEN_BIT: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Store mu, and return the exponent e. Every program does so, in the same order, and stores the same bits."""
    offs_d = tl.arange(0, BLOCK_D)
    energy_unshifted = tl.zeros([BLOCK_D], tl.float64)
    energy_shifted = tl.zeros([BLOCK_D], tl.float64)
    widest_unshifted = tl.zeros([BLOCK_D], tl.float64)
    widest_shifted = tl.zeros([BLOCK_D], tl.float64)
    for start_d in range(0, D, BLOCK_D):
        columns = start_d + offs_d
        mean, unshifted, shifted = _combine_columns(partials_ptr, columns, D, num_partials, BLOCK_P, BLOCK_D)
        if not SIXTEEN_BIT:
            tl.store(shift_ptr + columns, mean, mask=columns < D)
        energy_unshifted += unshifted * unshifted
        energy_shifted += shifted * shifted
        widest_unshifted = tl.maximum(widest_unshifted, unshifted)
        widest_shifted = tl.maximum(widest_shifted, shifted)
    widest = tl.max(widest_shifted, axis=0)
    if SIXTEEN_BIT:
        # Without a shift 16-bit values are exact. E then has no rounding terms, about 2**-12 * (2 ||x - mu|| C) * 0.6,
        # but a larger accumulation term, (D + 16) * 2**-23 * 1.5 * C**2.
        accumulation = (D + 16) * 1.8e-7
        unshifted_error = tl.sum(energy_unshifted, axis=0) * accumulation
        shifted_error = tl.sum(energy_shifted, axis=0) * (accumulation + 2.9e-4)
        centred = unshifted_error > shifted_error
        widest = tl.where(centred, widest, tl.max(widest_unshifted, axis=0))
        # Combined again: a mean that is stored before the choice could be read by a program that has made it.
        for start_d in range(0, D, BLOCK_D):
            columns = start_d + offs_d
            mean, _, _ = _combine_columns(partials_ptr, columns, D, num_partials, BLOCK_P, BLOCK_D)
            tl.store(shift_ptr + columns, tl.where(centred, mean, 0.0), mask=columns < D)
    binary_exponent = ((widest.to(tl.int64, bitcast=True) >> 52) - 1023).to(tl.int32)
    return tl.where(widest > 0, 13 - binary_exponent, 0)


@triton.jit
def _round_up(value):
    """A float32 that is not smaller than a float64 bound."""
    return (value * (1 + 1e-6) + 1e-30).to(tl.float32)


@triton.jit(do_not_specialize=["K", "num_partials"])
def _round_codes_kernel(
    codebook_ptr, stride_k, stride_d,  # [K, D], any strides
    partials_ptr,  # [num_partials, 4, D] float64
    codes16_ptr,  # [K padded, PITCH] float16
    half_norms_ptr,  # [K padded] float32
    scaling_ptr,  # [D + 5] float32, whose bounds are zeros before
    K, D, num_partials, PITCH: tl.constexpr, SIXTEEN_BIT: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_D: tl.constexpr, CODE_PADDING: tl.constexpr,
):  # fmt: skip
    exponent = _choose_shift(partials_ptr, scaling_ptr, D, num_partials, SIXTEEN_BIT, BLOCK_P, BLOCK_D)
    bounds_ptr = scaling_ptr + D
    tl.store(bounds_ptr + 4, exponent.to(tl.float32))
    tl.debug_barrier()  # other threads of this program read mu below
    scale = ((exponent.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)
    largest_square = tl.zeros([BLOCK_K], tl.float64)
    largest_residual_square = tl.zeros([BLOCK_K], tl.float64)
    largest_rounded_square = tl.zeros([BLOCK_K], tl.float64)
    padded = tl.cdiv(K, CODE_PADDING) * CODE_PADDING
    for start in range(tl.program_id(0) * BLOCK_K, padded, tl.num_programs(0) * BLOCK_K):
        offs_k = start + tl.arange(0, BLOCK_K)
        mark = tl.load(half_norms_ptr + offs_k, mask=offs_k < K, other=1.0)
        finite = (offs_k < K) & (mark == 0.0)
        square = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
        residual_square = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
        rounded_square = tl.zeros([BLOCK_K, BLOCK_D], tl.float64)
        rows = codebook_ptr + offs_k.to(tl.int64)[:, None] * stride_k
        for start_d in range(0, PITCH, BLOCK_D):
            columns = start_d + tl.arange(0, BLOCK_D)
            mask = finite[:, None] & (columns < D)[None, :]
            values = tl.load(rows + columns.to(tl.int64)[None, :] * stride_d, mask=mask, other=0.0).to(tl.float64)
            shift = tl.load(scaling_ptr + columns, mask=columns < D, other=0.0).to(tl.float64)
            scaled = tl.where(mask, (values - shift[None, :]) * scale, 0.0)
            rounded = scaled.to(tl.float32).to(tl.float16)  # the residual below covers both roundings
            target = codes16_ptr + offs_k.to(tl.int64)[:, None] * PITCH + columns[None, :]
            tl.store(target, rounded, mask=(columns < PITCH)[None, :])
            residual = scaled - rounded.to(tl.float64)
            square += scaled * scaled
            residual_square += residual * residual
            rounded_square += rounded.to(tl.float64) * rounded.to(tl.float64)
        square_norm = tl.sum(square, axis=1)
        tl.debug_barrier()  # every thread has read the marks, which are now overwritten
        # Note: +inf here would become NaN once packed; LARGE_HALF_NORM stays finite under every scale of a row.
        tl.store(half_norms_ptr + offs_k, tl.where(finite, (0.5 * square_norm).to(tl.float32), LARGE_HALF_NORM))
        largest_square = tl.maximum(largest_square, square_norm)
        largest_residual_square = tl.maximum(largest_residual_square, tl.sum(residual_square, axis=1))
        largest_rounded_square = tl.maximum(largest_rounded_square, tl.sum(rounded_square, axis=1))
    # The rounding of c - mu in float64 is within 2**-53 C per entry: 1e-13 * C covers it up to D = 2**20.
    norm = tl.sqrt(tl.max(largest_square, axis=0))
    residual_norm = tl.sqrt(tl.max(largest_residual_square, axis=0)) + 1e-13 * norm
    rounded_norm = tl.sqrt(tl.max(largest_rounded_square, axis=0))
    tl.atomic_max(bounds_ptr, _round_up(norm), sem="relaxed")
    tl.atomic_max(bounds_ptr + 1, _round_up(residual_norm), sem="relaxed")
    tl.atomic_max(bounds_ptr + 2, _round_up(rounded_norm), sem="relaxed")
    tl.atomic_max(bounds_ptr + 3, _round_up(0.5 * tl.max(largest_square, axis=0)), sem="relaxed")


def launch_prepare(codebook: Tensor, multiprocessors: int) -> TritonCodebook:
    """Prepare a codebook [K, D] on the current device: K >= 1, float32, float16 or bfloat16, any strides."""
    num_codes, code_dim = codebook.shape
    padded, pitch = ceil_div(num_codes, CODE_PADDING) * CODE_PADDING, row_pitch(code_dim)
    make = codebook.new_empty
    prepared = TritonCodebook(
        codes16=make((padded, pitch), dtype=torch.float16),
        half_norms=make((padded,), dtype=torch.float32),
        scaling=make((code_dim + 5,), dtype=torch.float32),
    )
    programs = max(1, min(_MAX_PARTIALS, _MAX_SUMS // code_dim))
    codes_per_program = ceil_div(ceil_div(num_codes, programs), _BLOCK_K) * _BLOCK_K
    programs = ceil_div(num_codes, codes_per_program)
    partials = make((programs, 4, code_dim), dtype=torch.float64)
    _column_statistics_kernel[(programs,)](
        codebook, *codebook.stride(), prepared.half_norms, partials, prepared.scaling, num_codes, code_dim,
        codes_per_program, BLOCK_K=_BLOCK_K, BLOCK_D=_BLOCK_D, num_warps=8, maxnreg=_STATISTICS_REGISTERS,
        enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
    _round_codes_kernel[(min(padded // _BLOCK_K, 2 * multiprocessors),)](
        codebook, *codebook.stride(), partials, *prepared, num_codes, code_dim, programs, PITCH=pitch,
        SIXTEEN_BIT=codebook.dtype != torch.float32, BLOCK_K=_BLOCK_K, BLOCK_P=_BLOCK_P, BLOCK_D=_BLOCK_D,
        CODE_PADDING=CODE_PADDING, num_warps=8, maxnreg=_ROUND_REGISTERS, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
    return prepared
