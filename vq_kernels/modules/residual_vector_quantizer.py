"""Residual vector quantization: each stage quantizes what the stages before left over."""

import torch
from torch import Tensor

from vq_kernels.distributed import rank_and_world, sum_over_ranks
from vq_kernels.functional import Quantized
from vq_kernels.modules.base import StagedQuantizer
from vq_kernels.modules.codebook import Init
from vq_kernels.search.backend import Backend


class ResidualVectorQuantizer(StagedQuantizer):
    """Replaces each vector by a sum of Q codes: the nearest one, the one nearest to what that leaves over, and so on.

    Example, with num_quantizers=8, num_codes=1024 and code_dim=128: x [16, 75, 128] gives quantized [16, 75, 128],
    indices [16, 75, 8] and a loss. `decode(indices[..., :3])` is the coarser vector of the first three stages alone,
    and the first three indices are what three stages would give.

    With r_1 = x, c_q the code nearest to r_q, r_{q+1} = r_q - c_q, and w the commitment_weight:

    - quantized is Σ c_q; x gets the gradient that arrives there unchanged, straight through all stages;
    - loss is (1 + w) times the mean over all stages, and all numbers, of (r_q - c_q)²; the codes of stage q get its
      gradient with r_q taken as constant, x gets that of w's part with the codes taken as constant.

    With heads=G and separate_codebooks=True it is grouped residual quantization: x has G·D channels, each part its own
    Q codebooks, [G, Q, K, D], and indices are [..., G, Q]. In training, memory is kept for x and the indices, however
    many stages there are.

    Args:
        num_quantizers: Q >= 1, stages.
        num_codes: K >= 1, of each stage.
        code_dim: D >= 1.
        quantizer_dropout: the share of the training batches, in [0, 1], that only a random number of the first stages
            quantizes, each from 1 to Q as likely as the others, so that a few stages alone are of use. A stage that is
            dropped gives indices -1 and learns nothing; it is searched all the same, so that nothing has to wait for
            the device. All ranks of a process group drop the same.
        heads: parts that each vector of heads·D channels is cut into, each with indices of its own.
        separate_codebooks: codebooks for each head; else all share those of a stage.
        init, init_scale, restart_after, restart_noise, commitment_weight: as for `VectorQuantizer`, for each stage.
            With init="data" the codes of a stage begin at rows of what the stages before left over, and a code that
            restarts is put there too.
        channel_dim, ema_decay, ema_eps, backend, synchronise: as for `VectorQuantizer`.

    Attributes:
        codebook: [Q, K, D], or [heads, Q, K, D] if they are separate; a Parameter, or a buffer with `ema_decay`.
        steps_unused, batch_counts, usage_counts: [Q, K], or [heads, Q, K], int64, as for `VectorQuantizer`;
            a step in which a stage was dropped is none of its steps.
        restarts: [] int64, codes restarted since `reset_usage`.
        needs_data: [Q], or [heads, Q], bool, whether a codebook still waits for the first batch of init="data".

    Raises:
        ValueError: an argument outside of its range.

    Source: Zeghidour et al. 2021, arXiv:2107.03312, section 3.3, with its quantizer dropout; Lee et al. 2022,
    arXiv:2203.01941; grouped: Yang et al. 2023, arXiv:2305.02765.
    """

    def __init__(
        self,
        num_quantizers: int,
        num_codes: int,
        code_dim: int,
        *,
        quantizer_dropout: float = 0.0,
        init: Init = "normal",
        init_scale: float = 1.0,
        restart_after: int = 0,
        restart_noise: float = 0.01,
        commitment_weight: float = 0.0,
        heads: int = 1,
        separate_codebooks: bool = False,
        channel_dim: int = -1,
        ema_decay: float | None = None,
        ema_eps: float = 1e-5,
        backend: Backend = "auto",
        synchronise: bool = True,
    ) -> None:
        if num_quantizers < 1:
            raise ValueError(f"num_quantizers must be >= 1, got {num_quantizers}")
        if not 0 <= quantizer_dropout <= 1:
            raise ValueError(f"quantizer_dropout must be in [0, 1], got {quantizer_dropout}")
        super().__init__(
            num_quantizers,
            num_codes,
            code_dim,
            init=init,
            init_scale=init_scale,
            restart_after=restart_after,
            restart_noise=restart_noise,
            commitment_weight=commitment_weight,
            metric="euclidean",
            heads=heads,
            separate_codebooks=separate_codebooks,
            channel_dim=channel_dim,
            ema_decay=ema_decay,
            ema_eps=ema_eps,
            backend=backend,
            synchronise=synchronise,
        )
        self.num_quantizers = num_quantizers
        self.quantizer_dropout = quantizer_dropout

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        dropout = f", quantizer_dropout={self.quantizer_dropout}" if self.quantizer_dropout else ""
        return f"num_quantizers={self.num_quantizers}, {super().extra_repr()}{dropout}"

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize x, in eval mode by all stages.

        In training mode it also restarts codes, moves the averages and keeps the usage statistics; see
        `VectorQuantizer.forward` for gradient checkpointing.

        Args:
            x: heads·D channels in `channel_dim`, of any of the dtypes of `nearest_code`; [...] is its shape without
                them. Half precision is widened to float32, in which what is left over is taken.
            mask: [...] bool, False for padding, as for `VectorQuantizer`.

        Returns:
            Quantized(quantized, shaped like x and in its dtype, indices [..., Q] int64, or [..., heads, Q], loss []).

        Raises:
            TypeError, ValueError: x or mask does not fit.
            RuntimeError: as for `nearest_code`.
        """
        return self._quantize(x, mask, self._draw_active() if self.training and self.quantizer_dropout else None)

    def decode(self, indices: Tensor) -> Tensor:
        """The sum of the codes of the first stages: what `forward` gave as quantized, if these are all of its indices.

        Args:
            indices: [..., q], or [..., heads, q], int64, of the first q stages, 1 <= q <= Q; -1 adds nothing.

        Returns:
            heads·D channels in `channel_dim`, in the codebook's dtype; differentiable with respect to the codebook.

        Raises:
            ValueError: indices are not of that shape.
        """
        heads = (self.heads,) if self.heads > 1 else ()
        fits = indices.shape[-1 - len(heads) : -1] == heads
        if not fits or not 1 <= indices.shape[-1] <= self.num_quantizers:
            expected = ", ".join(["...", *map(str, heads), "q"])
            raise ValueError(
                f"indices must be [{expected}] with 1 <= q <= {self.num_quantizers}, got {tuple(indices.shape)}"
            )
        return self._decode(indices)

    def _draw_active(self) -> Tensor:
        """[Q] bool: the stages that take part in a training batch, the first ones, on all ranks the same."""
        device, num_stages = self.codebook.device, self.num_quantizers
        drops = torch.rand((), device=device) < self.quantizer_dropout
        num_active = torch.where(drops, torch.randint(1, num_stages + 1, (), device=device), num_stages)
        num_active = sum_over_ranks(num_active * (rank_and_world(self.synchronise)[0] == 0), self.synchronise)
        return torch.arange(num_stages, device=device) < num_active
