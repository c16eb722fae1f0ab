"""The tables and the plot of docs/performance.md and the README, from the results of a GPU. Tables need no package.

Lines of a rehearsal are no results, and of several lines of one thing the last counts.
"""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from gpu.floors import PUBLISHED, Shape, byte_floor_ms, measured_rates, operation_floor_ms
from gpu.results import ROOT, Line, read_lines

RESULTS = ROOT / "benchmarks" / "results" / "h200"
PREDICTIONS = ROOT / "benchmarks" / "results" / "predictions.jsonl"

NOT_YET = "not measured yet"

SHOWN = {
    "triton": "this library, exact",
    "triton-prepared": "the same, codebook prepared",
    "flash-kmeans": "flash-kmeans (TF32)",
    "flash-kmeans-norms": "the same, rows' norms given",
    "cdist": "cdist + argmin",
    "addmm-chunked": "addmm, chunked",
    "addmm-compiled": "addmm, compiled",
    "gemm": "bare GEMM, float32",
    "gemm-tf32": "bare GEMM, TF32",
    "gemm-16bit": "bare GEMM, float16",
}
_BAR_ROWS, _BAR_CODES = 1_048_576, 4_096
_BARS = {64: 1.8, 128: 2.3, 256: 2.5, 512: 3.5}  # D, and how many times flash-kmeans' throughput is asked for
_SIZE = ("N", "K", "D")


# -- the lines


def results(stage: str, op: str | None = None) -> list[Line]:
    """The measured lines in a stage's file, of one op where it is named."""
    lines = [line for line in read_lines(RESULTS / f"{stage}.jsonl") if line.get("rehearsal") is False]
    return [line for line in lines if op is None or line["op"] == op]


def latest(lines: Iterable[Line], *names: str) -> dict[tuple[Any, ...], Line]:
    """The last line for each combination of these entries."""
    return {tuple(line.get(name) for name in names): line for line in lines}


def searches() -> dict[tuple[str, Shape], Line]:
    """The timed searches of float32 normal data, by contender and shape."""
    lines = (line for line in results("search", "nearest_code") if line["status"] == "ok")
    usual = (line for line in lines if (line["dtype"], line["data"]) == ("float32", "gaussian"))
    return {(key[0], (key[1], key[2], key[3])): line for key, line in latest(usual, "contender", *_SIZE).items()}


def of_one_source(lines: list[Line]) -> list[Line]:
    """Those that were made of the same sources as the last one."""
    return [line for line in lines if line["sources"] == lines[-1]["sources"]]


# -- their form


def markdown(rows: Sequence[Sequence[object]], note: str = "") -> str:
    """A table whose first row holds the headings, and a line below it."""
    first, *others = ("| " + " | ".join(map(str, row)) + " |" for row in rows)
    return "\n".join([first, "|---" * len(rows[0]) + "|", *others, *(["", note] if note else [])])


def where(lines: Iterable[Line]) -> str:
    """GPUs, versions, commits and dates of the lines, each only once."""
    parts = []
    for line in lines:
        peers = "".join(f", {name} {version}" for name, version in line["peers"].items() if version)
        parts.append(
            f"{line['gpu']}, driver {line['driver']}, CUDA {line['cuda']}; Python {line['python']}, torch "
            f"{line['torch']}, triton {line['triton']}{peers}; commit {line['commit']}; {line['date']}"
        )
    return " / ".join(dict.fromkeys(parts))


def size_of(line: Line) -> str:
    """N × K × D of a line."""
    return f"{line['N']:,} × {line['K']:,} × {line['D']}"


