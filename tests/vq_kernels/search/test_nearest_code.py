"""The public `nearest_code`: shapes, errors, backends, prepared codebooks, statistics, memory."""

import subprocess
import sys
import textwrap
import warnings

import pytest
import torch

from tests.vq_kernels.search.memory import extra_mib
from vq_kernels import PreparedCodebook, SearchStatistics, nearest_code, search_statistics, select_backend
from vq_kernels.search import backend as backend_module
from vq_kernels.search.reference import brute_force_nearest


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5,), (0, 5), (7, 5), (2, 3, 4, 5), (1, 1, 5)])
def test_shapes_and_dtypes(shape: tuple[int, ...]) -> None:
    x, codebook = draw(*shape).half(), draw(9, 5, seed=1)
    indices, codes, sq_distances = nearest_code(x, codebook)
    assert (indices.shape, codes.shape, sq_distances.shape) == (shape[:-1], shape, shape[:-1])
    assert (indices.dtype, codes.dtype, sq_distances.dtype) == (torch.int64, torch.float16, torch.float32)
    assert torch.equal(codes, codebook[indices].half())


def test_strided_input() -> None:
    codebook = draw(50, 6, seed=1)
    x = draw(6, 40).t()
    expected = brute_force_nearest(x, codebook)
    assert torch.equal(nearest_code(x, codebook).indices, expected)
    images = draw(2, 6, 4, 5).movedim(1, -1)
    assert torch.equal(
        nearest_code(images, codebook).indices.flatten(), brute_force_nearest(images.reshape(-1, 6), codebook)
    )
    assert torch.equal(nearest_code(x[::3], codebook.t().contiguous().t()).indices, expected[::3])
    assert nearest_code(x[:1].expand(30, 6), codebook).indices.unique().tolist() == [expected[0].item()]


