"""The tables of the rows of gpu.py, which prints them too."""

from collections import Counter
from collections.abc import Callable, Sequence

from benchmarks.results import RESULTS, Row, markdown, number, read_rows
from benchmarks.tables.rows import size_of, where, wrong

NOT_MEASURED = "The kernels have not been measured on a GPU yet."
_GPU_CONTENDERS = {
    "triton": "this library, exact",
    "triton-prepared": "this library, codebook prepared",
    "flash-kmeans": "flash-kmeans (TF32)",
    "cdist": "cdist + argmin",
    "addmm-chunked": "addmm, chunked",
    "gemm": "bare GEMM, float32",
    "gemm-tf32": "bare GEMM, TF32",
    "gemm-bfloat16": "bare GEMM, bfloat16",
}
_GPU_TARGETS = {64: 400, 128: 550, 256: 600, 512: 550}  # D: TFLOP/s at N = 1,048,576 and K = 4,096 on an H200


def gpu_rows() -> list[Row]:
    """The committed rows of one GPU: the H200's if there are any, else the H100's."""
    for name in ("h200", "h100"):
        rows = [row for row in read_rows(RESULTS / name / "gpu.jsonl") if not row["dry_run"]]
        if rows:
            return rows
    return []


def _latest(rows: Sequence[Row], op: str, *names: str) -> list[Row]:
    """The last row of `op` for each combination of these entries."""
    return list({tuple(row.get(name) for name in names): row for row in rows if row["op"] == op}.values())


def _searches(rows: Sequence[Row], *, graph: bool) -> list[Row]:
    found = _latest(rows, "nearest_code", "graph", "N", "K", "D", "contender")
    return [row for row in found if row["graph"] == graph and row["contender"] in _GPU_CONTENDERS]


def throughput_table(rows: Sequence[Row]) -> str:
    """TFLOP/s by D at the largest N."""
    found = _searches(rows, graph=False)
    if not found:
        return ""
    largest = max(row["N"] for row in found)
    found = [row for row in found if row["N"] == largest]
    dims = sorted({row["D"] for row in found})
    by_key = {(row["contender"], row["D"]): row for row in found}
    cells = [[f"N = {largest:,}, K = {found[0]['K']:,}: TFLOP/s", *(f"D = {d}" for d in dims)]]
    for name, shown in _GPU_CONTENDERS.items():
        own = [by_key.get((name, d)) for d in dims]
        if any(row and row["p50_ms"] for row in own):
            cells.append([shown, *(f"{number(row['tflops'])}{wrong(row)}" if row else "" for row in own)])
    return f"{markdown(cells)}\n\n2·N·K·D over the median time, float32 input."


_COLUMNS: dict[str, Callable[[Row], object]] = {  # how to make a cell, by the column's heading
    "N × K × D": size_of,
    "search": lambda row: _GPU_CONTENDERS[row["contender"]] + (", CUDA graph" if row["graph"] else ""),
    "dtype": lambda row: row["dtype"],
    "what": lambda row: row["contender"],
    "configuration": lambda row: row["config"],
    "chosen": lambda row: "yes" if row["chosen"] else "",
    "ms": lambda row: number(row.get("p50_ms")),
    "20-80 %": lambda row: f"{number(row['p20_ms'])} - {number(row['p80_ms'])}" if row.get("p50_ms") else "",
    "TFLOP/s": lambda row: number(row.get("tflops")),
    "peak MiB": lambda row: number(row.get("peak_mib")),
    "wrong %": lambda row: number(row.get("wrong_percent")),
    "status": lambda row: row["status"],
    "data set": lambda row: row["dataset"],
    "seconds": lambda row: number(row["seconds"]),
    "test MSE": lambda row: f"{row['test_mse']:.5f}" if "test_mse" in row else "",
    "images/s": lambda row: number(row["images_per_s"]),
}
_TIME_COLUMNS = ("ms", "20-80 %", "peak MiB", "wrong %", "status")
_LISTS: dict[str, tuple[str, tuple[str, ...], tuple[str, ...]]] = {  # op, what tells its rows apart, columns
    "contenders": (
        "nearest_code", (*"NKD", "graph", "contender"), ("N × K × D", "search", "TFLOP/s", *_TIME_COLUMNS),
    ),
    "steps": ("training_step", (*"NKD", "dtype", "contender"), ("N × K × D", "dtype", "what", *_TIME_COLUMNS)),
    "gpu-training": ("training", ("contender",), ("what", "data set", "seconds", "test MSE", "images/s")),
    "tiles": ("config", (*"NKD", "config"), ("N × K × D", "configuration", "ms", "chosen", "status")),
}  # fmt: skip


