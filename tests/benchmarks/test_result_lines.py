"""Finished pieces: found again, never lost, and not mistaken for others."""

import json
from pathlib import Path

import pytest
from result_lines import ResultLines

from vqae.runtime.errors import UsageError


def test_what_is_added_is_there_at_once_and_for_the_next_process(tmp_path: Path) -> None:
    file = tmp_path / "folder" / "results.jsonl"
    results = ResultLines(file)
    assert results.lines == []
    assert not file.exists()
    for seed in range(3):
        results.add({"seed": seed, "mse": 0.5, "settings": {"lr": 0.1}})
        assert [json.loads(line)["seed"] for line in file.read_text().splitlines()] == list(range(seed + 1))
    again = ResultLines(file)
    assert again.lines == results.lines
    assert again.has({"seed": 2}, {"lr": 0.1})
    assert not again.has({"seed": 3}, {"lr": 0.1})


def test_two_processes_add_to_one_file(tmp_path: Path) -> None:
    one, other = (ResultLines(tmp_path / "results.jsonl") for _ in range(2))
    for results, seed in ((one, 0), (other, 1), (one, 2)):
        results.add({"seed": seed, "settings": {}})
    assert [line["seed"] for line in ResultLines(tmp_path / "results.jsonl").lines] == [0, 1, 2]


def test_a_folder_and_what_is_no_text_are_named(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for name in (".", "bytes"):
        with pytest.raises(UsageError, match="cannot be read"):
            ResultLines(tmp_path / name)


def test_a_piece_with_other_settings_is_refused_by_name(tmp_path: Path) -> None:
    results = ResultLines(tmp_path / "results.jsonl")
    results.add({"method": "model", "seed": 1, "settings": {"lr": 0.1, "flip": False, "old": 3}})
    with pytest.raises(UsageError, match=r"results\.jsonl holds method model, seed 1 with other settings") as error:
        results.has({"method": "model", "seed": 1}, {"lr": 0.2, "flip": False, "new": 4})
    assert "(lr was 0.1, now 0.2, old was 3, now None, new was None, now 4)" in str(error.value)
    assert not results.has({"method": "kmeans", "seed": 1}, {"lr": 0.2})


@pytest.mark.parametrize("text", ["{", "3", "{}", '{"settings": 3}', ""])
def test_a_file_of_something_else_is_named_with_the_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "results.jsonl"
    file.write_text('{"settings": {}}\n' + text + "\n")
    with pytest.raises(UsageError, match=r"results\.jsonl must hold a result a line, line 2 is none"):
        ResultLines(file)
    assert file.read_text() == '{"settings": {}}\n' + text + "\n"


def test_a_file_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot be written"):
        ResultLines(tmp_path / "file" / "results.jsonl").add({"settings": {}})
