"""Decides whether an index is wrong: the contract of the search as code, shared by the benchmarks and the tests."""

import torch
from torch import Tensor

from vq_kernels.search.reference import brute_force_nearest

TIE_TOLERANCE = 1e-13
"""Squared distances this close, relatively, differ by less than a float64 sum's rounding: either code may be
returned."""

MINIMUM_CHECKED_ROWS = 4096


def checked_rows(num_vectors: int, num_codes: int, code_dim: int, *, budget: float = 4e9, seed: int = 0) -> Tensor:
    """Selects rows to check against float64: all if N·K·D is within `budget` subtractions, otherwise a random subset.

    Returns [M] int64, sorted, M >= min(N, 4096).
    """
    affordable = max(MINIMUM_CHECKED_ROWS, int(budget // (num_codes * code_dim)))
    if num_vectors <= affordable:
        return torch.arange(num_vectors)
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(num_vectors, generator=generator)[:affordable].sort().values


def first_of_identical(codebook: Tensor) -> Tensor:
    """For each code of codebook [K, D], the lowest index with the same values: [K] int64."""
    _, group = torch.unique(codebook + 0.0, dim=0, return_inverse=True)  # + 0.0 turns -0 into 0
    numbers = torch.arange(codebook.shape[0], device=codebook.device)
    first = torch.full_like(numbers, codebook.shape[0]).scatter_reduce_(0, group, numbers, "amin")
    return first[group]


def wrong_rows(x: Tensor, codebook: Tensor, indices: Tensor, reference: Tensor | None = None) -> Tensor:
    """Marks the indices that break the contract of `nearest_code`.

    An index is right if float64 brute force returns it too, or if its distance ties with that one's to within
    `TIE_TOLERANCE` and no lower index holds an identical code. x [N, D] and codebook [K, D] are finite; indices [N]
    have any integer dtype; `reference` is what `brute_force_nearest(x, codebook)` returns. Returns [N] bool.
    """
    reference = brute_force_nearest(x, codebook) if reference is None else reference
    indices = indices.to(torch.int64)
    wrong = indices != reference
    rows = wrong.nonzero()[:, 0]
    given, best = indices[rows], reference[rows]
    inside = (given >= 0) & (given < codebook.shape[0])
    given = torch.where(inside, given, best)
    given_distance = _sq_distances(x[rows], codebook[given])
    best_distance = _sq_distances(x[rows], codebook[best])
    tied = (given_distance - best_distance).abs() <= TIE_TOLERANCE * best_distance
    lowest = first_of_identical(codebook)[given] == given
    wrong[rows] = ~(inside & tied & lowest)
    return wrong


def _sq_distances(x: Tensor, codes: Tensor) -> Tensor:
    """Squared distances [N] float64 of x [N, D] and codes [N, D]."""
    return (x.double() - codes.double()).square_().sum(dim=1)
