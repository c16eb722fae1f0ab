"""Runs the tests of the Triton gradient in the interpreter."""

from pathlib import Path

import pytest

from tests.vq_kernels.interpreter import run_interpreted


@pytest.mark.timeout(600)
def test_interpreted() -> None:
    run_interpreted(Path(__file__).parent / "interpreted_triton_backend.py")
