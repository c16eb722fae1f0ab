"""What the searches should take on an H200, said before one was run: the lines of results/predictions.jsonl.

    python benchmarks/kernel_report.py --arch 90 --only _scan_kernel > compiled.jsonl
    PYTHONPATH=.:benchmarks python -m gpu.predict compiled.jsonl > benchmarks/results/predictions.jsonl

The model, in clocks of one multiprocessor for one tile of BLOCK_N x BLOCK_K scores:

    matrix     BLOCK_N BLOCK_K D / 2048     16-bit multiply-adds at the published rate
    epilogue   BLOCK_N BLOCK_K i / 64       i ALU instructions a score, counted in the compiled loop
    port       bytes / 64                   bytes of codes (and of x', where it is not resident) from L2

`low` takes the greatest of the three: everything overlaps. `high` takes matrix + epilogue where only one program fits a
multiprocessor, so that nothing need overlap them, and an L2 cache that gives 5.5 TB/s in all, which is an assumption:
its rate is not published. To both come the rest: 2 µs (assumed) for each launch, x' stored and read, results written,
and 5 % of the rows (assumed) decided in float64.
"""

import json
import sys
from pathlib import Path

import torch

from gpu.floors import PUBLISHED, Shape
from gpu.results import Line, make_header, read_lines
from vq_kernels.search.triton.common import ceil_div
from vq_kernels.search.triton.plan import DeviceProperties, ScanConfig, SearchPlan, pick_config, plan_search, row_pitch

SHAPES: tuple[Shape, ...] = (
    (256, 512, 512), (256, 1_024, 512), (1_024, 1_024, 512), (65_536, 1_024, 64), (65_536, 8_192, 256),
    (65_536, 16_384, 256), (1_048_576, 1_024, 8), (1_048_576, 4_096, 32), (1_048_576, 65_536, 32),
    (1_048_576, 4_096, 64), (1_048_576, 4_096, 128), (1_048_576, 4_096, 256), (1_048_576, 4_096, 512),
)  # fmt: skip
MULTIPROCESSORS = 132
CLOCK_GHZ = 1.83
"""On which the published matrix rate rests: 132 multiprocessors times 4,096 operations a clock."""

H200 = DeviceProperties((9, 0), MULTIPROCESSORS)
_REGISTERS, _SHARED_BYTES = 65_536, 227 * 1024  # of a multiprocessor
_L2_TBS = 5.5
_LAUNCH_US = 2.0
_UNPROVED = 0.05
_CANDIDATES = 4
_PREPARE_LAUNCHES = 5  # 3 kernels, the fills of their maxima and of the statistics
_PART_LAUNCHES = 4  # the counters' fill, scan, resolve, drain
MADE = ("triton", "commit", "sources", "date")


def compiled(lines: list[Line], config: ScanConfig, d: int, split: bool) -> Line:
    """What the compiler made of the exact float32 scan with this configuration, for codes as long or nearly so."""
    found = []
    for line in lines:
        words = line["config"].split()
        if words[0] != config.name or "float32" not in words or {"fast", "unaligned", "transposed"} & {*words}:
            continue
        width = int(words[1].removeprefix("D="))
        same = (config.columns(width) == config.columns(d), ("split" in words) == split)
        found.append((same, -abs(width - d), line))
    return max(found, key=lambda one: one[:2])[2]


def predict(shape: Shape, lines: list[Line]) -> Line:
    """The line of one shape."""
    n, k, d = shape
    config = pick_config(n, k, d, torch.float32, H200)
    plan = plan_search(n, k, d, config, H200)
    made = compiled(lines, config, d, plan.splits > 1)
    sharing = programs_a_multiprocessor(config, made)
    columns = ceil_div(row_pitch(d), config.columns(d)) * config.columns(d)
    scores = config.block_n * config.block_k
    matrix = scores * columns / 2048
    epilogue = scores * made["instructions_per_element"] / 64
    l2_bytes = 2 * columns * (config.block_k + (0 if config.resident else config.block_n))
    tiles = _tiles_in_turn(n, plan, sharing)
    clock_ms = 1e-6 / CLOCK_GHZ
    rest_ms = _rest_ms(shape, plan)
    overlapped = max(matrix, epilogue, l2_bytes / 64)
    in_turn = overlapped if sharing > 1 else max(matrix + epilogue, overlapped)
    l2_ms = 1e-9 * l2_bytes * ceil_div(n, config.block_n) * ceil_div(k, config.block_k) / _L2_TBS
    return {
        "N": n, "K": k, "D": d, "config": config.name, "splits": plan.splits, "launches": launches(n, plan),
        "instructions_per_score": made["instructions_per_element"], "programs_a_multiprocessor": sharing,
        "matrix_ms": tiles * matrix * clock_ms, "epilogue_ms": tiles * epilogue * clock_ms, "l2_ms": l2_ms,
        "rest_ms": rest_ms, "low_ms": tiles * overlapped * clock_ms + rest_ms,
        "high_ms": max(tiles * in_turn * clock_ms, l2_ms) + rest_ms,
    }  # fmt: skip


def programs_a_multiprocessor(config: ScanConfig, made: Line) -> int:
    """How many programs its registers and its shared memory hold."""
    registers: int = ceil_div(made["registers"], 8) * 8 * 32 * config.num_warps
    shared_bytes: int = max(made["shared_bytes"], 1)
    return max(1, min(_REGISTERS // registers, _SHARED_BYTES // shared_bytes))


def launches(n: int, plan: SearchPlan) -> int:
    """Kernels and fills of a search whose codebook is not prepared."""
    part = _PART_LAUNCHES + (not plan.config.resident) + (plan.splits > 1)
    return _PREPARE_LAUNCHES + part * ceil_div(n, plan.rows_per_launch)


def _tiles_in_turn(n: int, plan: SearchPlan, sharing: int) -> int:
    """How many tiles the busiest multiprocessor makes, one after the other."""
    total = 0
    for start in range(0, n, plan.rows_per_launch):
        rows = min(plan.rows_per_launch, n - start)
        programs = ceil_div(rows, plan.config.block_n) * plan.splits
        at_once = min(sharing, ceil_div(programs, MULTIPROCESSORS))
        total += ceil_div(programs, MULTIPROCESSORS * at_once) * at_once * plan.tiles_per_split
    return total


def _rest_ms(shape: Shape, plan: SearchPlan) -> float:
    """Launches, x' stored and read, results written, rows decided in float64."""
    n, k, d = shape
    stored = 0 if plan.config.resident else 4 * n * d + 2 * 2 * n * row_pitch(d)
    read = 4 * n * d if plan.config.resident else 0
    decided = _UNPROVED * n * 4 * d * (2 + _CANDIDATES)
    moved = stored + read + n * (4 * d + 12) + decided + 4 * 4 * k * d
    return 1e-9 * moved / PUBLISHED["h200"].memory_tbs + 1e-3 * _LAUNCH_US * launches(n, plan)


def main() -> int:
    """Print a line a shape."""
    lines = read_lines(Path(sys.argv[1]))
    made = {name: entry for name, entry in make_header(("vq_kernels/search",), None, True).items() if name in MADE}
    for shape in SHAPES:
        print(json.dumps({**predict(shape, lines), **made}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
