"""Millions of rows against float64 brute force: not one index may differ.

    python benchmarks/exactness_soak.py                        # 10^7 rows of the PyTorch backend, about 10 minutes
    python benchmarks/exactness_soak.py --rows 200000 --seed 1

The rows are spread evenly over the data sets of search_data.py and over `CASES`: sizes small enough that brute force
stays affordable, odd ones among them, in all dtypes. Every block draws its own codebook, from the seed and the block's
number. A wrong index is one that `search_verification.wrong_rows` calls so: ties within 1e-13 are no error, identical
codes count only by their lowest index. The last line on standard output is a JSON object; the exit status is 1 if any
index was wrong.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from search_data import DRAWN_DATA, make_search_data
from search_report import Environment
from search_verification import wrong_rows

from vq_kernels import nearest_code, search_statistics

BLOCK_ROWS = 1 << 14
"""Rows to a codebook."""

CASES: tuple[tuple[int, int, torch.dtype, torch.dtype], ...] = (
    (512, 8, torch.float32, torch.float32),
    (256, 32, torch.float32, torch.float32),
    (128, 64, torch.float32, torch.float32),
    (1000, 7, torch.float32, torch.float32),
    (4096, 4, torch.float32, torch.float32),
    (63, 100, torch.float32, torch.float32),
    (32, 512, torch.float32, torch.float32),
    (512, 8, torch.float16, torch.float16),
    (256, 32, torch.bfloat16, torch.float32),
    (513, 3, torch.float64, torch.float64),
)
"""(K, D, dtype of x, dtype of the codebook); blocks take them in turn."""


@dataclass(frozen=True)
class Options:
    """Hold millions of indices against float64 brute force."""

    rows: int = 10_000_000
    """How many in all, at least; every data set gets its part."""
    seed: int = 0
    """Of all data."""
    backend: Literal["torch", "triton"] = "torch"
    """The backend that answers."""
    device: str = "cpu"
    """Where both sides compute."""
    threads: int | None = None
    """CPU threads; none: as many as PyTorch takes."""


@dataclass
class Count:
    """What was found on one data set, in rows."""

    rows: int = 0
    wrong: int = 0
    proved: int = 0
    resolved: int = 0
    drained: int = 0


def soak(options: Options) -> dict[str, Count]:
    """Search, check and count; a line of progress on standard error for every data set.

    Raises:
        ValueError: fewer rows than data sets.
    """
    if options.rows < len(DRAWN_DATA):
        raise ValueError(f"--rows must be at least {len(DRAWN_DATA)}, one for each data set, got {options.rows}")
    rows_each = -(-options.rows // len(DRAWN_DATA))
    counts = {name: Count() for name in DRAWN_DATA}
    for name, count in counts.items():
        start = time.perf_counter()
        for number, rows in enumerate(_blocks(rows_each)):
            _soak_block(options, name, number, rows, count)
        elapsed = time.perf_counter() - start
        print(f"{name}: {count.rows:,} rows, {count.wrong} wrong, {elapsed:.0f} s", file=sys.stderr, flush=True)
    return counts


def _blocks(rows: int) -> Iterator[int]:
    """The sizes of the blocks: full ones, then the rest; at least one for every case where there are rows enough."""
    size = max(1, min(BLOCK_ROWS, rows // len(CASES)))
    for start in range(0, rows, size):
        yield min(size, rows - start)


def _soak_block(options: Options, name: str, number: int, rows: int, count: Count) -> None:
    """Search one block of `rows` rows and add what was found to `count`."""
    num_codes, code_dim, x_dtype, codebook_dtype = CASES[number % len(CASES)]
    seed = options.seed * 1_000_003 + number
    # Drawn in the codebook's dtype, so that twins differ in its last bit; x is then rounded to its own.
    x, codebook = make_search_data(
        name, rows, num_codes, code_dim, dtype=codebook_dtype, device=options.device, seed=seed
    )
    x = x.to(x_dtype)
    indices = nearest_code(x, codebook, backend=options.backend).indices
    statistics = search_statistics(x, codebook, backend=options.backend)
    count.rows += rows
    count.wrong += int(wrong_rows(x, codebook, indices).sum())
    count.proved += statistics.certified
    count.resolved += statistics.reranked
    count.drained += statistics.exhaustive


def main() -> int:
    """The command line."""
    options = tyro.cli(Options, description=__doc__)
    if options.threads:
        torch.set_num_threads(options.threads)
    start = time.perf_counter()
    try:
        counts = soak(options)
    except ValueError as error:
        print(f"exactness_soak.py: {error}", file=sys.stderr)
        return 2
    wrong = sum(count.wrong for count in counts.values())
    report = {
        "rows": sum(count.rows for count in counts.values()),
        "wrong": wrong,
        "seed": options.seed,
        "backend": options.backend,
        "seconds": round(time.perf_counter() - start, 1),
        "data": {name: dataclasses.asdict(count) for name, count in counts.items()},
        **vars(Environment.here(torch.device(options.device))),
    }
    print(json.dumps(report))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
