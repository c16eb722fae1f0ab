"""K-means of the pixels: the optimum where it is known, and the properties that every result has."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from benchmarks.pixel_kmeans import assign, draw_starts, fit_kmeans, lloyd


def clusters(num_clusters: int, rows_each: int, num_values: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [N, P] in tight clusters far apart, and the means [K, P] of the clusters."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(num_clusters, num_values, generator=generator)
    x = centres[:, None] + 0.01 * torch.randn(num_clusters, rows_each, num_values, generator=generator)
    return x.flatten(0, 1), x.mean(dim=1)


def noise(num_rows: int, num_values: int) -> Tensor:
    return torch.rand(num_rows, num_values, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("num_clusters", "num_values"), [(2, 3), (20, 30), (20, 150)])
def test_clusters_far_apart_are_found(num_clusters: int, num_values: int) -> None:
    x, means = clusters(num_clusters, 50, num_values)
    centroids = fit_kmeans(x, num_clusters)
    nearest = torch.cdist(means, centroids).argmin(dim=1)
    assert nearest.unique().numel() == num_clusters
    torch.testing.assert_close(centroids[nearest], means)


def test_one_centroid_is_the_mean() -> None:
    x = noise(5000, 7)  # more rows than are taken at once
    torch.testing.assert_close(fit_kmeans(x, 1, starts=1), x.mean(dim=0, keepdim=True))
    variance = (x - x.mean(dim=0)).square().sum().item()
    assert assign(x, x.mean(dim=0, keepdim=True)).sum == pytest.approx(variance, rel=1e-5)


def test_a_centroid_for_every_row_leaves_nothing() -> None:
    x = noise(40, 5)
    assert assign(x, fit_kmeans(x, 40)).sum == 0


def test_fewer_distinct_rows_than_centroids() -> None:
    x = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(20, 1)
    assert assign(x, fit_kmeans(x, 5)).sum == 0


def test_assignment_is_to_the_nearest() -> None:
    x, centroids = noise(9000, 6), noise(9, 6) + 0.25
    found = assign(x, centroids)
    distances = torch.cdist(x.double(), centroids.double()).square()
    assert torch.equal(found.indices, distances.argmin(dim=1))
    torch.testing.assert_close(found.sq_distances.double(), distances.amin(dim=1), rtol=1e-5, atol=0)
    assert found.sum == pytest.approx(distances.amin(dim=1).sum().item(), rel=1e-5)


def test_no_round_of_lloyd_makes_it_worse_until_it_stands_still() -> None:
    x = noise(500, 4)
    start = x[:10]
    sums = [lloyd(x, start, rounds)[1].sum for rounds in range(60)]
    assert all(after <= before * (1 + 1e-6) for before, after in pairwise(sums))
    assert sums[-1] < 0.9 * sums[0]
    centroids, found = lloyd(x, start, 1000)
    for code in range(10):
        torch.testing.assert_close(centroids[code], x[found.indices == code].mean(dim=0))
    assert torch.equal(assign(x, centroids).indices, found.indices)


def test_a_centroid_without_rows_goes_where_rows_are_furthest() -> None:
    x = torch.tensor([[0.0], [1.0], [2.0], [50.0]])
    centroids, found = lloyd(x, torch.tensor([[1.0], [-100.0]]), 5)
    assert centroids.flatten().tolist() == [1.0, 50.0]
    assert found.indices.tolist() == [0, 0, 0, 1]


def test_starts_are_distinct_rows_in_distinct_clusters() -> None:
    x, means = clusters(12, 30, 8)
    generator = torch.Generator().manual_seed(3)
    starts = draw_starts(x, 12, generator)
    assert all((x == start).all(dim=1).any() for start in starts)
    assert torch.cdist(starts, means).argmin(dim=1).unique().numel() == 12


def test_the_seed_decides() -> None:
    x = noise(300, 10)
    assert torch.equal(fit_kmeans(x, 8, seed=5), fit_kmeans(x, 8, seed=5))
    assert not torch.equal(fit_kmeans(x, 8, starts=1, seed=5), fit_kmeans(x, 8, starts=1, seed=6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_codes": 0}, "num_codes must be 1 to 20, the number of rows, got 0"),
        ({"num_codes": 21}, "num_codes must be 1 to 20, the number of rows, got 21"),
        ({"num_codes": 2, "starts": 0}, "starts must be at least 1 and rounds at least 0, got 0 and 12"),
        ({"num_codes": 2, "rounds": -1}, "got 3 and -1"),
    ],
)
def test_arguments_out_of_range(arguments: dict[str, int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit_kmeans(noise(20, 3), **arguments)
