"""The measured lines that the tables and the plots show: those of one GPU, in the folder that is named after it.

Lines of a rehearsal are no results, and of several lines of one thing the last counts. Needs no package.
"""

import re
from collections.abc import Iterable
from typing import Any

from gpu.floors import Shape
from gpu.results import ROOT, Line, read_lines

RESULTS = ROOT / "benchmarks" / "results"
PREDICTIONS = RESULTS / "predictions.jsonl"
TRAINING_PREDICTIONS = RESULTS / "training_predictions.jsonl"

GPUS = ("h200", "h100")
"""The folders to look into, the one that the bars are for first. Figures of several GPUs are never mixed."""

SIZE = ("N", "K", "D")


def folder_name(gpu: str) -> str:
    """The folder of a GPU's results: "NVIDIA H100 80GB HBM3" -> "h100"."""
    name = re.search(r"[A-Z]+[0-9]+[A-Z]*", gpu.removeprefix("NVIDIA "))
    return name[0].lower() if name else re.sub(r"\W+", "-", gpu.lower()).strip("-")


def measured_gpu() -> str:
    """The folder that the tables are made of; the first where nothing has been measured."""
    return next((name for name in GPUS if any(_lines_of(name, file.stem) for file in _files(name))), GPUS[0])


def results(stage: str, op: str | None = None) -> list[Line]:
    """The measured lines in a stage's file, of one op where it is named."""
    return [line for line in _lines_of(measured_gpu(), stage) if op is None or line["op"] == op]


def _files(name: str) -> list[Any]:
    return sorted((RESULTS / name).glob("*.jsonl"))


def _lines_of(name: str, stage: str) -> list[Line]:
    lines = read_lines(RESULTS / name / f"{stage}.jsonl")
    return [line for line in lines if line.get("rehearsal") is False and folder_name(line["gpu"]) == name]


def latest(lines: Iterable[Line], *names: str) -> dict[tuple[Any, ...], Line]:
    """The last line for each combination of these entries."""
    return {tuple(line.get(name) for name in names): line for line in lines}


def searches() -> dict[tuple[str, Shape], Line]:
    """The timed searches of float32 normal data, by contender and shape."""
    lines = (line for line in results("search", "nearest_code") if line["status"] == "ok")
    usual = (line for line in lines if (line["dtype"], line["data"]) == ("float32", "gaussian"))
    return {(key[0], (key[1], key[2], key[3])): line for key, line in latest(usual, "contender", *SIZE).items()}


def flash_kmeans(found: dict[tuple[str, Shape], Line], shape: Shape) -> Line | None:
    """flash-kmeans at its best: it computes the rows' norms in plain PyTorch, unless it is given them."""
    lines = [found[name, shape] for name in ("flash-kmeans", "flash-kmeans-norms") if (name, shape) in found]
    return min(lines, key=lambda line: float(line["p50_ms"]), default=None)


def replays() -> dict[tuple[str, Shape], Line]:
    """The replays of CUDA graphs, by contender and shape."""
    lines = latest(results("search", "replay"), "contender", *SIZE)
    return {(key[0], (key[1], key[2], key[3])): line for key, line in lines.items()}


def of_one_source(lines: list[Line]) -> list[Line]:
    """Those that were made of the same sources as the last one."""
    return [line for line in lines if line["sources"] == lines[-1]["sources"]]
