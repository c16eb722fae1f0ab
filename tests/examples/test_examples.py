"""The examples run unchanged and print what they promise."""

import re
import runpy
import time
from itertools import pairwise
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"


def run(name: str, capsys: pytest.CaptureFixture[str]) -> str:
    started = time.process_time()
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert time.process_time() - started < 60  # CPU time
    return capsys.readouterr().out


def test_every_example_is_tested() -> None:
    assert {file.name for file in EXAMPLES.glob("*.py")} == {"kmeans.py", "residual_signal.py", "swap_quantizer.py"}


def test_kmeans_starts_better_with_plus_plus(capsys: pytest.CaptureFixture[str]) -> None:
    random, plus_plus = (float(error) for error in re.findall(r"distance +([\d.]+)", run("kmeans.py", capsys)))
    assert 15.5 < plus_plus < random / 4


def test_every_stage_raises_the_signal_to_noise_ratio(capsys: pytest.CaptureFixture[str]) -> None:
    decibels = [float(found) for found in re.findall(r"([\d.]+) dB", run("residual_signal.py", capsys))]
    assert len(decibels) == 6
    assert all(later > earlier for earlier, later in pairwise(decibels))
    assert decibels[0] > 20
    assert decibels[-1] > 40


def test_the_new_quantizer_is_better(capsys: pytest.CaptureFixture[str]) -> None:
    found = re.findall(r"error ([\d.]+), (\d+) of 256", run("swap_quantizer.py", capsys))
    (error_before, codes_before), (error_after, codes_after) = ((float(error), int(codes)) for error, codes in found)
    assert error_after < 0.7 * error_before
    assert codes_after > 200 > codes_before