def gpu_exactness_table(rows: Sequence[Row]) -> str:
    """Rows compared with float64, by data set, and how they were decided."""
    totals: dict[str, Counter[str]] = {}
    for row in _latest(rows, "exactness", "seed"):
        for name, count in row["data"].items():
            totals.setdefault(name, Counter()).update(count)
    steps = ("certified", "reranked", "exhaustive")
    cells = [["data set", "rows", "wrong", *(f"{step} %" for step in steps)]]
    for name, total in totals.items():
        shares = [f"{100 * total[step] / total['rows']:.2f}" for step in steps]
        cells.append([name, f"{total['rows']:,}", f"{total['wrong']:,}", *shares])
    return markdown(cells)


def target_table(rows: Sequence[Row]) -> str:
    """The targets and the measured values."""
    cells = [["target", "measured"]]
    ours = {size_of(row): row for row in _searches(rows, graph=False) if row["contender"] == "triton"}
    for d, target in _GPU_TARGETS.items():
        row = ours.get(f"1,048,576 × 4,096 × {d}")
        measured = f"{number(row['tflops'])} TFLOP/s" if row and row["p50_ms"] else "-"
        cells.append([f"D = {d}: {target} TFLOP/s on an H200", measured])
    exact = _latest(rows, "exactness", "seed")
    wrong = f"{sum(row['wrong'] for row in exact)} of {sum(row['rows'] for row in exact):,}" if exact else "-"
    cells.append(["0 wrong of 10⁹ rows", wrong])
    graphs = {size_of(row): row for row in _searches(rows, graph=True) if row["contender"] == "triton"}
    small = graphs.get("256 × 512 × 512", {}).get("p50_ms")
    cells.append(["256 × 512 × 512 as a CUDA graph: below 10 µs", f"{1e3 * small:.1f} µs" if small else "-"])
    rates = {row["contender"]: row["images_per_s"] for row in _latest(rows, "training", "contender")}
    ratio = f"{rates['vqae.train'] / rates['plain PyTorch']:.2f} ×" if len(rates) == 2 else "-"
    cells.append(["images/s of vqae.train: 3 × plain PyTorch", ratio])
    return markdown(cells)


_MADE = {"bars": target_table, "gpu-search": throughput_table, "gpu-exactness": gpu_exactness_table}
_SECTION = {  # the tables of the documentation, under these lines
    "contenders": "Searches:",
    "tiles": "Scan configurations, with a prepared codebook:",
    "steps": "Forward and backward of a quantizer:",
    "gpu-training": "Training of the autoencoder:",
    "gpu-exactness": "Exactness:",
}


def gpu_section(rows: Sequence[Row]) -> str:
    """The tables that gpu.py has rows for, under their titles, or the sentence that there are none."""
    tables = {title: gpu_table(name, rows) for name, title in _SECTION.items()}
    return "\n\n".join(f"{title}\n\n{table}" for title, table in tables.items() if table) or NOT_MEASURED


def gpu_table(name: str, rows: Sequence[Row]) -> str:
    """A table of rows of gpu.py, empty without such rows."""
    ops = {"gpu-search": "nearest_code", "gpu-exactness": "exactness", **{key: op for key, (op, *_) in _LISTS.items()}}
    used = [row for row in rows if ops.get(name) in (None, row["op"])]
    if not used:
        return ""
    if name in _MADE:
        table = _MADE[name](used)
    else:
        op, names, columns = _LISTS[name]
        lines = ([_COLUMNS[column](row) for column in columns] for row in _latest(used, op, *names))
        table = markdown([columns, *lines])
    return f"{table}\n\n{where(used)}." if table else ""
