"""Turn the embeddings of items into semantic IDs, check that the IDs do not change, and compare with other libraries.

python examples/semantic_ids.py                                  # synthetic items
python examples/semantic_ids.py --embeddings FILE.npy --out DIR  # your items, float32 [N, D]; saves IDs and quantizer

It compares with faiss-cpu and scikit-learn if they are installed.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from vq_kernels import ResidualVectorQuantizer, verify


def item_embeddings(num_items: int, code_dim: int = 64, seed: int = 0) -> Tensor:
    """Draw items [N, D] from 50 categories of 10 kinds each: a hierarchical Gaussian mixture, normalised."""
    generator = torch.Generator().manual_seed(seed)
    categories = torch.randn(50, 1, code_dim, generator=generator)
    kinds = (categories + 0.7 * torch.randn(50, 10, code_dim, generator=generator)).flatten(0, 1)
    popularity = torch.rand(500, generator=generator).square()
    items = kinds[torch.multinomial(popularity, num_items, replacement=True, generator=generator)]
    return F.normalize(items + 0.5 * torch.randn(num_items, code_dim, generator=generator), dim=1)


def fit_quantizer(x: Tensor, num_levels: int, num_codes: int, seed: int = 0) -> ResidualVectorQuantizer:
    """Set the codebooks by k-means, level after level."""
    quantizer = ResidualVectorQuantizer(num_levels, num_codes, x.shape[1])
    quantizer.fit(x, seed=seed)
    return quantizer.eval()


def with_last_index(indices: Tensor) -> Tensor:
    """Append to the indices [N, Q] of each item how many items before it have the same ones: unique IDs [N, Q + 1].

    Items added at the end do not change the IDs of the others.
    """
    _, group = indices.unique(dim=0, return_inverse=True)
    order = group.argsort(stable=True)
    sizes = group.bincount()
    last = torch.empty_like(group)
    last[order] = torch.arange(len(group)) - (sizes.cumsum(0) - sizes)[group[order]]
    return torch.cat([indices, last[:, None]], dim=1)


def indices_by_other_ways(quantizer: ResidualVectorQuantizer, x: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Yield the indices of the first rows of x, computed in other ways."""
    for size in (1, 17, 1000):
        yield f"batches of {size}", torch.cat([quantizer.encode(rows) for rows in x[: 256 * size].split(size)])
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(1))
    yield "shuffled", quantizer.encode(x[order])[order.argsort()]
    before = torch.get_num_threads()
    torch.set_num_threads(3 - min(before, 2))
    yield f"{torch.get_num_threads()} threads instead of {before}", quantizer.encode(x)
    yield "fitted again", fit_quantizer(x, quantizer.num_quantizers, quantizer.num_codes).encode(x)
    torch.set_num_threads(before)
    with tempfile.TemporaryDirectory() as folder:
        torch.save(quantizer.codebook.detach(), f"{folder}/codebook.pt")
        loaded = ResidualVectorQuantizer.from_codebook(torch.load(f"{folder}/codebook.pt"), freeze=True)
    yield "saved and loaded", loaded.eval().encode(x)
    if find_spec("triton"):
        loaded.backend = "triton"
        with np.errstate(over="ignore"):  # the interpreter computes with numpy
            yield "Triton backend, interpreted", loaded.encode(x[:256])


# -- Comparison: each method returns indices [N, Q] and codebooks [Q, K, D].


