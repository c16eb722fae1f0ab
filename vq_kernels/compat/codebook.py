"""The codebook of `VectorQuantize`: the shared `Codebook` with the names and the step of vector_quantize_pytorch."""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels.cosine import most_similar_code
from vq_kernels.learning.dead_codes import draw_sampling
from vq_kernels.learning.recompute import is_recomputing
from vq_kernels.modules.codebook import Codebook, stack
from vq_kernels.search import nearest_code
from vq_kernels.search.validation import check_no_vmap, is_tracing


class Found(NamedTuple):
    """The result of a search for rows [C, M, D]. Codes have a gradient if they are learnable."""

    codes: Tensor  # [C, M, D], in the rows' dtype
    indices: Tensor  # [C, M] int64, in [0, K)
    codebooks: Tensor  # [C, K, D], the codes that were searched


class CompatCodebook(Codebook):
    """C codebooks, with leading=(C,), under the state-dict names of vector_quantize_pytorch.

    Rows and codes are unit vectors if the metric is "cosine".

    Attributes:
        embed: [C, K, D], the codes; a Parameter or a buffer.
        cluster_size: [C, K], the average number of rows of each code.
        embed_avg: [C, K, D], the average sum of these rows.
        initted: [] float32, 0 until k-means has run. An average with a codebook that has begun is more than 0.
    """

    state_names = ("embed", "cluster_size", "embed_avg")
    size_names = ("heads", "codebook_size", "codebook_dim")

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor

    def _register_counts(self, shape: tuple[int, ...]) -> None:
        self.register_buffer("initted", torch.tensor(float(self.init != "kmeans"), dtype=torch.float32))

    def forward(self, rows: Tensor, mask: Tensor | None, learns: bool) -> Found:
        """Runs k-means if needed, searches rows [C, M, D] without a gradient, and then learns from the rows.

        mask [M] bool says which rows count; with None all do.
        """
        if learns:
            check_no_vmap()
        if (learns and self._copies) or self.init == "kmeans":
            self._check_owned()
        captured = torch.compiler.is_exporting() or is_tracing()
        if self.init == "kmeans" and captured and not self.training:  # for inference, so it writes to no buffer
            torch._assert_async(
                self.initted > 0, "the layer was exported before k-means; call it on a batch before that"
            )
        elif self.init == "kmeans" and not is_recomputing():
            needed = self.initted <= 0
            done = [self._start_by_kmeans(p, head, mask, needed, as_original=True) for p, head in enumerate(rows)]
            self.initted.masked_fill_(torch.stack(done).any(), 1)
        searched = [self._to_search(p, learns) for p in range(len(rows))]
        codebooks = self._differentiable(searched, learns)
        search = most_similar_code if self.metric == "cosine" else nearest_code
        found = [search(head, codes, backend=self.backend)[:2] for head, codes in zip(rows, searched, strict=True)]
        indices, codes = (stack(parts) for parts in zip(*found, strict=True))
        if self.learnable:
            codes = stack([F.embedding(*head) for head in zip(indices, codebooks, strict=True)]).to(rows.dtype)
        if learns and self.searched_codebook is not None:
            self._learn(rows, searched, indices, mask)
        return Found(codes, indices, codebooks)

    @torch.no_grad()
    def _learn(self, rows: Tensor, searched: list[Tensor], indices: Tensor, mask: Tensor | None) -> None:
        """Updates the averages and the codes, and resets dead codes."""
        resets = range(len(rows) if self.min_cluster_size else 0)
        if is_recomputing():
            for _ in resets:
                draw_sampling(rows.shape[1], rows.device)  # leaves the random state of the original pass
            return
        counted = [self._counted(head, mask) for head in rows]
        batches = [self._row_sums(*head) for head in zip(rows, searched, indices, counted, strict=True)]
        self._update_averages(searched, batches, self._learning())
        for p in resets:
            self._reset_small(p, rows[p], counted[p])

    def expire(self, rows: Tensor) -> None:
        """Resets dead codes to random rows of [C, M, D]."""
        for p, head in enumerate(rows):
            self._reset_small(p, head, self._counted(head, None))

    def _end_wait(self) -> None:
        self.initted.fill_(1)
