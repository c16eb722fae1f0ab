"""The gradient of the codebook in Triton: a segmented sum, in two forms.

    means[k]  = sum over rows i with indices[i] = k of (c_k - x_i) / divisor
    counts[k] = number of those rows

The differences are summed in float64, because n c - sum(x) cancels if the codes are good, and divided before they are
rounded, so that float32 holds the quotient. Reads x once, gathers the codes, writes [K, D].

Deterministic: rows are sorted by code (stable) and divided into segments of at most SEGMENT_ROWS rows of one code. Each
segment has one sum in a workspace [N / SEGMENT_ROWS + K, D]; the segments of a code are added in order. Atomic: one
addition per entry, in any order, to a workspace [K, D].

Source: the second term of van den Oord et al. 2017, arXiv:1711.00937, eq. 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import ENABLE_FP_FUSION, ceil_div, device_of

SEGMENT_ROWS = 64
_COMBINED_SEGMENTS = 32
_ATOMIC_ROWS = 32
_COLUMNS = 64


@triton.jit(do_not_specialize=["K"])
def _segment_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    order_ptr,  # [N] int64, rows sorted by code
    row_starts_ptr,  # [K + 1] int64, where each code's rows start in `order`
    segment_starts_ptr,  # [K + 1] int64, where each code's segments start
    segment_codes_ptr,  # [segments] int64, the code of each segment; K past the last
    partials_ptr,  # [segments, D] float64
    K, D, SEGMENT_ROWS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sum one segment in float64, for one block of columns."""
    segment = tl.program_id(0).to(tl.int64)
    code = tl.load(segment_codes_ptr + segment)
    if code < K:
        within = segment - tl.load(segment_starts_ptr + code)
        places = tl.load(row_starts_ptr + code) + within * SEGMENT_ROWS + tl.arange(0, SEGMENT_ROWS)
        in_segment = places < tl.load(row_starts_ptr + code + 1)
        rows = tl.load(order_ptr + places, mask=in_segment, other=0)
        columns = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
        mask = in_segment[:, None] & (columns < D)[None, :]
        values = tl.load(x_ptr + rows[:, None] * stride_xn + columns[None, :] * stride_xd, mask=mask, other=0.0)
        codes = tl.load(codebook_ptr + code * stride_ck + columns * stride_cd, mask=columns < D, other=0.0)
        difference = tl.where(mask, codes.to(tl.float64)[None, :] - values.to(tl.float64), 0.0)
        tl.store(partials_ptr + segment * D + columns, tl.sum(difference, axis=0), mask=columns < D)


