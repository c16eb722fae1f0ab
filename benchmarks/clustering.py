"""Compares k-means, residual and product quantization with faiss and scikit-learn: error and training time.

    OMP_NUM_THREADS=1 python benchmarks/clustering.py --out results/clustering.jsonl

All get the same rows and the same number of threads. For each seed they run in turn, in one process. faiss and
scikit-learn have their default settings, except that scikit-learn has `n_init=1`. faiss makes 25 iterations and trains
on at most 256 rows per centroid, so no data set here has more. With one thread the time is CPU time, which other
processes on the machine affect little; with more it is wall-clock time.

Errors and recalls are computed here from the codebooks and indices that each one returns. Our indices are checked
against float64 brute force first. If one is wrong, its row has the status WRONG, and the exit status is 1. It prints
one JSON line for each task, data set, seed and contender, such as

    {"op": "k-means", "data": "mixture", "seed": 0, "contender": "ours", "status": "ok", "inertia": 1625300.5, ...}
"""

import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import numpy as np
import torch
import tyro
from torch import Tensor
from torch.nn import functional as F

from benchmarks.results import Row, append_row, environment
from benchmarks.verification import checked_rows, wrong_rows
from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, kmeans, nearest_code, nearest_code_topk
from vq_kernels.compat.faiss import from_faiss, indices_from_faiss, to_faiss

OURS = "ours"
NUM_NEIGHBOURS = 10  # of which product quantization finds the share that is called the recall
OPS = ("k-means", "residual", "product")


@dataclass(frozen=True)
class Options:
    """Compare k-means, residual and product quantization with faiss and scikit-learn."""

    ops: tuple[str, ...] = OPS
    """Of "k-means", "residual" and "product"."""
    num_rows: int = 100_000
    """Rows to cluster by k-means."""
    num_clusters: int = 1000
    """Clusters of k-means."""
    row_dim: int = 32
    """Dimension of these rows."""
    num_embeddings: int = 65_536
    """Vectors to quantize by residual and product quantization."""
    embedding_dim: int = 64
    """Their dimension, a multiple of num_parts."""
    bits: int = 8
    """Bits of an index; a codebook has 2^bits codes."""
    num_stages: int = 4
    """Stages of residual quantization."""
    num_parts: int = 8
    """Parts of product quantization."""
    num_queries: int = 1000
    """Vectors whose nearest neighbours are searched."""
    seeds: int = 3
    """Seeds of the data and of all contenders: 0, 1, ..."""
    threads: int = 1
    """Threads of every contender."""
    out: Path | None = None
    """Append the JSON lines to this file too."""


def mixture(num_rows: int, dim: int, seed: int) -> Tensor:
    """1,000 Gaussian clusters of equal size that overlap little: rows [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(1000, dim, generator=generator)
    cluster = torch.randint(1000, (num_rows,), generator=generator)
    return centres[cluster] + 0.7 * torch.randn(num_rows, dim, generator=generator)


def spectrum(num_rows: int, dim: int, seed: int) -> Tensor:
    """One Gaussian whose variances fall as 1, 1/2, 1/3, ..., without clusters: rows [N, D]."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num_rows, dim, generator=generator) * torch.arange(1, dim + 1).rsqrt()


