"""The inputs of `VectorQuantize` and `ResidualVQ`: where they have their channels, projections and padding."""

import torch
from torch import Tensor, nn

from vq_kernels.modules.indices import check_mask
from vq_kernels.modules.training_step import HasCodebooks
from vq_kernels.search.validation import check_dtype


class PositionwiseLayer(HasCodebooks):
    """A layer on the vectors of a sequence, an image or a volume. The attributes are arguments of `VectorQuantize`."""

    dim: int
    channel_last: bool
    accept_image_fmap: bool
    accept_3d_fmap: bool
    return_zeros_for_masked_padding: bool

    def _add_projections(self, inner_dim: int, layernorm: bool = False) -> None:
        """Sets the projections from `dim` channels to `inner_dim` and back; identities if they are equal."""
        self.has_projections = inner_dim != self.dim
        self.project_in: nn.Module = nn.Linear(self.dim, inner_dim) if self.has_projections else nn.Identity()
        if layernorm and self.has_projections:
            self.project_in = nn.Sequential(self.project_in, nn.LayerNorm(inner_dim))
        self.project_out: nn.Module = nn.Linear(inner_dim, self.dim) if self.has_projections else nn.Identity()

    @property
    def _channels_second(self) -> bool:
        return self.accept_image_fmap or self.accept_3d_fmap or not self.channel_last

    def _channel_dim(self, x: Tensor) -> int:
        """Checks x and returns where its channels are, 1 or -1."""
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

    def _restore(self, positions: Tensor) -> Tensor:
        """Moves the channels of positions [..., dim] to where the layer takes them."""
        return positions.movedim(-1, 1) if self._channels_second and positions.dim() > 2 else positions

    def _projected(self, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Projects positions [..., dim] after it sets padding to 0."""
        inner: Tensor = self.project_in(positions if mask is None else positions.masked_fill(~mask[..., None], 0))
        return inner

    def _with_padding(self, quantized: Tensor, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Sets the padding of quantized [..., dim] to 0, or to that of positions [..., dim]."""
        if mask is None:
            return quantized
        padding = torch.zeros_like(positions) if self.return_zeros_for_masked_padding else positions
        return torch.where(mask[..., None], quantized, padding.to(quantized.dtype))


def position_mask(mask: Tensor | None, lens: Tensor | None, leading: torch.Size) -> Tensor | None:
    """Returns the mask [*leading] bool of a call, or None; `leading` is the shape of x without channels.

    Raises:
        TypeError, ValueError: mask or lens does not fit, or both are given.
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
