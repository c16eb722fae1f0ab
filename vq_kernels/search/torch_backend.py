"""The exact search in plain PyTorch, for any device.

The nearest code of x maximises S_k = (x - m)·(c_k - m) - ½‖c_k - m‖², where m is the codebook's mean. Three steps, each
taking only the rows that the one before could not prove:

1. scan in float32: a matrix product gives, for every code, an *upper bound* U_k >= S_k: the score plus the bound E_k of
   its rounding error, which is linear in the row's norm and so costs one more column of the product. With b the code of
   the largest U, the row's answer is b, proved, when every other U_k lies under U_b - 2·E_b <= S_b;
2. resolve: where a few codes reach that threshold, the float64 sums of (x_j - c_kj)² over them decide; the least wins,
   the lowest index on a tie;
3. drain: where many do, steps 1 and 2 again with float64 scores.

Memory: a fixed buffer, and O(N + K·D); the [N, K] scores live a tile at a time. The bound is derived in
docs/exactness.md.

Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1, for the search; Higham, "Accuracy and Stability of Numerical
Algorithms", 2nd ed., section 3.1, for the error of a sum in any order.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.precision import float32_products_are_exact_enough

_TILE_ELEMENTS = 1 << 20  # scores held at a time: 4 MiB of float32 stay in a core's caches
_BLOCK_K = 1 << 13  # codes a tile covers at most; more are taken in blocks
_DIRECT_ELEMENTS = 1 << 20  # numbers that the direct step holds at a time
_MANY_CANDIDATES = 16  # a row, from which float64 scores (or, after them, a look for identical codes) pay
_TINY_SQ_DISTANCE = 2.0**-80  # below it a float32 sum of squares may have lost terms to underflow

_UNIT = {torch.float32: 2.0**-24, torch.float64: 2.0**-53}
_TINY = {torch.float32: 2.0**-100, torch.float64: 2.0**-900}  # covers every underflow, even flushed to zero
_ROW_LIMIT = {torch.float32: 2.0**30, torch.float64: 2.0**400}  # longer rows (in units of the codebook) are not scanned
_NEVER = {torch.float32: -(2.0**100), torch.float64: -(2.0**900)}  # the score of a code that must not win


class CodebookOperand(NamedTuple):
    """The codebook as a scan reads it: shifted by its mean, scaled to a radius of about 1, with its error bounds."""

    scale: Tensor  # [1], a power of two
    mean: Tensor  # [D], times the scale
    matrix: Tensor  # [K padded, D + 2]: the scaled code, -h + its error, the error for a unit of a row's norm
    error_per_norm: Tensor  # [K padded]
    error_constant: Tensor  # [K padded]


def prepare(codebook: Tensor, dtype: torch.dtype = torch.float32) -> CodebookOperand:
    """What a scan in `dtype` (float32 or float64) needs of the codebook [K, D]."""
    num_codes, code_dim = codebook.shape
    wide = codebook.double()
    usable = wide.isfinite().all(dim=1, keepdim=True)  # [K, 1]
    wide = torch.where(usable, wide, 0.0)
    mean = wide.sum(dim=0) / usable.sum().clamp(min=1)  # [D]
    radius = torch.linalg.vector_norm(torch.where(usable, wide - mean, 0.0), dim=1).amax()
    radius = torch.where(radius > 0, radius, 1.0)  # 0 where all codes are one
    scale = torch.exp2(-torch.log2(radius.clamp(min=2.0**-100, max=2.0**100)).floor())
    mean = (mean * scale).to(dtype)  # as the scan will subtract it
    centred = torch.where(usable, wide * scale - mean.double(), 0.0)

    padded = -(-num_codes // _slots(num_codes)) * _slots(num_codes)
    error = 1.01 * (code_dim + 16) * _UNIT[dtype] + 1.01 * (code_dim + 16) * _UNIT[torch.float64]
    half_sq_norms = 0.5 * centred.square().sum(dim=1)
    error_per_norm = codebook.new_zeros(padded, dtype=torch.float64)
    error_per_norm[:num_codes] = error * torch.linalg.vector_norm(centred, dim=1) + _TINY[dtype]
    error_constant = codebook.new_zeros(padded, dtype=torch.float64)
    error_constant[:num_codes] = error * half_sq_norms + _TINY[dtype]
    matrix = codebook.new_zeros(padded, code_dim + 2, dtype=torch.float64)
    matrix[:, code_dim] = _NEVER[dtype]
    matrix[:num_codes, :code_dim] = centred
    matrix[:num_codes, code_dim] = torch.where(usable[:, 0], error_constant[:num_codes] - half_sq_norms, _NEVER[dtype])
    matrix[:, code_dim + 1] = error_per_norm
    return CodebookOperand(
        scale.to(dtype)[None], mean, matrix.to(dtype), error_per_norm.to(dtype), error_constant.to(dtype)
    )


def search(
    x: Tensor, codebook: Tensor, prepared: list[Tensor], precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search all rows of x [N, D] in codebook [K, D].

    Args:
        x: [N, D], a floating dtype.
        codebook: [K, D], on x's device.
        prepared: what `prepare(codebook)` returned, as a list; or empty, and it is made here.
        precision: "exact", or "fast": what the first scan finds, unproved.

    Returns:
        indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float32, statistics [3] int64: rows proved by the
        first scan (or not finite, which need no search), resolved among its candidates, drained by float64 scores.
    """
    with torch.autocast(x.device.type, enabled=False):
        operand = CodebookOperand(*prepared) if prepared else prepare(codebook)
        if precision == "exact" and not float32_products_are_exact_enough(x.device.type):
            operand = prepare(codebook, torch.float64)
        indices, thresholds, proved = _scan(x, operand, certify=precision == "exact")
        unproved = (~proved).nonzero()[:, 0]
        finite = x[unproved].isfinite().all(dim=1)
        indices[unproved[~finite]] = 0
        unproved = unproved[finite]
        drained = 0
        if unproved.numel():
            rows = x[unproved]
            found, many = _resolve(rows, codebook, operand, thresholds[unproved], _MANY_CANDIDATES)
            drained = int(many.sum())
            if drained:
                found[many] = _drain(rows[many], codebook)
            indices[unproved] = found
        codes, sq_distances = gather_codes(x, codebook, indices)
        num_proved = x.shape[0] - unproved.numel()
        statistics = torch.tensor([num_proved, unproved.numel() - drained, drained], device=x.device)
    return indices, codes, sq_distances, statistics


