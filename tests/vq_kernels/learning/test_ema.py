"""The sums of each code's rows, and their moving averages."""

import pytest
import torch
from torch import Tensor

from vq_kernels.learning.ema import RowSums, mean_codes, move_averages_, row_sums, smoothed_sizes


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("num_codes", [7, 101])
def test_row_sums(num_codes: int) -> None:
    rows, codebook = draw(100, 4), draw(num_codes, 4, seed=1)
    indices = torch.arange(100) % 5  # codes 5 and 6 have no row
    counted = torch.arange(100) % 3 != 0
    poisoned = rows.clone()
    poisoned[~counted] = torch.nan
    batch = row_sums(poisoned, codebook, indices, counted, synchronise=True)
    counts, sums = batch.counts, batch.all_sums()
    assert (batch.codes is None) == (num_codes < 100)
    for code in range(num_codes):
        of_code = rows[counted & (indices == code)].double()
        assert counts[code] == len(of_code)
        torch.testing.assert_close(sums[code].double(), of_code.sum(dim=0), rtol=1e-6, atol=1e-5)


def test_sums_of_rows_far_from_the_origin_are_precise() -> None:
    codebook = torch.full((1, 1), 4096.0)
    rows = 4096 + 0.25 * torch.arange(1000.0)[:, None] / 250
    counts, sums, _ = row_sums(
        rows, codebook, torch.zeros(1000, dtype=torch.int64), torch.ones(1000).bool(), synchronise=False
    )
    assert sums / counts == pytest.approx(rows.double().mean().item(), rel=2**-24)


@pytest.mark.parametrize("codes", [None, torch.tensor([1, 0, 1])])
def test_move_averages_and_mean_codes(codes: Tensor | None) -> None:
    sizes, sums = torch.tensor([1.0, 3.0]), torch.tensor([[2.0], [6.0]])
    batch_sums = torch.tensor([[6.0], [4.0]] if codes is None else [[4.0], [6.0], [0.0]])
    move_averages_(sizes, sums, RowSums(torch.tensor([3.0, 1.0]), batch_sums, codes), torch.tensor(0.25))
    assert sizes.tolist() == [1.5, 2.5]
    assert sums.tolist() == [[3.0], [5.5]]
    assert mean_codes(sizes, sums, 0.0).tolist() == [[2.0], [pytest.approx(2.2)]]


def test_smoothed_sizes_keep_their_sum_and_are_positive() -> None:
    smoothed = smoothed_sizes(torch.tensor([[0.0, 8.0], [4.0, 4.0]]), 0.5)
    torch.testing.assert_close(smoothed.sum(dim=1), torch.tensor([8.0, 8.0]))
    assert smoothed[0, 0] > 0
    assert smoothed[1].tolist() == [4.0, 4.0]