def by_vq_kernels(x: Tensor, num_levels: int, num_codes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fit this library's quantizer."""
    quantizer = fit_quantizer(x, num_levels, num_codes, seed)
    return quantizer.encode(x), quantizer.codebook.detach()


def by_faiss(x: Tensor, num_levels: int, num_codes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fit faiss' ResidualQuantizer, which chooses the codes greedily with a beam of 1."""
    import faiss

    num_bits = num_codes.bit_length() - 1
    faiss.omp_set_num_threads(torch.get_num_threads())
    quantizer = faiss.ResidualQuantizer(x.shape[1], num_levels, num_bits)
    quantizer.max_beam_size, quantizer.cp.seed = 1, 1234 + seed
    quantizer.train_type = faiss.ResidualQuantizer.Train_default
    quantizer.train(x.numpy())
    packed = quantizer.compute_codes(x.numpy())
    codebooks = faiss.vector_to_array(quantizer.codebooks).reshape(num_levels, num_codes, -1)
    return torch.from_numpy(faiss.unpack_bitstrings(packed, num_levels, num_bits)).long(), torch.from_numpy(codebooks)


def by_scikit_learn(x: Tensor, num_levels: int, num_codes: int, seed: int) -> tuple[Tensor, Tensor]:
    """Fit scikit-learn's KMeans, level after level."""
    from sklearn.cluster import KMeans

    residual, indices, codebooks = x.numpy(), [], []
    for _ in range(num_levels):
        level = KMeans(num_codes, n_init=1, random_state=seed).fit(residual)
        indices.append(level.predict(residual))
        codebooks.append(level.cluster_centers_)
        residual = residual - codebooks[-1][indices[-1]]
    return torch.from_numpy(np.stack(indices, axis=1)).long(), torch.from_numpy(np.stack(codebooks))


METHODS: dict[str, Callable[[Tensor, int, int, int], tuple[Tensor, Tensor]]] = {
    "vq_kernels": by_vq_kernels,
    "faiss": by_faiss,
    "scikit-learn": by_scikit_learn,
}


def measure(method: str, x: Tensor, num_levels: int, num_codes: int, seed: int) -> dict[str, Any]:
    """Return the CPU time taken, the share of the variance lost after each level, collisions and wrong indices.

    A wrong index is not that of the code nearest to the residual, by float64 brute force.
    """
    start = time.process_time()
    indices, codebooks = METHODS[method](x, num_levels, num_codes, seed)
    seconds = time.process_time() - start
    variance = (x - x.mean(dim=0)).square().sum(dim=1).mean()
    residual, errors, wrong = x, [], 0
    for codebook, chosen in zip(codebooks, indices.T, strict=True):
        wrong += verify(residual, codebook, chosen).num_wrong
        residual = residual - codebook[chosen]
        errors.append((residual.square().sum(dim=1).mean() / variance).item())
    collisions = len(x) - len(indices.unique(dim=0))
    return {"errors": errors, "collisions": collisions, "wrong": wrong, "seconds": seconds}


def main() -> None:
    """Fit, assign, check and compare."""
    os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported; only the backend "triton" uses it on the CPU
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--embeddings", type=Path, help=".npy file, float32 [N, D]")
    parser.add_argument("--num-items", type=int, default=20_000, help="synthetic items, without --embeddings")
    parser.add_argument("--num-levels", type=int, default=3)
    parser.add_argument("--num-codes", type=int, default=256, help="of each level; a power of two for faiss")
    parser.add_argument("--out", type=Path, help="folder for semantic_ids.npy and codebook.pt")
    options = parser.parse_args()
    x = item_embeddings(options.num_items)
    if options.embeddings:
        x = torch.from_numpy(np.load(options.embeddings)).float()

    quantizer = fit_quantizer(x, options.num_levels, options.num_codes)
    indices = quantizer.encode(x)
    semantic_ids = with_last_index(indices)
    print(f"{len(x)} items, {len(semantic_ids.unique(dim=0))} different IDs, such as {semantic_ids[0].tolist()}")
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        np.save(options.out / "semantic_ids.npy", semantic_ids.numpy())
        torch.save(quantizer.codebook.detach(), options.out / "codebook.pt")

    for way, found in indices_by_other_ways(quantizer, x):
        changed = (with_last_index(found) != semantic_ids[: len(found)]).any(dim=1).sum()
        print(f"{changed} of {len(found)} IDs change: {way}")
    for method in METHODS:
        try:
            row = measure(method, x, options.num_levels, options.num_codes, seed=0)
        except ImportError as error:
            print(f"{method:>12}: {error}")
            continue
        errors = ", ".join(f"{error:.4f}" for error in row["errors"])
        counts = f"{row['collisions']} collisions, {row['wrong']} wrong indices"
        print(f"{method:>12}: share of the variance lost {errors}; {counts}")


if __name__ == "__main__":
    main()
