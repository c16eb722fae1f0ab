"""The tables and the plot of docs/explanations/performance.md and the README, from the results of a GPU."""

from collections.abc import Callable
from pathlib import Path

from gpu.floors import PUBLISHED, byte_floor_ms, measured_rates, operation_floor_ms
from gpu.measured import (
    PREDICTIONS,
    SIZE,
    TRAINING_PREDICTIONS,
    flash_kmeans,
    latest,
    measured_gpu,
    of_one_source,
    replays,
    results,
    searches,
)  # fmt: skip
from gpu.results import Line, read_lines
from gpu.table_form import NOT_YET, markdown, milliseconds, size_of, where

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
    note = f"2·N·K·D over the median time, float32 in; {where(found.values())}."
    return markdown(rows, f"{note}\n\n![Throughput of the searches on a GPU by D](docs/images/gpu_search.png)")


def _throughput(line: Line | None) -> str:
    if line is None:
        return ""
    wrong = f" ({line['wrong_percent']:.2g} % wrong)" if line.get("wrong_percent") else ""
    return f"{line['tflops']:.0f}{wrong}"


def rates_table() -> str:
    """The rates that the floors stand on."""
    given = PUBLISHED[measured_gpu()]
    published = {
        "copy": f"{given.memory_tbs} TB/s",
        "copy within L2": "",
        "gemm float16": f"{given.matrix_tflops:.0f} TFLOP/s",
        "gemm bfloat16": f"{given.matrix_tflops:.0f} TFLOP/s",
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
    rates = measured_rates(results("search")) or PUBLISHED[measured_gpu()]
    found, replayed = searches(), replays()
    rows = [
        ["N × K × D", "bytes, ms", "operations, ms", "predicted, ms", "measured, ms", "over the larger floor",
         "as a graph replay, ms"],
    ]  # fmt: skip
    for prediction in read_lines(PREDICTIONS):
        shape = (prediction["N"], prediction["K"], prediction["D"])
        floors = byte_floor_ms(shape, rates), operation_floor_ms(shape, rates)
        predicted = [milliseconds(prediction[name]) for name in ("low_ms", "high_ms")]
        line = found.get(("triton", shape))
        measured = [milliseconds(line["p50_ms"]), f"{line['p50_ms'] / max(floors):.2f}"] if line else [NOT_YET, ""]
        replay = replayed.get(("triton", shape), {}).get("cold_us")
        measured.append("" if replay is None else milliseconds(1e-3 * replay))
        rows.append([size_of(prediction), *map(milliseconds, floors), " to ".join(dict.fromkeys(predicted)), *measured])
    return markdown(
        rows, f"Rates {rates.source}. A replay's time has no launches by Python in it; L2 is flushed in both."
    )


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
    sanitizers = latest(results("checks", "sanitizer"), "tool")
    for tool in ("memcheck", "racecheck"):
        rows.append([f"{tool} clean", sanitizers.get((tool,), {"status": NOT_YET})["status"]])
    for code_dim, times in _BARS.items():
        shape = (_BAR_ROWS, _BAR_CODES, code_dim)
        asked = f"at D = {code_dim} at least {times} × flash-kmeans' float32 throughput"
        rows.append([asked, _ratio(found.get(("triton", shape)), flash_kmeans(found, shape))])
        if code_dim <= 128:
            gemm = _ratio(found.get(("triton", shape)), found.get(("gemm-16bit", shape)))
            rows.append([f"at D = {code_dim} faster than the bare float16 GEMM that writes its N × K result", gemm])
    replay = replays().get(("triton", (256, 512, 512)))
    rows.append(["256 × 512 × 512 under 10 µs as a graph replay", _replayed(replay)])
    memory = latest(results("search", "memory"), *SIZE, "dtype", "data").values()
    within = sum(bool(line["within"]) for line in memory)
    rows.append(["extra memory within the limit at every shape", f"{within} of {len(memory)}" if memory else NOT_YET])
    rows.append(["test MSE ≤ 0.0300 within 60 s of training", _target(results("training", "run"))])
    rows.append(["a training step at least 3 × as fast as plain PyTorch's", _faster()])
    gpus = dict.fromkeys(f"{line['gpu']}; commit {line['commit']}" for line in (*found.values(), *memory))
    return markdown(rows, f"{' / '.join(gpus)}." if gpus else "")


def _faster() -> str:
    """How much faster a step is: in a run of the usual settings beside the plain loop, and alone."""
    runs = [line for line in results("training", "run") if line["status"] == "ok" and not line["flags"]]
    loops = results("training", "loop")
    steps = latest(results("training", "step"), "model", "amp")
    shown = []
    if runs and loops:
        for name in ("learning", "resting"):
            rate = runs[-1][f"{name}_images_per_s"]
            if rate is not None:
                shown.append(f"{rate / loops[-1]['images_per_s']:.2f} × with the encoder {name}")
    alone = _ratio(steps.get(("this library", False)), steps.get(("plain", False)))
    if alone != NOT_YET:
        shown.append(f"{alone} for a step alone, its batch on the GPU")
    return ", ".join(shown) or NOT_YET


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


def _rate(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}"


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
    memory = latest((line for line in results("search", "memory") if line["data"] == "gaussian"), *SIZE, "dtype")
    rows = [["N × K × D", *(f"{shown}, ms" for shown in SHOWN.values()), "extra MiB, of at most"]]
    for shape in dict.fromkeys(shape for _, shape in found):
        lines = [found.get((contender, shape)) for contender in SHOWN]
        extra = memory.get((*shape, "float32"))
        weighed = f"{extra['extra_mib']:.1f} of {extra['limit_mib']:.1f}" if extra else ""
        size = size_of(dict(zip(SIZE, shape, strict=True)))
        rows.append([size, *(milliseconds(line["p50_ms"]) if line else "" for line in lines), weighed])
    return markdown(rows, f"{where(found.values())}.")


def steps_table() -> str:
    """Forward and backward of a quantizer, and the memory that a step takes."""
    found = latest(
        (line for line in results("search", "vector_quantize") if line["status"] == "ok"), *SIZE, "contender"
    )
    if not found:
        return f"{NOT_YET}."
    rows = [["N × K × D", "", "forward + backward, ms", "peak MiB"]]
    for line in found.values():
        rows.append([size_of(line), line["contender"], milliseconds(line["p50_ms"]), f"{line['peak_mib']:,.0f}"])
    return markdown(rows, f"{where(found.values())}.")


def tiles_table() -> str:
    """`pick_config`'s choice beside the fastest found."""
    found = latest(results("tiles", "choice"), *SIZE)
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
    found = latest(results("tiles", "profile"), "name", *SIZE)
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
        ["epochs", "flags", "test MSE", "seconds to 0.0300", "of steps in all, s", "start to exit, s", "pictures/s",
         "encoder resting", "learning"],
    ]  # fmt: skip
    for line in runs.values():
        reached = line["seconds_to_target"]
        rows.append(
            [line["epochs"], line["flags"], f"{line['test_mse']:.4f}", "" if reached is None else f"{reached:.1f}",
             f"{line['train_s']:.1f}", f"{line['wall_s']:.1f}",
             *(_rate(line[f"{name}images_per_s"]) for name in ("", "resting_", "learning_"))]
        )  # fmt: skip
    steps = latest(results("training", "step"), "model", "amp").values()
    shown = [f"{line['model']}{', amp' if line['amp'] else ''} {milliseconds(line['p50_ms'])} ms" for line in steps]
    for line in results("training", "loop")[-1:]:
        shown.append(f"the plain loop with a DataLoader {line['images_per_s']:,.0f} pictures/s")
    return markdown(rows, f"A step alone: {'; '.join(shown)}; {where(runs.values())}.")


