# Kernels are Python that Triton compiles, so their tensors carry no types.
# mypy: allow-untyped-decorators, allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls
"""From the scores to the answer: the state of a row, the certificate, the lists, and what is written of a row.

The state of a row over some codes is its four best scores with their codes, in order, and `hidden`, the best score
that is not among the four. Two states merge into one, so a codebook can be scanned in parts. With m = 2 E:

    proved     v0 - max(v1, hidden) > m     strictly: two equal scores are never proved
    resolved   v0 - hidden > m              the true winner is among the four
    drained    else                         anything may hide: all codes are looked at
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import LOWEST_SCORE, NO_FINITE_CODE


class Outputs(NamedTuple):
    """What a search returns of N rows: indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float32."""

    indices: Tensor
    codes: Tensor
    sq_distances: Tensor


class Lists(NamedTuple):
    """The rows that the scan leaves open, on the device.

    Attributes:
        counters: [2] int32, rows on the first and on the second list; zeros before the scan.
        resolve_rows: [N] int32, rows whose winner is among their candidates.
        candidates: [N, 4] int32, at the row's place on the list.
        drain_rows: [N] int32, rows for which every code has to be looked at.
    """

    counters: Tensor
    resolve_rows: Tensor
    candidates: Tensor
    drain_rows: Tensor


def make_lists(num_rows: int, device: torch.device) -> Lists:
    """Lists with room for every row."""
    return Lists(
        counters=torch.zeros(2, dtype=torch.int32, device=device),
        resolve_rows=torch.empty(num_rows, dtype=torch.int32, device=device),
        candidates=torch.empty((num_rows, 4), dtype=torch.int32, device=device),
        drain_rows=torch.empty(num_rows, dtype=torch.int32, device=device),
    )


@triton.jit
def slot_winners(best, lost, first_tile, tile_mask, K, BLOCK_K: tl.constexpr, EXACT: tl.constexpr):
    """The row state (v0..v3, i0..i3, hidden) of best [BLOCK_N, BLOCK_K // 2] and lost [BLOCK_N, 8].

    Where not EXACT only v0 and i0 are of use.

    Trap: the winner leaves by its slot, not by its value, so that an equal score stays to be found.
    """
    slots = tl.arange(0, BLOCK_K // 2)
    v0, i0, best = _take_best(best, slots, first_tile, tile_mask, K, BLOCK_K)
    if not EXACT:
        return v0, v0, v0, v0, i0, i0, i0, i0, v0
    v1, i1, best = _take_best(best, slots, first_tile, tile_mask, K, BLOCK_K)
    v2, i2, best = _take_best(best, slots, first_tile, tile_mask, K, BLOCK_K)
    v3, i3, best = _take_best(best, slots, first_tile, tile_mask, K, BLOCK_K)
    hidden = tl.maximum(tl.max(best, axis=1), tl.max(lost, axis=1))
    return v0, v1, v2, v3, i0, i1, i2, i3, hidden


@triton.jit
def _take_best(best, slots, first_tile, tile_mask, K, BLOCK_K: tl.constexpr):
    """A row's best score, its code, and the slots without it."""
    value = tl.max(best, axis=1)
    slot = tl.min(tl.where(best == value[:, None], slots[None, :], BLOCK_K), axis=1)
    best = tl.where(slots[None, :] == slot[:, None], LOWEST_SCORE, best)
    place = value.to(tl.int32, bitcast=True) & tile_mask
    parity_place = (tile_mask + 1) >> 1  # the highest packed bit is the column's parity, the others its tile
    odd = (place >= parity_place).to(tl.int32)
    index = (first_tile + place - odd * parity_place) * BLOCK_K + 2 * slot + odd
    # Padding can stand here where K < 4; it is never within the margin, but no index may pass K.
    return value, tl.minimum(index, K - 1), best


@triton.jit
def insert(value, index, v0, v1, v2, v3, i0, i1, i2, i3, hidden):
    """The row state with one more score. Of equal scores the one that was there first stays ahead."""
    above0, above1, above2, above3 = value > v0, value > v1, value > v2, value > v3
    hidden = tl.maximum(hidden, tl.where(above3, v3, value))
    v3, i3 = tl.where(above2, v2, tl.where(above3, value, v3)), tl.where(above2, i2, tl.where(above3, index, i3))
    v2, i2 = tl.where(above1, v1, tl.where(above2, value, v2)), tl.where(above1, i1, tl.where(above2, index, i2))
    v1, i1 = tl.where(above0, v0, tl.where(above1, value, v1)), tl.where(above0, i0, tl.where(above1, index, i1))
    v0, i0 = tl.where(above0, value, v0), tl.where(above0, index, i0)
    return v0, v1, v2, v3, i0, i1, i2, i3, hidden


@triton.jit
def is_settled(v0, margin):
    """Whether the index is 0 whatever the scores say: no code is finite, or the row is not."""
    return (v0 < NO_FINITE_CODE) | (margin < 0)


@triton.jit
def certify(
    v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, counters_ptr, resolve_rows_ptr, candidates_ptr,
    drain_rows_ptr,
):  # fmt: skip
    """The index of each row, and the rows that are not proved put on the lists.

    counters [2] int32 count the rows on the two lists; candidates [N, 4] int32 repeat the best where there are fewer.
    Which place a row gets depends on timing; what is computed for it does not.
    """
    settled = is_settled(v0, margin)
    proved = settled | (v0 - tl.maximum(v1, hidden) > margin)
    complete = v0 - hidden > margin  # False where the margin is NaN
    resolve = in_rows & (proved == 0) & complete
    drain = in_rows & (proved == 0) & (complete == 0)
    resolve_place = _reserve(counters_ptr, resolve)
    tl.store(resolve_rows_ptr + resolve_place, offs_n, mask=resolve)
    tl.store(candidates_ptr + 4 * resolve_place, i0, mask=resolve)
    tl.store(candidates_ptr + 4 * resolve_place + 1, tl.where(v0 - v1 <= margin, i1, i0), mask=resolve)
    tl.store(candidates_ptr + 4 * resolve_place + 2, tl.where(v0 - v2 <= margin, i2, i0), mask=resolve)
    tl.store(candidates_ptr + 4 * resolve_place + 3, tl.where(v0 - v3 <= margin, i3, i0), mask=resolve)
    tl.store(drain_rows_ptr + _reserve(counters_ptr + 1, drain), offs_n, mask=drain)
    return tl.where(settled, 0, i0)


@triton.jit
def _reserve(counter_ptr, wanted):
    """A place on a list for each row that wants one; one atomic a program, none where no row does."""
    number = wanted.to(tl.int32)
    total = tl.sum(number, axis=0)
    first = tl.atomic_add(counter_ptr, total, mask=total > 0)
    first = tl.where(total > 0, first, 0)
    return first + tl.cumsum(number, axis=0) - number


@triton.jit
def round_to(code, dtype: tl.constexpr):
    """A gathered code in x's dtype, rounded to nearest even.

    float32 is rounded to bfloat16's bits by hand first: Triton's interpreter truncates where the hardware rounds.
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
    codes_ptr, sq_distances_ptr, D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Index, gathered code and squared distance of BLOCK_N rows.

    The differences are float32's own, correctly rounded. Their squares are summed twice, as they are and times 2**128:
    the second sum has what underflows in the first, and wherever it is finite it is the one taken.
    """
    offs_d = tl.arange(0, BLOCK_D)
    rows = offs_n.to(tl.int64)
    plain = tl.zeros([BLOCK_N], tl.float32)
    raised = tl.zeros([BLOCK_N], tl.float32)
    for start_d in range(0, D, BLOCK_D):
        columns = (start_d + offs_d).to(tl.int64)[None, :]
        mask = in_rows[:, None] & (columns < D)
        values = tl.load(x_ptr + rows[:, None] * stride_xn + columns * stride_xd, mask=mask, other=0.0)
        source = codebook_ptr + index.to(tl.int64)[:, None] * stride_ck + columns * stride_cd
        code = tl.load(source, mask=mask, other=0.0)
        tl.store(codes_ptr + rows[:, None] * D + columns, round_to(code, codes_ptr.dtype.element_ty), mask=mask)
        difference = code.to(tl.float32) - values.to(tl.float32)
        large = difference * 2.0**64
        plain += tl.sum(difference * difference, axis=1)
        raised += tl.sum(large * large, axis=1)
    sq_distance = tl.where(raised < float("inf"), (raised * 2.0**-64) * 2.0**-64, plain)
    sq_distance = tl.where(margin < 0, float("nan"), sq_distance)  # a row with NaN or Inf
    tl.store(indices_ptr + rows, index.to(tl.int64), mask=in_rows)
    tl.store(sq_distances_ptr + rows, sq_distance, mask=in_rows)
