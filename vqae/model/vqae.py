"""The autoencoder: ResNet-18 encoder, codebook, MLP decoder."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import _register_namedtuple

from vq_kernels import ResidualVectorQuantizer, VectorQuantizer
from vq_kernels.modules.indices import INDEX_DTYPES
from vqae.config import Config
from vqae.model.encoder import Encoder
from vqae.runtime.errors import UsageError
from vqae.training.checkpoint import load_checkpoint


class Decoder(nn.Sequential):
    """An MLP with ReLU between its layers: [B, D] -> [B, 3, H, W]."""

    def __init__(self, code_dim: int, hidden_dims: Sequence[int], image_size: tuple[int, int]) -> None:
        dims = [code_dim, *hidden_dims]
        layers: list[nn.Module] = []
        for dim_in, dim_out in pairwise(dims):
            layers += [nn.Linear(dim_in, dim_out), nn.ReLU(inplace=True)]
        layers += [nn.Linear(dims[-1], 3 * image_size[0] * image_size[1]), nn.Unflatten(1, (3, *image_size))]
        super().__init__(*layers)


class VQAEOutput(NamedTuple):
    """Result of a training forward pass."""

    reconstruction: Tensor  # [B, 3, H, W], normalised like the input
    indices: Tensor  # [B] int64, or [B, Q] of Q codes per image
    codebook_loss: Tensor  # [], MSE between the detached embeddings, or residuals, and their codes


_register_namedtuple(VQAEOutput, serialized_type_name="vqae.VQAEOutput")  # for torch.export.save


class VQAE(nn.Module):
    """Encoder, quantizer and decoder.

    Images [B, 3, 32, 32] become embeddings [B, 512], indices [B], codes [B, 512] and images [B, 3, 32, 32] again. With
    a ResidualVectorQuantizer of Q stages, indices are [B, Q] and the decoder gets the sum of Q codes. The gradient of
    the reconstruction loss at the decoder's input is copied to the encoder's output. The codebook is trained by
    `codebook_loss` alone. There is no commitment loss.

    Args:
        image_size: (H, W), at least 1 each. ResNet-18 halves them five times, rounding up.
        code_dim: D.
        hidden_dims: widths of the decoder's hidden layers. Without any, the decoder is linear.
        quantizer: of K codes of dimension D, or of Q times K codes.
        embedding_norm: see `Encoder`.

    Attributes:
        pixel_mean: [3, 1, 1], subtracted from images in [0, 1].
        pixel_std: [], divides them. It is one number for all channels, so the MSE in pixels is pixel_std² times the
            reconstruction loss.

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
        quantizer: VectorQuantizer | ResidualVectorQuantizer,
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

    def forward(self, images: Tensor) -> VQAEOutput:
        """Run a training forward pass on normalised images [B, 3, H, W]."""
        embeddings = at_least_float32(self.encoder(images))  # the search uses float32 under autocast too
        quantized, indices, codebook_loss = self.quantizer(embeddings)
        return VQAEOutput(self.decoder(quantized), indices, codebook_loss)

    def normalise(self, images: Tensor) -> Tensor:
        """Normalise images [B, 3, H, W], uint8 or floats in [0, 1], for the encoder."""
        scaled = images.float() / 255 if images.dtype == torch.uint8 else images
        return (scaled - self.pixel_mean) / self.pixel_std

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Map images [B, 3, H, W], floats in [0, 1] or uint8, to indices, [B] or [B, Q] int64 in [0, K).

        Raises ValueError if the images do not have the model's size.
        """
        expected = (3, *self.image_size)
        if images.dim() != 4 or tuple(images.shape[1:]) != expected:
            raise ValueError(f"images must be [B, {', '.join(map(str, expected))}], got {tuple(images.shape)}")
        return self.quantizer.encode(at_least_float32(self.encoder(self.normalise(images))))

    @torch.no_grad()
    def decode(self, indices: Tensor) -> Tensor:
        """Map integer indices to images [B, 3, H, W] in [0, 1].

        Indices are [B], or [B, q] of the first q of Q codes, in [0, K). Raises ValueError out of range.
        """
        indices = indices.long() if indices.dtype in INDEX_DTYPES else indices
        if indices.numel() and not 0 <= int(indices.min()) <= int(indices.max()) < self.quantizer.num_codes:
            span = f"{int(indices.min())} to {int(indices.max())}"
            raise ValueError(f"indices must be in [0, {self.quantizer.num_codes}), got {span}")
        images: Tensor = self.decoder(self.quantizer.decode(indices)) * self.pixel_std + self.pixel_mean
        return images.clamp(0, 1)

    @classmethod
    def load(cls, file: str | Path, device: str | torch.device = "cpu") -> "VQAE":
        """Load the model of a checkpoint, `best.pt` or `last.pt` of a run, in eval mode.

        Raises vqae.runtime.errors.UsageError if the file is missing, truncated or not a checkpoint of this program.
        """
        return model_from_checkpoint(load_checkpoint(Path(file))).to(device).eval()


def build_model(config: Config, image_size: tuple[int, int]) -> VQAE:
    """Build a new model for images of (H, W)."""
    options: dict[str, Any] = {
        "init": config.codebook_init,
        "commitment_weight": 0.0,
        "restart_after": config.restart_steps,
        "ema_decay": None,
        "warn": False,  # the report of a run warns of a collapse
    }
    quantizer = (
        VectorQuantizer(config.num_codes, config.code_dim, **options)
        if config.num_quantizers == 1
        else ResidualVectorQuantizer(config.num_quantizers, config.num_codes, config.code_dim, **options)
    )
    return VQAE(image_size, config.code_dim, config.hidden_dims, quantizer, embedding_norm=config.embedding_norm)


def model_from_checkpoint(state: dict[str, Any]) -> VQAE:
    """Build the model of a checkpoint. Raises UsageError if its weights do not fit its options."""
    model = build_model(Config.from_dict(state["config"], "the checkpoint"), tuple(state["image_size"]))
    load_weights(model, state)
    return model


def load_weights(model: VQAE, state: dict[str, Any]) -> None:
    """Load the weights of a checkpoint. Raises UsageError if they do not fit the model."""
    try:
        model.load_state_dict(state["model"])
    except (RuntimeError, KeyError) as error:
        reason = str(error).splitlines()[-1].strip()
        raise UsageError(f"the checkpoint's weights do not fit the model: {reason}") from None


def at_least_float32(x: Tensor) -> Tensor:
    """Convert half-precision tensors to float32. Others are returned as they are."""
    return x.to(torch.promote_types(x.dtype, torch.float32))
