"""k-means with exact assignments: `kmeans` for any data, and an operator for the first batch of a quantizer."""

import math
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor

from vq_kernels.cosine import most_similar_code, unit
from vq_kernels.distributed import rank_and_world, sum_over_ranks
from vq_kernels.gradient.autograd import METRICS, Metric
from vq_kernels.learning.dead_codes import random_rows
from vq_kernels.learning.ema import row_sums
from vq_kernels.search import nearest_code, nearest_code_topk
from vq_kernels.search.backend import Backend, has_float64
from vq_kernels.search.operators import WAITS
from vq_kernels.search.validation import check_at_least, check_bool, check_choice, check_codebook, check_dtype

KMeansInit = Literal["k-means++", "random"]
INITS = ("k-means++", "random")

_SAMPLE_ROWS_PER_CODE = 32  # with 16, the inertia is up to 1 % higher
_LEAST_SAMPLE = 16_384  # with fewer, residual codebooks may end 7 % higher
_SAMPLE_ITERATIONS = 6  # they cost as much as two iterations on 100 rows per code, and save four
_OVERSHOOT = 1.5  # halves the iterations where they converge slowly


class KMeansResult(NamedTuple):
    """What `kmeans` returns.

    Attributes:
        codebook: [K, D], float32 (float64 for float64 data), on x's device.
        counts: [K] int64, the rows assigned to each code, of all processes.
        inertia: the sum over all rows of the squared distance to their code.
        num_iterations: how many times the codes were moved.
        converged: whether the last iteration improved the inertia by less than `tolerance`.
    """

    codebook: Tensor
    counts: Tensor
    inertia: float
    num_iterations: int
    converged: bool


@torch.no_grad()
def kmeans(
    x: Tensor | Iterable[Tensor],
    num_codes: int,
    *,
    init: KMeansInit | Tensor = "k-means++",
    max_iterations: int = 50,
    tolerance: float = 1e-3,
    seed: int = 0,
    progress: bool = False,
    metric: Metric = "euclidean",
    backend: Backend = "auto",
    synchronise: bool = True,
) -> KMeansResult:
    """Lloyd's algorithm: assign each row to its nearest code, exactly, then move each code to the mean of its rows.

    Early iterations move the codes past the means by half, which converges faster and never raises the inertia. The
    last ones move them to the means. Clusters without rows are re-seeded by k-means++ beside the others. Sums are
    float64. The result depends on the seed.

    Args:
        x: [N, D], any dtype of `nearest_code`; or a re-iterable of such tensors, such as a list, or a DataLoader
            over a memory map. Each iteration makes one pass over it, and the initialisation one.
        num_codes: K, in [1, N].
        init: "k-means++" (greedy, then 6 iterations, on a random sample of 32·K rows, at least 16,384; codes that
            matter little move beside those whose rows are spread most), "random" (K distinct rows), or the codes,
            [K, D].
        max_iterations: at least 0, over all rows. With 0 the codes are those of `init`, without iterations.
        tolerance: at least 0; stop when an iteration lowers the inertia by less than this fraction of it.
        seed: at least 0; determines all random choices.
        progress: show a progress bar on stderr (needs tqdm).
        metric: "euclidean"; or "cosine", which normalises rows and means (spherical k-means). The inertia is then that
            of the normalised rows.
        backend: as for `nearest_code`.
        synchronise: with a default process group, x is this process's part of the data, and all processes get one
            codebook. False: of this process alone.

    Returns:
        KMeansResult(codebook [K, D], counts [K] int64, inertia, num_iterations, converged). Counts and inertia are
        those of the returned codebook.

    Raises:
        TypeError: an argument or dtype that is not supported, or an iterator that can be iterated over only once.
        ValueError: an argument out of range; fewer rows than codes; x holds NaN or Inf; batches of different D.
        RuntimeError: as for `nearest_code`.

    Source: Lloyd 1982, "Least squares quantization in PCM"; Arthur and Vassilvitskii 2007, "k-means++: the advantages
    of careful seeding", with the greedy choice among 2 + ln K candidates; Patanè and Russo 2001, "The enhanced LBG
    algorithm", for the codes that move; Salakhutdinov and Roweis 2003, "Adaptive overrelaxed bound optimization
    methods"; Dhillon and Modha 2001, "Concept decompositions for large sparse text data
    using clustering", for the cosine.
    """
    check_at_least(1, integer=True, num_codes=num_codes)
    check_at_least(0, integer=True, max_iterations=max_iterations)
    check_at_least(0, tolerance=tolerance)
    check_at_least(0, 2**63 - 1, integer=True, seed=seed)
    check_bool(progress=progress, synchronise=synchronise)
    if not isinstance(init, Tensor):
        check_choice("init", init, INITS)
    check_choice("metric", metric, METRICS)
    batches = _Batches(x, metric, backend, synchronise)
    codebook = _initial_codebook(batches, num_codes, init, min(max_iterations, _SAMPLE_ITERATIONS), tolerance, seed)
    with _progress_bar(max_iterations, shown=progress) as advance:
        return _iterate(batches, codebook, max_iterations, tolerance, seed, advance)


