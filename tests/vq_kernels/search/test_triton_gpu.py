"""The Triton search on a GPU."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.plain import vector_quantizer
from tests.vq_kernels.search.memory import workspace_limit
from vq_kernels import PreparedCodebook, nearest_code, vector_quantize
from vq_kernels.gradient.triton_backend import codebook_gradient
from vq_kernels.search.triton import launch

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
    indices, codes, sq_distances, statistics = launch.search(x, codebook, [])
    assert torch.equal(indices, nearest(x, codebook))
    assert torch.equal(codes, codebook[indices])
    expected = ((codebook[indices].double() - x.double()) ** 2).sum(1)
    torch.testing.assert_close(sq_distances, expected, rtol=1e-6, atol=0)
    assert statistics.sum() == x.shape[0]


@pytest.mark.parametrize(
    "dims",
    [(1, 1, 1), (1000, 1, 64), (1000, 300, 1), (300, 200, 4096), (2000, 40_000, 64), (300, 20_000, 200)],
)
@pytest.mark.parametrize("offset", [0.0, 1000.0])
def test_smallest_and_largest_sizes(dims: tuple[int, int, int], offset: float):
    """Codebooks of 20,000 codes and more are split."""
    x, codebook = make(*dims, offset=offset)
    assert torch.equal(launch.search(x, codebook, [])[0], nearest(x, codebook))


@pytest.mark.parametrize("dims", [(4096, 1024, 64), (1000, 600, 512)])
def test_a_prepared_codebook(dims: tuple[int, int, int]):
    x, codebook = make(*dims, offset=3.0)
    prepared = PreparedCodebook.from_codebook(codebook, backend="triton")
    for found, expected in zip(nearest_code(x, prepared), nearest_code(x, codebook, backend="triton"), strict=True):
        assert torch.equal(found, expected)


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
    assert torch.equal(launch.search(x, codebook, [])[0], nearest(x, codebook))


@pytest.mark.parametrize("d", [64, 512])
def test_offsets_beyond_int32(d: int):
    """N * D exceeds 2**31, so a 32-bit offset would wrap in the last rows."""
    dims = (2**31 // d + 1000, 100, d)
    x, codebook = make(*dims, torch.float16)
    indices, codes, _, _ = launch.search(x, codebook, [])
    for part in (slice(0, 2000), slice(-2000, None)):
        assert torch.equal(indices[part], nearest(x[part], codebook))
        assert torch.equal(codes[part], codebook[indices[part]])
    for deterministic in (True, False):
        _, counts = codebook_gradient(x, codebook, indices, 1, deterministic)
        assert torch.equal(counts, torch.bincount(indices, minlength=100))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one CUDA device")
def test_tensors_on_a_device_that_is_not_current():
    x, codebook = (tensor.to("cuda:1") for tensor in make(1000, 200, 64))
    indices = launch.search(x, codebook, [])[0]
    assert indices.device == x.device
    assert torch.equal(indices, nearest(x, codebook))
    codebook_gradient(x, codebook, indices, 1, True)


def test_equal_codes_are_exhaustive_and_give_the_lowest_index():
    x, codebook = make(5000, 64, 32)
    indices, _, _, statistics = launch.search(x, codebook.repeat(8, 1), [])
    assert torch.equal(indices, nearest(x, codebook))
    assert statistics[0] == 0
    assert statistics[2] > 0


def test_nothing_waits_for_the_device():
    x, codebook = make(5000, 600, 64)
    launch.search(x, codebook, [])  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        indices = launch.search(x, codebook, [])[0]
        for deterministic in (True, False):
            codebook_gradient(x, codebook, indices, 1, deterministic)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("dims", [(256, 1024, 512), (5000, 600, 64)])
def test_a_cuda_graph_captures_a_search(dims: tuple[int, int, int]):
    x, codebook = make(*dims)
    launch.search(x, codebook, [])
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = launch.search(x, codebook, [])[0]
    x.copy_(x.flip(0))
    graph.replay()
    assert torch.equal(indices, nearest(x, codebook))


@pytest.mark.parametrize(
    "dims",
    [(262_144, 1024, 64), (65_536, 1024, 512), (1_048_576, 1024, 8), (1_048_576, 512, 64), (65_536, 8192, 256)],
)
def test_memory(dims: tuple[int, int, int]):
    x, codebook = make(*dims)
    launch.search(x, codebook, [])
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    found = launch.search(x, codebook, [])
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - torch.cuda.memory_allocated() <= workspace_limit(*dims)
    assert found[0].shape == (dims[0],)


def test_a_short_last_batch_compiles_nothing():
    from vq_kernels.search.triton.scan import _scan_kernel

    x, codebook = make(65_536, 1024, 64)
    launch.search(x, codebook, [])
    compiled = sum(len(cache[0]) for cache in _scan_kernel.device_caches.values())
    launch.search(x[:60_001], codebook, [])
    assert sum(len(cache[0]) for cache in _scan_kernel.device_caches.values()) == compiled


# -- gradients and modules


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("dims", [(1, 1, 1), (5000, 7, 3), (3000, 500, 64), (20_000, 64, 200)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_against_float64(dims: tuple[int, int, int], dtype: torch.dtype, deterministic: bool):
    x, codebook = make(*dims, dtype, offset=100.0)
    indices = torch.randint(dims[1], (dims[0],), generator=torch.Generator("cuda").manual_seed(1), device="cuda")
    sums, counts = codebook_gradient(x, codebook, indices, 1, deterministic)
    difference = codebook.double()[indices] - x.double()
    expected, magnitude = torch.zeros(2, *codebook.shape, dtype=torch.float64, device="cuda")
    expected.index_add_(0, indices, difference)
    magnitude.index_add_(0, indices, difference.abs())
    assert torch.equal(counts, torch.bincount(indices, minlength=dims[1]))
    assert ((sums - expected).abs() <= expected.abs() * 2.0**-24 + 1e-12 * magnitude).all()  # rounded only once
    if deterministic:
        assert torch.equal(sums, codebook_gradient(x, codebook, indices, 1, True)[0])


def test_vector_quantize_and_its_gradients():
    x, codebook = (tensor.requires_grad_() for tensor in make(3000, 500, 64))
    weights = torch.randn_like(x)
    quantized, indices, loss = vector_quantize(x, codebook, backend="triton")
    assert torch.equal(indices, nearest(x.detach(), codebook.detach()))
    assert torch.equal(quantized, codebook[indices])
    torch.autograd.backward((quantized * weights).sum() + loss)
    assert x.grad is not None
    assert codebook.grad is not None
    assert torch.equal(x.grad, weights)
    difference = codebook.detach().double()[indices] - x.detach().double()
    expected = torch.zeros_like(codebook, dtype=torch.float64).index_add_(0, indices, difference) * (2 / x.numel())
    torch.testing.assert_close(codebook.grad, expected.float(), rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(loss, difference.square().mean().float(), rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
def test_the_module_compiles_and_keeps_its_gradients():
    torch._dynamo.reset()
    torch.manual_seed(0)
    modules = [vector_quantizer(200, 64, backend="triton").cuda() for _ in range(2)]
    modules[1].load_state_dict(modules[0].state_dict())
    x = make(1000, 1, 64)[0]
    found = []
    for module, call in zip(modules, (modules[0], torch.compile(modules[1], fullgraph=True)), strict=True):
        rows = x.clone().requires_grad_()
        quantized, indices, loss = call(rows)
        torch.autograd.backward(quantized.square().sum() + loss)
        found.append((quantized.detach(), indices, loss.detach(), rows.grad, module.codebook.grad))
    for eager, compiled in zip(*found, strict=True):
        torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-7)


def test_training_steps_reduce_the_loss():
    torch.manual_seed(0)
    x = make(4096, 1, 32)[0]
    quantizer = vector_quantizer(64, 32, init="data", backend="triton").cuda()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.5 * quantizer.num_codes * quantizer.code_dim / 2)
    losses = []
    for _ in range(10):
        optimizer.zero_grad()
        losses.append(quantizer(x).loss)
        torch.autograd.backward(losses[-1])
        optimizer.step()
    assert torch.stack(losses).isfinite().all()
    assert losses[-1] < 0.8 * losses[0]
