"""A fixture that resets the compiler."""

from collections.abc import Iterator

import pytest
import torch


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()
