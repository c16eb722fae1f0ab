"""The trained model beside k-means of the pixels, which bounds its MSE on the training images, for several K.

    python benchmarks/rate_distortion.py --data-dir DIR --num-codes 1 16 64 256 512 1024 --seeds 0 1 2 --out FOLDER
    python benchmarks/rate_distortion.py --data-dir DIR --out FOLDER --max-minutes 10 --epochs 100

Unknown flags are passed to `python -m vqae.train`. FOLDER gets results.jsonl, with a line for each finished k-means and
each finished run, rate_distortion.png, and the runs themselves. The same command resumes where it stopped, even within
a run. It ends with a table, such as this one of 3-minute runs:

    | K  | by      | train MSE         | test MSE          | train ratio | test ratio | perplexity | codes used |
    |----|---------|-------------------|-------------------|-------------|------------|------------|------------|
    | 64 | K-means | 0.03282 ± 0.00001 | 0.03311 ± 0.00005 |             |            | 61 ± 0     | 64 ± 0     |
    | 64 | model   | 0.03353 ± 0.00018 | 0.03367 ± 0.00025 | 1.022       | 1.017      | 57 ± 2     | 64 ± 1     |

Both use the same images. K-means is fitted to all training images (the first --limit of them), and "train" is measured
on all of these, although the model holds out --val-fraction of them to choose its best epoch. So k-means has slightly
more training data. MSE is per pixel value, with pixels in [0, 1]. Perplexity and codes used are those on the test
images.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout
    from vqae.runtime.process import run_command

    run_command("benchmarks.rate_distortion")  # installs the signal handlers, then imports this module again

import dataclasses
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from matplotlib.figure import Figure
from torch import Tensor

from benchmarks.pixel_kmeans import NUM_CANDIDATES, NUM_COMPONENTS, assign, fit_kmeans
from benchmarks.results import Row, aligned, append_row, environment, is_finished, markdown, read_rows
from benchmarks.tables import METHODS, over_seeds, rate_distortion_cells
from benchmarks.training_runs import Dataset, compared_settings, find_dataset, measure_run, run_minutes, run_training
from vq_kernels import perplexity
from vqae.config import Config, find_device
from vqae.data.load import load_images, split_train
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler
from vqae.train import parse
from vqae.training.checkpoint import atomic_write

Method = Literal["kmeans", "model"]

_SET_BY_THIS_PROGRAM = ("--seed", "--resume", "--overwrite")


@dataclass(frozen=True)
class Options:
    """Compare the trained model with k-means of the pixels. Other flags are passed to python -m vqae.train."""

    num_codes: tuple[int, ...] = (1, 16, 64, 256, 512, 1024)
    """The values of K."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every K is run with each seed."""
    methods: tuple[Method, ...] = ("kmeans", "model")
    """Methods to run. The table and the plot show all finished ones."""
    data_dir: Path | None = None
    """Folder of the images."""
    dataset: Dataset | None = None
    """Default: imagefolder if DIR/train is a folder, else cifar10."""
    starts: int = 3
    """Initialisations of k-means. The best one is refined."""
    rounds: int = 12
    """Rounds of Lloyd's algorithm on all pixel values."""
    out: Path = Path("runs/rate_distortion")
    """Folder for the results, the plot and the runs."""


@dataclass(frozen=True)
class Piece:
    """One method at one K and seed, with the settings of its run."""

    method: Method
    config: Config
    options: Options

    def name(self) -> Row:
        """The entries that name it in the results."""
        return {"method": self.method, "num_codes": self.config.num_codes, "seed": self.config.seed}

    def settings(self) -> dict[str, Any]:
        """What it is made with, beyond its name."""
        if self.method == "model":
            return compared_settings(self.config)
        shared = {name: getattr(self.config, name) for name in ("dataset", "image_size", "limit")}
        shared |= {name: getattr(self.options, name) for name in ("starts", "rounds")}
        return {**shared, "components": NUM_COMPONENTS, "candidates": NUM_CANDIDATES}


def main(arguments: list[str], _signals: SignalHandler) -> None:
    """Runs the command line. `run_command` turns its exceptions into exit codes."""
    options, config = parse_options(arguments)
    file = options.out / "results.jsonl"
    for seed in dict.fromkeys(options.seeds):
        pieces = [
            Piece(method, _config_of(options, config, num_codes, seed), options)
            for num_codes in dict.fromkeys(options.num_codes)
            for method in dict.fromkeys(options.methods)
        ]
        missing = [piece for piece in pieces if not is_finished(file, piece.name(), piece.settings())]
        if missing:
            _run(missing, file)
    print(aligned(markdown(rate_distortion_cells(read_rows(file)))))
    plot_curves(read_rows(file), options.out / "rate_distortion.png")
    print(f"results in {options.out}: results.jsonl, rate_distortion.png")


