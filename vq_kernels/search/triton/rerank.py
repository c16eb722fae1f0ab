"""Completes a scan: merges the parts of a split codebook, and decides uncertified rows in float64.

    merge        the states of all parts, in order; then the certificate, as in a scan of one part
    rerank       argmin over a row's candidates of sum_d (float64(x_d) - float64(c_d))**2
    exhaustive   the same over all codes

Rows are decided by direct differences only, because a float64 product of shifted values still cancels. All distances of
a row are summed in the same order, so identical codes have identical distances, and the lowest index wins. The launches
have a fixed size and read the number of rows on the device: nothing waits, and a CUDA graph can capture them.

Reads 5 scores and 4 codes per row and part; D elements per row and candidate (rerank), the codebook once per 4 rows
(exhaustive). Writes one index, code and distance per row.
"""

import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import (
    ENABLE_FP_FUSION,
    LOWEST_SCORE,
    ROW_NOT_FINITE,
    Outputs,
    Uncertified,
    ceil_div,
    certify,
    device_of,
    round_to,
    write_rows,
)
from vq_kernels.search.triton.plan import SearchPlan
from vq_kernels.search.triton.scan import SplitStates

_CANDIDATES = tl.constexpr(4)
_MERGE_ROWS, _MERGE_COLUMNS = 64, 32
_RERANK_ROWS, _EXHAUSTIVE_ROWS, _EXHAUSTIVE_CODES = 8, 4, 16
# The compiler aims for 96 or fewer on its own, and then spills for some dtypes.
_FLOAT64_REGISTERS = 168
# Columns per step; few enough for the float64 differences to stay in registers.
_DIFFERENCE_COLUMNS = 32


@triton.jit
def _insert(value, index, v0, v1, v2, v3, i0, i1, i2, i3, hidden):
    """The row state with one more score. Of equal scores the earlier one stays ahead."""
    above0, above1, above2, above3 = value > v0, value > v1, value > v2, value > v3
    hidden = tl.maximum(hidden, tl.where(above3, v3, value))
    v3, i3 = tl.where(above2, v2, tl.where(above3, value, v3)), tl.where(above2, i2, tl.where(above3, index, i3))
    v2, i2 = tl.where(above1, v1, tl.where(above2, value, v2)), tl.where(above1, i1, tl.where(above2, index, i2))
    v1, i1 = tl.where(above0, v0, tl.where(above1, value, v1)), tl.where(above0, i0, tl.where(above1, index, i1))
    v0, i0 = tl.where(above0, value, v0), tl.where(above0, index, i0)
    return v0, v1, v2, v3, i0, i1, i2, i3, hidden


