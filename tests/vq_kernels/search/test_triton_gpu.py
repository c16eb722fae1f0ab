"""What only a GPU can show of the Triton search."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from vq_kernels.gradient.triton_gradient import codebook_gradient
from vq_kernels.search import triton_backend
from vq_kernels.search.triton_plan import workspace_limit

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def make(n: int, k: int, d: int, dtype: torch.dtype = torch.float32, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(n, d, generator=generator, device="cuda")
    return (x + offset).to(dtype), (torch.randn(k, d, generator=generator, device="cuda") + offset).to(dtype)


def nearest(x: Tensor, codebook: Tensor) -> Tensor:
    """Float64 direct differences, a few rows at a time."""
    rows = max(1, (1 << 26) // codebook.numel())
    wide = codebook.double()
    return torch.cat([((part.double()[:, None] - wide) ** 2).sum(2).argmin(1) for part in x.split(rows)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("offset", [0.0, 3.0, 1000.0])
@pytest.mark.parametrize(
    "dims", [(4097, 1000, 8), (4096, 1024, 64), (3000, 777, 100), (2048, 4096, 256), (256, 1024, 512)]
)
def test_exact(dims: tuple[int, int, int], offset: float, dtype: torch.dtype):
    x, codebook = make(*dims, dtype, offset)
    indices, codes, sq_distances, statistics = triton_backend.search(x, codebook, [], "exact")
    assert torch.equal(indices, nearest(x, codebook))
    assert torch.equal(codes, codebook[indices])
    torch.testing.assert_close(
        sq_distances, ((codebook[indices].double() - x.double()) ** 2).sum(1).float(), rtol=1e-5, atol=0
    )
    assert statistics.sum() == x.shape[0]


@pytest.mark.parametrize(
    "view",
    [
        lambda x: torch.cat([x, x[:, :1]], dim=1)[:, : x.shape[1]],
        lambda x: x.t().contiguous().t(),
        lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
        lambda x: x[:, ::2],
    ],
    ids=["unaligned", "transposed", "misplaced", "every-second"],
)
@pytest.mark.parametrize("dims", [(4096, 1000, 64), (4096, 1000, 128), (1000, 600, 512)])
def test_views(dims: tuple[int, int, int], view: Callable[[Tensor], Tensor]):
    x, codebook = (view(tensor) for tensor in make(*dims))
    assert torch.equal(triton_backend.search(x, codebook, [], "exact")[0], nearest(x, codebook))


@pytest.mark.parametrize("d", [64, 512])
def test_offsets_beyond_int32(d: int):
    """N * D passes 2**31: the last rows are where a 32-bit offset would wrap."""
    x, codebook = make(2**31 // d + 1000, 100, d, torch.float16)
    indices, codes, _, _ = triton_backend.search(x, codebook, [], "exact")
    for part in (slice(0, 2000), slice(-2000, None)):
        assert torch.equal(indices[part], nearest(x[part], codebook))
        assert torch.equal(codes[part], codebook[indices[part]])
    for deterministic in (True, False):
        _, counts = codebook_gradient(x, codebook, indices, deterministic)
        assert torch.equal(counts, torch.bincount(indices, minlength=100))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_another_than_the_current_device():
    x, codebook = (tensor.to("cuda:1") for tensor in make(1000, 200, 64))
    indices = triton_backend.search(x, codebook, [], "exact")[0]
    assert indices.device == x.device
    assert torch.equal(indices, nearest(x, codebook))
    codebook_gradient(x, codebook, indices, True)


def test_equal_codes_are_drained_to_the_lowest():
    x, codebook = make(5000, 64, 32)
    indices, _, _, statistics = triton_backend.search(x, codebook.repeat(8, 1), [], "exact")
    assert torch.equal(indices, nearest(x, codebook))
    assert statistics[0] == 0
    assert statistics[2] > 0


def test_nothing_waits_for_the_device():
    x, codebook = make(5000, 600, 64)
    triton_backend.search(x, codebook, [], "exact")  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices = triton_backend.search(x, codebook, [], "exact")[0]
        for deterministic in (True, False):
            codebook_gradient(x, codebook, indices, deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dims", [(256, 1024, 512), (5000, 600, 64)])
def test_a_cuda_graph_holds_a_search(dims: tuple[int, int, int]):
    x, codebook = make(*dims)
    triton_backend.search(x, codebook, [], "exact")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = triton_backend.search(x, codebook, [], "exact")[0]
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(indices, nearest(x, codebook))


@pytest.mark.parametrize("dims", [(262_144, 1024, 64), (65_536, 1024, 512), (1_048_576, 1024, 8)])
def test_memory(dims: tuple[int, int, int]):
    x, codebook = make(*dims)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    results = triton_backend.search(x, codebook, [], "exact")
    extra = torch.cuda.max_memory_allocated() - before - sum(result.nbytes for result in results)
    assert extra <= workspace_limit(*dims)


def test_a_short_last_batch_compiles_nothing():
    from vq_kernels.search.triton_scan import _scan_kernel

    x, codebook = make(65_536, 1024, 64)
    triton_backend.search(x, codebook, [], "exact")
    compiled = sum(len(cache[0]) for cache in _scan_kernel.device_caches.values())
    triton_backend.search(x[:60_001], codebook, [], "exact")
    assert sum(len(cache[0]) for cache in _scan_kernel.device_caches.values()) == compiled
