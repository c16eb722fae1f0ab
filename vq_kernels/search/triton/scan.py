"""The scan: every score on the tensor cores, the best of each row, and the certificate.

    s[n, k] = x'_n . c'_k - h_k ratio_n                fp16 products, float32 accumulator that starts at -h ratio
    slot j of a row holds max over tiles and parity of s[n, 64 tile + 2 j + parity], its position in the low bits
    lost[n] = the best score that a slot dropped
    index[n] = the code of the best slot, certified if best - runner-up > 2 E (common.py)

Reads x once, or twice if x' does not stay in registers, and for each tile of rows the rounded codebook from L2, with x'
if D > BLOCK_D; writes 16 bytes and one code per row. No [N, K] matrix and no array of indices exist: x' is kept in the
memory of the codes, which are written last. Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from vq_kernels.search.triton.common import (
    ENABLE_FP_FUSION,
    LOWEST_SCORE,
    Outputs,
    ceil_div,
    certify,
    half_norm_ratio,
    load_shifted,
    mark_margin,
    round_rows,
    row_exponent,
    row_margin,
    write_rows,
)
from vq_kernels.search.triton.plan import SearchPlan, row_pitch
from vq_kernels.search.triton.prepare import TritonCodebook


@triton.jit
def _fold_tile(scores, best, lost, tile, keep_mask, parity_bit, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Fold one tile of scores [BLOCK_N, BLOCK_K] into the slots, 64 columns at a time."""
    if BLOCK_K == 64:
        best, lost = _fold(scores, best, lost, tile, keep_mask, parity_bit, BLOCK_N)
    else:
        lower, upper = tl.split(tl.permute(tl.reshape(scores, (BLOCK_N, 2, 64)), (0, 2, 1)))
        best, lost = _fold(lower, best, lost, 2 * tile, keep_mask, parity_bit, BLOCK_N)
        best, lost = _fold(upper, best, lost, 2 * tile + 1, keep_mask, parity_bit, BLOCK_N)
    return best, lost


@triton.jit
def _fold(scores, best, lost, position, keep_mask, parity_bit, BLOCK_N: tl.constexpr):
    """Fold scores [BLOCK_N, 64] into the slots: 4 ALU instructions per score, all within a thread.

    Neighbouring columns share a slot, which halves the registers. `lost` needs no position, so it has 8 columns.
    """
    bits = scores.to(tl.int32, bitcast=True)
    even, odd = tl.split(tl.reshape(bits, (BLOCK_N, 32, 2)))
    # Added, not OR-ed: the ALU is the bottleneck, and the multiply-add units do the addition.
    even = ((even & keep_mask) + position).to(tl.float32, bitcast=True)
    odd = ((odd & keep_mask) + (position + parity_bit)).to(tl.float32, bitcast=True)
    higher = tl.maximum(even, odd)
    dropped = tl.maximum(tl.minimum(even, odd), tl.minimum(best, higher))
    lost = tl.maximum(lost, tl.max(tl.reshape(dropped, (BLOCK_N, 4, 8)), axis=1))
    return tl.maximum(best, higher), lost


@triton.jit
def _slot_winners(best, lost, first_code, tile_mask, K):
    """The row state (v0..v3, i0..i3, hidden) of best [BLOCK_N, 32] and lost [BLOCK_N, 8].

    Note: a winner is removed by its slot, not by its value, so that an equal score remains.
    """
    slots = tl.arange(0, 32)
    v0, i0, best = _take_best(best, slots, first_code, tile_mask, K)
    v1, i1, best = _take_best(best, slots, first_code, tile_mask, K)
    v2, i2, best = _take_best(best, slots, first_code, tile_mask, K)
    v3, i3, best = _take_best(best, slots, first_code, tile_mask, K)
    hidden = tl.maximum(tl.max(best, axis=1), tl.max(lost, axis=1))
    return v0, v1, v2, v3, i0, i1, i2, i3, hidden


