"""The data sets of the search benchmarks: what is drawn is what the table says."""

import pytest
import torch

from benchmarks.data import DATA_NAMES, make_search_data


@pytest.mark.parametrize("name", DATA_NAMES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_the_same_seed_draws_the_same_values(name: str, dtype: torch.dtype) -> None:
    x, codebook = make_search_data(name, 50, 31, 7, dtype=dtype, seed=1)
    assert (x.shape, codebook.shape) == ((50, 7), (31, 7))
    assert x.dtype == codebook.dtype == dtype
    assert x.isfinite().all()
    assert codebook.isfinite().all()
    again = make_search_data(name, 50, 31, 7, dtype=dtype, seed=1)
    other = make_search_data(name, 50, 31, 7, dtype=dtype, seed=2)
    assert torch.equal(x, again.x)
    assert torch.equal(codebook, again.codebook)
    assert not torch.equal(x, other.x)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_near_duplicates_differ_in_the_last_bit_of_one_coordinate(dtype: torch.dtype) -> None:
    codebook = make_search_data("near-duplicates", 5, 41, 9, dtype=dtype).codebook
    first, second = codebook[0:40:2], codebook[1:40:2]
    assert ((first != second).sum(dim=1) == 1).all()
    differing = first != second
    ulp = (first[differing].double() - second[differing].double()).abs() / first[differing].double().abs()
    assert (ulp <= torch.finfo(dtype).eps * (1 + 1e-6)).all()


def test_half_of_the_duplicates_are_copies() -> None:
    codebook = make_search_data("duplicates", 5, 40, 9).codebook
    assert torch.unique(codebook, dim=0).shape[0] == 20


@pytest.mark.parametrize("offset", [3, 100, 1000])
def test_offsets_move_both_sides(offset: int) -> None:
    x, codebook = make_search_data(f"offset-{offset}", 500, 400, 9)
    assert x.mean().item() == pytest.approx(offset, abs=0.1)
    assert codebook.mean().item() == pytest.approx(offset, abs=0.1)


def test_uniform_lies_within_one_over_the_number_of_codes() -> None:
    for values in make_search_data("uniform", 500, 400, 9):
        assert values.abs().max() <= 1 / 400
        assert values.abs().max() > 0.99 / 400


def test_clustered_vectors_lie_near_their_codes() -> None:
    x, codebook = make_search_data("clustered", 500, 40, 64)
    assert torch.cdist(x, codebook).amin(dim=1).mean().item() == pytest.approx(0.3 * 64**0.5, rel=0.05)


def test_all_codes_of_a_shell_are_nearly_as_near() -> None:
    x, codebook = make_search_data("shell", 50, 40, 8)
    distances = (x.double()[:, None] - codebook.double()).square().sum(dim=2).sqrt()
    assert (distances - 1).abs().max() < 1e-4
    assert torch.unique(codebook, dim=0).shape[0] == 40


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"name must be one of gaussian, .*, got 'normal'"):
        make_search_data("normal", 1, 1, 1)
    with pytest.raises(ValueError, match=r"dtype must be float64, .*, got torch\.int32"):
        make_search_data("gaussian", 1, 1, 1, dtype=torch.int32)
