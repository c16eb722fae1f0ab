"""Codebooks that learn: how they begin, where codes restart, how they follow their rows, how they are counted."""

from typing import Literal

import torch
from torch import Tensor, nn

from vq_kernels.cosine import unit
from vq_kernels.distributed import rank_and_world, sum_over_ranks
from vq_kernels.functional import METRICS, Metric
from vq_kernels.gradient.autograd import LEFT_OUT, straight_through
from vq_kernels.heads import HeadLayout
from vq_kernels.learning.dead_codes import spread_rows
from vq_kernels.learning.ema import RowSums, mean_codes, move_averages_, row_sums
from vq_kernels.learning.recompute import copy_to_search, unless_second_pass
from vq_kernels.search.backend import BACKENDS, Backend, has_float64
from vq_kernels.search.validation import check_choice

Init = Literal["normal", "uniform", "data"]
INITS = ("normal", "uniform", "data")


class LearnedCodebooks(nn.Module):
    """C codebooks side by side, each for a part of a vector, of Q stages of K codes: what they hold, what changes it.

    The arguments and attributes are explained where they are public: by `VectorQuantizer`, whose `num_stages` is None,
    and by `ResidualVectorQuantizer`. Inside, all P = C·Q stages of codebooks are counted through, [P, K, D].

    Under gradient checkpointing the second forward pass of a batch finds the codebooks that the first one searched,
    draws the same random numbers, and changes nothing.
    """

    codebook: Tensor
    steps_unused: Tensor
    batch_counts: Tensor
    usage_counts: Tensor
    restarts: Tensor
    needs_data: Tensor
    cluster_sizes: Tensor
    cluster_sums: Tensor
    searched_codebook: Tensor

    def __init__(
        self,
        num_stages: int | None,
        num_codes: int,
        code_dim: int,
        *,
        init: Init,
        init_scale: float,
        restart_after: int,
        restart_noise: float,
        commitment_weight: float,
        metric: Metric,
        heads: int,
        separate_codebooks: bool,
        channel_dim: int,
        ema_decay: float | None,
        ema_eps: float,
        synchronise: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        for name, value, least in (
            ("num_codes", num_codes, 1),
            ("code_dim", code_dim, 1),
            ("heads", heads, 1),
            ("init_scale", init_scale, 0),
            ("restart_after", restart_after, 0),
            ("restart_noise", restart_noise, 0),
            ("commitment_weight", commitment_weight, 0),
            ("ema_eps", ema_eps, 0),
        ):
            if not value >= least:
                raise ValueError(f"{name} must be >= {least}, got {value}")
        if ema_decay is not None and not 0 <= ema_decay <= 1:
            raise ValueError(f"ema_decay must be None or in [0, 1], got {ema_decay}")
        check_choice("init", init, INITS)
        check_choice("metric", metric, METRICS)
        check_choice("backend", backend, BACKENDS)
        self.num_codes = num_codes
        self.code_dim = code_dim
        self.init = init
        self.restart_after = restart_after
        self.restart_noise = restart_noise
        self.commitment_weight = commitment_weight
        self.metric: Metric = metric
        self.heads = heads
        self.channel_dim = channel_dim
        self.ema_decay = ema_decay
        self.ema_eps = ema_eps
        self.synchronise = synchronise
        self.backend: Backend = backend
        self._layout = HeadLayout(heads, separate_codebooks and heads > 1)
        self._num_stages = 1 if num_stages is None else num_stages
        of_heads = (heads,) if self._layout.separate else ()
        of_stages = () if num_stages is None else (num_stages,)
        self._make_state((*of_heads, *of_stages, num_codes), init_scale)

    def _make_state(self, shape: tuple[int, ...], init_scale: float) -> None:
        if self.init == "uniform":
            codes = torch.empty(*shape, self.code_dim).uniform_(-init_scale, init_scale)
        else:
            codes = init_scale * torch.randn(*shape, self.code_dim)
        if self.ema_decay is None:
            self.codebook = nn.Parameter(codes)
        else:
            self.register_buffer("codebook", codes)
            self.register_buffer("cluster_sizes", torch.ones(shape))
            self.register_buffer("cluster_sums", codes.clone())
            self.register_buffer("searched_codebook", codes.clone(), persistent=False)
        for name in ("steps_unused", "batch_counts", "usage_counts"):
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("restarts", torch.zeros((), dtype=torch.int64))
        self.register_buffer("needs_data", torch.full(shape[:-1], self.init == "data"))

    def extra_repr(self) -> str:
        """What `print(module)` shows."""
        sizes = f"num_codes={self.num_codes}, code_dim={self.code_dim}"
        shown = f"{sizes}, init={self.init!r}, restart_after={self.restart_after}"
        usual = {"metric": "euclidean", "heads": 1, "channel_dim": -1, "ema_decay": None}
        changed = {name: getattr(self, name) for name, value in usual.items() if getattr(self, name) != value}
        if self._layout.separate:
            changed["separate_codebooks"] = True
        return ", ".join([shown, *(f"{name}={value!r}" for name, value in changed.items())])

    @property
    def _changes(self) -> bool:
        """Whether the codebooks may change between a forward pass and its backward."""
        return self.training and (self.restart_after > 0 or self.init == "data" or self.ema_decay is not None)

    def _to_search(self, place: int) -> Tensor:
        """[K, D], one codebook for this forward pass to search, as it is held; a copy, where it may change."""
        codebook = _flat(self.codebook.detach(), 2)[place]
        if not self._changes:
            return codebook
        last = self.codebook.detach() if self.ema_decay is None else self.searched_codebook
        copy: Tensor = copy_to_search(codebook, _flat(last, 2)[place])
        return copy

    def _differentiable(self, searched: list[Tensor]) -> Tensor:
        """[P, K, D], the codebooks for the gradients, of which `searched` holds what was searched, [K, D] each."""
        codebooks = _flat(self.codebook, 2)
        if self._changes:
            copies = torch.stack(searched) if len(searched) > 1 else searched[0][None]
            codebooks = straight_through(codebooks, copies) if self.ema_decay is None else copies
        return self._as_codes(codebooks)

    def _as_codes(self, codebooks: Tensor) -> Tensor:
        """Codebooks [..., D] as they are searched: for the cosine, of length 1."""
        return unit(codebooks) if self.metric == "cosine" else codebooks

    @torch.no_grad()
    def _restart(self, place: int, rows: Tensor, row_mask: Tensor | None) -> None:
        """Put the codes of one codebook that are due at rows of [N, D], or of other ranks.

        Without a branch on data, for compiled graphs. row_mask [N] bool tells which rows may be taken; None: all.
        """
        rows_may_come = rows.shape[0] > 0 or rank_and_world(self.synchronise)[1] > 1  # from other ranks
        if not (self.training and rows_may_come and (self.restart_after or self.init == "data")):
            return
        codebook, steps_unused = _flat(self.codebook, 2)[place], _flat(self.steps_unused, 1)[place]
        needs_data = self.needs_data.view(-1)[place]
        due = needs_data.expand(self.num_codes)  # [K]
        if self.restart_after:
            due = due | (steps_unused >= self.restart_after)
        targets = spread_rows(  # [K, D]
            rows if row_mask is None else _spread_out(rows, row_mask),
            due.cumsum(0) - 1,
            due.sum(),
            noise=self.restart_noise,
            dtype=codebook.dtype,
            synchronise=self.synchronise,
        )
        due = unless_second_pass(due & targets.isfinite().all(dim=1))
        codebook.copy_(torch.where(due[:, None], targets, codebook))
        self.restarts.add_(torch.where(needs_data, 0, due.sum()))
        steps_unused.masked_fill_(due, 0)
        needs_data.logical_and_(~due.any())
        if self.ema_decay is not None:  # a restarted code is the mean of one row
            sizes, sums = _flat(self.cluster_sizes, 1)[place], _flat(self.cluster_sums, 2)[place]
            sizes.masked_fill_(due, 1)
            sums.copy_(torch.where(due[:, None], targets, sums))

    @torch.no_grad()
    def _count(self, indices: Tensor, active: Tensor | None) -> None:
        """Count a training batch.

        Args:
            indices: [P, N] int64, in [0, K), or LEFT_OUT.
            active: [P] bool, codebooks that learn from it; None: all.
        """
        chosen = indices != LEFT_OUT
        first = torch.arange(indices.shape[0], device=indices.device)[:, None] * self.num_codes
        slots = (indices.masked_fill(~chosen, 0) + first).flatten()
        counts = self.batch_counts.new_zeros(self.batch_counts.numel()).index_add_(0, slots, chosen.flatten().long())
        self.batch_counts.copy_(sum_over_ranks(counts, self.synchronise).view_as(self.batch_counts))
        learned = 1 if active is None else active[:, None].long()
        _flat(self.usage_counts, 1).add_(_flat(self.batch_counts, 1) * learned)
        _flat(self.steps_unused, 1).add_(learned)
        self.steps_unused.masked_fill_(self.batch_counts > 0, 0)

    def _row_sums(self, rows: Tensor, codebook: Tensor, indices: Tensor, row_mask: Tensor | None) -> RowSums:
        """What rows [N, D] that chose indices [N] say about codebook [K, D], but those masked, and those not finite."""
        counted = rows.isfinite().all(dim=1)
        counted = counted if row_mask is None else counted & row_mask
        return row_sums(rows, codebook, indices, counted, synchronise=self.synchronise, backend=self.backend)

    @torch.no_grad()
    def _follow(self, searched: list[Tensor], batches: list[RowSums], decay: float, active: Tensor | None) -> None:
        """Move the averages by what a batch said about each codebook, and the codes too.

        Args:
            searched: [K, D] each, the codebooks as the batch found them, kept for its second pass.
            batches: what the batch said about each.
            decay: see `vq_kernels.learning.ema`.
            active: as for `_count`.
        """
        _flat(self.searched_codebook, 2).copy_(torch.stack(searched))
        codebooks, sizes, sums = _flat(self.codebook, 2), _flat(self.cluster_sizes, 1), _flat(self.cluster_sums, 2)
        counts, row_totals = (torch.stack(parts) for parts in zip(*batches, strict=True))  # [P, K], [P, K, D]
        if active is not None:  # the averages of the others are moved to themselves
            counts = torch.where(active[:, None], counts, sizes)
            row_totals = torch.where(active[:, None, None], row_totals, sums)
        move_averages_(sizes, sums, RowSums(counts, row_totals), decay)
        means = self._as_codes(mean_codes(sizes, sums, self.ema_eps))
        codebooks.copy_(means if active is None else torch.where(active[:, None, None], means, codebooks))

    @property
    def perplexity(self) -> Tensor:
        """[...] float64 (see `perplexity`), of each codebook, by `usage_counts`; 1 to K, and 0 before any use."""
        return perplexity(self.usage_counts)

    @property
    def codes_used(self) -> Tensor:
        """[...] int64, of each codebook: how many codes `usage_counts` has seen chosen."""
        return (self.usage_counts > 0).sum(dim=-1)

    @torch.no_grad()
    def reset_usage(self) -> None:
        """Begin `usage_counts` and `restarts` anew, at an epoch's start, say."""
        self.usage_counts.zero_()
        self.restarts.zero_()


def perplexity(counts: Tensor) -> Tensor:
    """exp(entropy), [...] float64, of how often each code was chosen, counts [..., K]; 0 where all counts are.

    On a device without float64 it is computed on the CPU, and returned in float32.
    """
    if not has_float64(counts.device):
        return perplexity(counts.cpu()).to(counts.device, torch.float32)
    total = counts.sum(dim=-1)
    entropy: Tensor = torch.special.entr(counts.double() / total.clamp(min=1)[..., None]).sum(dim=-1)
    return entropy.exp() * (total > 0)


def _flat(tensor: Tensor, num_kept: int) -> Tensor:
    """A view with the last `num_kept` dimensions as they are, and one for all before: [P, K], or [P, K, D]."""
    return tensor.view(-1, *tensor.shape[-num_kept:])


def _spread_out(rows: Tensor, mask: Tensor) -> Tensor:
    """Those of rows [N, D] that mask [N] bool lets count, in their order, each as often as it takes to have N again.

    So a draw of evenly spaced rows is one of those alone. NaN where none counts.
    """
    those_first = mask.logical_not().argsort(stable=True)
    place = torch.arange(rows.shape[0], device=rows.device) * mask.sum() // max(rows.shape[0], 1)
    return rows[those_first[place]].masked_fill(~mask.any(), torch.nan)
