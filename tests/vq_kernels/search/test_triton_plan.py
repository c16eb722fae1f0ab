"""The choice of tiles and the cut into launches, both pure functions."""

import pytest
import torch

from vq_kernels.search.triton_common import ceil_div
from vq_kernels.search.triton_plan import (
    CONFIGS,
    MAX_TILES_PER_SPLIT,
    DeviceProperties,
    pick_config,
    plan_search,
    workspace_limit,
)
from vq_kernels.search.triton_prepare import CODE_PADDING, prepared_nbytes, row_pitch

A100, H100, B200 = (DeviceProperties(*p) for p in (((8, 0), 108), ((9, 0), 132), ((10, 0), 148)))
SHAPES = [
    (256, 1_024, 512),
    (65_536, 1_024, 64),
    (65_536, 16_384, 256),
    (1_048_576, 65_536, 32),
    (1_048_576, 1_024, 8),
    (1, 1, 1),
    (1, 1 << 20, 1),
    (7, 1 << 20, 4_096),
    (1 << 26, 512, 3),
]


@pytest.mark.parametrize("properties", [A100, H100, B200])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_sound(shape: tuple[int, int, int], properties: DeviceProperties):
    n, k, d = shape
    config = pick_config(n, k, d, torch.float32, properties)
    plan = plan_search(n, k, d, config, properties)
    assert config in CONFIGS
    assert not config.resident or d <= config.columns(d)
    tiles = ceil_div(k, config.block_k)
    assert (plan.splits - 1) * plan.tiles_per_split < tiles <= plan.splits * plan.tiles_per_split
    assert plan.tiles_per_split <= MAX_TILES_PER_SPLIT
    assert plan.tile_mask + 1 >= 2 * plan.tiles_per_split
    assert plan.tile_mask & (plan.tile_mask + 1) == 0
    assert plan.rows_per_launch % config.block_n == 0
    assert plan.rows_per_launch >= config.block_n


@pytest.mark.parametrize("properties", [A100, H100, B200])
@pytest.mark.parametrize("shape", SHAPES)
def test_the_workspace_keeps_within_its_limit(shape: tuple[int, int, int], properties: DeviceProperties):
    """Everything a search allocates beside inputs and outputs, added up here from the launchers' allocations."""
    n, k, d = shape
    config = pick_config(n, k, d, torch.float32, properties)
    plan = plan_search(n, k, d, config, properties)
    rows = min(n, plan.rows_per_launch)
    lists = rows * 4 * (1 + 4 + 1)
    states = plan.splits * rows * 4 * (5 + 4) if plan.splits > 1 else 0
    rounded_rows = 0 if config.resident else ceil_div(rows, config.block_n) * config.block_n * 2 * row_pitch(d)
    assert prepared_nbytes(k, d) + lists + states + rounded_rows + 8 * rows <= workspace_limit(n, k, d)


def test_few_rows_fill_the_device_by_splitting_the_codebook():
    config = pick_config(256, 1_024, 512, torch.float32, H100)
    plan = plan_search(256, 1_024, 512, config, H100)
    assert config.name == "few_rows"
    assert ceil_div(256, config.block_n) * plan.splits >= H100.multiprocessors // 3


def test_every_configuration_is_chosen_and_has_a_reason():
    assert len(CONFIGS) <= 8
    chosen = {
        pick_config(n, 4_096, d, torch.float32, properties).name
        for n in (256, 65_536)
        for d in (3, 64, 100, 128, 512)
        for properties in (A100, H100, B200)
    }
    assert chosen == {config.name for config in CONFIGS}
    assert all(config.reason for config in CONFIGS)


def test_no_tile_reads_past_the_padded_codes():
    assert all(CODE_PADDING % config.block_k == 0 for config in CONFIGS)


@pytest.mark.parametrize(
    ("properties", "d", "aligned", "name"),
    [
        (A100, 32, False, "short"),
        (A100, 64, False, "long_ampere"),
        (A100, 128, True, "short"),
        (H100, 64, True, "short_shared"),
        (H100, 64, False, "medium"),
        (B200, 64, True, "short"),
        (B200, 32, False, "medium"),
    ],
)
def test_views_that_are_not_aligned_get_a_tile_that_does_not_spill(
    properties: DeviceProperties, d: int, aligned: bool, name: str
):
    assert pick_config(65_536, 1_024, d, torch.float32, properties, aligned=aligned).name == name


@pytest.mark.parametrize("properties", [A100, H100, B200])
@pytest.mark.parametrize("d", [8, 50, 100])
def test_rows_of_a_length_that_16_does_not_divide_are_not_aligned(d: int, properties: DeviceProperties):
    given, denied = (pick_config(65_536, 1_024, d, torch.float32, properties, aligned=a) for a in (True, False))
    assert given == denied


def test_a_short_last_batch_uses_the_same_kernel():
    for d in (32, 128, 512):
        whole = pick_config(65_536, 1_024, d, torch.float32, H100)
        assert pick_config(60_001, 1_024, d, torch.float32, H100) == whole


@pytest.mark.parametrize(
    ("d", "pitch"), [(1, 2), (2, 2), (3, 4), (4, 4), (5, 8), (8, 8), (9, 16), (100, 104), (4_096, 4_096)]
)
def test_row_pitch(d: int, pitch: int):
    assert row_pitch(d) == pitch
