"""k-means: as good as the published algorithm, deterministic, in batches and over processes the same."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils.data import DataLoader

from tests.ranks import run_ranks
from vq_kernels import kmeans, most_similar_code, nearest_code
from vq_kernels.gradient.autograd import Metric
from vq_kernels.learning import kmeans as module
from vq_kernels.learning.kmeans import _Batches, _iterate


def blobs(num_rows: int = 3000, num_blobs: int = 20, code_dim: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Rows [N, D] around well separated centres [B, D]."""
    generator = torch.Generator().manual_seed(seed)
    centres = 100 * torch.randn(num_blobs, code_dim, generator=generator)
    blob = torch.arange(num_rows) % num_blobs
    return centres[blob] + 0.1 * torch.randn(num_rows, code_dim, generator=generator), centres


def test_finds_separated_clusters_and_says_what_it_did() -> None:
    x, centres = blobs()
    result = kmeans(x, 20)
    found = nearest_code(centres, result.codebook)
    assert sorted(found.indices.tolist()) == list(range(20))
    assert found.sq_distances.max() < 0.01
    assert result.counts.tolist() == [150] * 20
    assert result.converged
    assert 1 <= result.num_iterations <= 5
    at_end = nearest_code(x, result.codebook)
    assert torch.equal(result.counts, at_end.indices.bincount(minlength=20))
    assert result.inertia == pytest.approx(float(at_end.sq_distances.double().sum()))


def test_each_code_is_the_mean_of_its_rows() -> None:
    x = torch.randn(2000, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    result = kmeans(x, 30, tolerance=0, max_iterations=500)
    assert result.converged
    indices = nearest_code(x, result.codebook).indices
    means = torch.stack([x[indices == k].mean(dim=0) for k in range(30)])
    assert result.codebook.dtype == torch.float64
    torch.testing.assert_close(result.codebook, means)


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_overshooting_halves_the_iterations_and_never_raises_the_inertia(
    metric: Metric, monkeypatch: pytest.MonkeyPatch
) -> None:
    x = torch.randn(4000, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    batches = _Batches(x, metric, "torch", synchronise=False)
    needed = lloyds = 0
    for start in x[:300].split(100):
        inertias: list[float] = []
        assert _iterate(batches, batches.normalise(start), 300, 1e-4, 0, inertias.append).converged
        assert all(after < before for before, after in pairwise(inertias))
        with monkeypatch.context() as patched:
            patched.setattr(module, "_OVERSHOOT", 1.0)
            lloyd = _iterate(batches, batches.normalise(start), 300, 1e-4, 0)
        needed += sum(inertia > lloyd.inertia for inertia in inertias) + 1
        lloyds += lloyd.num_iterations
    assert needed < 0.6 * lloyds


def test_cosine_is_spherical_kmeans() -> None:
    x, centres = blobs(1000)
    result = kmeans(x * torch.rand(1000, 1, generator=torch.Generator().manual_seed(0)), 20, metric="cosine")
    directions, found = torch.nn.functional.normalize(x), most_similar_code(x, result.codebook)
    assert torch.equal(found.indices.bincount(minlength=20), result.counts)
    assert result.inertia == pytest.approx(float((directions - found.codes).square().sum()), rel=1e-4)
    assert (result.counts == 50).all()
    for k in range(20):
        mean = directions[found.indices == k].mean(dim=0)
        torch.testing.assert_close(result.codebook[k], mean / mean.norm(), rtol=0, atol=1e-6)
    given = kmeans(x, 20, init=centres, metric="cosine", max_iterations=0)
    torch.testing.assert_close(given.codebook, torch.nn.functional.normalize(centres))


def test_better_start_ends_lower() -> None:
    x, _ = blobs(4000, 200)
    ends = {
        init: [kmeans(x, 200, init=init, seed=seed).inertia for seed in range(3)] for init in ("k-means++", "random")
    }
    assert max(ends["k-means++"]) < min(ends["random"])


def test_seed_decides() -> None:
    x = torch.randn(500, 3, generator=torch.Generator().manual_seed(2))
    state = torch.get_rng_state()
    first, again, other = (kmeans(x, 16, seed=seed).codebook for seed in (5, 5, 6))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_batches_give_what_one_tensor_gives(dtype: torch.dtype) -> None:
    x, _ = blobs(1000)
    x = x.to(dtype)
    whole = kmeans(x, 20)
    parts = kmeans(DataLoader(list(x), batch_size=96), 20)  # type: ignore[arg-type]
    assert whole.codebook.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    order = nearest_code(whole.codebook, parts.codebook).indices  # the rows drawn to begin with are others
    torch.testing.assert_close(parts.codebook[order], whole.codebook, rtol=1e-3, atol=1e-3)
    assert torch.equal(parts.counts[order], whole.counts)


def test_given_codes_and_no_iteration() -> None:
    x, centres = blobs()
    result = kmeans(iter_again := [x[:100], x[100:]], 20, init=centres, max_iterations=0)
    assert iter_again
    assert torch.equal(result.codebook, centres)
    assert (result.num_iterations, result.converged) == (0, False)
    assert int(result.counts.sum()) == 3000


def test_empty_clusters_are_reseeded() -> None:
    x, centres = blobs()
    far = torch.full_like(centres, 1e6)
    far[0] = centres[0]
    result = kmeans(x, 20, init=far)
    assert (result.counts > 0).all()
    assert result.inertia < 1e3


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_codes_do_not_stay_alone_with_one_row(seed: int) -> None:
    """A code at the centre of noise takes nearly all rows from the other rows that k-means++ begins at."""
    noise = torch.randn(4000, 64, generator=torch.Generator().manual_seed(seed))
    with_centre = kmeans(torch.cat([noise, torch.zeros(40, 64)]), 64, seed=seed)
    assert with_centre.inertia < 1.01 * kmeans(noise, 64, seed=seed).inertia
    assert (with_centre.counts > 3).all()


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
def test_fewer_distinct_rows_than_codes_end_early(metric: Metric) -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 2.0], [2.0, 1.0]]).repeat(10, 1)
    result = kmeans(x, 5, metric=metric)
    assert result.inertia < 1e-12
    assert (result.counts > 0).sum() == 3
    assert result.converged
    assert result.num_iterations <= 3


