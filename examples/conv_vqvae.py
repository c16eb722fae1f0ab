"""Train the usual convolutional VQ-VAE (8 x 8 codes for an image of 32 x 32) with different quantizers.

    python examples/conv_vqvae.py --data-dir DIR   # CIFAR-10, or DIR/train/<class>/* and DIR/test/<class>/*

The table shows the reconstruction error and the use of the codes on test images, and the CPU time of the
training relative to the first method.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import vector_quantize_pytorch as original
from torch import Tensor, nn
from torch.nn import functional as F

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the packages from the checkout

from benchmarks.gaussian_codes import CVQ
from benchmarks.results import append_row, environment
from vq_kernels import Quantized, VectorQuantizer
from vq_kernels import compat as drop_in
from vqae.data.load import load_images

NUM_CODES, CODE_DIM = 512, 64


def ours(**options: object) -> nn.Module:
    """The quantizer of this library."""
    return VectorQuantizer(NUM_CODES, CODE_DIM, channel_dim=1, **options)


def compatible(kind: type[nn.Module], **options: object) -> nn.Module:
    """A quantizer of vector-quantize-pytorch, or the drop-in for it, with k-means, averages and dead-code resets."""
    kept = {"accept_image_fmap": True, "kmeans_init": True, "threshold_ema_dead_code": 2}
    return kind(dim=CODE_DIM, codebook_size=NUM_CODES, **{**kept, **options})


class ChannelsLast(nn.Module):
    """Moves the channels of images [B, C, H, W] to the last dimension for a quantizer, and back."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        self.quantizer = quantizer

    def forward(self, x: Tensor) -> Quantized:
        """Quantize [B, C, H, W]."""
        found = self.quantizer(x.movedim(1, -1))
        return found._replace(quantized=found.quantized.movedim(-1, 1))


PLAIN = {"init": "normal", "restart_after": 0, "warn": False}
METHODS: dict[str, Callable[[], nn.Module]] = {
    "VectorQuantizer(512, 64)": ours,
    "ema_decay=None (trained by Adam)": lambda: ours(ema_decay=None),
    "VQ, Adam": lambda: ours(ema_decay=None, **PLAIN),
    "EMA": lambda: ours(ema_decay=0.99, **PLAIN),
    "SimVQ": lambda: drop_in.SimVQ(dim=CODE_DIM, codebook_size=NUM_CODES, channel_first=True),
    "CVQ": lambda: ChannelsLast(CVQ(NUM_CODES, CODE_DIM, decay=0.99, commitment_weight=0.25)),
    "rotation trick": lambda: compatible(drop_in.VectorQuantize, rotation_trick=True),
    "DiVeQ": lambda: compatible(drop_in.VectorQuantize, directional_reparam=True),
    "vector-quantize-pytorch": lambda: compatible(original.VectorQuantize),
    "the same, commitment_weight=0.25": lambda: compatible(original.VectorQuantize, commitment_weight=0.25),
}


class Residual(nn.Module):
    """Adds two convolutions to their input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.ReLU(), nn.Conv2d(width, width // 4, 3, 1, 1), nn.ReLU(), nn.Conv2d(width // 4, width, 1)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to the same shape."""
        return x + self.branch(x)


class VQVAE(nn.Module):
    """Encoder, quantizer and decoder of van den Oord et al. 2017, arXiv:1711.00937, section 4.1, at half the width."""

    def __init__(self, quantizer: Callable[[], nn.Module], width: int = 128) -> None:
        super().__init__()
        half = width // 2
        down = [nn.Conv2d(3, half, 4, 2, 1), nn.ReLU(), nn.Conv2d(half, width, 4, 2, 1), nn.ReLU()]
        refine = [nn.Conv2d(width, width, 3, 1, 1), Residual(width), Residual(width), nn.ReLU()]
        self.encoder = nn.Sequential(*down, *refine, nn.Conv2d(width, CODE_DIM, 1))
        up = [nn.ConvTranspose2d(width, half, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(half, 3, 4, 2, 1)]
        restore = [nn.Conv2d(CODE_DIM, width, 3, 1, 1), Residual(width), Residual(width), nn.ReLU()]
        self.decoder = nn.Sequential(*restore, *up)
        self.quantizer = quantizer()  # last: so all methods have the same encoder and decoder at first

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction [B, 3, 32, 32], the indices [B, 8, 8] and the quantizer's loss."""
        quantized, indices, loss = self.quantizer(self.encoder(images))
        return self.decoder(quantized), indices, loss.sum()


def scaled(images: Tensor) -> Tensor:
    """Map images uint8 to floats in [-0.5, 0.5]."""
    return images.float() / 255 - 0.5


def train(model: VQVAE, images: Tensor, num_steps: int, batch_size: int, seed: int) -> float:
    """Minimise both losses by Adam, whose learning rate falls to 0. Return the CPU time it took, in seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, num_steps)
    generator = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for _ in range(num_steps):
        batch = scaled(images[torch.randint(len(images), (batch_size,), generator=generator)])
        reconstruction, _, loss = model(batch)
        optimizer.zero_grad()
        (F.mse_loss(reconstruction, batch) + loss).backward()
        optimizer.step()
        schedule.step()
    return time.process_time() - started


@torch.no_grad()
def evaluate(model: VQVAE, images: Tensor) -> tuple[float, float]:
    """Return the mean squared error and the perplexity of the indices on these images."""
    model.eval()
    total, counts = 0.0, torch.zeros(NUM_CODES)
    for batch in map(scaled, images.split(200)):
        reconstruction, indices, _ = model(batch)
        total += F.mse_loss(reconstruction, batch, reduction="sum").item()
        counts += torch.bincount(indices.flatten(), minlength=NUM_CODES)
    return total / images.numel(), torch.special.entr(counts / counts.sum()).sum().exp().item()


def main() -> None:
    """Train each method with each seed, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data-dir", type=Path)
    parser.add_argument("--dataset", default="auto", help="auto, cifar10, imagefolder or synthetic")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    options = parser.parse_args()
    images = load_images(options.dataset, options.data_dir)
    for seed in options.seeds:
        first_seconds = None
        for method in options.methods:
            torch.manual_seed(seed)
            model = VQVAE(METHODS[method])
            seconds = train(model, images.train, options.steps, options.batch_size, seed)
            first_seconds = first_seconds or seconds
            mse, perplexity = evaluate(model, images.test)
            ratio = seconds / first_seconds
            row = {"method": method, "seed": seed, "mse": mse, "perplexity": perplexity, "time": ratio}
            print(f"{method:50} seed {seed}  MSE {mse:.5f}  perplexity {perplexity:3.0f}  time {ratio:.2f}", flush=True)
            if options.out:
                settings = {"steps": options.steps, "batch_size": options.batch_size, "dataset": images.dataset}
                append_row(options.out, {**row, **settings, **environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
