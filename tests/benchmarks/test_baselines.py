"""How a contender's settings are chosen."""

import itertools

import pytest
import torch
from torch import Tensor

from benchmarks import baselines

X, CODEBOOK = torch.zeros(5000, 2), torch.zeros(3, 2)


class Clock:
    """`time` for baselines, and a search by chunks whose calls take the seconds that are given."""

    def __init__(self, seconds: dict[int, list[float]]) -> None:
        self.now, self.calls = 0.0, []
        self._left = {rows: itertools.chain(values, itertools.repeat(values[-1])) for rows, values in seconds.items()}

    def perf_counter(self) -> float:
        return self.now

    def cat(self, chunks: list[Tensor]) -> Tensor:
        """Stands in for torch.cat, which ends a call; the number of chunks tells its size."""
        rows = next(rows for rows in self._left if -(-X.shape[0] // rows) == len(chunks))
        self.calls.append(rows)
        self.now += next(self._left[rows])
        return torch.cat(chunks)


def choose(monkeypatch: pytest.MonkeyPatch, seconds: dict[int, list[float]]) -> tuple[int, list[int]]:
    """The size that is chosen, and the sizes of the calls before."""
    clock = Clock(seconds)
    monkeypatch.setattr(baselines, "time", clock)
    monkeypatch.setattr(baselines, "_CHUNK_ROWS", tuple(seconds))
    monkeypatch.setattr(baselines, "torch", type("Torch", (), {"cat": staticmethod(clock.cat), "addmm": torch.addmm}))
    search = baselines.CONTENDERS["addmm-chunked"].build(X, CODEBOOK)
    before = list(clock.calls)
    search()
    return clock.calls[-1], before


def test_one_slow_call_does_not_decide_the_chunk_size(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {512: [0.9, 0.3, 0.3], 1024: [0.9, 0.4, 0.1], 2048: [0.1, 0.2, 0.2]}
    assert choose(monkeypatch, seconds) == (1024, [512] * 3 + [1024] * 3 + [2048] * 4)


def test_long_calls_are_timed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {512: [9.0], 1024: [8.0], 2048: [7.0]}
    assert choose(monkeypatch, seconds) == (2048, [512] * 2 + [1024] * 2 + [2048] * 2)