def _iterate(
    batches: "_Batches",
    codebook: Tensor,
    max_iterations: int,
    tolerance: float,
    seed: int,
    advance: Callable[[float], None] = lambda inertia: None,
    *,
    on_sample: bool = False,
) -> KMeansResult:
    """Moves the codes past the means until the inertia settles, then to the means until it settles again.

    On a sample, it moves them to the means, because more seeds stay alone otherwise, and first relocates those that
    matter little.
    """
    step, iteration, settled, converged = _assign(batches, codebook), 0, False, False
    while iteration < max_iterations and not converged:
        plain = settled or on_sample or iteration == max_iterations - 1
        codebook = _move(batches, codebook, step, 1.0 if plain else _OVERSHOOT, seed + 1 + iteration)
        relocates = on_sample and 0 < iteration < max_iterations - 1
        if relocates:
            codebook = _relocate(batches, codebook, step, seed + 1 + iteration)
        last, step = step, _assign(batches, codebook)
        num_empty, last_empty = (int((each.counts == 0).sum()) for each in (step, last))
        filled = num_empty in (0, last_empty)  # or re-seeding fills no more, because too few rows are distinct
        settled = last.inertia - step.inertia <= tolerance * step.inertia and filled and not relocates
        converged = settled and plain
        iteration += 1
        advance(step.inertia)
    return KMeansResult(codebook, step.counts, step.inertia, iteration, converged)


@contextmanager
def _progress_bar(max_iterations: int, *, shown: bool) -> Iterator[Callable[[float], None]]:
    """Yields a function to call with the inertia after each iteration."""
    if not shown:
        yield lambda inertia: None
        return
    from tqdm import tqdm

    with tqdm(total=max_iterations, desc="k-means", unit="iteration") as bar:

        def advance(inertia: float) -> None:
            bar.set_postfix(inertia=f"{inertia:.6g}", refresh=False)
            bar.update()

        yield advance


class Mapped:
    """Batches with a function applied to each, anew in every pass.

    Raises:
        TypeError: the batches are an iterator, which allows only one pass.
    """

    def __init__(self, batches: Iterable[Tensor], function: Callable[[Tensor], Tensor]) -> None:
        if not isinstance(batches, Iterable) or isinstance(batches, Iterator):
            kind = type(batches).__name__
            raise TypeError(f"x must be a tensor or re-iterable, such as a list or a DataLoader, got {kind}")
        self._batches = batches
        self._function = function

    def __iter__(self) -> Iterator[Tensor]:
        return map(self._function, self._batches)


