"""`VectorQuantize`, a drop-in replacement for that of vector_quantize_pytorch."""

from typing import Any

import torch
from torch import Tensor, nn

from vq_kernels.compat.arguments import check_targets, check_topk, register_in_sequential
from vq_kernels.compat.codebook import CompatCodebook, EmaUpdate, Weight
from vq_kernels.compat.keywords import AT_CONSTRUCTION, IN_A_CALL, WITHOUT_EFFECT, refuse_unsupported
from vq_kernels.compat.losses import LossBreakdown, commitment_loss, cross_entropy, directional_noise, orthogonal_loss
from vq_kernels.compat.positions import PositionwiseLayer, position_mask
from vq_kernels.gradient.autograd import LEFT_OUT, straight_through
from vq_kernels.gradient.autograd import rotation_trick as rotate_gradient
from vq_kernels.modules.base import HeadLayout
from vq_kernels.search.backend import BACKENDS, Backend
from vq_kernels.search.validation import check_at_least, check_choice, check_not_traced


class VectorQuantize(PositionwiseLayer):
    """Replaces each vector by its nearest code. Each code follows the mean of its rows.

    It has the arguments, results and state dict of vector_quantize_pytorch's `VectorQuantize` (1.32.0), with the exact
    search of this library. docs/guides/migrating.md lists what is the same, what differs and what is not supported.

    Example, with dim=256 and codebook_size=512: x [8, 1024, 256] gives quantized [8, 1024, 256], indices [8, 1024] and
    a loss [], which is 0 in eval mode.

    Args:
        dim: the number of channels of x.
        codebook_size: K, the number of codes of a codebook.
        codebook_dim: D, the dimension of the codes; `dim` if None. If heads·D differs from `dim`, the layer has the
            projections `project_in` and `project_out`.
        heads: parts that each vector is split into, each with its own index.
        separate_codebook_per_head: whether each head has its own codebook, [heads, K, D], or all heads share one.
        decay: λ of the moving averages, in [0, 1].
        eps: at least 0, smoothing of each code's average number of rows.
        freeze_codebook: whether the codebook stays unchanged in training mode too, unless a call overrides this. Only
            k-means still runs on the first batch, as in the original. `requires_grad_(False)` has the same effect.
        kmeans_init: initialise the codebook by k-means on the first batch, in eval mode as well.
        kmeans_iters: the iterations of k-means, >= 1.
        sync_kmeans: k-means over all ranks. False needs one process, because the ranks would get different codebooks.
        use_cosine_sim: normalise rows and codes, and choose the code with the largest dot product.
        layernorm_after_project_in: apply LayerNorm after `project_in`.
        threshold_ema_dead_code: codes whose average number of rows is lower are reset to random rows; 0: never.
        channel_last: x is [b, n, dim] if True, otherwise [b, dim, n].
        accept_image_fmap: x is [b, dim, h, w].
        accept_3d_fmap: x is [b, dim, d, h, w].
        commitment_weight: at least 0, the weight of MSE(x, quantized) in the loss.
        orthogonal_reg_weight: at least 0, the weight of the mean squared cosine between codes in the loss. More than 0
            makes the codes a Parameter.
        orthogonal_reg_active_codes_only: only the codes that the batch chose count.
        orthogonal_reg_max_codes: only so many random codes count; None: all.
        rotation_trick: rotate the gradient from the code to x, see `vq_kernels.gradient.autograd.rotation_trick`;
            None means if dim > 1, without directional_reparam.
        directional_reparam: in training, return x moved towards its code in a noisy direction, which gives x and the
            code a gradient (DiVeQ, Vali et al. 2025, arXiv:2509.26469). There is no commitment loss.
        directional_reparam_variance: at least 0, of the noise.
        sync_codebook: sum the averages over all ranks; None and True do so if there is a process group in the forward
            pass.
        ema_update: whether the codes follow the means of their rows; None means True, without directional_reparam and
            vq_bridge.
        vq_bridge: a module that makes the codes [C, K, D] to search from the stored ones. Needs a learnable codebook.
        manual_ema_update: whether the codes move only when `_codebook.update_ema()` is called.
        learnable_codebook: whether the codes are a Parameter that gets the gradient of the commitment loss. Requires
            ema_update=False. None means with directional_reparam or vq_bridge.
        return_zeros_for_masked_padding: whether padded positions are returned as 0 or as in x.
        route_gradients_to_input: whether x gets the gradient of `quantized`.
        backend: as for `nearest_code`.
        unsupported: the other keywords of 1.32.0, accepted only at values that change nothing.

    Attributes:
        codebook: [K, D]; [heads, K, D] with `separate_codebook_per_head`. It can be set, which sets the averages too.

    Raises:
        NotImplementedError: a keyword of 1.32.0 is not supported.
        TypeError: a keyword is not known.
        ValueError: an argument is out of range, or two arguments conflict.

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
        orthogonal_reg_weight: float = 0.0,
        orthogonal_reg_active_codes_only: bool = False,
        orthogonal_reg_max_codes: int | None = None,
        rotation_trick: bool | None = None,
        directional_reparam: bool = False,
        directional_reparam_variance: float = 5e-3,
        sync_codebook: bool | None = None,
        ema_update: bool | None = None,
        vq_bridge: nn.Module | None = None,
        manual_ema_update: bool = False,
        learnable_codebook: bool | None = None,
        return_zeros_for_masked_padding: bool = True,
        route_gradients_to_input: bool = True,
        backend: Backend = "auto",
        **unsupported: Any,
    ) -> None:
        super().__init__()
        refuse_unsupported(unsupported, AT_CONSTRUCTION, WITHOUT_EFFECT)
        codebook_dim = dim if codebook_dim is None else codebook_dim
        check_at_least(
            1, dim=dim, codebook_size=codebook_size, codebook_dim=codebook_dim, heads=heads, kmeans_iters=kmeans_iters
        )
        check_at_least(1, others=(None,), orthogonal_reg_max_codes=orthogonal_reg_max_codes)
        check_at_least(0, 1, decay=decay)
        check_at_least(
            0,
            eps=eps,
            threshold_ema_dead_code=threshold_ema_dead_code,
            commitment_weight=commitment_weight,
            orthogonal_reg_weight=orthogonal_reg_weight,
            directional_reparam_variance=directional_reparam_variance,
        )
        check_choice("backend", backend, BACKENDS)
        by_gradient = directional_reparam or vq_bridge is not None
        ema = not by_gradient if ema_update is None else ema_update
        learnable = by_gradient if learnable_codebook is None else learnable_codebook
        rotates = dim > 1 and not directional_reparam if rotation_trick is None else rotation_trick
        if learnable and ema:
            raise ValueError("learnable_codebook=True needs ema_update=False, or two rules would move the codes")
        if learnable and use_cosine_sim:
            raise ValueError("learnable_codebook=True needs use_cosine_sim=False, or codes would leave the unit sphere")
        if vq_bridge is not None and not learnable:
            raise ValueError("vq_bridge needs learnable_codebook=True, because the bridge moves with the codes")
        if directional_reparam and rotates:
            raise ValueError("rotation_trick and directional_reparam must not both be True")
        if directional_reparam and threshold_ema_dead_code == 0:
            raise ValueError("directional_reparam=True needs threshold_ema_dead_code > 0, got 0")
        if orthogonal_reg_weight and orthogonal_reg_active_codes_only and separate_codebook_per_head and heads > 1:
            raise ValueError("orthogonal_reg_active_codes_only=True needs one codebook, got separate_codebook_per_head")
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
        self.learnable_codebook = learnable
        self.commitment_weight = commitment_weight
        self.orthogonal_reg_weight = orthogonal_reg_weight
        self.orthogonal_reg_active_codes_only = orthogonal_reg_active_codes_only
        self.orthogonal_reg_max_codes = orthogonal_reg_max_codes
        self.rotation_trick = rotates
        self.directional_reparam = directional_reparam
        self.directional_reparam_variance = directional_reparam_variance
        self.return_zeros_for_masked_padding = return_zeros_for_masked_padding
        self.route_gradients_to_input = route_gradients_to_input

        self._add_projections(heads * codebook_dim, layernorm_after_project_in)
        self._layout = HeadLayout(heads, separate_codebook_per_head)
        self._codebook = CompatCodebook(
            (self._layout.num_codebooks,),
            codebook_size,
            codebook_dim,
            init="kmeans" if kmeans_init else "kaiming_uniform",
            kmeans_iters=kmeans_iters,
            min_cluster_size=threshold_ema_dead_code,
            metric="cosine" if use_cosine_sim else "euclidean",
            learnable=learnable or orthogonal_reg_weight > 0,
            follows_means=ema,
            manual_ema_update=manual_ema_update,
            vq_bridge=vq_bridge,
            sync_kmeans=sync_kmeans,
            ema_decay=decay,
            ema_eps=eps,
            synchronise=sync_codebook is None or sync_codebook,
            backend=backend,
        )
        register_in_sequential(type(self))

    @property
    def has_commitment_loss(self) -> bool:
        """Whether the loss contains the distance to the code."""
        return self.commitment_weight > 0 and not self.directional_reparam

    @property
    def has_codebook_orthogonal_loss(self) -> bool:
        """Whether the loss contains the cosines between codes."""
        return self.orthogonal_reg_weight > 0

    def forward(
        self,
        x: Tensor,
        indices: Tensor | None = None,
        mask: Tensor | None = None,
        lens: Tensor | None = None,
        topk: int | None = None,
        sample_codebook_temp: float | None = None,
        freeze_codebook: bool | None = None,
        return_loss_breakdown: bool = False,
        *,
        ema_update_weight: Weight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
        **unsupported: Any,
    ) -> tuple[Any, ...]:
        """Quantizes x. In training mode, the codebook learns from it.

        Under activation checkpointing, compiled or not, the recomputed pass repeats the original one and learns
        nothing. The backward pass of a batch must then run before the forward pass of the next batch.

        Args:
            x: [b, n, dim] or [b, dim]; or with the channels second, if the layer was constructed so: [b, dim, n],
                [b, dim, h, w], [b, dim, d, h, w]. [...] is its shape without dim.
            indices: targets of a cross-entropy, with the shape of the returned indices; -1 does not count.
            mask: [...] bool, False for padding, which may hold anything.
            lens: [b], instead of a mask for [b, n]: the number of positions of each row before the padding.
            topk: return the so many nearest codes, or all if there are fewer, nearest first; for one head. The codebook
                learns nothing.
            sample_codebook_temp: has no effect, because codes are not sampled.
            freeze_codebook: as in the constructor, whose value is used if None.
            return_loss_breakdown: also return the parts of the loss.
            ema_update_weight: [codebook_size] or [heads, codebook_size], multiplies how far the averages of each code
                move; or a function of the sums [heads, codebook_size, D] and counts [heads, codebook_size] of the
                batch that returns it.
            accum_ema_update: keep the sums of this batch for the next call without it, and learn nothing now.
            ema_update: as in the constructor, whose value is used if None.
            unsupported: the other keywords of 1.32.0, accepted only at values that change nothing.

        Returns:
            quantized, with x's shape and dtype; indices [...] int64, or [..., heads]; loss []; with
            `return_loss_breakdown`, a LossBreakdown. Padding has quantized 0 and index -1. With `indices`: quantized,
            and the cross-entropy [], the mean of -log p over the targets that count, where the probabilities p of the
            codes are softmax(-distance), or softmax(similarity). With `topk`: quantized [..., k, dim], or with the
            channels second [b, dim, ..., k]; indices [..., k]; loss [..., k], in eval mode too, 0 for padding.

        Raises:
            NotImplementedError, TypeError: as the constructor.
            TypeError, ValueError: a tensor's dtype or shape, or topk, does not fit.
        """
        refuse_unsupported(unsupported, IN_A_CALL)
        if self.training:
            check_not_traced()
        channel_dim = self._channel_dim(x)
        positions = x.movedim(channel_dim, -1)  # [..., dim]
        leading = positions.shape[:-1]
        mask = position_mask(mask, lens, leading)
        row_mask = None if mask is None else self._layout.split_mask(mask)  # [M]
        if indices is not None:
            check_targets(indices, leading, self.heads)
        if topk is not None:
            check_topk(topk, self.heads, indices)
            topk = min(topk, self.codebook_size)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        frozen = frozen or self._codebook.freeze_codebook  # by requires_grad_(False)
        learns = self.training and not frozen

        rows = self._rows(positions, mask)
        update = EmaUpdate(ema_update, ema_update_weight, accum_ema_update)
        codes, chosen, codebooks = self._codebook(rows.detach(), row_mask, learns, update, topk)
        codebooks = codebooks.detach() if frozen else codebooks
        if topk is not None:  # every row k times, as if x had one more dimension
            leading = torch.Size((*leading, topk))
            rows, codes = rows[:, :, None].expand_as(codes).flatten(1, 2), codes.flatten(1, 2)
            chosen, positions = chosen.flatten(1, 2), positions[..., None, :].expand(*leading, -1)
            if mask is not None:
                mask = mask[..., None].expand(leading)
                row_mask = self._layout.split_mask(mask)
        if indices is None:
            has_gradient = (self.learnable_codebook and learns) or not self.training  # of topk, in eval mode
            target = codes if has_gradient else codes.detach()
            loss, breakdown = self._loss(rows, target, chosen, row_mask, leading if topk is not None else None)
        else:
            targets = self._layout.split_indices(indices)
            loss = cross_entropy(rows, codebooks.clone(), targets, row_mask, cosine=self.use_cosine_sim)

        if self.training and x.requires_grad and self.route_gradients_to_input:
            if self.directional_reparam:
                codes = directional_noise(rows, codes, self.directional_reparam_variance)
            else:
                codes = (rotate_gradient if self.rotation_trick else straight_through)(rows, codes)
        quantized = self.project_out(self._layout.join(codes.to(x.dtype), leading))
        joined = self._layout.join_indices(chosen, leading)
        quantized = self._with_padding(quantized, positions, mask)
        if mask is not None:
            joined = joined.masked_fill(~(mask if self.heads == 1 else mask[..., None]), LEFT_OUT)
        quantized = quantized.movedim(-1, channel_dim)
        if indices is not None:
            return quantized, loss
        return (quantized, joined, loss, breakdown) if return_loss_breakdown else (quantized, joined, loss)

    def _loss(
        self, rows: Tensor, codes: Tensor, chosen: Tensor, row_mask: Tensor | None, per_row: torch.Size | None
    ) -> tuple[Tensor, LossBreakdown]:
        """Returns the loss and its parts, of rows and their codes [C, M, D] at indices [C, M].

        They are [], or of the shape per_row, with the loss of each row in one codebook.
        """
        zero = torch.zeros((), device=rows.device)
        commitment = orthogonal = zero
        if self.has_commitment_loss if self.training else per_row is not None:
            commitment = commitment_loss(rows, codes, row_mask, per_row)
        loss = commitment * (self.commitment_weight if self.has_commitment_loss else 1)
        if self.training:
            is_leaf = not torch.compiler.is_compiling()  # a captured graph cannot create a leaf
            loss = loss + torch.zeros_like(zero, requires_grad=is_leaf)  # so that backward() works without a gradient
            if self.has_codebook_orthogonal_loss:
                active = None
                if self.orthogonal_reg_active_codes_only:
                    active = chosen if row_mask is None else chosen[:, row_mask]
                orthogonal = orthogonal_loss(self._codebook._codes, active, self.orthogonal_reg_max_codes)
                loss = loss + self.orthogonal_reg_weight * orthogonal
        return loss, LossBreakdown(commitment, zero, orthogonal, zero)

    def _rows(self, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Returns positions [..., dim] as rows [C, M, D], at least float32. Padding is 0 before the projection."""
        return self._codebook.as_rows(self._layout.split(self._projected(positions, mask)))

    @property
    def codebook(self) -> Tensor:
        """[K, D]; [heads, K, D] with `separate_codebook_per_head`."""
        codes = self._codebook.embed
        return codes if self.separate_codebook_per_head else codes[0]

    @codebook.setter
    def codebook(self, codes: Tensor) -> None:
        self._codebook._set_all(codes, "codebook", self.codebook.shape)

    def set_codes(self, codes: Tensor) -> None:
        """Sets the codes, of the shape of `codebook`, and their averages, and ends the wait for k-means.

        Each average becomes that of one row, or of 10 times `threshold_ema_dead_code` rows if these are more.

        Raises:
            TypeError, ValueError: codes do not fit.
        """
        self._codebook._set_all(codes, "codes", self.codebook.shape)

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow the means of their rows."""
        return self._codebook.follows_means

    def get_codes_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the codes of indices [...] or [..., heads], int64: heads·D channels where x has dim; 0 for -1."""
        return self._restore(self._decode(indices))

    def get_output_from_indices(self, indices: Tensor) -> Tensor:
        """Returns the `quantized` that the forward pass in eval mode returned with these indices; 0 for padding."""
        output = self.project_out(self._decode(indices))  # [..., dim]
        padding = indices == LEFT_OUT if self.heads == 1 else (indices == LEFT_OUT).all(dim=-1)
        return self._restore(output.masked_fill(padding[..., None], 0))

    def _decode(self, indices: Tensor) -> Tensor:
        """Returns the codes [..., heads·D] of indices [...], or [..., heads]."""
        return self._layout.codes_at(self._codebook.codes_to_decode, indices)

    def expire_codes_(self, x: Tensor) -> None:
        """Resets dead codes to random rows of x [..., heads·D], an output of `project_in`. Only in training mode."""
        if not (self.freeze_codebook or self._codebook.freeze_codebook):
            self._codebook.expire_codes_(self._layout.split(x))

    @torch.no_grad()
    def update_indices(self, x: Tensor, indices: Tensor, mask: Tensor | None = None) -> None:
        """Learns from x as a training step that chose `indices`, as `forward` returns them; -1 does not count.

        Raises:
            TypeError, ValueError: a tensor's dtype or shape does not fit.
        """
        positions = x.movedim(self._channel_dim(x), -1)
        check_targets(indices, positions.shape[:-1], self.heads)
        mask = position_mask(mask, None, positions.shape[:-1])
        rows, row_mask = self._rows(positions, mask), None if mask is None else self._layout.split_mask(mask)
        self._codebook.update_indices(rows[:, None], self._layout.split_indices(indices), row_mask)

    update_ema_indices = update_indices

    def update_in_place_optimizer(self) -> None:
        """Does nothing, because there is no `in_place_codebook_optimizer`."""
