"""`ResidualVQ`, a drop-in replacement for that of vector_quantize_pytorch."""

from typing import Any

import torch
from torch import Tensor, nn

from vq_kernels.compat.arguments import register_in_sequential
from vq_kernels.compat.keywords import RESIDUAL, RESIDUAL_WITHOUT_EFFECT, refuse_unsupported
from vq_kernels.compat.losses import directional_noise
from vq_kernels.compat.positions import PositionwiseLayer, position_mask
from vq_kernels.compat.stages import ResidualStages
from vq_kernels.compat.vector_quantize import VectorQuantize
from vq_kernels.search.validation import check_at_least

_DIVEQ = {
    "ema_update": False,
    "learnable_codebook": True,
    "route_gradients_to_input": False,
    "commitment_weight": 0.0,
}
_DIVEQ_VARIANCE = 5e-3


class ResidualVQ(PositionwiseLayer, ResidualStages):
    """Quantizes each vector by the sum of one code per stage. Each stage quantizes the residual of those before it.

    It has the arguments, results and state dict of vector_quantize_pytorch's `ResidualVQ` (1.32.0), with the exact
    search of this library. docs/guides/migrating.md lists what is the same, what differs and what is not supported.

    Example, with dim=256, num_quantizers=8 and codebook_size=1024: x [8, 1024, 256] gives quantized [8, 1024, 256],
    indices [8, 1024, 8] and losses [8], which are 0 in eval mode.

    Args:
        dim: the number of channels of x.
        num_quantizers: Q, the number of stages; the length of codebook_size if None.
        codebook_size: the number of codes of each stage, or a tuple of those of every stage.
        codebook_dim: D, the dimension of the codes; `dim` if None. If they differ, the layer has the projections
            `project_in` and `project_out`.
        shared_codebook: whether all stages share one codebook, which learns from all of them at the end of a step.
        diveq: return x moved towards the sum of codes in a noisy direction, which trains the codes by their gradient
            (Vali et al. 2025, arXiv:2509.26469). There is no commitment loss.
        heads: only 1.
        quantize_dropout: in training, leave out the stages after a random one.
        quantize_dropout_cutoff_index: the first stage that may be the last one, counted from 0.
        quantize_dropout_multiple_of: the number of stages is rounded up to a multiple of it.
        accept_image_fmap: x is [b, dim, h, w].
        quant_grad_frac: in [0, 1], the part of the gradient that passes from a residual to the codes before it.
        return_zeros_for_masked_padding: whether padded positions are returned as 0 or as in x.
        options: the other arguments of `VectorQuantize`, for all stages.

    Attributes:
        layers: the stages, each a `VectorQuantize`.
        codebooks: [Q, K, D], or a tuple of [K_q, D] if the sizes differ.

    Raises:
        NotImplementedError: a keyword of 1.32.0 is not supported.
        TypeError: a keyword is not known.
        ValueError: an argument is out of range, or two arguments conflict.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1; names: vector_quantize_pytorch 1.32.0.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int | None = None,
        codebook_size: int | tuple[int, ...],
        codebook_dim: int | None = None,
        shared_codebook: bool = False,
        diveq: bool = False,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        accept_image_fmap: bool = False,
        quant_grad_frac: float = 0.0,
        return_zeros_for_masked_padding: bool = True,
        **options: Any,
    ) -> None:
        unsupported = {name: options.pop(name) for name in {*RESIDUAL, *RESIDUAL_WITHOUT_EFFECT} if name in options}
        refuse_unsupported(unsupported, RESIDUAL, RESIDUAL_WITHOUT_EFFECT)
        sizes = _stage_sizes(num_quantizers, codebook_size)
        super().__init__(
            len(sizes), heads, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        check_at_least(0, quant_grad_frac=quant_grad_frac)
        if shared_codebook and len(set(sizes)) > 1:
            raise ValueError(f"shared_codebook=True needs stages of one codebook_size, got {sizes}")
        if shared_codebook:
            options |= {"manual_ema_update": True}
        if diveq:
            options |= _DIVEQ
        self.dim = dim
        self.codebook_dim = dim if codebook_dim is None else codebook_dim
        self.codebook_sizes = sizes
        self.uniform_codebook_size = len(set(sizes)) == 1
        self.shared_codebook = shared_codebook
        self.diveq = diveq
        self.channel_last = options.get("channel_last", True)
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = options.get("accept_3d_fmap", False)
        self.quant_grad_frac = 1.0 if diveq else quant_grad_frac
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self._add_projections(self.codebook_dim)
        self.layers = nn.ModuleList(
            VectorQuantize(
                dim=self.codebook_dim,
                codebook_size=size,
                accept_image_fmap=accept_image_fmap,
                return_zeros_for_masked_padding=return_zeros_for_masked_padding,
                **options,
            )
            for size in sizes
        )
        if shared_codebook:
            shared = self._stages[0]._codebook
            shared.resets_in_forward = False
            for layer in self._stages[1:]:
                layer._codebook = shared
        register_in_sequential(type(self))

    @property
    def _stages(self) -> list[VectorQuantize]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def vq_is_ema_updating(self) -> bool:
        """Whether the codes follow the means of their rows."""
        return self._stages[0].ema_update

    @property
    def codebook_size(self) -> int:
        """The number of codes of the first stage."""
        return self._stages[0].codebook_size

    @property
    def codebooks(self) -> Tensor | tuple[Tensor, ...]:
        """[Q, K, D], or a tuple of [K_q, D] if the sizes differ."""
        codebooks = tuple(layer.codebook for layer in self._stages)
        return torch.stack(codebooks) if self.uniform_codebook_size else codebooks

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the codes [Q, ..., D] of indices [..., q], q <= Q; 0 for -1 and for the stages after the first q."""
        return self._codes_of(indices, (layer._codebook.codes_to_decode[0] for layer in self._stages))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the sum of the codes of indices [..., q], projected: [..., dim], with the channels last."""
        output: Tensor = self.project_out(self.get_codes_from_indices(indices).sum(dim=0))
        return output

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        indices: Tensor | list[Tensor] | None = None,
        return_all_codes: bool = False,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool = False,
        beam_size: int | None = None,
        rand_quantize_dropout_fixed_seed: int | None = None,
    ) -> tuple[Tensor, ...]:
        """Quantizes x. In training mode, the codebooks learn from it.

        Args:
            x: [b, n, dim] or [b, dim]; [b, dim, h, w] with accept_image_fmap. [...] is its shape without dim.
            mask: [...] bool, False for padding, which may hold anything.
            indices, beam_size: not supported, only None; beam_size may also be 1.
            return_all_codes: also return the codes of each stage.
            sample_codebook_temp: has no effect, because codes are not sampled.
            freeze_codebook: whether the codebooks stay unchanged.
            rand_quantize_dropout_fixed_seed: of the number of stages under quantize_dropout; None draws it.

        Returns:
            quantized, with x's shape and dtype; indices [..., Q] int64; losses [Q], those of the stages; with
            return_all_codes, the codes [Q, ..., D]. Padding has quantized 0 and index -1. A stage that is left out has
            index -1 and loss 0.

        Raises:
            NotImplementedError: an argument is not supported.
            TypeError, ValueError: a tensor's dtype or shape does not fit.
        """
        refuse_unsupported({"indices": indices, "beam_size": beam_size}, RESIDUAL)
        channel_dim = self._channel_dim(x)
        positions = x.movedim(channel_dim, -1)  # [..., dim]
        mask = position_mask(mask, None, positions.shape[:-1])
        rows = self._projected(positions, mask)
        num_active = self._draw_num_active(rand_quantize_dropout_fixed_seed, x.device)
        residual = rows.to(torch.promote_types(rows.dtype, torch.float32))  # differences of half precision may overflow
        quantized = torch.zeros_like(residual)
        residuals, chosen, losses = [], [], []
        for layer in self._stages[:num_active]:
            residuals.append(residual.detach())
            codes, stage_indices, loss = layer(
                self._restore(residual), mask=mask, freeze_codebook=freeze_codebook or None
            )
            codes = codes.movedim(channel_dim, -1)
            passed = codes.detach() if self.quant_grad_frac <= 0 else _scale_gradient(codes, self.quant_grad_frac)
            residual, quantized = residual - passed, quantized + codes
            chosen.append(stage_indices)
            losses.append(loss)
        quantized = quantized.to(rows.dtype)
        all_indices, all_losses = self._of_all(chosen, losses)
        if self.shared_codebook and self.training and not freeze_codebook:
            self._update_shared(residuals)
        if self.diveq:
            quantized = directional_noise(rows, quantized, _DIVEQ_VARIANCE)
        quantized = self._with_padding(self.project_out(quantized), positions, mask).movedim(-1, channel_dim)
        if not return_all_codes:
            return quantized, all_indices, all_losses
        return quantized, all_indices, all_losses, self.get_codes_from_indices(all_indices)

    def _update_shared(self, residuals: list[Tensor]) -> None:
        """Moves the shared codes to the means of the rows of all stages, and resets dead ones to some of these rows."""
        first = self._stages[0]
        if first.freeze_codebook or first._codebook.freeze_codebook:
            return
        if first.ema_update:
            first._codebook.update_ema()
        first.expire_codes_(torch.stack(residuals, dim=-2).flatten(-3, -2))


def _stage_sizes(num_quantizers: int | None, codebook_size: int | tuple[int, ...]) -> tuple[int, ...]:
    """Returns the number of codes of each stage."""
    if isinstance(codebook_size, tuple):
        if num_quantizers not in (None, len(codebook_size)):
            raise ValueError(f"codebook_size must have {num_quantizers} numbers, got {codebook_size}")
        sizes = codebook_size
    elif num_quantizers is None:
        raise ValueError(f"num_quantizers must be given unless codebook_size is a tuple, got {codebook_size}")
    else:
        sizes = (codebook_size,) * num_quantizers
    return sizes


def _scale_gradient(x: Tensor, fraction: float) -> Tensor:
    """Returns x with a gradient that is multiplied by fraction."""
    return fraction * x + (1 - fraction) * x.detach()
