"""How many rows the searches of a test, and of all tests together, sent through each step."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import pytest
from torch import Tensor

from vq_kernels.search.api import backend_module

STEPS = ("certified", "reranked", "exhaustive")


class Totals:
    """Searches of each backend and rows of each step, over all tests of a session."""

    def __init__(self) -> None:
        self.counts: dict[str, Counter[str]] = {}

    def add(self, backend: str, searches: int, rows: Mapping[str, int]) -> None:
        """Add the searches of one test."""
        self.counts.setdefault(backend, Counter()).update({"searches": searches, **rows})

    def lines(self) -> Iterator[str]:
        """One line a backend; test_triton_launch.py reads it back from a process of its own."""
        for backend, counts in self.counts.items():
            rows = ", ".join(f"{counts[step]} {step}" for step in STEPS)
            yield f"{backend}: {counts['searches']} searches; rows: {rows}"


TOTALS = pytest.StashKey[Totals]()


@contextmanager
def counted_steps(backend: str, steps: Counter[str], totals: Totals) -> Iterator[None]:
    """Count every search of a backend: its rows into `steps`, by step, and all of it into `totals`."""
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
