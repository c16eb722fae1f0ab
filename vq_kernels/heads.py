"""From the shapes of models to rows of one code each, and back: heads, masks, lengths.

Channels are brought last by `movedim` alone; what is left is to cut [..., heads·D] into the rows that each codebook
searches, [C, M, D] with C codebooks, and to put codes and indices where their rows came from:

- one codebook for all heads: C = 1, M = N·heads, a view;
- a codebook for each head: C = heads, M = N.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class HeadLayout:
    """How [..., heads·D] is cut into rows.

    Attributes:
        heads: parts that each vector is cut into, >= 1.
        separate: whether each head has a codebook of its own.
    """

    heads: int
    separate: bool

    @property
    def num_codebooks(self) -> int:
        """C: `heads`, if each has its own, or 1."""
        return self.heads if self.separate else 1

    def split(self, x: Tensor) -> Tensor:
        """x [..., heads·D] as rows [C, M, D]."""
        rows = x.reshape(-1, self.num_codebooks, x.shape[-1] // self.num_codebooks).transpose(0, 1)
        return rows.reshape(self.num_codebooks, -1, x.shape[-1] // self.heads)

    def join(self, rows: Tensor, leading: torch.Size) -> Tensor:
        """Undo `split`: rows [C, M, D] as [*leading, heads·D]."""
        parts, code_dim = self.heads // self.num_codebooks, rows.shape[-1]
        joined = rows.reshape(self.num_codebooks, math.prod(leading), parts * code_dim).transpose(0, 1)
        return joined.reshape(*leading, self.heads * code_dim)

    def split_indices(self, indices: Tensor) -> Tensor:
        """indices [..., heads], or [...] for one head, as [C, M]."""
        return indices.reshape(-1, self.num_codebooks, self.heads // self.num_codebooks).transpose(0, 1).flatten(1)

    def join_indices(self, indices: Tensor, leading: torch.Size) -> Tensor:
        """Undo `split_indices`: indices [C, M] as [*leading, heads], or [*leading] for one head."""
        parts = self.heads // self.num_codebooks
        joined = indices.reshape(self.num_codebooks, math.prod(leading), parts).transpose(0, 1)
        return joined.reshape(*leading, self.heads) if self.heads > 1 else joined.reshape(leading)

    def split_mask(self, mask: Tensor) -> Tensor:
        """mask [...] bool as one for each row of a codebook, [M]."""
        rows_a_position = self.heads // self.num_codebooks
        return mask.reshape(-1, 1).expand(-1, rows_a_position).reshape(-1)


def mask_from_lens(lens: Tensor, length: int) -> Tensor:
    """lens [B] as a mask [B, length]: True for the first lens[b] positions of each row."""
    return torch.arange(length, device=lens.device) < lens[:, None]


def check_mask(mask: Tensor, shape: torch.Size) -> None:
    """Raise TypeError or ValueError unless `mask` is bool and of such a shape."""
    if mask.dtype != torch.bool:
        raise TypeError(f"mask must be bool, got {mask.dtype}")
    if mask.shape != shape:
        raise ValueError(f"mask must be {tuple(shape)} to match x, got {tuple(mask.shape)}")
