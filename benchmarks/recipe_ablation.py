"""The default recipe, and what each ingredient of it is worth: one run for every variant, on the same pictures.

    python benchmarks/recipe_ablation.py --data-dir DIR --epochs 2 --seeds 0 1 2
    python benchmarks/recipe_ablation.py --data-dir DIR --epochs 2 --variants default "no restarts"
    python benchmarks/readme_tables.py    # writes docs/explanations/learning.md's table from the results

A variant changes one ingredient of the default, or adds one; `VARIANTS` has their settings. Each finished run is a line
of benchmarks/results/cpu/ablation.jsonl; what is there already is not done again, and a run that was stopped goes on.
The figures are those of the run's best epoch by the validation pictures. A variant that diverges has none.
"""

from __future__ import annotations

if __name__ == "__main__":
    from vqae.runtime.process import run_command

    run_command("recipe_ablation")  # loads this module again, once the signal handlers stand

import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from result_lines import ResultLines
from search_report import Environment
from train_runs import Dataset, compared_settings, find_dataset, measure_run, run_minutes, run_training

from vqae.config import RECIPES, Config, find_device
from vqae.data.load import Images, load_images, split_train
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import SignalHandler

RESULTS = Path(__file__).resolve().parent / "results" / "cpu" / "ablation.jsonl"

VARIANTS: dict[str, dict[str, Any]] = {
    "default": {},
    # The default with one ingredient taken away.
    "encoder and decoder that begin at random": {
        "network_init": "random",
        "unfreeze_encoder_at": 0.0,
        "encoder_lr": 0.3,
    },
    "no restarts": {"restart_after": 0},
    "codes moved by SGD on the loss": {"codebook_step": "plain"},
    "no mirrored pictures": {"flip": False},
    "no warm-up": {"warmup": 0.0},
    "all of these taken away: the plain specification": RECIPES["plain"],
    # When and how fast the encoder learns.
    "encoder at rest to the end": {"unfreeze_encoder_at": 0.999999},
    "encoder learns from the first step": {"unfreeze_encoder_at": 0.0},
    "encoder learns ten times as fast": {"encoder_lr": 0.03},
    # The default with something changed or added.
    "BatchNorm before the quantizer": {"embedding_norm": "batch"},
    "D = 512, ResNet-18's features as they are": {"code_dim": 512},
    "D = 32": {"code_dim": 32},
    "codes from the first batch's embeddings": {"codebook_init": "data"},
    "codebook learning rate 0.05": {"codebook_lr": 0.05},
    "decoder learning rate 0.1": {"lr": 0.1},
    "weight decay 5e-4": {"weight_decay": 5e-4},
}
"""Overrides of the default settings, by the variant's name."""


@dataclass(frozen=True)
class Options:
    """Train the default recipe and its variants."""

    epochs: int
    """Of every run."""
    seeds: tuple[int, ...] = (0,)
    """Every variant is trained with each of these, which also part the validation pictures off."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Which of them, by name."""
    data_dir: Path | None = None
    """Where the pictures are."""
    dataset: Dataset | None = None
    """What they are; by default imagefolder where DIR/train is a folder, else cifar10."""
    limit: int | None = None
    """Take only the first N training pictures, after a seeded shuffle."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    out: Path = RESULTS
    """The file of results."""
    runs: Path = Path("runs/ablation")
    """Folder for the runs themselves."""


def main(arguments: list[str], _signals: SignalHandler) -> None:
    """Run the command line; raises what `run_command` turns into exit codes."""
    options = tyro.cli(Options, args=arguments, prog="python benchmarks/recipe_ablation.py")
    unknown = [name for name in options.variants if name not in VARIANTS]
    if unknown:
        raise UsageError(f"--variants must be of {', '.join(map(repr, VARIANTS))}, got {unknown[0]!r}")
    dataset = find_dataset(options.dataset, options.data_dir)
    shared = Config(
        data_dir=options.data_dir,
        dataset=dataset,
        limit=options.limit,
        epochs=options.epochs,
        device=options.device,
    )
    for seed in options.seeds:
        configs = {
            name: dataclasses.replace(
                shared, **VARIANTS[name], seed=seed, out=options.runs / f"{_file_name(name)}-seed-{seed}"
            )
            for name in dict.fromkeys(options.variants)
        }
        for config in configs.values():
            config.check()
        do_variants(configs, ResultLines(options.out))


def do_variants(configs: dict[str, Config], results: ResultLines) -> None:
    """Train and measure the variants of one seed that are not there yet, and write each one's line at once.

    Args:
        configs: the settings of each variant, by its name.
        results: where the lines go.

    Raises:
        UsageError: a variant is there with other settings, the pictures are not to be had, or a run cannot be written.
    """
    missing = {
        name: config
        for name, config in configs.items()
        if not results.has({"variant": name, "seed": config.seed}, compared_settings(config))
    }
    if not missing:
        return
    shared = next(iter(missing.values()))
    pictures = load_images(shared.dataset, shared.data_dir, image_size=shared.image_size, seed=shared.seed)
    for name, config in missing.items():
        print(f"{name}, seed {config.seed}", flush=True)
        results.add(do_variant(name, config, pictures))
        print(json.dumps(results.lines[-1]), flush=True)


def do_variant(name: str, config: Config, pictures: Images) -> dict[str, Any]:
    """The line of one variant, trained now, or to the end where a part of the run is there."""
    device = find_device(config.device)
    line = {
        "variant": name,
        "overrides": VARIANTS[name],
        "seed": config.seed,
        "epochs": config.epochs,
        "dataset": pictures.dataset,
        "settings": compared_settings(config),
        **vars(Environment.here(device)),
    }
    try:
        run_training(config)
    except DivergedError as error:
        print(error, file=sys.stderr)
        return {**line, "diverged": True}
    train, val = split_train(pictures.train, config.limit, config.val_fraction, config.seed)
    parts = {"train": train, "val": val, "test": pictures.test}
    measured = measure_run(config.out, {part: held for part, held in parts.items() if held.shape[0]}, device)
    return {
        **line,
        "diverged": False,
        **{f"{part}_mse": found.mse for part, found in measured.items()},
        "codes_used": measured["test"].codes_used,
        "perplexity": measured["test"].perplexity,
        "minutes": run_minutes(config.out),
    }


def _file_name(variant: str) -> str:
    """A variant's name as a folder's."""
    return "".join(letter if letter.isalnum() else "-" for letter in variant.lower())
