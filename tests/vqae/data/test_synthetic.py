"""The drawn images: the same for a seed, different from each other, and worth 512 codes."""

import pytest
import torch
from torch import Tensor

from vqae.data.synthetic import draw_images


@pytest.fixture(scope="module")
def images() -> Tensor:
    return draw_images(1000, "train", seed=3)


def test_shape_and_type(images: Tensor) -> None:
    assert images.shape == (1000, 3, 32, 32)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()


def test_same_seed_same_bytes(images: Tensor) -> None:
    torch.manual_seed(1)  # the global generator has no part in it
    assert torch.equal(draw_images(1000, "train", seed=3), images)


def test_seeds_and_splits_share_no_image(images: Tensor) -> None:
    others = [draw_images(1000, "test", seed=3), draw_images(1000, "train", seed=4)]
    rows = torch.cat([images, *others]).flatten(1)
    assert len(torch.unique(rows, dim=0)) == 3000


def test_leaves_global_state_alone(images: Tensor) -> None:
    generator_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    draw_images(2, "test")
    assert torch.equal(torch.get_rng_state(), generator_state)
    assert torch.get_num_threads() == num_threads


@pytest.mark.parametrize("image_size", [1, 8, 33, 64])
def test_image_size(image_size: int) -> None:
    assert draw_images(3, "test", image_size=image_size).shape == (3, 3, image_size, image_size)


def test_scenes_do_not_depend_on_image_size() -> None:
    small, large = (draw_images(64, "train", image_size=size).float() for size in (16, 64))
    shrunk = torch.nn.functional.avg_pool2d(large, 4)
    assert (shrunk - small).abs().mean() < 0.1 * small.std()


def test_colors_fill_the_range(images: Tensor) -> None:
    values = images.float() / 255
    assert (values.mean((0, 2, 3)) - 0.5).abs().max() < 0.1
    assert (images == 0).float().mean() < 0.05
    assert (images == 255).float().mean() < 0.15
    assert 0.15 < values.std() < 0.35


def test_more_codes_reduce_the_error() -> None:
    """K-means of the pixels: 512 codes are well better than 64, which are well better than 1 (on other images)."""
    train, test = (draw_images(num, split).flatten(1).float() / 255 for num, split in ((3000, "train"), (500, "test")))
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
