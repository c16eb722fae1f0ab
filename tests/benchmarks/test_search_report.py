"""The rows of a search benchmark as a table and as a plot: classes of precision stand apart."""

from pathlib import Path
from typing import get_args

import pytest
import search_report
from baselines import CONTENDERS, Precision
from matplotlib.figure import Figure
from rich.console import Console
from search_report import CLASSES, Row, plot_times, print_table

ORDER = ("cdist", "gemm-16bit", "torch", "gemm-tf32", "gemm", "cuvs", "flashlib")


def row(contender: str, num_rows: int = 100, status: str = "ok") -> Row:
    return Row(
        op="nearest_code", contender=contender, precision=CONTENDERS[contender].precision, N=num_rows, K=40, D=8,
        dtype="float32", data="gaussian", status=status, device="", versions="", commit="", date="",
        p50_ms=1.0 if status == "ok" else None, wrong_percent=None if status == "not installed" else 0.0,
    )  # fmt: skip


def printed(rows: list[Row]) -> list[str]:
    console = Console(width=120)
    with console.capture() as capture:
        print_table(rows, console)
    return capture.get().splitlines()


def test_every_class_has_its_place_and_its_style() -> None:
    assert {*CLASSES} == {*get_args(Precision)} == {*search_report._STYLES}
    assert len(CLASSES) == len({*search_report._STYLES.values()})


def test_each_class_is_a_section() -> None:
    body = printed([row(name) for name in ORDER])[4:-1]
    cells = [line.strip("│├┤").split()[0::2][:1] if "│" in line else None for line in body]
    assert cells == [
        ["cdist"], ["gemm"], None, ["torch"], None, ["cuvs"], None, ["gemm-tf32"], ["flashlib"], None, ["gemm-16bit"],
    ]  # fmt: skip


@pytest.mark.parametrize("absent", ["cdist", "torch", "gemm-16bit"])
def test_what_did_not_run_leaves_no_empty_section(absent: str) -> None:
    rows = [row(name, status="not installed" if name == absent else "ok") for name in ("cdist", "torch", "gemm-16bit")]
    lines = printed(rows)
    assert sum("├" in line for line in lines) == 1
    assert lines[-2] == f"not run: {absent} (not installed)"


def test_a_contender_that_is_wrong_stands_in_its_class() -> None:
    text = "\n".join(printed([row("torch", status="WRONG"), row("gemm-tf32"), row("cdist")]))
    assert text.index("cdist") < text.index("WRONG") < text.index("gemm-tf32")


def test_a_line_of_the_plot_shows_its_class(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: figures.append(figure))
    plot_times([row(name, num_rows) for num_rows in (100, 200) for name in ORDER], tmp_path / "times.png")
    (axes,) = figures[0].axes
    labels = [text.get_text() for text in axes.get_legend().get_texts()]
    assert labels == [
        "float32: cdist", "float32: gemm", "exact: torch", "3xTF32: cuvs", "TF32: gemm-tf32", "TF32: flashlib",
        "16 bits: gemm-16bit",
    ]  # fmt: skip
    styles = {label: (line.get_linestyle(), line.get_marker()) for label, line in zip(labels, axes.lines, strict=True)}
    assert styles["float32: cdist"] == styles["float32: gemm"]
    assert len({*styles.values()}) == len(CLASSES)
