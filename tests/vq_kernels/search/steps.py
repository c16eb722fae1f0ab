"""Counts the rows that each step decides, per test and over all tests."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from torch import Tensor

from vq_kernels.search.api import backend_module

STEPS = ("certified", "reranked", "exhaustive")


class Totals:
    """The searches per backend and the rows per step, over all tests of a session."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def add(self, backend: str, searches: int, rows: Mapping[str, int]) -> None:
        """Add the searches of one test."""
        self.counts.setdefault(backend, Counter()).update({"searches": searches, **rows})

    def lines(self) -> Iterator[str]:
        """One line per backend, which test_triton_launch.py parses."""
        for backend, counts in self.counts.items():
            rows = ", ".join(f"{counts[step]} {step}" for step in STEPS)
            yield f"{backend}: {counts['searches']} searches; rows: {rows}"


TOTALS = pytest.StashKey[Totals]()


@contextmanager
def counted_steps(backend: str, steps: Counter[str], totals: Totals) -> Iterator[None]:
    """Count the searches of a backend: their rows by step in `steps`, and everything in `totals`."""
    module = backend_module(backend)
    search: Callable[..., tuple[Tensor, ...]] = module.search
    searches = 0

    def counted(*arguments: object) -> tuple[Tensor, ...]:
        nonlocal searches
        found = search(*arguments)
        searches += 1
        steps.update(dict(zip(STEPS, found[3].tolist(), strict=True)))
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "search", counted)
        yield
    totals.add(backend, searches, steps)
