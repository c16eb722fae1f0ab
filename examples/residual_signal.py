"""Residual vector quantization of an audio signal: each stage adds 8 bits per frame, and decoding may use any of them.

python examples/residual_signal.py
"""

import math

import torch
from torch import Tensor

from vq_kernels import ResidualVectorQuantizer

FRAME = 32  # samples
SAMPLE_RATE = 16_000  # Hz


def chirps(seconds: float) -> Tensor:
    """Return three tones that glide up and down, with a little noise."""
    time = torch.arange(int(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    tones = (torch.sin(400 * base * (time + 0.1 * torch.sin(time / base))) / base for base in (1.0, 1.7, 2.3))
    return sum(tones, 0.01 * torch.randn_like(time))


def signal_to_noise(signal: Tensor, decoded: Tensor) -> float:
    """Return the signal-to-noise ratio in decibels."""
    return 10 * math.log10(signal.square().mean() / (signal - decoded).square().mean())


def train(quantizer: ResidualVectorQuantizer, frames: Tensor, num_steps: int = 150) -> None:
    """Train without an optimizer: the codes follow the moving averages of their frames."""
    for _ in range(num_steps):
        batch = torch.randint(len(frames), (2048,))
        quantizer(frames[batch])


if __name__ == "__main__":
    torch.manual_seed(0)
    signal = chirps(seconds=20)
    frames = signal.view(-1, FRAME)
    quantizer = ResidualVectorQuantizer(num_quantizers=6, num_codes=256, code_dim=FRAME)
    train(quantizer, frames)
    indices = quantizer.eval()(frames).indices  # [frames, 6]
    for stages in range(1, 7):
        decoded = quantizer.decode(indices[:, :stages])  # from the first stages
        kbit_s = stages * 8 * SAMPLE_RATE / FRAME / 1000
        print(f"{stages} of 6 stages, {kbit_s:4.0f} kbit/s: {signal_to_noise(frames, decoded):5.1f} dB")
