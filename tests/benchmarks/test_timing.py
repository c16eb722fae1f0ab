"""Timing, memory, and the verdict on an index: the measuring parts of the search benchmarks."""

from collections.abc import Callable

import pytest
import torch

from benchmarks import timing
from benchmarks.timing import burst, failure, host_memory_limit, peak_mib, time_in_turn
from benchmarks.verification import checked_rows, first_of_identical, wrong_rows
from vq_kernels.search.reference import brute_force_nearest

CPU = torch.device("cpu")


def test_contenders_take_turns_and_fast_ones_are_called_more_often(monkeypatch: pytest.MonkeyPatch) -> None:
    turns: list[tuple[object, int]] = []

    def fake_burst(call: Callable[[], object], count: int, _device: torch.device) -> list[float]:
        milliseconds = call()
        assert isinstance(milliseconds, float)
        turns.append((milliseconds, count))
        return [milliseconds] * count

    monkeypatch.setattr(timing, "burst", fake_burst)
    elapsed_ms = time_in_turn({"fast": lambda: 0.5, "slow": lambda: 80.0}, CPU, rounds=3, burst_ms=10)
    assert turns == [(0.5, 1), (80.0, 1), (0.5, 20), (80.0, 1), (0.5, 20), (80.0, 1)]
    assert len(elapsed_ms["fast"]) == 41
    assert elapsed_ms["slow"] == [80.0] * 3


def test_each_call_of_a_burst_is_timed() -> None:
    times = burst(lambda: None, 5, CPU)
    assert len(times) == 5
    assert min(times) >= 0


def test_peak_memory_is_what_a_call_holds_at_most() -> None:
    def hold(mebibytes: int) -> torch.Tensor:
        return torch.ones(mebibytes << 18)[:1].clone()

    hold(8)
    peak = peak_mib(lambda: hold(96), CPU)
    if peak is None:
        pytest.skip("the peak of the resident set cannot be read here")
    assert 90 < peak < 110
    assert peak_mib(lambda: None, CPU) < 4


def test_memory_beyond_what_is_free_is_an_error_and_not_the_end() -> None:
    too_much = 1 << 44  # 16 TiB
    with host_memory_limit(), pytest.raises(RuntimeError) as caught:
        torch.zeros(too_much, dtype=torch.int8)
    assert failure(caught.value) == "out of memory"
    assert failure(RuntimeError("shapes differ")) == "failed: shapes differ"
    torch.zeros(1 << 20)


def test_a_part_of_the_rows_is_checked_where_all_are_too_many() -> None:
    assert torch.equal(checked_rows(5000, 10, 10), torch.arange(5000))
    some = checked_rows(1_000_000, 1000, 100, seed=1)
    assert some.shape == (40_000,)
    assert some.unique().numel() == 40_000
    assert checked_rows(1_000_000, 65_536, 512).shape == (4096,)
    assert checked_rows(100, 65_536, 512).shape == (100,)


def test_what_counts_as_wrong() -> None:
    codebook = torch.tensor([[0.0], [1.0], [1.0], [3.0], [-0.0]])
    x = torch.tensor([[0.4], [0.5], [1.2], [2.0], [9.0], [9.0], [0.1]])

    def wrong(*indices: int) -> list[bool]:
        return wrong_rows(x, codebook, torch.tensor(indices, dtype=torch.int32)).tolist()

    assert first_of_identical(codebook).tolist() == [0, 1, 1, 3, 0]
    assert wrong(*brute_force_nearest(x, codebook).tolist()) == [False] * 7
    # By row: further away; an honest tie; the higher of identical codes; a tie again; out of range, twice; -0 is 0.
    assert wrong(1, 1, 2, 3, 5, -1, 4) == [True, False, True, False, True, True, True]
