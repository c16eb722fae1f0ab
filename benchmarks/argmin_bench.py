"""Compares the nearest-code search of this library with common alternatives, on a CPU or a GPU.

    python benchmarks/argmin_bench.py --device cpu --out results/argmin-cpu
    python benchmarks/argmin_bench.py --device cpu --small   # small searches, and the limits of their times
    python benchmarks/argmin_bench.py --device cuda --shapes 65536x1024x64 1048576x4096x128 --data gaussian offset-100

The contenders are this library, the alternatives, and bare matrix products. Their answers are first checked against a
float64 brute-force search, on all rows or on a random subset of at least 4,096. Then the contenders are timed in turn.
An exact contender with a wrong index is reported as WRONG and not timed, and the exit status is 1. A sample of the
output (--shapes 16384x1024x64 --data offset-1000):

    | contender      | class   | p50 ms | p20 - p80   | / cdist | TFLOP/s | peak MiB | wrong % | uncertified % |
    | cdist          | float32 | 193    | 192 - 209   | 1       | 0.0111  | 77       | 85.8    |               |
    | gemm           | float32 | 52.2   | 49 - 54.4   | 0.27    | 0.0411  | 64       |         |               |
    | torch          | exact   | 123    | 107 - 147   | 0.636   | 0.0175  | 16       | 0       | 0.043         |
    | torch-prepared | exact   | 91.7   | 81.5 - 99.3 | 0.475   | 0.0234  | 13       | 0       | 0.043         |
"""

import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import tyro

from benchmarks.baselines import CONTENDERS
from benchmarks.data import DATA_NAMES, make_search_data
from benchmarks.results import Row, aligned, append_row, environment, markdown
from benchmarks.search import Shape, bench, format_rows
from benchmarks.timing import host_memory_limit

SMALL_SHAPES = (
    *("1x1024x128", "600x256x32", "256x512x512", "256x512x64", "64x1024x64", "64x8192x32", "128x1024x8"),
    *("1024x1024x256", "4096x512x64"),
)
CPU_SHAPES = ("65536x1024x64", "65536x1024x512", "16384x8192x64", "65536x512x8", *SMALL_SHAPES)
CUDA_SHAPES = (
    *("256x1024x512", "1024x1024x512", "65536x1024x64", "65536x8192x256", "65536x16384x256"),
    *("1048576x1024x8", "1048576x4096x32", "1048576x65536x32"),
    *("1048576x4096x64", "1048576x4096x128", "1048576x4096x256", "1048576x4096x512"),
)
QUICK_SHAPES = ("1000x128x16", "4096x256x64")

_SMALL_CONTENDERS = ("cdist-gather", "llvm", "llvm-prepared")
# The most time of a small search, relative to cdist-gather: with few rows, and with more.
_FEW_ROWS = 64
_LIMITS = {"llvm": (1.0, 1.15), "llvm-prepared": (0.8, 0.95)}

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_CHECK_BUDGET = {"cpu": 4e9, "cuda": 4e11}  # float64 subtractions per check: seconds on either device


@dataclass(frozen=True)
class Options:
    """Compare the nearest-code search of this library with common alternatives."""

    shapes: tuple[str, ...] = ()
    """Sizes as NxKxD, any number of them. Default: a list that suits the device."""
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    """dtype of the vectors and of the codebook."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: a GPU if there is one."""
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    """Names of contenders. Those that cannot run here are listed with the reason."""
    data: tuple[str, ...] = ("gaussian",)
    """Names of data sets; see benchmarks/data.py."""
    small: bool = False
    """Compare small searches on the CPU with cdist, argmin and a gather, and print the ratios beside their limits."""
    quick: bool = False
    """Run fewer rounds, and only two small shapes unless --shapes is given."""
    rounds: int | None = None
    """Number of times that each contender is timed. Default: 10, or 3 with --quick."""
    seed: int = 0
    """Seed of the data and of the choice of checked rows."""
    out: Path | None = None
    """Folder for results.jsonl, written after each shape. Default: print the tables only."""


