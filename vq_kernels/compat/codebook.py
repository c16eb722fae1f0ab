"""The codebook of `VectorQuantize`: its search, its moving averages, its beginning by k-means, its dead codes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vq_kernels.cosine import most_similar_code, unit
from vq_kernels.gradient.autograd import straight_through
from vq_kernels.learning.dead_codes import draw_lots, draw_replacements
from vq_kernels.learning.ema import RowSums, mean_codes, move_averages_, row_sums, smoothed_sizes
from vq_kernels.learning.kmeans import kmeans_if_needed
from vq_kernels.learning.recompute import copy_to_search, is_second_pass, of_first_pass, unless_second_pass
from vq_kernels.search import nearest_code
from vq_kernels.search.backend import Backend


class Chosen(NamedTuple):
    """What a codebook gives rows [C, M, D].

    Attributes:
        codes: [C, M, D], in the rows' dtype; differentiable, if the codes are learnable.
        indices: [C, M] int64, in [0, K).
        finite: [C, M] bool: false for a row that holds NaN or Inf, whose index is no choice.
    """

    codes: Tensor
    indices: Tensor
    finite: Tensor


class Codebook(nn.Module):
    """C codebooks of K codes, under the names that vector_quantize_pytorch gives them in a state dict.

    Under gradient checkpointing the second forward pass of a batch finds the codes that the first one searched, draws
    the same random numbers, and learns nothing.

    Args:
        num_codebooks, num_codes, code_dim: C, K, D.
        decay, eps: see `vq_kernels.learning.ema`.
        kmeans_iters: begin with so many iterations of k-means on the first batch; 0: at random.
        cosine: rows are unit vectors, and the search is for the largest dot product.
        dead_below: a code whose average number of rows is under it is put where a random row is; 0: never.
        learnable: the codes are a Parameter.
        ema: the codes follow the means of their rows.
        synchronise: over the ranks of the process group, if there is one when a batch comes.
        backend: as for `nearest_code`.

    Attributes:
        embed: [C, K, D], the codes; a Parameter or a buffer.
        cluster_size: [C, K], moving average of the rows of each code.
        embed_avg: [C, K, D], moving average of their sum.
        initted: [] bool, whether the codes no longer wait for k-means.
        last_searched: [C, K, D], the codes before what they learned last, in no state dict; or None: they do not learn.
    """

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    initted: Tensor
    last_searched: Tensor | None

    def __init__(
        self,
        num_codebooks: int,
        num_codes: int,
        code_dim: int,
        *,
        decay: float,
        eps: float,
        kmeans_iters: int,
        cosine: bool,
        dead_below: float,
        learnable: bool,
        ema: bool,
        synchronise: bool,
        backend: Backend,
    ) -> None:
        super().__init__()
        self.decay = decay
        self.eps = eps
        self.kmeans_iters = kmeans_iters
        self.cosine = cosine
        self.dead_below = dead_below
        self.learnable = learnable
        self.ema = ema
        self.synchronise = synchronise
        self.backend: Backend = backend
        codes = torch.zeros(num_codebooks, num_codes, code_dim)
        if not kmeans_iters:
            nn.init.kaiming_uniform_(codes)
            codes = unit(codes) if cosine else codes
        self.register_buffer("initted", torch.tensor(not kmeans_iters))
        self.register_buffer("cluster_size", torch.ones(num_codebooks, num_codes))
        self.register_buffer("embed_avg", codes.clone())
        self.register_buffer("last_searched", codes.clone() if ema or dead_below else None, persistent=False)
        if learnable:
            self.embed = nn.Parameter(codes)
        else:
            self.register_buffer("embed", codes)

    @torch.no_grad()
    def begin(self, rows: Tensor, mask: Tensor | None) -> None:
        """k-means on rows [C, M, D], the first time that there are any; for `mask` see `learn`."""
        if not self.kmeans_iters or is_second_pass():
            return
        counted = torch.ones_like(rows[0, :, 0], dtype=torch.bool) if mask is None else mask
        needed = ~self.initted
        for head in range(self.embed.shape[0]):
            options = (self.embed.shape[1], self.kmeans_iters, self.cosine, self.synchronise, self.backend)
            means, counts, made = kmeans_if_needed(needed, rows[head], counted, *options)
            self.cluster_size[head].copy_(torch.where(made, counts, self.cluster_size[head]))
            self.embed_avg[head].copy_(torch.where(made, means * counts[:, None], self.embed_avg[head]))
            self.embed[head].copy_(torch.where(made, self._means(head), self.embed[head]))
            self.initted.logical_or_(made)

    def codes_to_search(self, learns: bool) -> Tensor:
        """[C, K, D], the codes for this forward pass; `learns` tells whether `learn` follows.

        A second pass gets those of the first; a gradient of theirs goes to the Parameter all the same.
        """
        if not learns or self.last_searched is None:
            return self.embed
        codes = copy_to_search(self.embed.detach(), self.last_searched)
        self.last_searched.copy_(codes)
        return straight_through(self.embed, codes) if self.learnable else codes

    def forward(self, rows: Tensor, codes: Tensor) -> Chosen:
        """Choose one of codes [C, K, D] for each of rows [C, M, D], float32 or float64, without a gradient."""
        chosen = [self._choose(rows[head], codes[head]) for head in range(codes.shape[0])]
        if len(chosen) == 1:  # views, where stacking would copy
            return Chosen(*(part[None] for part in chosen[0]))
        return Chosen(*(torch.stack(parts) for parts in zip(*chosen, strict=True)))

    @torch.no_grad()
    def learn(self, rows: Tensor, chosen: Chosen, mask: Tensor | None) -> None:
        """Move the averages by one batch, take their means as codes, replace dead codes.

        Written without a branch on data, for compiled graphs.

        Args:
            rows: [C, M, D], as searched.
            chosen: what the search gave.
            mask: [M] bool, which rows to learn from; None: all. From those that are not finite it never learns.
        """
        if not self.ema and not self.dead_below:
            return
        if is_second_pass():
            for _ in range(self.embed.shape[0] if self.dead_below else 0):
                draw_lots(rows.shape[1], rows.device)  # what comes behind finds the random numbers of the first pass
            return
        for head in range(self.embed.shape[0]):
            counted = chosen.finite[head] if mask is None else chosen.finite[head] & mask
            batch = row_sums(
                rows[head],
                self.embed[head],
                chosen.indices[head],
                counted,
                synchronise=self.synchronise,
                backend=self.backend,
            )
            averages = RowSums(self.cluster_size[head], self.embed_avg[head])
            batch = RowSums(*(of_first_pass(new, held) for new, held in zip(batch, averages, strict=True)))
            move_averages_(*averages, batch, self.decay)
            if self.ema:
                self.embed[head].copy_(of_first_pass(self._means(head), self.embed[head]))
            if self.dead_below:
                self.replace_dead_codes(head, rows[head], counted)

    @torch.no_grad()
    def set_codes(self, codes: Tensor) -> None:
        """Take codes [C, K, D] as they are, averages included: without rows, the next update leaves them there."""
        self.embed.copy_(codes)
        self.embed_avg.copy_(self.embed * smoothed_sizes(self.cluster_size, self.eps)[..., None])
        self.initted.fill_(True)

    @torch.no_grad()
    def replace_dead_codes(self, head: int, rows: Tensor, counted: Tensor) -> None:
        """Put the dead codes of one codebook at random rows of [M, D], of those counted [M] bool."""
        dead = unless_second_pass(self.cluster_size[head] < self.dead_below)
        lots = draw_lots(rows.shape[0], rows.device)
        drawn, replaced = draw_replacements(dead, rows, counted, lots, synchronise=self.synchronise)
        drawn = drawn.to(self.embed.dtype)
        self.cluster_size[head].masked_fill_(replaced, self.dead_below)
        self.embed[head].copy_(torch.where(replaced[:, None], drawn, self.embed[head]))
        self.embed_avg[head].copy_(torch.where(replaced[:, None], self.dead_below * drawn, self.embed_avg[head]))

    def _choose(self, rows: Tensor, codes: Tensor) -> Chosen:
        """The choice of one codebook [K, D] for rows [M, D], without the dimension C."""
        if self.cosine:
            indices, found, similarities = most_similar_code(rows, codes, backend=self.backend)
            finite = ~similarities.isnan()
        else:
            indices, found, sq_distances = nearest_code(rows, codes, backend=self.backend)
            finite = ~sq_distances.isnan()
        if self.learnable:
            found = F.embedding(indices, codes).to(rows.dtype)
        return Chosen(found, indices, finite)

    def _means(self, head: int) -> Tensor:
        """The codes that the averages stand for, [K, D]."""
        means = mean_codes(self.cluster_size[head], self.embed_avg[head], self.eps)
        return unit(means) if self.cosine else means
