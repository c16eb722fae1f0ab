"""K-means of the pixels. On the training images, no model with one code per image beats an optimal k-means.

A model with K codes can output at most K images, at best the means of the best partition of the training images into K
parts. Finding that partition is NP-hard; this module finds a local optimum.

Source: Lloyd 1982, "Least squares quantization in PCM"; Arthur and Vassilvitskii 2007, "k-means++: the advantages of
careful seeding", with several candidates per draw, as in their section 7; Halko et al. 2011, arXiv:0909.4061, for the
principal components by subspace iteration.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from vq_kernels import PreparedCodebook, nearest_code

NUM_COMPONENTS = 96  # principal components used for initialisation: 30 times faster than 3,072 pixel values
NUM_CANDIDATES = 4  # rows drawn for each new centroid; the best one is kept
_MAX_ROUNDS = 300  # of Lloyd in the components; on CIFAR-10 it converges earlier
_POWER_ROUNDS = 8
_CHUNK = 4096  # rows at a time


class Assignment(NamedTuple):
    """The nearest centroid of each row: indices [N] int64, sq_distances [N] float32."""

    indices: Tensor
    sq_distances: Tensor

    @property
    def sum(self) -> float:
        """The objective of k-means: the sum of the squared distances."""
        return self.sq_distances.sum(dtype=torch.float64).item()


def fit_kmeans(x: Tensor, num_codes: int, *, starts: int = 3, rounds: int = 12, seed: int = 0) -> Tensor:
    """Fits k-means and returns the centroids of x, [K, P].

    Each start runs k-means++ and then Lloyd's algorithm in the principal components, until it converges. The best start
    continues with Lloyd's algorithm on all P values.
    x is [N, P] float32. Raises ValueError for num_codes, starts or rounds out of range.
    """
    if not 1 <= num_codes <= x.shape[0]:
        raise ValueError(f"num_codes must be 1 to {x.shape[0]}, the number of rows, got {num_codes}")
    if starts < 1 or rounds < 0:
        raise ValueError(f"starts must be at least 1 and rounds at least 0, got {starts} and {rounds}")
    generator = torch.Generator(x.device).manual_seed(seed)
    components = _project(x, min(NUM_COMPONENTS, *x.shape), generator)  # [N, 96]
    found = [lloyd(components, draw_starts(components, num_codes, generator), _MAX_ROUNDS)[1] for _ in range(starts)]
    best = min(found, key=lambda assignment: assignment.sum)
    return lloyd(x, _means(x, best, num_codes), rounds)[0]


def assign(x: Tensor, centroids: Tensor) -> Assignment:
    """Finds the nearest of the centroids [K, P] for each row of x [N, P]."""
    prepared = PreparedCodebook.from_codebook(centroids)
    found = [nearest_code(part, prepared) for part in torch.split(x, _CHUNK)]  # only x itself is as large as x
    return Assignment(torch.cat([one.indices for one in found]), torch.cat([one.sq_distances for one in found]))


def lloyd(x: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Assignment]:
    """Runs Lloyd's algorithm from centroids [K, P], until it converges or for `rounds` rounds.

    Returns:
        The centroids [K, P] and the assignment of the rows to them.
    """
    found = assign(x, centroids)
    for _ in range(rounds):
        before = found
        centroids = _means(x, before, centroids.shape[0])
        found = assign(x, centroids)
        if torch.equal(found.indices, before.indices):
            break
    return centroids, found


def draw_starts(x: Tensor, num_codes: int, generator: Generator) -> Tensor:
    """Draws K rows of x [N, P] by k-means++.

    The probability of a row is proportional to its squared distance to the nearest row drawn before. Of several
    candidates, the one that leaves the smallest sum of distances is kept.
    """
    sq_norms = x.square().sum(dim=1)

    def sq_distances(rows: Tensor) -> Tensor:  # [R] -> [R, N]; rounding errors do not matter for odds
        return (sq_norms + sq_norms[rows, None] - 2 * x[rows] @ x.T).clamp(min=0)

    chosen = torch.randint(x.shape[0], (1,), generator=generator, device=x.device)
    nearest = sq_distances(chosen)[0]  # [N]
    for _ in range(num_codes - 1):
        odds = nearest if nearest.any() else torch.ones_like(nearest)  # fewer distinct rows than centroids
        rows = torch.multinomial(odds, NUM_CANDIDATES, replacement=True, generator=generator)
        left = torch.minimum(nearest, sq_distances(rows))  # [4, N]
        best = left.sum(dim=1).argmin()
        nearest = left[best]
        chosen = torch.cat([chosen, rows[best, None]])
    return x[chosen]


def _means(x: Tensor, found: Assignment, num_codes: int) -> Tensor:
    """The mean of each centroid's rows, [K, P]. A centroid without rows moves to a row far from its own centroid."""
    sums = torch.zeros(num_codes, x.shape[1], dtype=torch.float64, device=x.device)
    for indices, part in zip(torch.split(found.indices, _CHUNK), torch.split(x, _CHUNK), strict=True):
        sums.index_add_(0, indices, part.double())
    counts = torch.bincount(found.indices, minlength=num_codes)
    means = (sums / counts.clamp(min=1)[:, None]).to(x.dtype)
    empty = (counts == 0).nonzero().flatten()
    means[empty] = x[found.sq_distances.topk(empty.numel()).indices]
    return means


def _project(x: Tensor, num_components: int, generator: Generator) -> Tensor:
    """Projects the centred x [N, P] onto its first principal components, up to a rotation: [N, C]."""
    mean = x.mean(dim=0)
    basis = torch.randn(x.shape[1], num_components, generator=generator, device=x.device)
    for _ in range(_POWER_ROUNDS):
        basis = torch.linalg.qr(x.T @ (x @ basis - mean @ basis)).Q  # as for centred x
    return x @ basis - mean @ basis
