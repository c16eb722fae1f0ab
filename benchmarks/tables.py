"""Writes the tables of README.md and of docs/**/*.md from the committed results.

    python -m benchmarks.tables           # update them
    python -m benchmarks.tables --check   # exit with 1 if a table would change

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; `TABLES` lists the names. CPU results are in
benchmarks/results/cpu: argmin.jsonl (argmin_bench.py), small.jsonl (argmin_bench.py --small), exactness.jsonl
(exactness.py), train_bench.jsonl (train.py), quantizer_step.jsonl, clustering.jsonl, semantic_ids.jsonl,
ablation.jsonl, rate_distortion.jsonl, batch_sizes.jsonl (rate_distortion.py at other batch sizes), and conv_vqvae.jsonl
(examples/conv_vqvae.py). GPU results are in benchmarks/results/h200/gpu.jsonl, or in h100/gpu.jsonl if that one is
missing; `gpu.py` writes them.
"""

from __future__ import annotations

import argparse
import itertools
import math
import re
import statistics
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

from benchmarks.results import RESULTS, ROOT, Row, markdown, number, read_rows

NOT_MEASURED = "Not measured on a GPU yet."
NO_RESULTS = "No results are committed yet."
METHODS = {"kmeans": "K-means", "model": "model"}  # of a rate_distortion.py row, as tables show them

_CPU_CONTENDERS = {
    "torch": "this library",
    "cdist": "cdist + argmin",
    "addmm-chunked": "addmm, chunked",
    "faiss": "faiss IndexFlatL2",
    "gemm": "bare GEMM",
}
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
_ABLATION_COLUMNS = (  # heading, entry, digits after the point
    ("train MSE", "train_mse", 5),
    ("validation MSE", "val_mse", 5),
    ("test MSE", "test_mse", 5),
    ("codes used", "codes_used", 0),
    ("perplexity", "perplexity", 0),
)


