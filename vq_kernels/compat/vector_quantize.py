"""`VectorQuantize`, to be put in the place of vector_quantize_pytorch's by changing an import."""

from typing import Any

import torch
from torch import Tensor, nn

from vq_kernels.compat.codebook import Codebook
from vq_kernels.compat.keywords import AT_CONSTRUCTION, IN_A_CALL, check_at_least, refuse_unsupported
from vq_kernels.compat.losses import LossBreakdown, commitment_loss, indices_loss
from vq_kernels.compat.shapes import PADDING, InputShape, check_targets, position_mask, projections
from vq_kernels.cosine import unit
from vq_kernels.gradient.autograd import rotation_trick as turn_gradient
from vq_kernels.gradient.autograd import straight_through
from vq_kernels.heads import HeadLayout
from vq_kernels.search.backend import BACKENDS, Backend
from vq_kernels.search.validation import check_choice


class VectorQuantize(nn.Module):
    """Replaces each vector by its nearest code; the code follows the mean of its rows. As vector_quantize_pytorch's
    `VectorQuantize` (1.32.0), whose arguments, results and state dict it has, with the exact search of this library.

    Example, with dim=256 and codebook_size=512: x [8, 1024, 256] gives quantized [8, 1024, 256], indices [8, 1024] and
    a loss [], which is 0 in eval mode. docs/guides/migrating.md lists what is the same and what differs.

    Args:
        dim: of x's vectors.
        codebook_size: K, codes in a codebook.
        codebook_dim: D, of the codes; None: `dim`. Where heads·D is not `dim`, there are a `project_in` and a
            `project_out`.
        heads: parts that each vector is cut into, each with an index of its own.
        separate_codebook_per_head: a codebook for each head, [heads, K, D]; else all share one.
        decay: λ of the moving averages, in [0, 1].
        eps: >= 0, added to each code's average number of rows.
        freeze_codebook: nothing is learned in training either; a call may say otherwise.
        kmeans_init: the codebook begins with k-means on the first batch, in eval mode as well.
        kmeans_iters: iterations of it, >= 1.
        sync_kmeans: k-means over all ranks; False is not supported, since the ranks would disagree.
        use_cosine_sim: rows and codes are unit vectors, and the code with the largest dot product is chosen.
        layernorm_after_project_in: LayerNorm behind `project_in`.
        threshold_ema_dead_code: a code whose average number of rows falls below it is put where a random row is;
            0: never.
        channel_last: x is [b, n, dim]; else [b, dim, n].
        accept_image_fmap: x is [b, dim, h, w].
        accept_3d_fmap: x is [b, dim, d, h, w].
        commitment_weight: >= 0, of MSE(x, quantized) in the loss.
        rotation_trick: the gradient is turned from code to x, see `vq_kernels.gradient.autograd`; None: if dim > 1.
        sync_codebook: sum the averages over all ranks; None or True: whenever there is a process group, also one that
            was made after this layer.
        ema_update: the codes follow the means of their rows; None: True.
        learnable_codebook: the codes are a Parameter, which gets the commitment's gradient; needs ema_update=False.
        return_zeros_for_masked_padding: padded positions give 0; else x as it is.
        backend: as for `nearest_code`.
        unsupported: the other keywords of 1.32.0; each is accepted at its default alone.

    Attributes:
        codebook: [K, D]; [heads, K, D] with `separate_codebook_per_head`. May be set, see `Codebook.set_codes`.

    Raises:
        NotImplementedError: a keyword of 1.32.0 that is not supported; says which.
        TypeError: a keyword that is not known.
        ValueError: an argument outside of its range, or two that do not go together.

    Source: van den Oord et al. 2017, arXiv:1711.00937; defaults and names: vector_quantize_pytorch 1.32.0.
    """

    def __init__(
        self,
        dim: int,
        codebook_size: int,
        codebook_dim: int | None = None,
        heads: int = 1,
        separate_codebook_per_head: bool = False,
        decay: float = 0.8,
        eps: float = 1e-5,
        freeze_codebook: bool = False,
        kmeans_init: bool = False,
        kmeans_iters: int = 10,
        sync_kmeans: bool = True,
        use_cosine_sim: bool = False,
        layernorm_after_project_in: bool = False,
        threshold_ema_dead_code: float = 0,
        channel_last: bool = True,
        accept_image_fmap: bool = False,
        accept_3d_fmap: bool = False,
        commitment_weight: float = 1.0,
        *,
        rotation_trick: bool | None = None,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        backend: Backend = "auto",
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse_unsupported({"sync_kmeans": sync_kmeans, **unsupported}, AT_CONSTRUCTION)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_at_least(
            1, dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads, kmeans_iters=kmeans_iters
        )
        check_at_least(
            0,
            decay=decay,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            commitment_weight=commitment_weight,
        )
        if decay > 1:
            raise ValueError(f"decay must be <= 1, got {decay}")
        check_choice("backend", backend, BACKENDS)
        ema = ema_update is None or ema_update
        if learnable_codebook and ema:
            raise ValueError("learnable_codebook=True needs ema_update=False, or two rules would move the codes")
        if learnable_codebook and use_cosine_sim:
            raise ValueError("learnable_codebook=True needs use_cosine_sim=False, or codes would leave the unit sphere")
        if accept_image_fmap and accept_3d_fmap:
            raise ValueError("accept_image_fmap and accept_3d_fmap must not both be True")

        self.dim = dim
        self.codebook_size = codebook_size
        self.heads = heads
        self.separate_codebook_per_head = separate_codebook_per_head
        self.eps = eps
        self.channel_last = channel_last
        self.accept_image_fmap = accept_image_fmap
        self.accept_3d_fmap = accept_3d_fmap
        self.freeze_codebook = freeze_codebook
        self.use_cosine_sim = use_cosine_sim
        self.learnable_codebook = bool(learnable_codebook)
        self.commitment_weight = commitment_weight
        self.rotation_trick = dim > 1 if rotation_trick is None else rotation_trick
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding

        inner_dim = heads * codebook_dim
        self.has_projections = inner_dim != dim
        self.project_in, self.project_out = projections(dim, inner_dim, layernorm_after_project_in)
        self._shape = InputShape(dim, channel_last, accept_image_fmap, accept_3d_fmap)
        self._layout = HeadLayout(heads, separate_codebook_per_head)
        self._codebook = Codebook(
            self._layout.num_codebooks,
            codebook_size,
            codebook_dim,
            decay=decay,
            eps=eps,
            kmeans_iters=kmeans_iters if kmeans_init else 0,
            cosine=use_cosine_sim,
            dead_below=threshold_ema_dead_code,
            learnable=self.learnable_codebook,
            ema=ema,
            synchronise=sync_codebook is None or sync_codebook,
            backend=backend,
        )

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        *,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        **unsupported: Any,
    ) -> tuple[Any, ...]:
        """Quantize x; in training mode, let the codebook learn from it afterwards.

        Where gradient checkpointing runs it twice for a batch, the second pass repeats the first and learns nothing, be
        it compiled or not; the backward of a batch must then come before the next batch.

        Args:
            x: [b, n, dim], [b, dim], or channel first as the layer was made: [b, dim, n], [b, dim, h, w],
                [b, dim, d, h, w]. Its leading shape, x's without dim, is called [...] here.
            indices: targets for the cross-entropy, shaped like the indices that are returned; -1 does not count.
            mask: [...] bool, False for padding. Padding may hold anything: nothing is learned from it.
            lens: [b], in place of a mask for [b, n]: how many positions of each row are no padding.
            freeze_codebook: None: as the layer was made.
            return_loss_breakdown: return the parts of the loss as well.
            unsupported: the other keywords of 1.32.0; each is accepted at its default alone.

        Returns:
            quantized, shaped like x, in x's dtype; indices [...] int64, or [..., heads]; loss []; with
            `return_loss_breakdown`, a LossBreakdown. Padding has quantized 0 and index -1. With `indices`: quantized
            and the cross-entropy [], the mean over all targets that count of -log p, where the codes' probabilities p
            are softmax(-distance), or softmax(similarity).

        Raises:
            NotImplementedError, TypeError: as the constructor.
            TypeError, ValueError: a tensor whose dtype or shape does not fit.
        """
        refuse_unsupported(unsupported, IN_A_CALL)
        channel_dim = self._shape.channel_dim(x)
        positions = x.movedim(channel_dim, -1)  # [..., dim]
        leading = positions.shape[:-1]
        mask = position_mask(mask, lens, leading)
        row_mask = None if mask is None else self._layout.split_mask(mask)  # [M]
        if indices is not None:
            check_targets(indices, leading, self.heads)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        learns = self.training and not frozen

        rows = self._rows(positions, mask)  # [C, M, D]
        searched = rows.detach()
        self._codebook.begin(searched, row_mask)
        codebooks = self._codebook.codes_to_search(learns)  # [C, K, D]
        chosen = self._codebook(searched, codebooks)
        if indices is None:
            codes = chosen.codes if self.learnable_codebook and learns else chosen.codes.detach()
            loss, commitment = self._loss(rows, codes, row_mask)
        else:
            targets = self._layout.split_indices(indices)
            loss = indices_loss(rows, codebooks.clone(), targets, row_mask, cosine=self.use_cosine_sim)
        if learns:
            self._codebook.learn(searched, chosen, row_mask)

        codes = chosen.codes
        if self.training and x.requires_grad:
            codes = (turn_gradient if self.rotation_trick else straight_through)(rows, codes)
        quantized = self.project_out(self._layout.join(codes.to(x.dtype), leading))
        joined = self._layout.join_indices(chosen.indices, leading)
        if mask is not None:
            padding = torch.zeros_like(positions) if self.return_zeros_for_masked_padding else positions
            quantized = torch.where(mask[..., None], quantized, padding.to(quantized.dtype))
            joined = joined.masked_fill(~(mask if self.heads == 1 else mask[..., None]), PADDING)
        quantized = quantized.movedim(-1, channel_dim)
        if indices is not None:
            return quantized, loss
        if return_loss_breakdown:
            nothing = torch.zeros_like(commitment)
            return quantized, joined, loss, LossBreakdown(commitment, nothing, nothing, nothing)
        return quantized, joined, loss

    def _loss(self, rows: Tensor, codes: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The loss and its part for commitment, [] each, of rows and their codes [C, M, D]."""
        nothing = torch.zeros((), device=rows.device)
        if not self.training:
            return nothing, nothing
        is_leaf = not torch.compiler.is_compiling()  # a captured graph cannot make one
        loss = torch.zeros_like(nothing, requires_grad=is_leaf)  # has a backward, whatever the rows have
        if not self.commitment_weight:
            return loss, nothing
        commitment = commitment_loss(rows, codes, row_mask)
        return loss + self.commitment_weight * commitment, commitment

    def _rows(self, positions: Tensor, mask: Tensor | None) -> Tensor:
        """positions [..., dim] as rows [C, M, D], as the codebook searches them; padding is 0 before the projection."""
        if mask is not None:
            positions = positions.masked_fill(~mask[..., None], 0)
        return self._as_searched(self._layout.split(self.project_in(positions)))

    def _as_searched(self, rows: Tensor) -> Tensor:
        """rows [C, M, D] in float32 at least, and then, for the cosine, of length 1."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return unit(rows) if self.use_cosine_sim else rows

    @property
    def codebook(self) -> Tensor:
        """[K, D]; [heads, K, D] with `separate_codebook_per_head`."""
        codes = self._codebook.embed
        return codes if self.separate_codebook_per_head else codes[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        if codes.shape != self.codebook.shape:
            raise ValueError(f"codebook must be {tuple(self.codebook.shape)}, got {tuple(codes.shape)}")
        self._codebook.set_codes(codes if self.separate_codebook_per_head else codes[None])

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow the means of their rows."""
        return self._codebook.ema

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """The codes of indices [...] int64, or [..., heads], side by side: heads·D channels where x has dim.

        A code of -1 is 0.
        """
        return self._shape.restore(self._decode(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """What the forward pass in eval mode gave as `quantized` with these indices; 0 for padding."""
        output = self.project_out(self._decode(indices))  # [..., dim]
        padding = indices == PADDING if self.heads == 1 else (indices == PADDING).all(dim=-1)
        return self._shape.restore(output.masked_fill(padding[..., None], 0))

    def _decode(self, indices: Tensor) -> Tensor:
        """[..., heads·D]: the codes of indices [...], or [..., heads]."""
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(f"indices must be [..., {self.heads}], one for each head, got {tuple(indices.shape)}")
        leading = indices.shape if self.heads == 1 else indices.shape[:-1]
        rows = self._layout.split_indices(indices)  # [C, M]
        padding = rows == PADDING
        each = zip(self._codebook.embed, rows.masked_fill(padding, 0), strict=True)
        codes = torch.stack([codes.index_select(0, chosen) for codes, chosen in each])
        return self._layout.join(codes.masked_fill(padding[..., None], 0), leading)

    def expire_codes_(self, x: Tensor) -> None:
        """In training mode, put dead codes at random rows of x [..., heads·D], which is past `project_in`."""
        if not self.training or not self._codebook.dead_below:
            return
        rows = self._as_searched(self._layout.split(x.detach()))
        for head in range(self._layout.num_codebooks):
            self._codebook.replace_dead_codes(head, rows[head], rows[head].isfinite().all(dim=1))
