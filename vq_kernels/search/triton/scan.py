"""The scan: every score on the tensor cores, the best of each row, and the certificate.

    s[n, k] = x'_n . c'_k - h_k ratio_n                fp16 products, float32 accumulator that starts at -h ratio
    slot j of a row holds max over tiles and parity of s[n, tile * BLOCK_K + 2 j + parity], its position in the low bits
    lost[n] = the best score that a slot dropped
    index[n] = the code of the best slot, certified if best - runner-up > 2 E (common.py)

Reads x once, and for each tile of rows the rounded codebook from L2, with x' if D > BLOCK_D; writes 16 bytes and one
code per row. No [N, K] matrix and no array of indices exist. Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1.
"""

from typing import NamedTuple

import torch
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
    half_norm_ratio,
    load_shifted,
    mark_margin,
    round_rows,
    row_exponent,
    row_margin,
    write_rows,
)
from vq_kernels.search.triton.plan import SearchPlan, row_pitch
from vq_kernels.search.triton.prepare import TritonCodebook, launch_rows


@triton.jit
def _fold(
    scores, best, lost, position, keep_mask, parity_bit, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Fold one tile of scores [BLOCK_N, BLOCK_K] into the slots: 4 ALU instructions per score, all within a thread.

    Neighbouring columns share a slot, which halves the registers. `lost` needs no position, so it has 8 columns.
    """
    bits = scores.to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(bits, (BLOCK_N, BLOCK_K // 2, 2)))
    # Added, not OR-ed: the ALU is the bottleneck, and the multiply-add units do the addition.
    even = ((even & keep_mask) + position).to(tl.float32, bitcast=True)
    odd = ((odd & keep_mask) + (position + parity_bit)).to(tl.float32, bitcast=True)
    higher = tl.maximum(even, odd)
    dropped = tl.maximum(tl.minimum(even, odd), tl.minimum(best, higher))
    lost = tl.maximum(lost, tl.max(tl.reshape(dropped, (BLOCK_N, BLOCK_K // 16, 8)), axis=1))
    return tl.maximum(best, higher), lost


@triton.jit
def _slot_winners(best, lost, first_tile, tile_mask, K, BLOCK_K: tl.constexpr):
    """The row state (v0..v3, i0..i3, hidden) of best [BLOCK_N, BLOCK_K // 2] and lost [BLOCK_N, 8].

    Note: a winner is removed by its slot, not by its value, so that an equal score remains.
    """
    slots = tl.arange(0, BLOCK_K // 2)
    v0, i0, best = _take_best(best, slots, first_tile, tile_mask, K, BLOCK_K)
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
    position = value.to(tl.int32, bitcast=True) & tile_mask
    parity_bit = (tile_mask + 1) >> 1  # the highest packed bit is the column's parity, the others its tile
    odd = (position >= parity_bit).to(tl.int32)
    index = (first_tile + position - odd * parity_bit) * BLOCK_K + 2 * slot + odd
    # If K < 4 this may be padding: never within the margin, but no index may reach K.
    return value, tl.minimum(index, K - 1), best


# Not specialised for N and K: a short last batch or another K compiles nothing.
@triton.jit(do_not_specialize=["N", "K", "tiles_per_split", "tile_mask"])
def _scan_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    rows16_ptr,  # [N padded, PITCH] float16, x'; None if RESIDENT
    ratios_ptr,  # [N] float32; None if RESIDENT
    margins_ptr,  # [N] float32: written if RESIDENT and SPLIT, else read if not RESIDENT
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    codes16_ptr,  # [K padded, PITCH] float16, c'
    half_norms_ptr,  # [K padded] float32, h
    shift_ptr,  # [D] float32
    bounds_ptr,  # [4] float32
    exponent_ptr,  # [1] int32
    indices_ptr, codes_ptr, sq_distances_ptr,  # Outputs
    state_scores_ptr, state_codes_ptr,  # SplitStates, if SPLIT
    counters_ptr, rerank_rows_ptr, candidates_ptr, exhaustive_rows_ptr,  # Uncertified
    N, K, tiles_per_split, tile_mask, D: tl.constexpr, PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    RESIDENT: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_rows = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))

    if RESIDENT:
        code_exponent = tl.load(exponent_ptr)
        row_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn
        values, shifted, lost_bits, shifted_in_range = load_shifted(row_ptrs, in_rows, offs_d, stride_xd, shift_ptr, D)
        finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1)
        in_range = tl.min(shifted_in_range.to(tl.int32), axis=1)
        exponent = row_exponent(tl.max(tl.abs(shifted), axis=1), code_exponent)
        rows16, residual_square, rounded_square = round_rows(shifted, lost_bits, exponent)
        ratio = half_norm_ratio(exponent, code_exponent)
        margin = row_margin(residual_square, rounded_square, exponent, code_exponent, bounds_ptr, tile_mask, D)
        margin = mark_margin(margin, finite, in_range)
        if SPLIT:  # stored here, since it would take a register in the loop
            tl.store(margins_ptr + offs_n, margin, mask=offs_n < tl.where(split == 0, N, 0))
    else:
        ratio = tl.load(ratios_ptr + offs_n, mask=in_rows, other=1.0)
        margin = tl.load(margins_ptr + offs_n, mask=in_rows, other=ROW_NOT_FINITE)

    keep_mask = ~tile_mask
    parity_bit = (tile_mask + 1) >> 1
    descent = -ratio  # negated per row, not per score
    best = tl.full([BLOCK_N, BLOCK_K // 2], LOWEST_SCORE, tl.float32)
    lost = tl.full([BLOCK_N, 8], LOWEST_SCORE, tl.float32)
    pieces: tl.constexpr = (PITCH + BLOCK_D - 1) // BLOCK_D
    if pieces == 1:  # x' stays in shared memory
        if not RESIDENT:
            row_addresses = rows16_ptr + offs_n.to(tl.int64)[:, None] * PITCH + offs_d[None, :]
            rows16 = tl.load(row_addresses, mask=(offs_d < PITCH)[None, :], other=0.0)
        for tile in range(first_tile, last_tile):
            start_k = tile * BLOCK_K
            half_norms = tl.load(half_norms_ptr + start_k + offs_k)
            code_addresses = codes16_ptr + start_k.to(tl.int64) * PITCH + (offs_k[:, None] * PITCH + offs_d[None, :])
            codes16 = tl.load(code_addresses, mask=(offs_d < PITCH)[None, :], other=0.0)
            scores = tl.dot(rows16, tl.trans(codes16), half_norms[None, :] * descent[:, None])
            best, lost = _fold(scores, best, lost, tile - first_tile, keep_mask, parity_bit, BLOCK_N, BLOCK_K)
    else:
        # One loop over tiles and pieces, because copies run ahead only within a loop that holds no other.
        half_norms = tl.load(half_norms_ptr + first_tile * BLOCK_K + offs_k)
        scores = half_norms[None, :] * descent[:, None]
        for step in range(first_tile * pieces, last_tile * pieces):
            tile = step // pieces
            start_k = tile * BLOCK_K
            columns = (step - tile * pieces) * BLOCK_D + offs_d
            row_addresses = rows16_ptr + offs_n.to(tl.int64)[:, None] * PITCH + columns[None, :]
            rows16 = tl.load(row_addresses, mask=(columns < PITCH)[None, :], other=0.0)
            code_addresses = codes16_ptr + start_k.to(tl.int64) * PITCH + (offs_k[:, None] * PITCH + columns[None, :])
            codes16 = tl.load(code_addresses, mask=(columns < PITCH)[None, :], other=0.0)
            scores = tl.dot(rows16, tl.trans(codes16), scores)
            if step == tile * pieces + pieces - 1:
                # Loaded before the tile is folded, used after.
                half_norms = tl.load(half_norms_ptr + tl.minimum(tile + 1, last_tile - 1) * BLOCK_K + offs_k)
                best, lost = _fold(scores, best, lost, tile - first_tile, keep_mask, parity_bit, BLOCK_N, BLOCK_K)
                scores = half_norms[None, :] * descent[:, None]

    v0, v1, v2, v3, i0, i1, i2, i3, hidden = _slot_winners(best, lost, first_tile, tile_mask, K, BLOCK_K)
    if SPLIT:
        score_ptrs = state_scores_ptr + (split * 5).to(tl.int64) * N + offs_n
        code_ptrs = state_codes_ptr + (split * 4).to(tl.int64) * N + offs_n
        tl.store(score_ptrs, v0, mask=in_rows)
        tl.store(score_ptrs + N, v1, mask=in_rows)
        tl.store(score_ptrs + 2 * N, v2, mask=in_rows)
        tl.store(score_ptrs + 3 * N, v3, mask=in_rows)
        tl.store(score_ptrs + 4 * N, hidden, mask=in_rows)
        tl.store(code_ptrs, i0, mask=in_rows)
        tl.store(code_ptrs + N, i1, mask=in_rows)
        tl.store(code_ptrs + 2 * N, i2, mask=in_rows)
        tl.store(code_ptrs + 3 * N, i3, mask=in_rows)
    else:
        # Fewer where rows are unaligned, which would spill.
        columns_written: tl.constexpr = 32 if D > 16 and (D % 16 == 0 or pieces > 1) else 16
        index = certify(
            v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, counters_ptr, rerank_rows_ptr,
            candidates_ptr, exhaustive_rows_ptr,
        )  # fmt: skip
        write_rows(
            index, margin, offs_n, in_rows, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd,
            indices_ptr, codes_ptr, sq_distances_ptr, D, BLOCK_N, columns_written,
        )  # fmt: skip


class SplitStates(NamedTuple):
    """The states of N rows in each part of the codebook, and their margins."""

    scores: Tensor  # [splits, 5, N] float32, v0 to v3 and `hidden`
    codes: Tensor  # [splits, 4, N] int32, i0 to i3
    margins: Tensor  # [N] float32


def launch_scan(
    x: Tensor,
    codebook: Tensor,
    prepared: TritonCodebook,
    plan: SearchPlan,
    outputs: Outputs,
    uncertified: Uncertified,
) -> SplitStates | None:
    """Scan the codebook for at most plan.rows_per_launch rows x [N, D].

    Writes `outputs` and adds to `uncertified`. If the codebook is split, it returns the states to merge instead.
    """
    config = plan.config
    (num_rows, code_dim), num_codes = x.shape, codebook.shape[0]
    rows16, ratios, margins = (None, None, None) if config.resident else launch_rows(x, prepared, plan)
    states = None
    if plan.splits > 1:
        states = SplitStates(
            scores=x.new_empty((plan.splits, 5, num_rows), dtype=torch.float32),
            codes=x.new_empty((plan.splits, 4, num_rows), dtype=torch.int32),
            margins=x.new_empty((num_rows,), dtype=torch.float32) if margins is None else margins,
        )
        margins = states.margins
    with device_of(x):
        _scan_kernel[(ceil_div(num_rows, config.block_n), plan.splits)](
            x, *x.stride(), rows16, ratios, margins, codebook, *codebook.stride(), *prepared, *outputs,
            *(states[:2] if states else (None, None)), *uncertified, num_rows, num_codes,
            plan.tiles_per_split, plan.tile_mask, D=code_dim, PITCH=row_pitch(code_dim), BLOCK_N=config.block_n,
            BLOCK_K=config.block_k, BLOCK_D=config.columns(code_dim), RESIDENT=config.resident,
            SPLIT=states is not None, num_warps=config.num_warps,
            num_stages=config.num_stages, maxnreg=config.max_registers, enable_fp_fusion=ENABLE_FP_FUSION,
        )  # fmt: skip
    return states