def spread(values: Sequence[float], digits: int) -> str:
    """Mean ± sample standard deviation over seeds; only the mean for a single seed, nothing for none."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}" if values else ""


def over_seeds(rows: Sequence[Row], method: str, num_codes: int, name: str, num_quantizers: int = 1) -> list[float]:
    """A figure of one method at one K and Q, for each seed. Exits if the rows differ in their settings."""
    sizes = (num_quantizers, num_codes)
    runs = [row for row in rows if row["method"] == method and (row["num_quantizers"], row["num_codes"]) == sizes]
    if any(run["settings"] != runs[0]["settings"] for run in runs):
        raise SystemExit(f"the results of {METHODS[method]} at K = {num_codes} differ in their settings: repeat some")
    return [run[name] for run in runs]


def _where(rows: Sequence[Row]) -> str:
    """The different devices, versions and dates of the rows."""
    return "; ".join(", ".join(sorted({row[name] for row in rows})) for name in ("device", "versions", "date"))


def _size(row: Row) -> str:
    return f"{row['N']:,} × {row['K']:,} × {row['D']}"


def _cpu(name: str) -> list[Row]:
    return read_rows(RESULTS / "cpu" / f"{name}.jsonl")


# -- CPU


def model_table() -> str:
    """What the autoencoder reaches."""
    rows = _cpu("rate_distortion")
    names = ("test_mse", "test_codes_used", "test_perplexity")
    mse, codes_used, perplexity = (over_seeds(rows, "model", 512, name) for name in names)
    bound = over_seeds(rows, "kmeans", 512, "test_mse")
    first = next(row for row in rows if (row["method"], row["num_codes"]) == ("model", 512))
    settings, bench, soak = first["settings"], _cpu("train_bench")[-1], _cpu("exactness")[-1]
    psnr = f"{-10 * math.log10(statistics.fmean(mse)):.2f} dB"
    cells = [
        ("", "measured"),
        ("Indices that differ from float64 brute force", f"{soak['wrong']} of {soak['rows']:,}"),
        ("Test MSE per pixel value (pixels in [0, 1]), K = 512", f"{spread(mse, 5)} ({psnr})"),
        ("K-means of the pixels, on the same images", spread(bound, 5)),
        ("Codes used on the test images", f"{spread(codes_used, 0)} of 512, perplexity {spread(perplexity, 0)}"),
        ("Training time, start to exit", f"{settings['max_minutes']:g} minutes"),
        ("Images per second, relative to a bare loop without quantizer or data", f"{bench['ratio']:.2f}"),
    ]
    images = f"{first['num_train']:,} training images (2 % of them held out) and {first['num_test']:,} test images"
    what = f"CIFAR-10 (JPEG copy), {images}; mean ± standard deviation over {len(mse)} seeds"
    length = f"--max-minutes {settings['max_minutes']:g} --epochs {settings['epochs']}{_freezing([first])}"
    command = f"python -m vqae.train --dataset imagefolder --data-dir DIR {length}"
    others = f"Brute force: {soak['device']}, {soak['date']}. Bare loop: {bench['device']}, {bench['date']}"
    where = f"{first['device']}; {first['versions']}; {first['date']}"
    return f"{markdown(cells)}\n\n{what}; {where}; `{command}`. {others}."


def _freezing(rows: Sequence[Row]) -> str:
    """The flags by which these runs froze the encoder at first, each after a space."""
    runs = (row["settings"].get("unfreeze_encoder_at", 0.0) for row in rows if row["method"] == "model")
    return "".join(f" --unfreeze-encoder-at {value}" for value in sorted({*runs} - {0.0}))


def _model_runs(rows: Sequence[Row]) -> str:
    """`_where`, and which models were trained with an encoder that was frozen at first."""
    frozen = [row for row in rows if row["method"] == "model" and _freezing([row])]
    sizes = ", ".join(f"{num_codes:,}" for num_codes in sorted({row["num_codes"] for row in frozen}))
    return f"{_where(rows)}; the model of K = {sizes} with `{_freezing(frozen).strip()}`" if frozen else _where(rows)


def search_table() -> str:
    """The search's time relative to cdist's within one run: a table for each machine."""
    rows = [row for row in _cpu("argmin") if row["data"] == "gaussian" and row["status"] == "ok"]
    tables = []
    for machine in dict.fromkeys(row["device"] for row in rows):
        own = [row for row in rows if row["device"] == machine]
        cells = [["N × K × D", *_CPU_CONTENDERS.values()]]
        for size in dict.fromkeys(map(_size, own)):
            found = {row["contender"]: row for row in own if _size(row) == size}
            cells.append([size, *(_ratio_cell(found.get(name)) for name in _CPU_CONTENDERS)])
        tables.append(f"{markdown(cells)}\n\n{own[0]['device']}; {own[0]['versions']}; {own[0]['date']}.")
    return "\n\n".join([*tables, "Median time divided by that of cdist + argmin in the same run; float32, Gaussian."])


def small_search_table() -> str:
    """The time of small searches relative to cdist, argmin and a gather in the same run."""
    rows = _cpu("small")
    if not rows:
        return NO_RESULTS
    named = {(_size(row), row["contender"], row["data"]): row["p50_ms"] for row in rows}
    columns = [(name, data) for data in ("gaussian", "offset-3") for name in ("torch", "torch-prepared")]
    cells = [
        ["N × K × D", "this library", "codebook prepared", "this library, offset 3", "codebook prepared, offset 3"]
    ]
    for size in dict.fromkeys(map(_size, rows)):
        ratios = (named[size, name, data] / named[size, "cdist-gather", data] for name, data in columns)
        cells.append([size, *(f"{ratio:.2f}" for ratio in ratios)])
    what = "Median time divided by that of cdist + argmin + gather in the same run; float32, Gaussian plus an offset"
    return f"{markdown(cells)}\n\n{what}; {_where(rows)}."


def _ratio_cell(row: Row | None) -> str:
    return f"{row['ratio_to_cdist']:.2f}{_wrong(row)}" if row else "-"


def _wrong(row: Row) -> str:
    return f" ({row['wrong_percent']:.2g} % wrong)" if row.get("wrong_percent") else ""


def step_table() -> str:
    """A training step of the drop-in quantizer compared with vector_quantize_pytorch's."""
    rows = _cpu("quantizer_step")
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
    return f"{markdown(cells)}\n\n{what}; {_where(rows)}."


