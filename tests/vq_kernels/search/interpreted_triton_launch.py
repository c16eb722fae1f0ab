"""The Triton backend under TRITON_INTERPRET=1. test_triton_launch.py runs this file in a separate process.

Tests the configurations, splits, launches and uncertified rows. test_attack.py and test_attack_shapes.py, which also
run in the interpreter, test values and shapes. Results are compared with a float64 brute force written here, in memory
that is initialised to NaN and -1.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vq_kernels.search.exactness import poisoned_allocations
from vq_kernels.cosine import most_similar_code, most_similar_index
from vq_kernels.gradient.autograd import codebook_gradient_op
from vq_kernels.search import nearest_code
from vq_kernels.search.backend import Backend
from vq_kernels.search.triton import launch
from vq_kernels.search.triton.common import Outputs, ceil_div, write_rows
from vq_kernels.search.triton.plan import CONFIGS, ScanConfig, SearchPlan

# The tests include overflow, of which numpy warns.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
_BY_NAME = {config.name: config for config in CONFIGS}


@pytest.fixture(autouse=True)
def poison() -> Iterator[None]:
    with poisoned_allocations():
        yield


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    """[N, K] float64 squared distances by direct differences; inf for codes with NaN or Inf."""
    sq_distances = torch.stack([((codebook.double() - row) ** 2).sum(1) for row in x.double()])
    sq_distances[:, ~codebook.isfinite().all(1)] = torch.inf
    return sq_distances


def brute_force(x: Tensor, codebook: Tensor) -> Tensor:
    """The index of the first nearest code; 0 for a row with NaN or Inf."""
    indices = distances(x, codebook).argmin(1)
    indices[~x.isfinite().all(1)] = 0
    return indices


def check(x: Tensor, codebook: Tensor, plan: SearchPlan | None = None) -> tuple[int, int, int]:
    """Compare a search with the brute force. Returns the numbers of certified, reranked and exhaustive rows."""
    results = launch.search(x, codebook, []) if plan is None else launch.search_with_plan(x, codebook, [], plan)
    indices, codes, sq_distances, statistics = results
    assert indices.dtype == torch.int64
    assert ((indices >= 0) & (indices < codebook.shape[0])).all()
    for row in (indices != (expected := brute_force(x, codebook))).nonzero().flatten().tolist():
        # Only different codes whose distances agree within float64's rounding may be exchanged.
        found, wanted = (
            distances(x[row : row + 1], codebook[index[row], None]).item() for index in (indices, expected)
        )
        assert abs(found - wanted) <= 1e-13 * wanted
        assert not torch.equal(codebook[indices[row]], codebook[expected[row]])
    torch.testing.assert_close(codes, codebook[indices].to(x.dtype), rtol=0, atol=0, equal_nan=True)
    true_sq_distances = ((codebook[indices].double() - x.double()) ** 2).sum(1)
    true_sq_distances[~x.isfinite().all(1)] = torch.nan
    torch.testing.assert_close(sq_distances, true_sq_distances, rtol=1e-6, atol=0, equal_nan=True)
    certified, reranked, exhaustive = statistics.tolist()
    assert certified + reranked + exhaustive == x.shape[0]
    return certified, reranked, exhaustive


def gaussian(n: int, k: int, d: int, seed: int = 0, offset: float = 0.0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) + offset, torch.randn(k, d, generator=generator) + offset


def plan_for(config: ScanConfig, k: int, splits: int = 1) -> SearchPlan:
    tiles_per_split = ceil_div(ceil_div(k, config.block_k), splits)
    return SearchPlan(config, ceil_div(ceil_div(k, config.block_k), tiles_per_split), tiles_per_split)


def test_this_process_interprets():
    assert os.environ["TRITON_INTERPRET"] == "1"


@pytest.mark.parametrize("dims", [(257, 513, 64), (70, 200, 200)])
def test_more_than_one_tile(dims: tuple[int, int, int]):
    check(*gaussian(*dims))


def test_no_rows():
    indices, codes, sq_distances, statistics = launch.search(torch.empty(0, 5), torch.ones(3, 5), [])
    assert (indices.shape, codes.shape, sq_distances.shape) == ((0,), (0, 5), (0,))
    assert statistics.tolist() == [0, 0, 0]


def test_4096_dimensions():
    check(*gaussian(2, 3, 4096))


@triton.jit
def _write_rows_kernel(x_ptr, codebook_ptr, indices_ptr, codes_ptr, sq_distances_ptr, D: tl.constexpr):
    offs_n = tl.arange(0, 4)
    write_rows(
        offs_n * 0, offs_n.to(tl.float32), offs_n, offs_n < 3, x_ptr, D, 1, codebook_ptr, D, 1, indices_ptr, codes_ptr,
        sq_distances_ptr, D, 4, 32,
    )  # fmt: skip


def test_distances_of_32768_equal_differences():
    """In float32, the roundings of 1,024 sums of 32 such squares all go the same way."""
    x = 1.4406174421310425 * torch.tensor([[1e-30], [1.0], [1e18]]).expand(3, 1 << 15)
    outputs = Outputs(torch.empty(3, dtype=torch.int64), torch.empty(x.shape), torch.empty(3, dtype=torch.float64))
    _write_rows_kernel[(1,)](x.contiguous(), torch.zeros(1, 1 << 15), *outputs, D=1 << 15)
    torch.testing.assert_close(outputs.sq_distances, x.double().square().sum(dim=1), rtol=1e-7, atol=0)


@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("name", [config.name for config in CONFIGS])
def test_every_configuration(name: str, splits: int):
    """Both parts of 300 codes end within a tile, 130 rows within a block, and 72 columns within a piece."""
    x, codebook = gaussian(130, 300, 64 if _BY_NAME[name].resident else 72, offset=3.0)
    certified, reranked, _ = check(x, codebook, plan_for(_BY_NAME[name], 300, splits))
    assert certified > 100
    assert reranked > 0


@pytest.mark.parametrize("splits", [1, 2])
def test_16_bit_rows_of_70_columns(splits: int):
    """Their codes leave no memory to pad x'."""
    x, codebook = gaussian(70, 100, 70)
    certified, _, _ = check(x.bfloat16(), codebook, plan_for(_BY_NAME["few_rows"], 100, splits))
    assert certified > 60