class _Batches(Mapped):
    """The data as batches [n, D], checked as they come, in at least float32, on a device with float64.

    For the cosine their rows are normalised.
    """

    def __init__(self, x: Tensor | Iterable[Tensor], metric: Metric, backend: Backend, synchronise: bool) -> None:
        super().__init__([x] if isinstance(x, Tensor) else x, self._checked)
        self._code_dim = 0
        self.metric: Metric = metric
        self.backend: Backend = backend
        self.synchronise = synchronise

    def _checked(self, batch: Tensor) -> Tensor:
        check_dtype("x", batch)
        if batch.dim() != 2 or batch.shape[1] < 1 or self._code_dim not in (0, batch.shape[1]):
            expected = f"[N, {self._code_dim}], as its first batch," if self._code_dim else "[N, D]"
            raise ValueError(f"x must be {expected}, got {tuple(batch.shape)}")
        self._code_dim = batch.shape[1]
        batch = batch.detach() if has_float64(batch.device) else batch.detach().cpu()
        return self.normalise(batch.to(torch.promote_types(batch.dtype, torch.float32)))

    def normalise(self, rows: Tensor) -> Tensor:
        """Unit vectors for the cosine, else the rows [n, D]."""
        return unit(rows) if self.metric == "cosine" else rows

    def sample(self, num_rows: int, seed: int) -> Tensor:
        """Rows drawn at random from all processes' data, [n, D], n >= num_rows where there are as many.

        Each row gets a random key, and the rows with the smallest keys are kept, so a pass needs memory for the sample
        and one batch.
        """
        rank, _ = rank_and_world(self.synchronise)
        generator = torch.Generator().manual_seed(seed + 1_000_003 * rank)
        kept, keys, num_seen = torch.empty(0), torch.empty(0, dtype=torch.float64), 0
        for batch in self:
            keys = torch.cat([keys, torch.rand(batch.shape[0], generator=generator, dtype=torch.float64)])
            keys, place = keys.topk(min(num_rows, keys.numel()), largest=False)
            kept = (torch.cat([kept, batch]) if num_seen else batch)[place.to(batch.device)]
            num_seen += batch.shape[0]
        counts = _gather(torch.tensor([num_seen], device=kept.device), self.synchronise)
        share = min(1.0, num_rows / max(int(counts.sum()), 1))
        return _gather(kept[: math.ceil(share * num_seen)], self.synchronise)


class _Assignment(NamedTuple):
    """The sums of one pass over the data of all processes, for each code."""

    sums: Tensor  # [K, D] float64
    counts: Tensor  # [K] int64
    sq_distances: Tensor  # [K] float64
    inertia: float


def _initial_codebook(
    batches: _Batches, num_codes: int, init: KMeansInit | Tensor, iterations: int, tolerance: float, seed: int
) -> Tensor:
    """[K, D], the same in all processes. After k-means++, makes some iterations on the sample."""
    if isinstance(init, Tensor):
        check_codebook(init)
        if init.shape[0] != num_codes:
            raise ValueError(f"init must be [{num_codes}, D] to match num_codes, got {tuple(init.shape)}")
        return batches.normalise(init.detach().clone())
    rows = batches.sample(_sample_size(num_codes) if init == "k-means++" else num_codes, seed)
    if rows.shape[0] < num_codes:
        raise ValueError(f"x must have at least num_codes = {num_codes} rows, got {rows.shape[0]}")
    not_finite = int((~rows.isfinite().all(dim=1)).sum())
    if not_finite:
        raise ValueError(f"x must be finite, got NaN or Inf in {not_finite} of {rows.shape[0]} rows")
    generator = torch.Generator().manual_seed(seed)
    if init == "random":
        return rows[torch.randperm(rows.shape[0], generator=generator)[:num_codes].to(rows.device)]
    seeds = rows[_seed_rows(rows, num_codes, generator)]
    rank, world = rank_and_world(batches.synchronise)
    part = _Batches(rows[rank::world], batches.metric, batches.backend, batches.synchronise)
    return _iterate(part, seeds, iterations, tolerance, seed, on_sample=True).codebook


def _sample_size(num_codes: int) -> int:
    return max(_SAMPLE_ROWS_PER_CODE * num_codes, _LEAST_SAMPLE)