def codecs_table() -> str:
    """The encoders of codecs of transformers with and without `patch`."""
    rows = _cpu("codecs")
    cells = [["codec", "frames", "time / unpatched", "wrong in bfloat16", "unpatched", "indices"]]
    for row in rows:
        wrong = [f"{row[f'{side}_wrong_bfloat16']}" for side in ("ours", "theirs")]
        cells.append([row["codec"], f"{row['frames']}", f"{row['time_ratio']:.2f}", *wrong, f"{row['checked_rows']:,}"])
    what = "`encode` in float32, median ratio of calls in turn, beside other processes; random codes and rows"
    return f"{markdown(cells)}\n\n{what}; {_where(rows)}."


def semantic_ids_table() -> str:
    """Residual codes of this library, faiss and scikit-learn: error of each level, collisions and time."""
    rows = _cpu("semantic_ids")
    if not rows:
        return NO_RESULTS
    settings = rows[-1]["settings"]
    rows = [row for row in rows if row["settings"] == settings]
    levels = range(settings["num_levels"])
    cells = [["by", *(f"error after {level + 1}" for level in levels), "collisions", "CPU seconds"]]
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        errors = [spread([row["errors"][level] for row in own], 4) for level in levels]
        counts = [spread([row[name] for row in own], digits) for name, digits in (("collisions", 0), ("seconds", 1))]
        cells.append([method.replace("vq_kernels", "this library"), *errors, *counts])
    items = f"{settings['num_items']:,} synthetic items of {settings['code_dim']} dimensions"
    what = f"{items}, {settings['num_codes']} codes per level"
    return f"{markdown(cells)}\n\nMean ± standard deviation over {len(own)} draws; {what}; {_where(rows)}."


def ablation_table(rows: Sequence[Row]) -> str:
    """One line per variant. Exits if two rows differ in a setting that neither's variant overrides."""
    if not rows:
        return NO_RESULTS
    _check_comparable(rows)
    cells = [["variant", "seeds", *(heading for heading, _, _ in _ABLATION_COLUMNS)]]
    for variant in dict.fromkeys(row["variant"] for row in rows):
        runs = [row for row in rows if row["variant"] == variant]
        finished = [row for row in runs if not row["diverged"]]
        lost = f", {len(runs) - len(finished)} diverged" if len(finished) < len(runs) else ""
        line = [variant, f"{len(runs)}{lost}"]
        for _, name, digits in _ABLATION_COLUMNS:
            values = [row[name] for row in finished if name in row]
            line.append(spread(values, digits) or "-")
        cells.append(line)
    settings = rows[0]["settings"]
    images = "all training images" if settings["limit"] is None else f"{settings['limit']:,} training images"
    what = f"K = {settings['num_codes']}, {settings['epochs']} epochs of {images} ({settings['dataset']})"
    return f"{markdown(cells)}\n\nMean ± standard deviation over the seeds; {what}; {_where(rows)}."


def _check_comparable(rows: Sequence[Row]) -> None:
    for first, row in itertools.combinations(rows, 2):
        overridden = {} if first["variant"] == row["variant"] else {**first["overrides"], **row["overrides"]}
        for name in {**first["settings"], **row["settings"]}:
            if name not in overridden and first["settings"].get(name) != row["settings"].get(name):
                raise SystemExit(
                    f"ablation.jsonl: {row['variant']!r} and {first['variant']!r} differ in {name}: repeat one"
                )


def rate_distortion_table(rows: Sequence[Row]) -> str:
    """The model compared with k-means of the pixels. Perplexity and codes used are those on the test images."""
    if not rows:
        return NO_RESULTS
    return f"{markdown(rate_distortion_cells(rows))}\n\nMean ± standard deviation over the seeds; {_model_runs(rows)}."


