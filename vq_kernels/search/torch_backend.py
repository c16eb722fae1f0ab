"""The exact search in plain PyTorch, for any device.

Three steps, each taking only the rows that the one before could not prove:

1. scan in float32: a matrix product gives, for every code, an *upper bound* U_k of its score S_k (torch_operand.py).
   With b the code of the largest U, the row's answer is b, proved, when every other U_k lies under U_b - 2·E_b <= S_b;
2. resolve: where a few codes reach that threshold, the float64 sums of (x_j - c_kj)² over them decide; the least wins,
   the lowest index on a tie;
3. drain: where many do, steps 1 and 2 again with float64 scores.

Where all scores fit into a tile, they are kept from step 1 to step 2, not computed anew.

Memory: a fixed buffer, and O(N + K·D); the [N, K] scores live a tile at a time.

Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1, for the search; Higham, "Accuracy and Stability of Numerical
Algorithms", 2nd ed., section 3.1, for the error of a sum in any order.
"""

from contextlib import nullcontext

import torch
from torch import Tensor

from vq_kernels.search.top2 import TILE_ELEMENTS, LargestTwo
from vq_kernels.search.torch_bounds import CodebookOperand, augment, float32_will_do, prepare

__all__ = ["prepare", "search"]

_DIRECT_ELEMENTS = 1 << 16  # numbers that the direct step holds at a time
_GATHER_ELEMENTS = 1 << 20  # numbers gathered at a time
_MANY_CANDIDATES = 16  # a row, from which float64 scores (or, after them, a look for identical codes) pay
_TINY_SQ_DISTANCE = 2.0**-80  # below it a float32 sum of squares may have lost terms to underflow


