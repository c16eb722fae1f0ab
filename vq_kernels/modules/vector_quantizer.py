"""VectorQuantizer: replaces each vector, or each part of it, by its nearest code."""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.cosine import _missing_length
from vq_kernels.functional import Quantized
from vq_kernels.gradient.autograd import Metric
from vq_kernels.modules.base import Init, QuantizerBase
from vq_kernels.search.backend import Backend
from vq_kernels.search.topk import NearestCodes, nearest_code_topk
from vq_kernels.search.validation import check_at_least, check_tensor


class VectorQuantizer(QuantizerBase):
    """Replaces each vector by its nearest code. The codebook learns by moving averages, or by the gradient of the loss.

    Example, with num_codes=512 and code_dim=64: x [8, 16, 16, 64] gives quantized [8, 16, 16, 64], indices
    [8, 16, 16] and a loss to add to the model's own. The gradients are those of `vector_quantize`.

    With heads=4, x has 4·64 channels, each vector is split into 4 parts, and indices are [8, 16, 16, 4]. With
    separate_codebooks=True as well, this is product (or grouped) quantization. `ResidualVectorQuantizer` refines each
    code by further ones.

    Args:
        num_codes: K >= 1.
        code_dim: D >= 1.
        init: initial codes: "data", rows of the first training batch, evenly spaced from a random start; "normal",
            N(0, init_scale²); "uniform", in ±init_scale; "kmeans", k-means of the first training batch, for which each
            step reads a boolean from the device; or a tensor of the shape of `codebook`, see `set_codes`.
        init_scale: at least 0, see `init`.
        restart_after: reset a code that no row has chosen for this many training steps to a random row of the batch,
            before the next search. With 0, codes are never reset. "auto" is 20 steps, or as many as bring 10 rows for
            each code if that is more.
        restart_noise: standard deviation of the noise added to a reset code, relative to the spread of the batch: the
            mean absolute deviation in each dimension, of 64 rows. It keeps codes apart if more codes are reset than
            there are rows.
        commitment_weight: w >= 0, the weight of the loss that draws x to its codes, see `vector_quantize`.
        metric: "euclidean" or "cosine". With "cosine", vectors and codes are normalised, gradients pass through the
            normalisation, and the search for the largest dot product is exact, see
            `vq_kernels.cosine.most_similar_code`.
        heads: parts that each vector of heads·D channels is split into, each with its own index.
        separate_codebooks: if True, each head has its own codebook; otherwise all heads share one.
        channel_dim: the dimension of x that holds the channels: -1, or 1 for images [B, C, H, W].
        ema_decay: with a number λ in [0, 1], each code follows the moving average of its rows with this decay, see
            `vq_kernels.learning.ema`. The codebook has no gradient, and the loss is the commitment alone, w times the
            mean of (x - code)². "auto" is 0.8, or the larger decay that averages over 40 rows for each code. If None,
            the codebook is a Parameter, which the optimizer trains by the loss, (1 + w) times this mean.
        ema_eps: at least 0, smoothing of each code's average number of rows.
        freeze_codebook: whether training changes no code: no gradient, averages, initialisation or resets. It can be
            set at any time. `requires_grad_(False)` has the same effect. That of a parent module reaches only a
            Parameter (`ema_decay=None`).
        warn: whether to warn once if training diverges or the codebook collapses, and once if codes that still wait for
            data are used. The warning names the argument to change. In training it reads nothing from the device that
            is not ready. It is left out in compiled modules.
        backend: as for `nearest_code`.
        synchronise: in training, use the rows of all ranks of the default process group (if there is one in the forward
            pass) for counts, averages, resets and init="data". With DistributedDataParallel, which averages the
            gradients, all ranks then have the codebook that a single process would learn from all rows. If False, each
            process uses only its own rows.

    Attributes:
        codebook: [K, D], or [heads, K, D] if separate; a buffer, or a Parameter without `ema_decay`.
        steps_unused: [K] int64, training steps since each code was last chosen; [heads, K] if separate, like all
            counts.
        batch_counts: [K] int64, the rows of the last training batch, of all ranks, that chose each code.
        usage_counts: [K] int64, the rows in training that chose each code since `reset_usage`.
        restarts: [] int64, dead-code resets since `reset_usage`.
        needs_data: [], or [heads], float32, 1 if the codebook still waits for the first batch of init="data" or
            "kmeans".

    Raises:
        TypeError, ValueError: an argument does not fit.

    Source: van den Oord et al. 2017, arXiv:1711.00937, the averages in appendix A.1; resets: Zeghidour et al. 2021,
    arXiv:2107.03312, section 3.3.
    """

    size_names = ("heads", "num_codes", "code_dim")

    def __init__(
        self,
        num_codes: int,
        code_dim: int,
        *,
        init: Init | Tensor = "data",
        init_scale: float = 1.0,
        restart_after: int | Literal["auto"] = "auto",
        restart_noise: float = 0.01,
        commitment_weight: float = 0.25,
        metric: Metric = "euclidean",
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
            freeze_codebook=freeze_codebook,
            warn=warn,
            backend=backend,
            synchronise=synchronise,
        )

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Quantized:
        """Quantizes x.

        In training mode it also resets dead codes, updates the moving averages and counts the codes. Under activation
        checkpointing, compiled or not, the recomputed pass repeats the original one and updates nothing. The backward
        pass of a batch must then run before the forward pass of the next batch. `torch.func.grad` does not allow
        in-place changes of captured tensors, so clone the buffers (and, if codes are reset, the codebook) inside the
        function and pass the clones through `functional_call`.

        Args:
            x: heads·D channels in `channel_dim`, of any dtype of `nearest_code`. [...] is its shape without them.
            mask: [...] bool, False for padding, which may hold anything. Its quantized value is 0 and its index -1, and
                it has no effect on the loss, the gradients, the counts or the resets.

        Returns:
            Quantized(quantized, with x's shape and dtype, indices [...] int64, or [..., heads], loss []).

        Raises:
            TypeError, ValueError: x or mask does not fit.
            RuntimeError: as for `nearest_code`.
        """
        quantized, indices, loss = self._quantize(x, mask)
        return Quantized(quantized, indices.squeeze(-1), loss)

    def decode(self, indices: Tensor) -> Tensor:
        """Returns the quantized vectors that `forward` returned with these indices, in the codebook's dtype.

        Args:
            indices: [...], or [..., heads], of any integer dtype; -1 gives 0.

        Returns:
            heads·D channels in `channel_dim`, differentiable with respect to the codebook.

        Raises:
            TypeError, ValueError: indices do not fit. Values out of range are refused on the CPU; on CUDA they fail an
                assertion of the device, because a check would wait for it.
        """
        check_tensor("indices", indices)
        return next(self._decode(indices[..., None]))

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Returns `decode(indices)`."""
        return self.decode(indices)

    @torch.no_grad()
    def topk(self, x: Tensor, k: int) -> NearestCodes:
        """Returns the k best codes of each vector, best first.

        Args:
            x: as for `forward`.
            k: in [1, K].

        Returns:
            NearestCodes(indices [..., k] int64, or [..., heads, k], sq_distances likewise, float32), as from
            `nearest_code_topk`; for the cosine, distances between unit vectors.

        Raises:
            TypeError, ValueError: x or k does not fit.
        """
        check_at_least(1, self.num_codes, integer=True, k=k)
        self._warn_of_waiting()
        positions, _ = self._positions(x, None)
        rows = self._as_searched(self._layout.split(positions))  # [C, M, D]
        each = zip(rows, self._normalise(self._codes), strict=True)
        search = nearest_code_topk if self.metric == "euclidean" else _most_similar_topk
        found = [search(head, codebook, k) for head, codebook in each]
        leading = positions.shape[:-1]
        return NearestCodes(
            *(self._layout.join_indices(torch.stack(part), leading) for part in zip(*found, strict=True))
        )


def _most_similar_topk(x: Tensor, codebook: Tensor, k: int) -> NearestCodes:
    """Returns the k codes of codebook [K, D] with the largest dot products with x [N, D], of unit vectors.

    They become the nearest ones when added coordinates give all codes the same length, see `most_similar_code`. Equal
    dot products may come in any order.
    """
    lengthened = torch.cat([codebook, _missing_length(codebook)], dim=1)
    indices = nearest_code_topk(F.pad(x, (0, lengthened.shape[1] - x.shape[1])), lengthened, k).indices
    rank_distances = [(x - codebook[rank]).square().sum(dim=1) for rank in indices.unbind(-1)]
    return NearestCodes(indices, torch.stack(rank_distances, dim=-1).float())
