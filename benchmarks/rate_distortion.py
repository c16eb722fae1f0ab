"""The trained model beside K-means of the pixels, which bounds it on the training pictures, for several K.

    python benchmarks/rate_distortion.py --data-dir DIR --num-codes 1 16 64 256 512 1024 --seeds 0 1 2 --out FOLDER
    python benchmarks/rate_distortion.py --data-dir DIR --out FOLDER --max-minutes 10 --epochs 100

Whatever it does not know is a flag of `python -m vqae.train` and goes to every training run. FOLDER gets results.jsonl,
a line for each finished K-means and each finished run, rate_distortion.png, and the runs themselves; the same command
goes on where it stopped, in the middle of a run too. It ends with a table, such as this
(runs of 3 minutes):

    ┃  K ┃      by ┃         train MSE ┃          test MSE ┃ train ratio ┃ test ratio ┃ perplexity ┃ codes used ┃
    │ 64 │ K-means │ 0.03282 ± 0.00001 │ 0.03311 ± 0.00005 │             │            │     61 ± 0 │     64 ± 0 │
    │ 64 │   model │ 0.03353 ± 0.00018 │ 0.03367 ± 0.00025 │       1.022 │      1.017 │     57 ± 2 │     64 ± 1 │

Both see the same pictures: K-means is made from all training pictures (the first --limit of them where that is given),
and "train" is measured on all of these, though the model keeps --val-fraction of them to choose its best epoch by.
So K-means has a little more to learn from. MSE is that of a pixel value, with pixels in [0, 1]; perplexity and codes
used are those on the test pictures.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("rate_distortion")  # loads this module again, once the signal handlers stand

import dataclasses
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from pixel_kmeans import NUM_CANDIDATES, NUM_COMPONENTS, assign, fit_kmeans
from rate_distortion_report import plot_curves, print_table
from result_lines import ResultLines
from rich.console import Console
from search_report import Environment
from torch import Tensor
from train_runs import Dataset, compared_settings, find_dataset, measure_run, run_minutes, run_training

from vq_kernels import perplexity
from vqae.config import Config, find_device
from vqae.data.load import load_images, split_train
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler
from vqae.train import parse

Method = Literal["kmeans", "model"]

_OWN_BUSINESS = ("--seed", "--resume", "--overwrite")  # flags of a run that are not the user's to give


@dataclass(frozen=True)
class Options:
    """Hold the trained model against K-means of the pixels. Other flags go to python -m vqae.train."""

    num_codes: tuple[int, ...] = (1, 16, 64, 256, 512, 1024)
    """The K to do, one after the other."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every K is done with each of these."""
    methods: tuple[Method, ...] = ("kmeans", "model")
    """What to do; the table and the plot show what is finished."""
    data_dir: Path | None = None
    """Where the pictures are."""
    dataset: Dataset | None = None
    """What they are; by default imagefolder where DIR/train is a folder, else cifar10."""
    starts: int = 3
    """Starts of K-means, of which the best goes on."""
    rounds: int = 12
    """Rounds of Lloyd on all pixel values."""
    out: Path = Path("runs/rate_distortion")
    """Folder for the results, the plot and the runs."""


@dataclass(frozen=True)
class Piece:
    """One thing to do: a method, K and a seed, with the run's settings."""

    method: Method
    config: Config
    options: Options

    def name(self) -> dict[str, Any]:
        """What its line is found by."""
        return {"method": self.method, "num_codes": self.config.num_codes, "seed": self.config.seed}

    def settings(self) -> dict[str, Any]:
        """What it is made with, beyond its name."""
        config = self.config
        if self.method == "model":
            return compared_settings(config)
        return {
            "dataset": config.dataset,
            "image_size": config.image_size,
            "limit": config.limit,
            "starts": self.options.starts,
            "rounds": self.options.rounds,
            "components": NUM_COMPONENTS,
            "candidates": NUM_CANDIDATES,
        }


def main(arguments: list[str], _signals: SignalHandler) -> None:
    """Run the command line; raises what `run_command` turns into exit codes."""
    options, config = parse_options(arguments)
    results = ResultLines(options.out / "results.jsonl")
    for seed in dict.fromkeys(options.seeds):
        pieces = [
            Piece(method, _config_of(options, config, num_codes, seed), options)
            for num_codes in dict.fromkeys(options.num_codes)
            for method in dict.fromkeys(options.methods)
        ]
        missing = [piece for piece in pieces if not results.has(piece.name(), piece.settings())]
        if missing:
            _do(missing, results)
    console = Console(width=None if sys.stdout.isatty() else 100)
    print_table(results.lines, console)
    plot_curves(results.lines, options.out / "rate_distortion.png")
    console.print(f"results in {options.out}: results.jsonl, rate_distortion.png", highlight=False)


