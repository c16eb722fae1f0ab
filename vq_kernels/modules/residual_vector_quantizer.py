"""ResidualVectorQuantizer: each stage quantizes the residual of the previous stages."""

from functools import reduce
from typing import Literal

import torch
from torch import Tensor

from vq_kernels.distributed import rank_and_world, sum_over_ranks
from vq_kernels.functional import Quantized
from vq_kernels.modules.base import Init, QuantizerBase
from vq_kernels.search.backend import Backend
from vq_kernels.search.validation import check_at_least, check_tensor


class ResidualVectorQuantizer(QuantizerBase):
    """Replaces each vector by the sum of Q codes: its nearest code, the code nearest to the residual, and so on.

    Example, with num_quantizers=8, num_codes=1024 and code_dim=128: x [16, 75, 128] gives quantized [16, 75, 128],
    indices [16, 75, 8] and a loss. `decode(indices[..., :3])` is the coarser vector of the first three stages; these
    indices are those that a quantizer of three stages would give, and `quantizer(x, n_q=3)` computes only these.

    With r_1 = x, c_q the code nearest to r_q, r_{q+1} = r_q - c_q, and w the commitment_weight:

    - quantized is Σ c_q. Its gradient goes to x unchanged, straight through all stages.
    - loss is w times the mean of (r_q - c_q)² over all stages and elements. Its gradient goes to x with the codes taken
      as constants. Without `ema_decay` it is (1 + w) times this mean; the further part has its gradient with respect to
      the codes of stage q, with r_q taken as a constant.

    With heads=G and separate_codebooks=True it is grouped residual quantization: x has G·D channels, each part has its
    own Q codebooks, [G, Q, K, D], and indices are [..., G, Q]. Training keeps x and the indices for the backward, for
    any number of stages.

    Args:
        num_quantizers: Q >= 1, the number of stages.
        num_codes: K >= 1, of each stage.
        code_dim: D >= 1.
        quantizer_dropout: the probability, in [0, 1], that only the first stages quantize a training batch. Their
            number is uniform in 1 to Q and the same on all ranks. A dropped stage gives indices -1 and learns nothing;
            it is searched nevertheless, so that the host need not wait for the device.
        heads: parts that each vector of heads·D channels is split into, each with its own indices.
        separate_codebooks: if True, each head has its own codebooks; otherwise all heads share those of a stage.
        init, init_scale, restart_after, restart_noise, commitment_weight: as for `VectorQuantizer`, for each stage.
            Initial codes from data and reset codes are residuals of the previous stages.
        channel_dim, ema_decay, ema_eps, freeze_codebook, warn, backend, synchronise: as for `VectorQuantizer`.

    Attributes:
        codebook: [Q, K, D], or [heads, Q, K, D] if separate; a buffer, or a Parameter without `ema_decay`.
        steps_unused, batch_counts, usage_counts: [Q, K], or [heads, Q, K], int64, as for `VectorQuantizer`. A step
            that drops a stage does not count for it.
        restarts: [] int64, dead-code resets since `reset_usage`.
        needs_data: [Q], or [heads, Q], float32, 1 if a codebook still waits for the first batch of init="data" or
            "kmeans".

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, section 3.3, with its quantizer dropout; Lee et al. 2022,
    arXiv:2203.01941; grouped: Yang et al. 2023, arXiv:2305.02765.
    """

    size_names = ("heads", "num_quantizers", "num_codes", "code_dim")

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        code_dim: int,
        *,
        quantizer_dropout: float = 0.0,
        init: Init | Tensor = "data",
        init_scale: float = 1.0,
        restart_after: int | Literal["auto"] = "auto",
        restart_noise: float = 0.01,
        commitment_weight: float = 0.25,
        heads: int = 1,
        separate_codebooks: bool = False,
        channel_dim: int = -1,
        ema_decay: float | Literal["auto"] | None = "auto",
        ema_eps: float = 1e-5,
        freeze_codebook: bool = False,
        warn: bool = True,
        backend: Backend = "auto",
        synchronise: bool = True,
    ) -> None:
        check_at_least(1, integer=True, num_quantizers=num_quantizers)
        check_at_least(0, 1, quantizer_dropout=quantizer_dropout)
        super().__init__(
            num_quantizers,
            num_codes,
            code_dim,
            init=init,
            init_scale=init_scale,
            restart_after=restart_after,
            restart_noise=restart_noise,
            commitment_weight=commitment_weight,
            heads=heads,
            separate_codebooks=separate_codebooks,
            channel_dim=channel_dim,
            ema_decay=ema_decay,
            ema_eps=ema_eps,
            freeze_codebook=freeze_codebook,
            warn=warn,
            backend=backend,
            synchronise=synchronise,
        )
        self.num_quantizers = num_quantizers
        self.quantizer_dropout = quantizer_dropout

    def extra_repr(self) -> str:
        """Returns the arguments that `print(module)` shows."""
        dropout = f", quantizer_dropout={self.quantizer_dropout}" if self.quantizer_dropout else ""
        return f"num_quantizers={self.num_quantizers}, {super().extra_repr()}{dropout}"

    def forward(
        self, x: Tensor, mask: Tensor | None = None, *, n_q: int | None = None, return_all_codes: bool = False
    ) -> Quantized | tuple[Tensor, ...]:
        """Quantizes x. See `VectorQuantizer.forward` for training mode and checkpointing.

        Args:
            x: heads·D channels in `channel_dim`, of any dtype of `nearest_code`. [...] is its shape without them.
                Residuals of half precision are taken in float32.
            mask: [...] bool, False for padding, as for `VectorQuantizer`.
            n_q: in [1, Q], the number of stages, equal on all ranks; None: all. The later ones are not computed and
                learn nothing.
            return_all_codes: also return the codes of each stage, `get_codes_from_indices(indices)`.

        Returns:
            Quantized(quantized, with x's shape and dtype, indices [..., n_q] int64, or [..., heads, n_q], loss []).
            With return_all_codes, a tuple of these three and the codes [n_q, ...].

        Raises:
            TypeError, ValueError: x, mask or n_q does not fit.
            RuntimeError: as for `nearest_code`.
        """
        active = self._draw_active() if self.training and self.quantizer_dropout else None
        result = self._quantize(x, mask, active, self._checked_stages(n_q))
        return (*result, self.get_codes_from_indices(result.indices)) if return_all_codes else result

    def encode(
        self, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.int64, *, n_q: int | None = None
    ) -> Tensor:
        """Returns the indices that `forward` gives in eval mode, without a gradient. It learns and counts nothing.

        Args:
            x, mask, n_q: as for `forward`.
            dtype: as for `VectorQuantizer.encode`.

        Raises:
            TypeError, ValueError: x, mask, dtype or n_q does not fit.
        """
        return self._encode(x, mask, dtype, self._checked_stages(n_q))

    def _checked_stages(self, n_q: int | None) -> int:
        if n_q is not None and not 1 <= n_q <= self.num_quantizers:
            raise ValueError(f"n_q must be in [1, {self.num_quantizers}], got {n_q}")
        return self.num_quantizers if n_q is None else n_q

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the sum of the codes of the first stages. With all indices of `forward`, this equals its quantized
        vectors.

        Args:
            indices: [..., q], or [..., heads, q], of any integer dtype, of the first q stages, 1 <= q <= Q; -1 adds
                nothing.

        Returns:
            heads·D channels in `channel_dim`, in the codebook's dtype, differentiable with respect to the codebook.

        Raises:
            TypeError, ValueError: indices do not fit, see `VectorQuantizer.decode`.
        """
        check_tensor("indices", indices)
        return reduce(torch.add, self._decode(self._checked(indices)))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the codes of each stage, [q, ...], which `decode` sums, for indices as there."""
        return torch.stack(list(self._decode(self._checked(indices))))

    def _checked(self, indices: Tensor) -> Tensor:
        heads = (self.heads,) if self.heads > 1 else ()
        fits = indices.shape[-1 - len(heads) : -1] == heads
        if not fits or not 1 <= indices.shape[-1] <= self.num_quantizers:
            expected = ", ".join(["...", *map(str, heads), "q"])
            raise ValueError(
                f"indices must be [{expected}] with 1 <= q <= {self.num_quantizers}, got {tuple(indices.shape)}"
            )
        return indices

    def _draw_active(self) -> Tensor:
        """Draws which of the first stages quantize a training batch, [Q] bool, equal on all ranks."""
        device, num_stages = self.codebook.device, self.num_quantizers
        drops = torch.rand((), device=device) < self.quantizer_dropout
        num_active = torch.where(drops, torch.randint(1, num_stages + 1, (), device=device), num_stages)
        num_active = sum_over_ranks(num_active * (rank_and_world(self.synchronise)[0] == 0), self.synchronise)
        return torch.arange(num_stages, device=device) < num_active