def replays_table() -> str:
    """Calls as replays of CUDA graphs, in microseconds."""
    found = replays()
    if not found:
        return f"{NOT_YET}."
    rows = [["N × K × D", "", "shared launch, µs", "L2 flushed, µs"]]
    for (contender, _), line in found.items():
        times = [f"{line[name]:.1f}" if name in line else line["status"] for name in ("warm_us", "cold_us")]
        rows.append([size_of(line), SHOWN.get(contender, contender), *times])
    return markdown(rows, f"{where(found.values())}.")


COUNTERS = {
    "GPU Speed Of Light Throughput: Duration": "scan",
    "GPU Speed Of Light Throughput: Compute (SM) Throughput": "SM",
    "GPU Speed Of Light Throughput: Memory Throughput": "memory",
    "GPU Speed Of Light Throughput: L2 Cache Throughput": "L2",
    "GPU Speed Of Light Throughput: DRAM Throughput": "DRAM",
    "Compute Workload Analysis: Issue Slots Busy": "issue slots",
    "Occupancy: Achieved Occupancy": "occupancy",
    "Launch Statistics: Registers Per Thread": "registers",
}
"""Of Nsight Compute's figures the shown ones, and their columns."""


def counters_table() -> str:
    """What Nsight Compute counts in the scan."""
    found = latest(results("tiles", "counters"), *SIZE)
    if not found:
        return f"{NOT_YET}."
    rows = [["N × K × D", *COUNTERS.values(), ""]]
    for line in found.values():
        figures = {key.partition(" [")[0]: (value, key) for key, value in line.get("figures", {}).items()}
        cells = []
        for name in COUNTERS:
            value, key = figures.get(name, ("", ""))
            cells.append(f"{value} {key.partition(' [')[2].rstrip(']')}".strip())
        rows.append([size_of(line), *cells, "" if line["status"] == "ok" else line["status"]])
    return markdown(rows, f"{where(found.values())}.")


def training_predictions_table() -> str:
    """What a step of training was predicted to take."""
    rows = [["a step of 256 pictures", "operations, ms", "bytes, ms", "launches", "predicted, ms", "pictures/s"]]
    lines = read_lines(TRAINING_PREDICTIONS)
    for line in lines:
        rates = [f"{1e3 * line['batch_size'] / line[name]:,.0f}" for name in ("high_ms", "low_ms")]
        predicted = " to ".join(milliseconds(line[name]) for name in ("low_ms", "high_ms"))
        floors = [milliseconds(line[name]) for name in ("operations_ms", "bytes_ms")]
        rows.append([line["model"], *floors, line["launches"], predicted, " to ".join(rates)])
    made = dict.fromkeys(f"commit {line['commit']}; {line['date']}" for line in lines)
    return markdown(rows, f"{' / '.join(made)}.")


TABLES: dict[str, Callable[[], str]] = {
    "bars": bars_table,
    "rates": rates_table,
    "floors": floors_table,
    "predictions": predictions_table,
    "training-predictions": training_predictions_table,
    "contenders": contenders_table,
    "replays": replays_table,
    "steps": steps_table,
    "tiles": tiles_table,
    "profiles": profiles_table,
    "counters": counters_table,
    "gpu-exactness": exactness_table,
    "gpu-training": training_table,
}
"""The tables of docs/explanations/performance.md, by their names there."""


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
