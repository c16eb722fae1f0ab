"""Replace the quantizer of a convolutional VQ-VAE. Only one line changes, and the codebook does not collapse.

python examples/swap_quantizer.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq_kernels import VectorQuantizer


class HandWrittenQuantizer(nn.Module):
    """A quantizer as many tutorials write it."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.codes = nn.Embedding(num_codes, code_dim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantize x [B, D, H, W]. Return the codes, their indices [B, H, W] and a loss."""
        rows = x.movedim(1, -1)
        indices = torch.cdist(rows.flatten(0, 2), self.codes.weight).argmin(dim=1).view(rows.shape[:-1])
        codes = self.codes(indices)
        loss = F.mse_loss(codes, rows.detach()) + 0.25 * F.mse_loss(rows, codes.detach())
        return (rows + (codes - rows).detach()).movedim(-1, 1), indices, loss


class VQVAE(nn.Module):
    """Describes images [B, 1, 32, 32] by 8 x 8 codes."""

    def __init__(self, quantizer: nn.Module, code_dim: int) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(1, 16, 4, 2, 1), nn.ReLU(), nn.Conv2d(16, code_dim, 4, 2, 1))
        self.quantizer = quantizer
        self.decoder = nn.Sequential(
            nn.ConvTranspose2d(code_dim, 16, 4, 2, 1), nn.ReLU(), nn.ConvTranspose2d(16, 1, 4, 2, 1)
        )

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction [B, 1, 32, 32], the indices and the quantizer's loss."""
        quantized, indices, loss = self.quantizer(self.encoder(images))
        return self.decoder(quantized), indices, loss


def draw_images(count: int) -> Tensor:
    """Draw discs [count, 1, 32, 32] of random position, size and brightness."""
    y, x, radius, brightness = torch.rand(4, count, 1, 1, 1).unbind()
    grid = torch.arange(32) / 31
    sq_distances = (grid - x).square() + (grid[:, None] - y).square()
    return brightness * torch.sigmoid(200 * (0.1 * radius + 0.02 - sq_distances))


def train(model: VQVAE, num_steps: int = 200) -> None:
    """Minimise the sum of the reconstruction loss and the quantizer's loss."""
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for _ in range(num_steps):
        images = draw_images(64)
        reconstruction, _, loss = model(images)
        optimizer.zero_grad()
        (F.mse_loss(reconstruction, images) + loss).backward()
        optimizer.step()


if __name__ == "__main__":
    quantizers = {
        "before": lambda: HandWrittenQuantizer(256, 16),
        "after": lambda: VectorQuantizer(256, 16, channel_dim=1),
    }
    for name, make_quantizer in quantizers.items():
        torch.manual_seed(0)
        model = VQVAE(make_quantizer(), code_dim=16)
        train(model)
        images = draw_images(500)
        reconstruction, indices, _ = model.eval()(images)
        error, codes = F.mse_loss(reconstruction, images), len(indices.unique())
        print(f"{name:>6}: mean squared error {error:.4f}, {codes} of 256 codes in use")
