"""`GroupedResidualVQ`, a drop-in replacement for that of vector_quantize_pytorch."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vq_kernels.compat.arguments import register_in_sequential
from vq_kernels.compat.keywords import RESIDUAL, refuse_unsupported
from vq_kernels.compat.residual_vq import ResidualVQ
from vq_kernels.compat.stages import draw_seed, sum_of_seeds
from vq_kernels.modules.training_step import HasCodebooks
from vq_kernels.search.validation import check_at_least


class GroupedResidualVQ(HasCodebooks):
    """Splits the channels of each vector into groups, each with its own `ResidualVQ`.

    It has the arguments, results and state dict of vector_quantize_pytorch's `GroupedResidualVQ` (1.32.0).

    Example, with dim=256, groups=2, num_quantizers=8 and codebook_size=1024: x [8, 1024, 256] gives quantized
    [8, 1024, 256], indices [2, 8, 1024, 8] and losses [2, 8].

    Args:
        dim: the number of channels of x, a multiple of groups.
        groups: G, at least 1.
        accept_image_fmap: x is [b, dim, h, w].
        options: the other arguments of `ResidualVQ`.

    Attributes:
        rvqs: the G modules.
        codebooks: [G, Q, K, D].

    Raises:
        NotImplementedError, TypeError, ValueError: as for `ResidualVQ`.

    Source: Yang et al. 2023, "HiFi-Codec", arXiv:2305.02765; names: vector_quantize_pytorch 1.32.0.
    """

    def __init__(self, *, dim: int, groups: int = 1, accept_image_fmap: bool = False, **options: Any) -> None:
        super().__init__()
        check_at_least(1, groups=groups)
        if dim % groups:
            raise ValueError(f"dim must be a multiple of groups={groups}, got {dim}")
        self.dim = dim
        self.groups = groups
        self.accept_image_fmap = accept_image_fmap
        self.rvqs = nn.ModuleList(
            ResidualVQ(dim=dim // groups, accept_image_fmap=accept_image_fmap, **options) for _ in range(groups)
        )
        register_in_sequential(type(self))

    @property
    def _groups(self) -> list[ResidualVQ]:
        return list(self.rvqs)  # type: ignore[arg-type]

    @property
    def codebooks(self) -> Tensor | tuple[tuple[Tensor, ...], ...]:
        """[G, Q, K, D], or for each group a tuple of [K_q, D] if the sizes differ."""
        codebooks = tuple(rvq.codebooks for rvq in self._groups)
        return torch.stack(codebooks) if self._groups[0].uniform_codebook_size else codebooks  # type: ignore[arg-type,return-value]

    @property
    def split_dim(self) -> int:
        """Where x has its channels."""
        return 1 if self.accept_image_fmap else -1

    def get_codes_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns the codes [G, Q, ..., D] of indices [G, ..., q]."""
        groups = zip(self._groups, indices, strict=True)
        return torch.stack([rvq.get_codes_from_indices(chosen) for rvq, chosen in groups])

    def get_output_from_indices(self, indices: Tensor | Sequence[Tensor]) -> Tensor:
        """Returns the `quantized` of indices [G, ..., q]: [..., dim], with the channels last."""
        groups = zip(self._groups, indices, strict=True)
        return torch.cat([rvq.get_output_from_indices(chosen) for rvq, chosen in groups], dim=-1)

    def forward(
        self,
        x: Tensor,
        indices: Sequence[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        mask: Tensor | None = None,
    ) -> tuple[Any, ...]:
        """Quantizes x, group by group. Quantize dropout leaves out the same stages of all groups.

        Args:
            x, return_all_codes, sample_codebook_temp, freeze_codebook, mask: as for `ResidualVQ`.
            indices: not supported, only None.

        Returns:
            quantized, with x's shape and dtype; indices [G, ..., Q] int64; losses [G, Q]; with return_all_codes, a
            tuple of the codes [Q, ..., D] of each group.

        Raises:
            NotImplementedError, TypeError, ValueError: as for `ResidualVQ`.
        """
        refuse_unsupported({"indices": indices}, RESIDUAL)
        if x.shape[self.split_dim] != self.dim:
            raise ValueError(f"x must have {self.dim} channels in dimension {self.split_dim}, got {tuple(x.shape)}")
        drawn = draw_seed(x.device) if self.training else None  # always, as in vector_quantize_pytorch
        seed = None if drawn is None or not self._groups[0].quantize_dropout else sum_of_seeds(drawn)
        parts = zip(self._groups, x.chunk(self.groups, dim=self.split_dim), strict=True)
        each = [
            rvq(
                part,
                mask=mask,
                return_all_codes=return_all_codes,
                freeze_codebook=freeze_codebook,
                rand_quantize_dropout_fixed_seed=seed,
            )
            for rvq, part in parts
        ]
        quantized, indices, losses, *codes = zip(*each, strict=True)
        return torch.cat(quantized, dim=self.split_dim), torch.stack(indices), torch.stack(losses), *codes