def milliseconds(value: float) -> str:
    """Three digits of it."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


# -- the tables


def readme_table() -> str:
    """TFLOP/s of everyone at N = 1M, K = 4,096, by D."""
    found = searches()
    if not found:
        return f"On a GPU: {NOT_YET}."
    rows = [[f"N = {_BAR_ROWS:,}, K = {_BAR_CODES:,}: TFLOP/s", *(f"D = {code_dim}" for code_dim in _BARS)]]
    for contender, shown in SHOWN.items():
        lines = [found.get((contender, (_BAR_ROWS, _BAR_CODES, code_dim))) for code_dim in _BARS]
        if any(lines):
            rows.append([shown, *(_throughput(line) for line in lines)])
    return markdown(rows, f"2·N·K·D over the median time, float32 in; {where(found.values())}.")


def _throughput(line: Line | None) -> str:
    if line is None:
        return ""
    wrong = f" ({line['wrong_percent']:.2g} % wrong)" if line.get("wrong_percent") else ""
    return f"{line['tflops']:.0f}{wrong}"


def rates_table() -> str:
    """The rates that the floors stand on."""
    published = {
        "copy": f"{PUBLISHED.memory_tbs} TB/s",
        "copy within L2": "",
        "gemm float16": f"{PUBLISHED.matrix_tflops:.0f} TFLOP/s",
        "gemm bfloat16": f"{PUBLISHED.matrix_tflops:.0f} TFLOP/s",
        "gemm TF32": "494 TFLOP/s",
        "gemm float32": "67 TFLOP/s",
        "gemm float64": "67 TFLOP/s",
    }
    found = latest(results("search", "rate"), "name")
    rows = [["", "published", "measured"]]
    for name, rate in published.items():
        line = found.get((name,))
        rows.append([name, rate, f"{line['value']:.3g} {line['unit']}" if line else NOT_YET])
    return markdown(rows)


def floors_table() -> str:
    """The two floors of each shape, the prediction, and what was measured."""
    rates = measured_rates(results("search")) or PUBLISHED
    found = searches()
    rows = [["N × K × D", "bytes, ms", "operations, ms", "predicted, ms", "measured, ms", "over the larger floor"]]
    for prediction in read_lines(PREDICTIONS):
        shape = (prediction["N"], prediction["K"], prediction["D"])
        floors = byte_floor_ms(shape, rates), operation_floor_ms(shape, rates)
        predicted = [milliseconds(prediction[name]) for name in ("low_ms", "high_ms")]
        line = found.get(("triton", shape))
        measured = [milliseconds(line["p50_ms"]), f"{line['p50_ms'] / max(floors):.2f}"] if line else [NOT_YET, ""]
        rows.append([size_of(prediction), *map(milliseconds, floors), " to ".join(dict.fromkeys(predicted)), *measured])
    return markdown(rows, f"Rates {rates.source}.")


def predictions_table() -> str:
    """What the predictions are made of."""
    names = ("splits", "launches", "instructions_per_score", "programs_a_multiprocessor")
    rows = [
        ["N × K × D", "tiles", "parts", "launches", "ALU a score", "programs an SM", "matrix", "epilogue", "L2", "rest"]
    ]
    lines = read_lines(PREDICTIONS)
    for line in lines:
        shares = [milliseconds(line[f"{name}_ms"]) for name in ("matrix", "epilogue", "l2", "rest")]
        rows.append([size_of(line), line["config"], *(line[name] for name in names), *shares])
    made = dict.fromkeys(
        f"kernels of commit {line['commit']}, triton {line['triton']}; {line['date']}" for line in lines
    )
    return markdown(rows, f"The last four in ms; {' / '.join(made)}.")


def bars_table() -> str:
    """What is asked for, and what was reached."""
    found = searches()
    rows = [["asked for", "reached"], ["10⁹ rows against float64: 0 wrong", _exactness_sum()]]
    sanitizers = latest(results("sanitizers"), "tool")
    for tool in ("memcheck", "racecheck"):
        rows.append([f"{tool} clean", sanitizers.get((tool,), {"status": NOT_YET})["status"]])
    for code_dim, times in _BARS.items():
        shape = (_BAR_ROWS, _BAR_CODES, code_dim)
        asked = f"at D = {code_dim} at least {times} × flash-kmeans' float32 throughput"
        rows.append([asked, _ratio(found.get(("triton", shape)), found.get(("flash-kmeans", shape)))])
        if code_dim <= 128:
            gemm = _ratio(found.get(("triton", shape)), found.get(("gemm-16bit", shape)))
            rows.append([f"at D = {code_dim} faster than the bare float16 GEMM that writes its N × K result", gemm])
    replays = latest(results("search", "replay"), "contender", *_SIZE)
    rows.append(["256 × 512 × 512 under 10 µs as a graph replay", _replayed(replays.get(("triton", 256, 512, 512)))])
    memory = latest(results("search", "memory"), *_SIZE, "dtype", "data").values()
    within = sum(bool(line["within"]) for line in memory)
    rows.append(["extra memory within the limit at every shape", f"{within} of {len(memory)}" if memory else NOT_YET])
    rows.append(["test MSE ≤ 0.0300 within 60 s of training", _target(results("training", "run"))])
    steps = latest(results("training", "step"), "model", "amp")
    step = _ratio(steps.get(("this library", False)), steps.get(("plain", False)))
    rows.append(["a training step at least 3 × as fast as plain PyTorch's", step])
    return markdown(rows)


def _ratio(ours: Line | None, theirs: Line | None) -> str:
    return f"{theirs['p50_ms'] / ours['p50_ms']:.2f} ×" if ours and theirs else NOT_YET


def _replayed(line: Line | None) -> str:
    if line is None or line["status"] != "ok":
        return NOT_YET if line is None else str(line["status"])
    return f"{line['warm_us']:.1f} µs, {line['cold_us']:.1f} with L2 flushed"


def _target(runs: list[Line]) -> str:
    finished = [line for line in runs if line["status"] == "ok"]
    reached = [line for line in finished if line["seconds_to_target"] is not None]
    if reached:
        best = min(reached, key=lambda line: float(line["seconds_to_target"]))
        return f"{best['seconds_to_target']:.1f} s, {best['epochs']} epochs {best['flags']}".strip()
    return f"not reached; {min(line['test_mse'] for line in finished):.4f}" if finished else NOT_YET


def _exactness_sum() -> str:
    lines = of_one_source(results("exactness"))
    return f"{sum(line['wrong'] for line in lines)} of {sum(line['rows'] for line in lines):,}" if lines else NOT_YET


def exactness_table() -> str:
    """Rows done and wrong of each part, and which step decided them."""
    lines = of_one_source(results("exactness"))
    if not lines:
        return f"{NOT_YET}."
    rows = [["rows of", "K", "D", "dtype", "rows", "wrong", "proved", "resolved", "drained"]]
    for part in dict.fromkeys(line["part"] for line in lines):
        own = [line for line in lines if line["part"] == part]
        done = sum(line["rows"] for line in own)
        steps = [f"{100 * sum(line[step] for line in own) / done:.2f} %" for step in ("proved", "resolved", "drained")]
        wrong = sum(line["wrong"] for line in own)
        rows.append([part, own[0]["K"], own[0]["D"], own[0]["dtype"], f"{done:,}", wrong, *steps])
    wrong, checked = (sum(line[name] for line in lines) for name in ("reference_wrong", "reference_rows"))
    reference = f"the reference itself: {wrong} wrong of {checked:,} rows against brute force"
    return markdown(rows, f"In all {_exactness_sum()} wrong; {reference}; {where(lines)}.")


def contenders_table() -> str:
    """The median time of every contender at every shape, and the memory that this library's search takes."""
    found = searches()
    if not found:
        return f"{NOT_YET}."
    memory = latest((line for line in results("search", "memory") if line["data"] == "gaussian"), *_SIZE, "dtype")
    rows = [["N × K × D", *(f"{shown}, ms" for shown in SHOWN.values()), "extra MiB, of at most"]]
    for shape in dict.fromkeys(shape for _, shape in found):
        lines = [found.get((contender, shape)) for contender in SHOWN]
        extra = memory.get((*shape, "float32"))
        weighed = f"{extra['extra_mib']:.1f} of {extra['limit_mib']:.1f}" if extra else ""
        size = size_of(dict(zip(_SIZE, shape, strict=True)))
        rows.append([size, *(milliseconds(line["p50_ms"]) if line else "" for line in lines), weighed])
    return markdown(rows, f"{where(found.values())}.")


