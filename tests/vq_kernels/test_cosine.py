"""The most similar code against the argmax of float64 dot products."""

import pytest
import torch
from torch import Tensor

from vq_kernels.cosine import most_similar_code, unit

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def check_most_similar(x: Tensor, codebook: Tensor, tolerance: float = 1e-15) -> None:
    """Check for the index of the largest product, or one that float64 cannot distinguish from it."""
    found = most_similar_code(x, codebook)
    products = x.double() @ codebook.double().t()
    chosen = products.gather(1, found.indices[:, None])[:, 0]
    scale = x.double().norm(dim=1) * codebook.double().norm(dim=1).max()
    assert (products.amax(dim=1) - chosen <= tolerance * scale).all()
    decided = products.topk(2, dim=1).values if codebook.shape[0] > 1 else None
    if decided is not None:
        clear = decided[:, 0] - decided[:, 1] > tolerance * scale
        assert torch.equal(found.indices[clear], products.argmax(dim=1)[clear])
    assert torch.equal(found.codes, codebook[found.indices].to(x.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num_rows", "num_codes", "code_dim"), [(1, 1, 1), (63, 7, 3), (500, 130, 8), (300, 64, 100)])
def test_unit_vectors(num_rows: int, num_codes: int, code_dim: int, dtype: torch.dtype) -> None:
    check_most_similar(unit(draw(num_rows, code_dim).to(dtype)), unit(draw(num_codes, code_dim, seed=1).to(dtype)))


@pytest.mark.parametrize("spread", [1e-3, 1e-5, 1e-6, 1e-7])
def test_unit_vectors_whose_rounded_norms_decide_the_distances(spread: float) -> None:
    codebook = unit((draw(1, 8) + spread * draw(200, 8, seed=1)).float())
    x = unit(draw(400, 8, seed=2).float())
    check_most_similar(x, codebook)
    near = unit(codebook[:100] + 1e-6 * draw(100, 8, seed=3).float())
    check_most_similar(near, codebook)
    nearest = torch.cdist(near.double(), codebook.double()).argmin(dim=1)
    if spread == 1e-6:  # the nearest code is not always the most similar
        assert (nearest != most_similar_code(near, codebook).indices).any()


@pytest.mark.parametrize("scale", [1e-10, 1.0, 1e10])
def test_codes_of_any_length(scale: float) -> None:
    codebook = (scale * draw(100, 16) * draw(100, 1, seed=1).exp()).float()
    check_most_similar(draw(400, 16, seed=2).float(), codebook)


def test_ties_give_the_lowest_index() -> None:
    codebook = unit(draw(20, 8).float()).repeat(3, 1)
    x = draw(50, 8, seed=1).float()
    x[7] = 0
    found = most_similar_code(x, codebook)
    assert found.indices.max() < 20
    assert found.indices[7] == 0
    codebook[0] = torch.nan
    assert most_similar_code(x, codebook).indices[7] == 1


def test_rows_and_codes_that_are_not_finite() -> None:
    codebook, x = draw(20, 8).float(), draw(50, 8, seed=1).float()
    codebook[3, 1], codebook[5, 2], x[4, 0], x[6, 7] = torch.nan, torch.inf, torch.nan, torch.inf
    found = most_similar_code(x, codebook)
    assert found.indices[[4, 6]].tolist() == [0, 0]
    assert found.similarities.isnan().nonzero()[:, 0].tolist() == [4, 6]
    assert not torch.isin(found.indices, torch.tensor([3, 5])).any()
    usable = torch.tensor([k for k in range(20) if k not in (3, 5)])
    rows = torch.tensor([n for n in range(50) if n not in (4, 6)])
    expected = usable[(x[rows].double() @ codebook[usable].double().t()).argmax(dim=1)]
    assert torch.equal(found.indices[rows], expected)


def test_shapes_and_similarities() -> None:
    x, codebook = draw(2, 3, 8).float(), draw(20, 8, seed=1).float()
    indices, codes, similarities = most_similar_code(x, codebook)
    assert (indices.shape, codes.shape, similarities.shape) == ((2, 3), (2, 3, 8), (2, 3))
    torch.testing.assert_close(similarities, (x * codes).sum(dim=-1))
    assert most_similar_code(x[:0], codebook).codes.shape == (0, 3, 8)


def test_errors() -> None:
    with pytest.raises(ValueError, match=r"x must be \[..., 8\] to match codebook \(20, 8\), got \(5, 7\)"):
        most_similar_code(torch.zeros(5, 7), torch.zeros(20, 8))
    with pytest.raises(TypeError, match="codebook must be float32"):
        most_similar_code(torch.zeros(5, 8), torch.zeros(20, 8, dtype=torch.int64))


def test_unit() -> None:
    assert unit(torch.tensor([[3.0, 4.0], [0.0, 0.0], [1e-9, 0.0]])).tolist() == [
        [pytest.approx(0.6), pytest.approx(0.8)],
        [0.0, 0.0],
        [1.0, 0.0],
    ]
