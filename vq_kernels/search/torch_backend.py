"""The exact search in PyTorch, for any device.

Each step processes only the rows that the previous one left undecided:

1. Scan in float32. A matrix product gives each code an upper bound U_k of its score S_k (torch_bounds.py). Let b be the
   code with the largest U. If every other U_k < U_b - 2·E_b <= S_b, then b is the nearest code: the row is certified.
2. Rerank. If a few codes reach that threshold, they are compared by float64 sums of (x_j - c_kj)². The least wins, with
   the lowest index on a tie.
3. Exhaustive. If many codes reach it, steps 1 and 2 are repeated with float64 scores.

Memory: a fixed buffer and O(N + K·D). Only a tile of the [N, K] scores exists at a time.

Sources: van den Oord et al. 2017, arXiv:1711.00937, eq. 1, for the search; Higham, "Accuracy and Stability of Numerical
Algorithms", 2nd ed., section 3.1, for the error of a sum in any order.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from vq_kernels.search.backend import Found
from vq_kernels.search.top2 import TILE_ELEMENTS, Top2
from vq_kernels.search.torch_bounds import (
    CodebookOperand,
    augment,
    float32_is_sufficient,
    prepare,
    prepare_products,
    squared_distances,
)

__all__ = ["most_similar", "prepare", "search"]

_DIRECT_ELEMENTS = 1 << 16  # elements per step of direct differences
_GATHER_ELEMENTS = 1 << 20  # elements gathered at a time
_DIFFERENCE_ELEMENTS = 1 << 18  # differences computed at a time, which fit into a core's caches
_TINY_SQ_DISTANCE = 2.0**-80  # below it a float32 sum of squares may have lost terms to underflow
_MANY_CANDIDATES = 16  # per row; with more, float64 scores (or after them, removing duplicate codes) are faster


def search(x: Tensor, codebook: Tensor, prepared: list[Tensor]) -> Found:
    """Find the nearest code of each row.

    Args:
        x: [N, D], a floating dtype.
        codebook: [K, D], on x's device.
        prepared: what `prepare(codebook)` returned, as a list; or empty to prepare here.

    Returns:
        As described at `Found`. Rows that are not finite count as certified.
    """
    with _no_autocast(x.device):
        operand = CodebookOperand(*prepared) if prepared else prepare(codebook)
        indices, statistics = _find(x, codebook, operand)
        codes, sq_distances = gather_codes(x, codebook, indices)
    return indices, codes, sq_distances, statistics


def most_similar(x: Tensor, codebook: Tensor) -> Tensor:
    """Find the code of codebook [K, D] with the largest dot product with each row of x [N, D]. Returns indices [N].

    In the steps above, S_k is x·c_k, and float64 sums of x_j·c_kj decide.
    """
    with _no_autocast(x.device):
        return _find(x, codebook, prepare_products(codebook))[0]


def _no_autocast(device: torch.device) -> AbstractContextManager[object]:
    autocast = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if autocast else nullcontext()


def _find(x: Tensor, codebook: Tensor, operand: CodebookOperand) -> tuple[Tensor, Tensor]:
    """The indices [N] of x [N, D], and the statistics [3] of the search."""
    if not float32_is_sufficient(x):
        operand = operand.in_float64(codebook)
    indices, thresholds, uncertified = _scan(x, operand)
    indices[uncertified], counts = _rerank(x, uncertified, codebook, operand, thresholds[uncertified])
    many = counts > _MANY_CANDIDATES
    exhaustive = int(many.sum())
    if exhaustive:
        _search_exhaustively(x, codebook, operand, uncertified[many], indices)
    reranked = int(counts.count_nonzero()) - exhaustive
    return indices, torch.tensor([x.shape[0] - reranked - exhaustive, reranked, exhaustive], device=x.device)


def _search_exhaustively(x: Tensor, codebook: Tensor, operand: CodebookOperand, rows: Tensor, indices: Tensor) -> None:
    """Write to indices [N] those of the rows [M] for which float32 leaves many candidates or has no bound."""
    operand, first = operand.in_float64(codebook), None
    for part in torch.split(rows, max(1, _GATHER_ELEMENTS // x.shape[1])):
        chunk = x.index_select(0, part)
        found, thresholds, undecided = _scan(chunk, operand)
        found[undecided], counts = _rerank(chunk, undecided, codebook, operand, thresholds[undecided])
        undecided = undecided[counts > _MANY_CANDIDATES]
        if undecided.numel():
            first = _first_of_identical(codebook) if first is None else first
            found[undecided], _ = _rerank(chunk, undecided, codebook, operand, thresholds[undecided], first)
        indices[part] = found


def _scan(x: Tensor, operand: CodebookOperand) -> tuple[Tensor, Tensor, Tensor]:
    """Scan x [N, D]: the codes with the largest upper bounds [N], the lower bounds of their scores [N] (NaN for a row
    out of range), and the uncertified rows [M]."""
    dtype, num_rows, width = operand.matrix.dtype, x.shape[0], operand.matrix.shape[1]
    indices = torch.empty(num_rows, dtype=torch.int64, device=x.device)
    thresholds = torch.empty(num_rows, dtype=dtype, device=x.device)
    uncertified = torch.empty(num_rows, dtype=torch.bool, device=x.device)
    top2 = Top2(operand.matrix, num_rows)
    left = torch.empty(min(top2.part_rows, num_rows), width, dtype=dtype, device=x.device)
    norms = torch.empty(min(top2.chunk_rows, num_rows), dtype=dtype, device=x.device)
    for start in range(0, num_rows, top2.chunk_rows):
        chunk = slice(start, min(start + top2.chunk_rows, num_rows))
        for first in range(chunk.start, chunk.stop, top2.part_rows):
            part = x[first : min(first + top2.part_rows, chunk.stop)]
            top2.reduce(augment(part, operand, left, norms[first - start :]), first - start)
        index, best, second = top2.result(chunk.stop - start)
        index.clamp_(max=operand.error_constant.shape[0] - 1)  # a row out of range may find the padding
        row_norms = norms[: best.shape[0]]
        # On a tie the index may be none of the tied codes, so the error has to hold for every code.
        errors = torch.where(second < best, operand.errors(index, row_norms), operand.largest_errors(row_norms))
        threshold = operand.lower_bound(best, errors, row_norms)
        indices[chunk], thresholds[chunk] = index, threshold
        uncertified[chunk] = ~(second < threshold)
    return indices, thresholds, uncertified.nonzero()[:, 0]


def _rerank(
    x: Tensor,
    rows: Tensor,
    codebook: Tensor,
    operand: CodebookOperand,
    thresholds: Tensor,
    allowed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Compare the candidates of the rows [M] of x [N, D] in float64, by direct differences or by products.

    The scores are computed again, a tile at a time. The candidates are the codes whose score may reach the threshold.

    Args:
        thresholds: [M].
        allowed: [K] bool, the only codes to consider. All of their candidates are then compared, however many.

    Returns:
        indices [M] and the number of candidates [M]. Rows with more than _MANY_CANDIDATES, and rows that are not
        finite, which have no candidates, get index 0.
    """
    indices, counts = torch.empty_like(rows), torch.empty_like(rows)
    tile_rows = max(1, min(rows.shape[0], TILE_ELEMENTS // operand.matrix.shape[0], _GATHER_ELEMENTS // x.shape[1]))
    left, norms = operand.matrix.new_empty(tile_rows, operand.matrix.shape[1]), operand.matrix.new_empty(tile_rows)
    for start in range(0, rows.shape[0], tile_rows):
        tile = slice(start, start + tile_rows)
        part = x.index_select(0, rows[tile])
        scores = augment(part, operand, left, norms) @ operand.matrix[: codebook.shape[0]].t()
        indices[tile], counts[tile] = _rerank_tile(part, codebook, operand, scores, thresholds[tile], allowed)
    return indices, counts


def _rerank_tile(
    x: Tensor,
    codebook: Tensor,
    operand: CodebookOperand,
    scores: Tensor,
    thresholds: Tensor,
    allowed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`_rerank` for x [N, D] with these scores [N, K], which are overwritten."""
    candidates = ~(scores < thresholds[:, None])  # not scores >= thresholds: a code with a NaN stays a candidate
    # A row that is not finite has a NaN threshold. A code that is not finite scores below the lowest threshold.
    if not bool((thresholds > operand.lowest_threshold).all()):
        candidates &= operand.usable(codebook.shape[0]) & x.isfinite().all(dim=1, keepdim=True)
    if allowed is not None:
        candidates &= allowed
    counts = scores.copy_(candidates).sum(dim=1).long()  # summing the booleans would copy them as int64
    if allowed is None:
        candidates &= (counts <= _MANY_CANDIDATES)[:, None]
    row, code = candidates.nonzero(as_tuple=True)
    cost = _pair_costs(x, codebook, row, code, operand.costs)
    least = cost.new_full((x.shape[0],), torch.inf).scatter_reduce_(0, row, cost, "amin")
    none = codebook.shape[0]
    code.masked_fill_(cost > least.index_select(0, row), none)
    indices = code.new_full((x.shape[0],), none).scatter_reduce_(0, row, code, "amin")
    return indices.remainder_(none), counts


def pair_distances(x: Tensor, codebook: Tensor, row: Tensor, code: Tensor) -> Tensor:
    """Squared distances [P] float64 from rows [P] of x to codes [P], by direct differences."""
    return _pair_costs(x, codebook, row, code, squared_distances)


def _pair_costs(
    x: Tensor, codebook: Tensor, row: Tensor, code: Tensor, costs: Callable[[Tensor, Tensor], Tensor]
) -> Tensor:
    """The `costs` [P] float64 of rows [P] of x and codes [P]."""
    result = torch.empty(row.shape[0], dtype=torch.float64, device=x.device)
    pairs = max(1, _DIRECT_ELEMENTS // x.shape[1])
    for start in range(0, row.shape[0], pairs):
        part = slice(start, start + pairs)
        left, right = x.index_select(0, row[part]), codebook.index_select(0, code[part])
        result[part] = costs(left.double(), right.double())
    return result


def _first_of_identical(codebook: Tensor) -> Tensor:
    """[K] bool: no earlier code has the same values."""
    _, group = torch.unique(codebook, dim=0, return_inverse=True)
    numbers = torch.arange(codebook.shape[0], device=codebook.device)
    first = torch.full_like(numbers, codebook.shape[0]).scatter_reduce_(0, group, numbers, "amin")
    return first[group] == numbers


def gather_codes(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """Gather codes [N, D] in x's dtype, and compute sq_distances [N] float64 to the codes in the codebook's dtype.

    Rows that are not finite get a NaN distance.
    """
    rows = max(1, _DIFFERENCE_ELEMENTS // x.shape[1])
    if x.shape[0] <= rows:
        return _gather_tile(x, codebook, indices)
    codes = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    sq_distances = torch.empty(x.shape[0], dtype=torch.float64, device=x.device)
    for start in range(0, x.shape[0], rows):
        tile = slice(start, start + rows)
        codes[tile], sq_distances[tile] = _gather_tile(x[tile], codebook, indices[tile])
    return codes, sq_distances


def _gather_tile(x: Tensor, codebook: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    codes = codebook.index_select(0, indices)
    wide = x if x.dtype == codes.dtype else x.to(torch.promote_types(x.dtype, codes.dtype))
    differences = wide.sub(codes) if wide.dtype.itemsize > 2 else wide.float().sub_(codes)
    sq_distances = differences.square_().sum(dim=1).double()
    least, largest = sq_distances.aminmax() if x.shape[0] else (1.0, 1.0)  # both are NaN if one is
    if not (least >= _TINY_SQ_DISTANCE and largest < torch.inf):  # a row with Inf has distance Inf here, but needs NaN
        rare = (~((sq_distances >= _TINY_SQ_DISTANCE) & sq_distances.isfinite())).nonzero()[:, 0]
        exact = pair_distances(x, codebook, rare, indices[rare])
        sq_distances[rare] = exact.masked_fill_(~x.index_select(0, rare).isfinite().all(dim=1), torch.nan)
    return codes.to(x.dtype), sq_distances
