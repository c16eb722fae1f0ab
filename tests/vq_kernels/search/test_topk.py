"""The k nearest codes against a float64 brute force that sorts all distances."""

import pytest
import torch
from torch import Tensor

from tests.vq_kernels.plain import vector_quantizer
from tests.vq_kernels.search.memory import extra_mib
from vq_kernels import nearest_code, nearest_code_topk
from vq_kernels.search.validation import SUPPORTED_DTYPES

TIE = 1e-13


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def distances(x: Tensor, codebook: Tensor) -> Tensor:
    """[N, K] float64, by direct differences; inf for codes that are not finite."""
    difference = x.double()[:, None] - codebook.double()
    return difference.square().sum(dim=2).masked_fill(~codebook.isfinite().all(dim=1), torch.inf)


def check(x: Tensor, codebook: Tensor, k: int) -> Tensor:
    """Compare the result for finite x [N, D] with all distances, sorted. Returns the indices."""
    indices, sq_distances = nearest_code_topk(x, codebook, k)
    assert indices.shape == sq_distances.shape == (x.shape[0], k)
    assert (indices.dtype, sq_distances.dtype) == (torch.int64, torch.float32)
    everything = distances(x, codebook)
    expected = everything.sort(dim=1, stable=True)
    found = everything.gather(1, indices)
    ties = (found - expected.values[:, :k]).abs() <= TIE * expected.values[:, :k]
    assert (ties | (indices == expected.indices[:, :k])).all()
    assert (indices.sort(dim=1).values.diff(dim=1) > 0).all()  # no code twice
    exact_ties = found[:, 1:] == found[:, :-1]
    assert (indices[:, 1:] > indices[:, :-1])[exact_ties].all()
    torch.testing.assert_close(sq_distances.double(), found.float().double(), rtol=1e-6, atol=0)
    return indices


@pytest.mark.parametrize(("num_rows", "num_codes", "dim"), [(1, 1, 1), (63, 7, 3), (1000, 513, 7), (300, 100, 64)])
def test_random_data(num_rows: int, num_codes: int, dim: int) -> None:
    x, codebook = draw(num_rows, dim), draw(num_codes, dim, seed=1)
    for k in {1, min(5, num_codes), num_codes}:
        check(x, codebook, k)
    assert torch.equal(nearest_code_topk(x, codebook, 1).indices[:, 0], nearest_code(x, codebook).indices)


@pytest.mark.parametrize("x_dtype", SUPPORTED_DTYPES)
@pytest.mark.parametrize("code_dtype", SUPPORTED_DTYPES)
def test_dtypes(x_dtype: torch.dtype, code_dtype: torch.dtype) -> None:
    check(draw(200, 8).to(x_dtype), draw(90, 8, seed=1).to(code_dtype), 4)


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_data_with_an_offset(offset: float) -> None:
    check(draw(300, 8) + offset, draw(200, 8, seed=1) + offset, 5)


def test_small_integers_have_ties_and_the_lower_index_comes_first() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-3, 4, (300, 3), generator=generator).float()
    codebook = torch.randint(-3, 4, (200, 3), generator=generator).float()
    expected = distances(x, codebook).sort(dim=1, stable=True).indices
    assert torch.equal(nearest_code_topk(x, codebook, 20).indices, expected[:, :20])


def test_identical_codes_are_ordered_by_index() -> None:
    codebook = draw(1, 16).expand(3000, 16)
    indices = nearest_code_topk(draw(50, 16, seed=1), codebook, 7).indices
    assert torch.equal(indices, torch.arange(7).expand(50, 7))


def test_codes_that_differ_in_their_last_bits() -> None:
    code = draw(1, 4).abs() + 1
    codebook = torch.cat([code + step * 2.0**-22 for step in range(64)])[torch.randperm(64)]
    check(draw(100, 4, seed=1), codebook, 6)
    check(codebook[:30], codebook, 6)


@pytest.mark.parametrize("scale", [1e-41, 1e-30, 1e18, 1e37])
def test_the_edges_of_float32(scale: float) -> None:
    check(draw(100, 4) * scale, draw(50, 4, seed=1) * scale, 3)
    check(draw(100, 4), draw(50, 4, seed=1) * scale, 3)
    check(draw(100, 4) * scale, draw(50, 4, seed=1), 3)


