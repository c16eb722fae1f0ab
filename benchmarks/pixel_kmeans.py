"""K-means of the pixels: on its own training pictures, no model of one code a picture can beat the best of it.

A model of K codes draws at most K pictures; the best K pictures to draw are the means of the best partition into K
parts. Finding that partition is NP-hard: what stands here is a local optimum, and seeds show how far they differ.

Source: Lloyd 1982, "Least squares quantization in PCM"; Arthur and Vassilvitskii 2007, "k-means++: the advantages of
careful seeding", with several candidates a draw, as in their section 7; Halko et al. 2011, arXiv:0909.4061, for the
principal components by subspace iteration.
"""

from typing import NamedTuple

import torch
from torch import Generator, Tensor

from vq_kernels import PreparedCodebook, nearest_code

NUM_COMPONENTS = 96  # principal components in which starts are made: 30 times faster than in 3,072 pixel values
NUM_CANDIDATES = 4  # rows drawn for each new centroid, of which the best is taken
_MAX_ROUNDS = 300  # of Lloyd in the components; CIFAR-10 stands still earlier
_POWER_ROUNDS = 8
_CHUNK = 4096  # rows at once


class Assignment(NamedTuple):
    """The nearest centroid of each row.

    Attributes:
        indices: [N] int64.
        sq_distances: [N] float32.
    """

    indices: Tensor
    sq_distances: Tensor

    @property
    def sum(self) -> float:
        """What K-means makes small: the sum of the squared distances."""
        return self.sq_distances.sum(dtype=torch.float64).item()


def fit_kmeans(x: Tensor, num_codes: int, *, starts: int = 3, rounds: int = 12, seed: int = 0) -> Tensor:
    """The centroids of x, [K, P].

    Every start is k-means++ in the principal components, and Lloyd there until it stands still. The best of them goes
    on with Lloyd on all P values.

    Args:
        x: [N, P] float32.
        num_codes: K, 1 to N.
        starts: at least 1.
        rounds: of Lloyd on all values, at most.
        seed: of the draws.

    Raises:
        ValueError: num_codes, starts or rounds out of range.
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
    """The nearest of the centroids [K, P] to each row of x [N, P]."""
    prepared = PreparedCodebook.from_codebook(centroids)
    indices = torch.empty(x.shape[0], dtype=torch.int64, device=x.device)
    sq_distances = torch.empty(x.shape[0], device=x.device)
    for part in _chunks(x):
        found = nearest_code(x[part], prepared)
        indices[part], sq_distances[part] = found.indices, found.sq_distances
    return Assignment(indices, sq_distances)


def lloyd(x: Tensor, centroids: Tensor, rounds: int) -> tuple[Tensor, Assignment]:
    """Rounds of Lloyd's algorithm from centroids [K, P], fewer where it stands still.

    Returns:
        The centroids [K, P] and the rows' assignment to them.
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
    """k-means++: rows of x [N, P], drawn one after the other with odds that are their squared distance to those drawn
    before; of several candidates the one that leaves the smallest sum of distances. [K, P]."""
    sq_norms = x.square().sum(dim=1)

    def sq_distances(rows: Tensor) -> Tensor:  # [R] -> [R, N]; rounding is of no matter for odds
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
    """The mean of each centroid's rows, [K, P]; a centroid without rows goes to one of those furthest from theirs."""
    sums = torch.zeros(num_codes, x.shape[1], dtype=torch.float64, device=x.device)
    for part in _chunks(x):
        sums.index_add_(0, found.indices[part], x[part].double())
    counts = torch.bincount(found.indices, minlength=num_codes)
    means = (sums / counts.clamp(min=1)[:, None]).to(x.dtype)
    empty = (counts == 0).nonzero().flatten()
    means[empty] = x[found.sq_distances.topk(empty.numel()).indices]
    return means


def _chunks(x: Tensor) -> list[slice]:
    """Parts of x's rows, so that nothing beside x grows with all of them."""
    return [slice(start, start + _CHUNK) for start in range(0, x.shape[0], _CHUNK)]


def _project(x: Tensor, num_components: int, generator: Generator) -> Tensor:
    """x [N, P], centred, in the space of its first principal components, [N, C], up to a rotation."""
    mean = x.mean(dim=0)
    basis = torch.randn(x.shape[1], num_components, generator=generator, device=x.device)
    for _ in range(_POWER_ROUNDS):
        basis = torch.linalg.qr(x.T @ (x @ basis - mean @ basis)).Q  # the right factor's columns add up to 0
    return x @ basis - mean @ basis
