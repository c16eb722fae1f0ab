"""Splitting vectors into heads and joining them."""

import pytest
import torch

from vq_kernels.modules.base import HeadLayout
from vq_kernels.modules.indices import check_mask


@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("heads", [1, 2, 3])
@pytest.mark.parametrize("leading", [(5,), (2, 7), (2, 3, 4), (0, 3)])
def test_split_and_join(leading: tuple[int, ...], heads: int, separate: bool) -> None:
    layout = HeadLayout(heads, separate)
    num_vectors = torch.Size(leading).numel()
    x = torch.arange(float(num_vectors * heads * 4)).view(*leading, heads * 4)
    rows = layout.split(x)
    codebooks = heads if separate else 1
    assert layout.num_codebooks == codebooks
    assert rows.shape == (codebooks, num_vectors * heads // codebooks, 4)
    assert torch.equal(layout.join(rows, x.shape[:-1]), x)
    indices = rows[..., 0].long()  # identifies each row by its first number
    joined = layout.join_indices(indices, x.shape[:-1])
    assert joined.shape == (*leading, heads) if heads > 1 else leading
    assert torch.equal(joined.view(*leading, heads), x.view(*leading, heads, 4)[..., 0].long())
    assert torch.equal(layout.split_indices(joined), indices)


@pytest.mark.parametrize("separate", [False, True])
def test_each_codebook_gets_its_head(separate: bool) -> None:
    x = torch.tensor([[[1.0, 1.0, 2.0, 2.0], [3.0, 3.0, 4.0, 4.0]]])
    expected = (
        [[[1.0, 1.0], [3.0, 3.0]], [[2.0, 2.0], [4.0, 4.0]]]
        if separate
        else [[[1.0] * 2, [2.0] * 2, [3.0] * 2, [4.0] * 2]]
    )
    assert HeadLayout(2, separate).split(x).tolist() == expected
    mask = torch.tensor([[True, False]])
    assert HeadLayout(2, separate).split_mask(mask).tolist() == (
        [True, False] if separate else [True, True, False, False]
    )


def test_splitting_for_a_shared_codebook_is_a_view() -> None:
    x = torch.randn(4, 5, 6)
    assert HeadLayout(3, separate=False).split(x).data_ptr() == x.data_ptr()


def test_invalid_masks() -> None:
    with pytest.raises(TypeError, match=r"mask must be bool, got torch.int64"):
        check_mask(torch.ones(2, 3, dtype=torch.int64), torch.Size((2, 3)))
    with pytest.raises(ValueError, match=r"mask must be \(2, 3\) to match x, got \(2,\)"):
        check_mask(torch.ones(2, dtype=torch.bool), torch.Size((2, 3)))
