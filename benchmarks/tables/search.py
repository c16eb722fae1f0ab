"""The tables of CPU searches and of the drop-ins."""

from benchmarks.results import Row, markdown
from benchmarks.tables.rows import NO_RESULTS, cpu_rows, size_of, where, wrong

_CPU_CONTENDERS = {
    "llvm": "this library",
    "cdist": "cdist + argmin",
    "addmm-chunked": "addmm, chunked",
    "faiss": "faiss IndexFlatL2",
    "gemm": "bare GEMM",
}


def search_table() -> str:
    """The search's time relative to cdist's within one run: a table for each machine."""
    rows = [row for row in cpu_rows("argmin") if row["data"] == "gaussian" and row["status"] == "ok"]
    tables = []
    for machine in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == machine]
        cells = [["N × K × D", *_CPU_CONTENDERS.values()]]
        for size in dict.fromkeys(map(size_of, own)):
            found = {row["contender"]: row for row in own if size_of(row) == size}
            cells.append([size, *(_ratio_cell(found.get(name)) for name in _CPU_CONTENDERS)])
        tables.append(f"{markdown(cells)}\n\n{own[0]['device']}; {own[0]['versions']}; {own[0]['date']}.")
    return "\n\n".join([*tables, "Median time divided by that of cdist + argmin in the same run; float32, Gaussian."])


def small_search_table() -> str:
    """The time of small searches relative to cdist, argmin and a gather in the same run."""
    rows = cpu_rows("small")
    if not rows:
        return NO_RESULTS
    named = {(size_of(row), row["contender"], row["data"]): row["p50_ms"] for row in rows}
    columns = [(name, data) for data in ("gaussian", "offset-3") for name in ("llvm", "llvm-prepared")]
    cells = [
        ["N × K × D", "this library", "codebook prepared", "this library, offset 3", "codebook prepared, offset 3"]
    ]
    for size in dict.fromkeys(map(size_of, rows)):
        ratios = (named[size, name, data] / named[size, "cdist-gather", data] for name, data in columns)
        cells.append([size, *(f"{ratio:.2f}" for ratio in ratios)])
    what = "Median time divided by that of cdist + argmin + gather in the same run; float32, Gaussian plus an offset"
    return f"{markdown(cells)}\n\n{what}; {where(rows)}."


def _ratio_cell(row: Row | None) -> str:
    return f"{row['ratio_to_cdist']:.2f}{wrong(row)}" if row else "-"


def step_table() -> str:
    """A training step of the drop-in quantizer compared with vector_quantize_pytorch's."""
    rows = cpu_rows("quantizer_step")
    cells = [["layer", "x", "codebooks", "time / theirs", "memory here", "there", "memory / theirs"]]
    for row in rows:
        groups = row.get("groups", 1)
        books = row.get("num_quantizers", 1) * groups
        size = f"{row['num_codes']:,} × {row['dim'] // groups}"
        memory = [f"{row[f'{side}_peak_mib']:,.1f} MiB" for side in ("ours", "theirs")]
        x = f"[{row['batch']}, {row['length']}, {row['dim']}]"
        ratios = [f"{row[f'{what}_ratio']:.2f}" for what in ("time", "memory")]
        cells.append([row["op"].split()[0], x, f"{books} × {size}", ratios[0], *memory, ratios[1]])
    what = "Forward, backward and moving averages; median ratio of steps taken in turns; memory beyond that before"
    return f"{markdown(cells)}\n\n{what}; {where(rows)}."


def codecs_table() -> str:
    """The encoders of codecs of transformers with and without `patch`."""
    rows = cpu_rows("codecs")
    cells = [["codec", "frames", "time / unpatched", "wrong in bfloat16", "unpatched", "indices"]]
    for row in rows:
        wrong = [f"{row[f'{side}_wrong_bfloat16']}" for side in ("ours", "theirs")]
        cells.append([row["codec"], f"{row['frames']}", f"{row['time_ratio']:.2f}", *wrong, f"{row['checked_rows']:,}"])
    what = "`encode` in float32, median ratio of calls in turn, beside other processes; random codes and rows"
    return f"{markdown(cells)}\n\n{what}; {where(rows)}."


def upstream_table() -> str:
    """The tests of vector_quantize_pytorch on our classes, those with the same name and outcome in one line."""
    rows = cpu_rows("upstream_tests")
    cells = [["test", "constructs", "passed here", "there", "reason"]]
    tests: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        name = row["test"].partition("[")[0].partition("::")[2]
        tests.setdefault((name, row["reason"].partition(";")[0].partition(": ")[2]), []).append(row)
    for (name, reason), group in tests.items():
        passed = [sum(row[side] == "passed" for row in group) for side in ("ours", "theirs")]
        classes = ", ".join(f"`{each}`" for each in group[0]["classes"])
        cells.append([f"`{name}`", classes, *(f"{each} of {len(group)}" for each in passed), reason])
    totals = (sum(row[side] == "passed" for row in rows) for side in ("ours", "theirs"))
    cells.append(["all", "", *(f"{each} of {len(rows)}" for each in totals), ""])
    what = f"The tests at commit {rows[0]['tests_commit']} of the original that construct one of these classes"
    return f"{markdown(cells)}\n\n{what}; {where(rows)}."
