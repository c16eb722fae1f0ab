"""The auto-encoder as people write it in plain PyTorch: the baseline of the training stage.

Layers and optimiser are the same: torchvision's ResNet-18 as it is, cdist and argmin, an MLP; pictures come from a
DataLoader that makes a tensor of each, as with torchvision's data sets. Its encoder learns from the first step on.
"""

from collections.abc import Iterator
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset
from torchvision.models import resnet18
from torchvision.transforms import Compose, Normalize, ToTensor

from vqae.config import Config
from vqae.model.encoder import FEATURE_DIM
from vqae.model.vqae import Decoder, build_model

_WORKERS = 8


def plain_quantize(x: Tensor, codebook: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Straight-through codes [N, D], indices [N] and the codebook's MSE [], by cdist and argmin."""
    with torch.no_grad():
        indices = torch.cdist(x, codebook).argmin(dim=1)
    codes = F.embedding(indices, codebook)
    return x + (codes - x).detach(), indices, F.mse_loss(codes, x.detach())


class PlainModel(nn.Module):
    """Encoder, cdist and argmin, decoder. A batch [B, 3, 32, 32] -> reconstruction [B, 3, 32, 32], codebook loss []."""

    def __init__(self, config: Config, image_size: tuple[int, int]) -> None:
        super().__init__()
        features = resnet18(weights=None)
        features.fc = nn.Identity() if config.code_dim == FEATURE_DIM else nn.Linear(FEATURE_DIM, config.code_dim)
        norm = nn.BatchNorm1d(config.code_dim, affine=False) if config.embedding_norm == "batch" else nn.Identity()
        self.encoder = nn.Sequential(features, norm)
        self.codebook = nn.Parameter(torch.randn(config.num_codes, config.code_dim))
        self.decoder = Decoder(config.code_dim, config.hidden_dims, image_size)

    def forward(self, pictures: Tensor) -> tuple[Tensor, Tensor]:
        """One pass over normalised pictures."""
        quantized, _, loss = plain_quantize(self.encoder(pictures).float(), self.codebook)
        reconstruction: Tensor = self.decoder(quantized)
        return reconstruction, loss


class PictureFiles(Dataset[Tensor]):
    """Pictures [N, 3, H, W] uint8, transformed one by one as torchvision's data sets do."""

    def __init__(self, pictures: Tensor, mean: list[float], deviation: float) -> None:
        self.pixels = pictures.permute(0, 2, 3, 1).contiguous().numpy()
        self.transform: Any = Compose([ToTensor(), Normalize(mean, [deviation] * 3)])

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        picture: Tensor = self.transform(Image.fromarray(self.pixels[index]))
        return picture


class PlainTraining:
    """Steps of the plain model on pictures [N, 3, H, W] uint8, under bfloat16 autocast with `amp`."""

    def __init__(self, config: Config, pictures: Tensor, device: torch.device, *, amp: bool = False) -> None:
        image_size = (pictures.shape[2], pictures.shape[3])
        self.device, self.amp = device, amp
        self.model = PlainModel(config, image_size).to(device)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(), lr=1e-3, momentum=config.momentum, weight_decay=config.weight_decay
        )
        statistics = build_model(config, image_size)
        self._loader = DataLoader(
            PictureFiles(pictures, statistics.pixel_mean.flatten().tolist(), statistics.pixel_std.item()),
            batch_size=config.batch_size,
            shuffle=True,
            drop_last=True,
            num_workers=_WORKERS if device.type == "cuda" else 0,
            pin_memory=device.type == "cuda",
            persistent_workers=device.type == "cuda",
        )

    def batches(self) -> Iterator[Tensor]:
        """Batches on the device, epoch after epoch."""
        while True:
            for batch in self._loader:
                yield batch.to(self.device, non_blocking=True)

    def step(self, batch: Tensor) -> None:
        """One step of SGD on both losses, for normalised pictures."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.amp):
            reconstruction, codebook_loss = self.model(batch)
        loss = F.mse_loss(reconstruction.float(), batch) + codebook_loss
        self.optimizer.zero_grad(set_to_none=True)
        torch.autograd.backward(loss)
        self.optimizer.step()