def _drain(x: Tensor, codebook: Tensor) -> Tensor:
    """Indices [N] for the rows that float32 scores leave with many candidates, or that are out of float32's range."""
    operand = prepare(codebook, torch.float64)
    indices, thresholds, proved = _scan(x, operand)
    undecided = (~proved).nonzero()[:, 0]
    if undecided.numel():
        indices[undecided], _ = _resolve(x[undecided], codebook, operand, thresholds[undecided], codebook.shape[0])
    return indices


def _scan(x: Tensor, operand: CodebookOperand, *, certify: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """For each row of x [N, D]: the code with the largest upper bound, the lower bound of its score, whether it is
    proved to be the nearest (without `certify`: whether the row could be scanned): indices [N], thresholds [N],
    proved [N] bool."""
    dtype, num_columns = operand.matrix.dtype, operand.matrix.shape[0]
    block_k = min(num_columns, _BLOCK_K)
    tile_rows = max(1, min(x.shape[0], _TILE_ELEMENTS // block_k))
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    thresholds = torch.empty(x.shape[0], dtype=dtype, device=x.device)
    proved = torch.empty(x.shape[0], dtype=torch.bool, device=x.device)
    left = torch.empty(tile_rows, operand.matrix.shape[1], dtype=dtype, device=x.device)
    scores = torch.empty(tile_rows * block_k, dtype=dtype, device=x.device)
    for start in range(0, x.shape[0], tile_rows):
        tile = slice(start, min(start + tile_rows, x.shape[0]))
        norms = _augment(x[tile], operand, left)
        index, best, second = _largest_two(left[: norms.shape[0]], operand.matrix, block_k, scores)
        error = norms * operand.error_per_norm[index] + operand.error_constant[index]
        in_range = norms <= _ROW_LIMIT[dtype]
        # NaN compares as false: a row out of range is not proved, and no code is ruled out for it.
        threshold = torch.where(in_range, best - 2 * error, torch.nan)
        indices[tile], thresholds[tile] = index, threshold
        proved[tile] = second < threshold if certify else in_range
    return indices, thresholds, proved


def _augment(x: Tensor, operand: CodebookOperand, left: Tensor) -> Tensor:
    """Write [(x - mean)·scale, 1, norm] for x [N, D] to the first N rows of left; the norms [N]."""
    code_dim = x.shape[1]
    left = left[: x.shape[0]]
    shifted, norms = left[:, :code_dim], left[:, code_dim + 1]
    # Scaled first: a difference flushed to zero afterwards is small beside the codebook. Subtracted in the wider of
    # both dtypes, so that it is rounded once.
    torch.sub(x * operand.scale, operand.mean, out=shifted)
    left[:, code_dim] = 1
    torch.linalg.vector_norm(shifted, dim=1, out=norms)
    norms.add_(2.0**-50)  # what squares that underflowed may hide
    return norms


def _slots(num_codes: int) -> int:
    """Slots of a tile: columns k, k + slots, k + 2·slots, ... share one. About the root of the codes, and wide enough
    for a vectorised maximum."""
    return 32 if min(num_codes, _BLOCK_K) <= 2048 else 64


def _largest_two(left: Tensor, matrix: Tensor, block_k: int, scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest of left @ matrix.T in each row, its column, and the largest of the others.

    No index is carried through the pass over the scores: it takes the maximum of each slot, and only the winning
    slot's few columns are looked at again.
    """
    rows, num_columns = left.shape[0], matrix.shape[0]
    slots = _slots(num_columns)
    index = torch.zeros(rows, dtype=torch.int64, device=left.device)
    best = left.new_full((rows,), -torch.inf)
    second = best
    for first_code in range(0, num_columns, block_k):
        block = matrix[first_code : first_code + block_k]
        tile = scores[: rows * block.shape[0]].view(rows, block.shape[0])
        torch.mm(left, block.t(), out=tile)
        tile = tile.view(rows, -1, slots)
        slot_best = tile.amax(dim=1)  # [rows, slots]
        block_best, slot = slot_best.max(dim=1, keepdim=True)
        members = tile.gather(2, slot[:, :, None].expand(-1, tile.shape[1], 1))[:, :, 0]  # [rows, columns of the slot]
        member = members.argmax(dim=1, keepdim=True)
        slot_best.scatter_(1, slot, -torch.inf)
        members.scatter_(1, member, -torch.inf)
        block_second = torch.maximum(slot_best.amax(dim=1), members.amax(dim=1))
        block_index = (member * slots + slot)[:, 0] + first_code
        block_best = block_best[:, 0]
        loser = torch.minimum(best, block_best)
        second = torch.maximum(loser, torch.maximum(second, block_second))
        index = torch.where(block_best > best, block_index, index)
        best = torch.maximum(best, block_best)
    return index, best, second


def _resolve(
    x: Tensor, codebook: Tensor, operand: CodebookOperand, threshold: Tensor, most: int
) -> tuple[Tensor, Tensor]:
    """Indices [N] by float64 sums of squared differences over the codes whose score may reach the threshold [N], and
    which rows [N] bool were passed over for having more than `most` of them."""
    num_codes = codebook.shape[0]
    indices = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    many = torch.zeros(x.shape[0], dtype=torch.bool, device=x.device)
    allowed = codebook.isfinite().all(dim=1)
    rows = min(x.shape[0], max(1, _TILE_ELEMENTS // operand.matrix.shape[0]))
    left = torch.empty(rows, operand.matrix.shape[1], dtype=operand.matrix.dtype, device=x.device)
    searched_duplicates = False
    for start in range(0, x.shape[0], rows):
        tile = slice(start, start + rows)
        block = x[tile]
        _augment(block, operand, left)
        scores = left[: block.shape[0]] @ operand.matrix[:num_codes].t()
        # ~(a < b), not a >= b: a NaN leaves the code a candidate.
        candidates = ~(scores < threshold[tile, None]) & allowed
        counts = candidates.sum(dim=1)
        if most == num_codes and not searched_duplicates and counts.sum() > _MANY_CANDIDATES * block.shape[0]:
            allowed, searched_duplicates = allowed & _first_of_identical(codebook), True
            candidates &= allowed
        elif most < num_codes:
            many[tile] = counts > most
            candidates &= ~many[tile, None]
        indices[tile] = _least_distance(block, codebook, candidates)
    return indices, many


def _first_of_identical(codebook: Tensor) -> Tensor:
    """[K] bool: no earlier code has the same values."""
    _, group = torch.unique(codebook, dim=0, return_inverse=True)
    numbers = torch.arange(codebook.shape[0], device=codebook.device)
    first = torch.full_like(numbers, codebook.shape[0]).scatter_reduce_(0, group, numbers, "amin")
    return first[group] == numbers


def _least_distance(x: Tensor, codebook: Tensor, candidates: Tensor) -> Tensor:
    """Indices [N]: the candidate (of candidates [N, K] bool) at the least distance, the lowest of equals; or 0."""
    row, code = candidates.nonzero(as_tuple=True)
    distance = torch.empty(row.shape[0], dtype=torch.float64, device=x.device)
    pairs = max(1, _DIRECT_ELEMENTS // x.shape[1])
    for start in range(0, row.shape[0], pairs):
        part = slice(start, start + pairs)
        distance[part] = (x[row[part]].double() - codebook[code[part]].double()).square_().sum(dim=1)
    least = distance.new_full((x.shape[0],), torch.inf).scatter_reduce_(0, row, distance, "amin")
    winner = distance == least[row]
    none = codebook.shape[0]
    indices = code.new_full((x.shape[0],), none).scatter_reduce_(0, row[winner], code[winner], "amin")
    return indices.masked_fill_(indices == none, 0)


def gather_codes(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """codes [N, D] in x's dtype, and sq_distances [N] float32 to the code's own values, NaN for rows not finite."""
    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sq_distances = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    rows = max(1, _DIRECT_ELEMENTS // x.shape[1])
    for start in range(0, x.shape[0], rows):
        tile = slice(start, start + rows)
        chosen = codebook.index_select(0, indices[tile])
        codes[tile] = chosen
        difference = x[tile] - chosen if torch.float32 in (x.dtype, chosen.dtype) else x[tile].double() - chosen
        sq_distances[tile] = difference.square_().sum(dim=1)
    tiny = (sq_distances < _TINY_SQ_DISTANCE).nonzero()[:, 0]
    if tiny.numel():
        wide = x[tiny].double() - codebook[indices[tiny]].double()
        sq_distances[tiny] = wide.square_().sum(dim=1).float()
    overflown = (~sq_distances.isfinite()).nonzero()[:, 0]
    if overflown.numel():  # a row with an Inf gives Inf so far, and the contract says NaN
        finite = x[overflown].isfinite().all(dim=1)
        sq_distances[overflown] = torch.where(finite, sq_distances[overflown], torch.nan)
    return codes, sq_distances