@triton.jit(do_not_specialize=["N", "splits"])
def _merge_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    margins_ptr,  # [N] float32
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    indices_ptr, codes_ptr, sq_distances_ptr,  # Outputs
    state_scores_ptr, state_codes_ptr,  # SplitStates
    counters_ptr, rerank_rows_ptr, candidates_ptr, exhaustive_rows_ptr,  # Uncertified
    N, splits, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_n < N
    margin = tl.load(margins_ptr + offs_n, mask=in_rows, other=ROW_NOT_FINITE)
    score_ptrs = state_scores_ptr + offs_n
    state_code_ptrs = state_codes_ptr + offs_n
    lowest, first = tl.full([BLOCK_N], LOWEST_SCORE, tl.float32), tl.zeros([BLOCK_N], tl.int32)
    v0, v1, v2, v3, hidden = lowest, lowest, lowest, lowest, lowest
    i0, i1, i2, i3 = first, first, first, first
    for _ in range(splits):
        hidden = tl.maximum(hidden, tl.load(score_ptrs + 4 * N, mask=in_rows, other=0.0))
        for rank in tl.static_range(4):
            score = tl.load(score_ptrs + rank * N, mask=in_rows, other=0.0)
            index = tl.load(state_code_ptrs + rank * N, mask=in_rows, other=0)
            v0, v1, v2, v3, i0, i1, i2, i3, hidden = _insert(score, index, v0, v1, v2, v3, i0, i1, i2, i3, hidden)
        score_ptrs += 5 * N
        state_code_ptrs += 4 * N
    index = certify(
        v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, counters_ptr, rerank_rows_ptr,
        candidates_ptr, exhaustive_rows_ptr,
    )  # fmt: skip
    write_rows(
        index, margin, offs_n, in_rows, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd, indices_ptr,
        codes_ptr, sq_distances_ptr, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _sq_distances(
    rows, x_ptr, stride_xn, stride_xd, offs_k, in_codes, codebook_ptr, stride_ck, stride_cd, D,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Squared distances [BLOCK_R, BLOCK_K] of rows [BLOCK_R] to codes offs_k, by direct differences in DTYPE.

    offs_k and in_codes are [BLOCK_R or 1, BLOCK_K]. Every distance is summed in the same order.
    """
    offs_d = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_R, BLOCK_K, BLOCK_D], DTYPE)
    for start_d in range(0, D, BLOCK_D):
        columns = (start_d + offs_d).to(tl.int64)
        row_ptrs = x_ptr + rows[:, None] * stride_xn + columns[None, :] * stride_xd
        values = tl.load(row_ptrs, mask=(columns < D)[None, :], other=0.0).to(DTYPE)
        code_ptrs = codebook_ptr + offs_k.to(tl.int64)[:, :, None] * stride_ck + columns[None, None, :] * stride_cd
        mask = in_codes[:, :, None] & (columns < D)[None, None, :]
        codes = tl.load(code_ptrs, mask=mask, other=0.0).to(DTYPE)
        difference = codes - values[:, None, :]
        sums += difference * difference
    return tl.sum(sums, axis=2)


@triton.jit
def _least_code(sq_distances, offs_k, in_codes):
    """The least of each row of [BLOCK_R, BLOCK_K] and the lowest code that has it. NaN counts as inf."""
    sq_distances = tl.where(in_codes & (sq_distances < float("inf")), sq_distances, float("inf"))
    least = tl.min(sq_distances, axis=1)
    index = tl.min(tl.where(sq_distances == least[:, None], offs_k, 2147483647), axis=1)
    return least, index


@triton.jit
def _rewrite_rows(
    rows, in_list, index, sq_distance, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr, sq_distances_ptr,
    D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Overwrite the rows with their final index, code and squared distance."""
    for start_d in range(0, D, BLOCK_D):
        columns = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = in_list[:, None] & (columns < D)
        source = codebook_ptr + index.to(tl.int64)[:, None] * stride_ck + columns * stride_cd
        code = tl.load(source, mask=mask, other=0.0)
        tl.store(codes_ptr + rows[:, None] * D + columns, round_to(code, codes_ptr.dtype.element_ty), mask=mask)
    tl.store(indices_ptr + rows, index.to(tl.int64), mask=in_list)
    tl.store(sq_distances_ptr + rows, sq_distance, mask=in_list)


@triton.jit(do_not_specialize=["N"])
def _rerank_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    indices_ptr, codes_ptr, sq_distances_ptr,  # Outputs
    counters_ptr, rerank_rows_ptr, candidates_ptr,  # Uncertified
    statistics_ptr,  # [3] int64: certified, reranked, exhaustive
    N,
    D,  # not constexpr: the compiler would unroll the loop over the columns, and spill
    BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    num_rerank = tl.load(counters_ptr)
    if tl.program_id(0) == 0:
        num_exhaustive = tl.load(counters_ptr + 1)
        tl.atomic_add(statistics_ptr, (N - num_rerank - num_exhaustive).to(tl.int64), sem="relaxed")
        tl.atomic_add(statistics_ptr + 1, num_rerank.to(tl.int64), sem="relaxed")
        tl.atomic_add(statistics_ptr + 2, num_exhaustive.to(tl.int64), sem="relaxed")
    for start in range(tl.program_id(0) * BLOCK_R, num_rerank, tl.num_programs(0) * BLOCK_R):
        places = start + tl.arange(0, BLOCK_R)
        in_list = places < num_rerank
        rows = tl.load(rerank_rows_ptr + places, mask=in_list, other=0).to(tl.int64)
        candidate_ptrs = candidates_ptr + places[:, None] * _CANDIDATES + tl.arange(0, _CANDIDATES)[None, :]
        offs_k = tl.load(candidate_ptrs, mask=in_list[:, None], other=0)
        sq_distances = _sq_distances(
            rows, x_ptr, stride_xn, stride_xd, offs_k, offs_k >= 0, codebook_ptr, stride_ck, stride_cd, D, BLOCK_R,
            _CANDIDATES, BLOCK_D, tl.float64,
        )  # fmt: skip
        least, index = _least_code(sq_distances, offs_k, offs_k >= 0)
        _rewrite_rows(
            rows, in_list, index, least, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr, sq_distances_ptr,
            D, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["K"])
def _exhaustive_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    indices_ptr, codes_ptr, sq_distances_ptr,  # Outputs
    counters_ptr, exhaustive_rows_ptr,  # Uncertified
    K,
    D,  # not constexpr, as above
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Decide BLOCK_R rows at a time, which share each read of the codes.

    A float32 sum of direct differences rules out most blocks of codes, which then need no float64 sum. It cannot
    cancel: D squares of rounded differences, summed in any order, are within (D + 3) 2**-23 relative, unless they
    overflow or underflow.
    """
    num_exhaustive = tl.load(counters_ptr + 1)
    lower = 1.0 - (D + 8) * 2.0**-23  # exact in float32
    for start in range(tl.program_id(0) * BLOCK_R, num_exhaustive, tl.num_programs(0) * BLOCK_R):
        places = start + tl.arange(0, BLOCK_R)
        in_list = places < num_exhaustive
        rows = tl.load(exhaustive_rows_ptr + places, mask=in_list, other=0).to(tl.int64)
        least = tl.full([BLOCK_R], float("inf"), tl.float64)
        index = tl.zeros([BLOCK_R], tl.int32)
        for start_k in range(0, K, BLOCK_K):
            offs_k = start_k + tl.arange(0, BLOCK_K)[None, :]
            at_least = _sq_distances(
                rows, x_ptr, stride_xn, stride_xd, offs_k, offs_k < K, codebook_ptr, stride_ck, stride_cd, D, BLOCK_R,
                BLOCK_K, BLOCK_D, tl.float32,
            )  # fmt: skip
            at_least = tl.where(at_least > 1e-30, tl.minimum(at_least, 3.4e38) * lower, 0.0)
            nearest = tl.min(tl.where(offs_k < K, at_least, float("inf")), axis=1)
            if tl.max((in_list & (nearest.to(tl.float64) < least)).to(tl.int32), axis=0) > 0:
                sq_distances = _sq_distances(
                    rows, x_ptr, stride_xn, stride_xd, offs_k, offs_k < K, codebook_ptr, stride_ck, stride_cd, D,
                    BLOCK_R, BLOCK_K, BLOCK_D, tl.float64,
                )  # fmt: skip
                block_least, block_index = _least_code(sq_distances, offs_k, offs_k < K)
                index = tl.where(block_least < least, block_index, index)  # on a tie the earlier block stays
                least = tl.minimum(block_least, least)
        _rewrite_rows(
            rows, in_list, index, least, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr, sq_distances_ptr,
            D, BLOCK_D,
        )  # fmt: skip


def launch_merge(
    x: Tensor,
    codebook: Tensor,
    plan: SearchPlan,
    states: SplitStates,
    outputs: Outputs,
    uncertified: Uncertified,
) -> None:
    """Merge the states of the parts of a codebook, and write `outputs` as a scan of one part does."""
    num_rows, code_dim = x.shape
    with device_of(x):
        _merge_kernel[(ceil_div(num_rows, _MERGE_ROWS),)](
            x, *x.stride(), states.margins, codebook, *codebook.stride(), *outputs, states.scores, states.codes,
            *uncertified, num_rows, plan.splits, D=code_dim, BLOCK_N=_MERGE_ROWS,
            BLOCK_D=_MERGE_COLUMNS, num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip


def launch_rerank(
    x: Tensor, codebook: Tensor, outputs: Outputs, uncertified: Uncertified, statistics: Tensor, multiprocessors: int
) -> None:
    """Decide the uncertified rows in float64, rewrite them in `outputs`, and add to statistics [3] int64."""
    num_rows, code_dim = x.shape
    counters, rerank_rows, candidates, exhaustive_rows = uncertified
    shared = (x, *x.stride(), codebook, *codebook.stride(), *outputs, counters)
    options = {"num_warps": 4, "maxnreg": _FLOAT64_REGISTERS, "enable_fp_fusion": ENABLE_FP_FUSION}
    with device_of(x):
        _rerank_kernel[(min(ceil_div(num_rows, _RERANK_ROWS), 16 * multiprocessors),)](
            *shared, rerank_rows, candidates, statistics, num_rows, code_dim, BLOCK_R=_RERANK_ROWS,
            BLOCK_D=_DIFFERENCE_COLUMNS, **options,
        )  # fmt: skip
        _exhaustive_kernel[(min(ceil_div(num_rows, _EXHAUSTIVE_ROWS), 4 * multiprocessors),)](
            *shared, exhaustive_rows, codebook.shape[0], code_dim, BLOCK_R=_EXHAUSTIVE_ROWS,
            BLOCK_K=_EXHAUSTIVE_CODES, BLOCK_D=_DIFFERENCE_COLUMNS, **options,
        )  # fmt: skip