def test_prepared_tensors_serve_many_searches():
    x, codebook = gaussian(40, 50, 24)
    prepared = launch.prepare(codebook)
    before = [tensor.clone() for tensor in prepared]
    for rows in (x[:7], x):
        assert torch.equal(launch.search(rows, codebook, prepared)[0], brute_force(rows, codebook))
    assert all(torch.equal(tensor, old) for tensor, old in zip(prepared, before, strict=True))


def test_each_step_decides_rows():
    """Certified: far codes. Reranked: two codes one bit apart, in different slots. Exhaustive: four in one slot."""
    codebook = 100.0 * torch.eye(16).repeat(20, 1) * torch.arange(1, 21).repeat_interleave(16)[:, None]
    codebook[1] = codebook[2]
    codebook[1, 2] = torch.nextafter(codebook[2, 2], torch.tensor(0.0))
    codebook[[64, 65, 128, 129]] = codebook[4].clone()
    x = torch.stack([codebook[9], codebook[1], codebook[2], codebook[4], codebook[10]])
    assert check(x, codebook, plan_for(_BY_NAME["short"], 320)) == (2, 2, 1)


def test_more_than_four_candidates_are_exhaustive():
    codebook = torch.arange(12.0)[:, None].repeat(1, 8)
    codebook[2::2] = 2.0
    _, _, exhaustive = check(torch.full((3, 8), 2.0), codebook)
    assert exhaustive == 3


def test_data_with_an_offset_is_certified():
    certified, _, _ = check(*gaussian(100, 200, 16, offset=1e6))
    assert certified > 60  # the shift handles an offset, not the reranking


def test_scores_that_order_two_codes_wrongly():
    """Midpoints of two codes, moved by less than fp16 resolves."""
    generator = torch.Generator().manual_seed(0)
    codebook = torch.randn(64, 32, generator=generator)
    pairs = codebook.view(32, 2, 32)
    x = pairs.mean(1) + 1e-5 * (pairs[:, 0] - pairs[:, 1])
    _, reranked, exhaustive = check(x, codebook)
    assert reranked + exhaustive > 0


@pytest.mark.parametrize("scale", [1e-45, 1e-30, 6e-8, 6e4, 1e38])
def test_rows_and_codes_of_different_sizes(scale: float):
    x, codebook = gaussian(40, 50, 8)
    check(x, codebook * scale)
    check(x * scale, codebook)


class Operators(TorchDispatchMode):
    """Records the operators of vq_kernels that are called inside, as a compiler captures them."""

    def __init__(self) -> None:
        super().__init__()
        self.called: list[Any] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "vq_kernels":
            self.called.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_captured_operators_wait_for_the_device_only_where_pytorch_searches(backend: Backend):
    x, codebook = torch.eye(2), torch.eye(3, 2)
    with Operators() as operators:
        indices = nearest_code(x, codebook, backend=backend).indices
        similar = most_similar_index(x, codebook, backend, unit_codes=True)
        _, counts = codebook_gradient_op(x, codebook, indices, 1, backend)
    assert indices.tolist() == similar.tolist() == [0, 1]
    assert counts.tolist() == [1, 1, 0]
    assert len(operators.called) == 3
    assert {torch.Tag.cudagraph_unsafe in operator.tags for operator in operators.called} == {backend == "torch"}


@pytest.mark.parametrize("longest", [1.0, 1e8])
@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_most_similar_code(scale: float, longest: float):
    x, codebook = gaussian(60, 40, 6)
    codebook[3] *= longest
    expected = (x.double() @ codebook.double().t()).argmax(1)
    assert torch.equal(most_similar_code(scale * x, codebook, backend="triton").indices, expected)
    codebook = torch.nn.functional.normalize(codebook)
    expected = (x.double() @ codebook.double().t()).argmax(1)
    assert torch.equal(most_similar_code(scale * x, codebook, backend="triton").indices, expected)


def test_results_do_not_depend_on_the_order_of_rows():
    x, codebook = gaussian(150, 90, 10)
    first = launch.search(x, codebook.repeat(3, 1), [])
    backwards = launch.search(x.flip(0), codebook.repeat(3, 1), [])
    for name, one, other in zip(("indices", "codes", "sq_distances"), first, backwards, strict=False):
        assert torch.equal(one, other.flip(0)), name