def _seed_rows(rows: Tensor, num_seeds: int, generator: torch.Generator, codebook: Tensor | None = None) -> Tensor:
    """Greedy k-means++: the indices [num_seeds] of the rows [n, D] to begin at.

    Each next row is the best of a few drawn with probability proportional to the squared distance to the rows chosen,
    and to the codes [K, D] that are there already.
    """
    num_candidates = 2 + int(math.log(num_seeds))
    centre = rows.mean(dim=0)
    centred = rows - centre
    half_norms = centred.square().sum(dim=1).mul_(0.5)
    chosen = torch.randint(rows.shape[0], (num_seeds,), generator=generator).to(rows.device)
    if codebook is None:
        closest, candidates = torch.full_like(half_norms, torch.inf), chosen[:1]
    else:
        closest, candidates = nearest_code(rows, codebook).sq_distances.to(rows.dtype) / 2, None
    for place in range(num_seeds):
        if place or candidates is None:
            mass = closest.cumsum(0, dtype=torch.float64)
            draws = torch.rand(num_candidates, generator=generator, dtype=torch.float64).to(rows.device) * mass[-1]
            candidates = torch.searchsorted(mass, draws, right=True).clamp_(max=rows.shape[0] - 1)
        distances = torch.addmm(half_norms, centred[candidates], centred.t(), alpha=-1)  # [candidates, n]
        distances = torch.minimum(distances.add_(half_norms[candidates, None]), closest, out=distances)
        best = distances.sum(dim=1).argmin()
        closest, chosen[place] = distances[best].clamp(min=0), candidates[best]
    return chosen


def _assign(batches: _Batches, codebook: Tensor) -> _Assignment:
    """One pass over the data: each row to its nearest code."""
    num_codes, code_dim = codebook.shape
    totals = codebook.new_zeros(num_codes, code_dim + 2, dtype=torch.float64)  # sums, counts, squared distances
    sums, counts, distances = torch.split(totals, [code_dim, 1, 1], dim=1)
    for batch in batches:
        if batches.metric == "cosine":
            similar = most_similar_code(batch, codebook, backend=batches.backend)
            indices, sq_distances = similar.indices, (batch - similar.codes).square().sum(dim=1)
        else:
            indices, _, sq_distances = nearest_code(batch, codebook, backend=batches.backend)
        not_finite = int(sq_distances.isnan().sum())
        if not_finite:
            raise ValueError(f"x must be finite, got NaN or Inf in {not_finite} of {batch.shape[0]} rows")
        sums.index_add_(0, indices, batch.double())
        counts += indices.bincount(minlength=num_codes)[:, None]
        distances[:, 0].index_add_(0, indices, sq_distances.double())
    sums, counts, distances = torch.split(sum_over_ranks(totals, batches.synchronise), [code_dim, 1, 1], dim=1)
    return _Assignment(sums, counts[:, 0].long(), distances[:, 0], float(distances.sum()))


def _move(batches: _Batches, codebook: Tensor, step: _Assignment, stride: float, seed: int) -> Tensor:
    """Moves the codes [K, D] towards the means of their rows: with stride 1 to the means, with 1.5 past them by half.

    Codes without rows are re-seeded by k-means++, given the others.
    """
    means = batches.normalise(step.sums / step.counts.clamp(min=1)[:, None])
    moved = batches.normalise(codebook.double().lerp(means, stride)).to(codebook.dtype)
    empty = (step.counts == 0).nonzero()[:, 0]
    if empty.numel():
        rows = batches.sample(_sample_size(codebook.shape[0]), seed)
        generator = torch.Generator().manual_seed(seed)
        moved[empty] = rows[_seed_rows(rows, empty.numel(), generator, moved[step.counts > 0])].to(moved.dtype)
    return moved


def _relocate(batches: _Batches, codebook: Tensor, step: _Assignment, seed: int) -> Tensor:
    """Moves the codes that matter least beside those whose rows are spread most, while that lowers the inertia.

    Without code k, it grows by n_k·|c_k - c|² at most, for the nearest other code c. A second code for the n_j rows of
    code j, at squared distances S_j in sum, lowers it by about 2·S_j / (π·D)·(1 + √(D / n_j))² if they are normal and
    alike in all directions: by 2/π of the variance along the direction where n_j such rows spread most (Marchenko and
    Pastur 1967). A t-th further code lowers it by about 1/t of this. So codes that k-means++ left alone with an outlier
    do not stay there.
    """
    num_codes, code_dim = codebook.shape
    if num_codes == 1:
        return codebook
    losses = step.counts * nearest_code_topk(codebook, codebook, 2).sq_distances[:, 1]
    num_rows = step.counts.clamp(min=1).double()
    shares = 2 / (math.pi * code_dim) * (1 + (code_dim / num_rows).sqrt()).square()
    gains = step.sq_distances * shares.clamp(max=1) / torch.arange(1, 9, device=num_rows.device)[:, None]  # [8, K]
    losses, least = losses.sort()
    gains, most = gains.flatten().topk(num_codes)
    num_moved = int((losses < gains).sum())
    moved, place = least[:num_moved], most[:num_moved] % num_codes
    deviations = (step.sq_distances / (num_rows * code_dim)).sqrt()[place, None]
    directions = unit(torch.randn(num_moved, code_dim, generator=torch.Generator().manual_seed(seed)))
    codebook[moved] = codebook[place] + (0.5 * deviations * directions.to(deviations)).to(codebook.dtype)
    return batches.normalise(codebook)