def search(
    x: Tensor, codebook: Tensor, prepared: list[Tensor], precision: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Search all rows of x [N, D] in codebook [K, D].

    Args:
        x: [N, D], a floating dtype.
        codebook: [K, D], on x's device.
        prepared: what `prepare(codebook)` returned, as a list; or empty, and it is made here.
        precision: "exact", or "fast": what the first scan finds, unproved but for ties.

    Returns:
        indices [N] int64, codes [N, D] in x's dtype, sq_distances [N] float32, statistics [3] int64: rows proved by the
        first scan (or not finite, which need no search), resolved among its candidates, drained by float64 scores.
    """
    autocast = torch.is_autocast_enabled(x.device.type)
    with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
        operand = CodebookOperand(*prepared) if prepared else prepare(codebook)
        if not float32_will_do(x):
            operand = prepare(codebook, torch.float64)
        scan = _scan_tile if x.shape[0] * max(operand.matrix.shape) <= TILE_ELEMENTS else _scan_tiles
        indices, rest, counts = scan(x, codebook, operand, certify=precision == "exact")
        many = counts > _MANY_CANDIDATES
        drained = int(many.sum())
        if drained:
            _drain(x, codebook, rest[many], indices)
        codes, sq_distances = gather_codes(x, codebook, indices)
        resolved = int(counts.count_nonzero()) - drained
        statistics = torch.tensor([x.shape[0] - resolved - drained, resolved, drained], device=x.device)
    return indices, codes, sq_distances, statistics


def _scan_tile(
    x: Tensor, codebook: Tensor, operand: CodebookOperand, *, certify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """As `_scan_tiles`, for so few rows that their scores are kept until the candidates are taken from them."""
    norms = operand.matrix.new_empty(x.shape[0])
    left = augment(x, operand, operand.matrix.new_empty(x.shape[0], operand.matrix.shape[1]), norms)
    scores = left @ operand.matrix[: codebook.shape[0]].t()  # [N, K]
    best, indices = scores.max(dim=1)
    scores.scatter_(1, indices[:, None], -torch.inf)
    thresholds = operand.lower_bound(best, operand.errors(indices, norms), norms)
    rest = _not_proved(best, scores.amax(dim=1), thresholds, certify).nonzero()[:, 0]
    x, scores, thresholds, best, found = (each.index_select(0, rest) for each in (x, scores, thresholds, best, indices))
    scores.scatter_(1, found[:, None], best[:, None])
    indices[rest], counts = _among_candidates(x, codebook, operand, scores, thresholds)
    return indices, rest, counts


def _scan_tiles(
    x: Tensor, codebook: Tensor, operand: CodebookOperand, *, certify: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Steps 1 and 2 for x [N, D]: indices [N]; the rows that were not proved [M], and for each of them how many codes
    may be the nearest [M]. Rows with more than _MANY_CANDIDATES are left open; those that are not finite have 0."""
    indices, thresholds, rest = _scan(x, operand, certify=certify)
    indices[rest], counts = _resolve(x, rest, codebook, operand, thresholds[rest])
    return indices, rest, counts


def _drain(x: Tensor, codebook: Tensor, rows: Tensor, indices: Tensor) -> None:
    """Write to indices [N] those of the rows [M] that float32 scores leave with many candidates, or out of range."""
    operand, first = prepare(codebook, torch.float64), None
    for part in torch.split(rows, max(1, _GATHER_ELEMENTS // x.shape[1])):
        chunk = x.index_select(0, part)
        found, thresholds, rest = _scan(chunk, operand)
        found[rest], counts = _resolve(chunk, rest, codebook, operand, thresholds[rest])
        rest = rest[counts > _MANY_CANDIDATES]
        if rest.numel():
            first = _first_of_identical(codebook) if first is None else first
            found[rest], _ = _resolve(chunk, rest, codebook, operand, thresholds[rest], first)
        indices[part] = found


def _scan(x: Tensor, operand: CodebookOperand, *, certify: bool = True) -> tuple[Tensor, Tensor, Tensor]:
    """For x [N, D]: the codes with the largest upper bounds [N], the lower bounds of their scores [N] (NaN for a row
    out of range), and the rows [M] where it is not proved that the code is the nearest (without `certify`: where
    another has the same upper bound)."""
    dtype, num_rows, width = operand.matrix.dtype, x.shape[0], operand.matrix.shape[1]
    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    thresholds = torch.empty(num_rows, dtype=dtype, device=x.device)
    not_proved = torch.empty(num_rows, dtype=torch.bool, device=x.device)
    largest_two = LargestTwo(operand.matrix, num_rows)
    left = torch.empty(min(largest_two.part_rows, num_rows), width, dtype=dtype, device=x.device)
    norms = torch.empty(min(largest_two.chunk_rows, num_rows), dtype=dtype, device=x.device)
    for start in range(0, num_rows, largest_two.chunk_rows):
        chunk = slice(start, min(start + largest_two.chunk_rows, num_rows))
        for first in range(chunk.start, chunk.stop, largest_two.part_rows):
            part = x[first : min(first + largest_two.part_rows, chunk.stop)]
            largest_two.reduce(augment(part, operand, left, norms[first - start :]), first - start)
        index, best, second = largest_two.result(chunk.stop - start)
        index.clamp_(max=operand.error_constant.shape[0] - 1)  # a row out of range may find the padding
        row_norms = norms[: best.shape[0]]
        # Of equal upper bounds the code found may have none: the errors are those of no particular code then.
        errors = torch.where(second < best, operand.errors(index, row_norms), operand.largest_errors(row_norms))
        threshold = operand.lower_bound(best, errors, row_norms)
        indices[chunk], thresholds[chunk] = index, threshold
        not_proved[chunk] = _not_proved(best, second, threshold, certify)
    return indices, thresholds, not_proved.nonzero()[:, 0]


def _resolve(
    x: Tensor,
    rows: Tensor,
    codebook: Tensor,
    operand: CodebookOperand,
    thresholds: Tensor,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """As `_among_candidates`, for the rows [M] of x [N, D], by tiles of scores computed anew."""
    indices, counts = torch.empty_like(rows), torch.empty_like(rows)
    tile_rows = max(1, min(rows.shape[0], TILE_ELEMENTS // operand.matrix.shape[0], _GATHER_ELEMENTS // x.shape[1]))
    left, norms = operand.matrix.new_empty(tile_rows, operand.matrix.shape[1]), operand.matrix.new_empty(tile_rows)
    for start in range(0, rows.shape[0], tile_rows):
        tile = slice(start, start + tile_rows)
        part = x.index_select(0, rows[tile])
        scores = augment(part, operand, left, norms) @ operand.matrix[: codebook.shape[0]].t()
        indices[tile], counts[tile] = _among_candidates(part, codebook, operand, scores, thresholds[tile], allowed)
    return indices, counts


def _among_candidates(
    x: Tensor,
    codebook: Tensor,
    operand: CodebookOperand,
    scores: Tensor,
    thresholds: Tensor,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Indices [N] by float64 sums of squared differences over the candidates, the codes whose score [N, K], overwritten
    here, may reach the threshold [N]; and how many these are [N]. Rows with more than _MANY_CANDIDATES, and rows that
    are not finite, which have none, get index 0. With `allowed` [K] bool, of these codes alone, however many."""
    candidates = ~(scores < thresholds[:, None])  # not scores >= thresholds: a NaN leaves the code a candidate
    # A row that is not finite has a NaN threshold; a code that is not finite scores less than the lowest threshold.
    if not bool((thresholds > operand.lowest_threshold).all()):
        candidates &= operand.usable(codebook.shape[0]) & x.isfinite().all(dim=1, keepdim=True)
    if allowed is not None:
        candidates &= allowed
    counts = scores.copy_(candidates).sum(dim=1).long()  # the sum of booleans would make an int64 copy of them
    if allowed is None:
        candidates &= (counts <= _MANY_CANDIDATES)[:, None]
    return _least_distance(x, codebook, candidates), counts


def _not_proved(best: Tensor, second: Tensor, threshold: Tensor, certify: bool) -> Tensor:
    """[N] bool: the runner-up may be as near; without `certify`, it has the same upper bound, or there is no bound."""
    limit = threshold if certify else torch.where(threshold.isnan(), torch.nan, best)
    return ~(second < limit)


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
        left, right = x.index_select(0, row[part]), codebook.index_select(0, code[part])
        distance[part] = (left.double() - right.double()).square_().sum(dim=1)
    least = distance.new_full((x.shape[0],), torch.inf).scatter_reduce_(0, row, distance, "amin")
    none = codebook.shape[0]
    code.masked_fill_(distance > least.index_select(0, row), none)
    indices = code.new_full((x.shape[0],), none).scatter_reduce_(0, row, code, "amin")
    return indices.remainder_(none)


def gather_codes(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """codes [N, D] in x's dtype, and sq_distances [N] float32 to the code's own values, NaN for rows not finite."""
    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sq_distances = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    one_dtype = x.dtype == codebook.dtype
    wider = torch.promote_types(torch.promote_types(x.dtype, codebook.dtype), torch.float32)
    rows = max(1, min(x.shape[0], _GATHER_ELEMENTS // x.shape[1]))
    difference = torch.empty(rows, x.shape[1], dtype=wider, device=x.device)
    for start in range(0, x.shape[0], rows):
        tile = slice(start, start + rows)
        if one_dtype:
            chosen = torch.index_select(codebook, 0, indices[tile], out=codes[tile])
        else:
            codes[tile] = chosen = codebook.index_select(0, indices[tile])
        part = torch.sub(x[tile].to(wider), chosen, out=difference[: chosen.shape[0]])
        sq_distances[tile] = part.square_().sum(dim=1)
    least, largest = sq_distances.aminmax() if x.shape[0] else (1.0, 1.0)  # NaN both, if one is
    if not (least >= _TINY_SQ_DISTANCE and largest < torch.inf):  # an Inf in a row gives Inf so far, where NaN is due
        rare = (~((sq_distances >= _TINY_SQ_DISTANCE) & sq_distances.isfinite())).nonzero()[:, 0]
        for some in torch.split(rare, max(1, _DIRECT_ELEMENTS // x.shape[1])):
            part = x.index_select(0, some)
            wide = (part.double() - codebook.index_select(0, indices[some]).double()).square_().sum(dim=1).float()
            sq_distances[some] = torch.where(part.isfinite().all(dim=1), wide, torch.nan)
    return codes, sq_distances
