"""Moving averages, rows drawn at random, k-means: the parts of a codebook that learns without a gradient."""

import pytest
import torch
from torch import Tensor

from vq_kernels.learning.dead_codes import draw_lots, draw_replacements, draw_rows
from vq_kernels.learning.ema import RowSums, mean_codes, move_averages_, row_sums, smoothed_sizes
from vq_kernels.learning.kmeans import kmeans_if_needed


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_row_sums() -> None:
    rows, codebook = draw(100, 4), draw(7, 4, seed=1)
    indices = torch.arange(100) % 5  # codes 5 and 6 have no row
    counted = torch.arange(100) % 3 != 0
    poisoned = rows.clone()
    poisoned[~counted] = torch.nan
    counts, sums = row_sums(poisoned, codebook, indices, counted, synchronise=True)
    for code in range(7):
        of_code = rows[counted & (indices == code)].double()
        assert counts[code] == len(of_code)
        torch.testing.assert_close(sums[code].double(), of_code.sum(dim=0), rtol=1e-6, atol=1e-5)


def test_the_sum_of_rows_far_out_keeps_what_lies_near_the_code() -> None:
    codebook = torch.full((1, 1), 4096.0)
    rows = 4096 + 0.25 * torch.arange(1000.0)[:, None] / 250
    counts, sums = row_sums(
        rows, codebook, torch.zeros(1000, dtype=torch.int64), torch.ones(1000).bool(), synchronise=False
    )
    assert sums / counts == pytest.approx(rows.double().mean().item(), rel=2**-24)


def test_averages_and_their_codes() -> None:
    sizes, sums = torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [6.0]])
    move_averages_(sizes, sums, RowSums(torch.tensor([3.0, 1.0]), torch.tensor([[6.0], [4.0]])), 0.75)
    assert sizes.tolist() == [1.5, 2.5]
    assert sums.tolist() == [[3.0], [5.5]]
    assert mean_codes(sizes, sums, 0.0).tolist() == [[2.0], [pytest.approx(2.2)]]


def test_smoothed_sizes_keep_their_sum_and_none_is_zero() -> None:
    smoothed = smoothed_sizes(torch.tensor([[0.0, 8.0], [4.0, 4.0]]), 0.5)
    torch.testing.assert_close(smoothed.sum(dim=1), torch.tensor([8.0, 8.0]))
    assert smoothed[0, 0] > 0
    assert smoothed[1].tolist() == [4.0, 4.0]


def test_drawn_rows_are_distinct_and_count() -> None:
    rows = torch.arange(10.0)[:, None]
    counted = torch.arange(10) % 2 == 0
    drawn, found = draw_rows(rows, counted, torch.randperm(10), torch.arange(7), synchronise=False)
    assert found.tolist() == [True] * 5 + [False] * 2
    assert sorted(drawn[found, 0].tolist()) == [0, 2, 4, 6, 8]
    drawn, found = draw_rows(rows[:0], counted[:0], torch.randperm(0), torch.arange(7), synchronise=False)
    assert not found.any()
    assert not drawn.any()


def test_dead_codes_that_have_to_wait_are_chosen_at_random() -> None:
    torch.manual_seed(0)
    dead = torch.tensor([True, False, True, True, True])
    times = torch.zeros(5)
    for _ in range(200):
        lots = draw_lots(2, torch.device("cpu"))
        two = torch.arange(2.0)[:, None], torch.ones(2).bool()
        drawn, replaced = draw_replacements(dead, *two, lots, synchronise=False)
        assert replaced.sum() == 2
        assert sorted(drawn[replaced, 0].tolist()) == [0, 1]
        times += replaced
    assert times[1] == 0
    assert (times[dead] > 60).all()
    assert not draw_replacements(torch.zeros(5).bool(), *two, lots, synchronise=False)[1].any()


@pytest.mark.parametrize("cosine", [False, True])
def test_k_means_finds_clusters_far_apart(cosine: bool) -> None:
    centres = torch.eye(4) * 5
    rows = (centres.repeat(50, 1) + 0.1 * draw(200, 4)).requires_grad_(False)
    if cosine:
        rows = torch.nn.functional.normalize(rows, dim=1)
    rows[3] = torch.nan
    best = torch.inf
    for seed in range(10):  # from random rows, Lloyd's algorithm may end elsewhere
        torch.manual_seed(seed)
        means, counts, made = kmeans_if_needed(
            torch.tensor(True), rows, torch.ones(200).bool(), 4, 10, cosine, False, "auto"
        )
        assert made
        assert counts.sum() == 199
        best = min(best, float(torch.cdist(centres / (5 if cosine else 1), means).amin(dim=1).max()))
    assert best < 0.1


def test_k_means_does_nothing_where_it_is_not_needed_or_has_no_rows() -> None:
    for needed, num_rows in ((False, 5), (True, 0)):
        options = (torch.ones(num_rows).bool(), 3, 10, False, False, "auto")
        means, counts, made = kmeans_if_needed(torch.tensor(needed), torch.ones(num_rows, 2), *options)
        assert not made
        assert means.shape == (3, 2)
        assert not counts.any()
