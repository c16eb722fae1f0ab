"""The float64 reference at the speed of a GPU's matrix product: it filters, direct differences decide.

With X = x - m and C_k = c_k - m, for any m, the nearest code maximises S_k = X.C_k - 0.5 ||C_k||**2. Computed in
float64, u = 2**-53, each S_k is off by at most

    (2 u + gamma_{D+1}) ||X|| ||C_k||    both differences rounded once, then a sum of D products and the half norm
    + (2 u + 2 gamma_{D+2}) 0.5 ||C_k||**2    the half norm: differences, D squares, and its place in the sum

(Higham 2002, section 3.1), which is below (D + 16) u (||X|| C + C**2) with C = max ||C_k||. `_SAFETY` times that is
the E used here. A code whose score is not within 2 E of the best is not the nearest; the others get their distance from
the direct difference in float64, as in `vq_kernels.search.reference`, against which `exactness.py` holds this one.
"""

import torch
from torch import Tensor

_SAFETY = 4.0
_UNIT = 2.0**-53
_SCORES = {"cuda": 1 << 27, "cpu": 1 << 20}  # float64 scores held at a time
_PAIR_NUMBERS = 1 << 26  # numbers of candidates' differences held at a time


def float64_nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """The index that a float64 brute force returns for each row; the lowest one of equal distances.

    Args:
        x: [N, D], finite, any floating dtype.
        codebook: [K, D], finite, on x's device.

    Returns:
        indices [N] int64.
    """
    wide = codebook.double()
    mean = wide.mean(dim=0)
    codes = wide - mean  # [K, D]
    half_norms = 0.5 * codes.square().sum(dim=1)  # [K]
    radius = (2 * half_norms.max()).sqrt()
    unit = _SAFETY * (codebook.shape[1] + 16) * _UNIT
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    for part in _parts(x.shape[0], _SCORES[x.device.type] // codebook.shape[0]):
        rows = x[part].double() - mean
        scores = torch.addmm(-half_norms, rows, codes.t())  # [n, K]
        best, index = scores.max(dim=1)
        error = unit * (torch.linalg.vector_norm(rows, dim=1) * radius + radius.square())
        close = scores >= (best - 2 * error)[:, None]
        unsettled = (close.sum(dim=1) > 1).nonzero()[:, 0]
        if unsettled.numel():
            index[unsettled] = _by_differences(x[part][unsettled], codebook, close[unsettled])
        indices[part] = index
    return indices


def _by_differences(x: Tensor, codebook: Tensor, candidates: Tensor) -> Tensor:
    """The least direct distance among the candidates [n, K] bool of each row [n, D], the lowest index on a tie: [n]."""
    row, code = candidates.nonzero(as_tuple=True)  # [P], rows in order, codes of a row in order
    distance = torch.empty(row.shape[0], dtype=torch.float64, device=x.device)
    for part in _parts(row.shape[0], _PAIR_NUMBERS // x.shape[1]):
        distance[part] = (x[row[part]].double() - codebook[code[part]].double()).square_().sum(dim=1)
    least = torch.full((x.shape[0],), torch.inf, dtype=torch.float64, device=x.device)
    least.scatter_reduce_(0, row, distance, "amin")
    winners = distance == least[row]
    first = torch.full((x.shape[0],), codebook.shape[0], dtype=torch.int64, device=x.device)
    return first.scatter_reduce_(0, row[winners], code[winners], "amin")


def _parts(total: int, size: int) -> list[slice]:
    size = max(1, size)
    return [slice(start, min(start + size, total)) for start in range(0, total, size)]
