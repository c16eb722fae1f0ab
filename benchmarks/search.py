"""Measures searches: verifies their indices, measures their time and memory, and formats the rows.

A row has these entries; what was not measured is None.

    op, contender, precision        "nearest_code", the name in `baselines.CONTENDERS`, the class of its arithmetic
    N, K, D, dtype, data            vectors, codes, dimensions; dtype of both; the data set
    status                          "ok", "WRONG" (an exact contender with a wrong index; it is not timed),
                                    "out of memory", or why it did not run
    p20_ms, p50_ms, p80_ms, timing  quantiles of the time of a call, and how it was timed
    ratio_to_cdist, tflops          p50 over cdist's; 2·N·K·D over p50, in 10^12 per second
    peak_mib                        the most memory held beyond the inputs, outputs included
    checked_rows, wrong_percent     rows compared with float64, and the share of them with a wrong index
    uncertified_percent             rows of this library's search that its scan did not certify
    device, versions, commit, date  the environment
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.baselines import Contender, Search
from benchmarks.data import SearchData
from benchmarks.results import Row, aligned, markdown, number
from benchmarks.timing import TIMING, captured, failure, peak_mib, quantiles, time_in_turn
from benchmarks.verification import checked_rows, wrong_rows
from vq_kernels import search_statistics
from vq_kernels.search.reference import brute_force_nearest

Shape = tuple[int, int, int]  # N, K, D

GRAPH_ROWS = (
    4096  # up to so many rows a CUDA call is timed as a graph's replay: launching it takes longer than its work
)
CLASSES = ("float32", "exact", "TF32", "16 bits")  # of precision, in the order in which tables show them
_MEASURED = (
    *("p20_ms", "p50_ms", "p80_ms", "timing", "ratio_to_cdist", "tflops", "peak_mib"),
    *("checked_rows", "wrong_percent", "uncertified_percent"),
)


@dataclass
class Entry:
    """A contender at one shape, and what is known of it so far."""

    contender: Contender
    status: str = "ok"
    search: Search | None = None
    measured: dict[str, Any] = field(default_factory=dict)


def bench(
    contenders: Sequence[Contender],
    data: SearchData,
    *,
    rounds: int,
    burst_ms: float,
    budget: float,
    seed: int = 0,
    graph: bool | None = None,
) -> list[Row]:
    """Verifies every contender and measures its time and memory. Returns a row for each, without data set and
    environment.

    `rounds` and `burst_ms` are those of `timing.time_in_turn`; `budget` and `seed` those of
    `verification.checked_rows`. With `graph`, CUDA calls are timed as replays of graphs; None: if there are at most
    `GRAPH_ROWS` rows.
    """
    (num_vectors, code_dim), num_codes = data.x.shape, data.codebook.shape[0]
    shape = (num_vectors, num_codes, code_dim)
    entries = [Entry(contender) for contender in contenders]
    _verify(entries, data, checked_rows(*shape, budget=budget, seed=seed).to(data.x.device))
    _time(entries, shape, data.x.device, rounds, burst_ms, num_vectors <= GRAPH_ROWS if graph is None else graph)
    for entry in entries:
        if entry.search is not None:
            # A bare product keeps its scores between calls, so it is built anew.
            call = (lambda entry=entry: entry.contender.build(*data)()) if entry.contender.is_product else entry.search
            entry.measured["peak_mib"] = peak_mib(call, data.x.device)
    size = dict(zip("NKD", shape, strict=True)) | {"dtype": str(data.x.dtype).removeprefix("torch.")}
    rows = []
    for entry in entries:
        name, precision = entry.contender.name, entry.contender.precision_for(data.x.dtype)
        row = {"op": "nearest_code", "contender": name, "precision": precision, **size, "status": entry.status}
        rows.append({**row, **dict.fromkeys(_MEASURED), **entry.measured})
    return rows


def _verify(entries: list[Entry], data: SearchData, rows: Tensor) -> None:
    """Runs every contender once and compares its indices with float64. One that fails keeps no search to time."""
    x, codebook = data
    sample = x[rows]
    reference = brute_force_nearest(sample, codebook)
    for entry in entries:
        contender = entry.contender
        obstacle = contender.obstacle(x.device.type, x.dtype)
        if obstacle:
            entry.status = obstacle
            continue
        try:
            search = contender.build(*data)
            indices = search()
        except Exception as error:  # other packages raise anything, and a failure is a result
            entry.status = failure(error)
            continue
        entry.search = search
        if contender.is_product:
            continue
        wrong = int(wrong_rows(sample, codebook, indices.to(x.device)[rows], reference).sum())
        entry.measured |= {"checked_rows": rows.numel(), "wrong_percent": 100 * wrong / rows.numel()}
        if contender.backend:
            certified = search_statistics(x, codebook, backend=contender.backend)[0]
            entry.measured["uncertified_percent"] = 100 * (1 - certified / x.shape[0])
        if wrong and contender.precision == "exact":
            entry.status, entry.search = "WRONG", None


def _time(entries: list[Entry], shape: Shape, device: torch.device, rounds: int, burst_ms: float, graph: bool) -> None:
    """Times the searches in turn and adds the quantiles to their entries."""
    calls: dict[str, Callable[[], object]] = {}
    for entry in entries:
        if entry.search is None:
            continue
        calls[entry.contender.name], entry.measured["timing"] = entry.search, TIMING[device.type]
        if device.type == "cuda" and graph:
            try:
                calls[entry.contender.name] = captured(entry.search)
                entry.measured["timing"] = "CUDA graph, L2 flushed"
            except RuntimeError:
                continue  # it waits for the GPU, so it is timed without a graph
    elapsed_ms = time_in_turn(calls, device, rounds=rounds, burst_ms=burst_ms)
    cdist_ms = quantiles(elapsed_ms["cdist"])["p50_ms"] if "cdist" in elapsed_ms else None
    for entry in entries:
        if entry.contender.name in elapsed_ms:
            found = quantiles(elapsed_ms[entry.contender.name])
            entry.measured |= found | {
                "tflops": 2e-9 * shape[0] * shape[1] * shape[2] / found["p50_ms"],
                "ratio_to_cdist": found["p50_ms"] / cdist_ms if cdist_ms else None,
            }


def format_rows(rows: Sequence[Row]) -> str:
    """The rows of one shape and data set as text: a table with a section per class, and what did not run."""
    first = rows[0]
    cells = [
        ["contender", "class", "p50 ms", "p20 - p80", "/ cdist", "TFLOP/s", "peak MiB", "wrong %", "uncertified %"]
    ]
    absent, section = [], ""
    for row in sorted(rows, key=lambda row: CLASSES.index(row["precision"])):
        if row["status"] != "ok" and row["wrong_percent"] is None and row["status"] != "out of memory":
            absent.append(f"{row['contender']} ({row['status']})")
            continue
        if section not in ("", row["precision"]):
            cells.append(["---"] * len(cells[0]))
        section = row["precision"]
        times = f"{number(row['p20_ms'])} - {number(row['p80_ms'])}" if row["status"] == "ok" else ""
        figures = [number(row[name]) for name in ("ratio_to_cdist", "tflops", "peak_mib")]
        shares = [number(row[name]) for name in ("wrong_percent", "uncertified_percent")]
        shown = number(row["p50_ms"]) if row["status"] == "ok" else row["status"]
        cells.append([row["contender"], section, shown, times, *figures, *shares])
    title = f"{first['N']:,} x {first['K']:,} x {first['D']}, {first['dtype']}, {first['data']}"
    return f"{title}\n{aligned(markdown(cells))}\n" + (f"not run: {', '.join(absent)}\n" if absent else "")
