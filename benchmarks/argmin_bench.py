"""Nearest-code search: this library beside what people use today, on a CPU or a GPU.

    python benchmarks/argmin_bench.py --device cpu --out results/argmin-cpu
    python benchmarks/argmin_bench.py --device cuda --shapes 65536x1024x64 1048576x4096x128 --data gaussian offset-100

First the answers are held against float64 brute force (all rows, or a seeded part of at least 4,096 of them: the column
`checked_rows` of the JSON lines says how many), then the contenders are timed in turn, round after round. An exact
contender with one wrong index is reported as WRONG and not timed, and the exit status is 1. Classes of precision stand
apart, each in a section of the table.

A sample, to show the form (--shapes 16384x1024x64 --data offset-1000 --threads 1, on a machine busy with other work):

    contender      | class   | p50 ms |   p20 - p80 | / cdist | TFLOP/s | peak MiB | wrong % | unproved %
    cdist          | float32 |    193 |   192 - 209 |       1 |  0.0111 |       77 |  85.846 |
    addmm-chunked  | float32 |    115 |   115 - 158 |   0.596 |  0.0186 |        9 |  85.846 |
    faiss          | float32 |   88.8 | 84.3 - 90.5 |    0.46 |  0.0242 |       16 |  85.455 |
    gemm           | float32 |   52.2 |   49 - 54.4 |    0.27 |  0.0411 |       64 |         |
    ---------------+---------+--------+-------------+---------+---------+----------+---------+-----------
    torch          | exact   |    123 |   107 - 147 |   0.636 |  0.0175 |       16 |       0 |      0.043
    torch-prepared | exact   |   91.7 | 81.5 - 99.3 |   0.475 |  0.0234 |       13 |       0 |      0.043
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from baselines import CONTENDERS, Contender, Search
from rich.console import Console
from search_data import DATA_NAMES, SearchData, make_search_data
from search_report import Environment, Row, plot_times, print_table, write_json_lines
from search_timing import (
    GRAPH_ROWS,
    CudaEvents,
    Timer,
    WallClock,
    captured,
    host_memory_limit,
    is_out_of_memory,
    peak_mib,
    time_in_turn,
)
from search_verification import checked_rows, wrong_rows
from torch import Tensor

from vq_kernels import search_statistics
from vq_kernels.search.reference import brute_force_nearest
from vqae.runtime.errors import UsageError

Shape = tuple[int, int, int]
"""N, K, D."""

CPU_SHAPES = ("65536x1024x64", "65536x1024x512", "16384x8192x64", "256x512x512", "65536x512x8")
CUDA_SHAPES = (
    *("256x1024x512", "1024x1024x512", "65536x1024x64", "65536x8192x256", "65536x16384x256"),
    *("1048576x1024x8", "1048576x4096x32", "1048576x65536x32"),
    *("1048576x4096x64", "1048576x4096x128", "1048576x4096x256", "1048576x4096x512"),
)
QUICK_SHAPES = ("1000x128x16", "4096x256x64")

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CHECK_BUDGET = {"cpu": 4e9, "cuda": 4e11}  # float64 subtractions: seconds either way


@dataclass(frozen=True)
class Options:
    """Time the nearest-code search beside what people use today."""

    shapes: tuple[str, ...] = ()
    """NxKxD, any number of them; none: a table that fits the device."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """Of the vectors and of the codebook."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU where there is one."""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Names; those that cannot run here are listed with the reason."""
    data: tuple[str, ...] = ("gaussian",)
    """Data sets, by the names in search_data.py."""
    checkpoint: Path | None = None
    """A checkpoint of vqae.train, for --data trained."""
    quick: bool = False
    """Few rounds, and two small shapes where none are given."""
    rounds: int | None = None
    """How often each contender gets its turn; 10, or 3 with --quick."""
    threads: int | None = None
    """CPU threads; none: as many as PyTorch takes."""
    seed: int = 0
    """Of the data and of the choice of checked rows."""
    out: Path | None = None
    """A folder for results.jsonl, written as each shape is done, and times.png; none: the tables alone."""


@dataclass
class Entry:
    """A contender at one shape: what is known of it so far."""

    contender: Contender
    status: str = "ok"
    search: Search | None = None
    measured: dict[str, Any] = field(default_factory=dict)


def run(options: Options, console: Console) -> list[Row]:
    """Run the benchmark and print its tables as they come.

    Raises:
        ValueError: an option that cannot be used; says which.
    """
    device, shapes = check(options)
    if options.threads:
        torch.set_num_threads(options.threads)
    environment = Environment.here(device)
    console.print(f"{environment.device}; {environment.versions}; commit {environment.commit}", highlight=False)
    rows: list[Row] = []
    for shape in shapes:
        for name in options.data:
            rows += bench(options, shape, name, device, environment)
            if options.out:
                write_json_lines(rows, options.out / "results.jsonl")
            print_table(rows[-len(options.contenders) :], console)
    if options.out:
        plot_times(rows, options.out / "times.png")
    return rows


def check(options: Options) -> tuple[torch.device, list[Shape]]:
    """The device and the shapes that the options mean; the folder of --out is there afterwards.

    Raises:
        ValueError: an option that cannot be used; says which.
    """
    for name in options.contenders:
        if name not in CONTENDERS:
            raise ValueError(f"--contenders must be of {', '.join(CONTENDERS)}, got {name!r}")
    for name in options.data:
        if name not in DATA_NAMES:
            raise ValueError(f"--data must be of {', '.join(DATA_NAMES)}, got {name!r}")
    if "trained" in options.data and options.checkpoint is None:
        raise ValueError("--data trained needs --checkpoint FILE, got none")
    for option, count in (("--rounds", options.rounds), ("--threads", options.threads)):
        if count is not None and count < 1:
            raise ValueError(f"{option} must be at least 1, got {count}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be one that is there, got 'cuda', and PyTorch sees no GPU")
    defaults = QUICK_SHAPES if options.quick else CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    shapes = [parse_shape(text) for text in options.shapes or defaults]
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.jsonl").open("a").close()
        except OSError as error:
            raise ValueError(
                f"--out must be a folder that can be made and written to, got {str(options.out)!r}: {error.strerror}"
            ) from None
    return torch.device(device), shapes


def parse_shape(text: str) -> Shape:
    """(N, K, D) from "NxKxD".

    Raises:
        ValueError: the text is something else, or a size is below 1.
    """
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"--shapes must be NxKxD with sizes from 1 on, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def bench(options: Options, shape: Shape, name: str, device: torch.device, environment: Environment) -> list[Row]:
    """One row for each contender, at one shape, on one data set: verified, then timed, then weighed."""
    dtype = _DTYPES[options.dtype]
    data = make_search_data(name, *shape, dtype=dtype, device=device, seed=options.seed, checkpoint=options.checkpoint)
    entries = [Entry(CONTENDERS[contender]) for contender in options.contenders]
    verify(entries, data, checked_rows(*shape, budget=_CHECK_BUDGET[device.type], seed=options.seed).to(device))
    measure_times(entries, shape, device, rounds=options.rounds or (3 if options.quick else 10), quick=options.quick)
    for entry in entries:
        if entry.search is not None:
            entry.measured["peak_mib"] = measure_peak(entry, data, device)
    return [
        Row(
            op="nearest_code",
            contender=entry.contender.name,
            precision=entry.contender.precision_for(dtype),
            N=shape[0],
            K=shape[1],
            D=shape[2],
            dtype=options.dtype,
            data=name,
            status=entry.status,
            **vars(environment),
            **entry.measured,
        )
        for entry in entries
    ]


def verify(entries: list[Entry], data: SearchData, rows: Tensor) -> None:
    """Run every contender once and hold its indices against float64; one that cannot go on loses its search."""
    x, codebook = data
    sample = x[rows]
    reference = brute_force_nearest(sample, codebook)
    for entry in entries:
        contender = entry.contender
        obstacle = contender.obstacle(x.device.type, x.dtype)
        if obstacle:
            entry.status = obstacle
            continue
        entry.search, indices = attempt(entry, data)
        if indices is None or contender.is_ceiling:
            continue
        wrong = int(wrong_rows(sample, codebook, indices.to(x.device)[rows], reference).sum())
        entry.measured |= {"checked_rows": rows.numel(), "wrong_percent": 100 * wrong / rows.numel()}
        if contender.backend:
            statistics = search_statistics(x, codebook, backend=contender.backend)
            entry.measured["unproved_percent"] = 100 * (1 - statistics.certified / x.shape[0])
        if wrong and contender.precision == "exact":
            entry.status, entry.search = "WRONG", None


def attempt(entry: Entry, data: SearchData) -> tuple[Search | None, Tensor | None]:
    """Build a search and run it once; where that fails, only the entry's status says so."""
    try:
        search = entry.contender.build(*data)
        return search, search()
    except Exception as error:  # whatever a foreign package raises is a result of this benchmark
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        entry.status = "out of memory" if is_out_of_memory(error) else f"failed: {reason}"
        return None, None


