"""The comparison of semantic IDs: its rows, and the exit status on a wrong index."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import semantic_ids
from benchmarks.semantic_ids import Options, main
from examples.semantic_ids import METHODS

SMALL = Options(num_items=700, code_dim=8, num_levels=2, num_codes=16, seeds=1)


def test_a_row_for_each_method(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    assert main(Options(**{**vars(SMALL), "out": file})) == 0
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert capsys.readouterr().out == file.read_text()
    assert [row["method"] for row in rows] == ["vq_kernels", "faiss", "scikit-learn"]
    for row in rows:
        first, second = row["errors"]
        assert 0 < second < first < 0.5
        assert 700 - 16**2 <= row["collisions"] < 700
        assert row["settings"] == {"num_items": 700, "code_dim": 8, "num_levels": 2, "num_codes": 16}
    assert rows[0]["wrong"] == 0
    assert rows[0]["errors"][0] == pytest.approx(rows[2]["errors"][0], rel=0.05)


def test_a_wrong_index_is_reported(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def shifted(x: torch.Tensor, num_levels: int, num_codes: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        indices, codebooks = METHODS["scikit-learn"](x, num_levels, num_codes, seed)
        return (indices + 1) % num_codes, codebooks

    monkeypatch.setattr(semantic_ids, "METHODS", {"vq_kernels": shifted})
    monkeypatch.setitem(METHODS, "vq_kernels", shifted)
    assert main(SMALL) == 1
    assert json.loads(capsys.readouterr().out)["wrong"] > 1000