def steps_table() -> str:
    """Forward and backward of a quantizer, and the memory that a step takes."""
    found = latest(
        (line for line in results("search", "vector_quantize") if line["status"] == "ok"), *_SIZE, "contender"
    )
    if not found:
        return f"{NOT_YET}."
    rows = [["N × K × D", "", "forward + backward, ms", "peak MiB"]]
    for line in found.values():
        rows.append([size_of(line), line["contender"], milliseconds(line["p50_ms"]), f"{line['peak_mib']:,.0f}"])
    return markdown(rows, f"{where(found.values())}.")


def tiles_table() -> str:
    """`pick_config`'s choice beside the fastest found."""
    found = latest(results("tiles", "choice"), *_SIZE)
    if not found:
        return f"{NOT_YET}."
    rows = [["N × K × D", "`pick_config`'s choice", "ms", "fastest found", "ms", "ratio"]]
    for line in found.values():
        usual, best = (milliseconds(line[name]) for name in ("usual_ms", "best_ms"))
        chosen = f"{line['usual_name']}: {line['usual']}"
        rows.append([size_of(line), chosen, usual, line["best"], best, f"{line['ratio']:.2f}"])
    return markdown(rows, f"{where(found.values())}.")


def profiles_table() -> str:
    """The kernels of a search that take the most time, at each shape."""
    found = latest(results("tiles", "profile"), "name", *_SIZE)
    if not found:
        return f"{NOT_YET}."
    rows = [["N × K × D", "", "launches", "all, µs", "the longest, µs"]]
    for line in found.values():
        longest = sorted(line["kernels"], key=lambda kernel: -kernel["us"])[:4]
        shown = ", ".join(f"{kernel['kernel']} {kernel['us']:.1f}" for kernel in longest)
        rows.append([size_of(line), line["name"], f"{line['launches']:.0f}", f"{line['total_us']:.1f}", shown])
    return markdown(rows, f"{where(found.values())}.")