@triton.jit(do_not_specialize=["divisor"])
def _combine_kernel(
    segment_starts_ptr,  # [K + 1] int64
    partials_ptr,  # [segments, D] float64
    means_ptr,  # [K, D] float32
    divisor, D, COMBINED_SEGMENTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the segments of a code, in order, and divide."""
    code = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = tl.load(segment_starts_ptr + code)
    last = tl.load(segment_starts_ptr + code + 1)
    total = tl.zeros([BLOCK_D], tl.float64)
    for start in range(first, last, COMBINED_SEGMENTS):
        segments = start + tl.arange(0, COMBINED_SEGMENTS)
        mask = (segments < last)[:, None] & (columns < D)[None, :]
        partials = tl.load(partials_ptr + segments[:, None] * D + columns[None, :], mask=mask, other=0.0)
        total += tl.sum(partials, axis=0)
    tl.store(means_ptr + code * D + columns, (total / divisor).to(tl.float32), mask=columns < D)


@triton.jit(do_not_specialize=["N"])
def _atomic_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    indices_ptr,  # [N] int64
    sums_ptr,  # [K, D] float64, zeros before
    counts_ptr,  # [K] int64, zeros before
    N, D, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the differences of a block of rows to their codes, for one block of columns."""
    rows = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    columns = tl.program_id(1).to(tl.int64) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask = (rows < N)[:, None] & (columns < D)[None, :]
    codes = tl.load(indices_ptr + rows, mask=rows < N, other=0)
    values = tl.load(x_ptr + rows[:, None] * stride_xn + columns[None, :] * stride_xd, mask=mask, other=0.0)
    code_ptrs = codebook_ptr + codes[:, None] * stride_ck + columns[None, :] * stride_cd
    difference = tl.load(code_ptrs, mask=mask, other=0.0).to(tl.float64) - values.to(tl.float64)
    tl.atomic_add(sums_ptr + codes[:, None] * D + columns[None, :], difference, mask=mask, sem="relaxed")
    if tl.program_id(1) == 0:
        tl.atomic_add(counts_ptr + codes, tl.full([BLOCK_N], 1, tl.int64), mask=rows < N, sem="relaxed")


def codebook_gradient(
    x: Tensor, codebook: Tensor, indices: Tensor, divisor: int, deterministic: bool
) -> tuple[Tensor, Tensor]:
    """Sum (code - row) / divisor over the rows of each code, and count the rows.

    Args:
        x: [N, D], float32, float16 or bfloat16, any strides.
        codebook: [K, D], on x's device; its dtype may differ from x's.
        indices: [N] int64 in [0, K).
        divisor: at least 1.
        deterministic: sort first, for the same bits in every run; otherwise add atomically.

    Returns:
        means [K, D] float32, counts [K] int64.
    """
    find = _sorted_gradient if deterministic else _atomic_gradient
    return find(x, codebook, indices, divisor)


def _sorted_gradient(x: Tensor, codebook: Tensor, indices: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    (num_rows, code_dim), num_codes = x.shape, codebook.shape[0]
    sorted_codes, order = torch.sort(indices, stable=True)
    row_starts = torch.searchsorted(sorted_codes, torch.arange(num_codes + 1, device=x.device))
    counts = row_starts.diff()
    segment_starts = torch.zeros_like(row_starts)
    torch.cumsum((counts + SEGMENT_ROWS - 1) // SEGMENT_ROWS, dim=0, out=segment_starts[1:])
    # The most segments possible, so that the host need not wait for their number.
    num_segments = num_rows // SEGMENT_ROWS + min(num_codes, num_rows)
    segments = torch.arange(num_segments, device=x.device)
    segment_codes = torch.searchsorted(segment_starts, segments, right=True) - 1
    partials = x.new_empty((num_segments, code_dim), dtype=torch.float64)
    means = codebook.new_empty((num_codes, code_dim), dtype=torch.float32)
    column_blocks = ceil_div(code_dim, _COLUMNS)
    with device_of(x):
        if num_segments:
            _segment_kernel[(num_segments, column_blocks)](
                x, *x.stride(), codebook, *codebook.stride(), order, row_starts, segment_starts, segment_codes,
                partials, num_codes, code_dim, SEGMENT_ROWS=SEGMENT_ROWS, BLOCK_D=_COLUMNS,
                enable_fp_fusion=ENABLE_FP_FUSION,
            )  # fmt: skip
        _combine_kernel[(num_codes, column_blocks)](
            segment_starts, partials, means, divisor, code_dim, COMBINED_SEGMENTS=_COMBINED_SEGMENTS,
            BLOCK_D=_COLUMNS, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
    return means, counts


def _atomic_gradient(x: Tensor, codebook: Tensor, indices: Tensor, divisor: int) -> tuple[Tensor, Tensor]:
    (num_rows, code_dim), num_codes = x.shape, codebook.shape[0]
    sums = codebook.new_zeros((num_codes, code_dim), dtype=torch.float64)
    counts = torch.zeros(num_codes, dtype=torch.int64, device=x.device)
    if num_rows:
        with device_of(x):
            _atomic_kernel[(ceil_div(num_rows, _ATOMIC_ROWS), ceil_div(code_dim, _COLUMNS))](
                x, *x.stride(), codebook, *codebook.stride(), indices.contiguous(), sums, counts, num_rows, code_dim,
                BLOCK_N=_ATOMIC_ROWS, BLOCK_D=_COLUMNS, enable_fp_fusion=ENABLE_FP_FUSION,
            )  # fmt: skip
    return (sums / divisor).float(), counts