@pytest.mark.parametrize(
    ("x", "codebook", "error", "message"),
    [
        (
            torch.zeros(3, 4),
            torch.zeros(5, 3),
            ValueError,
            r"x must be \[..., 3\] to match codebook \(5, 3\), got \(3, 4\)",
        ),
        (torch.tensor(1.0), torch.zeros(5, 3), ValueError, r"x must be \[..., 3\]"),
        (
            torch.zeros(3, 4),
            torch.zeros(4),
            ValueError,
            r"codebook must be \[K, D\] with K >= 1 and D >= 1, got \(4,\)",
        ),
        (torch.zeros(3, 4), torch.zeros(0, 4), ValueError, r"codebook must be .* got \(0, 4\)"),
        (torch.zeros(3, 0), torch.zeros(4, 0), ValueError, r"codebook must be .* got \(4, 0\)"),
        (torch.zeros(3, 4, dtype=torch.int32), torch.zeros(5, 4), TypeError, r"x must be float32, .* got torch.int32"),
        (
            torch.zeros(3, 4),
            torch.zeros(5, 4, dtype=torch.complex64),
            TypeError,
            r"codebook must be float32, .*complex64",
        ),
        ([[1.0]], torch.zeros(5, 4), TypeError, r"x must be a tensor, got list"),
        (
            torch.zeros(3, 4, device="meta"),
            torch.zeros(5, 4),
            ValueError,
            r"codebook must be on x's device, meta, got cpu",
        ),
    ],
)
def test_error_messages_name_the_tensor(
    x: torch.Tensor, codebook: torch.Tensor, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        nearest_code(x, codebook)


def test_error_messages_name_the_choices() -> None:
    x, codebook = draw(3, 4), draw(5, 4)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, llvm, torch, got 'cuda'"):
        nearest_code(x, codebook, backend="cuda")


@pytest.mark.parametrize(
    ("dtype", "code_dim", "chosen", "because"),
    [
        (torch.float32, 4, "llvm", "x is on cpu"),
        (torch.bfloat16, 1 << 15, "llvm", "x is on cpu"),
        (torch.float64, 4, "torch", "x is torch.float64"),
        (torch.float32, (1 << 15) + 1, "torch", "D is 32,769"),
    ],
)
def test_auto_selects_by_dtype_and_dimension_on_the_cpu(
    dtype: torch.dtype, code_dim: int, chosen: str, because: str
) -> None:
    name, reason = select_backend(torch.zeros(3, code_dim, dtype=dtype), torch.zeros(5, code_dim, dtype=dtype))
    assert name == chosen
    assert because in reason


def test_without_llvmlite_pytorch_searches_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = draw(3, 4), draw(5, 4)
    expected = nearest_code(x, codebook, backend="torch")
    monkeypatch.setitem(sys.modules, "llvmlite", None)
    backend_module._missing.cache_clear()
    try:
        assert select_backend(x, codebook)[0] == "torch"
        assert torch.equal(nearest_code(x, codebook).indices, expected.indices)
        with pytest.raises(RuntimeError, match="backend='llvm' cannot run here: llvmlite cannot be imported"):
            nearest_code(x, codebook, backend="llvm")
    finally:
        backend_module._missing.cache_clear()


def test_an_explicit_triton_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(RuntimeError, match="backend='triton' cannot run here: "):
        nearest_code(draw(3, 4), draw(5, 4), backend="triton")
    with pytest.raises(RuntimeError, match=r"x is torch\.float64"):
        nearest_code(draw(3, 4).double(), draw(5, 4), backend="triton")


def test_the_environment_replaces_auto_only(monkeypatch: pytest.MonkeyPatch) -> None:
    x, codebook = draw(3, 4), draw(5, 4)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setenv("VQ_KERNELS_BACKEND", "triton")
    assert select_backend(x, codebook, "torch")[0] == "torch"
    with pytest.raises(RuntimeError, match="VQ_KERNELS_BACKEND='triton' cannot run here"):
        nearest_code(x, codebook)
    monkeypatch.setenv("VQ_KERNELS_BACKEND", "tritn")
    with pytest.raises(ValueError, match="VQ_KERNELS_BACKEND must be one of auto, triton, llvm, torch, got 'tritn'"):
        nearest_code(x, codebook)


def test_a_fallback_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnCuda:
        device, dtype = torch.device("cuda"), torch.float64

    backend_module._warn_once.cache_clear()
    with pytest.warns(RuntimeWarning, match="PyTorch instead of Triton: x is torch.float64"):
        assert backend_module.choose_backend(OnCuda(), OnCuda())[0] == "torch"  # type: ignore[arg-type]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        backend_module.choose_backend(OnCuda(), OnCuda())  # type: ignore[arg-type]


def test_prepared_codebook_is_a_copy_with_the_same_results() -> None:
    x, codebook = draw(300, 8), draw(60, 8, seed=1)
    prepared = PreparedCodebook.from_codebook(codebook)
    expected = nearest_code(x, codebook)
    codebook.zero_()
    found = nearest_code(x, prepared)
    assert torch.equal(found.indices, expected.indices)
    assert torch.equal(found.sq_distances, expected.sq_distances)
    assert search_statistics(x, prepared) == search_statistics(x, prepared.codebook)
    with pytest.raises(
        ValueError, match="backend must be 'auto' or 'llvm', which codebook was prepared for, got 'triton'"
    ):
        nearest_code(x, prepared, backend="triton")


def test_statistics_add_up_and_each_step_is_reached() -> None:
    codebook = draw(400, 8, seed=1)
    ties = (codebook[:50] + codebook[50:100]) / 2  # nearly equidistant to two codes
    same = codebook[:1].expand(400, 8)
    assert search_statistics(draw(200, 8), codebook).certified > 190
    near_ties = search_statistics(codebook[0] + 0.5 * (codebook[1:2] - codebook[0]) + 0 * ties, codebook[:2])
    assert near_ties.reranked == 50
    assert search_statistics(draw(20, 8), same).exhaustive == 20
    assert sum(search_statistics(ties, codebook)) == 50


@pytest.mark.parametrize(("old", "value"), [("proved", 1), ("resolved", 2), ("drained", 3)])
def test_old_names_of_the_statistics_are_deprecated(old: str, value: int) -> None:
    with pytest.warns(DeprecationWarning, match=f"SearchStatistics.{old} is deprecated, use"):
        assert getattr(SearchStatistics(1, 2, 3), old) == value


@pytest.mark.parametrize("precision", ["high", "medium"])
def test_matmul_precision_and_autocast_do_not_change_a_result(precision: str) -> None:
    x, codebook = draw(500, 32) + 3, draw(200, 32, seed=1) + 3
    expected = nearest_code(x, codebook)
    try:
        torch.set_float32_matmul_precision(precision)
        found = nearest_code(x, codebook)
    finally:
        torch.set_float32_matmul_precision("highest")
    with torch.autocast("cpu", torch.bfloat16):
        under_autocast = nearest_code(x, codebook)
    for result in (found, under_autocast):
        assert torch.equal(result.indices, expected.indices)
        assert torch.equal(result.sq_distances, expected.sq_distances)


def test_the_result_is_not_differentiable() -> None:
    x, codebook = draw(5, 4).requires_grad_(), draw(6, 4).requires_grad_()
    assert not any(result.requires_grad for result in nearest_code(x, codebook))


@pytest.mark.parametrize("prepared", [False, True], ids=["plain", "prepared"])
@pytest.mark.parametrize(
    ("x", "codebook"),
    [
        (draw(5, 3), draw(7, 3)),
        (draw(0, 3), draw(7, 3)),
        (draw(1, 1), draw(1, 1)),
        (draw(5, 3).half(), draw(7, 3)),
        (draw(5, 3), draw(7, 3).bfloat16()),
        (draw(5, 3).bfloat16(), draw(7, 3).double()),
        (draw(3, 5).t(), draw(3, 7).t()),
        (draw(10, 6)[::2, 1::2], draw(7, 6)[:, ::2]),
        (draw(1, 3).expand(5, 3), draw(7, 3)),
    ],
    ids=["float32", "no-rows", "one-number", "half", "bfloat16-codes", "mixed", "transposed", "strided", "expanded"],
)
def test_operator_is_well_formed(x: torch.Tensor, codebook: torch.Tensor, prepared: bool) -> None:
    operands = list(PreparedCodebook.from_codebook(codebook).operands) if prepared else []
    torch.library.opcheck(torch.ops.vq_kernels.nearest_code.default, (x, codebook, operands, "torch"))


def test_import_needs_torch_alone() -> None:
    program = """
        import sys, torch
        heavy = ("triton", "numpy", "torchvision", "matplotlib", "tyro", "tqdm")
        for name in heavy:
            sys.modules.setdefault(name, None)  # importing it raises ImportError
        import vq_kernels
        assert vq_kernels.nearest_code(torch.zeros(2, 3), torch.zeros(4, 3)).indices.tolist() == [0, 0]
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(program)], check=True, timeout=120)


def test_more_distances_than_int32_counts() -> None:
    num_rows, num_codes = (1 << 21) + 5, 1 << 10
    assert num_rows * num_codes > 1 << 31
    x, codebook = draw(num_rows, 2), draw(num_codes, 2, seed=1)
    indices, codes, sq_distances = nearest_code(x, codebook, backend="torch")
    some = torch.randint(num_rows, (1000,), generator=torch.Generator().manual_seed(2))
    rows = torch.cat([torch.arange(1000), some, torch.arange(num_rows - 1000, num_rows)])
    assert torch.equal(indices[rows], brute_force_nearest(x[rows], codebook))
    assert torch.equal(codes, codebook[indices])
    torch.testing.assert_close(sq_distances, (x - codes).square().sum(dim=1), rtol=1e-5, atol=0)


@pytest.mark.parametrize("sizes", [(1 << 18, 1 << 12, 4), ((1 << 21) + 5, 1 << 10, 2)])
def test_memory_is_far_below_the_matrix_of_distances(sizes: tuple[int, int, int]) -> None:
    """The matrix takes 4 GiB, or 8 GiB with more entries than int32 counts."""
    distances_mib = sizes[0] * sizes[1] * 4 / 2**20
    assert extra_mib("nearest_code(x, codebook, backend='torch')", *sizes) < distances_mib / 64
