"""The lines of rate_distortion.py, shown: a table on the terminal, and a plot."""

import io
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from learning_tables import METHODS, over_seeds, rate_distortion_rows
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table

from vqae.training.checkpoint import atomic_write


def print_table(lines: Sequence[dict[str, Any]], console: Console) -> None:
    """Print what is finished, a row for each K and method."""
    headings, *rows = rate_distortion_rows(lines)
    table = Table(title="MSE a pixel value; mean ± standard deviation over the seeds", title_justify="left")
    for heading in headings:
        table.add_column(heading.replace(" ratio", "\nratio"), justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*row, end_section=row[1] == METHODS["model"])
    console.print(table)


def plot_curves(lines: Sequence[dict[str, Any]], file: Path) -> None:
    """Draw MSE against the bits of a code: both methods, on train and on test, with bars of one deviation over seeds.

    Raises:
        UsageError: the file cannot be written.
    """
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.subplots()
    all_num_codes = sorted({line["num_codes"] for line in lines})
    for method, color in zip(METHODS, ("tab:gray", "tab:blue"), strict=True):
        for split, style in (("train", "--"), ("test", "-")):
            found = {k: over_seeds(lines, method, k, f"{split}_mse") for k in all_num_codes}
            points = [(math.log2(k), one.mean, one.deviation) for k, one in found.items() if one is not None]
            if points:
                bits, means, deviations = zip(*points, strict=True)
                label = f"{METHODS[method]}, {split}"
                axes.errorbar(
                    bits, means, yerr=deviations, label=label, color=color, linestyle=style, marker=".", capsize=3
                )
    axes.set(xlabel="bits a picture, log2 K", ylabel="MSE a pixel value, pixels in [0, 1]")
    axes.grid(alpha=0.3)
    if lines:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    atomic_write(file, buffer.getbuffer())