def _gather(rows: Tensor, synchronise: bool) -> Tensor:
    """The rows [n, ...] of all processes, in the order of their ranks; n may differ, the rest of the shape may not."""
    rank, world = rank_and_world(synchronise)
    if world == 1:
        return rows
    counts = torch.zeros(world, dtype=torch.int64, device=rows.device)
    counts[rank] = rows.shape[0]
    counts = sum_over_ranks(counts, synchronise)
    start = int(counts[:rank].sum())
    gathered = rows.new_zeros(int(counts.sum()), *rows.shape[1:])
    gathered[start : start + rows.shape[0]] = rows
    return sum_over_ranks(gathered, synchronise)


@torch.library.custom_op(
    "vq_kernels::kmeans_if_needed", mutates_args=(), tags=(torch.Tag.nondeterministic_seeded, *WAITS)
)
def kmeans_if_needed(
    needed: Tensor,
    rows: Tensor,
    counted: Tensor,
    num_codes: int,
    num_iterations: int,
    cosine: bool,
    synchronise: bool,
    backend: str,
    keep_random_state: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Runs Lloyd's algorithm from random rows, if it is needed and there are rows.

    Args:
        needed: [] bool, equal on all ranks. Reading it waits for the device.
        rows: [M, D], float32 or float64; unit vectors if `cosine`.
        counted: [M] bool, the rows to use. Rows with NaN or Inf are never used.
        num_codes: K. If there are fewer rows, they are repeated.
        num_iterations: >= 1.
        cosine: assign by the dot product, and normalise the means.
        synchronise: as for `row_sums`.
        backend: as for `nearest_code`.
        keep_random_state: leave the global random state as it is, because a recomputation does not run k-means.

    Returns:
        means [K, D] and counts [K] of the last iteration, in the dtype of rows; done [] bool. If it is false, nothing
        was done and the other two are 0.
    """
    nothing = rows.new_zeros(num_codes, rows.shape[1]), rows.new_zeros(num_codes), torch.zeros_like(needed)
    if not needed:
        return nothing
    counted = counted & rows.isfinite().all(dim=1)
    slots = torch.arange(num_codes, device=rows.device)
    with torch.random.fork_rng([rows.device] if rows.is_cuda else [], enabled=keep_random_state):
        permutation = torch.randperm(rows.shape[0], device=rows.device)
    means, found = random_rows(rows, counted, permutation, slots, synchronise=synchronise)
    if not found.any():
        return nothing
    distinct = means[found]
    means[~found] = distinct[slots[: num_codes - distinct.shape[0]] % distinct.shape[0]]

    counts = nothing[1]
    for _ in range(num_iterations):
        search = most_similar_code if cosine else nearest_code  # an operator's schema has no Literal
        indices = search(rows, means, backend=cast(Backend, backend)).indices
        batch = row_sums(rows, means, indices, counted, synchronise=synchronise, backend=backend)
        counts, moved = batch.counts, batch.all_sums() / batch.counts.clamp(min=1)[:, None]
        means = torch.where((counts > 0)[:, None], unit(moved) if cosine else moved, means)
    return means, counts, torch.ones_like(needed)


@kmeans_if_needed.register_fake
def _(needed: Tensor, rows: Tensor, counted: Tensor, num_codes: int, *_: Any) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(num_codes, rows.shape[1]), rows.new_empty(num_codes), torch.empty_like(needed)
