"""The shapes that `VectorQuantize` takes: where the channels are, how many, what a mask and targets must look like."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from vq_kernels.modules.base import check_mask
from vq_kernels.search.validation import check_dtype

PADDING = -1
"""The index of a position that a mask leaves out."""


@dataclass(frozen=True)
class InputShape:
    """What x must look like.

    Attributes:
        dim: channels.
        channel_last: of sequences; else their channels come second.
        accept_image_fmap: x is [b, dim, h, w].
        accept_3d_fmap: x is [b, dim, d, h, w].
    """

    dim: int
    channel_last: bool
    accept_image_fmap: bool
    accept_3d_fmap: bool

    @property
    def _channels_second(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last

    def channel_dim(self, x: Tensor) -> int:
        """Where the channels of x are, 1 or -1.

        Raises:
            TypeError: a dtype that is not supported.
            ValueError: a shape that the layer does not take.
        """
        check_dtype("x", x)
        sizes, num_dims = "[b, n, {0}] or [b, {0}]", [2, 3]
        if self.accept_image_fmap:
            sizes, num_dims = "[b, {0}, h, w]", [4]
        elif self.accept_3d_fmap:
            sizes, num_dims = "[b, {0}, d, h, w]", [5]
        elif not self.channel_last:
            sizes = "[b, {0}, n] or [b, {0}]"
        channel_dim = 1 if self._channels_second and x.dim() > 2 else -1
        if x.dim() not in num_dims or x.shape[channel_dim] != self.dim:
            raise ValueError(f"x must be {sizes.format(self.dim)}, got {tuple(x.shape)}")
        return channel_dim

    def restore(self, x: Tensor) -> Tensor:
        """x [..., dim] as the layer takes it."""
        return x.movedim(-1, 1) if self._channels_second and x.dim() > 2 else x


def position_mask(mask: Tensor | None, lens: Tensor | None, leading: torch.Size) -> Tensor | None:
    """The mask [*leading] bool that a call asks for, or None.

    Raises:
        TypeError, ValueError: a mask or lens that does not fit x, whose shape without channels is `leading`; or both.
    """
    if lens is not None:
        if mask is not None:
            raise ValueError("mask and lens must not both be given")
        if len(leading) != 2 or lens.shape != leading[:1]:
            raise ValueError(f"lens must be [b] for sequences [b, n], got {tuple(lens.shape)} for {tuple(leading)}")
        return torch.arange(leading[1], device=lens.device) < lens[:, None]
    if mask is not None:
        check_mask(mask, leading)
    return mask


def check_targets(targets: Tensor, leading: torch.Size, heads: int) -> None:
    """Raise TypeError or ValueError unless `targets` is int64 and [*leading], or [*leading, heads].

    Leading dimensions may be flattened to [b, n], as vector_quantize_pytorch wants them for images.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {targets.dtype}")
    ends = (heads,) if heads > 1 else ()
    if targets.shape not in ((*leading, *ends), (leading[0], leading[1:].numel(), *ends)):
        raise ValueError(f"indices must be {(*leading, *ends)} to match x, got {tuple(targets.shape)}")


def projections(dim: int, inner_dim: int, layernorm: bool) -> tuple[nn.Module, nn.Module]:
    """The way from `dim` channels to the codebook's and back; nothing, where they are as many."""
    if inner_dim == dim:
        return nn.Identity(), nn.Identity()
    into: nn.Module = nn.Linear(dim, inner_dim)
    if layernorm:
        into = nn.Sequential(into, nn.LayerNorm(inner_dim))
    return into, nn.Linear(inner_dim, dim)
