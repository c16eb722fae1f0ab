"""Compares millions of indices with float64 brute force. None may differ.

    python benchmarks/exactness.py                        # 10^7 rows on the CPU, about 10 minutes
    python benchmarks/exactness.py --backend torch --rows 1000000

The rows are spread evenly over the data sets of data.py and over `CASES`: sizes for which brute force is affordable,
some of them odd, in all dtypes. Each block has its own codebook, drawn from the seed and the block's number. For
distances that agree within 1e-13, either index is right. Of identical codes, only the lowest index is right. The exit
status is 1 if any index is wrong. The last line of standard output is a JSON object, such as

    {"rows": 10000000, "wrong": 0, "seed": 0, "backend": "auto", "seconds": 246.8, "data": {...}, "device": ...}
"""

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import tyro

from benchmarks.data import DATA_NAMES, make_search_data
from benchmarks.results import environment
from benchmarks.verification import wrong_rows
from vq_kernels.search.api import nearest_code_op
from vq_kernels.search.backend import Backend

_F64, _F32, _F16, _BF16 = torch.float64, torch.float32, torch.float16, torch.bfloat16
CASES: tuple[tuple[int, int, torch.dtype, torch.dtype], ...] = (
    *((512, 8, _F32, _F32), (256, 32, _F32, _F32), (128, 64, _F32, _F32), (1000, 7, _F32, _F32)),
    *((4096, 4, _F32, _F32), (63, 100, _F32, _F32), (32, 512, _F32, _F32)),
    *((512, 8, _F16, _F16), (256, 32, _BF16, _F32)),
    (513, 3, _F64, _F64),  # not by Triton, which takes no float64
)
"""(K, D, dtype of x, dtype of the codebook). Blocks take them in turn."""

_BLOCK_ROWS = {"cpu": 1 << 14, "cuda": 1 << 20}
STEPS = ("certified", "reranked", "exhaustive")


@dataclass(frozen=True)
class Options:
    """Compare millions of indices with float64 brute force."""

    rows: int = 10_000_000
    """Rows in all, at least. Every data set gets an equal part."""
    seed: int = 0
    """Seed of the data."""
    backend: Backend = "auto"
    """The backend to check. "auto" is LLVM on the CPU, and PyTorch for float64."""
    device: str = "cpu"
    """The device of both sides."""
    rows_per_search: int | None = None
    """Most rows of a search. Default: 2^14 on a CPU, 2^20 on a GPU."""


def soak(options: Options) -> dict[str, dict[str, int]]:
    """Searches, checks and counts. Prints a line to standard error for each data set.

    Returns, for each data set: rows, wrong, and how many rows were certified, reranked and searched exhaustively.
    """
    rows_each = -(-options.rows // len(DATA_NAMES))
    most = options.rows_per_search or _BLOCK_ROWS[torch.device(options.device).type]
    counts = {name: dict.fromkeys(("rows", "wrong", *STEPS), 0) for name in DATA_NAMES}
    for name, count in counts.items():
        start = time.perf_counter()
        for number, rows in enumerate(_blocks(rows_each, most)):
            _soak_block(options, name, number, rows, count)
        elapsed = time.perf_counter() - start
        print(f"{name}: {count['rows']:,} rows, {count['wrong']} wrong, {elapsed:.0f} s", file=sys.stderr, flush=True)
    return counts


def _blocks(rows: int, most: int) -> Iterator[int]:
    """The sizes of the blocks, of which there is at least one for each case if there are enough rows."""
    size = max(1, min(most, rows // len(CASES)))
    for start in range(0, rows, size):
        yield min(size, rows - start)


def _soak_block(options: Options, name: str, number: int, rows: int, count: dict[str, int]) -> None:
    """Searches one block of rows and adds what it finds to `count`."""
    cases = [case for case in CASES if options.backend in ("auto", "torch") or torch.float64 not in case]
    num_codes, code_dim, x_dtype, codebook_dtype = cases[number % len(cases)]
    # Drawn in the codebook's dtype, so that near-duplicates differ in its last bit; then x is rounded to its own.
    x, codebook = make_search_data(
        name, rows, num_codes, code_dim, dtype=codebook_dtype, device=options.device,
        seed=options.seed * 1_000_003 + number, draw_on_device=True,
    )  # fmt: skip
    x = x.to(x_dtype)
    indices, _, _, statistics = nearest_code_op(x, codebook, [], options.backend)
    count["rows"] += rows
    count["wrong"] += int(wrong_rows(x, codebook, indices).sum())
    for step, found in zip(STEPS, statistics.tolist(), strict=True):
        count[step] += found


def main() -> int:
    """Runs the command line and returns the exit status."""
    options = tyro.cli(Options, description=__doc__)
    start = time.perf_counter()
    counts = soak(options)
    totals = {key: sum(count[key] for count in counts.values()) for key in ("rows", "wrong")}
    settings = {name: getattr(options, name) for name in ("rows_per_search", "seed", "backend")}
    seconds = round(time.perf_counter() - start, 1)
    report = {**totals, **settings, "seconds": seconds, "data": counts, **environment(torch.device(options.device))}
    print(json.dumps(report))
    return 1 if totals["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
