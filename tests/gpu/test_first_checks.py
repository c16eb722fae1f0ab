"""What a first run on a GPU has to show, in about a minute; every answer is compared with float64 brute force."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.gpu.device import DEVICE, MARKS, SMALL, gaussian
from vq_kernels.gradient.triton_backend import codebook_gradient
from vq_kernels.search.reference import brute_force_nearest
from vq_kernels.search.triton.launch import prepare, search
from vq_kernels.search.triton.prepare import TritonCodebook

pytestmark = MARKS
SHAPES = (
    [(200, 200, 64), (200, 200, 200)]
    if SMALL
    else [(20_001, 1000, 64), (20_001, 1000, 128), (20_001, 1000, 512), (257, 1000, 512), (5000, 40_000, 64)]
)
VIEWS: dict[str, Callable[[Tensor], Tensor]] = {
    "unaligned": lambda t: torch.cat([t, t[:, :1]], 1)[:, : t.shape[1]],
    "misplaced": lambda t: torch.cat([t.flatten()[:1], t.flatten()])[1:].view(t.shape),
    "transposed": lambda t: t.t().contiguous().t(),
    "every second": lambda t: torch.stack([t, t], 2).flatten(1)[:, ::2],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_indices_and_how_many_rows_are_certified(shape: tuple[int, int, int]) -> None:
    """A miscompiled scan could still be right, only slow: most rows must be certified."""
    x, codebook = gaussian(*shape)
    indices, codes, sq_distances, statistics = search(x, codebook, [])
    assert torch.equal(indices, brute_force_nearest(x, codebook))
    assert torch.equal(codes, codebook[indices])
    true_distances = (x.double() - codes.double()).square().sum(1)
    assert ((sq_distances.double() - true_distances).abs() <= 1e-5 * true_distances).all()
    certified, _, exhaustive = (statistics.double() / shape[0]).tolist()
    assert certified > 0.9
    assert exhaustive < 0.002


@pytest.mark.parametrize(
    ("dtype", "offset", "k", "d"),
    [
        *((torch.float32, 3.0, 300, 64), (torch.bfloat16, 0.0, 300, 50), (torch.float16, 100.0, 300, 70)),
        (torch.float32, 3.0, 2100, 3),  # more codes than the partial sums have at once
    ],
)
def test_a_prepared_codebook(dtype: torch.dtype, offset: float, k: int, d: int) -> None:
    codebook = gaussian(1, k, d, offset=offset, dtype=dtype)[1]
    codebook[7, -1], codebook[11, 0] = float("nan"), float("inf")
    prepared = TritonCodebook(*prepare(codebook))
    wide = codebook.cpu().double()
    finite = wide.isfinite().all(1)
    shift, exponent = prepared.shift.cpu().double(), prepared.exponent
    mean = wide[finite].mean(0).float().double()
    assert not shift.any() or (shift - mean).abs().max() <= 2.0**-23 * mean.abs().max()
    scaled = torch.where(finite[:, None], (wide - shift) * 2.0**exponent, 0.0)
    assert 2.0**13 <= scaled.abs().max() < 2.0**14
    rounded = scaled.float().half()
    codes16, half_norms = prepared.codes16.cpu(), prepared.half_norms.cpu()
    assert torch.equal(codes16[:k, :d], rounded)
    assert not codes16[k:].any()
    assert not codes16[:, d:].any()
    expected = torch.where(finite, 0.5 * scaled.square().sum(1), 2.0**104)
    assert ((half_norms[:k].double() - expected).abs() <= 2.0**-22 * expected.clamp(min=1e-30)).all()
    assert (half_norms[k:] == 2.0**104).all()
    norms = [
        scaled.norm(dim=1).max(),
        (scaled - rounded.double()).norm(dim=1).max(),
        rounded.double().norm(dim=1).max(),
    ]
    least, bounds = torch.stack([*norms, expected[finite].max()]), prepared.bounds.cpu().double()
    assert (bounds >= least).all()
    assert (bounds <= least * 1.00001 + 1e-6).all()


def test_nan_and_inf() -> None:
    x, codebook = gaussian(70, 200, 64)
    x[3, 5], x[4, 0], x[5, 1] = float("nan"), float("inf"), -float("inf")
    codebook[0, 0], codebook[9, 2] = float("nan"), float("inf")
    indices, _, sq_distances, _ = search(x, codebook, [])
    assert torch.equal(indices, brute_force_nearest(x, codebook))
    assert torch.equal(sq_distances.isnan(), ~x.isfinite().all(1))
    assert not search(x, torch.full_like(codebook, float("nan")), [])[0].any()


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 2, 1), (5, 3, 2), (1, 129, 3)])
def test_the_smallest_sizes(shape: tuple[int, int, int]) -> None:
    x, codebook = gaussian(*shape)
    assert torch.equal(search(x, codebook, [])[0], brute_force_nearest(x, codebook))


@pytest.mark.parametrize("scales", [(1e-38, 1e-39), (1e-30, 1e30), (3e37, 3e37)])
def test_subnormal_and_huge_values(scales: tuple[float, float]) -> None:
    x, codebook = (tensor * scale for tensor, scale in zip(gaussian(64, 100, 8), scales, strict=True))
    assert torch.equal(search(x, codebook, [])[0], brute_force_nearest(x, codebook))


@pytest.mark.parametrize("copies", [3, 8])
def test_of_identical_codes_the_lowest_wins_and_none_is_certified(copies: int) -> None:
    x, codebook = gaussian(8 if SMALL else 3000, 64, 32)
    indices, _, _, statistics = search(x, codebook.repeat(copies, 1), [])
    assert torch.equal(indices, brute_force_nearest(x, codebook))
    assert statistics[0] == 0
    assert statistics.sum() == x.shape[0]


@pytest.mark.parametrize("name", VIEWS)
def test_views(name: str) -> None:
    x, codebook = gaussian(40 if SMALL else 2000, 300, 64)
    found = search(VIEWS[name](x), VIEWS[name](codebook), [])[0]
    assert torch.equal(found, brute_force_nearest(x, codebook))


def test_an_expanded_row() -> None:
    x, codebook = gaussian(1, 300, 64)
    indices = search(x.expand(500, -1), codebook, [])[0]
    assert (indices == brute_force_nearest(x, codebook)).all()


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32)])
def test_16_bits_and_mixed_dtypes(dtypes: tuple[torch.dtype, torch.dtype], offset: float) -> None:
    x, codebook = gaussian(16 if SMALL else 2000, 300, 64, offset=offset)
    x, codebook = x.to(dtypes[0]), codebook.to(dtypes[1])
    indices, codes, _, _ = search(x, codebook, [])
    assert torch.equal(indices, brute_force_nearest(x, codebook))
    assert torch.equal(codes, codebook[indices].to(x.dtype))


@pytest.mark.skipif(DEVICE == "cpu", reason="CUDA graphs need a GPU")
def test_a_cuda_graph_is_replayed_with_other_rows() -> None:
    x, codebook = gaussian(5000, 600, 64)
    search(x, codebook, [])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices, _, _, statistics = search(x, codebook, [])
    between_codes = (codebook + codebook.flip(0)).repeat(9, 1)[:5000] / 2
    for rows in (x.flip(0).clone(), between_codes, x.clone()):
        x.copy_(rows)
        graph.replay()
        assert torch.equal(indices, brute_force_nearest(x, codebook))
        assert statistics.sum() == 5000


@pytest.mark.skipif(DEVICE == "cpu", reason="only a GPU runs asynchronously")
def test_nothing_waits_for_the_device() -> None:
    x, codebook = gaussian(5000, 600, 64)
    indices = search(x, codebook, [])[0]
    for deterministic in (True, False):
        codebook_gradient(x, codebook, indices, 1, deterministic)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        search(x, codebook, [])
        for deterministic in (True, False):
            codebook_gradient(x, codebook, indices, 1, deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize(
    "shape", [(300, 7, 3)] if SMALL else [(20_000, 7, 3), (30_000, 500, 64), (3000, 1, 200), (1, 1, 1)]
)
def test_the_gradient(shape: tuple[int, int, int], deterministic: bool) -> None:
    n, k, d = shape
    x, codebook = gaussian(n, k, d, offset=100.0)
    indices = torch.randint(k, (n,), generator=torch.Generator().manual_seed(1)).to(DEVICE)
    difference = codebook.double()[indices] - x.double()
    expected, magnitude = torch.zeros(2, k, d, dtype=torch.float64, device=DEVICE)
    expected.index_add_(0, indices, difference)
    magnitude.index_add_(0, indices, difference.abs())
    means, counts = codebook_gradient(x, codebook, indices, n, deterministic)
    assert torch.equal(counts, torch.bincount(indices, minlength=k))
    difference = (means.double() * n - expected).abs()
    assert (difference <= expected.abs() * (2.0**-24 + 1e-12) + 1e-12 * magnitude).all()
    if deterministic:
        assert torch.equal(means, codebook_gradient(x, codebook, indices, n, True)[0])