def parse_options(arguments: list[str]) -> tuple[Options, Config]:
    """Parses the command line into the options and the settings that all runs share.

    Raises:
        UsageError: a value out of range, or a flag that this program sets itself.
    """
    prog = "python benchmarks/rate_distortion.py"
    options, others = tyro.cli(Options, args=arguments, prog=prog, return_unknown_args=True)
    for flag in others:
        if flag.partition("=")[0] in _SET_BY_THIS_PROGRAM:
            raise UsageError(f"{flag} is set for each run: give --seeds, and another --out to start anew")
    for name, least in (("num_codes", 1), ("seeds", 0), ("starts", 1), ("rounds", 0)):
        value = getattr(options, name)
        if any(one < least for one in (value if isinstance(value, tuple) else [value])):
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    run = parse(others).run
    data_dir = options.data_dir or run.data_dir  # the latter from --config
    named = options.dataset or (run.dataset if run.dataset != "auto" else None)
    config = dataclasses.replace(run, data_dir=data_dir, dataset=find_dataset(named, data_dir))
    return options, config


def _config_of(options: Options, config: Config, num_codes: int, seed: int) -> Config:
    folder = options.out / "runs" / f"codes-{num_codes}-seed-{seed}"
    return dataclasses.replace(config, num_codes=num_codes, seed=seed, out=folder)


def _run(pieces: list[Piece], file: Path) -> None:
    """Runs the pieces of one seed, and appends each row at once."""
    config = pieces[0].config
    device = find_device(config.device)
    read = load_images(config.dataset, config.data_dir, image_size=config.image_size, seed=config.seed)
    train = read.train if config.limit is None else split_train(read.train, config.limit, 0.0, config.seed)[0]
    most = max(piece.config.num_codes for piece in pieces)
    if most > train.shape[0]:
        raise UsageError(f"--num-codes must be at most {train.shape[0]}, the training images, got {most}")
    images = {"train": train, "test": read.test}
    sizes = {f"num_{split}": part.shape[0] for split, part in images.items()}
    for piece in pieces:
        name = piece.name()
        print(", ".join(f"{key} {value}" for key, value in name.items()), flush=True)
        figures = (kmeans_figures if piece.method == "kmeans" else model_figures)(piece, images, device)
        append_row(file, {**name, **figures, **sizes, "settings": piece.settings(), **environment(device)})


def _figures(found: dict[str, tuple[float, Tensor]], minutes: float) -> Row:
    """The entries of a row for the MSE and the counts of codes [K] on each set of images."""
    figures: Row = {}
    for split, (mse, counts) in found.items():
        figures[f"{split}_mse"] = mse
        figures[f"{split}_perplexity"] = perplexity(counts).item()
        figures[f"{split}_codes_used"] = int((counts > 0).sum())
    return {**figures, "minutes": minutes}


def kmeans_figures(piece: Piece, images: dict[str, Tensor], device: torch.device) -> Row:
    """Fits k-means and measures it on every set of images [N, 3, H, W] uint8."""
    start = time.monotonic()
    rows = {split: part.flatten(1).to(device).float() / 255 for split, part in images.items()}  # [N, P]
    options, num_codes = piece.options, piece.config.num_codes
    centroids = fit_kmeans(
        rows["train"], num_codes, starts=options.starts, rounds=options.rounds, seed=piece.config.seed
    )
    found = {split: assign(x, centroids) for split, x in rows.items()}
    measured = {
        split: (one.sum / rows[split].numel(), torch.bincount(one.indices, minlength=num_codes))
        for split, one in found.items()
    }
    return _figures(measured, (time.monotonic() - start) / 60)


def model_figures(piece: Piece, images: dict[str, Tensor], device: torch.device) -> Row:
    """Trains the model, or resumes its run, and measures it."""
    run_training(piece.config)
    measured = measure_run(piece.config.out, images, device)
    return _figures({split: (one.mse, one.counts) for split, one in measured.items()}, run_minutes(piece.config.out))


def plot_curves(rows: Sequence[Row], file: Path) -> None:
    """Plots the MSE of both methods on train and test against log2 K, with the standard deviation over the seeds.

    Raises:
        UsageError: the file cannot be written.
    """
    figure = Figure(figsize=(7.0, 5.0), layout="constrained")
    axes = figure.subplots()
    all_num_codes = sorted({row["num_codes"] for row in rows})
    for method, color in zip(METHODS, ("tab:gray", "tab:blue"), strict=True):
        for split, style in (("train", "--"), ("test", "-")):
            found = {k: over_seeds(rows, method, k, f"{split}_mse") for k in all_num_codes}
            points = [(math.log2(k), one.mean, one.deviation) for k, one in found.items() if one is not None]
            if points:
                bits, means, deviations = zip(*points, strict=True)
                label = f"{METHODS[method]}, {split}"
                axes.errorbar(
                    bits, means, yerr=deviations, label=label, color=color, linestyle=style, marker=".", capsize=3
                )
    axes.set(xlabel="bits per image, log2 K", ylabel="MSE per pixel value, pixels in [0, 1]")
    axes.grid(alpha=0.3)
    if rows:
        axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=150)
    atomic_write(file, buffer.getbuffer())
