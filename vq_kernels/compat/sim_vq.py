"""`SimVQ` and `ResidualSimVQ`, drop-in replacements for those of vector_quantize_pytorch."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from vq_kernels.compat.arguments import register_in_sequential
from vq_kernels.compat.stages import ResidualStages
from vq_kernels.gradient.autograd import choose, pass_gradients
from vq_kernels.gradient.autograd import rotation_trick as rotate_gradient
from vq_kernels.modules.indices import codes_at
from vq_kernels.search.backend import BACKENDS, Backend
from vq_kernels.search.validation import check_at_least, check_bool, check_choice, check_dtype


class SimVQ(nn.Module):
    """Replaces each vector by its nearest code, where a trained module makes the codes from fixed random ones.

    It has the arguments, results and state dict of vector_quantize_pytorch's `SimVQ` (1.32.0), with the exact search of
    this library.

    Example, with dim=256 and codebook_size=1024: x [8, 1024, 256] gives quantized [8, 1024, 256], indices [8, 1024] and
    a loss [], in training and in eval mode.

    Args:
        dim: the number of channels of x.
        codebook_size: K, the number of codes.
        codebook_transform: makes the codes [K, dim] from the fixed ones; None: a linear layer without bias.
        init_fn: returns the fixed codes from normally distributed ones [K, frozen_codebook_dim]; None: these.
        channel_first: x is [b, dim, ...].
        rotation_trick: rotate the gradient from the code to x; otherwise pass it straight through.
        input_to_quantize_commit_loss_weight: at least 0, the weight of x's part of the loss. The codes' part has 1.
        commitment_weight: at least 0, the weight of the loss.
        frozen_codebook_dim: the dimension of the fixed codes; `dim` if None.
        backend: as for `nearest_code`.

    Attributes:
        codebook: [K, dim], computed from `frozen_codebook` [K, frozen_codebook_dim] by `code_transform`.

    Raises:
        TypeError, ValueError: an argument is out of range.

    Source: Zhu et al. 2024, arXiv:2411.02038; names: vector_quantize_pytorch 1.32.0.
    """

    frozen_codebook: Tensor

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_transform: nn.Module | None = None,
        init_fn: Callable[[Tensor], Tensor] | None = None,
        channel_first: bool = False,
        rotation_trick: bool = True,
        input_to_quantize_commit_loss_weight: float = 0.25,
        commitment_weight: float = 1.0,
        frozen_codebook_dim: int | None = None,
        *,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        frozen_dim = dim if frozen_codebook_dim is None else frozen_codebook_dim
        check_at_least(1, integer=True, dim=dim, codebook_size=codebook_size, frozen_codebook_dim=frozen_dim)
        check_bool(channel_first=channel_first, rotation_trick=rotation_trick)
        check_at_least(
            0,
            input_to_quantize_commit_loss_weight=input_to_quantize_commit_loss_weight,
            commitment_weight=commitment_weight,
        )
        check_choice("backend", backend, BACKENDS)
        self.dim = dim
        self.codebook_size = codebook_size
        self.channel_first = channel_first
        self.rotation_trick = rotation_trick
        self.input_to_quantize_commit_loss_weight = input_to_quantize_commit_loss_weight
        self.commitment_weight = commitment_weight
        self.backend: Backend = backend
        codes = torch.randn(codebook_size, frozen_dim) * frozen_dim**-0.5
        self.register_buffer("frozen_codebook", codes if init_fn is None else init_fn(codes))
        linear = codebook_transform is None
        self.code_transform = nn.Linear(frozen_dim, dim, bias=False) if linear else codebook_transform
        register_in_sequential(type(self))

    @property
    def codebook(self) -> Tensor:
        """[K, dim], with a gradient."""
        codes: Tensor = self.code_transform(self.frozen_codebook)  # type: ignore[misc]
        return codes

    def indices_to_codes(self, indices: Tensor) -> Tensor:
        """Returns the codes of indices [b, ...], with channels as x has them; 0 for -1."""
        codes = codes_at(self.codebook, indices)
        return codes.movedim(-1, 1) if self.channel_first else codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantizes x.

        Args:
            x: [..., dim]; [b, dim, ...] with channel_first.

        Returns:
            quantized, with x's shape and dtype; indices [...] int64; the loss [], the mean of (x - code)² as a function
            of the codes plus, by its weight, the same as a function of x.

        Raises:
            TypeError, ValueError: x's dtype or shape does not fit.
        """
        check_dtype("x", x)
        channel_dim = 1 if self.channel_first else -1
        if x.dim() < 2 or x.shape[channel_dim] != self.dim:
            expected = "[b, {}, ...]" if self.channel_first else "[b, ..., {}]"
            raise ValueError(f"x must be {expected.format(self.dim)}, got {tuple(x.shape)}")
        positions, codebook = x.movedim(channel_dim, -1), self.codebook
        rows = positions.reshape(-1, self.dim)
        choice = choose(rows.detach(), codebook.detach(), backend=self.backend)
        weight = self.input_to_quantize_commit_loss_weight
        quantized, loss = pass_gradients(
            rows, codebook[None], choice, commitment_weight=weight, complete=True, backend=self.backend
        )
        if self.rotation_trick:
            quantized = rotate_gradient(rows, choice.codes)
        quantized = quantized.view(positions.shape).movedim(-1, channel_dim)
        return quantized, choice.indices.view(positions.shape[:-1]), loss * self.commitment_weight


