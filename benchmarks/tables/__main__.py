"""Writes the tables of README.md and of docs/**/*.md from the committed results.

    python -m benchmarks.tables           # update them
    python -m benchmarks.tables --check   # exit with 1 if a table would change

A table stands between `<!-- begin NAME -->` and `<!-- end NAME -->`; `TABLES` lists the names. The CPU results are in
benchmarks/results/cpu, one file for each script, and small.jsonl (argmin_bench.py --small) and sweep.jsonl
(rate_distortion.py with other sizes). GPU results are in benchmarks/results/h200/gpu.jsonl, or in h100/gpu.jsonl if
that one is missing; `gpu.py` writes them.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable
from pathlib import Path

from benchmarks.results import ROOT
from benchmarks.tables.clustering import kmeans_table, product_table, residual_table, semantic_ids_table
from benchmarks.tables.gpu import NOT_MEASURED, gpu_rows, gpu_section, gpu_table
from benchmarks.tables.learning import (
    ablation_table,
    codec_table,
    gaussian_table,
    model_table,
    rate_distortion_table,
    use_table,
    vqvae_table,
)
from benchmarks.tables.rows import cpu_rows
from benchmarks.tables.search import codecs_table, search_table, small_search_table, step_table, upstream_table

TABLES: dict[str, Callable[[], str]] = {
    "model": model_table,
    "search": search_table,
    "small-search": small_search_table,
    "step": step_table,
    "codecs": codecs_table,
    "upstream": upstream_table,
    "semantic-ids": semantic_ids_table,
    "ablation": lambda: ablation_table(cpu_rows("ablation")),
    "k-means": lambda: kmeans_table(cpu_rows("clustering")),
    "residual": lambda: residual_table(cpu_rows("clustering")),
    "product": lambda: product_table(cpu_rows("clustering")),
    "rate-distortion": lambda: rate_distortion_table(cpu_rows("rate_distortion")),
    "gaussian": lambda: gaussian_table(cpu_rows("gaussian_codes")),
    "vqvae": lambda: vqvae_table(cpu_rows("conv_vqvae")),
    "vqvae-long": lambda: vqvae_table(cpu_rows("conv_vqvae_long")),
    "residual-signal": lambda: codec_table(cpu_rows("residual_signal")),
    "use": lambda: use_table(cpu_rows("sweep")),
    "gpu-search": lambda: gpu_table("gpu-search", gpu_rows()) or NOT_MEASURED,
    "gpu": lambda: gpu_section(gpu_rows()),
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
