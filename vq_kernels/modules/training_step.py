"""The training step of codebooks: initialisation, dead-code resets, moving averages, usage counts."""

from typing import Any, ClassVar, Literal, Self, cast

import torch
from torch import Tensor, nn

from vq_kernels.cosine import unit
from vq_kernels.distributed import check_owned, check_whole, is_dtensor, rank_and_world, sum_over_ranks
from vq_kernels.gradient.autograd import LEFT_OUT, Metric, straight_through
from vq_kernels.learning.dead_codes import evenly_spaced_rows
from vq_kernels.learning.ema import RowSums, mean_codes, move_averages_, row_sums, smoothed_sizes
from vq_kernels.learning.kmeans import kmeans_if_needed
from vq_kernels.learning.recompute import (
    copy_to_search,
    is_readable,
    is_recomputing,
    sample_rows,
    unless_recomputing,
)
from vq_kernels.search.backend import Backend
from vq_kernels.search.validation import check_bool

STEPS_UNTIL_RESET, ROWS_UNTIL_RESET = 20, 10
"""restart_after="auto": a code is dead after so many steps, and so many rows for each code, without a row."""

LEAST_DECAY, ROWS_IN_AVERAGE = 0.8, 40
"""ema_decay="auto": the averages hold about so many rows for each code, but no fewer than the last steps."""

NEW_CODE_ROWS = 5
"""A code that was set to a row counts as so many rows in its average."""


class HasCodebooks(nn.Module):
    """A module that is a codebook or has some."""

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """As for any module. It also freezes, or frees, codes that are a buffer, see `freeze_codebook`."""
        for module in self.modules():
            if isinstance(module, CodebookStep):
                module._requires_grad = requires_grad
        return super().requires_grad_(requires_grad)


