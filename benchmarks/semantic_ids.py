"""Compares semantic IDs by this library, faiss and scikit-learn: error of each level, collisions and time.

    python benchmarks/semantic_ids.py --out results/semantic_ids.jsonl

The items and the methods are those of examples/semantic_ids.py. Each seed draws other items. The indices are compared
with float64 brute force. It appends a row per seed and method, and prints it, such as

    {"op": "semantic IDs", "method": "faiss", "seed": 0, "errors": [0.21, 0.14, 0.12], "collisions": 1738, ...}

The exit status is 1 if an index of this library is wrong.
"""

import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the packages from the checkout

import torch
import tyro

from benchmarks.results import append_row, environment
from examples.semantic_ids import METHODS, item_embeddings, measure


@dataclass(frozen=True)
class Options:
    """Compare semantic IDs with those of faiss and scikit-learn."""

    num_items: int = 20_000
    """N, synthetic items."""
    code_dim: int = 64
    """D of the embeddings."""
    num_levels: int = 3
    """Q, tokens of each ID."""
    num_codes: int = 256
    """K of each level, a power of two."""
    seeds: int = 3
    """Repetitions, each with other items."""
    out: Path | None = None
    """Append the rows to this file."""


def main(options: Options) -> int:
    """Prints a row for each seed and method."""
    settings = {name: value for name, value in asdict(options).items() if name not in ("seeds", "out")}
    exit_status = 0
    for seed in range(options.seeds):
        x = item_embeddings(options.num_items, options.code_dim, seed)
        for method in METHODS:
            figures = measure(method, x, options.num_levels, options.num_codes, seed)
            row = {"op": "semantic IDs", "method": method, "seed": seed, "settings": settings, **figures}
            row |= environment(torch.device("cpu"))
            print(json.dumps(row))
            if options.out is not None:
                append_row(options.out, row)
            if method == "vq_kernels" and row["wrong"]:
                exit_status = 1
    return exit_status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/semantic_ids.py", description=__doc__)))
