"""Write the README's tables from the committed results.

    python benchmarks/readme_tables.py           # rewrite README.md
    python benchmarks/readme_tables.py --check   # exit 1 if it would change

The results lie in benchmarks/results/cpu: train.json (a run's last line of metrics.jsonl, with the command and the
machine), train_bench.jsonl, argmin.jsonl (argmin_bench.py) and exactness_soak.jsonl. A table stands in README.md
between `<!-- begin NAME -->` and `<!-- end NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

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


def model_table() -> str:
    """What the auto-encoder reached."""
    run = json.loads((RESULTS / "train.json").read_text())
    bench = read_lines("train_bench.jsonl")[-1]
    soak = read_lines("exactness_soak.jsonl")[-1]
    rows = [
        ("Indices that differ from a float64 brute force", f"{soak['wrong']} of {soak['rows']:,}"),
        ("Test MSE a pixel value (pixels in [0, 1]), K = 512", f"{run['test_mse']:.4f} ({run['psnr_db']:.2f} dB)"),
        ("Codes in use on the test pictures", f"{run['codes_used']} of 512, perplexity {run['perplexity']:.0f}"),
        ("Training time, start to exit", f"{run['wall_s'] / 60:.1f} minutes for {run['epoch']:g} epochs"),
        ("Pictures a second, beside a bare loop without quantizer or data", f"{bench['ratio']:.2f} of it"),
    ]
    lines = ["| | measured |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows)]
    return "\n".join([*lines, "", f"{run['data']}; {run['machine']}; {run['date']}; `{run['command']}`."])


def search_table() -> str:
    """The search's time beside the others', as ratios within one run."""
    rows = [row for row in read_lines("argmin.jsonl") if row["data"] == "gaussian" and row["status"] == "ok"]
    shapes = list(dict.fromkeys((row["N"], row["K"], row["D"]) for row in rows))
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
    where = f"{first['device']}; {first['versions']}; {first['date']}"
    return "\n".join([*lines, "", f"Median time over that of cdist + argmin; float32, Gaussian; {where}."])


def with_tables(text: str) -> str:
    """The README's text with its tables made anew."""
    for name, table in (("model", model_table()), ("search", search_table())):
        begin, end = f"<!-- begin {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(re.escape(begin) + ".*?" + re.escape(end), re.DOTALL)
        if not pattern.search(text):
            raise SystemExit(f"README.md must hold {begin} and {end}")
        text = pattern.sub(lambda _, b=begin, t=table, e=end: f"{b}\n{t}\n{e}", text)  # type: ignore[misc]
    return text


def main(arguments: list[str]) -> int:
    """Rewrite README.md, or, with --check, say whether that would change it."""
    file = ROOT / "README.md"
    before = file.read_text()
    after = with_tables(before)
    if arguments == ["--check"]:
        print("README.md is up to date" if before == after else "README.md differs from the results")
        return int(before != after)
    file.write_text(after)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
