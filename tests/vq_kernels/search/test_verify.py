"""`verify` counts the wrong indices of any quantizer, and tells by how much they are wrong."""

import pytest
import torch

from vq_kernels import nearest_code, verify


def random_pair(num_rows: int = 200, num_codes: int = 30, code_dim: int = 7) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(num_rows, code_dim, generator=generator), torch.randn(num_codes, code_dim, generator=generator)


def test_exact_indices_are_right() -> None:
    x, codebook = random_pair()
    indices = nearest_code(x, codebook).indices
    result = verify(x.view(10, 20, 7), codebook, indices.view(10, 20).to(torch.uint8))
    assert (result.num_rows, result.num_wrong) == (200, 0)
    assert result.rows.shape == result.nearest.shape == result.sq_distances.shape == (0,)


def test_wrong_indices_are_found_with_their_distances() -> None:
    x, codebook = random_pair()
    right = nearest_code(x, codebook)
    indices = right.indices.clone()
    indices[[3, 150]] = (indices[[3, 150]] + 1) % 30
    result = verify(x, codebook, indices)
    assert result.num_wrong == 2
    assert result.rows.tolist() == [3, 150]
    assert torch.equal(result.nearest, right.indices[[3, 150]])
    torch.testing.assert_close(result.least_sq_distances.float(), right.sq_distances[[3, 150]])
    expected = (x[[3, 150]].double() - codebook[indices[[3, 150]]].double()).square().sum(dim=1)
    assert torch.equal(result.sq_distances, expected)


def test_ties_padding_and_rows_that_are_not_finite() -> None:
    codebook = torch.tensor([[1.0], [-1.0], [1.0], [torch.nan]])
    x = torch.tensor([[0.0], [2.0], [2.0], [torch.inf], [5.0], [5.0]])
    result = verify(x, codebook, torch.tensor([1, 2, 0, 3, -1, 3]))
    assert (result.num_rows, result.num_wrong) == (4, 1)
    assert result.rows.tolist() == [5]


def test_offset_data_shows_what_float32_products_get_wrong() -> None:
    x, codebook = (part + 1000 for part in random_pair(2000, 300))
    expanded = (codebook.square().sum(dim=1) - 2 * x @ codebook.t()).argmin(dim=1)
    assert verify(x, codebook, expanded).num_wrong > 100
    assert verify(x, codebook, nearest_code(x, codebook).indices).num_wrong == 0


@pytest.mark.parametrize(
    ("indices", "error", "message"),
    [
        (torch.zeros(200), TypeError, "indices must have an integer dtype, got torch.float32"),
        (torch.zeros(199, dtype=torch.int64), ValueError, r"indices must be \(200,\) to match x, got \(199,\)"),
        (torch.full((200,), 30), ValueError, r"indices must be in \[0, 30\), or -1 for padding, got 30"),
        (torch.full((200,), -2), ValueError, r"indices must be in \[0, 30\), or -1 for padding, got -2"),
    ],
)
def test_indices_that_do_not_fit(indices: torch.Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        verify(*random_pair(), indices)
