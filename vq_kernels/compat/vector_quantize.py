"""`VectorQuantize`, a drop-in replacement for that of vector_quantize_pytorch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import _register_namedtuple

from vq_kernels.compat.codebook import CompatCodebook
from vq_kernels.compat.keywords import AT_CONSTRUCTION, IN_A_CALL, refuse_unsupported
from vq_kernels.cosine import unit
from vq_kernels.cross_entropy import code_cross_entropy
from vq_kernels.gradient.autograd import LEFT_OUT, straight_through
from vq_kernels.gradient.autograd import rotation_trick as rotate_gradient
from vq_kernels.modules.base import HeadLayout, check_mask, codes_at
from vq_kernels.modules.codebook import check_at_least
from vq_kernels.search.backend import BACKENDS, Backend
from vq_kernels.search.validation import check_choice, check_dtype, check_not_traced


class LossBreakdown(NamedTuple):
    """The parts of the loss, [] each, before they are weighted. All but the first are 0."""

    commitment: Tensor
    codebook_diversity: Tensor
    orthogonal_reg: Tensor
    inplace_optimize: Tensor


_register_namedtuple(LossBreakdown, serialized_type_name="vq_kernels.LossBreakdown")  # for torch.export.save


class VectorQuantize(nn.Module):
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
        separate_codebook_per_head: if True, each head has its own codebook, [heads, K, D]; otherwise all heads share
            one.
        decay: λ of the moving averages, in [0, 1].
        eps: at least 0, smoothing of each code's average number of rows.
        freeze_codebook: whether the codebook stays unchanged in training mode too, unless a call overrides this. Only
            k-means still runs on the first batch, as in the original. `requires_grad_(False)` of a learnable codebook
            has the same effect.
        kmeans_init: initialise the codebook by k-means on the first batch, in eval mode as well.
        kmeans_iters: the iterations of k-means, >= 1.
        sync_kmeans: k-means over all ranks. False is not supported, because the ranks would get different codebooks.
        use_cosine_sim: normalise rows and codes, and choose the code with the largest dot product.
        layernorm_after_project_in: apply LayerNorm after `project_in`.
        threshold_ema_dead_code: reset codes whose average number of rows falls below it to random rows; 0 disables
            this.
        channel_last: x is [b, n, dim] if True, otherwise [b, dim, n].
        accept_image_fmap: x is [b, dim, h, w].
        accept_3d_fmap: x is [b, dim, d, h, w].
        commitment_weight: at least 0, the weight of MSE(x, quantized) in the loss.
        rotation_trick: rotate the gradient from the code to x, see `vq_kernels.gradient.autograd.rotation_trick`;
            None means if dim > 1.
        sync_codebook: sum the averages over all ranks; None and True do so if there is a process group in the forward
            pass.
        ema_update: whether the codes follow the means of their rows; None means True.
        learnable_codebook: whether the codes are a Parameter that gets the gradient of the commitment loss. Requires
            ema_update=False.
        return_zeros_for_masked_padding: whether padded positions are returned as 0 or as in x.
        backend: as for `nearest_code`.
        unsupported: the other keywords of 1.32.0, accepted only at their defaults.

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
        self.project_in, self.project_out = _projections(dim, inner_dim, layernorm_after_project_in)
        self._channels_second = accept_image_fmap or accept_3d_fmap or not channel_last
        self._layout = HeadLayout(heads, separate_codebook_per_head)
        self._codebook = CompatCodebook(
            (self._layout.num_codebooks,),
            codebook_size,
            codebook_dim,
            init="kmeans" if kmeans_init else "kaiming_uniform",
            kmeans_iters=kmeans_iters,
            min_cluster_size=threshold_ema_dead_code,
            metric="cosine" if use_cosine_sim else "euclidean",
            learnable=self.learnable_codebook,
            follows_means=ema,
            ema_decay=decay,
            ema_eps=eps,
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
        """Quantizes x. In training mode, the codebook learns from it.

        Under activation checkpointing, compiled or not, the recomputed pass repeats the original one and learns
        nothing. The backward pass of a batch must then run before the forward pass of the next batch.

        Args:
            x: [b, n, dim] or [b, dim]; or with the channels second, if the layer was constructed so: [b, dim, n],
                [b, dim, h, w], [b, dim, d, h, w]. [...] is its shape without dim.
            indices: targets of a cross-entropy, with the shape of the returned indices; -1 does not count.
            mask: [...] bool, False for padding, which may hold anything.
            lens: [b], instead of a mask for [b, n]: the number of positions of each row before the padding.
            freeze_codebook: as in the constructor, whose value is used if None.
            return_loss_breakdown: also return the parts of the loss.
            unsupported: the other keywords of 1.32.0, accepted only at their defaults.

        Returns:
            quantized, with x's shape and dtype; indices [...] int64, or [..., heads]; loss []; with
            `return_loss_breakdown`, a LossBreakdown. Padding has quantized 0 and index -1. With `indices`: quantized,
            and the cross-entropy [], the mean of -log p over the targets that count, where the probabilities p of the
            codes are softmax(-distance), or softmax(similarity).

        Raises:
            NotImplementedError, TypeError: as the constructor.
            TypeError, ValueError: a tensor's dtype or shape does not fit.
        """
        refuse_unsupported(unsupported, IN_A_CALL)
        if self.training:
            check_not_traced()
        channel_dim = self._channel_dim(x)
        positions = x.movedim(channel_dim, -1)  # [..., dim]
        leading = positions.shape[:-1]
        mask = _position_mask(mask, lens, leading)
        row_mask = None if mask is None else self._layout.split_mask(mask)  # [M]
        if indices is not None:
            _check_targets(indices, leading, self.heads)
        frozen = self.freeze_codebook if freeze_codebook is None else freeze_codebook
        frozen = frozen or self._codebook.freeze_codebook  # by requires_grad_(False)
        learns = self.training and not frozen

        rows = self._rows(positions, mask)  # [C, M, D]
        codes, chosen, codebooks = self._codebook(rows.detach(), row_mask, learns)
        codebooks = codebooks.detach() if frozen else codebooks
        if indices is None:
            target = codes if self.learnable_codebook and learns else codes.detach()
            loss, commitment = self._loss(rows, target, row_mask)
        else:
            targets = self._layout.split_indices(indices)
            loss = _cross_entropy(rows, codebooks.clone(), targets, row_mask, cosine=self.use_cosine_sim)

        if self.training and x.requires_grad:
            codes = (rotate_gradient if self.rotation_trick else straight_through)(rows, codes)
        quantized = self.project_out(self._layout.join(codes.to(x.dtype), leading))
        joined = self._layout.join_indices(chosen, leading)
        if mask is not None:
            padding = torch.zeros_like(positions) if self.return_zeros_for_masked_padding else positions
            quantized = torch.where(mask[..., None], quantized, padding.to(quantized.dtype))
            joined = joined.masked_fill(~(mask if self.heads == 1 else mask[..., None]), LEFT_OUT)
        quantized = self._restore(quantized)
        if indices is not None:
            return quantized, loss
        if return_loss_breakdown:
            zero = torch.zeros_like(commitment)
            return quantized, joined, loss, LossBreakdown(commitment, zero, zero, zero)
        return quantized, joined, loss

    def _loss(self, rows: Tensor, codes: Tensor, row_mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """Returns the loss and its commitment part, [] each, of rows and their codes [C, M, D]."""
        zero = torch.zeros((), device=rows.device)
        if not self.training:
            return zero, zero
        is_leaf = not torch.compiler.is_compiling()  # a captured graph cannot create a leaf
        loss = torch.zeros_like(zero, requires_grad=is_leaf)  # can be backpropagated even if the rows cannot
        if not self.commitment_weight:
            return loss, zero
        commitment = _commitment_loss(rows, codes, row_mask)
        return loss + self.commitment_weight * commitment, commitment

    def _channel_dim(self, x: Tensor) -> int:
        """Checks x and returns where its channels are, 1 or -1."""
        check_dtype("x", x)
        sizes, num_dims = "[b, n, {0}] or [b, {0}]", [2, 3]
        if self.accept_image_fmap:
            sizes, num_dims = "[b, {0}, h, w]", [4]
        elif self.accept_3d_fmap:
            sizes, num_dims = "[b, {0}, d, h, w]", [5]
        elif not self.channel_last:
            sizes = "[b, {0}, n] or [b, {0}]"
        channel_dim = 1 if self._channels_second and x.dim() > 2 else -1
        if x.dim() not in num_dims or x.shape[channel_dim] != self.dim:
            raise ValueError(f"x must be {sizes.format(self.dim)}, got {tuple(x.shape)}")
        return channel_dim

    def _restore(self, x: Tensor) -> Tensor:
        """Moves the channels of x [..., dim] to where the layer takes them."""
        return x.movedim(-1, 1) if self._channels_second and x.dim() > 2 else x

    def _rows(self, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Returns positions [..., dim] as rows [C, M, D]. Padding is 0 before the projection."""
        if mask is not None:
            positions = positions.masked_fill(~mask[..., None], 0)
        return self._as_searched(self._layout.split(self.project_in(positions)))

    def _as_searched(self, rows: Tensor) -> Tensor:
        """Converts rows [C, M, D] to at least float32, and normalises them for the cosine."""
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return unit(rows) if self.use_cosine_sim else rows

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
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(f"indices must be [..., {self.heads}], one for each head, got {tuple(indices.shape)}")
        leading = indices.shape if self.heads == 1 else indices.shape[:-1]
        each = zip(self._codebook._codes, self._layout.split_indices(indices), strict=True)
        return self._layout.join(torch.stack([codes_at(*head) for head in each]), leading)

    def expire_codes_(self, x: Tensor) -> None:
        """Resets dead codes to random rows of x [..., heads·D], an output of `project_in`. Only in training mode."""
        if self.training and self._codebook.min_cluster_size and not self.freeze_codebook:
            self._codebook.expire(self._as_searched(self._layout.split(x.detach())))


