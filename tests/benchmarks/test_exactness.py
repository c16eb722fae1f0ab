"""The comparison with float64 counts every row, uses every case, and finds a wrong index."""

import json
import sys
from typing import Any

import pytest
import torch

from benchmarks import exactness
from benchmarks.data import DATA_NAMES
from benchmarks.exactness import CASES
from vq_kernels.search.api import nearest_code_op


def soak(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["exactness.py", *arguments])
    return exactness.main()


def test_every_row_is_counted_and_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak(monkeypatch, "--rows", "10000", "--seed", "3") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report["rows"] == 10_000
    assert report["wrong"] == 0
    assert report["seed"] == 3
    assert list(report["data"]) == list(DATA_NAMES)
    for count in report["data"].values():
        assert count["rows"] == count["certified"] + count["reranked"] + count["exhaustive"] == 1000
    for step in ("certified", "reranked", "exhaustive"):
        assert sum(count[step] for count in report["data"].values()) > 100, f"the soak must have rows {step}"
    assert "offset-1000: 1,000 rows, 0 wrong" in captured.err


def test_every_case_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(x: torch.Tensor, codebook: torch.Tensor, *others: Any) -> Any:
        seen.add((*codebook.shape, x.dtype, codebook.dtype))
        return nearest_code_op(x, codebook, *others)

    monkeypatch.setattr(exactness, "nearest_code_op", watched)
    assert soak(monkeypatch, "--rows", "450") == 0
    assert seen == set(CASES)


def test_one_wrong_index_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def wrong_once(x: torch.Tensor, codebook: torch.Tensor, *others: Any) -> Any:
        nonlocal calls
        calls += 1
        found = nearest_code_op(x, codebook, *others)
        if calls == 5:
            found[0][-1] = codebook.shape[0] - 1 - found[0][-1]
        return found

    monkeypatch.setattr(exactness, "nearest_code_op", wrong_once)
    assert soak(monkeypatch, "--rows", "900") == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["wrong"] == report["data"]["gaussian"]["wrong"] == 1
