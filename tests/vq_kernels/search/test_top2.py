"""The top two of each row of a product, from the maxima of groups and slots."""

import pytest
import torch

from vq_kernels.search.top2 import Top2, num_slots, padded


@pytest.mark.parametrize("num_rows", [1, 63, 1000])
@pytest.mark.parametrize("num_codes", [32, 96, 1024, 8192, 3 * 4096 + 128])
def test_equals_topk(num_rows: int, num_codes: int) -> None:
    generator = torch.Generator().manual_seed(num_rows * num_codes)
    matrix = torch.randn(num_codes, 5, generator=generator, dtype=torch.float64)
    rows = torch.randn(num_rows, 5, generator=generator, dtype=torch.float64)
    top2 = Top2(matrix, num_rows)
    top2.reduce(rows[:17], 0)
    top2.reduce(rows[17:], min(17, num_rows))
    index, best, second = top2.result(num_rows)
    values, indices = (rows @ matrix.t()).topk(2, dim=1)
    assert torch.equal(index, indices[:, 0])
    assert torch.allclose(torch.stack([best, second], dim=1), values, rtol=1e-12)


@pytest.mark.parametrize(
    "twins", [(0, 1), (0, 16), (0, 48), (3, 70), (31, 95)], ids=["group", "slot", "half", "none", "edges"]
)
def test_tied_top_scores_are_equal(twins: tuple[int, int]) -> None:
    assert (num_slots(96), padded(96)) == (16, 96)
    matrix = torch.arange(96.0)[:, None] / 96
    matrix[list(twins)] = 2.0
    top2 = Top2(matrix, 1)
    top2.reduce(torch.ones(1, 1), 0)
    index, best, second = top2.result(1)
    assert best == second == 2
    assert index <= max(twins)  # it may be neither, but never padding


def test_rows_of_nan_get_the_first_code() -> None:
    top2 = Top2(torch.ones(64, 1), 3)
    top2.reduce(torch.tensor([[1.0], [torch.nan], [2.0]]), 0)
    index, best, second = top2.result(3)
    assert index.tolist() == [0, 0, 0]
    assert best.isnan().tolist() == second.isnan().tolist() == [False, True, False]


def test_buffers_are_small_for_the_largest_codebooks() -> None:
    top2 = Top2(torch.empty(1 << 20, 10, device="meta"), 1 << 24)
    buffers = (top2.scores, top2.slot_maxima, top2.group_maxima)
    assert sum(buffer.nbytes for buffer in buffers) <= 20 << 20