def embeddings(num_rows: int, dim: int, seed: int) -> Tensor:
    """Unit vectors [N, D] around 500 topics of unequal size, with variances 1, 1/2, 1/3, ... in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, dim + 1).rsqrt()
    basis = torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0]
    topics = torch.randn(500, dim, generator=generator) * scale
    topic = torch.multinomial(torch.arange(1, 501).pow(-0.7), num_rows, replacement=True, generator=generator)
    return F.normalize((topics[topic] + 0.6 * torch.randn(num_rows, dim, generator=generator) * scale) @ basis)


CLUSTERED: dict[str, Callable[[int, int, int], Tensor]] = {"mixture": mixture, "spectrum": spectrum}


class Timer:
    """Seconds in a `with` block: of CPU time with one thread, else of wall-clock time."""

    def __init__(self, threads: int) -> None:
        self._clock = time.process_time if threads == 1 else time.perf_counter
        self.seconds = 0.0

    def __enter__(self) -> "Timer":
        self._start = self._clock()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds += self._clock() - self._start


def is_right(x: Tensor, codebook: Tensor, indices: Tensor) -> bool:
    """Whether indices [N] are the nearest codes of x [N, D], on as many rows as a few seconds allow."""
    rows = checked_rows(x.shape[0], *codebook.shape, budget=2e8)
    return not wrong_rows(x[rows], codebook, indices[rows]).any()


# -- k-means


def compare_kmeans(options: Options, data: str, seed: int) -> Iterator[Row]:
    """Yields the row of each contender."""
    import faiss
    from sklearn.cluster import KMeans

    x = CLUSTERED[data](options.num_rows, options.row_dim, seed)
    sizes = {"N": options.num_rows, "K": options.num_clusters, "D": options.row_dim}

    def ours() -> tuple[Any, int]:
        result = kmeans(x, options.num_clusters, seed=seed)
        return result.codebook, result.num_iterations

    def by_faiss() -> tuple[Any, int]:
        trained: Any = faiss.Kmeans(options.row_dim, options.num_clusters, seed=seed)
        trained.train(x.numpy())
        return trained.centroids, len(trained.iteration_stats)

    def by_sklearn() -> tuple[Any, int]:
        trained = KMeans(options.num_clusters, n_init=1, random_state=seed).fit(x.numpy())
        return trained.cluster_centers_, trained.n_iter_

    for name, train in {OURS: ours, "faiss": by_faiss, "scikit-learn": by_sklearn}.items():
        timer = Timer(options.threads)
        with timer:
            codebook, iterations = train()
        codebook = torch.as_tensor(codebook)
        found = nearest_code(x, codebook)
        inertia = float(found.sq_distances.sum(dtype=torch.float64))
        right = is_right(x, codebook, found.indices)
        yield _row("k-means", data, seed, name, right, timer, inertia=inertia, iterations=int(iterations), **sizes)


# -- Residual quantization


def compare_residual(options: Options, data: str, seed: int) -> Iterator[Row]:
    """Yields the row of each contender, with the share of the variance that is left after each stage."""
    import faiss
    from sklearn.cluster import KMeans

    x = embeddings(options.num_embeddings, options.embedding_dim, seed)
    sizes = {"N": x.shape[0], "K": 2**options.bits, "D": x.shape[1], "stages": options.num_stages}

    def ours(timer: Timer) -> tuple[Tensor, Tensor]:
        quantizer = ResidualVectorQuantizer(options.num_stages, 2**options.bits, options.embedding_dim).eval()
        with timer:
            quantizer.fit(x, seed=seed)
        return quantizer.codebook.detach(), quantizer.encode(x)

    def by_faiss(timer: Timer, beam_size: int | None) -> tuple[Tensor, Tensor]:
        index = faiss.IndexResidualQuantizer(options.embedding_dim, options.num_stages, options.bits)
        index.rq.max_beam_size = beam_size or index.rq.max_beam_size
        index.rq.cp.seed = seed + 1
        with timer:
            index.train(x.numpy())
        index.add(x.numpy())
        return from_faiss(index).codebook.detach(), indices_from_faiss(index)

    def by_sklearn(timer: Timer) -> tuple[Tensor, Tensor]:
        residual, stages = x.numpy(), []
        with timer:
            for _ in range(options.num_stages):
                trained = KMeans(2**options.bits, n_init=1, random_state=seed).fit(residual)
                residual = residual - trained.cluster_centers_[trained.labels_]
                stages.append(trained)
        codebook = torch.from_numpy(np.stack([trained.cluster_centers_ for trained in stages]))
        indices = torch.from_numpy(np.stack([trained.labels_ for trained in stages], axis=1))
        return codebook, indices.long()

    contenders: dict[str, Callable[[Timer], tuple[Tensor, Tensor]]] = {
        OURS: ours,
        "faiss, greedy": partial(by_faiss, beam_size=1),
        "faiss, beam": partial(by_faiss, beam_size=None),
        "scikit-learn": by_sklearn,
    }
    variance = float((x - x.mean(dim=0)).square().sum())
    for name, train in contenders.items():
        timer = Timer(options.threads)
        codebook, indices = train(timer)
        residual, errors, right = x, [], True
        for codes, chosen in zip(codebook, indices.unbind(1), strict=True):
            right = right and (name != OURS or is_right(residual, codes, chosen))
            residual = residual - codes[chosen]
            errors.append(float(residual.square().sum()) / variance)
        yield _row("residual", data, seed, name, right, timer, errors=errors, **sizes)


# -- Product quantization


def compare_product(options: Options, data: str, seed: int) -> Iterator[Row]:
    """Yields the row of each contender, with the recall of a search by faiss in its codes."""
    import faiss

    drawn = embeddings(options.num_embeddings + options.num_queries, options.embedding_dim, seed)
    x, queries = drawn[: options.num_embeddings], drawn[options.num_embeddings :]
    parts, part_dim = options.num_parts, options.embedding_dim // options.num_parts
    sizes = {"N": x.shape[0], "K": 2**options.bits, "D": x.shape[1], "parts": parts, "queries": queries.shape[0]}
    nearest = nearest_code_topk(queries, x, NUM_NEIGHBOURS).indices

    def ours(timer: Timer, **fit_options: Any) -> Any:
        quantizer = VectorQuantizer(2**options.bits, part_dim, heads=parts, separate_codebooks=True).eval()
        with timer:
            quantizer.fit(x, seed=seed, **fit_options)
        return to_faiss(quantizer, quantizer.encode(x))

    def by_faiss(timer: Timer) -> Any:
        index = faiss.IndexPQ(options.embedding_dim, parts, options.bits)
        index.pq.cp.seed = seed + 1
        with timer:
            index.train(x.numpy())
        index.add(x.numpy())
        return index

    contenders: dict[str, Callable[[Timer], Any]] = {
        OURS: ours,
        f"{OURS}, tolerance=0.003": partial(ours, tolerance=0.003),
        "faiss": by_faiss,
    }
    for name, train in contenders.items():
        timer = Timer(options.threads)
        index = train(timer)
        found = torch.from_numpy(index.search(queries.numpy(), NUM_NEIGHBOURS)[1])
        recall = float((found[:, :, None] == nearest[:, None, :]).any(dim=2).double().mean())
        decoded = torch.from_numpy(index.reconstruct_n(0, x.shape[0]))
        error = float((x - decoded).square().sum() / (x - x.mean(dim=0)).square().sum())
        books, indices = from_faiss(index).codebook.detach(), indices_from_faiss(index)
        each = zip(torch.split(x, part_dim, 1), books.view(parts, -1, part_dim), indices.view(-1, parts).T, strict=True)
        right = name == "faiss" or all(is_right(*part) for part in each)
        yield _row("product", data, seed, name, right, timer, recall=recall, error=error, **sizes)


# -- The run


def _row(op: str, data: str, seed: int, contender: str, right: bool, timer: Timer, **figures: Any) -> Row:
    timed = {"seconds": timer.seconds} if right else {}
    status = "ok" if right else "WRONG"
    return {"op": op, "data": data, "seed": seed, "contender": contender, "status": status, **figures, **timed}


_TASKS: tuple[tuple[str, str, Callable[[Options, str, int], Iterator[Row]]], ...] = (
    *(("k-means", data, compare_kmeans) for data in CLUSTERED),
    ("residual", "embeddings", compare_residual),
    ("product", "embeddings", compare_product),
)


def run(options: Options) -> Iterator[Row]:
    """Yields the rows, seed after seed."""
    import faiss
    from threadpoolctl import threadpool_limits

    torch.set_num_threads(options.threads)
    faiss.omp_set_num_threads(options.threads)
    kmeans(torch.randn(100, 2), 3)  # the first call loads libraries
    shared = {"threads": options.threads, "timing": "CPU time" if options.threads == 1 else "wall clock"}
    shared |= environment(torch.device("cpu"))
    with threadpool_limits(options.threads):
        for seed in range(options.seeds):
            for op, data, compare in _TASKS:
                if op in options.ops:
                    yield from (row | shared for row in compare(options, data, seed))


def main(options: Options) -> int:
    """Prints the lines and returns the exit status."""
    status = 0
    for row in run(options):
        print(json.dumps(row), flush=True)
        if options.out is not None:
            append_row(options.out, row)
        status = max(status, int(row["status"] != "ok"))
    return status


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/clustering.py", description=__doc__)))