def test_progress_is_shown_on_request(capsys: pytest.CaptureFixture[str]) -> None:
    x, _ = blobs(300)
    kmeans(x, 20)
    assert not any(capsys.readouterr())
    kmeans(x, 20, progress=True)
    assert "inertia" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("x", "options", "error", "message"),
    [
        (torch.zeros(4, 2), {"num_codes": 5}, ValueError, "x must have at least num_codes = 5 rows, got 4"),
        (torch.zeros(4, 2), {"num_codes": 2, "init": "best"}, ValueError, "init must be one of k-means"),
        (torch.zeros(4, 2), {"num_codes": 2, "init": torch.zeros(3, 2)}, ValueError, r"init must be \[2, D\]"),
        (torch.zeros(4, 2), {"num_codes": 2, "metric": "dot"}, ValueError, "metric must be one of euclidean, cosine"),
        (torch.zeros(4), {"num_codes": 2}, ValueError, r"x must be \[N, D\], got \(4,\)"),
        (torch.zeros(4, 2, dtype=torch.int64), {"num_codes": 2}, TypeError, "x must be float32"),
        (
            [torch.zeros(4, 2), torch.zeros(4, 3)],
            {"num_codes": 2},
            ValueError,
            r"x must be \[N, 2\], as its first batch",
        ),
        ([], {"num_codes": 2}, ValueError, "x must have at least num_codes = 2 rows, got 0"),
        (torch.full((40, 2), torch.nan), {"num_codes": 2}, ValueError, "x must be finite, got NaN or Inf"),
        (5, {"num_codes": 2}, TypeError, "x must be a tensor or re-iterable, .* got int"),
        (iter([torch.zeros(4, 2)]), {"num_codes": 2}, TypeError, "x must be a tensor or re-iterable"),
    ],
)
def test_bad_input(x: Tensor, options: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        kmeans(x, **options)  # type: ignore[arg-type]


def cluster_part(rank: int, folder: str) -> None:
    """What each of two processes does: cluster its part of the rows, 100 of 1,000 in the second."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
    x, _ = blobs(1000)
    part = x[:900] if rank == 0 else x[900:]
    result = kmeans([part[:50], part[50:]], 20, seed=3)
    torch.save((result.codebook, result.counts, result.inertia), Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_find_one_codebook(tmp_path: Path) -> None:
    (codebook, counts, inertia), second = run_ranks(cluster_part, tmp_path)
    assert torch.equal(codebook, second[0])
    assert torch.equal(counts, second[1])
    assert inertia == second[2]
    assert counts.tolist() == [50] * 20
    x, _ = blobs(1000)
    assert inertia == pytest.approx(kmeans(x, 20).inertia, rel=1e-3)
