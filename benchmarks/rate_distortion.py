"""Compares the trained model with k-means of the pixels, which bounds its MSE on the training images, for several K.

With several codes per image, the k-means is a residual one: each stage clusters what the stages before it left.

    python benchmarks/rate_distortion.py --data-dir DIR --num-codes 1 16 64 256 512 1024 --seeds 0 1 2 --out FOLDER
    python benchmarks/rate_distortion.py --data-dir DIR --num-codes 512 --num-quantizers 1 2 4 8 --out FOLDER
    python benchmarks/rate_distortion.py --data-dir DIR --out FOLDER --max-minutes 10 --epochs 100

Unknown flags are passed to `python -m vqae.train`. FOLDER gets results.jsonl, with a line for each finished k-means and
each finished run, and the runs themselves. The same command resumes where it stopped, even within
a run. It ends with a table, such as this one of 3-minute runs:

    | K       | bits | by      | train MSE | test MSE | train ratio | test ratio | perplexity | codes used |
    |---------|------|---------|-----------|----------|-------------|------------|------------|------------|
    | 2 × 512 | 18   | K-means | 0.02268   | 0.02463  |             |            | 398        | 1005       |
    | 2 × 512 | 18   | model   | 0.02311   | 0.02447  | 1.019       | 0.994      | 409        | 1012       |

Both use the same images. K-means is fitted to all training images (the first --limit of them); the model holds out
--val-fraction of them to choose its best epoch. "train" is measured on all of them, perplexity and codes used on the
test images. MSE is per pixel value, with pixels in [0, 1].
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout
    from vqae.runtime.process import run_command

    run_command("benchmarks.rate_distortion")  # installs the signal handlers, then imports this module again

import dataclasses
import itertools
import time
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from benchmarks.pixel_kmeans import NUM_CANDIDATES, NUM_COMPONENTS, assign, fit_kmeans
from benchmarks.results import Row, aligned, append_row, environment, is_finished, markdown, read_rows
from benchmarks.tables.learning import rate_distortion_cells
from benchmarks.training_runs import Dataset, compared_settings, find_dataset, measure_run, run_minutes, run_training
from vq_kernels import perplexity
from vqae.config import Config, find_device
from vqae.data.load import load_images, split_train
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler
from vqae.train import parse

Method = Literal["kmeans", "model"]

_SET_BY_THIS_PROGRAM = ("--seed", "--resume", "--overwrite")


@dataclass(frozen=True)
class Options:
    """Compare the trained model with k-means of the pixels. Other flags are passed to python -m vqae.train."""

    num_codes: tuple[int, ...] = (1, 16, 64, 256, 512, 1024)
    """The values of K."""
    num_quantizers: tuple[int, ...] = (1,)
    """The values of Q, the codes per image. Every K is run with each."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Every K is run with each seed."""
    methods: tuple[Method, ...] = ("kmeans", "model")
    """Methods to run. The table shows all finished ones."""
    data_dir: Path | None = None
    """Folder of the images."""
    dataset: Dataset | None = None
    """Default: imagefolder if DIR/train is a folder, else cifar10."""
    starts: int = 3
    """Initialisations of k-means. The best one is refined."""
    rounds: int = 12
    """Rounds of Lloyd's algorithm on all pixel values."""
    out: Path = Path("runs/rate_distortion")
    """Folder for the results and the runs."""


Piece = tuple[Method, Config]  # one method at one K, Q and seed


def name_of(piece: Piece) -> Row:
    """The entries that name a piece in the results."""
    return {"method": piece[0], **{name: getattr(piece[1], name) for name in ("num_codes", "num_quantizers", "seed")}}


