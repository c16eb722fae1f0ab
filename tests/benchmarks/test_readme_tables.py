"""The tables of README.md and docs/explanations/learning.md are those that the committed results give."""

from pathlib import Path

import pytest
import readme_tables
from readme_tables import ROOT, TABLES, with_tables


@pytest.mark.parametrize("name", TABLES)
def test_a_file_is_up_to_date(name: str) -> None:
    text = (ROOT / name).read_text()
    assert with_tables(name, text) == text


def test_a_changed_figure_would_be_seen() -> None:
    text = (ROOT / "README.md").read_text()
    assert with_tables("README.md", text.replace("of it |", "of it, or so |")) == text


@pytest.mark.parametrize("name", TABLES)
def test_a_file_without_its_table_is_named(name: str) -> None:
    first = next(iter(TABLES[name]))
    text = (ROOT / name).read_text().replace(f"<!-- end {first} -->", "")
    with pytest.raises(SystemExit, match=f"{name} must hold <!-- begin {first} --> and <!-- end {first} -->"):
        with_tables(name, text)


def test_both_files_are_written_and_checked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in TABLES:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        text = (ROOT / name).read_text()
        (tmp_path / name).write_text(text.replace("-->\n", "-->\nold\n"))
    monkeypatch.setattr(readme_tables, "ROOT", tmp_path)
    assert readme_tables.main(["--check"]) == 1
    assert capsys.readouterr().out.count("differs from the results") == len(TABLES)
    assert readme_tables.main([]) == 0
    assert readme_tables.main(["--check"]) == 0
    assert "old\n|" not in (tmp_path / "README.md").read_text()
    assert capsys.readouterr().out.count("is up to date") == len(TABLES)
