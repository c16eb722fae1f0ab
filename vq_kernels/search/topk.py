"""The k nearest codes, exactly, in plain PyTorch on any device.

The scan of the PyTorch backend gives each code an upper bound U_j >= S_j of its score, whose lower bound is U_j - 2·E_j
(torch_bounds.py). Let t be the least lower bound of the k codes with the largest U: k codes have
S >= t, so a code with U_j < t is none of the k nearest. The others, k and a few as a rule, are ordered by their float64
sums of squared differences. Rows that float32 bounds leave with many candidates are scanned again in float64.

Memory: a tile of scores, its candidates, and the outputs, [N, k].
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vq_kernels.search.api import PreparedCodebook
from vq_kernels.search.backend import has_float64
from vq_kernels.search.top2 import TILE_ELEMENTS
from vq_kernels.search.torch_bounds import CodebookOperand, augment, float32_will_do, prepare
from vq_kernels.search.validation import check_pair

_DIRECT_ELEMENTS = 1 << 16  # numbers that the direct step holds at a time
_CANDIDATES = 1 << 17  # that are ordered at a time
_SPARE_CANDIDATES = 16  # a row, beyond 2·k, from which float64 scores pay


class NearestCodes(NamedTuple):
    """What `nearest_code_topk` returns.

    Attributes:
        indices: [..., k], int64, in [0, K), the nearest first.
        sq_distances: [..., k], float32, the squared Euclidean distances to them.
    """

    indices: Tensor
    sq_distances: Tensor


def nearest_code_topk(x: Tensor, codebook: Tensor | PreparedCodebook, k: int) -> NearestCodes:
    """The k codebook rows closest to each vector, exactly, in the order of their distances.

    Those that a float64 brute-force search over the same values gives first; of equal distances, the lower index
    first. (Where two distances agree to within float64's own rounding, 1e-13 relative, either may come first.) Neither
    autocast nor the switches for float32 matrix products change a result. The [N, K] distances are never stored. There
    is one backend, PyTorch, for all devices: for k = 1, `nearest_code` is the faster one.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device, its dtype may differ from x's; or a `PreparedCodebook`, for which this
            search has no other use than its codes.
        k: in [1, K].

    Returns:
        NearestCodes(indices [..., k] int64 in [0, K), sq_distances [..., k] float32, inf where float32 overflows). Not
        differentiable: `(x[..., None, :] - codebook[indices]).square().sum(-1)` is. A row holding NaN or Inf gets the
        indices 0 to k - 1 and NaN distances. A code holding NaN or Inf comes after all finite ones, at distance inf.

    Raises:
        TypeError: a dtype that is not supported.
        ValueError: D, the device, K or k does not fit.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1; the candidates: derived above.
    """
    if isinstance(codebook, PreparedCodebook):
        codebook = codebook.codebook
    check_pair(x, codebook)
    if not 1 <= k <= codebook.shape[0]:
        raise ValueError(f"k must be in [1, {codebook.shape[0]}] for codebook {tuple(codebook.shape)}, got {k}")
    indices, sq_distances = nearest_code_topk_op(x.detach().reshape(-1, x.shape[-1]), codebook.detach(), k)
    return NearestCodes(indices.view(*x.shape[:-1], k), sq_distances.view(*x.shape[:-1], k))


@torch.library.custom_op("vq_kernels::nearest_code_topk", mutates_args=())
def nearest_code_topk_op(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> indices [N, k], sq_distances [N, k] float32."""
    if not has_float64(x.device):
        indices, sq_distances = nearest_code_topk_op(x.cpu(), codebook.cpu(), k)
        return indices.to(x.device), sq_distances.to(x.device)
    indices = torch.arange(k, device=x.device).repeat(x.shape[0], 1)  # what a row that is not finite gets
    sq_distances = torch.full((x.shape[0], k), torch.nan, dtype=torch.float32, device=x.device)
    found = NearestCodes(indices, sq_distances)
    parts = torch.split(x, max(1, TILE_ELEMENTS // x.shape[1]))  # not at once: it would take as much as x
    rows = torch.cat([part.isfinite().all(dim=1) for part in parts]).nonzero()[:, 0]
    with torch.autocast(x.device.type, enabled=False):
        if float32_will_do(x):
            rows = _decide(found, rows, x, codebook, torch.float32, most=2 * k + _SPARE_CANDIDATES)
        _decide(found, rows, x, codebook, torch.float64, most=codebook.shape[0])
    return indices, sq_distances


@nearest_code_topk_op.register_fake
def _(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k, dtype=torch.float32)


def _decide(found: NearestCodes, rows: Tensor, x: Tensor, codebook: Tensor, dtype: torch.dtype, *, most: int) -> Tensor:
    """Write to `found` what scores in `dtype` decide of the rows [M] of x; those that have more candidates than `most`
    are returned."""
    if not rows.numel():
        return rows
    k, num_codes = found.indices.shape[1], codebook.shape[0]
    operand = prepare(codebook, dtype)
    usable = operand.usable(num_codes)
    tile_rows = min(rows.shape[0], max(1, TILE_ELEMENTS // operand.matrix.shape[0]))
    block_rows = max(1, _CANDIDATES // min(most, num_codes))
    # Held for all tiles: among what a tile leaves behind, the next one's would find no place of its size.
    scores = operand.matrix.new_empty(tile_rows, num_codes)
    candidates = torch.empty(tile_rows, num_codes, dtype=torch.bool, device=x.device)
    left_open = []
    for part in torch.split(rows, tile_rows):
        tile = slice(part.shape[0])
        counts = _find_candidates(x[part], operand, k, scores[tile], candidates[tile])
        few = counts <= most
        candidates[tile] &= few[:, None]
        for start in range(0, part.shape[0], block_rows):
            block = slice(start, min(start + block_rows, part.shape[0]))
            decided = part[block][few[block]]
            found.indices[decided], found.sq_distances[decided] = _order(
                x[part[block]], codebook, usable, candidates[block], counts[block][few[block]], k
            )
        left_open.append(part[~few])
    return torch.cat(left_open)


def _find_candidates(x: Tensor, operand: CodebookOperand, k: int, scores: Tensor, candidates: Tensor) -> Tensor:
    """Write to candidates [N, K] bool the codes that may be among the k nearest to x [N, D], which is finite; how many
    these are, k or more, [N]. The scores [N, K] are a buffer."""
    left, norms = operand.matrix.new_empty(x.shape[0], operand.matrix.shape[1]), operand.matrix.new_empty(x.shape[0])
    torch.mm(augment(x, operand, left, norms), operand.matrix[: scores.shape[1]].t(), out=scores)
    largest, codes = scores.topk(k, dim=1, sorted=False)
    row_norms = norms[:, None]
    threshold = operand.lower_bound(largest, operand.errors(codes, row_norms), row_norms).amin(dim=1, keepdim=True)
    torch.lt(scores, threshold, out=candidates).logical_not_()  # not >=: a NaN leaves the code a candidate
    return scores.copy_(candidates).sum(dim=1).long()  # the sum of booleans would make an int64 copy of them


def _order(
    x: Tensor, codebook: Tensor, usable: Tensor, candidates: Tensor, counts: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """The k nearest to x [N, D] of the candidates [N, K] bool, for the M rows that have any: indices [M, k],
    sq_distances [M, k] float32. These rows have counts [M]."""
    row, code = candidates.nonzero(as_tuple=True)  # ordered by row, then by code
    distance = torch.empty(row.shape[0], dtype=torch.float64, device=x.device)
    pairs = max(1, _DIRECT_ELEMENTS // x.shape[1])
    for start in range(0, row.shape[0], pairs):
        part = slice(start, start + pairs)
        distance[part] = (x[row[part]].double() - codebook[code[part]].double()).square_().sum(dim=1)
    distance.masked_fill_(~usable[code], torch.inf)
    order = distance.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then by distance, then by code
    first = (counts.cumsum(0) - counts)[:, None]
    nearest = order[first + torch.arange(k, device=x.device)]  # [M, k]
    return code[nearest], distance[nearest].float()
