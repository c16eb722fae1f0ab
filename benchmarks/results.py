"""Result files: JSON lines, each with the environment that it was measured in. Markdown tables of them."""

import datetime
import importlib.metadata
import json
import platform
import subprocess
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from vqae.runtime.errors import UsageError

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

Row = dict[str, Any]  # one line of a file

_PACKAGES = ("torch", "triton", "llvmlite", "faiss-cpu", "scikit-learn", "flash-kmeans", "vector-quantize-pytorch")


def environment(device: torch.device) -> dict[str, str]:
    """Device, versions, commit and date: the part of a row that says where it comes from."""
    versions = [f"Python {platform.python_version()}"]
    for package in _PACKAGES:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    date = datetime.date.today().isoformat()
    return {"device": _device_name(device), "versions": ", ".join(versions), "commit": _commit(), "date": date}


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    information = Path("/proc/cpuinfo")
    if information.exists():
        named = (line for line in information.read_text().splitlines() if line.startswith("model name"))
        model = next(named, f": {model}").partition(":")[2].strip()
    return f"{model}, {torch.get_num_threads()} threads"


def _commit() -> str:
    """The commit of the checkout, with "-dirty" if files differ from it; "unknown" outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def read_rows(file: Path) -> list[Row]:
    """The rows of a file; none if it does not exist. Raises UsageError if a line is no JSON object."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UsageError(f"{file} must hold a JSON object per line: {error}") from None
    if not all(isinstance(row, dict) for row in rows):
        raise UsageError(f"{file} must hold a JSON object per line")
    return rows


def append_row(file: Path, row: Row) -> None:
    """Appends a row, in one write. Creates the file and its folder. Raises UsageError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
    except OSError as error:
        raise UsageError(f"{file} cannot be written: {error.strerror}") from None


def markdown(rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table. The first row holds the headings."""
    first, *others = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([first, "|---" * (first.count("|") - 1) + "|", *others])


def aligned(table: str) -> str:
    """A Markdown table with its cells padded, for a terminal."""
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "| "
        + " | ".join(
            cell.ljust(width, cell[0] if cell == "---" else " ") for cell, width in zip(row, widths, strict=True)
        )
        + " |"
        for row in rows
    )


def number(value: float | None) -> str:
    """Three digits; empty for None."""
    return "" if value is None else f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def is_finished(file: Path, piece: Row, settings: dict[str, Any]) -> bool:
    """Whether a file holds a row for a piece of work, so that the work can resume where it stopped.

    `piece` has the entries that name it, such as a method and a seed; `settings` is what it would be made with now.
    Raises UsageError if the row's "settings" differ, or if the file cannot be read.
    """
    for row in read_rows(file):
        if all(row.get(name) == value for name, value in piece.items()):
            before = row["settings"]
            changed = [name for name in {**before, **settings} if before.get(name) != settings.get(name)]
            differences = [f"{name} was {before.get(name)}, now {settings.get(name)}" for name in changed]
            if differences:
                raise UsageError(
                    f"{file} holds {', '.join(f'{name} {value}' for name, value in piece.items())} with other settings "
                    f"({', '.join(differences)}): give another --out, or remove the line"
                )
            return True
    return False