def rate_distortion_cells(rows: Sequence[Row]) -> list[list[str]]:
    """The cells of that table: headings, then a line for each K, Q and method. Ratios are the model's over k-means'."""
    cells = [["K", "by", "train MSE", "test MSE", "train ratio", "test ratio", "perplexity", "codes used"]]
    for sizes in sorted({(row["num_quantizers"], row["num_codes"]) for row in rows}):

        def figures(method: str, *names: str, sizes: tuple[int, int] = sizes) -> list[list[float]]:
            return [over_seeds(rows, method, sizes[1], name, sizes[0]) for name in names]

        bounds = figures("kmeans", "train_mse", "test_mse")
        for method, shown in METHODS.items():
            mse = figures(method, "train_mse", "test_mse")
            codes = figures(method, "test_perplexity", "test_codes_used")
            ratios = [
                f"{statistics.fmean(found) / statistics.fmean(bound):.3f}"
                if found and bound and method == "model"
                else ""
                for found, bound in zip(mse, bounds, strict=True)
            ]
            line = [*(spread(found, 5) for found in mse), *ratios, *(spread(found, 0) for found in codes)]
            if any(line):
                cells.append([f"{sizes[0]} × {sizes[1]:,}" if sizes[0] > 1 else f"{sizes[1]:,}", shown, *line])
    return cells


def vqvae_table(rows: Sequence[Row]) -> str:
    """A line for each quantizer in the convolutional VQ-VAE, over its seeds. The time is relative to the first line."""
    if not rows:
        return NO_RESULTS
    lines: list[Sequence[object]] = [("quantizer", "seeds", "test MSE", "perplexity", "CPU time")]
    for method in dict.fromkeys(row["method"] for row in rows):
        runs = [row for row in rows if row["method"] == method]
        figures = (spread([run[name] for run in runs], digits) for name, digits in (("mse", 5), ("perplexity", 0)))
        lines.append((method, len(runs), *figures, spread([run["time"] for run in runs], 2)))
    settings = {
        f"{row['steps']} steps of Adam, batches of {row['batch_size']} images ({row['dataset']})" for row in rows
    }
    return f"{markdown(lines)}\n\n{'; '.join(sorted(settings))}; K = 512, D = 64; {_where(rows)}."


_LEAST = ("codes used, fewest", "perplexity on test, least")


def use_table(rows: Sequence[Row]) -> str:
    """How many codes the model uses: a line for each K, batch size, D and length of run in rate_distortion.py rows."""
    alike: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        if row["method"] == "model" and row["num_quantizers"] == 1:
            kind = (row["settings"][name] for name in ("batch_size", "code_dim", "max_minutes", "unfreeze_encoder_at"))
            alike.setdefault((row["num_codes"], *kind), []).append(row)
    if not alike:
        return NO_RESULTS
    cells = [[*("K", "batch size", "D", "minutes", "encoder frozen until", "seeds", "test MSE"), *_LEAST]]
    for sizes, runs in sorted(alike.items(), key=lambda item: (item[0][0], str(item[0][1:]))):
        mse = spread([row["test_mse"] for row in runs], 5)
        least = [f"{min(row[f'test_{name}'] for row in runs):.0f}" for name in ("codes_used", "perplexity")]
        cells.append([*(f"{size:,}" if size is not None else "-" for size in sizes), str(len(runs)), mse, *least])
    return f"{markdown(cells)}\n\n{_where([row for runs in alike.values() for row in runs])}."


def kmeans_table(rows: Sequence[Row]) -> str:
    """k-means beside faiss and scikit-learn: a line for each data set and contender of clustering.py."""
    cells = [["data", "by", "inertia / scikit-learn's", "time / faiss'", "iterations"]]
    for data, contender, runs in _contenders(rows, "k-means"):
        inertia, seconds = _relative(rows, runs, "inertia", "scikit-learn"), _relative(rows, runs, "seconds", "faiss")
        iterations = [row["iterations"] for row in runs]
        cells.append([data, contender, spread(inertia, 4), spread(seconds, 2), spread(iterations, 0)])
    data_sets = "mixture: 1,000 Gaussian clusters; spectrum: one Gaussian with variances 1, 1/2, 1/3 and so on"
    defaults = "faiss makes 25 iterations and trains on at most 256 rows per centroid; scikit-learn has n_init = 1"
    return _clustering(cells, rows, "k-means", f"{data_sets}. Default settings: {defaults}")