def measure_times(entries: list[Entry], shape: Shape, device: torch.device, *, rounds: int, quick: bool) -> None:
    """Time the searches that are left, in turn, and write the quantiles to their entries."""
    timer: Timer = CudaEvents() if device.type == "cuda" else WallClock()
    calls: dict[str, Callable[[], object]] = {}
    for entry in entries:
        if entry.search is None:
            continue
        calls[entry.contender.name], entry.measured["timing"] = entry.search, timer.method
        if device.type == "cuda" and shape[0] <= GRAPH_ROWS:
            try:
                calls[entry.contender.name] = captured(entry.search)
                entry.measured["timing"] = "CUDA graph, L2 flushed"
            except RuntimeError:
                continue  # it waits for the GPU: timed as it is, and the row says so
    elapsed_ms = time_in_turn(calls, timer, rounds=rounds, burst_ms=50 if quick else 250)
    cdist_ms = float(np.median(elapsed_ms["cdist"])) if "cdist" in elapsed_ms else None
    for entry in entries:
        if entry.contender.name in elapsed_ms:
            p20, p50, p80 = (float(q) for q in np.quantile(elapsed_ms[entry.contender.name], (0.2, 0.5, 0.8)))
            entry.measured |= {"p20_ms": p20, "p50_ms": p50, "p80_ms": p80}
            entry.measured["tflops"] = 2e-9 * shape[0] * shape[1] * shape[2] / p50
            entry.measured["ratio_to_cdist"] = p50 / cdist_ms if cdist_ms else None


def measure_peak(entry: Entry, data: SearchData, device: torch.device) -> float | None:
    """The memory of one call; a bare product's includes the scores, which it keeps between calls."""
    assert entry.search is not None
    if entry.contender.is_ceiling:
        return peak_mib(lambda: entry.contender.build(*data)(), device)
    return peak_mib(entry.search, device)


def main() -> int:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    start = time.perf_counter()
    console = Console(width=None if sys.stdout.isatty() else 120)
    try:
        device, _ = check(options)
        if device.type == "cpu":
            with host_memory_limit():
                rows = run(options, console)
        else:
            rows = run(options, console)
    except (ValueError, UsageError) as error:
        print(f"argmin_bench.py: {error}", file=sys.stderr)
        return 2
    console.print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s", highlight=False)
    return 1 if any(row.status == "WRONG" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
