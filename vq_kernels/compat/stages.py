"""The stages of a residual quantizer and their dropout, shared by `ResidualVQ` and `ResidualSimVQ`."""

import math
import random
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq_kernels.distributed import sum_over_ranks
from vq_kernels.gradient.autograd import LEFT_OUT
from vq_kernels.modules.indices import codes_at
from vq_kernels.modules.training_step import HasCodebooks
from vq_kernels.search.validation import check_at_least, check_no_vmap


class ResidualStages(HasCodebooks):
    """Q stages, of which training may leave out the last ones. The arguments are those of `ResidualVQ`."""

    layers: nn.ModuleList

    def __init__(
        self,
        num_quantizers: int,
        heads: int,
        quantize_dropout: bool,
        quantize_dropout_cutoff_index: int,
        quantize_dropout_multiple_of: int,
    ) -> None:
        super().__init__()
        if heads != 1:
            raise ValueError(f"heads must be 1, got {heads}")
        check_at_least(0, quantize_dropout_cutoff_index=quantize_dropout_cutoff_index)
        check_at_least(1, num_quantizers=num_quantizers, quantize_dropout_multiple_of=quantize_dropout_multiple_of)
        if quantize_dropout and num_quantizers > 1 and quantize_dropout_cutoff_index >= num_quantizers:
            raise ValueError(
                f"quantize_dropout_cutoff_index must be < {num_quantizers}, the number of stages, "
                f"got {quantize_dropout_cutoff_index}"
            )
        self.num_quantizers = num_quantizers
        self.quantize_dropout = quantize_dropout and num_quantizers > 1
        self.quantize_dropout_cutoff_index = quantize_dropout_cutoff_index
        self.quantize_dropout_multiple_of = quantize_dropout_multiple_of

    def _draw_num_active(self, seed: int | None, device: torch.device) -> int:
        """Returns the number of stages that take part, equal on all ranks."""
        if not (self.training and self.quantize_dropout):
            return self.num_quantizers
        if seed is None:
            seed = sum_of_seeds(draw_seed(device))
        last = random.Random(seed).randrange(self.quantize_dropout_cutoff_index, self.num_quantizers)
        multiple = self.quantize_dropout_multiple_of
        return min(math.ceil((last + 1) / multiple) * multiple, self.num_quantizers)

    def _of_all(self, indices: list[Tensor], losses: list[Tensor]) -> tuple[Tensor, Tensor]:
        """Returns the indices [..., Q] and losses [Q] of all stages from those of the first ones; -1 and 0 after."""
        left_out = self.num_quantizers - len(indices)
        return F.pad(torch.stack(indices, dim=-1), (0, left_out), value=LEFT_OUT), F.pad(
            torch.stack(losses), (0, left_out)
        )

    def _codes_of(self, indices: Tensor, codebooks: Iterable[Tensor]) -> Tensor:
        """Returns the codes [Q, ..., D] of indices [..., q], q <= Q; 0 for -1 and for the stages after the first q."""
        last = indices.shape[-1]
        if last > self.num_quantizers:
            raise ValueError(f"indices must be [..., q] with q <= {self.num_quantizers}, got {tuple(indices.shape)}")
        chosen = F.pad(indices, (0, self.num_quantizers - last), value=LEFT_OUT).unbind(dim=-1)
        return torch.stack([codes_at(*stage) for stage in zip(codebooks, chosen, strict=True)])


def draw_seed(device: torch.device) -> Tensor:
    """Draws [] int64 in [0, 10000), in training mode."""
    check_no_vmap()
    return torch.randint(0, 10_000, (), device=device)


def sum_of_seeds(drawn: Tensor) -> int:
    """Returns the sum over the ranks of what they drew, which is equal on all ranks."""
    return int(sum_over_ranks(drawn, synchronise=True))