def test_rows_and_codes_that_are_not_finite() -> None:
    x, codebook = draw(40, 4), draw(9, 4, seed=1)
    x[3, 1], x[5, 0] = torch.nan, torch.inf
    codebook[0, 2], codebook[4, 1] = torch.nan, -torch.inf
    finite = x.isfinite().all(dim=1)
    found = nearest_code_topk(x, codebook, 9)
    assert torch.equal(found.indices[~finite], torch.arange(9).expand(2, 9))
    assert found.sq_distances[~finite].isnan().all()
    assert torch.equal(found.indices[finite], check(x[finite], codebook, 9))
    assert found.indices[finite][:, 7:].tolist() == [[0, 4]] * 38
    assert found.sq_distances[finite][:, 7:].isinf().all()
    nothing_finite = nearest_code_topk(x[finite], torch.full((5, 4), torch.nan), 2)
    assert nothing_finite.indices.tolist() == [[0, 1]] * 38


@pytest.mark.parametrize("shape", [(5,), (0, 5), (2, 3, 4, 5)])
def test_shapes(shape: tuple[int, ...]) -> None:
    x, codebook = draw(*shape), draw(9, 5, seed=1)
    indices, sq_distances = nearest_code_topk(x, codebook, 3)
    assert indices.shape == sq_distances.shape == (*shape[:-1], 3)
    assert torch.equal(indices.view(-1, 3), nearest_code_topk(x.reshape(-1, 5), codebook, 3).indices)


def test_strides_matmul_precision_and_autocast_do_not_change_a_result() -> None:
    x, codebook = draw(300, 32) + 3, draw(32, 200, seed=1).t() + 3
    expected = check(x, codebook, 4)
    assert torch.equal(nearest_code_topk(x.t().contiguous().t(), codebook.contiguous(), 4).indices, expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(nearest_code_topk(x, codebook, 4).indices, expected)
    try:
        torch.set_float32_matmul_precision("medium")
        assert torch.equal(nearest_code_topk(x, codebook, 4).indices, expected)
    finally:
        torch.set_float32_matmul_precision("highest")


def test_error_messages_name_the_argument() -> None:
    x, codebook = draw(3, 4), draw(5, 4)
    for k in (0, 6):
        with pytest.raises(ValueError, match=rf"k must be in \[1, 5\] for codebook \(5, 4\), got {k}"):
            nearest_code_topk(x, codebook, k)
    with pytest.raises(ValueError, match=r"x must be \[..., 4\] to match codebook \(5, 4\), got \(3, 3\)"):
        nearest_code_topk(x[:, :3], codebook, 2)
    with pytest.raises(TypeError, match=r"codebook must be float32, .*, got torch.int64"):
        nearest_code_topk(x, codebook.long(), 2)


def test_operator_is_well_formed_and_compiles() -> None:
    torch.library.opcheck(torch.ops.vq_kernels.nearest_code_topk.default, (draw(5, 3), draw(7, 3), 2))
    x, codebook = draw(20, 3).requires_grad_(), draw(30, 3, seed=1)
    explained = torch._dynamo.explain(nearest_code_topk)(x, codebook, 4)
    assert explained.graph_break_count == 0
    assert not nearest_code_topk(x, codebook, 4).sq_distances.requires_grad


@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("options", [{}, {"heads": 2}, {"heads": 2, "separate_codebooks": True}])
def test_topk_of_a_quantizer(metric: str, options: dict[str, object]) -> None:
    torch.manual_seed(0)
    quantizer = vector_quantizer(50, 4, metric=metric, channel_dim=1, **options)
    x = draw(3, 4 * quantizer.heads, 8)
    indices, sq_distances = quantizer.topk(x, 5)
    assert torch.equal(indices[..., 0], quantizer(x).indices)
    for rank in range(5):
        chosen = quantizer.decode(indices[..., rank])
        rows = x.view(3, quantizer.heads, 4, 8)
        rows = rows / rows.norm(dim=2, keepdim=True) if metric == "cosine" else rows
        expected = (chosen.view_as(rows) - rows).square().sum(dim=2).movedim(1, -1)
        torch.testing.assert_close(sq_distances[..., rank].view_as(expected), expected, rtol=1e-5, atol=1e-6)
    assert (sq_distances.diff(dim=-1) >= -1e-6).all()


def test_memory_is_far_below_the_matrix_of_distances() -> None:
    """65,536 x 4,096 x 4: the distances would take 1 GiB."""
    assert extra_mib("nearest_code_topk(x, codebook, 3)", 1 << 16, 1 << 12, 4) < 32