class ResidualSimVQ(ResidualStages):
    """Quantizes each vector by the sum of one code of a `SimVQ` per stage.

    It has the arguments, results and state dict of vector_quantize_pytorch's `ResidualSimVQ` (1.32.0).

    Example, with dim=256, num_quantizers=8 and codebook_size=1024: x [8, 1024, 256] gives quantized [8, 1024, 256],
    indices [8, 1024, 8] and losses [8].

    Args:
        dim, codebook_size, channel_first, rotation_trick: as for `SimVQ`.
        num_quantizers: Q, the number of stages.
        heads, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of: as for `ResidualVQ`.
        options: the other arguments of `SimVQ`, for all stages. They share a `codebook_transform`.

    Attributes:
        layers: the stages, each a `SimVQ`.
        codebooks: [Q, K, dim].

    Raises:
        TypeError, ValueError: as for `SimVQ` and `ResidualVQ`.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, algorithm 1; names: vector_quantize_pytorch 1.32.0.
    """

    def __init__(
        self,
        *,
        dim: int,
        num_quantizers: int,
        codebook_size: int,
        heads: int = 1,
        quantize_dropout: bool = False,
        quantize_dropout_cutoff_index: int = 0,
        quantize_dropout_multiple_of: int = 1,
        channel_first: bool = False,
        rotation_trick: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(
            num_quantizers, heads, quantize_dropout, quantize_dropout_cutoff_index, quantize_dropout_multiple_of
        )
        options |= {"channel_first": channel_first, "rotation_trick": rotation_trick}
        self.channel_first = channel_first
        self.layers = nn.ModuleList(SimVQ(dim, codebook_size, **options) for _ in range(num_quantizers))
        register_in_sequential(type(self))

    @property
    def _stages(self) -> list[SimVQ]:
        return list(self.layers)  # type: ignore[arg-type]

    @property
    def codebook_size(self) -> int:
        """K."""
        return self._stages[0].codebook_size

    @property
    def codebooks(self) -> Tensor:
        """[Q, K, dim], with a gradient."""
        return torch.stack([layer.codebook for layer in self._stages])

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the codes [Q, ...] of indices [..., q], q <= Q, with channels as x has them; 0 for -1."""
        codes = self._codes_of(indices, (layer.codebook for layer in self._stages))
        return codes.movedim(-1, 2) if self.channel_first else codes

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the `quantized` of indices [..., q], q <= Q."""
        return self.get_codes_from_indices(indices).sum(dim=0)

    def forward(
        self, x: Tensor, return_all_codes: bool = False, rand_quantize_dropout_fixed_seed: int | None = None
    ) -> tuple[Tensor, ...]:
        """Quantizes x.

        Args:
            x: as for `SimVQ`.
            return_all_codes: also return the codes of each stage.
            rand_quantize_dropout_fixed_seed: of the number of stages under quantize_dropout; None draws it.

        Returns:
            quantized, with x's shape and dtype; indices [..., Q] int64; losses [Q]; with return_all_codes, the codes
            [Q, ...], with channels as x has them. A stage that is left out has index -1 and loss 0.

        Raises:
            TypeError, ValueError: as for `SimVQ`.
        """
        residual = x.to(torch.promote_types(x.dtype, torch.float32))  # differences of half precision may overflow
        quantized, chosen, losses = torch.zeros_like(residual), [], []
        for layer in self._stages[: self._draw_num_active(rand_quantize_dropout_fixed_seed, x.device)]:
            codes, stage_indices, loss = layer(residual)
            residual, quantized = residual - codes.detach(), quantized + codes
            chosen.append(stage_indices)
            losses.append(loss)
        indices, all_losses = self._of_all(chosen, losses)
        found = quantized.to(x.dtype), indices, all_losses
        return (*found, self.get_codes_from_indices(indices)) if return_all_codes else found
