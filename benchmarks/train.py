"""Compares the images per second of the trainer with those of a bare loop: the same encoder, decoder and optimizer on
random tensors.

    python benchmarks/train.py

The bare loop has no quantizer, no codebook loss, no data pipeline and no checkpoints. The encoder learns from the first
step on in both. They run alternately in one process; the result is the median ratio. It prints one JSON line, such as

    {"trainer_images_per_s": 736.6, "bare_images_per_s": 753.3, "ratio": 0.976, "batch_size": 256, "device": ...}
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import resnet18

from benchmarks.results import Row, append_row, environment
from vqae.config import Config, find_device
from vqae.model.encoder import FEATURE_DIM
from vqae.model.vqae import Decoder, build_model
from vqae.runtime.process import SignalHandler
from vqae.training.trainer import Trainer


@dataclass(frozen=True)
class Options:
    """Time the trainer against a bare loop."""

    batch_size: int = 256
    """Images per step."""
    steps: int = 4
    """Steps per turn."""
    turns: int = 8
    """Turns of each, after one to warm up."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    out: Path | None = None
    """Append the JSON line to this file too."""


def bare_step(config: Config, images: Tensor) -> Callable[[], None]:
    """A step of encoder, decoder, one loss and SGD, on one random batch [B, 3, 32, 32]."""
    model = build_model(config, (32, 32)).to(images.device)
    parameters = [*model.encoder.parameters(), *model.decoder.parameters()]
    optimizer = torch.optim.SGD(parameters, config.lr, momentum=config.momentum, weight_decay=config.weight_decay)

    def step() -> None:
        loss = F.mse_loss(model.decoder(model.encoder(images)), images)
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def measure(options: Options) -> Row:
    """Times the trainer and the bare loop in turns."""
    device = find_device(options.device)
    torch.manual_seed(0)
    num_steps = options.steps * (options.turns + 1)
    images = torch.randint(256, (num_steps * options.batch_size, 3, 32, 32), dtype=torch.uint8)
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            out=Path(folder), batch_size=options.batch_size, epochs=1, checkpoint_minutes=1e6, lr=1e-3,
            unfreeze_encoder_at=0.0,
        )  # fmt: skip
        model = build_model(config, (32, 32)).to(device)
        trainer = Trainer(config, model, images, images[:0], images[:1], "random", device, SignalHandler())
        bare = bare_step(config, torch.randn(options.batch_size, 3, 32, 32, device=device))
        seconds: dict[str, list[float]] = {"trainer": [], "bare": []}
        for _ in range(options.turns + 1):
            start = _now(device)
            trainer.train_steps(options.steps)
            middle = _now(device)
            for _ in range(options.steps):
                bare()
            seconds["trainer"].append(middle - start)
            seconds["bare"].append(_now(device) - middle)
        trainer.reporter.close()
    images_per_turn = options.steps * options.batch_size
    rates = {f"{name}_images_per_s": images_per_turn / statistics.median(times[1:]) for name, times in seconds.items()}
    ratios = [round(b / t, 3) for t, b in zip(seconds["trainer"][1:], seconds["bare"][1:], strict=True)]
    figures = {"ratio": round(statistics.median(ratios), 3), "ratios": ratios, "batch_size": options.batch_size}
    return {**{name: round(rate, 1) for name, rate in rates.items()}, **figures, **environment(device)}


def plain_images_per_s(config: Config, images: Tensor, device: torch.device, *, warm_up: int, seconds: float) -> float:
    """Images per second of the autoencoder as it is usually written in plain PyTorch.

    torchvision's ResNet-18, cdist and argmin, an MLP, SGD, and a DataLoader. The encoder learns from the first step on.
    `images` is [N, 3, H, W] uint8. The clock starts after `warm_up` steps.
    """
    encoder = resnet18(weights=None)
    encoder.fc = torch.nn.Linear(FEATURE_DIM, config.code_dim)
    decoder = Decoder(config.code_dim, config.hidden_dims, (images.shape[2], images.shape[3]))
    codebook = torch.nn.Embedding(config.num_codes, config.code_dim)
    model = torch.nn.ModuleList([encoder, decoder, codebook]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=config.momentum)
    batches = _plain_batches(images, config.batch_size, device)
    count, start = -warm_up, 0.0
    while True:
        if count == 0:
            start = _now(device)
        if count > 0 and count % 25 == 0 and _now(device) - start >= seconds:
            return count * config.batch_size / (_now(device) - start)
        batch = next(batches)
        embeddings = encoder(batch)
        codes = codebook(torch.cdist(embeddings.detach(), codebook.weight.detach()).argmin(dim=1))
        reconstruction = decoder(embeddings + (codes - embeddings).detach())
        loss = F.mse_loss(reconstruction, batch) + F.mse_loss(codes, embeddings.detach())
        optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        optimizer.step()
        count += 1


def _plain_batches(images: Tensor, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Normalised batches on the device, epoch after epoch."""
    images = (images.float() / 255 - 0.5) / 0.25
    loader = DataLoader(
        TensorDataset(images), batch_size, shuffle=True, drop_last=True, pin_memory=device.type == "cuda"
    )
    while True:
        for (batch,) in loader:
            yield batch.to(device, non_blocking=True)


def _now(device: torch.device) -> float:
    """The time once the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def main(options: Options) -> None:
    """Prints the line."""
    row = measure(options)
    print(json.dumps(row))
    if options.out is not None:
        append_row(options.out, row)


if __name__ == "__main__":
    main(tyro.cli(Options, prog="python benchmarks/train.py"))
