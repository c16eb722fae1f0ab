"""The soak: that it counts every row, goes through every case, and sees a wrong index."""

import json
import sys

import exactness_soak
import pytest
import torch
from exactness_soak import CASES
from search_data import DRAWN_DATA

from vq_kernels import NearestCode, nearest_code


def soak(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["exactness_soak.py", *arguments])
    return exactness_soak.main()


def test_every_row_is_counted_and_right(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak(monkeypatch, "--rows", "10000", "--seed", "3") == 0
    captured = capsys.readouterr()
    report = json.loads(captured.out.splitlines()[-1])
    assert report["rows"] == 10_000
    assert report["wrong"] == 0
    assert report["seed"] == 3
    assert list(report["data"]) == list(DRAWN_DATA)
    for count in report["data"].values():
        assert count["rows"] == count["proved"] + count["resolved"] + count["drained"] == 1000
    for step in ("proved", "resolved", "drained"):
        assert sum(count[step] for count in report["data"].values()) > 100, f"the soak must have rows {step}"
    assert "offset-1000: 1,000 rows, 0 wrong" in captured.err


def test_every_case_has_its_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = set()

    def watched(x: torch.Tensor, codebook: torch.Tensor, *, backend: str) -> NearestCode:
        seen.add((*codebook.shape, x.dtype, codebook.dtype))
        return nearest_code(x, codebook, backend=backend)

    monkeypatch.setattr(exactness_soak, "nearest_code", watched)
    assert soak(monkeypatch, "--rows", "450") == 0
    assert seen == set(CASES)


def test_one_wrong_index_is_seen(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = 0

    def wrong_once(x: torch.Tensor, codebook: torch.Tensor, *, backend: str) -> NearestCode:
        nonlocal calls
        calls += 1
        found = nearest_code(x, codebook, backend=backend)
        if calls == 5:
            found.indices[-1] = codebook.shape[0] - 1 - found.indices[-1]
        return found

    monkeypatch.setattr(exactness_soak, "nearest_code", wrong_once)
    assert soak(monkeypatch, "--rows", "900") == 1
    report = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert report["wrong"] == report["data"]["gaussian"]["wrong"] == 1


def test_fewer_rows_than_data_sets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert soak(monkeypatch, "--rows", "8") == 2
    assert "--rows must be at least 10, one for each data set, got 8" in capsys.readouterr().err
