"""Fixtures for the tests of the search."""

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack

import numpy as np
import pytest
import torch

from tests.vq_kernels.search.exactness import BACKENDS_HERE, INTERPRETED, poisoned_allocations, require_backend
from tests.vq_kernels.search.steps import TOTALS, Totals, counted_steps
from vq_kernels.search import torch_small

# test_triton_launch.py runs these tests in the interpreter.
collect_ignore = [] if "triton" in BACKENDS_HERE else ["test_triton_margin.py"]


# Only a GPU rounds the scores as matrix units do.
_ON_GPU = (pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"))
# What to change in torch_small.py, so that every search by PyTorch takes the same way whatever its size.
_WAYS = {
    "by tiles": {"LARGEST_SCAN": 0},
    "by sorting": {"MOST_SORTED_ROWS": 1 << 62},
    "by maxima": {"MOST_SORTED_ROWS": 0},
}
_BACKENDS = BACKENDS_HERE if INTERPRETED else (*_WAYS, pytest.param("triton", marks=_ON_GPU))


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


@pytest.fixture(params=_BACKENDS)
def backend(
    request: pytest.FixtureRequest, steps: Counter[str], totals: Totals, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """Each backend, and each way of PyTorch's; Triton on a GPU or interpreted."""
    way = _WAYS.get(request.param, {})
    name = "torch" if way else request.param
    for constant, value in way.items():
        monkeypatch.setattr(torch_small, constant, value)
    require_backend(name)
    with ExitStack() as contexts:
        contexts.enter_context(counted_steps(name, steps, totals))
        if INTERPRETED:
            contexts.enter_context(poisoned_allocations())
            contexts.enter_context(np.errstate(all="ignore"))  # numpy warns where a GPU returns Inf
        yield name
