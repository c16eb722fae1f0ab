"""The kernels for the CPU: the certificate, vectors of other lengths, threads, memory."""

import ctypes
import mmap
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.search.exactness import check_exact
from tests.vq_kernels.search.memory import extra_mib
from vq_kernels import PreparedCodebook, nearest_code, search_statistics
from vq_kernels.search.llvm import launch
from vq_kernels.search.torch_bounds import ROW_LIMIT, CodebookOperand, augment, error_factor, prepare

forks = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork")


def gaussian(num_rows: int, num_codes: int, code_dim: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, code_dim, generator=generator), torch.randn(num_codes, code_dim, generator=generator)


def holds_in_a_fork(check: Callable[[], bool]) -> bool:
    """Whether the check returns True in a forked process, which ends with it."""
    child = os.fork()
    if child:
        return os.waitpid(child, 0)[1] == 0
    status = 1
    try:
        status = int(not check())
    finally:
        os._exit(status)


def before_a_page_without_access(tensor: Tensor) -> Tensor:
    """A copy, at the end of a page. To read beyond it ends the process."""
    pages = mmap.mmap(-1, 2 * mmap.PAGESIZE)
    next_page = ctypes.addressof(ctypes.c_char.from_buffer(pages)) + mmap.PAGESIZE
    assert ctypes.CDLL(None).mprotect(ctypes.c_void_p(next_page), mmap.PAGESIZE, 0) == 0
    offset = mmap.PAGESIZE - tensor.nbytes
    copy = torch.frombuffer(pages, dtype=tensor.dtype, count=tensor.numel(), offset=offset).view_as(tensor)
    return copy.copy_(tensor)


def test_the_operand_is_that_of_the_torch_backend() -> None:
    half = torch.randint(-3, 4, (20, 6), generator=torch.Generator().manual_seed(0)).float()
    codebook = torch.cat([half, -half, torch.zeros(1, 6)])  # few codes, so that the mean is that of all: 0
    torch.testing.assert_close(launch.prepare(codebook), prepare(codebook), rtol=1e-6, atol=0)


def test_a_code_that_is_not_finite_is_found_wherever_it_is() -> None:
    codebook = gaussian(1, 150, 5)[1]
    for position in range(150):
        codes = codebook.clone()
        codes[position, 3] = torch.nan
        usable = CodebookOperand(*launch.prepare(codes)).usable(150)
        assert (~usable).nonzero().tolist() == [[position]]


def test_a_row_longer_than_the_bounds_cover_is_not_certified() -> None:
    x, codebook = torch.tensor([[ROW_LIMIT / 2], [2 * ROW_LIMIT]]), gaussian(1, 60, 1)[1]
    assert search_statistics(x, codebook, backend="llvm").certified == 1


@forks
@pytest.mark.parametrize("num_rows", [3, 37])
def test_nothing_beyond_the_arguments_is_read(num_rows: int) -> None:
    x, codebook = (before_a_page_without_access(t) for t in gaussian(num_rows, 50, 5))
    expected = nearest_code(x, codebook, backend="torch").indices
    assert holds_in_a_fork(lambda: torch.equal(nearest_code(x, codebook, backend="llvm").indices, expected))


@pytest.mark.parametrize("offset", [0.0, 10.0, 300.0])
@pytest.mark.parametrize(("gap", "certified"), [(0.9, False), (1.1, True)])
def test_a_row_is_certified_if_its_best_scores_differ_by_more_than_both_errors(
    offset: float, gap: float, certified: bool
) -> None:
    x, codebook = (t + offset for t in gaussian(200, 20, 24))
    num_certified = 0
    for row in x:
        codes = codebook.clone()
        codes[:2] = row + 0.05 * codebook[0].sub(offset)  # twins that are nearest
        operand = CodebookOperand(*launch.prepare(codes))
        norms = torch.empty(1)
        augment(row[None], operand, torch.empty(1, 26), norms)
        errors = operand.errors(torch.tensor([0, 1]), norms).double().sum()
        towards = (
            row.double() - codes[1].double()
        )  # moving a twin by t·towards raises its score by (t - t²/2)·‖towards‖²
        codes[1] = (codes[1].double() + gap * errors / towards.square().sum() * towards).float()
        raised = (row.double() - codes[:2].double()).square().sum(dim=1).diff() / -2
        if abs(raised / errors - gap) < 0.05:  # codes that float32 represents well enough
            certified_here = search_statistics(row[None], codes, backend="llvm").certified
            num_certified += 1
            assert certified_here == certified
    assert num_certified >= 20


