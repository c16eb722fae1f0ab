"""Completes a scan, in one launch: merges the parts of a split codebook, and decides uncertified rows in float64.

    merge        the states of all parts, in order; then the certificate, as in a scan of one part
    rerank       argmin over a row's candidates of sum_d (float64(x_d) - float64(c_d))**2
    exhaustive   the same over all codes

Rows are decided by direct differences only, because a float64 product of shifted values still cancels. All distances of
a row are summed in the same order, so identical codes have identical distances, and the lowest index wins. Each program
reads the marks of its rows and decides those that are not certified. Nothing waits; a CUDA graph can capture it.

Reads 5 scores and 4 codes per row and part, or 8 bytes per row if the codebook is not split; D elements per row and
candidate (rerank), the codebook once per 4 rows (exhaustive). Writes one index, code and distance per row.
"""

import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import (
    ENABLE_FP_FUSION,
    EXHAUSTIVE,
    LOWEST_SCORE,
    ROW_NOT_FINITE,
    Outputs,
    ceil_div,
    certify,
    round_to,
    write_rows,
)

# Rows that a program reads at once: marks only, states of many rows, and states of so few that all programs get some.
_MARKED_ROWS, _MERGED_ROWS, _FEW_ROWS = 512, 64, 16
_RERANK_ROWS, _EXHAUSTIVE_ROWS, _EXHAUSTIVE_CODES = 8, 4, 16
_CANDIDATES = tl.constexpr(4)
# Neighbouring rows in a program. More uncertified neighbours than that are divided among programs.
_RUN = tl.constexpr(8)
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


@triton.jit
def _merge(states_ptr, splits, offs_n, in_rows, N, BLOCK_N: tl.constexpr):
    """The row state over all parts of the codebook."""
    score_ptrs = states_ptr.to(tl.pointer_type(tl.float32)) + offs_n
    code_ptrs = states_ptr + 5 * N + offs_n
    lowest, first = tl.full([BLOCK_N], LOWEST_SCORE, tl.float32), tl.zeros([BLOCK_N], tl.int32)
    v0, v1, v2, v3, hidden = lowest, lowest, lowest, lowest, lowest
    i0, i1, i2, i3 = first, first, first, first
    for _ in range(splits):
        hidden = tl.maximum(hidden, tl.load(score_ptrs + 4 * N, mask=in_rows, other=0.0))
        for rank in tl.static_range(4):
            score = tl.load(score_ptrs + rank * N, mask=in_rows, other=0.0)
            index = tl.load(code_ptrs + rank * N, mask=in_rows, other=0)
            v0, v1, v2, v3, i0, i1, i2, i3, hidden = _insert(score, index, v0, v1, v2, v3, i0, i1, i2, i3, hidden)
        score_ptrs += 9 * N
        code_ptrs += 9 * N
    return v0, v1, v2, v3, i0, i1, i2, i3, hidden


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