def settings_of(piece: Piece, options: Options) -> dict[str, Any]:
    """The settings of a piece in addition to its name."""
    if piece[0] == "model":
        return compared_settings(piece[1])
    shared = {name: getattr(piece[1], name) for name in ("dataset", "image_size", "limit")}
    shared |= {name: getattr(options, name) for name in ("starts", "rounds")}
    return {**shared, "components": NUM_COMPONENTS, "candidates": NUM_CANDIDATES}


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Runs the command line. `run_command` turns its exceptions into exit codes."""
    options, config = parse_options(arguments)
    file, folder = options.out / "results.jsonl", options.out / "runs"
    for seed in dict.fromkeys(options.seeds):
        pieces: list[Piece] = []
        for k, q in itertools.product(dict.fromkeys(options.num_codes), dict.fromkeys(options.num_quantizers)):
            out = folder / f"codes-{k}{f'-by-{q}' if q > 1 else ''}-seed-{seed}"
            own = dataclasses.replace(config, num_codes=k, num_quantizers=q, seed=seed, out=out)
            pieces += [(method, own) for method in dict.fromkeys(options.methods)]
        missing = [piece for piece in pieces if not is_finished(file, name_of(piece), settings_of(piece, options))]
        if missing:
            _run(missing, options, file, signals)
    print(aligned(markdown(rate_distortion_cells(read_rows(file)))))
    print(f"results in {file}")


def parse_options(arguments: list[str]) -> tuple[Options, Config]:
    """Parses the options, and the settings that all runs share. Raises UsageError for an invalid one."""
    prog = "python benchmarks/rate_distortion.py"
    options, others = tyro.cli(Options, args=arguments, prog=prog, return_unknown_args=True)
    for flag in others:
        if flag.partition("=")[0] in _SET_BY_THIS_PROGRAM:
            raise UsageError(f"{flag} is set for each run: give --seeds, and another --out to start anew")
    for name, least in (("num_codes", 1), ("num_quantizers", 1), ("seeds", 0), ("starts", 1), ("rounds", 0)):
        value = getattr(options, name)
        if any(one < least for one in (value if isinstance(value, tuple) else [value])):
            raise UsageError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
    run = parse(others).run
    data_dir = options.data_dir or run.data_dir  # the latter from --config
    named = options.dataset or (run.dataset if run.dataset != "auto" else None)
    config = dataclasses.replace(run, data_dir=data_dir, dataset=find_dataset(named, data_dir))
    return options, config


def _run(pieces: list[Piece], options: Options, file: Path, signals: SignalHandler) -> None:
    """Runs the methods of one seed for each K, and appends each row when it is done."""
    config = pieces[0][1]
    device = find_device(config.device)
    read = load_images(config.dataset, config.data_dir, **config.folder_options)
    train = read.train if config.limit is None else split_train(read.train, config.limit, 0.0, config.seed)[0]
    most = max(config.num_codes for _, config in pieces)
    if most > train.shape[0]:
        raise UsageError(f"--num-codes must be at most {train.shape[0]}, the training images, got {most}")
    images = {"train": train, "test": read.test}
    sizes = {f"num_{split}": part.shape[0] for split, part in images.items()}
    for piece in pieces:
        name = name_of(piece)
        print(", ".join(f"{key} {value}" for key, value in name.items()), flush=True)
        if piece[0] == "model":
            run_training(piece[1], signals)
            figures = model_figures(piece[1], images, device)
        else:
            figures = kmeans_figures(piece[1], options, images, device)
        append_row(file, {**name, **figures, **sizes, "settings": settings_of(piece, options), **environment(device)})


def _figures(found: dict[str, tuple[float, Tensor]], minutes: float) -> Row:
    """The entries of a row for the MSE and the counts of codes [K] or [Q, K] on each set of images."""
    figures: Row = {}
    for split, (mse, counts) in found.items():
        figures[f"{split}_mse"] = mse
        figures[f"{split}_perplexity"] = perplexity(counts).mean().item()
        figures[f"{split}_codes_used"] = int((counts > 0).sum())
    return {**figures, "minutes": minutes}


def kmeans_figures(config: Config, options: Options, images: dict[str, Tensor], device: torch.device) -> Row:
    """Fits k-means, stage by stage, and measures it on every set of images [N, 3, H, W] uint8."""
    start = time.monotonic()
    rows = {split: part.flatten(1).to(device).float() / 255 for split, part in images.items()}  # [N, P]
    how = {"starts": options.starts, "rounds": options.rounds, "seed": config.seed}
    mse: dict[str, float] = {}
    counts: dict[str, list[Tensor]] = {split: [] for split in rows}
    for _ in range(config.num_quantizers):
        centroids = fit_kmeans(rows["train"], config.num_codes, **how)
        for split, x in rows.items():
            found = assign(x, centroids)
            mse[split] = found.sum / x.numel()
            counts[split].append(torch.bincount(found.indices, minlength=config.num_codes))
            x -= centroids[found.indices]
    measured = {split: (mse[split], torch.stack(counts[split])) for split in rows}
    return _figures(measured, (time.monotonic() - start) / 60)


def model_figures(config: Config, images: dict[str, Tensor], device: torch.device) -> Row:
    """Measures the trained model."""
    measured = measure_run(config.out, images, device)
    return _figures({split: (one.mse, one.counts) for split, one in measured.items()}, run_minutes(config.out))
