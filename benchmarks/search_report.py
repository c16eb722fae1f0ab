"""The rows of a search benchmark: what is in one, and how they are shown (a table, JSON lines, a plot)."""

import dataclasses
import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vqae.training.checkpoint import atomic_write

_PACKAGES = ("torch", "triton", "faiss-cpu", "flash-kmeans", "flashlib", "cuvs-cu12", "pykeops")

CLASSES = ("float32", "exact", "3xTF32", "TF32", "16 bits")
"""The classes of precision, in the order in which they are shown."""

# Of a class in the plot: line, marker.
_STYLES = {
    "float32": ("-", "o"),
    "exact": ("-", "D"),
    "3xTF32": ("-.", "v"),
    "TF32": ("--", "s"),
    "16 bits": (":", "^"),
}


@dataclass(frozen=True)
class Environment:
    """Where and with what a run was made."""

    device: str
    versions: str
    commit: str
    date: str

    @classmethod
    def here(cls, device: torch.device) -> "Environment":
        """The environment of this process."""
        return cls(_device_name(device), _versions(), _commit(), datetime.date.today().isoformat())


@dataclass(frozen=True)
class Row:
    """One contender at one shape on one data set. Where status is not "ok", what was not measured is None.

    Attributes:
        op: what was done.
        contender: its name in `baselines.CONTENDERS`.
        precision: the class of its arithmetic, one of CLASSES.
        N, K, D: vectors, codes, dimensions.
        dtype: of x and of the codebook.
        data: the data set's name in `search_data.DATA_NAMES`.
        status: "ok", "WRONG" (an exact contender that is not; it is not timed), "out of memory", "not installed",
            or what else was in the way.
        p20_ms, p50_ms, p80_ms: quantiles of the time of a call.
        timing: how it was timed.
        ratio_to_cdist: p50 over that of cdist.
        tflops: 2·N·K·D over p50, in 10^12 a second.
        peak_mib: the most memory held beyond the inputs, outputs included.
        checked_rows: how many rows were held against float64.
        wrong_percent: the share of these with another index than float64's.
        unproved_percent: the share of all rows that this library's first scan did not prove.
        device, versions, commit, date: the environment.
    """

    op: str
    contender: str
    precision: str
    N: int
    K: int
    D: int
    dtype: str
    data: str
    status: str
    device: str
    versions: str
    commit: str
    date: str
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    timing: str | None = None
    ratio_to_cdist: float | None = None
    tflops: float | None = None
    peak_mib: float | None = None
    checked_rows: int | None = None
    wrong_percent: float | None = None
    unproved_percent: float | None = None


def print_table(rows: Sequence[Row], console: Console) -> None:
    """Print the rows of one shape and data set, a section a class; what cannot run here is named below the table."""
    first = rows[0]
    table = Table(title=f"{first.N:,} x {first.K:,} x {first.D}, {first.dtype}, {first.data}", title_justify="left")
    table.add_column("contender", no_wrap=True)
    table.add_column("class", no_wrap=True)
    for heading in ("p50 ms", "p20 - p80", "/ cdist", "TFLOP/s", "peak MiB", "wrong %", "unproved %"):
        table.add_column(heading, justify="right", no_wrap=True)
    absent = []
    section = None
    for row in sorted(rows, key=_class_place):
        if section not in (None, row.precision):
            table.add_section()  # nothing where the last section is empty
        section = row.precision
        if row.status == "ok":
            table.add_row(*_cells(row), style="bold" if row.precision == "exact" else None)
        elif row.wrong_percent is not None or row.status == "out of memory":
            cells = (row.contender, row.precision, row.status, "", "", "", "", _percent(row.wrong_percent), "")
            table.add_row(*cells, style="red")
        else:
            absent.append(f"{row.contender} ({row.status})")
    console.print(table)
    if absent:
        console.print(f"not run: {', '.join(absent)}\n", highlight=False)


def _cells(row: Row) -> tuple[str, ...]:
    return (
        row.contender,
        row.precision,
        _number(row.p50_ms),
        f"{_number(row.p20_ms)} - {_number(row.p80_ms)}",
        _number(row.ratio_to_cdist),
        _number(row.tflops),
        "" if row.peak_mib is None else f"{row.peak_mib:.0f}",
        _percent(row.wrong_percent),
        _percent(row.unproved_percent),
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}" if value < 1000 else f"{value:.0f}"


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}" if value else "0"


def _class_place(row: Row) -> int:
    return CLASSES.index(row.precision)


def write_json_lines(rows: Iterable[Row], file: Path) -> None:
    """Let the file hold one JSON object a row; it is whole at every moment."""
    atomic_write(file, "".join(f"{json.dumps(dataclasses.asdict(row))}\n" for row in rows).encode())


def plot_times(rows: Iterable[Row], file: Path) -> None:
    """Draw the time against N·K, a line a contender, marked by its class, a panel for each D and data set."""
    panels: dict[tuple[str, int], dict[tuple[str, str], list[tuple[int, float]]]] = {}
    for row in sorted(rows, key=_class_place):
        if row.p50_ms is not None:
            lines = panels.setdefault((row.data, row.D), {})
            lines.setdefault((row.precision, row.contender), []).append((row.N * row.K, row.p50_ms))
    if not panels:
        return
    figure = Figure(figsize=(6.0 * len(panels), 5.0), layout="constrained")
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, ((data, code_dim), lines) in zip(all_axes, panels.items(), strict=True):
        for (precision, contender), points in lines.items():
            sizes, times = zip(*sorted(points), strict=True)
            line_style, marker = _STYLES[precision]
            axes.plot(
                sizes, times, linestyle=line_style, marker=marker, label=f"{precision}: {contender}",
                linewidth=2.5 if precision == "exact" else 1.0,
            )  # fmt: skip
        axes.set(xscale="log", yscale="log", xlabel="N·K", ylabel="ms", title=f"D = {code_dim}, {data}")
        axes.legend(fontsize="x-small")
    figure.savefig(file, dpi=150)


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        named = (line for line in information.read_text().splitlines() if line.startswith("model name"))
        model = next(named, f": {model}").partition(":")[2].strip()
    return f"{model}, {torch.get_num_threads()} threads"


def _versions() -> str:
    found = []
    for package in _PACKAGES:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([f"Python {platform.python_version()}", *found])


def _commit() -> str:
    """The commit of the checkout, with "-dirty" where files differ from it; "unknown" outside one."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
