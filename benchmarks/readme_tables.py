"""Write the tables of README.md and of the documents from the committed results.

    python benchmarks/readme_tables.py           # rewrite them, and draw the plot of the GPU's results if there are any
    python benchmarks/readme_tables.py --check   # exit 1 if a table would change

The results lie in benchmarks/results/cpu: train_bench.jsonl, argmin.jsonl (argmin_bench.py), exactness_soak.jsonl,
ablation.jsonl (recipe_ablation.py), rate_distortion.jsonl (the results.jsonl of rate_distortion.py), batch_sizes.jsonl
(the same, of other batch sizes) and quantizer_step.jsonl (quantizer_step_bench.py). Those of a GPU lie in a folder
named after it, such as benchmarks/results/h200, as gpu_pass.py leaves them. A table stands between
`<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from gpu import tables as gpu_tables
from gpu.measured import results as gpu_results
from gpu.measured import searches as gpu_searches
from learning_tables import ablation_table, over_seeds, rate_distortion_table, use_table

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "cpu"
CONTENDERS = {
    "torch": "this library",
    "cdist": "cdist + argmin",
    "addmm-chunked": "addmm, chunked",
    "faiss": "faiss IndexFlatL2",
    "gemm": "bare GEMM",
}


def read_lines(name: str) -> list[dict[str, Any]]:
    """The objects of a JSON lines file of the results."""
    return [json.loads(line) for line in (RESULTS / name).read_text().splitlines()]


def read_lines_if_any(name: str) -> list[dict[str, Any]]:
    """The same; none where the file is not there yet."""
    return read_lines(name) if (RESULTS / name).exists() else []


def model_table() -> str:
    """What the auto-encoder reached."""
    lines = read_lines("rate_distortion.jsonl")
    found = {name: over_seeds(lines, "model", 512, name) for name in ("test_mse", "test_codes_used", "test_perplexity")}
    mse, codes_used, perplexity = (spread for spread in found.values() if spread is not None)
    bound = over_seeds(lines, "kmeans", 512, "test_mse")
    runs = [line for line in lines if (line["method"], line["num_codes"]) == ("model", 512)]
    first, settings = runs[0], runs[0]["settings"]
    bench = read_lines("train_bench.jsonl")[-1]
    soak = read_lines("exactness_soak.jsonl")[-1]
    rows = [
        ("Indices that differ from a float64 brute force", f"{soak['wrong']} of {soak['rows']:,}"),
        ("Test MSE a pixel value (pixels in [0, 1]), K = 512", f"{mse.text(5)} ({-10 * math.log10(mse.mean):.2f} dB)"),
        ("K-means of the pixels, on the same pictures", bound.text(5) if bound else "-"),
        ("Codes in use on the test pictures", f"{codes_used.text(0)} of 512, perplexity {perplexity.text(0)}"),
        ("Training time, start to exit", f"{settings['max_minutes']:g} minutes"),
        ("Pictures a second, beside a bare loop without quantizer or data", f"{bench['ratio']:.2f} of it"),
    ]
    table = "\n".join(["| | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)])
    pictures = (
        f"{first['num_train']:,} training pictures (2 % of them held out) and {first['num_test']:,} test pictures"
    )
    what = f"CIFAR-10 (JPEG copy), {pictures}; mean ± standard deviation over {mse.seeds} seeds"
    length = f"--max-minutes {settings['max_minutes']:g} --epochs {settings['epochs']}"
    command = f"python -m vqae.train --dataset imagefolder --data-dir DIR {length}"
    others = f"The brute force: {soak['device']}, {soak['date']}; the bare loop: {bench['device']}, {bench['date']}"
    where = f"{first['device']}; {first['versions']}; {first['date']}"
    return f"{table}\n\n{what}; {where}; `{command}`. {others}."


def search_table() -> str:
    """The search's time beside the others', as ratios within one run: a table for each machine."""
    rows = [row for row in read_lines("argmin.jsonl") if row["data"] == "gaussian" and row["status"] == "ok"]
    machines = dict.fromkeys(row["device"] for row in rows)
    tables = [machine_table([row for row in rows if row["device"] == machine]) for machine in machines]
    return "\n\n".join([*tables, "Median time over that of cdist + argmin, in one run; float32, Gaussian."])


def machine_table(rows: list[dict[str, Any]]) -> str:
    """The part of `search_table` that was measured on one machine."""
    shapes = dict.fromkeys((row["N"], row["K"], row["D"]) for row in rows)
    lines = [
        "| N × K × D | " + " | ".join(CONTENDERS.values()) + " |",
        "|---" * (len(CONTENDERS) + 1) + "|",
    ]
    for shape in shapes:
        times = {row["contender"]: row for row in rows if (row["N"], row["K"], row["D"]) == shape}
        cells = []
        for name in CONTENDERS:
            row = times.get(name)
            wrong = f" ({row['wrong_percent']:.2g} % wrong)" if row and row["wrong_percent"] else ""
            cells.append(f"{row['ratio_to_cdist']:.2f}{wrong}" if row else "-")
        lines.append(f"| {shape[0]:,} × {shape[1]:,} × {shape[2]} | " + " | ".join(cells) + " |")
    first = rows[0]
    return "\n".join([*lines, "", f"{first['device']}; {first['versions']}; {first['date']}."])


def step_table() -> str:
    """A training step of the drop-in quantizer beside the original's."""
    line = read_lines("quantizer_step.jsonl")[-1]
    rows = [
        ["", "here", "there", "ratio"],
        ["time", f"{line['ours_ms']:.0f} ms", f"{line['theirs_ms']:.0f} ms", f"{line['time_ratio']:.2f}"],
        [
            "memory beyond what was held",
            f"{line['ours_peak_mib']:.0f} MiB",
            f"{line['theirs_peak_mib']:.0f} MiB",
            f"{line['memory_ratio']:.2f}",
        ],
    ]
    first, *others = ("| " + " | ".join(row) + " |" for row in rows)
    size = f"x [{line['batch']}, {line['length']}, {line['dim']}], {line['num_codes']:,} codes"
    where = f"{line['device']}; {line['versions']}; {line['date']}"
    table = "\n".join([first, "|---" * len(rows[0]) + "|", *others])
    return f"{table}\n\nForward, backward and moving averages; {size}; medians of steps taken in turns; {where}."


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"model": model_table, "search": search_table, "gpu-search": gpu_tables.readme_table},
    "docs/explanations/learning.md": {
        "ablation": lambda: ablation_table(read_lines_if_any("ablation.jsonl")),
        "rate-distortion": lambda: rate_distortion_table(read_lines_if_any("rate_distortion.jsonl")),
        "use": lambda: use_table(
            [*read_lines_if_any("rate_distortion.jsonl"), *read_lines_if_any("batch_sizes.jsonl")]
        ),
    },
    "docs/guides/migrating.md": {"step": step_table},
    "docs/explanations/performance.md": {
        **gpu_tables.TABLES,
        "gpu-rate-distortion": lambda: rate_distortion_table(gpu_results("rate_distortion")),
    },
}
"""How each file's tables are made, by their names."""


def with_tables(file_name: str, text: str) -> str:
    """The text of a file of `TABLES` with its tables made anew."""
    for name, make_table in TABLES[file_name].items():
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        before, opened, rest = text.partition(begin)
        _, closed, after = rest.partition(end)
        if not opened or not closed:
            raise SystemExit(f"{file_name} must hold {begin} and {end}")
        text = f"{before}{begin}\n{make_table()}\n{end}{after}"
    return text


def main(arguments: list[str]) -> int:
    """Rewrite the files, or, with --check, say whether that would change them."""
    changed = False
    for name in TABLES:
        file = ROOT / name
        before = file.read_text()
        after = with_tables(name, before)
        changed = changed or before != after
        if arguments == ["--check"]:
            print(f"{name} is up to date" if before == after else f"{name} differs from the results")
        else:
            file.write_text(after)
    if arguments != ["--check"] and gpu_searches():
        gpu_tables.plot_throughput(ROOT / "docs" / "images" / "gpu_search.png")
    return int(changed and arguments == ["--check"])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
