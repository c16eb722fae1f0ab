"""The drawn pictures: the same for a seed, different from each other, and worth 512 codes."""

import pytest
import torch
from torch import Tensor

from vqae.data.synthetic import draw_pictures


@pytest.fixture(scope="module")
def pictures() -> Tensor:
    return draw_pictures(1000, "train", seed=3)


def test_shape_and_type(pictures: Tensor) -> None:
    assert pictures.shape == (1000, 3, 32, 32)
    assert pictures.dtype == torch.uint8
    assert pictures.is_contiguous()


def test_same_seed_same_bytes(pictures: Tensor) -> None:
    torch.manual_seed(1)  # the global generator has no part in it
    assert torch.equal(draw_pictures(1000, "train", seed=3), pictures)


def test_seeds_and_splits_share_no_picture(pictures: Tensor) -> None:
    others = [draw_pictures(1000, "test", seed=3), draw_pictures(1000, "train", seed=4)]
    rows = torch.cat([pictures, *others]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 3000


def test_leaves_global_state_alone(pictures: Tensor) -> None:
    generator_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    draw_pictures(2, "test")
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize("image_size", [1, 8, 33, 64])
def test_image_size(image_size: int) -> None:
    assert draw_pictures(3, "test", image_size=image_size).shape == (3, 3, image_size, image_size)


def test_a_scene_does_not_depend_on_its_size() -> None:
    small, large = (draw_pictures(64, "train", image_size=size).float() for size in (16, 64))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (shrunk - small).abs().mean() < 0.1 * small.std()


def test_colors_fill_the_range(pictures: Tensor) -> None:
    values = pictures.float() / 255
    assert (values.mean((0, 2, 3)) - 0.5).abs().max() < 0.1
    assert (pictures == 0).float().mean() < 0.05
    assert (pictures == 255).float().mean() < 0.15
    assert 0.15 < values.std() < 0.35


def test_more_codes_keep_paying() -> None:
    """K-means of the pixels: 512 codes are well better than 64, which are well better than 1 (on other pictures)."""
    train, test = (
        draw_pictures(num, split).flatten(1).float() / 255 for num, split in ((3000, "train"), (500, "test"))
    )
    generator = torch.Generator().manual_seed(0)
    errors = []
    for num_codes in (1, 64, 512):
        codes = train[torch.randperm(len(train), generator=generator)[:num_codes]]
        for _ in range(5):
            nearest = torch.cdist(train, codes).argmin(1)
            counts = torch.bincount(nearest, minlength=num_codes).clamp(min=1)
            codes = torch.zeros_like(codes).index_add_(0, nearest, train) / counts[:, None]
        errors.append(torch.cdist(test, codes).amin(1).square().mean().item() / 3072)
    assert errors[1] < 0.55 * errors[0]
    assert errors[2] < 0.95 * errors[1]
