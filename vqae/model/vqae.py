"""The auto-encoder: ResNet-18's features, a codebook, an MLP."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Self

import torch
from torch import Tensor, nn
from torchvision.models import resnet18

from vq_kernels import VectorQuantizer, nearest_code
from vqae.model.sync_batch_norm import SyncBatchNorm
from vqae.model.trimmed_conv import TrimmedConv2d

FEATURE_DIM = 512  # of ResNet-18


class Encoder(nn.Module):
    """[B, 3, H, W] -> [B, D]: ResNet-18 without its classifier; D = 512 as it is, another D by one linear layer.

    Args:
        code_dim: D.
        norm: "batch" ends with a BatchNorm without affine, so that embeddings stay near their codes (nothing in the two
            losses holds them there); "none" does not.

    Where several processes train together, the statistics of every BatchNorm are those of their batches together.

    Source: He et al. 2016, arXiv:1512.03385.
    """

    def __init__(self, code_dim: int, norm: Literal["batch", "none"] = "batch") -> None:
        super().__init__()
        self.features = resnet18(weights=None)
        self.features.fc = nn.Identity()
        TrimmedConv2d.adopt(self.features)
        self.features.to(memory_format=torch.channels_last)
        self.project = nn.Identity() if code_dim == FEATURE_DIM else nn.Linear(FEATURE_DIM, code_dim)
        self.norm = nn.BatchNorm1d(code_dim, affine=False) if norm == "batch" else nn.Identity()
        self.rests = False
        SyncBatchNorm.adopt(self)

    def rest(self, rests: bool) -> None:
        """Stop learning, or begin: a resting encoder has no gradients, and its BatchNorms are in eval mode."""
        self.rests = rests
        self.requires_grad_(not rests)

    def train(self, mode: bool = True) -> Self:
        """As any module's, but for the BatchNorms of an encoder that rests."""
        return super().train(mode and not self.rests)

    def forward(self, pictures: Tensor) -> Tensor:
        """Embeddings [B, D] of normalised pictures [B, 3, H, W]."""
        features = self.features(pictures.contiguous(memory_format=torch.channels_last))
        embeddings: Tensor = self.norm(self.project(features))
        return embeddings


class Decoder(nn.Sequential):
    """[B, D] -> [B, 3, H, W]: an MLP with ReLU between its layers."""

    def __init__(self, code_dim: int, hidden_dims: Sequence[int], image_size: tuple[int, int]) -> None:
        height, width = image_size
        dims = [code_dim, *hidden_dims]
        layers: list[nn.Module] = []
        for dim_in, dim_out in pairwise(dims):
            layers += [nn.Linear(dim_in, dim_out), nn.ReLU(inplace=True)]
        layers += [nn.Linear(dims[-1], 3 * height * width), nn.Unflatten(1, (3, height, width))]
        super().__init__(*layers)


class VQAEOutput(NamedTuple):
    """What a training pass returns.

    Attributes:
        reconstruction: [B, 3, H, W], of the normalised pictures.
        indices: [B] int64.
        codebook_loss: [], MSE(e(x) detached, code).
    """

    reconstruction: Tensor
    indices: Tensor
    codebook_loss: Tensor


class VQAE(nn.Module):
    """Encoder, quantizer, decoder.

    A batch of 32 x 32 pictures [B, 3, 32, 32] becomes embeddings [B, 512], indices [B], codes [B, 512], and pictures
    [B, 3, 32, 32] again. The reconstruction's gradient at the decoder's input is handed unchanged to the encoder; the
    codebook learns by `codebook_loss` alone.

    Args:
        image_size: (H, W), at least 1 each; ResNet-18 halves them five times, rounding up.
        code_dim: D.
        hidden_dims: widths of the decoder's hidden layers; none makes it linear.
        embedding_norm: see `Encoder`.
        quantizer: the VectorQuantizer of K codes, D numbers each.

    Attributes:
        pixel_mean: [3, 1, 1], subtracted from pictures in [0, 1].
        pixel_std: [], divides them; one number for all channels, so that MSE in pixels is pixel_std² times the loss.

    Raises:
        ValueError: the quantizer's code_dim is not `code_dim`.

    Source: van den Oord et al. 2017, arXiv:1711.00937.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(
        self,
        image_size: tuple[int, int],
        code_dim: int,
        hidden_dims: Sequence[int],
        quantizer: VectorQuantizer,
        *,
        embedding_norm: Literal["batch", "none"] = "batch",
    ) -> None:
        super().__init__()
        if quantizer.code_dim != code_dim:
            raise ValueError(f"quantizer must have code_dim {code_dim}, got {quantizer.code_dim}")
        self.image_size = image_size
        self.encoder = Encoder(code_dim, embedding_norm)
        self.quantizer = quantizer
        self.decoder = Decoder(code_dim, hidden_dims, image_size)
        self.register_buffer("pixel_mean", torch.full((3, 1, 1), 0.5))
        self.register_buffer("pixel_std", torch.tensor(0.25))

    def forward(self, pictures: Tensor) -> VQAEOutput:
        """One pass over normalised pictures [B, 3, H, W]."""
        embeddings = at_least_float32(self.encoder(pictures))  # under autocast too, the search sees float32
        quantized, indices, codebook_loss = self.quantizer(embeddings)
        return VQAEOutput(self.decoder(quantized), indices, codebook_loss)

    def normalise(self, pictures: Tensor) -> Tensor:
        """Pictures [B, 3, H, W], uint8 or floats in [0, 1], as the encoder takes them."""
        scaled = pictures.float() / 255 if pictures.dtype == torch.uint8 else pictures
        return (scaled - self.pixel_mean) / self.pixel_std

    @torch.no_grad()
    def encode(self, pictures: Tensor) -> Tensor:
        """The code of each picture.

        Args:
            pictures: [B, 3, H, W], floats in [0, 1] or uint8.

        Returns:
            indices [B], int64 in [0, K).

        Raises:
            ValueError: pictures are not [B, 3, H, W] of the model's size.
        """
        expected = (3, *self.image_size)
        if pictures.dim() != 4 or tuple(pictures.shape[1:]) != expected:
            raise ValueError(f"pictures must be [B, {', '.join(map(str, expected))}], got {tuple(pictures.shape)}")
        embeddings = at_least_float32(self.encoder(self.normalise(pictures)))
        return nearest_code(embeddings, self.quantizer.codebook, backend=self.quantizer.backend).indices

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """The picture of each code: indices [B] int64 in [0, K) -> [B, 3, H, W] in [0, 1]; ValueError for others."""
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.quantizer.num_codes:
            span = f"{int(indices.min())} to {int(indices.max())}"
            raise ValueError(f"indices must be in [0, {self.quantizer.num_codes}), got {span}")
        pictures: Tensor = self.decoder(self.quantizer.codebook[indices]) * self.pixel_std + self.pixel_mean
        return pictures.clamp(0, 1)

    @classmethod
    def load(cls, file: str | Path, device: str | torch.device = "cpu") -> "VQAE":
        """The model of a checkpoint, in eval mode.

        Args:
            file: `best.pt` or `last.pt` of a run.
            device: where to put it.

        Raises:
            vqae.runtime.errors.UsageError: the file is missing, cut short, or not a checkpoint of this program.
        """
        from vqae.training.checkpoint import load_checkpoint, model_of

        return model_of(load_checkpoint(Path(file))).to(device).eval()


def at_least_float32(x: Tensor) -> Tensor:
    """x, a half-precision one as float32."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