def residual_table(rows: Sequence[Row]) -> str:
    """Residual quantization: a line for each contender of clustering.py."""
    cells: list[list[str]] = []
    for _, contender, runs in _contenders(rows, "residual"):
        by_stage = [spread(errors, 4) for errors in zip(*(row["errors"] for row in runs), strict=True)]
        seconds = spread(_relative(rows, runs, "seconds", "faiss, greedy"), 2)
        cells = cells or [["by", *(f"stage {q + 1}" for q in range(len(by_stage))), "time / faiss greedy"]]
        cells.append([contender, *by_stage, seconds])
    what = "The share of the variance that is left after each stage; unit vectors around 500 topics"
    others = "faiss, beam: max_beam_size = 5, its default; greedy: 1. scikit-learn: KMeans (n_init = 1) stage by stage"
    return _clustering(cells, rows, "residual", f"{what}. {others}")


def product_table(rows: Sequence[Row]) -> str:
    """Product quantization: a line for each contender of clustering.py."""
    cells = [["by", "recall@10", "share of the variance left", "time / faiss'"]]
    for _, contender, runs in _contenders(rows, "product"):
        recall, error = (spread([row[name] for row in runs], 4) for name in ("recall", "error"))
        cells.append([contender, recall, error, spread(_relative(rows, runs, "seconds", "faiss"), 2)])
    what = "Unit vectors around 500 topics, in 8 parts of 8 dimensions, and 1,000 queries"
    how = "All train on the N rows, which are as many as faiss takes (256 per centroid); faiss searches in all codes"
    return _clustering(cells, rows, "product", f"{what}. {how}")


def _contenders(rows: Sequence[Row], op: str) -> Iterator[tuple[str, str, list[Row]]]:
    """Yields data set, contender and the rows of its seeds."""
    own = [row for row in rows if row["op"] == op]
    for data, contender in dict.fromkeys((row["data"], row["contender"]) for row in own):
        yield data, contender, [row for row in own if (row["data"], row["contender"]) == (data, contender)]


def _relative(rows: Sequence[Row], runs: Sequence[Row], name: str, contender: str) -> list[float]:
    """A figure of the runs, divided by that of another contender with the same data and seed."""
    by_seed = {
        (row["op"], row["data"], row["seed"]): row[name]
        for row in rows
        if row["contender"] == contender and name in row
    }
    return [row[name] / by_seed[row["op"], row["data"], row["seed"]] for row in runs]


def _clustering(cells: list[list[str]], rows: Sequence[Row], op: str, what: str) -> str:
    own = [row for row in rows if row["op"] == op]
    if not own:
        return NO_RESULTS
    how = f"{own[0]['timing']}; mean ± standard deviation over {len({row['seed'] for row in own})} seeds"
    command = f"`python benchmarks/clustering.py --threads {own[0]['threads']}`"
    return f"{markdown(cells)}\n\nN × K × D = {_size(own[0])}. {what}. {how}; {_where(own)}; {command}."


# -- GPU: tables of the rows of gpu.py, which prints them too


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
    largest = max(row["N"] for row in found)
    found = [row for row in found if row["N"] == largest]
    dims = sorted({row["D"] for row in found})
    by_key = {(row["contender"], row["D"]): row for row in found}
    cells = [[f"N = {largest:,}, K = {found[0]['K']:,}: TFLOP/s", *(f"D = {d}" for d in dims)]]
    for name, shown in _GPU_CONTENDERS.items():
        own = [by_key.get((name, d)) for d in dims]
        if any(row and row["p50_ms"] for row in own):
            cells.append([shown, *(f"{number(row['tflops'])}{_wrong(row)}" if row else "" for row in own)])
    return f"{markdown(cells)}\n\n2·N·K·D over the median time, float32 input."


