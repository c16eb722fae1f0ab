"""Result lines: on disk at once, never lost, and only taken as done where they come from the same place."""

import json
from pathlib import Path

import pytest
from gpu.results import NO_GPU, Results, make_header, read_lines, sources_digest

HEADER = {"gpu": "a", "sources": "1", "rehearsal": True, "commit": "c"}


def test_a_line_is_there_at_once_and_for_the_next_process(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "folder" / "search.jsonl"
    results = Results(file, HEADER)
    assert not file.exists()
    results.add(op="rate", value=1.23456789, text="x" * 100)
    assert [json.loads(text) for text in file.read_text().splitlines()] == results.lines
    assert capsys.readouterr().out == f"  op rate, value 1.235, text {'x' * 57}...\n"
    again = Results(file, {**HEADER, "commit": "another"})
    assert again.has(op="rate")
    assert not again.has(op="rate", value=2)
    assert next(again.matching(op="rate"))["commit"] == "c"


@pytest.mark.parametrize("entry", ["gpu", "sources", "rehearsal"])
def test_a_line_from_elsewhere_is_kept_but_not_done(tmp_path: Path, entry: str) -> None:
    file = tmp_path / "search.jsonl"
    Results(file, HEADER).add(op="rate")
    results = Results(file, {**HEADER, entry: "another"})
    assert not results.has(op="rate")
    results.add(op="rate")
    assert len(read_lines(file)) == 2


def test_a_line_that_was_cut_short_is_dropped(tmp_path: Path) -> None:
    file = tmp_path / "search.jsonl"
    Results(file, HEADER).add(op="rate")
    whole = file.read_text()
    file.write_text(whole + '{"op": "ra')
    results = Results(file, HEADER)
    results.add(op="copy")
    assert [line["op"] for line in read_lines(file)] == ["rate", "copy"]
    assert file.read_text().startswith(whole)


@pytest.mark.parametrize("text", ["{", "3", '"op"'])
def test_a_file_of_something_else_is_named_with_the_line(tmp_path: Path, text: str) -> None:
    file = tmp_path / "search.jsonl"
    file.write_text(f'{{"op": 1}}\n{text}\n{{"op": 2}}\n')
    with pytest.raises(ValueError, match=r"search\.jsonl must hold an object a line, line 2 is none"):
        read_lines(file)


def test_no_file_has_no_lines(tmp_path: Path) -> None:
    assert read_lines(tmp_path / "nothing.jsonl") == []


def test_a_header_says_where_a_line_comes_from() -> None:
    header = make_header(("vq_kernels/search",), None, rehearse=True)
    assert (header["gpu"], header["driver"], header["rehearsal"]) == (NO_GPU, "none", True)
    assert header["sources"] == sources_digest(("vq_kernels/search",)) != sources_digest(("vq_kernels/gradient",))
    assert set(header["peers"]) == {"flash-kmeans", "numpy", "torchvision"}
    assert make_header((), "named", rehearse=True)["commit"] == "named"


def test_a_machine_without_nvidia_smi_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    header = make_header((), None, rehearse=False)
    assert (header["gpu"], header["driver"], header["commit"]) == ("unknown GPU", "unknown", "unknown")