@triton.jit
def _take_best(best, slots, first_code, tile_mask, K):
    """A row's best score, its code, and the slots without it."""
    value = tl.max(best, axis=1)
    slot = tl.min(tl.where(best == value[:, None], slots[None, :], 32), axis=1)
    best = tl.where(slots[None, :] == slot[:, None], LOWEST_SCORE, best)
    position = value.to(tl.int32, bitcast=True) & tile_mask
    parity_bit = (tile_mask + 1) >> 1  # the highest packed bit is the column's parity, the others its tile
    odd = (position >= parity_bit).to(tl.int32)
    index = first_code + (position - odd * parity_bit) * 64 + 2 * slot + odd
    # If K < 4 this may be padding: never within the margin, but no index may reach K.
    return value, tl.minimum(index, K - 1), best


@triton.jit
def _prepare_rows(
    x_ptr, stride_n, stride_d, offs_n, in_rows, shift_ptr, code_exponent, bounds_ptr, tile_mask, rows16_ptrs,
    D: tl.constexpr, PITCH: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Store x' [BLOCK_N, PITCH] at rows16_ptrs [BLOCK_N, 1], and return ratio and margin of each row."""
    offs_d = tl.arange(0, BLOCK_D)
    rows = x_ptr + offs_n.to(tl.int64)[:, None] * stride_n
    finite = tl.full([BLOCK_N], 1, tl.int32)
    in_range = tl.full([BLOCK_N], 1, tl.int32)
    largest = tl.zeros([BLOCK_N], tl.float32)
    for start_d in tl.range(0, D, BLOCK_D, num_stages=STAGES):
        values, shifted, _, shifted_in_range = load_shifted(rows, in_rows, start_d + offs_d, stride_d, shift_ptr, D)
        finite = tl.minimum(finite, tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1))
        in_range = tl.minimum(in_range, tl.min(shifted_in_range.to(tl.int32), axis=1))
        largest = tl.maximum(largest, tl.max(tl.abs(shifted), axis=1))
    exponent = row_exponent(largest, code_exponent)
    residual_square = tl.zeros([BLOCK_N], tl.float32)
    rounded_square = tl.zeros([BLOCK_N], tl.float32)
    for start_d in tl.range(0, PITCH, BLOCK_D, num_stages=STAGES):
        columns = start_d + offs_d
        _, shifted, lost, _ = load_shifted(rows, in_rows, columns, stride_d, shift_ptr, D)
        rounded, residual_part, rounded_part = round_rows(shifted, lost, exponent)
        residual_square += residual_part
        rounded_square += rounded_part
        tl.store(rows16_ptrs + columns[None, :], rounded, mask=in_rows[:, None] & (columns < PITCH)[None, :])
    margin = row_margin(residual_square, rounded_square, exponent, code_exponent, bounds_ptr, tile_mask, D)
    return half_norm_ratio(exponent, code_exponent), mark_margin(margin, finite, in_range)


