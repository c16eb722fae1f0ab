"""When a run warns of its codebook, and which option it names."""

import dataclasses

import pytest
import torch
from torch import Tensor

from vqae.config import RECIPES, Config
from vqae.training.metrics import collapse_warning

CONFIG = Config(restart_after=15_360, batch_size=256)  # 60 steps
LATE = 10_000_000  # images


def counts_of(num_codes: int, codes_used: int, num_images: int) -> Tensor:
    """[K] counts of so many images, which chose so many codes."""
    counts = torch.zeros(num_codes, dtype=torch.int64)
    counts[torch.arange(num_images) % codes_used] += 1  # one each, then the rest to the first
    counts[0] += num_images - int(counts.sum())
    return counts


@pytest.mark.parametrize(
    ("num_codes", "codes_used", "num_images", "warns"),
    [
        (512, 255, 100_000, True),  # everything can be reached: half of the codes is half of K
        (512, 256, 100_000, False),
        (512, 2, 6_000, True),
        (512, 36, 40, False),  # 40 images cannot choose 256 codes
        (512, 20, 40, False),  # evenly drawn, they reach 38.5
        (512, 19, 40, True),
        (1, 1, 1, False),
        (1, 1, 1000, False),
        (2, 1, 1000, False),  # exactly half
        (3, 1, 1000, True),
    ],
)
def test_fewer_than_half_of_what_the_images_could_choose(
    num_codes: int, codes_used: int, num_images: int, warns: bool
) -> None:
    counts = counts_of(num_codes, codes_used, num_images)
    assert counts.sum() == num_images
    warning = collapse_warning(CONFIG, counts, LATE)
    assert (warning is not None) == warns
    if warning is not None:
        assert warning.startswith(f"warning: {num_images:,} held-out images use {codes_used} of {num_codes} codes")


def test_codes_get_the_time_to_restart_and_to_find_images() -> None:
    counts = counts_of(512, 2, 6_000)
    assert collapse_warning(CONFIG, counts, 2 * 15_360 - 1) is None
    assert collapse_warning(CONFIG, counts, 2 * 15_360) is not None


def test_without_restarts_there_is_nothing_to_wait_for() -> None:
    assert collapse_warning(dataclasses.replace(CONFIG, restart_after=0), counts_of(512, 2, 6_000), 1) is not None


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        (RECIPES["plain"], f"try --restart-after {Config.restart_after}, "),
        ({"codebook_step": "plain"}, "try --codebook-step count_normalised"),
        ({"codebook_step": "count_normalised", "embedding_norm": "none"}, "try --encoder-lr below 0.003"),
        ({"codebook_step": "count_normalised", "embedding_norm": "batch"}, "try --restart-after below 15360, "),
    ],
)
def test_the_option_that_it_names(overrides: dict[str, object], option: str) -> None:
    warning = collapse_warning(dataclasses.replace(CONFIG, **overrides), counts_of(512, 2, 6_000), LATE)
    assert warning is not None
    assert option in warning
