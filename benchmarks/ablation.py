"""Trains the default recipe and variants of it on the same images, to measure the effect of each ingredient.

    python benchmarks/ablation.py --data-dir DIR --epochs 2 --seeds 0 1 2
    python benchmarks/ablation.py --data-dir DIR --epochs 2 --variants default "no dead-code resets"
    python -m benchmarks.tables    # updates the table in the documentation

"encoder frozen at first" freezes the encoder for three quarters of the run, where a step takes a third of the time.
Each variant after it changes one ingredient of it, or adds one; see `VARIANTS`. Each finished run is a line of
benchmarks/results/cpu/ablation.jsonl and is not repeated. A run that was stopped resumes. The figures are those of the
best epoch by the validation images. A variant that diverges has none.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout
    from vqae.runtime.process import run_command

    run_command("benchmarks.ablation")  # installs the signal handlers, then imports this module again

import dataclasses
import re
from dataclasses import dataclass
from typing import Any

import tyro

from benchmarks.results import RESULTS, Row, append_row, environment, is_finished
from benchmarks.training_runs import Dataset, compared_settings, find_dataset, measure_run, run_minutes, run_training
from vqae.config import RECIPES, Config, find_device
from vqae.data.load import Images, load_images, split_train
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import SignalHandler

FROZEN_AT_FIRST = {"unfreeze_encoder_at": 0.75}
CHANGES: dict[str, dict[str, Any]] = {
    # One ingredient removed.
    "random initialisation": {"network_init": "random", "unfreeze_encoder_at": 0.0, "encoder_lr": 0.3},
    "no dead-code resets": {"restart_after": 0},
    "codebook trained by plain SGD": {"codebook_step": "plain"},
    "no horizontal flips": {"flip": False},
    "no warm-up": {"warmup": 0.0},
    "none of these: --recipe plain": RECIPES["plain"],
    # When and how fast the encoder is trained.
    "encoder always frozen": {"unfreeze_encoder_at": 0.999999},
    "encoder learning rate 0.03": {"encoder_lr": 0.03},
    # One ingredient changed or added.
    "BatchNorm before the quantizer": {"embedding_norm": "batch"},
    "D = 512, without a projection": {"code_dim": 512},
    "D = 32": {"code_dim": 32},
    "codebook initialised from embeddings": {"codebook_init": "data"},
    "codebook learning rate 0.05": {"codebook_lr": 0.05},
    "decoder learning rate 0.1": {"lr": 0.1},
    "weight decay 5e-4": {"weight_decay": 5e-4},
}
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    "encoder frozen at first": FROZEN_AT_FIRST,
    **{name: FROZEN_AT_FIRST | change for name, change in CHANGES.items()},
}
"""Overrides of the default settings, by the variant's name."""


@dataclass(frozen=True)
class Options:
    """Train the default recipe and its variants."""

    epochs: int
    """Epochs of every run."""
    seeds: tuple[int, ...] = (0,)
    """Every variant is trained with each seed. The seed also selects the validation images."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Names of variants."""
    data_dir: Path | None = None
    """Folder of the images."""
    dataset: Dataset | None = None
    """Default: imagefolder if DIR/train is a folder, else cifar10."""
    limit: int | None = None
    """Use only the first N training images, after a seeded shuffle."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    out: Path = RESULTS / "cpu" / "ablation.jsonl"
    """File of the results."""
    runs: Path = Path("runs/ablation")
    """Folder for the runs themselves."""


def main(arguments: list[str], signals: SignalHandler) -> None:
    """Runs the command line. `run_command` turns its exceptions into exit codes."""
    options = tyro.cli(Options, args=arguments, prog="python benchmarks/ablation.py")
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        raise UsageError(f"--variants must be of {', '.join(map(repr, VARIANTS))}, got {unknown[0]!r}")
    same = {name: getattr(options, name) for name in ("data_dir", "limit", "epochs", "device")}
    shared = Config(dataset=find_dataset(options.dataset, options.data_dir), **same)
    for seed in options.seeds:
        configs = {}
        for name in dict.fromkeys(options.variants):
            out = options.runs / f"{re.sub('[^a-z0-9]', '-', name.lower())}-seed-{seed}"
            configs[name] = dataclasses.replace(shared, **VARIANTS[name], seed=seed, out=out)
            configs[name].check()
        run_variants(configs, options.out, signals)


def run_variants(configs: dict[str, Config], file: Path, signals: SignalHandler) -> None:
    """Trains and measures the variants of one seed that the file does not hold, and appends each finished row."""
    missing = {
        name: config
        for name, config in configs.items()
        if not is_finished(file, {"overrides": VARIANTS[name], "seed": config.seed}, compared_settings(config))
    }
    if not missing:
        return
    shared = next(iter(missing.values()))
    images = load_images(shared.dataset, shared.data_dir, **shared.folder_options)
    for name, config in missing.items():
        print(f"{name}, seed {config.seed}", flush=True)
        append_row(file, run_variant(name, config, images, signals))


def run_variant(name: str, config: Config, images: Images, signals: SignalHandler) -> Row:
    """Trains one variant, or resumes it, and returns its row."""
    device = find_device(config.device)
    row = {
        **{"variant": name, "overrides": VARIANTS[name], "seed": config.seed, "epochs": config.epochs},
        **{"dataset": images.dataset, "settings": compared_settings(config), **environment(device)},
    }
    try:
        run_training(config, signals)
    except DivergedError as error:
        print(error, file=sys.stderr)
        return {**row, "diverged": True}
    train, val = split_train(images.train, config.limit, config.val_fraction, config.seed)
    parts = {"train": train, "val": val, "test": images.test}
    measured = measure_run(config.out, {part: held for part, held in parts.items() if held.shape[0]}, device)
    return {
        **row,
        "diverged": False,
        **{f"{part}_mse": found.mse for part, found in measured.items()},
        "codes_used": measured["test"].codes_used,
        "perplexity": measured["test"].perplexity,
        "minutes": run_minutes(config.out),
    }
