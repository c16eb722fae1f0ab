# Kernels are Python that Triton compiles, so their tensors carry no types.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""What follows the scan: parts of the codebook merged, and the rows it did not prove decided in float64.

    merge     the states of the splits, in order, into one; then the certificate, as in a scan of one part
    resolve   argmin over a row's candidates of sum_d (float64(x_d) - float64(c_d))**2
    drain     the same over all codes

Only direct differences decide: a float64 product of shifted values still cancels. Every distance of a row is summed in
one order, so identical codes have identical distances, and the lower index wins. Both launches have a fixed size and
read the length of their list on the device, so nothing waits and a CUDA graph can hold them.
"""

import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.certify import Lists, Outputs, certify, insert, is_settled, round_to, write_rows
from vq_kernels.search.triton.common import ENABLE_FP_FUSION, FLOAT32_OVERFLOW, ROW_NOT_FINITE, ceil_div, device_of
from vq_kernels.search.triton.plan import SearchPlan
from vq_kernels.search.triton.scan import SplitStates

CANDIDATES = tl.constexpr(4)
MERGE_ROWS, MERGE_COLUMNS = 64, 32
RESOLVE_ROWS, DRAIN_ROWS, DRAIN_CODES = 8, 4, 16
# Allowed in so many words: left to itself the compiler aims for 96 or less, and spills a few for some dtypes.
DECIDE_REGISTERS = 168
# Columns whose differences are taken at once; short enough for float64 to stay in registers.
DIFFERENCE_COLUMNS = 32


@triton.jit(do_not_specialize=["N", "splits"])
def _merge_kernel(
    x_ptr,  # [N, D], any strides
    stride_xn,
    stride_xd,
    margins_ptr,  # [N] float32
    codebook_ptr,  # [K, D], any strides
    stride_ck,
    stride_cd,
    indices_ptr,  # [N] int64
    codes_ptr,  # [N, D]
    sq_distances_ptr,  # [N] float32
    values_ptr,  # [splits, 5, N] float32
    places_ptr,  # [splits, 4, N] int32
    counters_ptr,  # [2] int32
    resolve_rows_ptr,  # [N] int32
    candidates_ptr,  # [N, 4] int32
    drain_rows_ptr,  # [N] int32
    N,
    splits,
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    EXACT: tl.constexpr,
):
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_n < N
    margin = tl.load(margins_ptr + offs_n, mask=in_rows, other=ROW_NOT_FINITE)
    value_ptrs = values_ptr + offs_n
    place_ptrs = places_ptr + offs_n
    v0 = tl.load(value_ptrs, mask=in_rows, other=0.0)
    v1 = tl.load(value_ptrs + N, mask=in_rows, other=0.0)
    v2 = tl.load(value_ptrs + 2 * N, mask=in_rows, other=0.0)
    v3 = tl.load(value_ptrs + 3 * N, mask=in_rows, other=0.0)
    hidden = tl.load(value_ptrs + 4 * N, mask=in_rows, other=0.0)
    i0 = tl.load(place_ptrs, mask=in_rows, other=0)
    i1 = tl.load(place_ptrs + N, mask=in_rows, other=0)
    i2 = tl.load(place_ptrs + 2 * N, mask=in_rows, other=0)
    i3 = tl.load(place_ptrs + 3 * N, mask=in_rows, other=0)
    for _ in range(1, splits):
        value_ptrs += 5 * N
        place_ptrs += 4 * N
        hidden = tl.maximum(hidden, tl.load(value_ptrs + 4 * N, mask=in_rows, other=0.0))
        for place in tl.static_range(4):
            value = tl.load(value_ptrs + place * N, mask=in_rows, other=0.0)
            index = tl.load(place_ptrs + place * N, mask=in_rows, other=0)
            v0, v1, v2, v3, i0, i1, i2, i3, hidden = insert(value, index, v0, v1, v2, v3, i0, i1, i2, i3, hidden)
    if EXACT:
        index = certify(
            v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, counters_ptr, resolve_rows_ptr,
            candidates_ptr, drain_rows_ptr,
        )  # fmt: skip
    else:
        index = tl.where(is_settled(v0, margin), 0, i0)
    write_rows(
        index, margin, offs_n, in_rows, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd, indices_ptr,
        codes_ptr, sq_distances_ptr, D, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@triton.jit
def _sq_distances(
    rows, x_ptr, stride_xn, stride_xd, offs_k, in_codes, codebook_ptr, stride_ck, stride_cd, D,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Squared distances [BLOCK_R, BLOCK_K] in DTYPE, from direct differences, of rows [BLOCK_R] to codes offs_k.

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
    """The least of each row of [BLOCK_R, BLOCK_K] and the lowest code that has it; bad codes are infinitely far."""
    sq_distances = tl.where(in_codes & (sq_distances < float("inf")), sq_distances, float("inf"))
    least = tl.min(sq_distances, axis=1)
    index = tl.min(tl.where(sq_distances == least[:, None], offs_k, 2147483647), axis=1)
    return least, index


@triton.jit
def _write_decided(
    rows, in_list, index, sq_distance, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr, sq_distances_ptr,
    D, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The decided rows over what the scan had written of them."""
    for start_d in range(0, D, BLOCK_D):
        columns = (start_d + tl.arange(0, BLOCK_D)).to(tl.int64)[None, :]
        mask = in_list[:, None] & (columns < D)
        source = codebook_ptr + index.to(tl.int64)[:, None] * stride_ck + columns * stride_cd
        code = tl.load(source, mask=mask, other=0.0)
        tl.store(codes_ptr + rows[:, None] * D + columns, round_to(code, codes_ptr.dtype.element_ty), mask=mask)
    tl.store(indices_ptr + rows, index.to(tl.int64), mask=in_list)
    overflows = sq_distance >= FLOAT32_OVERFLOW
    sq_distance = tl.where(overflows, float("inf"), tl.where(overflows, 0.0, sq_distance).to(tl.float32))
    tl.store(sq_distances_ptr + rows, sq_distance, mask=in_list)