def _position_mask(mask: Tensor | None, lens: Tensor | None, leading: torch.Size) -> Tensor | None:
    """Returns the mask [*leading] bool of a call, or None; `leading` is the shape of x without channels.

    Raises:
        TypeError, ValueError: mask or lens does not fit, or both are given.
    """
    if lens is not None:
        if mask is not None:
            raise ValueError("mask and lens must not both be given")
        if len(leading) != 2 or lens.shape != leading[:1]:
            raise ValueError(f"lens must be [b] for sequences [b, n], got {tuple(lens.shape)} for {tuple(leading)}")
        return torch.arange(leading[1], device=lens.device) < lens[:, None]
    if mask is not None:
        check_mask(mask, leading)
    return mask


def _check_targets(targets: Tensor, leading: torch.Size, heads: int) -> None:
    """Raises TypeError or ValueError unless `targets` is int64 and [*leading], or [*leading, heads].

    Leading dimensions may be flattened to [b, n], as vector_quantize_pytorch requires for images.
    """
    if targets.dtype != torch.int64:
        raise TypeError(f"indices must be int64, got {targets.dtype}")
    ends = (heads,) if heads > 1 else ()
    if targets.shape not in ((*leading, *ends), (leading[0], leading[1:].numel(), *ends)):
        raise ValueError(f"indices must be {(*leading, *ends)} to match x, got {tuple(targets.shape)}")


