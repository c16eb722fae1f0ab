"""Runs the tests of the Triton search, the planted faults and the attacks in the interpreter."""

import re
from pathlib import Path

import pytest

from tests.vq_kernels.interpreter import run_interpreted
from tests.vq_kernels.search.steps import STEPS, Totals

HERE = Path(__file__).parent


@pytest.mark.timeout(600)
def test_interpreted() -> None:
    run_interpreted(HERE / "interpreted_triton_launch.py", HERE / "interpreted_faults.py")


@pytest.mark.timeout(900)
def test_attacks_interpreted(totals: Totals) -> None:
    """All attacks that take a backend, and the tests of the margin. The attacks have to reach every step."""
    files = ("test_attack.py", "test_attack_shapes.py", "test_triton_margin.py")
    told = run_interpreted(*(HERE / name for name in files), "-k", "triton")

    line = re.search(r"triton: (\d+) searches; rows: (\d+) certified, (\d+) reranked, (\d+) exhaustive", told)
    assert line is not None, told
    searches, *rows = (int(number) for number in line.groups())
    assert searches > 250
    assert all(rows), f"no attack reached one of the steps: {line.group()}"
    totals.add("triton", searches, dict(zip(STEPS, rows, strict=True)))
    skipped = re.findall(r"^SKIPPED \[\d+\] \S+ (.*)$", told, flags=re.MULTILINE)
    assert skipped == ["Triton's interpreter converts bfloat16 subnormals to other numbers"]