def run(options: Options) -> list[Row]:
    """Runs the benchmark and prints each table when it is done. Raises ValueError for an invalid option."""
    device, shapes = check(options)
    where = environment(device)
    print(f"{where['device']}; {where['versions']}; commit {where['commit']}\n", flush=True)
    rows: list[Row] = []
    for shape in shapes:
        for name in options.data:
            data = make_search_data(name, *shape, dtype=_DTYPES[options.dtype], device=device, seed=options.seed)
            found = bench(
                [CONTENDERS[contender] for contender in options.contenders],
                data,
                rounds=options.rounds or (3 if options.quick else 10),
                burst_ms=50 if options.quick else 250,
                budget=_CHECK_BUDGET[device.type],
                seed=options.seed,
            )
            found = [{**row, "data": name, **where} for row in found]
            rows += found
            if options.out:
                for row in found:
                    append_row(options.out / "results.jsonl", row)
            print(format_rows(found), flush=True)
    return rows


def format_limits(rows: Sequence[Row]) -> str:
    """The ratios of small searches to cdist-gather, and their limits."""
    cells = [["N x K x D", "data", "contender", "ratio", "limit", ""]]
    for row in rows:
        size = tuple(row[name] for name in "NKD")
        if row["contender"] in _LIMITS and row["status"] == "ok":
            others = (other for other in rows if tuple(other[name] for name in "NKD") == size)
            reference = next(o for o in others if (o["contender"], o["data"]) == ("cdist-gather", row["data"]))
            ratio, limit = row["p50_ms"] / reference["p50_ms"], _LIMITS[row["contender"]][row["N"] > _FEW_ROWS]
            shown = " x ".join(f"{n:,}" for n in size), row["data"], row["contender"], f"{ratio:.2f}", f"{limit:.2f}"
            cells.append([*shown, "" if ratio <= limit else "over"])
    return aligned(markdown(cells))


def check(options: Options) -> tuple[torch.device, list[Shape]]:
    """Checks the options, creates the folder of --out, and returns the device and the shapes.

    Raises ValueError for an invalid option.
    """
    for name in options.contenders:
        if name not in CONTENDERS:
            raise ValueError(f"--contenders must be of {', '.join(CONTENDERS)}, got {name!r}")
    for name in options.data:
        if name not in DATA_NAMES:
            raise ValueError(f"--data must be of {', '.join(DATA_NAMES)}, got {name!r}")
    if options.rounds is not None and options.rounds < 1:
        raise ValueError(f"--rounds must be at least 1, got {options.rounds}")
    device = options.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device must be available, got 'cuda', and PyTorch sees no GPU")
    defaults = QUICK_SHAPES if options.quick else CUDA_SHAPES if device == "cuda" else CPU_SHAPES
    shapes = [parse_shape(text) for text in options.shapes or defaults]
    if options.out:
        try:
            options.out.mkdir(parents=True, exist_ok=True)
            (options.out / "results.jsonl").write_text("")
        except OSError as error:
            raise ValueError(f"--out must be a writable folder, got {str(options.out)!r}: {error.strerror}") from None
    return torch.device(device), shapes


def parse_shape(text: str) -> Shape:
    """(N, K, D) from "NxKxD". Raises ValueError if the text is something else, or if a size is below 1."""
    parts = text.split("x")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) >= 1 for part in parts):
        raise ValueError(f"--shapes must be NxKxD with sizes of at least 1, got {text!r}")
    return int(parts[0]), int(parts[1]), int(parts[2])


def main() -> int:
    """Runs the command line and returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    if options.small:
        shapes, data = options.shapes or SMALL_SHAPES, ("gaussian", "offset-3")
        options = replace(options, device="cpu", shapes=shapes, contenders=_SMALL_CONTENDERS, data=data)
    start = time.perf_counter()
    try:
        device, _ = check(options)
        with host_memory_limit() if device.type == "cpu" else nullcontext():
            rows = run(options)
    except ValueError as error:
        print(f"argmin_bench.py: {error}", file=sys.stderr)
        return 2
    if options.small:
        print(format_limits(rows))
    print(f"{len(rows)} rows in {time.perf_counter() - start:.0f} s")
    return 1 if any(row["status"] == "WRONG" for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
