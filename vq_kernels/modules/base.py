"""From vectors to codes and back, in one stage or in several: what the two quantizers of this library share."""

from functools import reduce

import torch
from torch import Tensor

from vq_kernels.cosine import unit
from vq_kernels.functional import Quantized, choose
from vq_kernels.gradient.autograd import LEFT_OUT, Choice, pass_gradients
from vq_kernels.heads import check_mask
from vq_kernels.learning.ema import RowSums
from vq_kernels.learning.recompute import is_second_pass, unless_second_pass
from vq_kernels.modules.codebook import LearnedCodebooks
from vq_kernels.search.validation import check_dtype


class StagedQuantizer(LearnedCodebooks):
    """The forward pass of `LearnedCodebooks`, and the way back.

    [...] is the shape of x without its channels, N the number of its positions. Rows are [C, M, D]: M is N, or N·heads
    where all heads share their codebooks.
    """

    def _quantize(self, x: Tensor, mask: Tensor | None, active: Tensor | None = None) -> Quantized:
        """Quantize x; in training mode, restart, learn and count.

        Args:
            x: heads·D channels in `channel_dim`.
            mask: [...] bool, False for padding; None: there is none.
            active: [Q] bool, the stages that take part; None: all.

        Returns:
            Quantized, with indices [..., Q], or [..., heads, Q].
        """
        positions, row_mask = self._positions(x, mask)
        leading = positions.shape[:-1]
        rows = self._as_searched(self._layout.split(positions))
        left_out = self._left_out(rows.shape[1], row_mask, active)  # [Q, M]
        choices, searched, batches = self._choose(rows.detach(), row_mask, left_out)
        indices = torch.stack([choice.indices for choice in choices])  # [C, Q, M]
        passed = [
            pass_gradients(
                *head, commitment_weight=self.commitment_weight, complete=left_out is None, backend=self.backend
            )
            for head in zip(rows, self._by_head(self._differentiable(searched)), choices, strict=True)
        ]
        if self.training and not is_second_pass():
            learning = self._learning(active)
            self._count(indices.flatten(0, 1), learning)
            if self.ema_decay is not None:
                self._follow(searched, batches, self.ema_decay, learning)
        codes = torch.stack([codes for codes, _ in passed]) if len(passed) > 1 else passed[0][0][None]
        return Quantized(
            self._restore(self._layout.join(codes.to(x.dtype), leading)),
            torch.stack([self._layout.join_indices(stage, leading) for stage in indices.unbind(1)], dim=-1),
            torch.stack([loss for _, loss in passed]).mean(),
        )

    def _choose(
        self, rows: Tensor, row_mask: Tensor | None, left_out: Tensor | None
    ) -> tuple[list[Choice], list[Tensor], list[RowSums]]:
        """Search for each head, stage after stage, without a gradient; codes that are due restart before.

        Args:
            rows: [C, M, D], detached.
            row_mask: [M] bool, False for padding.
            left_out: [Q, M] bool, the rows that a stage leaves out, padding too.

        Returns:
            What each head's stages choose, [C]; the codebooks that were searched, [C·Q], as they are held; and, if
            codes follow the means of their rows, what the batch says about each, [C·Q], or nothing.
        """
        choices, searched, batches = [], [], []
        for head, residual in enumerate(rows):
            indices, sq_distances, total = [], [], residual.new_zeros(())
            for stage in range(self._num_stages):
                place = head * self._num_stages + stage
                self._restart(place, residual, row_mask)
                searched.append(self._to_search(place))
                codebook = self._as_codes(searched[place])
                chosen, codes, distances = choose(residual, codebook, metric=self.metric, backend=self.backend)
                if self.training and self.ema_decay is not None and not is_second_pass():
                    batches.append(self._row_sums(residual, codebook, chosen[0], row_mask))
                if stage + 1 < self._num_stages:
                    residual = residual - codes
                if left_out is not None:
                    chosen = chosen.masked_fill(left_out[stage], LEFT_OUT)
                    codes = codes.masked_fill(left_out[stage, :, None], 0)
                total = total + codes if stage else codes
                indices.append(chosen)
                sq_distances.append(distances)
            choices.append(Choice(torch.cat(indices), total, torch.cat(sq_distances)))
        return choices, searched, batches

    def _learning(self, active: Tensor | None) -> Tensor | None:
        """[C·Q] bool: the codebooks that learn from a batch; None: all. For `active` see `_quantize`."""
        if active is None and not torch.compiler.is_compiling():
            return None
        active = torch.ones_like(self.needs_data) if active is None else active.expand_as(self.needs_data)
        return unless_second_pass(active.flatten())

    def _left_out(self, num_rows: int, row_mask: Tensor | None, active: Tensor | None) -> Tensor | None:
        """[Q, M] bool: the rows that each stage leaves out; None: no stage leaves out any."""
        if row_mask is None and active is None:
            return None
        taken = torch.ones(self._num_stages, num_rows, dtype=torch.bool, device=self.codebook.device)
        taken = taken if row_mask is None else taken & row_mask
        return ~(taken if active is None else taken & active[:, None])

    def _decode(self, indices: Tensor) -> Tensor:
        """The sums of the codes of the first q stages, at indices [..., q], or [..., heads, q]; channels as in x."""
        leading = indices.shape[:-1] if self.heads == 1 else indices.shape[:-2]
        by_head = torch.stack([self._layout.split_indices(stage) for stage in indices.unbind(-1)], dim=1)  # [C, q, M]
        sums = []
        for codebooks, stages in zip(self._by_head(self._as_codes(self.codebook)), by_head, strict=True):
            first_stages = zip(codebooks, stages, strict=False)  # and no more than have indices
            sums.append(reduce(torch.add, (_codes_at(*stage) for stage in first_stages)))
        return self._restore(self._layout.join(torch.stack(sums), leading))

    def _positions(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """x as [..., heads·D], with 0 for padding, and the mask of its rows, [M], or None.

        Raises:
            TypeError, ValueError: x or mask does not fit.
        """
        channels = self.heads * self.code_dim
        check_dtype("x", x)
        if not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != channels:
            raise ValueError(f"x must have {channels} channels in dimension {self.channel_dim}, got {tuple(x.shape)}")
        if x.device != self.codebook.device:
            raise ValueError(f"the module must be on x's device, {x.device}, got {self.codebook.device}")
        positions = x.movedim(self.channel_dim, -1)
        if mask is None:
            return positions, None
        check_mask(mask, positions.shape[:-1])
        return positions.masked_fill(~mask[..., None], 0), self._layout.split_mask(mask)

    def _restore(self, positions: Tensor) -> Tensor:
        """positions [..., heads·D] with the channels where x has them."""
        return positions.movedim(-1, self.channel_dim)

    def _as_searched(self, rows: Tensor) -> Tensor:
        """rows [C, M, D], for the cosine of length 1; in float32 at least, where more is done than to search them."""
        if self._num_stages == 1 and self.metric == "euclidean" and self.ema_decay is None:
            return rows
        wide = torch.promote_types(torch.promote_types(rows.dtype, self.codebook.dtype), torch.float32)
        return unit(rows.to(wide)) if self.metric == "cosine" else rows.to(wide)

    def _by_head(self, codebooks: Tensor) -> Tensor:
        """codebooks [C·Q, K, D], or as they are held, as [C, Q, K, D]."""
        return codebooks.view(-1, self._num_stages, *codebooks.shape[-2:])


def _codes_at(codebook: Tensor, indices: Tensor) -> Tensor:
    """[M, D]: the codes of codebook [K, D] at indices [M], 0 at LEFT_OUT."""
    left_out = indices == LEFT_OUT
    return codebook.index_select(0, indices.masked_fill(left_out, 0)).masked_fill(left_out[:, None], 0)