# Not specialised for N and K: a short last batch or another K compiles nothing.
@triton.jit(do_not_specialize=["N", "K", "tiles_per_split", "tile_mask"])
def _scan_kernel(
    x_ptr, stride_xn, stride_xd,  # [N, D], any strides
    codebook_ptr, stride_ck, stride_cd,  # [K, D], any strides
    codes16_ptr,  # [K padded, PITCH] float16, c'
    half_norms_ptr,  # [K padded] float32, h
    shift_ptr,  # [D + 5] float32, mu, then C, R, C', H and e
    indices_ptr, codes_ptr, sq_distances_ptr,  # Outputs; if SPLIT, sq_distances receives the margins
    states_ptr,  # [splits, 9, N] int32, if SPLIT: the bits of v0 to v3 and `hidden`, and i0 to i3
    statistics_ptr,  # [3] int64: receives (N, 0, 0), the counts if all rows are certified
    N, K, tiles_per_split, tile_mask, D: tl.constexpr, PITCH: tl.constexpr, ROW_PITCH: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_D: tl.constexpr,
    X_COLUMNS: tl.constexpr, RESIDENT: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * BLOCK_N
    offs_n = first_row + tl.arange(0, BLOCK_N)
    in_rows = offs_n < N
    offs_k = tl.arange(0, BLOCK_K)
    offs_d = tl.arange(0, BLOCK_D)
    split = tl.program_id(1)
    first_tile = split * tiles_per_split
    last_tile = tl.minimum(first_tile + tiles_per_split, tl.cdiv(K, BLOCK_K))
    if tl.program_id(0) + split == 0:
        tl.store(statistics_ptr, N.to(tl.int64))
        tl.store(statistics_ptr + 1, 0)
        tl.store(statistics_ptr + 2, 0)

    bounds_ptr = shift_ptr + D
    code_exponent = tl.load(bounds_ptr + 4).to(tl.int32)
    if RESIDENT:
        row_ptrs = x_ptr + offs_n.to(tl.int64)[:, None] * stride_xn
        values, shifted, lost_bits, shifted_in_range = load_shifted(row_ptrs, in_rows, offs_d, stride_xd, shift_ptr, D)
        finite = tl.min((tl.abs(values) < float("inf")).to(tl.int32), axis=1)
        in_range = tl.min(shifted_in_range.to(tl.int32), axis=1)
        exponent = row_exponent(tl.max(tl.abs(shifted), axis=1), code_exponent)
        rows16, residual_square, rounded_square = round_rows(shifted, lost_bits, exponent)
        ratio = half_norm_ratio(exponent, code_exponent)
        margin = row_margin(residual_square, rounded_square, exponent, code_exponent, bounds_ptr, tile_mask, D)
        margin = mark_margin(margin, finite, in_range)
    else:
        # x' of this program's rows begins where their codes do. The programs of other splits store the same bits there,
        # so whichever comes last, each reads what it stored.
        rows16_ptr = codes_ptr.to(tl.pointer_type(tl.float16)) + first_row.to(tl.int64) * (
            D * codes_ptr.dtype.element_ty.primitive_bitwidth // 16
        )
        row16_ptrs = rows16_ptr + (tl.minimum(offs_n, N - 1) - first_row)[:, None] * ROW_PITCH
        ratio, margin = _prepare_rows(
            x_ptr, stride_xn, stride_xd, offs_n, in_rows, shift_ptr, code_exponent, bounds_ptr, tile_mask, row16_ptrs,
            D, ROW_PITCH, BLOCK_N, X_COLUMNS, STAGES,
        )  # fmt: skip
        tl.debug_barrier()  # other threads of this program read x' below
    if SPLIT:  # stored here, since it would take a register in the loop
        margin_ptrs = sq_distances_ptr.to(tl.pointer_type(tl.float32)) + 2 * offs_n.to(tl.int64)
        tl.store(margin_ptrs, margin, mask=offs_n < tl.where(split == 0, N, 0))

    keep_mask = ~tile_mask
    parity_bit = (tile_mask + 1) >> 1
    descent = -ratio  # negated per row, not per score
    best = tl.full([BLOCK_N, 32], LOWEST_SCORE, tl.float32)
    lost = tl.full([BLOCK_N, 8], LOWEST_SCORE, tl.float32)
    pieces: tl.constexpr = (PITCH + BLOCK_D - 1) // BLOCK_D
    if pieces == 1:  # x' stays in shared memory
        if not RESIDENT:
            rows16 = tl.load(row16_ptrs + offs_d[None, :], mask=(offs_d < ROW_PITCH)[None, :], other=0.0)
        for tile in range(first_tile, last_tile):
            start_k = tile * BLOCK_K
            half_norms = tl.load(half_norms_ptr + start_k + offs_k)
            code_addresses = codes16_ptr + start_k.to(tl.int64) * PITCH + (offs_k[:, None] * PITCH + offs_d[None, :])
            codes16 = tl.load(code_addresses, mask=(offs_d < PITCH)[None, :], other=0.0)
            scores = tl.dot(rows16, tl.trans(codes16), half_norms[None, :] * descent[:, None])
            best, lost = _fold_tile(scores, best, lost, tile - first_tile, keep_mask, parity_bit, BLOCK_N, BLOCK_K)
    else:
        # One loop over tiles and pieces, because copies run ahead only within a loop that holds no other.
        half_norms = tl.load(half_norms_ptr + first_tile * BLOCK_K + offs_k)
        scores = half_norms[None, :] * descent[:, None]
        for step in range(first_tile * pieces, last_tile * pieces):
            tile = step // pieces
            start_k = tile * BLOCK_K
            columns = (step - tile * pieces) * BLOCK_D + offs_d
            rows16 = tl.load(row16_ptrs + columns[None, :], mask=(columns < ROW_PITCH)[None, :], other=0.0)
            code_addresses = codes16_ptr + start_k.to(tl.int64) * PITCH + (offs_k[:, None] * PITCH + columns[None, :])
            codes16 = tl.load(code_addresses, mask=(columns < PITCH)[None, :], other=0.0)
            scores = tl.dot(rows16, tl.trans(codes16), scores)
            if step == tile * pieces + pieces - 1:
                # Loaded before the tile is folded, used after.
                half_norms = tl.load(half_norms_ptr + tl.minimum(tile + 1, last_tile - 1) * BLOCK_K + offs_k)
                best, lost = _fold_tile(scores, best, lost, tile - first_tile, keep_mask, parity_bit, BLOCK_N, BLOCK_K)
                scores = half_norms[None, :] * descent[:, None]

    v0, v1, v2, v3, i0, i1, i2, i3, hidden = _slot_winners(best, lost, first_tile * BLOCK_K, tile_mask, K)
    if SPLIT:
        stride = N.to(tl.int64)
        state_ptrs = states_ptr + split * 9 * stride + offs_n
        tl.store(state_ptrs, v0.to(tl.int32, bitcast=True), mask=in_rows)
        tl.store(state_ptrs + stride, v1.to(tl.int32, bitcast=True), mask=in_rows)
        tl.store(state_ptrs + 2 * stride, v2.to(tl.int32, bitcast=True), mask=in_rows)
        tl.store(state_ptrs + 3 * stride, v3.to(tl.int32, bitcast=True), mask=in_rows)
        tl.store(state_ptrs + 4 * stride, hidden.to(tl.int32, bitcast=True), mask=in_rows)
        tl.store(state_ptrs + 5 * stride, i0, mask=in_rows)
        tl.store(state_ptrs + 6 * stride, i1, mask=in_rows)
        tl.store(state_ptrs + 7 * stride, i2, mask=in_rows)
        tl.store(state_ptrs + 8 * stride, i3, mask=in_rows)
    else:
        # Fewer where rows are unaligned, which would spill.
        columns_written: tl.constexpr = 32 if D > 16 and (D % 16 == 0 or pieces > 1) else 16
        tl.debug_barrier()  # every thread has read x', which the codes overwrite
        index, certified = certify(
            v0, v1, v2, v3, i0, i1, i2, i3, hidden, margin, offs_n, in_rows, indices_ptr, sq_distances_ptr
        )
        write_rows(
            index, margin, offs_n, in_rows & certified, x_ptr, stride_xn, stride_xd, codebook_ptr, stride_ck, stride_cd,
            indices_ptr, codes_ptr, sq_distances_ptr, D, BLOCK_N, columns_written,
        )  # fmt: skip


def launch_scan(
    x: Tensor, codebook: Tensor, prepared: TritonCodebook, plan: SearchPlan, outputs: Outputs, statistics: Tensor
) -> Tensor | None:
    """Scan the codebook for all rows x [N, D], on the current device.

    Writes `outputs`, or returns the states of the parts of a split codebook, [splits, 9, N] int32, to merge.
    """
    config = plan.config
    (num_rows, code_dim), num_codes, pitch = x.shape, codebook.shape[0], row_pitch(x.shape[1])
    states = x.new_empty((plan.splits, 9, num_rows), dtype=torch.int32) if plan.splits > 1 else None
    _scan_kernel[(ceil_div(num_rows, config.block_n), plan.splits)](
        x, *x.stride(), codebook, *codebook.stride(), *prepared, *outputs, states, statistics, num_rows, num_codes,
        plan.tiles_per_split, plan.tile_mask, D=code_dim, PITCH=pitch,
        ROW_PITCH=pitch if 2 * pitch <= code_dim * x.element_size() else code_dim, BLOCK_N=config.block_n,
        BLOCK_K=config.block_k, BLOCK_D=config.columns(code_dim),
        X_COLUMNS=(4096 if x.stride(1) == 1 else 2048) // config.block_n,  # transposed rows would spill at full width
        RESIDENT=config.resident, SPLIT=states is not None, STAGES=config.num_stages, num_warps=config.num_warps,
        num_stages=config.num_stages, maxnreg=config.max_registers, enable_fp_fusion=ENABLE_FP_FUSION,
    )  # fmt: skip
    return states