def _projections(dim: int, inner_dim: int, layernorm: bool) -> tuple[nn.Module, nn.Module]:
    """Returns the projections from `dim` channels to `inner_dim` and back; identities if they are equal."""
    if inner_dim == dim:
        return nn.Identity(), nn.Identity()
    project_in: nn.Module = nn.Linear(dim, inner_dim)
    if layernorm:
        project_in = nn.Sequential(project_in, nn.LayerNorm(inner_dim))
    return project_in, nn.Linear(inner_dim, dim)


def _commitment_loss(rows: Tensor, codes: Tensor, row_mask: Tensor | None) -> Tensor:
    """Returns the mean of (row - code)², [], over rows [C, M, D] that row_mask [M] does not exclude; 0 for none."""
    sq_distances = F.mse_loss(rows, codes, reduction="none").sum(dim=-1)  # [C, M]
    if row_mask is None:
        return (sq_distances / max(rows.numel(), 1)).sum()  # divided first, so that the sum is finite
    num_numbers = row_mask.sum() * rows.shape[0] * rows.shape[2]
    return (torch.where(row_mask, sq_distances, 0) / num_numbers.clamp(min=1)).sum()


def _cross_entropy(
    rows: Tensor, codebooks: Tensor, targets: Tensor, row_mask: Tensor | None, *, cosine: bool
) -> Tensor:
    """Returns the mean cross-entropy, [], of targets [C, M] for rows [C, M, D] in codebooks [C, K, D]; 0 for none.

    A target counts unless it is -1 or row_mask [M] excludes its row.
    """
    if row_mask is not None:
        targets = targets.masked_fill(~row_mask, LEFT_OUT)
    each = zip(rows, codebooks, targets, strict=True)
    total = torch.stack([code_cross_entropy(*one, metric="dot" if cosine else "euclidean") for one in each]).sum()
    return total / (targets != LEFT_OUT).sum().clamp(min=1)