def training_table() -> str:
    """The runs, and the steps beside plain PyTorch's."""
    runs = latest((line for line in results("training", "run") if line["status"] == "ok"), "epochs", "flags")
    if not runs:
        return f"{NOT_YET}."
    rows = [
        ["epochs", "flags", "test MSE", "seconds to 0.0300", "of steps in all, s", "start to exit, s", "pictures/s"]
    ]
    for line in runs.values():
        reached = line["seconds_to_target"]
        rows.append(
            [line["epochs"], line["flags"], f"{line['test_mse']:.4f}", "" if reached is None else f"{reached:.1f}",
             f"{line['train_s']:.1f}", f"{line['wall_s']:.1f}", f"{line['images_per_s']:,.0f}"]
        )  # fmt: skip
    steps = latest(results("training", "step"), "model", "amp").values()
    shown = [f"{line['model']}{', amp' if line['amp'] else ''} {milliseconds(line['p50_ms'])} ms" for line in steps]
    for line in results("training", "loop")[-1:]:
        shown.append(f"the plain loop with a DataLoader {line['images_per_s']:,.0f} pictures/s")
    return markdown(rows, f"A step alone: {'; '.join(shown)}; {where(runs.values())}.")


TABLES: dict[str, Callable[[], str]] = {
    "bars": bars_table,
    "rates": rates_table,
    "floors": floors_table,
    "predictions": predictions_table,
    "contenders": contenders_table,
    "steps": steps_table,
    "tiles": tiles_table,
    "profiles": profiles_table,
    "gpu-exactness": exactness_table,
    "gpu-training": training_table,
}
"""The tables of docs/performance.md, by their names there."""


def plot_throughput(file: Path) -> None:
    """Draw TFLOP/s against D at N = 1M, K = 4,096, a line a contender."""
    from matplotlib.figure import Figure  # which the tables do not need

    found = {key: line for key, line in searches().items() if key[1][:2] == (_BAR_ROWS, _BAR_CODES)}
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.subplots()
    for contender, shown in SHOWN.items():
        points = sorted((shape[2], line["tflops"]) for (name, shape), line in found.items() if name == contender)
        if points:
            style = {"linewidth": 2.5} if contender.startswith("triton") else {"linestyle": "--"}
            axes.plot(*zip(*points, strict=True), marker="o", label=shown, **style)
    axes.set(xscale="log", xlabel="D", ylabel="TFLOP/s", title=f"N = {_BAR_ROWS:,}, K = {_BAR_CODES:,}, float32 in")
    axes.set_xticks(list(_BARS), [str(code_dim) for code_dim in _BARS])
    axes.set_ylim(bottom=0)
    axes.legend(fontsize="small")
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150)
