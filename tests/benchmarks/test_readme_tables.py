"""The README's tables are those that the committed results give."""

import readme_tables


def test_the_readme_is_up_to_date() -> None:
    text = (readme_tables.ROOT / "README.md").read_text()
    assert readme_tables.with_tables(text) == text


def test_a_changed_figure_would_be_seen() -> None:
    text = (readme_tables.ROOT / "README.md").read_text()
    assert readme_tables.main(["--check"]) == 0
    assert readme_tables.with_tables(text.replace("of it |", "of it, or so |")) == text