@triton.jit(do_not_specialize=["N"])
def _resolve_kernel(
    x_ptr,  # [N, D], any strides
    stride_xn,
    stride_xd,
    codebook_ptr,  # [K, D], any strides
    stride_ck,
    stride_cd,
    indices_ptr,  # [N] int64
    codes_ptr,  # [N, D]
    sq_distances_ptr,  # [N] float32
    counters_ptr,  # [2] int32
    resolve_rows_ptr,  # [N] int32
    candidates_ptr,  # [N, 4] int32
    statistics_ptr,  # [3] int64: proved, resolved, drained
    N,
    D,  # no constant: the compiler would unroll the loop over the columns, and spill
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    num_resolved = tl.load(counters_ptr)
    if tl.program_id(0) == 0:
        num_drained = tl.load(counters_ptr + 1)
        tl.atomic_add(statistics_ptr, (N - num_resolved - num_drained).to(tl.int64))
        tl.atomic_add(statistics_ptr + 1, num_resolved.to(tl.int64))
        tl.atomic_add(statistics_ptr + 2, num_drained.to(tl.int64))
    for start in range(tl.program_id(0) * BLOCK_R, num_resolved, tl.num_programs(0) * BLOCK_R):
        places = start + tl.arange(0, BLOCK_R)
        in_list = places < num_resolved
        rows = tl.load(resolve_rows_ptr + places, mask=in_list, other=0).to(tl.int64)
        candidate_ptrs = candidates_ptr + places[:, None] * CANDIDATES + tl.arange(0, CANDIDATES)[None, :]
        offs_k = tl.load(candidate_ptrs, mask=in_list[:, None], other=0)
        sq_distances = _sq_distances(
            rows, x_ptr, stride_xn, stride_xd, offs_k, offs_k >= 0, codebook_ptr, stride_ck, stride_cd, D, BLOCK_R,
            CANDIDATES, BLOCK_D, tl.float64,
        )  # fmt: skip
        least, index = _least_code(sq_distances, offs_k, offs_k >= 0)
        _write_decided(
            rows, in_list, index, least, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr, sq_distances_ptr,
            D, BLOCK_D,
        )  # fmt: skip


@triton.jit(do_not_specialize=["K"])
def _drain_kernel(
    x_ptr,  # [N, D], any strides
    stride_xn,
    stride_xd,
    codebook_ptr,  # [K, D], any strides
    stride_ck,
    stride_cd,
    indices_ptr,  # [N] int64
    codes_ptr,  # [N, D]
    sq_distances_ptr,  # [N] float32
    counters_ptr,  # [2] int32
    drain_rows_ptr,  # [N] int32
    K,
    D,  # no constant, as above
    BLOCK_R: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """BLOCK_R rows share each read of the codes.

    A float32 sum of direct differences, which cannot cancel, spares most blocks of codes the float64 one: D squares of
    rounded differences, summed in any order, are within (D + 3) 2**-23 relative, unless they overflow or underflow.
    """
    num_drained = tl.load(counters_ptr + 1)
    lower = 1.0 - (D + 8) * 2.0**-23  # exact in float32
    for start in range(tl.program_id(0) * BLOCK_R, num_drained, tl.num_programs(0) * BLOCK_R):
        places = start + tl.arange(0, BLOCK_R)
        in_list = places < num_drained
        rows = tl.load(drain_rows_ptr + places, mask=in_list, other=0).to(tl.int64)
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
                index = tl.where(block_least < least, block_index, index)  # of equal ones the earlier block's stays
                least = tl.minimum(block_least, least)
        _write_decided(
            rows, in_list, index, least, codebook_ptr, stride_ck, stride_cd, indices_ptr, codes_ptr, sq_distances_ptr,
            D, BLOCK_D,
        )  # fmt: skip


def launch_merge(
    x: Tensor, codebook: Tensor, plan: SearchPlan, states: SplitStates, outputs: Outputs, lists: Lists | None
) -> None:
    """Merge the states of the parts of a codebook, and write every row of `outputs` as an undivided scan does."""
    num_rows, code_dim = x.shape
    with device_of(x):
        _merge_kernel[(ceil_div(num_rows, MERGE_ROWS),)](
            x, *x.stride(), states.margins, codebook, *codebook.stride(), *outputs, states.values, states.places,
            *(lists or (None,) * 4), num_rows, plan.splits, D=code_dim, BLOCK_N=MERGE_ROWS, BLOCK_D=MERGE_COLUMNS,
            EXACT=lists is not None, num_warps=4, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip


def launch_resolve(
    x: Tensor, codebook: Tensor, outputs: Outputs, lists: Lists, statistics: Tensor, multiprocessors: int
) -> None:
    """Decide the rows on the two lists in float64 and rewrite them in `outputs`; add to statistics [3] int64."""
    num_rows, code_dim = x.shape
    shared = (x, *x.stride(), codebook, *codebook.stride(), *outputs, lists.counters)
    with device_of(x):
        _resolve_kernel[(min(ceil_div(num_rows, RESOLVE_ROWS), 16 * multiprocessors),)](
            *shared, lists.resolve_rows, lists.candidates, statistics, num_rows, code_dim, BLOCK_R=RESOLVE_ROWS,
            BLOCK_D=DIFFERENCE_COLUMNS, num_warps=4, maxnreg=DECIDE_REGISTERS, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
        _drain_kernel[(min(ceil_div(num_rows, DRAIN_ROWS), 4 * multiprocessors),)](
            *shared, lists.drain_rows, codebook.shape[0], code_dim, BLOCK_R=DRAIN_ROWS, BLOCK_K=DRAIN_CODES,
            BLOCK_D=DIFFERENCE_COLUMNS, num_warps=4, maxnreg=DECIDE_REGISTERS, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