def parse_options(arguments: list[str]) -> tuple[Options, Config]:
    """The command line: the options, and the settings that all runs share.

    Raises:
        UsageError: a value out of range, or a flag that is for this program to set.
    """
    prog = "python benchmarks/rate_distortion.py"
    options, others = tyro.cli(Options, args=arguments, prog=prog, return_unknown_args=True)
    for flag in others:
        if flag.partition("=")[0] in _OWN_BUSINESS:
            raise UsageError(f"{flag} is set for each run: give --seeds, and another --out to begin anew")
    for name, least in (("num_codes", 1), ("seeds", 0), ("starts", 1), ("rounds", 0)):
        value = getattr(options, name)
        if any(one < least for one in (value if isinstance(value, tuple) else [value])):
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    run = parse(others).run
    data_dir = options.data_dir or run.data_dir  # of --config
    named = options.dataset or (run.dataset if run.dataset != "auto" else None)
    config = dataclasses.replace(run, data_dir=data_dir, dataset=find_dataset(named, data_dir))
    return options, config


def _config_of(options: Options, config: Config, num_codes: int, seed: int) -> Config:
    folder = options.out / "runs" / f"codes-{num_codes}-seed-{seed}"
    return dataclasses.replace(config, num_codes=num_codes, seed=seed, out=folder)


def _do(pieces: list[Piece], results: ResultLines) -> None:
    """Do the pieces of one seed, and write each one's line when it is finished."""
    config = pieces[0].config
    device = find_device(config.device)
    read = load_images(config.dataset, config.data_dir, image_size=config.image_size, seed=config.seed)
    train = read.train if config.limit is None else split_train(read.train, config.limit, 0.0, config.seed)[0]
    most = max(piece.config.num_codes for piece in pieces)
    if most > train.shape[0]:
        raise UsageError(f"--num-codes must be at most {train.shape[0]}, the training pictures, got {most}")
    pictures = {"train": train, "test": read.test}
    environment = vars(Environment.here(device))
    for piece in pieces:
        name = piece.name()
        print(", ".join(f"{key} {value}" for key, value in name.items()), flush=True)
        measure = kmeans_figures if piece.method == "kmeans" else model_figures
        figures = measure(piece, pictures, device)
        sizes = {f"num_{split}": part.shape[0] for split, part in pictures.items()}
        results.add({**name, **figures, **sizes, "settings": piece.settings(), **environment})


def kmeans_figures(piece: Piece, pictures: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """MSE, perplexity and codes used of K-means, on every set of pictures [N, 3, H, W] uint8."""
    start = time.monotonic()
    rows = {split: part.flatten(1).to(device).float() / 255 for split, part in pictures.items()}  # [N, P]
    options, num_codes = piece.options, piece.config.num_codes
    centroids = fit_kmeans(
        rows["train"], num_codes, starts=options.starts, rounds=options.rounds, seed=piece.config.seed
    )
    figures: dict[str, float] = {}
    for split, x in rows.items():
        found = assign(x, centroids)
        counts = torch.bincount(found.indices, minlength=num_codes)
        figures[f"{split}_mse"] = found.sum / x.numel()
        figures[f"{split}_perplexity"] = perplexity(counts).item()
        figures[f"{split}_codes_used"] = int((counts > 0).sum())
    return {**figures, "minutes": (time.monotonic() - start) / 60}


def model_figures(piece: Piece, pictures: dict[str, Tensor], device: torch.device) -> dict[str, float]:
    """The same of the model, trained now, or to the end where a part of the run is there."""
    folder = piece.config.out
    run_training(piece.config)
    figures: dict[str, float] = {}
    for split, measured in measure_run(folder, pictures, device).items():
        figures[f"{split}_mse"] = measured.mse
        figures[f"{split}_perplexity"] = measured.perplexity
        figures[f"{split}_codes_used"] = measured.codes_used
    return {**figures, "minutes": run_minutes(folder)}