@triton.jit
def _search_exhaustively(
    rows, in_list, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd, K, D,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The least squared distance of BLOCK_R rows and its code. The rows share each read of the codes.

    A float32 sum of direct differences rules out most blocks of codes, which then need no float64 sum. It cannot
    cancel: D squares of rounded differences, summed in any order, are within (D + 3) 2**-23 relative, unless they
    overflow or underflow.
    """
    lower = 1.0 - (D + 8) * 2.0**-23  # exact in float32
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
    return least, index


@triton.jit
def _rows_at(wanted, offs_n, start, BLOCK_R: tl.constexpr):
    """The wanted rows of offs_n [BLOCK_N] at places `start` and following, [BLOCK_R], and which of these exist."""
    order = tl.cumsum(wanted.to(tl.int32), axis=0) - 1
    slots = tl.arange(0, BLOCK_R)
    rows = tl.zeros([BLOCK_R], tl.int64)
    for slot in tl.static_range(BLOCK_R):  # one by one: a table [BLOCK_R, BLOCK_N] would spill
        row = tl.sum(tl.where(wanted & (order == start + slot), offs_n, 0), axis=0)
        rows = tl.where(slots == slot, row, rows)
    return rows, start + slots < tl.sum(wanted.to(tl.int32), axis=0)


@triton.jit(do_not_specialize=["N", "K", "splits"])
def _finish_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    indices_ptr, codes_ptr, sq_distances_ptr,  # Outputs; rows that are not certified are marked
    states_ptr,  # [splits, 9, N] int32, if SPLIT; the margins are then in sq_distances
    statistics_ptr,  # [3] int64: certified, reranked, exhaustive
    N, K, splits,
    D,  # not constexpr: the compiler would unroll the loop over the columns, and spill
    SPLIT: tl.constexpr, BLOCK_N: tl.constexpr, RERANK_ROWS: tl.constexpr, EXHAUSTIVE_ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    lanes = tl.arange(0, BLOCK_N)
    lanes = (lanes // _RUN * tl.num_programs(0) + tl.program_id(0)) * _RUN + lanes % _RUN
    num_reranked, num_exhaustive = tl.zeros([], tl.int32), tl.zeros([], tl.int32)
    for start_n in range(0, N, BLOCK_N * tl.num_programs(0)):
        offs_n = start_n + lanes
        in_rows = offs_n < N
        if SPLIT:
            margin_ptrs = sq_distances_ptr.to(tl.pointer_type(tl.float32)) + 2 * offs_n.to(tl.int64)
            margin = tl.load(margin_ptrs, mask=in_rows, other=ROW_NOT_FINITE)
            v0, v1, v2, v3, i0, i1, i2, i3, hidden = _merge(
                states_ptr, splits, offs_n, in_rows, N.to(tl.int64), BLOCK_N
            )
            tl.debug_barrier()  # every thread has read the margins, which are now overwritten
            best, certified = certify(
                v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, indices_ptr, sq_distances_ptr
            )
            write_rows(
                best, margin, offs_n, in_rows & certified, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck,
                stride_cd, indices_ptr, codes_ptr, sq_distances_ptr, D, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            tl.debug_barrier()  # other threads of this program read the marks below
        mark = tl.load(indices_ptr + offs_n, mask=in_rows, other=0)
        rerank, exhaustive = (mark < 0) & (mark != EXHAUSTIVE), mark == EXHAUSTIVE
        rerank_rows, exhaustive_rows = tl.sum(rerank.to(tl.int32), axis=0), tl.sum(exhaustive.to(tl.int32), axis=0)
        num_reranked += rerank_rows
        num_exhaustive += exhaustive_rows
        for start in range(0, rerank_rows, RERANK_ROWS):
            rows, in_list = _rows_at(rerank, offs_n, start, RERANK_ROWS)
            first = ~tl.load(indices_ptr + rows, mask=in_list, other=-1)
            second = tl.load(sq_distances_ptr.to(tl.pointer_type(tl.int64)) + rows, mask=in_list, other=0)
            place = tl.arange(0, _CANDIDATES)[None, :]
            offs_k = tl.where(place < 2, first[:, None], second[:, None]) >> (place % 2 * 32).to(tl.int64)
            offs_k = (offs_k & 0x7FFFFFFF).to(tl.int32)
            sq_distances = _sq_distances(
                rows, x_ptr, stride_xn, stride_xd, offs_k, offs_k >= 0, codebook_ptr, stride_ck, stride_cd, D,
                RERANK_ROWS, _CANDIDATES, BLOCK_D, tl.float64,
            )  # fmt: skip
            least, index = _least_code(sq_distances, offs_k, offs_k >= 0)
            tl.debug_barrier()  # every thread has read the marks, which are now overwritten
            _rewrite_rows(
                rows, in_list, index, least, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr,
                sq_distances_ptr, D, BLOCK_D,
            )  # fmt: skip
        for start in range(0, exhaustive_rows, EXHAUSTIVE_ROWS):
            rows, in_list = _rows_at(exhaustive, offs_n, start, EXHAUSTIVE_ROWS)
            least, index = _search_exhaustively(
                rows, in_list, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd, K, D,
                EXHAUSTIVE_ROWS, BLOCK_K, BLOCK_D,
            )  # fmt: skip
            _rewrite_rows(
                rows, in_list, index, least, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr,
                sq_distances_ptr, D, BLOCK_D,
            )  # fmt: skip
    if num_reranked + num_exhaustive > 0:
        tl.atomic_add(statistics_ptr, -(num_reranked + num_exhaustive).to(tl.int64), sem="relaxed")
        tl.atomic_add(statistics_ptr + 1, num_reranked.to(tl.int64), sem="relaxed")
        tl.atomic_add(statistics_ptr + 2, num_exhaustive.to(tl.int64), sem="relaxed")


def launch_finish(
    x: Tensor, codebook: Tensor, states: Tensor | None, outputs: Outputs, statistics: Tensor, multiprocessors: int
) -> None:
    """Merge the states of a split codebook, decide the uncertified rows in float64, and count them in `statistics`."""
    (num_rows, code_dim), num_codes = x.shape, codebook.shape[0]
    programs = min(ceil_div(num_rows, _FEW_ROWS), 4 * multiprocessors)
    block_n = _MARKED_ROWS
    if states is not None:
        block_n = _FEW_ROWS if num_rows <= programs * _FEW_ROWS else _MERGED_ROWS
    _finish_kernel[(programs,)](
        x, *x.stride(), codebook, *codebook.stride(), *outputs, states, statistics, num_rows, num_codes,
        1 if states is None else len(states), code_dim, SPLIT=states is not None, BLOCK_N=block_n,
        RERANK_ROWS=_RERANK_ROWS, EXHAUSTIVE_ROWS=_EXHAUSTIVE_ROWS, BLOCK_K=_EXHAUSTIVE_CODES,
        BLOCK_D=_DIFFERENCE_COLUMNS, num_warps=4, maxnreg=_FLOAT64_REGISTERS, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
