"""Pictures a second of the trainer beside a bare loop: the same encoder, decoder and optimiser on random tensors.

    python benchmarks/train_bench.py

The bare loop has no quantizer, no losses for it, no data pipeline, no checkpoints: what it does not reach, no trainer
of this model does. The encoder learns in both from the first step on, so that every step is a whole one. Both take the
same number of steps in turns, in one process, and the ratio of their medians counts.
It prints one JSON line, such as

    {"trainer_images_per_s": ..., "bare_images_per_s": ..., "ratio": ..., "batch_size": 256, "device": ...}
"""

from __future__ import annotations

import json
import statistics
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from search_report import Environment
from torch import Tensor
from torch.nn import functional as F

from vqae.config import Config, find_device
from vqae.model.vqae import build_model
from vqae.runtime.process import SignalHandler
from vqae.training.trainer import Trainer


@dataclass(frozen=True)
class Options:
    """Time the trainer against a bare loop."""

    batch_size: int = 256
    """Pictures a step."""
    steps: int = 4
    """Steps a turn."""
    turns: int = 8
    """Turns of each, after one to warm up."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    out: Path | None = None
    """Append the JSON line to this file too."""


class BareLoop:
    """Encoder, decoder, one loss, SGD, on one random batch."""

    def __init__(self, config: Config, pictures: Tensor) -> None:
        self.model = build_model(config, (32, 32)).to(pictures.device)
        parts = [*self.model.encoder.parameters(), *self.model.decoder.parameters()]
        self.optimizer = torch.optim.SGD(
            parts, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay
        )
        self.pictures = pictures

    def step(self) -> None:
        """One step of SGD."""
        loss = F.mse_loss(self.model.decoder(self.model.encoder(self.pictures)), self.pictures)
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()


def main(options: Options) -> None:
    """Time both in turns, and print the line."""
    device = find_device(options.device)
    torch.manual_seed(0)
    num_steps = options.steps * (options.turns + 1)
    pictures = torch.randint(256, (num_steps * options.batch_size, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            out=Path(folder),
            batch_size=options.batch_size,
            epochs=1,
            checkpoint_minutes=1e6,
            lr=1e-3,
            unfreeze_encoder_at=0.0,
        )
        model = build_model(config, (32, 32)).to(device)
        empty = pictures[:0]
        trainer = Trainer(config, model, pictures, empty, pictures[:1], "random", device, SignalHandler())
        bare = BareLoop(config, torch.randn(options.batch_size, 3, 32, 32, device=device))
        seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        for _ in range(options.turns + 1):
            start = time.perf_counter()
            trainer.train_steps(options.steps)
            _wait_for(device)
            middle = time.perf_counter()
            for _ in range(options.steps):
                bare.step()
            _wait_for(device)
            seconds["trainer"].append(middle - start)
            seconds["bare"].append(time.perf_counter() - middle)
        trainer.reporter.close()
    images = options.steps * options.batch_size
    rates = {name: images / statistics.median(values[1:]) for name, values in seconds.items()}
    ratios = [b / t for t, b in zip(seconds["trainer"][1:], seconds["bare"][1:], strict=True)]
    line = json.dumps(
        {
            "trainer_images_per_s": round(rates["trainer"], 1),
            "bare_images_per_s": round(rates["bare"], 1),
            "ratio": round(statistics.median(ratios), 3),
            "ratios": [round(ratio, 3) for ratio in ratios],
            "batch_size": options.batch_size,
            **vars(Environment.here(device)),
        }
    )
    print(line)
    if options.out is not None:
        with options.out.open("a") as stream:
            stream.write(line + "\n")


def _wait_for(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python benchmarks/train_bench.py"))
