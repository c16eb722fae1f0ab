"""The base class of the quantizers: from vectors to codes and back, over heads and stages."""

import math
from abc import abstractmethod
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.functional import Quantized
from vq_kernels.gradient.autograd import LEFT_OUT, Choice, choose, pass_gradients
from vq_kernels.learning.ema import RowSums
from vq_kernels.learning.kmeans import KMeansResult, Mapped, kmeans
from vq_kernels.learning.monitor import FIRST, PERIOD, TrainingMonitor, warn_of
from vq_kernels.learning.recompute import is_recomputing
from vq_kernels.modules.codebook import Codebook
from vq_kernels.modules.indices import INDEX_DTYPES, check_mask, codes_at
from vq_kernels.modules.training_step import stack
from vq_kernels.search.api import nearest_code
from vq_kernels.search.backend import Backend
from vq_kernels.search.validation import (
    check_at_least,
    check_bool,
    check_choice,
    check_dtype,
    check_no_vmap,
    check_not_given,
    check_not_traced,
)

Init = Literal["normal", "uniform", "data", "kmeans"]
INITS = ("normal", "uniform", "data", "kmeans")


@dataclass(frozen=True)
class HeadLayout:
    """How vectors [..., heads·D] are split into rows [C, M, D] for C codebooks.

    If all heads share a codebook, C = 1, M = N·heads, and the split is a view. If each head has its own, C = heads and
    M = N.

    Attributes:
        heads: parts of each vector, >= 1.
        separate: whether each head has its own codebook.
    """

    heads: int
    separate: bool

    @property
    def num_codebooks(self) -> int:
        """C."""
        return self.heads if self.separate else 1

    def split(self, x: Tensor) -> Tensor:
        """Splits x [..., heads·D] into rows [C, M, D]."""
        rows = x.reshape(-1, self.num_codebooks, x.shape[-1] // self.num_codebooks).transpose(0, 1)
        return rows.reshape(self.num_codebooks, -1, x.shape[-1] // self.heads)

    def join(self, rows: Tensor, leading: torch.Size) -> Tensor:
        """Joins rows [C, M, D] to [*leading, heads·D]."""
        parts, code_dim = self.heads // self.num_codebooks, rows.shape[-1]
        joined = rows.reshape(self.num_codebooks, math.prod(leading), parts * code_dim).transpose(0, 1)
        return joined.reshape(*leading, self.heads * code_dim)

    def split_indices(self, indices: Tensor) -> Tensor:
        """Splits indices [..., heads], or [...] for one head, into [C, M]."""
        parts = self.heads // self.num_codebooks
        return indices.reshape(-1, self.num_codebooks, parts).transpose(0, 1).flatten(1)

    def join_indices(self, indices: Tensor, leading: torch.Size) -> Tensor:
        """Joins indices [C, M, *last] to [*leading, heads, *last], or [*leading, *last] for one head."""
        last, parts = indices.shape[2:], self.heads // self.num_codebooks
        joined = indices.reshape(self.num_codebooks, math.prod(leading), parts, *last).transpose(0, 1)
        return joined.reshape(*leading, *([self.heads] if self.heads > 1 else []), *last)

    def codes_at(self, codebooks: Tensor, indices: Tensor) -> Tensor:
        """Returns the codes [..., heads·D] of codebooks [C, K, D] at indices [..., heads], or [...]; 0 at LEFT_OUT."""
        if self.heads > 1 and indices.shape[-1:] != (self.heads,):
            raise ValueError(f"indices must be [..., {self.heads}], one for each head, got {tuple(indices.shape)}")
        codes = [codes_at(*head) for head in zip(codebooks, self.split_indices(indices), strict=True)]
        return self.join(stack(codes), indices.shape if self.heads == 1 else indices.shape[:-1])

    def split_mask(self, mask: Tensor) -> Tensor:
        """Repeats mask [...] bool for the rows of a codebook, [M]."""
        return mask.reshape(-1, 1).expand(-1, self.heads // self.num_codebooks).reshape(-1)


class QuantizerBase(Codebook):
    """The forward pass of the quantizers and its inverse, for Q stages, and C codebooks in each.

    [...] is the shape of x without its channels. Rows are [C, M, D], see `HeadLayout`. Codebook c·Q + q is that of head
    c in stage q.

    Args:
        num_stages: Q, or None for one stage without a dimension for it in the state.
        num_codes, code_dim, heads, separate_codebooks, channel_dim: as for `VectorQuantizer`.
        commitment_weight, ema_decay, freeze_codebook, warn: as for `VectorQuantizer`.
        options: the other arguments of `Codebook`.
    """

    codebook: Tensor

    def __init__(
        self,
        num_stages: int | None,
        num_codes: int,
        code_dim: int,
        *,
        commitment_weight: float,
        heads: int,
        separate_codebooks: bool,
        channel_dim: int,
        ema_decay: float | Literal["auto"] | None,
        freeze_codebook: bool,
        warn: bool,
        **options: Any,
    ) -> None:
        check_at_least(1, integer=True, heads=heads)
        check_at_least(-math.inf, integer=True, channel_dim=channel_dim)
        check_at_least(0, commitment_weight=commitment_weight)
        check_bool(separate_codebooks=separate_codebooks, freeze_codebook=freeze_codebook, warn=warn)
        if not isinstance(options["init"], Tensor):
            check_choice("init", options["init"], INITS)
        layout = HeadLayout(heads, separate_codebooks and heads > 1)
        leading = ((heads,) if layout.separate else ()) + (() if num_stages is None else (num_stages,))
        super().__init__(
            leading,
            num_codes,
            code_dim,
            learnable=ema_decay is None,
            follows_means=ema_decay is not None,
            ema_decay=ema_decay,
            **options,
        )
        self.commitment_weight = commitment_weight
        self.heads = heads
        self.channel_dim = channel_dim
        self._layout = layout
        self._num_stages = 1 if num_stages is None else num_stages
        self.freeze_codebook = freeze_codebook
        self._monitor = TrainingMonitor() if warn else None
        self._steps_trained = 0

    @classmethod
    def from_codebook(cls, codebook: Tensor, *, freeze: bool = False, **options: Any) -> Self:
        """Returns a quantizer that begins with these codes.

        Args:
            codebook: of the shape of the attribute `codebook`; its sizes become those of the quantizer. One more
                dimension in front means `heads` with separate codebooks.
            freeze: `freeze_codebook`.
            options: the other arguments of the constructor.

        Raises:
            TypeError, ValueError: codebook or an option does not fit.
        """
        check_dtype("codebook", codebook)
        check_bool(freeze=freeze)
        check_not_given(options, "from_codebook", "init", "freeze_codebook", *cls.size_names[1:])
        num_sizes = len(cls.size_names) - 1
        if codebook.dim() not in (num_sizes, num_sizes + 1):
            raise ValueError(f"codebook must have {num_sizes} or {num_sizes + 1} dimensions, got {codebook.dim()}")
        if codebook.dim() > num_sizes:
            options = {"heads": codebook.shape[0], "separate_codebooks": True} | options
            codebook = codebook if codebook.shape[0] > 1 else codebook[0]
        module = cls(*codebook.shape[-num_sizes:], init="kmeans", freeze_codebook=freeze, **options)
        module.init = "codes"
        module._set_all(codebook, "codebook", module.codebook.shape)
        return module

    def extra_repr(self) -> str:
        """Returns the arguments that `print(module)` shows."""
        sizes = f"num_codes={self.num_codes}, code_dim={self.code_dim}"
        shown = f"{sizes}, init={self.init!r}, restart_after={self.restart_after!r}, ema_decay={self.ema_decay!r}"
        defaults = {"metric": "euclidean", "heads": 1, "channel_dim": -1, "freeze_codebook": False}
        changed = {name: getattr(self, name) for name, value in defaults.items() if getattr(self, name) != value}
        if self._layout.separate:
            changed["separate_codebooks"] = True
        return ", ".join([shown, *(f"{name}={value!r}" for name, value in changed.items())])

    @torch.no_grad()
    def fit(self, x: Tensor | Iterable[Tensor], **options: Any) -> list[KMeansResult]:
        """Sets the codes by k-means: head by head, and stage after stage on the residuals of the stages before.

        Args:
            x: as for `forward`; or a re-iterable of such tensors, see `kmeans`, which makes a pass in each iteration.
            options: the arguments of `kmeans` from `init` to `progress`.

        Returns:
            The results for the codebooks, head by head, and stage after stage in each.

        Raises:
            TypeError, ValueError: as for `kmeans`.
        """
        self._check_owned()
        own: dict[str, Any] = {"metric": self.metric, "backend": self.backend, "synchronise": self.synchronise}
        results = []
        for head in range(self._layout.num_codebooks):
            rows: Iterable[Tensor] = Mapped([x] if isinstance(x, Tensor) else x, partial(self._rows_of_head, head))
            for _ in range(self._num_stages):
                rows = list(rows) if isinstance(x, Tensor) else rows  # residuals in memory are computed once
                result = kmeans(rows, self.num_codes, **own, **options)
                results.append(result)
                rows = Mapped(rows, partial(_residual, codebook=result.codebook, backend=self.backend))
        self.set_codes(torch.stack([result.codebook for result in results]).view(self.codebook.shape))
        return results

    def _rows_of_head(self, head: int, x: Tensor) -> Tensor:
        """Returns the rows [M, D] of x that codebooks of this head quantize, in float32 at least."""
        rows = self._layout.split(self._positions(x, None)[0])[head]
        return rows.to(torch.promote_types(rows.dtype, torch.float32)).contiguous()

    def _quantize(
        self, x: Tensor, mask: Tensor | None, active: Tensor | None = None, num_stages: int | None = None
    ) -> Quantized:
        """Quantizes x, with indices [..., q] or [..., heads, q]; in training mode, also updates the codebooks.

        The first q = num_stages stages are computed, or all. `active` [Q] bool says which of them take part; with None
        all do.
        """
        num_stages = self._num_stages if num_stages is None else num_stages
        if self.training:
            check_no_vmap()
            check_not_traced()
        learns = self.training and not self.freeze_codebook
        if not learns:
            self._warn_of_waiting()
        if learns and self._copies:
            self._check_owned()
        positions, row_mask = self._positions(x, mask)
        leading = positions.shape[:-1]
        rows = self._as_searched(self._layout.split(positions))
        left_out = self._left_out(rows.shape[1], row_mask, active, num_stages)
        choices, searched, batches = self._choose(rows.detach(), row_mask, left_out, learns, num_stages)
        indices = stack([choice.indices for choice in choices])  # [C, q, M]
        codebooks = self._by_head(self._differentiable(searched, learns))
        passed = (
            pass_gradients(
                *head,
                commitment_weight=self.commitment_weight,
                complete=left_out is None,
                backend=self.backend,
                trains_codes=self.learnable,
            )
            for head in zip(rows, codebooks, choices, strict=True)
        )
        codes, losses = zip(*passed, strict=True)
        if self.training and not is_recomputing():
            learning = counting = self._learning(None if active is None else active.repeat(len(choices)))
            if num_stages < self._num_stages:
                computed = (torch.arange(self._num_stages, device=x.device) < num_stages).repeat(len(choices))
                counting = computed if learning is None else learning & computed
                indices_of_all = F.pad(indices, (0, 0, 0, self._num_stages - num_stages), value=LEFT_OUT)
            else:
                indices_of_all = indices
            self._count(indices_of_all.flatten(0, 1), counting)
            if learns and self.follows_means:
                for p, batch in batches.items():
                    self._update_averages(p, batch, learning)
                    self._follow_means(p, learning)
            if learns and self._monitor is not None and not torch.compiler.is_compiling():
                self._steps_trained += 1
                if self._steps_trained == FIRST or self._steps_trained % PERIOD == 0:
                    sq_distances = torch.stack([choice.sq_distances for choice in choices])
                    problem = self._monitor.check(rows.detach(), sq_distances, *self._usage())
                    warn_of(problem, self.commitment_weight, self.restart_after, self.init)
        quantized = self._layout.join(stack(codes).to(x.dtype), leading)
        return Quantized(
            quantized if self.channel_dim == -1 else quantized.movedim(-1, self.channel_dim),
            self._layout.join_indices(indices.transpose(1, 2), leading),
            torch.stack(losses).mean() if len(losses) > 1 else losses[0],
        )

    def _usage(self) -> tuple[Tensor, Tensor]:
        """The counts of the last batch and the steps without use, [P, K]."""
        return self.batch_counts.view(-1, self.num_codes), self.steps_unused.view(-1, self.num_codes)

    def _warn_of_waiting(self) -> None:
        """Warns, in the first pass that does not learn, if the codes still wait for data."""
        if self._monitor is not None:
            self._monitor.warn_of_waiting(self.needs_data, self.init)

    def encode(self, x: Tensor, mask: Tensor | None = None, dtype: torch.dtype = torch.int64) -> Tensor:
        """Returns the indices that `forward` gives in eval mode, without a gradient. It learns and counts nothing.

        Args:
            x, mask: as for `forward`.
            dtype: any integer dtype that holds K - 1; with a mask a signed one, for the index -1 of padding.

        Raises:
            TypeError, ValueError: x, mask or dtype does not fit.
        """
        return self._encode(x, mask, dtype, self._num_stages)

    @torch.no_grad()
    def _encode(self, x: Tensor, mask: Tensor | None, dtype: torch.dtype, num_stages: int) -> Tensor:
        if dtype not in INDEX_DTYPES:
            raise TypeError(f"dtype must be an integer dtype, got {dtype}")
        if torch.iinfo(dtype).max < self.num_codes - 1:
            raise ValueError(f"dtype must hold the indices of num_codes={self.num_codes}, got {dtype}")
        if mask is not None and not dtype.is_signed:
            raise ValueError(f"dtype must be signed with a mask, because padding has index -1, got {dtype}")
        self._warn_of_waiting()
        positions, row_mask = self._positions(x, mask)
        rows = self._as_searched(self._layout.split(positions))
        left_out = self._left_out(rows.shape[1], row_mask, None, num_stages)
        choices, _, _ = self._choose(rows, row_mask, left_out, False, num_stages)
        indices = torch.stack([choice.indices for choice in choices]).transpose(1, 2)  # [C, M, q]
        indices = indices if "num_quantizers" in self.size_names else indices[..., 0]
        return self._layout.join_indices(indices, positions.shape[:-1]).to(dtype).contiguous()

    def _choose(
        self, rows: Tensor, row_mask: Tensor | None, left_out: Tensor | None, learns: bool, num_stages: int
    ) -> tuple[list[Choice], dict[int, Tensor], dict[int, RowSums]]:
        """Searches rows [C, M, D] in the first stages, without a gradient. If it `learns`, it resets dead codes first.

        Returns the choices of the C heads; the codebooks p that were searched, not normalised; and, if the codes follow
        the means of their rows, the sums of the batch for each.
        """
        choices: list[Choice] = []
        searched: dict[int, Tensor] = {}
        batches: dict[int, RowSums] = {}
        for head, residual in enumerate(rows):
            indices, sq_distances, total = [], [], residual.new_zeros(())
            for stage in range(num_stages):
                p = head * self._num_stages + stage
                if learns:
                    self._reset_unused(p, residual, row_mask)
                searched[p] = self._to_search(p, residual, learns)
                codebook = self._normalise(searched[p])
                chosen, codes, distances = choose(residual, codebook, metric=self.metric, backend=self.backend)
                if learns and self.follows_means and not is_recomputing():
                    counted = self._counted(residual, row_mask)
                    batches[p] = self._row_sums(residual, codebook, chosen[0], counted)
                if stage + 1 < num_stages:
                    residual = residual - codes
                if left_out is not None:
                    chosen = chosen.masked_fill(left_out[stage], LEFT_OUT)
                    codes = codes.masked_fill(left_out[stage, :, None], 0)
                total = total + codes if stage else codes
                indices.append(chosen)
                sq_distances.append(distances)
            of_all = [torch.cat(each) if num_stages > 1 else each[0] for each in (indices, sq_distances)]
            choices.append(Choice(of_all[0], total, of_all[1]))
        return choices, searched, batches

    def _left_out(
        self, num_rows: int, row_mask: Tensor | None, active: Tensor | None, num_stages: int
    ) -> Tensor | None:
        """Returns the rows that each of the first q stages leaves out, [q, M] bool, or None if none leaves out any."""
        if row_mask is None and active is None:
            return None
        taken = torch.ones(num_stages, num_rows, dtype=torch.bool, device=self.codebook.device)
        taken = taken if row_mask is None else taken & row_mask
        return ~(taken if active is None else taken & active[:num_stages, None])

    @abstractmethod
    def decode(self, indices: Tensor) -> Tensor:
        """Returns the quantized vectors of these indices."""

    def get_codebook_entry(self, indices: Tensor) -> Tensor:
        """Returns `decode(indices)`."""
        return self.decode(indices)

    def _decode(self, indices: Tensor) -> Iterator[Tensor]:
        """Yields the codes of the first q stages, at indices [..., q] or [..., heads, q]. The channels are as in x."""
        codebooks = self._by_head(self._codes)
        for stage, chosen in enumerate(indices.unbind(-1)):
            yield self._layout.codes_at(codebooks[:, stage], chosen).movedim(-1, self.channel_dim)

    def _positions(self, x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Checks x and mask. Returns x as [..., heads·D] with 0 for padding, and the mask of its rows, [M] or None."""
        channels = self.heads * self.code_dim
        check_dtype("x", x)
        if not -x.dim() <= self.channel_dim < x.dim() or x.shape[self.channel_dim] != channels:
            raise ValueError(f"x must have {channels} channels in dimension {self.channel_dim}, got {tuple(x.shape)}")
        if x.device != self.codebook.device:
            raise ValueError(f"the module must be on x's device, {x.device}, got {self.codebook.device}")
        positions = x if self.channel_dim == -1 else x.movedim(self.channel_dim, -1)
        if mask is None:
            return positions, None
        check_mask(mask, positions.shape[:-1])
        return positions.masked_fill(~mask[..., None], 0), self._layout.split_mask(mask)

    def _as_searched(self, rows: Tensor) -> Tensor:
        """Normalises rows [C, M, D] for the cosine, and widens them to float32 unless they are only searched."""
        if self._num_stages == 1 and self.metric == "euclidean" and self.ema_decay is None:
            return rows
        wide = torch.promote_types(torch.promote_types(rows.dtype, self.codebook.dtype), torch.float32)
        return self._normalise(rows.to(wide))

    def _by_head(self, codebooks: Tensor) -> Tensor:
        """Normalises codebooks [C·q, K, D] for the cosine, and views them as [C, q, K, D]."""
        return self._normalise(codebooks).view(self._layout.num_codebooks, -1, self.num_codes, self.code_dim)


def _residual(rows: Tensor, codebook: Tensor, backend: Backend) -> Tensor:
    return rows - nearest_code(rows, codebook, backend=backend).codes