_COLUMNS: dict[str, Callable[[Row], object]] = {  # how to make a cell, by the column's heading
    "N × K × D": _size,
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
    ours = {_size(row): row for row in _searches(rows, graph=False) if row["contender"] == "triton"}
    for d, target in _GPU_TARGETS.items():
        row = ours.get(f"1,048,576 × 4,096 × {d}")
        measured = f"{number(row['tflops'])} TFLOP/s" if row and row["p50_ms"] else "-"
        cells.append([f"D = {d}: {target} TFLOP/s on an H200", measured])
    exact = _latest(rows, "exactness", "seed")
    wrong = f"{sum(row['wrong'] for row in exact)} of {sum(row['rows'] for row in exact):,}" if exact else "-"
    cells.append(["0 wrong of 10⁹ rows", wrong])
    graphs = {_size(row): row for row in _searches(rows, graph=True) if row["contender"] == "triton"}
    small = graphs.get("256 × 512 × 512", {}).get("p50_ms")
    cells.append(["256 × 512 × 512 as a CUDA graph: below 10 µs", f"{1e3 * small:.1f} µs" if small else "-"])
    rates = {row["contender"]: row["images_per_s"] for row in _latest(rows, "training", "contender")}
    ratio = f"{rates['vqae.train'] / rates['plain PyTorch']:.2f} ×" if len(rates) == 2 else "-"
    cells.append(["images/s of vqae.train: 3 × plain PyTorch", ratio])
    return markdown(cells)


_MADE = {"bars": target_table, "gpu-search": throughput_table, "gpu-exactness": gpu_exactness_table}
GPU_TABLES = (*_MADE, *_LISTS)


def gpu_table(name: str, rows: Sequence[Row]) -> str:
    """A table of rows of gpu.py, or the sentence that there are none."""
    ops = {"gpu-search": "nearest_code", "gpu-exactness": "exactness", **{key: op for key, (op, *_) in _LISTS.items()}}
    used = [row for row in rows if ops.get(name) in (None, row["op"])]
    if not used:
        return NOT_MEASURED
    if name in _MADE:
        table = _MADE[name](used)
    else:
        op, names, columns = _LISTS[name]
        lines = ([_COLUMNS[column](row) for column in columns] for row in _latest(used, op, *names))
        table = markdown([columns, *lines])
    return f"{table}\n\n{_where(used)}."


def _committed_gpu_table(name: str) -> str:
    return gpu_table(name, gpu_rows())


TABLES: dict[str, Callable[[], str]] = {
    "model": model_table,
    "search": search_table,
    "small-search": small_search_table,
    "step": step_table,
    "codecs": codecs_table,
    "semantic-ids": semantic_ids_table,
    "ablation": lambda: ablation_table(_cpu("ablation")),
    "k-means": lambda: kmeans_table(_cpu("clustering")),
    "residual": lambda: residual_table(_cpu("clustering")),
    "product": lambda: product_table(_cpu("clustering")),
    "rate-distortion": lambda: rate_distortion_table(_cpu("rate_distortion")),
    "vqvae": lambda: vqvae_table(_cpu("conv_vqvae")),
    "use": lambda: use_table([*_cpu("rate_distortion"), *_cpu("batch_sizes")]),
    **{name: partial(_committed_gpu_table, name) for name in GPU_TABLES},
}
"""All tables, by the name in their markers."""


def with_tables(text: str, file: str) -> str:
    """Replaces the tables in a text. Exits if a marker has an unknown name, or no end."""
    for name in re.findall(r"<!-- begin ([\w-]+) -->", text):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, _, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if name not in TABLES or not closed:
            raise SystemExit(f"{file}: {begin} must name one of {', '.join(TABLES)} and be followed by {end}")
        text = f"{before}{begin}\n{TABLES[name]()}\n{end}{after}"
    return text


def documents() -> list[Path]:
    """The files that hold tables."""
    files = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    return [file for file in files if "<!-- begin " in file.read_text()]


def main(arguments: list[str]) -> int:
    """Updates the files, or, with --check, reports which would change."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description="Update the generated tables.")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with 1 if a table would change")
    check, changed = parser.parse_args(arguments).check, False
    for file in documents():
        before = file.read_text()
        after = with_tables(before, file.name)
        changed = changed or before != after
        if check:
            print(f"{file.relative_to(ROOT)} {'is up to date' if before == after else 'differs from the results'}")
        else:
            file.write_text(after)
    return int(changed and check)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
