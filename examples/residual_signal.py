"""Train a small audio codec with different residual quantizers, and decode it at every bit rate.

    python examples/residual_signal.py

It prints the signal-to-noise ratio on test clips, decoded from the first 1 to 6 stages of 8 bits per frame, and the CPU
time of the training relative to the first method.
"""

import argparse
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from vector_quantize_pytorch import ResidualVQ

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the packages from the checkout

from benchmarks.results import append_row, environment
from vq_kernels import ResidualVectorQuantizer

SAMPLE_RATE, FRAME, CLIP = 16_000, 32, 2048  # Hz, samples, samples
NUM_STAGES, NUM_CODES, CODE_DIM, WIDTH = 6, 256, 32, 64


def original(**options: float) -> nn.Module:
    """The quantizer of vector-quantize-pytorch with k-means, moving averages and dead-code resets."""
    kept = {"kmeans_init": True, "threshold_ema_dead_code": 2}
    return ResidualVQ(dim=CODE_DIM, num_quantizers=NUM_STAGES, codebook_size=NUM_CODES, **kept, **options)


def ours(**options: object) -> nn.Module:
    """The quantizer of this library."""
    return ResidualVectorQuantizer(NUM_STAGES, NUM_CODES, CODE_DIM, **options)


METHODS: dict[str, Callable[[], nn.Module]] = {
    "ResidualVectorQuantizer(6, 256, 32)": ours,
    "ema_decay=0.99": lambda: ours(ema_decay=0.99),
    "ema_decay=None (trained by Adam)": lambda: ours(ema_decay=None),
    "vector-quantize-pytorch: k-means, averages, resets": original,
    "the same, decay=0.99": lambda: original(decay=0.99),
    "the same, commitment_weight=0.25": lambda: original(commitment_weight=0.25),
}


def clips(count: int, generator: torch.Generator) -> Tensor:
    """Draw clips [count, 1, 2048]: a gliding tone with three overtones that fades, and noise."""
    pitch, glide, phase, decay, *loudness = torch.rand(8, count, 1, generator=generator)
    seconds = torch.arange(CLIP) / SAMPLE_RATE
    cycles = phase + (100 + 500 * pitch) * seconds * (1 + 2 * (glide - 0.5) * seconds)
    tones = (part / k * torch.sin(2 * math.pi * k * cycles) for k, part in enumerate(loudness, start=1))
    noise = 0.005 * torch.randn(count, CLIP, generator=generator)
    return (sum(tones) * torch.exp(-20 * decay * seconds) + noise)[:, None]


class Codec(nn.Module):
    """A convolutional encoder to one vector per frame, the quantizer, and the mirrored decoder."""

    def __init__(self, quantizer: nn.Module) -> None:
        super().__init__()
        down = [nn.Conv1d(1, WIDTH, 8, 4, 2), nn.ELU(), nn.Conv1d(WIDTH, WIDTH, 16, 8, 4), nn.ELU()]
        self.encoder = nn.Sequential(*down, nn.Conv1d(WIDTH, CODE_DIM, 3, 1, 1))
        self.quantizer = quantizer
        up = [nn.ConvTranspose1d(WIDTH, WIDTH, 16, 8, 4), nn.ELU(), nn.ConvTranspose1d(WIDTH, 1, 8, 4, 2)]
        self.decoder = nn.Sequential(nn.Conv1d(CODE_DIM, WIDTH, 3, 1, 1), nn.ELU(), *up)

    def forward(self, signal: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the decoded signal [B, 1, 2048], the indices [B, 64, 6] and the quantizer's loss."""
        quantized, indices, loss = self.quantizer(self.encoder(signal).mT)
        return self.decoder(quantized.mT), indices, loss.sum()


def train(model: Codec, num_steps: int, batch_size: int, seed: int) -> float:
    """Minimise both losses by Adam. Return the CPU time it took, in seconds."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed)
    started = time.process_time()
    for _ in range(num_steps):
        signal = clips(batch_size, generator)
        decoded, _, loss = model(signal)
        optimizer.zero_grad()
        (F.mse_loss(decoded, signal) + loss).backward()
        optimizer.step()
    return time.process_time() - started


@torch.no_grad()
def signal_to_noise(model: Codec, signal: Tensor) -> list[float]:
    """Return the signal-to-noise ratio, in decibels, of the signal decoded from the first 1 to 6 stages."""
    _, indices, _ = model.eval()(signal)
    partial_sums = model.quantizer.get_codes_from_indices(indices).cumsum(dim=0)  # [6, B, 64, 32]
    errors = (F.mse_loss(model.decoder(quantized.mT), signal) for quantized in partial_sums)
    return [10 * math.log10(signal.square().mean() / error) for error in errors]


def main() -> None:
    """Train each method with each seed, and print a line for each run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=[*METHODS][:1], metavar="NAME")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--out", type=Path, help="append the results to this file, as JSON lines")
    options = parser.parse_args()
    for seed in options.seeds:
        first_seconds = None
        for method in options.methods:
            torch.manual_seed(seed)
            model = Codec(METHODS[method]())
            seconds = train(model, options.steps, options.batch_size, seed)
            first_seconds = first_seconds or seconds
            decibels = signal_to_noise(model, clips(200, torch.Generator().manual_seed(1000)))
            ratio = seconds / first_seconds
            shown = ", ".join(f"{each:.2f}" for each in decibels)
            print(f"{method:50} seed {seed}  {shown} dB  time {ratio:.2f}", flush=True)
            if options.out:
                row = {"method": method, "seed": seed, "decibels": decibels, "time": ratio}
                settings = {"steps": options.steps, "batch_size": options.batch_size}
                append_row(options.out, {**row, **settings, **environment(torch.device("cpu"))})


if __name__ == "__main__":
    main()
