"""The exact search for the k nearest codes, in PyTorch on any device.

The scan of the PyTorch backend gives each code an upper bound U_j >= S_j of its score, and a lower bound U_j - 2·E_j
(torch_bounds.py). Let t be the least lower bound of the k codes with the largest U. These k codes have S >= t, so a
code with U_j < t is not among the k nearest. The other codes, typically k and a few, are ordered by float64 sums of
squared differences. Rows that have many candidates in float32 are scanned again in float64.

Memory: a tile of scores with its candidates, and the outputs [N, k].
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import _register_namedtuple

from vq_kernels.search.api import PreparedCodebook, unpacked
from vq_kernels.search.backend import has_float64
from vq_kernels.search.operators import WAITS
from vq_kernels.search.top2 import TILE_ELEMENTS
from vq_kernels.search.torch_backend import pair_distances
from vq_kernels.search.torch_bounds import CodebookOperand, augment, float32_is_sufficient, prepare
from vq_kernels.search.validation import check_pair
from vq_kernels.search.vmap import register_vmap

_CANDIDATES = 1 << 17  # candidates ordered at a time
_SPARE_CANDIDATES = 16  # per row; with more than 2·k plus these, float64 scores are faster


class NearestCodes(NamedTuple):
    """What `nearest_code_topk` returns.

    Attributes:
        indices: [..., k], int64, in [0, K), nearest first.
        sq_distances: [..., k], float32, the squared Euclidean distances to these codes.
    """

    indices: Tensor
    sq_distances: Tensor


_register_namedtuple(NearestCodes, serialized_type_name="vq_kernels.NearestCodes")  # for torch.export.save


def nearest_code_topk(x: Tensor, codebook: Tensor | PreparedCodebook, k: int) -> NearestCodes:
    """Find the k codebook rows closest to each vector, exactly, in the order of their distances.

    The result equals that of a float64 brute-force search over the same values; of equal distances, the lower index
    comes first. (If two distances agree to within float64's own rounding, 1e-13 relative, either may come first.)
    Neither autocast nor the precision setting of float32 matrix products changes the result. The [N, K] distances are
    never stored. There is one backend, PyTorch, for all devices; for k = 1, `nearest_code` is faster.

    Args:
        x: [..., D], float32, float16, bfloat16 or float64, any strides.
        codebook: [K, D], K >= 1, on x's device; its dtype may differ from x's. Or a `PreparedCodebook`, of which only
            the codes are used.
        k: in [1, K].

    Returns:
        NearestCodes(indices [..., k] int64 in [0, K), sq_distances [..., k] float32, inf if float32 overflows). Not
        differentiable; `(x[..., None, :] - codebook[indices]).square().sum(-1)` is. A row with NaN or Inf gets the
        indices 0 to k - 1 and NaN distances. Codes with NaN or Inf follow all finite ones, at distance inf.

    Raises:
        TypeError: a dtype is not supported.
        ValueError: D, the device, K or k does not match.

    Source: van den Oord et al. 2017, arXiv:1711.00937, eq. 1. The selection of candidates is derived in this file.
    """
    codebook, _, _ = unpacked(codebook, "auto")
    check_pair(x, codebook)
    if not 1 <= k <= codebook.shape[0]:
        raise ValueError(f"k must be in [1, {codebook.shape[0]}] for codebook {tuple(codebook.shape)}, got {k}")
    indices, sq_distances = nearest_code_topk_op(x.detach().reshape(-1, x.shape[-1]), codebook.detach(), k)
    return NearestCodes(indices.view(*x.shape[:-1], k), sq_distances.view(*x.shape[:-1], k))


@torch.library.custom_op("vq_kernels::nearest_code_topk", mutates_args=(), tags=WAITS)
def nearest_code_topk_op(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """x [N, D], codebook [K, D] -> indices [N, k], sq_distances [N, k] float32."""
    if not has_float64(x.device):
        indices, sq_distances = nearest_code_topk_op(x.cpu(), codebook.cpu(), k)
        return indices.to(x.device), sq_distances.to(x.device)
    indices = torch.arange(k, device=x.device).repeat(x.shape[0], 1)  # the result of rows that are not finite
    sq_distances = torch.full((x.shape[0], k), torch.nan, dtype=torch.float32, device=x.device)
    found = NearestCodes(indices, sq_distances)
    parts = torch.split(x, max(1, TILE_ELEMENTS // x.shape[1]))  # at once, it would take as much memory as x
    rows = torch.cat([part.isfinite().all(dim=1) for part in parts]).nonzero()[:, 0]
    with torch.autocast(x.device.type, enabled=False):
        if float32_is_sufficient(x):
            rows = _decide(found, rows, x, codebook, torch.float32, most=2 * k + _SPARE_CANDIDATES)
        _decide(found, rows, x, codebook, torch.float64, most=codebook.shape[0])
    return indices, sq_distances


@nearest_code_topk_op.register_fake
def _(x: Tensor, codebook: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape[0], k, dtype=torch.int64), x.new_empty(x.shape[0], k, dtype=torch.float32)


register_vmap(nearest_code_topk_op, num_row_outputs=2)


def _decide(found: NearestCodes, rows: Tensor, x: Tensor, codebook: Tensor, dtype: torch.dtype, *, most: int) -> Tensor:
    """Write the results of the rows [M] of x to `found`, by scores in `dtype`.

    Rows with more candidates than `most` are not written but returned.
    """
    if not rows.numel():
        return rows
    k, num_codes = found.indices.shape[1], codebook.shape[0]
    operand = prepare(codebook, dtype)
    usable = operand.usable(num_codes)
    tile_rows = min(rows.shape[0], max(1, TILE_ELEMENTS // operand.matrix.shape[0]))
    block_rows = max(1, _CANDIDATES // min(most, num_codes))
    # Allocated once: freed and allocated per tile, they would fragment the memory.
    scores = operand.matrix.new_empty(tile_rows, num_codes)
    candidates = torch.empty(tile_rows, num_codes, dtype=torch.bool, device=x.device)
    undecided = []
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
        undecided.append(part[~few])
    return torch.cat(undecided)


def _find_candidates(x: Tensor, operand: CodebookOperand, k: int, scores: Tensor, candidates: Tensor) -> Tensor:
    """Write to candidates [N, K] bool the codes that may be among the k nearest to finite x [N, D].

    Returns how many these are [N], at least k. The scores [N, K] are a buffer.
    """
    left, norms = operand.matrix.new_empty(x.shape[0], operand.matrix.shape[1]), operand.matrix.new_empty(x.shape[0])
    torch.mm(augment(x, operand, left, norms), operand.matrix[: scores.shape[1]].t(), out=scores)
    largest, codes = scores.topk(k, dim=1, sorted=False)
    row_norms = norms[:, None]
    threshold = operand.lower_bound(largest, operand.errors(codes, row_norms), row_norms).amin(dim=1, keepdim=True)
    torch.lt(scores, threshold, out=candidates).logical_not_()  # not >=: a code with a NaN stays a candidate
    return scores.copy_(candidates).sum(dim=1).long()  # summing the booleans would copy them as int64


def _order(
    x: Tensor, codebook: Tensor, usable: Tensor, candidates: Tensor, counts: Tensor, k: int
) -> tuple[Tensor, Tensor]:
    """Find the k nearest of the candidates [N, K] bool of x [N, D].

    Returns indices [M, k] and sq_distances [M, k] float32 for the M rows that have candidates. These have counts [M].
    """
    row, code = candidates.nonzero(as_tuple=True)  # ordered by row, then by code
    distance = pair_distances(x, codebook, row, code).masked_fill_(~usable[code], torch.inf)
    order = distance.argsort(stable=True)
    order = order[row[order].argsort(stable=True)]  # by row, then by distance, then by code
    first = (counts.cumsum(0) - counts)[:, None]
    nearest = order[first + torch.arange(k, device=x.device)]  # [M, k]
    return code[nearest], distance[nearest].float()
