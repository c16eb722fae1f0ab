"""Fixtures for the tests of the search."""

import functools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from tests.vq_kernels.search.exactness import BACKENDS_HERE, INTERPRETED, poisoned_allocations, require_backend
from tests.vq_kernels.search.steps import TOTALS, Totals, counted_steps
from vq_kernels.search.llvm import launch

# test_triton_launch.py runs these tests in the interpreter.
collect_ignore = [] if "triton" in BACKENDS_HERE else ["test_triton_margin.py"]


# Only a GPU rounds the scores as matrix units do.
_ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
_PLAIN_CPU = "llvm, divided, for a CPU without extensions"
_FEW_ROWS = "llvm, as for a few rows"
_BACKENDS = (
    BACKENDS_HERE if INTERPRETED else ("llvm", _FEW_ROWS, _PLAIN_CPU, "torch", pytest.param("triton", marks=_ON_GPU))
)


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TOTALS] = Totals()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for line in config.stash[TOTALS].lines():
        terminalreporter.write_line(f"attacks on the search by {line}")


@pytest.fixture
def totals(request: pytest.FixtureRequest) -> Totals:
    """The totals over all tests, shown in the terminal summary."""
    return request.config.stash[TOTALS]


@pytest.fixture
def steps() -> Counter[str]:
    """The number of certified, reranked and exhaustive rows in this test so far."""
    return Counter()


@functools.cache
def plain_kernels() -> launch.Kernels:
    """Kernels without multiply-adds; their tiles do not fit the vectors of this CPU."""
    return launch.Kernels(8, "", "")


@pytest.fixture(params=_BACKENDS)
def backend(
    request: pytest.FixtureRequest, steps: Counter[str], totals: Totals, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Each backend; Triton on a GPU or interpreted."""
    name: str = request.param
    if name == _FEW_ROWS:
        monkeypatch.setattr(launch, "_FEW_ROWS", 1 << 62)
    if name == _PLAIN_CPU:
        monkeypatch.setattr(launch, "kernels", plain_kernels)
        monkeypatch.setattr(launch, "_CACHED_ELEMENTS", 1 << 7)  # chunks of some rows, blocks of some codes
        monkeypatch.setattr(launch, "_THREAD_PRODUCTS", 1 << 10)
        monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    name = name.partition(",")[0]
    require_backend(name)
    with ExitStack() as contexts:
        contexts.enter_context(counted_steps(name, steps, totals))
        if name != "torch":
            contexts.enter_context(poisoned_allocations())
        if INTERPRETED:
            contexts.enter_context(np.errstate(all="ignore"))  # numpy warns where a GPU returns Inf
        yield name