class CodebookStep(HasCodebooks):
    """What a training step does with P codebooks of K codes of dimension D. `Codebook` constructs them.

    The base class of the quantizers, which number their codebooks over heads and stages: p in [0, P). A training step

    1. calls `_reset_unused` (or `_start_by_kmeans`) with the rows that codebook p will quantize;
    2. searches `_to_search(p)`, and takes gradients with respect to `_differentiable(...)`;
    3. calls `_count`, and for each codebook `_update_averages` with its `_row_sums` and `_follow_means`, unless it is
       recomputing.

    Under activation checkpointing the recomputed forward pass searches the same codes as the original one, draws the
    same random numbers, and changes nothing. No method branches on data, so a step can be compiled.
    """

    state_names: ClassVar[tuple[str, str, str]] = ("codebook", "cluster_sizes", "cluster_sums")
    """The names of the codes and their averages in the state dict."""

    _frozen = False
    _requires_grad = True
    """What the last `requires_grad_` said, for codes that are a buffer."""
    _was_sharded = False
    num_codes: int
    code_dim: int
    init: str
    kmeans_iters: int
    restart_after: int | Literal["auto"]
    restart_noise: float
    min_cluster_size: float
    metric: Metric
    learnable: bool
    follows_means: bool
    ema_decay: float | Literal["auto"] | None
    ema_eps: float
    synchronise: bool
    backend: Backend
    steps_unused: Tensor
    batch_counts: Tensor
    usage_counts: Tensor
    restarts: Tensor
    needs_data: Tensor
    searched_codebook: Tensor | None
    searched_rows: Tensor
    _drawn: list[bool]

    @property
    def _codes(self) -> Tensor:
        """[P, K, D]: all codes. They have no gradient if they are frozen."""
        codes = getattr(self, self.state_names[0])
        check_whole(self.state_names[0], codes, (self.num_codes, self.code_dim))
        codes = flat(codes, 2)
        return codes.detach() if self._frozen else codes

    @property
    def _sizes(self) -> Tensor:
        """[P, K]: the average number of rows of each code."""
        return flat(getattr(self, self.state_names[1]), 1)

    @property
    def _sums(self) -> Tensor:
        """[P, K, D]: the average sum of the rows of each code."""
        return flat(getattr(self, self.state_names[2]), 2)

    def _means(self, sizes: Tensor, sums: Tensor) -> Tensor:
        """Returns the codes [..., K, D] that averages of these sizes and sums give."""
        return self._normalise(mean_codes(sizes, sums, self.ema_eps))

    def _normalise(self, codes: Tensor) -> Tensor:
        """Normalises [..., D] for the cosine."""
        return unit(codes) if self.metric == "cosine" else codes

    def __setattr__(self, name: str, value: Any) -> None:
        """Notes whether codes were sharded, because FSDP2 replaces them by a plain tensor during the forward pass."""
        if name == self.state_names[0] and is_dtensor(value):
            self._was_sharded = True
        super().__setattr__(name, value)

    def _check_owned(self) -> None:
        """Raises RuntimeError if codes that the module writes would be lost, or small steps of the averages."""
        check_owned(self, self.state_names[0], (self.num_codes, self.code_dim), self._was_sharded)
        if self.ema_decay is not None and self._sizes.dtype.itemsize < 4:
            raise RuntimeError(
                f"{self.state_names[1]} must be float32 or wider, got {self._sizes.dtype}; set no buffer_dtype in the "
                "MixedPrecision of FullyShardedDataParallel, or pass it ignored_modules=[quantizer]"
            )

    # Codes that do not learn

    @property
    def freeze_codebook(self) -> bool:
        """Whether training leaves the codes unchanged: set to True, or by `requires_grad_(False)`."""
        if self._frozen or not self.learnable:
            return self._frozen or not self._requires_grad
        codes = getattr(self, self.state_names[0])  # a plain tensor in `functional_call`
        return isinstance(codes, nn.Parameter) and not codes.requires_grad

    @freeze_codebook.setter
    def freeze_codebook(self, freeze: bool) -> None:
        check_bool(freeze_codebook=freeze)
        self._frozen = freeze
        self._requires_grad = not freeze
        if self.learnable:
            parameter = getattr(self, self.state_names[0]).requires_grad_(not freeze)
            parameter.grad = None if freeze else parameter.grad  # or the next optimizer step would move the codes

    # Search

    @property
    def _copies(self) -> bool:
        """Whether a training step may change codes between the search and the backward, so that it searches a copy."""
        return self.restart_after != 0 or self.init in ("data", "kmeans") or self.searched_codebook is not None

    def _to_search(self, p: int, rows: Tensor, learns: bool) -> Tensor:
        """Returns the codes [K, D] of codebook p for this forward pass of rows [M, D], which changes them if `learns`.

        Raises:
            RuntimeError: the pass recomputes another batch than that of the last one.
        """
        codes = self._codes.detach()
        if not (learns and self._copies):
            return codes[p]
        samples, last = self.searched_rows[p], self.searched_codebook
        new_samples = sample_rows(rows, samples)
        if last is not None and not torch.compiler.is_compiling() and not is_recomputing():
            samples.copy_(new_samples)
            return last[p].copy_(codes[p])
        copy, last_samples = copy_to_search(codes[p], (codes if last is None else last)[p], new_samples, samples)
        samples.copy_(last_samples)
        if last is not None:
            last[p].copy_(copy)
        return cast(Tensor, copy)

    def _differentiable(self, searched: dict[int, Tensor], learns: bool) -> Tensor:
        """Returns the codes [p, K, D] of codebooks that `_to_search` returned, with their gradient."""
        codes = self._codes if len(searched) == len(self._codes) else self._codes[list(searched)]
        if not (learns and self._copies):
            return codes
        copies = stack(list(searched.values()))
        return straight_through(codes, copies) if self.learnable else copies

    # Initialisation and dead codes

    @torch.no_grad()
    def _start_by_kmeans(
        self, p: int, rows: Tensor, row_mask: Tensor | None, needed: Tensor, as_original: bool = False
    ) -> Tensor:
        """Sets codebook p to k-means of rows [M, D], if `needed` [] bool and there are rows. Returns whether it did.

        row_mask [M] bool says which rows count; with None all do. Unless `as_original`, codes without rows do not
        change.
        """
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        counted = torch.ones_like(rows[:, 0], dtype=torch.bool) if row_mask is None else row_mask
        options = (
            self.num_codes,
            self.kmeans_iters,
            self.metric == "cosine",
            self.synchronise,
            self.backend,
            not as_original,
        )
        done: Tensor
        means, counts, done = kmeans_if_needed(needed, rows, counted, *options)
        self._set_codes(p, done, means, counts if as_original else counts.clamp(min=1))
        if self.ema_decay is not None:
            _write_where(done, self._codes[p], self._means(self._sizes[p], self._sums[p]))
        return done

    @torch.no_grad()
    def _reset_unused(self, p: int, rows: Tensor, row_mask: Tensor | None) -> None:
        """Resets the unused codes of codebook p to rows [M, D], or rows of other ranks.

        With init="data" or "kmeans", it begins with all codes.
        row_mask [M] bool says which rows may be taken; with None all may.
        """
        any_rows = rows.shape[0] > 0 or rank_and_world(self.synchronise)[1] > 1
        steps_unused, needs_data = flat(self.steps_unused, 1)[p], self.needs_data.view(-1)[p]
        if any_rows and self.init == "kmeans":
            done = self._start_by_kmeans(p, rows, row_mask, unless_recomputing(needs_data >= 1))
            steps_unused.masked_fill_(done, 0)
            needs_data.mul_(~done)
        if not (any_rows and (self.restart_after or self.init == "data")):
            return
        starts = needs_data >= 1  # an average with a codebook that has begun is less
        due = starts.expand(self.num_codes)  # [K]
        if self.restart_after:
            due = due | (steps_unused >= self._steps_to_reset(flat(self.batch_counts, 1)[p].sum()))
            if self.ema_decay is not None:  # a code that was set to a row, and not chosen even in that step
                due = due | (self._sizes[p] == 0)
        if not self._draws(p, due):
            return
        targets = evenly_spaced_rows(  # [K, D]
            rows,
            row_mask,
            due.cumsum(0) - 1,
            due.sum(),
            noise=self.restart_noise,
            dtype=self._codes.dtype,
            synchronise=self.synchronise,
        )
        due = unless_recomputing(due & targets.isfinite().all(dim=1))
        self._set_codes(p, due, targets, 0)  # `_update_averages` knows the size
        self.restarts.add_(torch.where(starts, 0, due.sum()))
        steps_unused.masked_fill_(due, 0)
        needs_data.mul_(~due.any())

    def _draws(self, p: int, dead: Tensor) -> bool:
        """Whether a pass draws random numbers for the dead codes [K] bool of codebook p: only if there are any.

        A recomputation draws as the original pass did. Captured graphs and other devices than the CPU always draw,
        because it would take time to wait for `dead`.
        """
        if not is_recomputing() and not torch.compiler.is_compiling():
            self._drawn[p] = not is_readable(dead) or bool(dead.any())
        return torch.compiler.is_compiling() or self._drawn[p]

    def _steps_to_reset(self, num_rows: Tensor) -> Tensor | float:
        """Returns the steps without use after which a code is reset, given the rows [...] of a batch."""
        if self.restart_after != "auto":
            return self.restart_after
        return (ROWS_UNTIL_RESET * self.num_codes / num_rows.clamp(min=1)).clamp(min=STEPS_UNTIL_RESET)

    def _set_codes(self, p: int, chosen: Tensor, codes: Tensor, sizes: Tensor | float) -> None:
        """Sets the codes of codebook p where chosen, [K] or [] bool, to `codes` [K, D], as means of `sizes` rows."""
        _write_where(chosen, self._codes[p], codes)
        if self.ema_decay is not None:
            if not isinstance(sizes, Tensor):
                sizes = self._sizes.new_full((self.num_codes,), sizes)
            _write_where(chosen, self._sizes[p], sizes)
            _write_where(chosen, self._sums[p], codes * sizes[:, None])

    # Statistics of a batch

    def _counted(self, rows: Tensor, row_mask: Tensor | None) -> Tensor:
        """[M] bool: the rows [M, D] to learn from, those that are finite and not masked."""
        finite = rows.isfinite().all(dim=1)
        return finite if row_mask is None else finite & row_mask

    def _row_sums(self, rows: Tensor, codes: Tensor, indices: Tensor, counted: Tensor) -> RowSums:
        return row_sums(rows, codes, indices, counted, synchronise=self.synchronise, backend=self.backend)

    def _learning(self, active: Tensor | None = None) -> Tensor | None:
        """[P] bool: the codebooks that learn from a batch, those in `active` [P], or none if recomputing; None: all."""
        if active is None and not torch.compiler.is_compiling():
            return None
        if active is None:
            active = torch.ones(self._codes.shape[0], dtype=torch.bool, device=self._codes.device)
        return unless_recomputing(active)

    @torch.no_grad()
    def _count(self, indices: Tensor, learning: Tensor | None) -> None:
        """Counts the codes of a training batch, indices [P, M] in [0, K) or LEFT_OUT; `learning` from `_learning`.

        Frozen codes do not count steps without use.
        """
        num_codebooks, num_slots = indices.shape[0], self.num_codes + 1
        slots = indices - LEFT_OUT  # slot 0 of each codebook counts the rows left out
        if num_codebooks > 1:
            slots = slots + torch.arange(num_codebooks, device=indices.device)[:, None] * num_slots
        slots, size = slots.flatten(), num_codebooks * num_slots
        if is_readable(slots):
            counts = slots.bincount(minlength=size)
        else:
            counts = slots.new_zeros(size).index_add_(0, slots, torch.ones_like(slots))
        counts = sum_over_ranks(counts, self.synchronise).view(num_codebooks, num_slots)[:, 1:]
        self.batch_counts.copy_(counts.reshape(self.batch_counts.shape))
        learned = 1 if learning is None else learning[:, None].long()
        flat(self.usage_counts, 1).add_(counts if learning is None else counts * learned)
        if not self.freeze_codebook:
            flat(self.steps_unused, 1).add_(learned)
        self.steps_unused.masked_fill_(self.batch_counts > 0, 0)

    @torch.no_grad()
    def _update_averages(self, p: int, batch: RowSums, learning: Tensor | None) -> None:
        """Moves the averages of codebook p by one batch, from `_row_sums`, if it is one of those of `_learning`."""
        sizes, sums, (share, row_weight) = self._sizes[p], self._sums[p], self._share(batch.counts)
        if learning is not None:  # the averages of another codebook do not move
            share = torch.where(learning[p], share, 0)
            counts, sums_of_batch = (torch.where(learning[p], part, 0) for part in batch[:2])
            batch = RowSums(counts, sums_of_batch, batch.codes)
        if not is_readable(sizes) or bool((sizes <= 0).any()):
            self._weigh_new_codes(p, share, row_weight, batch.counts)
        if self.ema_decay == "auto":
            batch = RowSums(batch.counts * row_weight, batch.sums * row_weight, batch.codes)
        move_averages_(sizes, sums, batch, share)

    @torch.no_grad()
    def _follow_means(self, p: int, learning: Tensor | None) -> None:
        """Sets the codes of codebook p to the means of their rows, if it is one of those of `_learning`."""
        sizes, sums, codes = self._sizes[p], self._sums[p], self._codes[p]
        if learning is None and self.metric == "euclidean" and is_readable(sizes) and bool((sizes > 0).all()):
            torch.div(sums, smoothed_sizes(sizes, self.ema_eps)[:, None], out=codes)
            return
        has_rows = sizes > 0 if learning is None else (sizes > 0) & learning[p]
        _write_where(has_rows, codes, self._means(sizes, sums))

    def _share(self, counts: Tensor) -> tuple[Tensor, Tensor]:
        """Returns 1 - λ for a batch with these counts [K] of rows, and what a row counts in the averages, both [].

        With "auto", batches of any size lead to averages of 40 rows for each code, so that all rows count alike.
        """
        assert self.ema_decay is not None
        if self.ema_decay != "auto":
            return self._sizes.new_full((), 1 - self.ema_decay), self._sizes.new_ones(())
        num_rows, in_averages = counts.sum().to(self._sizes.dtype), ROWS_IN_AVERAGE * self.num_codes
        return (num_rows / in_averages).clamp(max=1 - LEAST_DECAY), in_averages / num_rows.clamp(min=1)

    def _weigh_new_codes(self, p: int, share: Tensor, row_weight: Tensor, counts: Tensor) -> None:
        """Gives averages to codes that have none yet, from the counts [K] of their first batch.

        Those that were set get the averages that such batches lead to, or those of 40 rows for each code if these are
        more. Those that `_reset_unused` set to a row, and now have rows, count as 5 rows. share and row_weight are
        those of `_share`.
        """
        old, num_rows = self._sizes[p], counts.sum()
        total = torch.maximum(num_rows * row_weight, ROWS_IN_AVERAGE * self.num_codes * share)
        sizes = total * (counts + 1) / (num_rows + self.num_codes)
        new = (old < 0) & (num_rows > 0)
        if self.restart_after or self.init == "data":
            set_to_row = (old == 0) & (counts > 0)
            new, sizes = new | set_to_row, torch.where(set_to_row, NEW_CODE_ROWS * share * row_weight, sizes)
        _write_where(new, self._sums[p], sizes[:, None] * self._codes[p])
        _write_where(new, old, sizes)


def stack(tensors: list[Tensor] | tuple[Tensor, ...]) -> Tensor:
    """Stacks tensors. One tensor is viewed, not copied."""
    return torch.stack(tensors) if len(tensors) > 1 else tensors[0][None]


def flat(tensor: Tensor, num_kept: int) -> Tensor:
    """Views all but the last `num_kept` dimensions as one: [P, K] or [P, K, D]."""
    return tensor.view(-1, *tensor.shape[-num_kept:])


def _write_where(chosen: Tensor, target: Tensor, values: Tensor) -> None:
    """Writes values into target, [K] or [K, D], where chosen, [K] or [] bool, is true."""
    condition = chosen[:, None] if chosen.dim() and target.dim() == 2 else chosen
    target.copy_(torch.where(condition, values, target))
