"""The quantizer as a module: each vector, or each part of one, is replaced by its nearest code."""

import torch
from torch import Tensor

from vq_kernels.functional import Metric, Quantized, choose_topk
from vq_kernels.modules.base import StagedQuantizer
from vq_kernels.modules.codebook import Init
from vq_kernels.search.backend import Backend
from vq_kernels.search.topk import NearestCodes


class VectorQuantizer(StagedQuantizer):
    """Replaces each vector by its nearest code; the codebook learns by the gradient of the loss.

    Example, with num_codes=512 and code_dim=64: x [8, 16, 16, 64] gives quantized [8, 16, 16, 64], indices
    [8, 16, 16] and a loss to add to the model's own. Gradients are those of `vector_quantize`.

    With heads=4, x has 4·64 channels, each vector is cut into 4 parts, and indices are [8, 16, 16, 4]; with
    separate_codebooks=True as well, that is product (or grouped) quantization. `ResidualVectorQuantizer` refines each
    code by further ones.

    Args:
        num_codes: K >= 1.
        code_dim: D >= 1.
        init: how the codebook begins: "normal", N(0, init_scale²); "uniform", in ±init_scale; "data", rows of the first
            training batch, evenly spaced from a random start.
        init_scale: >= 0, see `init`; with "data", unused.
        restart_after: a code that no row has chosen in this many training steps is put where a random row of the batch
            is, before the next search; 0: never. Counted in steps since its last use, so that it means the same at
            every batch size.
        restart_noise: standard deviation added to a restarted code, relative to the row's root mean square. It keeps
            codes apart where more of them restart than there are rows.
        commitment_weight: see `vector_quantize`; the specification has none.
        metric: "euclidean"; or "cosine": vectors and codes are brought to length 1, gradients pass through that, and
            the code with the largest dot product is chosen, exactly, see `vq_kernels.cosine.most_similar_code`.
        heads: parts that each vector of heads·D channels is cut into, each with an index of its own.
        separate_codebooks: a codebook for each head; else all share one.
        channel_dim: the dimension of x with the channels: -1, or 1 for pictures [B, C, H, W].
        ema_decay: None: the codebook is a Parameter. A number λ in [0, 1]: it has no gradient, and each code follows
            a moving average of its rows, which keeps λ of itself in a step (0.99 is usual); see
            `vq_kernels.learning.ema`. The loss is the same number; its part for the codebook moves nothing then.
        ema_eps: >= 0, added to each code's average number of rows.
        backend: see `nearest_code`.
        synchronise: in training, count the rows, and begin codes at rows, of all ranks of the default process group,
            where there is one when a batch comes. With DistributedDataParallel, which averages the gradients, all ranks
            keep one codebook, that of a single process with all rows. False: of this process alone.

    Attributes:
        codebook: [K, D], or [heads, K, D] if they are separate; a Parameter, or a buffer with `ema_decay`.
        steps_unused: [K] int64, training steps since each code was last chosen; [heads, K] if codebooks are separate,
            as all counts.
        batch_counts: [K] int64, the rows of the last training batch, of all ranks, that chose each code.
        usage_counts: [K] int64, rows that chose each code in training since `reset_usage`.
        restarts: [] int64, codes restarted since `reset_usage`.
        needs_data: [], or [heads], bool, whether the codebook still waits for the first batch of init="data".

    Raises:
        ValueError: an argument outside of its range.

    Source: van den Oord et al. 2017, arXiv:1711.00937; restarts: Zeghidour et al. 2021, arXiv:2107.03312, section 3.3.
    """

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        init: Init = "normal",
        init_scale: float = 1.0,
        restart_after: int = 0,
        restart_noise: float = 0.01,
        commitment_weight: float = 0.0,
        metric: Metric = "euclidean",
        heads: int = 1,
        separate_codebooks: bool = False,
        channel_dim: int = -1,
        ema_decay: float | None = None,
        ema_eps: float = 1e-5,
        backend: Backend = "auto",
        synchronise: bool = True,
    ) -> None:
        super().__init__(
            None,
            num_codes,
            code_dim,
            init=init,
            init_scale=init_scale,
            restart_after=restart_after,
            restart_noise=restart_noise,
            commitment_weight=commitment_weight,
            metric=metric,
            heads=heads,
            separate_codebooks=separate_codebooks,
            channel_dim=channel_dim,
            ema_decay=ema_decay,
            ema_eps=ema_eps,
            backend=backend,
            synchronise=synchronise,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantize x.

        In training mode it also restarts codes, moves the averages and keeps the usage statistics. Where gradient
        checkpointing runs it twice for a batch, the second pass repeats the first, and learns and counts nothing, be it
        compiled or not; the backward of a batch must then come before the next batch. In `torch.func.grad`, pass
        buffers that are cloned inside of it by `functional_call`, and a codebook too where codes restart: what it
        captures may not change.

        Args:
            x: heads·D channels in `channel_dim`, of any of the dtypes of `nearest_code`; [...] is its shape without
                them.
            mask: [...] bool, False for padding, which may hold anything: its quantized is 0, its index -1; it has no
                part in the loss, the gradients, the statistics and the restarts.

        Returns:
            Quantized(quantized, shaped like x and in its dtype, indices [...] int64, or [..., heads], loss []).

        Raises:
            TypeError, ValueError: x or mask does not fit.
            RuntimeError: as for `nearest_code`.
        """
        quantized, indices, loss = self._quantize(x, mask)
        return Quantized(quantized, indices.squeeze(-1), loss)

    def decode(self, indices: Tensor) -> Tensor:
        """What `forward` gave as quantized with these indices, but for its dtype, which is the codebook's.

        Args:
            indices: [...], or [..., heads], int64; -1 gives 0.

        Returns:
            heads·D channels in `channel_dim`; differentiable with respect to the codebook.

        Raises:
            ValueError: indices are not of that shape.
        """
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(f"indices must be [..., {self.heads}], one for each head, got {tuple(indices.shape)}")
        return self._decode(indices[..., None])

    @torch.no_grad()
    def topk(self, x: Tensor, k: int) -> NearestCodes:
        """The k best codes of each vector, the best first.

        Args:
            x: as for `forward`; [...] is its shape without channels.
            k: in [1, K].

        Returns:
            NearestCodes(indices [..., k] int64, or [..., heads, k], sq_distances likewise, float32), as
            `nearest_code_topk` gives them: for the cosine, of unit vectors.

        Raises:
            TypeError, ValueError: x or k does not fit.
        """
        positions, _ = self._positions(x, None)
        rows = self._as_searched(self._layout.split(positions))  # [C, M, D]
        each = zip(rows, self._by_head(self._as_codes(self.codebook))[:, 0], strict=True)
        found = [choose_topk(head, codebook, k, metric=self.metric) for head, codebook in each]
        joined = (self._join_ranks(torch.stack(parts), positions.shape[:-1]) for parts in zip(*found, strict=True))
        return NearestCodes(*joined)

    def _join_ranks(self, ranks: Tensor, leading: torch.Size) -> Tensor:
        """[C, M, k] as [*leading, k], or [*leading, heads, k]."""
        return torch.stack([self._layout.join_indices(rank, leading) for rank in ranks.unbind(-1)], dim=-1)
