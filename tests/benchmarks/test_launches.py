"""The time of the Python in front of the launches."""

import re

import pytest

from benchmarks import launches


def test_searches_are_timed_without_a_gpu(capsys: pytest.CaptureFixture[str]):
    launches.main(count=5)
    lines = capsys.readouterr().out.splitlines()
    found = [re.fullmatch(r"([\w., ]+): ([\d.]+) us, ([\d.]+) times torch\.add", line) for line in lines]
    assert [match and match[1] for match in found] == ["torch.add", "search, prepared", "search"]
    assert all(float(match[2]) > 0 for match in found if match)
