"""Result files: finished work is found again and never mistaken for other work."""

import json
from pathlib import Path

import pytest

from benchmarks.results import aligned, append_row, is_finished, markdown, read_rows
from vqae.runtime.errors import UsageError


def test_an_appended_row_is_finished_work(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "results.jsonl"
    assert not is_finished(file, {"seed": 0}, {})
    for seed in range(3):
        append_row(file, {"seed": seed, "mse": 0.5, "settings": {"lr": 0.1}})
        assert [json.loads(line)["seed"] for line in file.read_text().splitlines()] == list(range(seed + 1))
    assert is_finished(file, {"seed": 2}, {"lr": 0.1})
    assert not is_finished(file, {"seed": 3}, {"lr": 0.1})


def test_other_settings_are_named(tmp_path: Path) -> None:
    file = tmp_path / "results.jsonl"
    append_row(file, {"method": "model", "seed": 1, "settings": {"lr": 0.1, "flip": False, "old": 3}})
    with pytest.raises(UsageError, match=r"results\.jsonl holds method model, seed 1 with other settings") as error:
        is_finished(file, {"method": "model", "seed": 1}, {"lr": 0.2, "flip": False, "new": 4})
    assert "(lr was 0.1, now 0.2, old was 3, now None, new was None, now 4)" in str(error.value)
    assert not is_finished(file, {"method": "kmeans", "seed": 1}, {"lr": 0.2})


@pytest.mark.parametrize("text", ["{", "3", "[]"])
def test_a_file_of_something_else_is_an_error(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"settings": {}}\n' + text + "\n")
    with pytest.raises(UsageError, match=r"results\.jsonl must hold a JSON object per line"):
        read_rows(file)


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        append_row(tmp_path / "file" / "results.jsonl", {"settings": {}})


def test_a_table_for_a_terminal() -> None:
    assert aligned(markdown([["a", "long"], [1, "x"]])).splitlines() == [
        "| a   | long |",
        "| --- | ---- |",
        "| 1   | x    |",
    ]
