"""The codebook of `VectorQuantize`: the shared `Codebook` with the names and the step of vector_quantize_pytorch."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq_kernels.cosine import most_similar_code, most_similar_codes
from vq_kernels.distributed import rank_and_world
from vq_kernels.learning.dead_codes import draw_sampling, random_replacements
from vq_kernels.learning.ema import RowSums
from vq_kernels.learning.recompute import is_recomputing, unless_recomputing
from vq_kernels.modules.codebook import Codebook
from vq_kernels.modules.training_step import stack
from vq_kernels.search import nearest_code, nearest_code_topk
from vq_kernels.search.validation import check_no_vmap, is_tracing, is_vmapped, unmapped

Weight = Tensor | Callable[[Tensor, Tensor], Tensor]


class Found(NamedTuple):
    """The result of a search for rows [C, M, D]. Codes have a gradient if they are learnable."""

    codes: Tensor  # [C, M, D], in the rows' dtype; [C, M, k, D] for the k nearest
    indices: Tensor  # [C, M] int64, in [0, K); [C, M, k]
    codebooks: Tensor  # [C, K, D], the codes that were searched


class EmaUpdate(NamedTuple):
    """How a call moves the averages and the codes, see `VectorQuantize.forward`."""

    ema_update: bool | None = None
    weight: Weight | None = None
    accumulate: bool = False


class CompatCodebook(Codebook):
    """C codebooks, with leading=(C,), under the state-dict names of vector_quantize_pytorch.

    Rows and codes are unit vectors if the metric is "cosine". The attributes `decay`, `eps`, `ema_update`,
    `threshold_ema_dead_code`, `codebook_size` and `use_cosine_sim` have their names there.

    Args:
        leading, num_codes, code_dim, options: as for `Codebook`.
        manual_ema_update: whether the codes move only when `update_ema` is called.
        vq_bridge: a module that makes the codes [C, K, D] to search from `embed`, or None.
        sync_kmeans: False is an error with several ranks, because they would get different codebooks.

    Attributes:
        embed: [C, K, D], the codes; a Parameter or a buffer.
        cluster_size: [C, K], the average number of rows of each code.
        embed_avg: [C, K, D], the average sum of these rows.
        initted: [] float32, 0 until k-means has run. An average with a codebook that has begun is more than 0.
        reset_cluster_size: the average number of rows of a code that was reset.
        resets_in_forward: whether a training step resets dead codes; otherwise only `expire_codes_` does.
    """

    state_names = ("embed", "cluster_size", "embed_avg")
    size_names = ("heads", "codebook_size", "codebook_dim")

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def __init__(
        self,
        leading: tuple[int, ...],
        num_codes: int,
        code_dim: int,
        *,
        manual_ema_update: bool = False,
        vq_bridge: nn.Module | None = None,
        sync_kmeans: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(leading, num_codes, code_dim, **options)
        self.reset_cluster_size = self.min_cluster_size
        self.manual_ema_update = manual_ema_update
        self.vq_bridge = vq_bridge
        self.sync_kmeans = sync_kmeans
        self.resets_in_forward = True
        self._accumulated: list[RowSums] = []

    def _register_counts(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("initted", torch.tensor(float(self.init != "kmeans"), dtype=torch.float32))

    def forward(
        self,
        rows: Tensor,
        mask: Tensor | None,
        learns: bool,
        update: EmaUpdate = EmaUpdate(),  # noqa: B008
        topk: int | None = None,
    ) -> Found:
        """Runs k-means if needed, searches rows [C, M, D] without a gradient, and then learns from the rows.

        mask [M] bool says which rows count; with None all do. With `topk`, it finds the k nearest codes and learns
        nothing.
        """
        if learns:
            check_no_vmap()
        updates = learns and topk is None and self._updates(update)
        if updates or (learns and self._copies) or self.init == "kmeans":
            self._check_owned()
        if updates and self.searched_codebook is None:  # `ema_update` or `threshold_ema_dead_code` was set later
            self.register_buffer("searched_codebook", self._codes.detach().clone(), persistent=False)
        captured = torch.compiler.is_exporting() or is_tracing() or is_vmapped()
        if self.init == "kmeans" and captured and not self.training:  # for inference, so it writes to no buffer
            torch._assert_async(
                (unmapped(self.initted) > 0).all(),
                "the layer was exported or mapped before k-means; call it on a batch before that",
            )
        elif self.init == "kmeans" and not is_recomputing():
            self.init_embed_(rows, mask)
        searched = [self._to_search(p, head, learns) for p, head in enumerate(rows)]
        codebooks = self._differentiable(dict(enumerate(searched)), learns)
        to_search = searched
        if self.vq_bridge is not None:
            codebooks = self.vq_bridge(codebooks)
            to_search = list(codebooks.detach())
        found = [self._search(*head, topk) for head in zip(rows, to_search, strict=True)]
        indices, codes = (stack(parts) for parts in zip(*found, strict=True))
        if self.learnable:
            codes = stack([F.embedding(*head) for head in zip(indices, codebooks, strict=True)]).to(rows.dtype)
        if updates:
            self._learn(rows, searched, indices, mask, update)
        return Found(codes, indices, codebooks)

    def _to_search(self, p: int, rows: Tensor, learns: bool) -> Tensor:
        if not self.resets_in_forward:  # several stages search it in a step, so no one batch identifies the pass
            rows = self.searched_rows[p]
        return super()._to_search(p, rows, learns)

    def _search(self, rows: Tensor, codes: Tensor, topk: int | None) -> tuple[Tensor, Tensor]:
        """Returns the indices and codes of rows [M, D], [M] and [M, D]; or [M, k] and [M, k, D]."""
        cosine = self.metric == "cosine"
        if topk is None:
            return (most_similar_code if cosine else nearest_code)(rows, codes, backend=self.backend)[:2]
        indices = most_similar_codes(rows, codes, topk) if cosine else nearest_code_topk(rows, codes, topk).indices
        return indices, codes[indices].to(rows.dtype)

    def _updates(self, update: EmaUpdate) -> bool:
        """Whether a training step with these options has averages to move."""
        moves_codes = self.follows_means if update.ema_update is None else update.ema_update
        return moves_codes or self.has_dead_code_replacement

    @torch.no_grad()
    def _learn(
        self, rows: Tensor, searched: list[Tensor], indices: Tensor, mask: Tensor | None, update: EmaUpdate
    ) -> None:
        """Updates the averages and the codes, and resets dead codes."""
        if is_recomputing():
            if self.resets_in_forward:
                self._reset_dead(rows, [])
            return
        if not torch.compiler.is_compiling():
            self._drawn = [False] * len(rows)
        counted = [self._counted(head, mask) for head in rows]
        batches = [self._row_sums(*head) for head in zip(rows, searched, indices, counted, strict=True)]
        weight = update.weight
        if callable(weight):
            sums, counts = zip(*((batch.all_sums(), batch.counts) for batch in batches), strict=True)
            weight = weight(torch.stack(sums), torch.stack(counts))
        if self._accumulated:
            batches = [
                RowSums(a.counts + b.counts, a.all_sums() + b.all_sums())
                for a, b in zip(self._accumulated, batches, strict=True)
            ]
        self._accumulated = batches if update.accumulate else []
        if update.accumulate:
            return
        if weight is not None:
            batches = [self._weighted(p, batch, weight) for p, batch in enumerate(batches)]
        learning = self._learning()
        moves_codes = self.follows_means if update.ema_update is None else update.ema_update
        for p, batch in enumerate(batches):
            self._update_averages(p, batch, learning)
            if moves_codes and not self.manual_ema_update:
                self._follow_means(p, learning)
        if self.resets_in_forward:
            self._reset_dead(rows, counted)

    def _reset_dead(self, rows: Tensor, counted: list[Tensor]) -> None:
        """Resets dead codes to random rows of [C, M, D] that count. Draws random numbers only where a code is dead.

        A recomputation draws as many as the original pass, and resets nothing.
        """
        for p, head in enumerate(rows if self.has_dead_code_replacement and self.training else ()):
            dead = self._sizes[p] < self.min_cluster_size
            if not self._draws(p, dead):
                continue
            if is_recomputing():
                draw_sampling(rows.shape[1], rows.device)
            else:
                self._replace(p, dead, head, counted[p])

    @torch.no_grad()
    def _replace(self, p: int, dead: Tensor, rows: Tensor, counted: Tensor) -> None:
        """Resets the codes dead [K] bool of codebook p to random rows of [M, D] where counted [M] bool allows it."""
        sampling = draw_sampling(rows.shape[0], rows.device)
        dead = unless_recomputing(dead)
        drawn, replaced = random_replacements(dead, rows, counted, sampling, synchronise=self.synchronise)
        self._set_codes(p, replaced, drawn.to(self._codes.dtype), self.reset_cluster_size)

    def _weighted(self, p: int, batch: RowSums, weight: Tensor) -> RowSums:
        """Returns a batch that moves the averages of each code by its weight, [K] or [C, K], times as far."""
        if weight.shape not in (self._sizes.shape, self._sizes.shape[1:]):
            expected = f"{tuple(self._sizes.shape[1:])} or {tuple(self._sizes.shape)}"
            raise ValueError(f"ema_update_weight must be {expected}, got {tuple(weight.shape)}")
        share = weight.expand_as(self._sizes)[p].to(batch.counts)
        return RowSums(
            self._sizes[p].lerp(batch.counts, share),
            self._sums[p].lerp(batch.all_sums(), share[:, None].to(batch.sums)),
        )

    @property
    def _set_size(self) -> float:  # type: ignore[override]
        return max(1, 10 * self.min_cluster_size)  # a code may go without rows for some steps before it is reset

    # Names of vector_quantize_pytorch

    @property
    def decay(self) -> float:
        """λ of the moving averages."""
        assert isinstance(self.ema_decay, float | int)
        return self.ema_decay

    @decay.setter
    def decay(self, decay: float) -> None:
        self.ema_decay = decay

    @property
    def eps(self) -> float:
        """The smoothing of `cluster_size`."""
        return self.ema_eps

    @eps.setter
    def eps(self, eps: float) -> None:
        self.ema_eps = eps

    @property
    def ema_update(self) -> bool:
        """Whether the codes follow the means of their rows."""
        return self.follows_means

    @ema_update.setter
    def ema_update(self, ema_update: bool) -> None:
        self.follows_means = ema_update

    @property
    def threshold_ema_dead_code(self) -> float:
        """The average number of rows below which a code is reset; 0: never. Setting it sets `reset_cluster_size`."""
        return self.min_cluster_size

    @threshold_ema_dead_code.setter
    def threshold_ema_dead_code(self, threshold: float) -> None:
        self.min_cluster_size = self.reset_cluster_size = threshold

    @property
    def has_dead_code_replacement(self) -> bool:
        """Whether dead codes are reset."""
        return self.min_cluster_size > 0

    @property
    def codebook_size(self) -> int:
        """K."""
        return self.num_codes

    @property
    def num_codebooks(self) -> int:
        """C."""
        return self.embed.shape[0]

    @property
    def learnable_codebook(self) -> bool:
        """Whether `embed` is a Parameter."""
        return self.learnable

    @property
    def use_cosine_sim(self) -> bool:
        """Whether rows and codes are unit vectors."""
        return self.metric == "cosine"

    @property
    def codes_to_decode(self) -> Tensor:
        """[C, K, D]: the codes, or what the bridge makes of them."""
        return self._codes if self.vq_bridge is None else self.vq_bridge(self._codes)

    def transform_input(self, x: Tensor) -> Tensor:
        """Normalises x [..., D] for the cosine, and returns it as it is otherwise."""
        return self._normalise(x)

    def as_rows(self, x: Tensor) -> Tensor:
        """Converts x [..., D] to at least float32, and normalises it for the cosine."""
        return self._normalise(x.to(torch.promote_types(x.dtype, torch.float32)))

    @torch.no_grad()
    def init_embed_(self, data: Tensor, mask: Tensor | None = None) -> None:
        """Sets the codes by k-means of rows [C, M, D], if k-means has not run yet. mask is [M] or [C, M] bool."""
        if not self.sync_kmeans and rank_and_world(self.synchronise)[1] > 1:
            raise NotImplementedError("sync_kmeans=False needs one process, or the ranks would get different codebooks")
        needed = self.initted <= 0
        masks = [None] * len(data) if mask is None else mask.expand(len(data), -1)
        done = [
            self._start_by_kmeans(p, *head, needed, as_original=True)
            for p, head in enumerate(zip(data, masks, strict=True))
        ]
        self.initted.masked_fill_(torch.stack(done).any(), 1)

    def update_ema(self) -> None:
        """Sets the codes to the means that the averages hold. A recomputation under checkpointing changes nothing."""
        if not is_recomputing():
            for p in range(self.num_codebooks):
                self._follow_means(p, self._learning())

    def update_indices(
        self,
        x: Tensor,
        embed_ind: Tensor,
        mask: Tensor | None = None,
        ema_update_weight: Weight | None = None,
        accum_ema_update: bool = False,
        ema_update: bool | None = None,
    ) -> None:
        """Learns from rows x [b, n, D], or [C, b, n, D], as a training step that chose `embed_ind`, x's shape less D.

        mask [b, n] bool says which rows count. An index of -1 does not count.
        """
        rows = self.as_rows(x.detach()).reshape(x.shape[0] if x.dim() == 4 else 1, -1, x.shape[-1])
        indices = embed_ind.reshape(rows.shape[:2])
        update = EmaUpdate(ema_update, ema_update_weight, accum_ema_update)
        row_mask = (indices >= 0).all(dim=0)
        row_mask = row_mask if mask is None else row_mask & mask.reshape(-1)
        if self._updates(update):
            self._check_owned()
            self._learn(rows, list(self._codes.detach()), indices.clamp(min=0), row_mask, update)

    update_ema_indices = update_indices

    def expire_codes_(self, batch_samples: Tensor, seq_mask: Tensor | None = None) -> None:
        """Resets dead codes to random rows of [C, ..., D] where seq_mask [C, ...] is not False, in training mode."""
        self._check_owned()
        self._reset_dead(*self._samples(batch_samples, seq_mask))

    def replace(self, batch_samples: Tensor, batch_mask: Tensor, seq_mask: Tensor | None = None) -> None:
        """Resets the codes where batch_mask [C, K] is True as `expire_codes_` does."""
        self._check_owned()
        for p, each in enumerate(zip(batch_mask, *self._samples(batch_samples, seq_mask), strict=True)):
            self._replace(p, *each)

    def _samples(self, samples: Tensor, mask: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """Returns [C, ..., D] as rows [C, M, D], and which rows count, [M] bool each, given mask [C, ...]."""
        rows = self.as_rows(samples.detach().flatten(1, -2))
        masks = [None] * len(rows) if mask is None else mask.flatten(1)
        return rows, [self._counted(*head) for head in zip(rows, masks, strict=True)]

    def _end_wait(self) -> None:
        self.initted.fill_(1)
