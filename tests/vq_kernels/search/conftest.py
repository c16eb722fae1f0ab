"""Fixtures for the tests of the search."""

from collections.abc import Iterator

import numpy as np
import pytest

from tests.vq_kernels.search.exactness import require_backend


@pytest.fixture(params=["torch", "triton"])
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """Each backend that can run here; the other is skipped with the reason."""
    name: str = request.param
    require_backend(name)
    with np.errstate(all="ignore"):  # Triton's interpreter computes in numpy, which warns where a GPU gives Inf
        yield name