@pytest.mark.parametrize("num_rows", [1, 40])
@pytest.mark.parametrize("prepared", [False, True])
def test_a_row_is_not_certified_if_the_error_of_the_second_code_exceeds_the_gap(num_rows: int, prepared: bool) -> None:
    row = gaussian(1, 1, 64)[0]
    factor = error_factor(64, torch.float32)
    longer = (2 + 5 * factor) * row  # its score is 5·factor·‖row‖² below that of the code 0, its error 6·factor·‖row‖²
    codebook = torch.cat([torch.zeros(1, 64), longer, -longer])
    codes = PreparedCodebook.from_codebook(codebook, backend="llvm") if prepared else codebook
    statistics = search_statistics(row.expand(num_rows, -1), codes, backend="llvm")
    assert statistics == (0, num_rows, 0)


@pytest.mark.parametrize("lanes", [4, 8, 16, 32])
def test_tiles_of_every_width(monkeypatch: pytest.MonkeyPatch, lanes: int) -> None:
    kernels = launch.Kernels(lanes)
    monkeypatch.setattr(launch, "kernels", lambda: kernels)
    for num_rows in (1, lanes - 1, lanes, lanes + 1, 100):
        check_exact("llvm", *gaussian(num_rows, 50, 7))


@pytest.mark.parametrize("openmp", [True, False])
def test_searches_in_several_threads_at_once(monkeypatch: pytest.MonkeyPatch, openmp: bool) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    if openmp:
        monkeypatch.setattr(launch, "_pool", None)
    else:
        monkeypatch.setattr(launch.kernels(), "search_as_member", None)
    x, codebook = gaussian(5000, 512, 16)
    expected = nearest_code(x, codebook, backend="torch").indices
    with ThreadPoolExecutor(8) as threads:
        searches = list(threads.map(lambda _: launch.search(x, codebook, []), range(16)))
    for indices, _, _, statistics in searches:
        assert torch.equal(indices, expected)
        assert statistics.sum() == 5000


@forks
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")  # of a process with threads, which is the case here
def test_a_forked_process_searches_in_threads_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x, codebook = gaussian(5000, 512, 16)
    expected = nearest_code(x, codebook, backend="llvm").indices
    assert holds_in_a_fork(lambda: torch.equal(nearest_code(x, codebook, backend="llvm").indices, expected))


def test_a_view_that_is_negated_when_it_is_read() -> None:
    x, codebook = gaussian(50, 40, 6)
    negated = torch._neg_view(-x)  # unlike x.conj().imag, it is contiguous
    assert negated.is_neg()
    assert torch.equal(negated, x)
    assert torch.equal(nearest_code(negated, codebook).indices, nearest_code(x, codebook, backend="torch").indices)


@pytest.mark.parametrize("call", ["nearest_code(x, codebook)", "nearest_code(x, torch.ones_like(codebook))"])
def test_no_distances_are_stored(call: str) -> None:
    num_rows, num_codes, code_dim = 1 << 16, 4096, 16
    outputs_mib = num_rows * (4 * code_dim + 20) / (1 << 20)  # codes, indices, distances in float64 and float32
    assert extra_mib(call, num_rows, num_codes, code_dim) < outputs_mib + 16  # [N, K] takes 1,024 MiB
