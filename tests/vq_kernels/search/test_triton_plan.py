"""The selection of tiles and the division into launches."""

import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tests.vq_kernels.search.memory import workspace_limit
from vq_kernels.search.triton import launch, prepare, rerank, scan
from vq_kernels.search.triton.common import ceil_div
from vq_kernels.search.triton.plan import (
    CODE_PADDING,
    CONFIGS,
    MAX_CODES_PER_SPLIT,
    DeviceProperties,
    pick_config,
    plan_search,
    row_pitch,
)

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
    (1 << 26, 3, 100),
    (1_048_576, 256, 512),
]


@pytest.mark.parametrize("properties", [A100, H100, B200])
@pytest.mark.parametrize("shape", SHAPES)
def test_plans_are_sound(shape: tuple[int, int, int], properties: DeviceProperties):
    n, k, d = shape
    config = pick_config(n, k, d, torch.float32, properties)
    plan = plan_search(n, k, config, properties)
    assert config in CONFIGS
    assert not config.resident or d <= config.columns(d)
    tiles = ceil_div(k, config.block_k)
    assert (plan.splits - 1) * plan.tiles_per_split < tiles <= plan.splits * plan.tiles_per_split
    assert plan.tiles_per_split * config.block_k <= MAX_CODES_PER_SPLIT
    assert 2 * plan.tiles_per_split * config.block_k // 64 <= plan.tile_mask + 1 <= 2**8
    assert plan.tile_mask & (plan.tile_mask + 1) == 0


class Allocations(TorchDispatchMode):
    """Counts the bytes of all tensors allocated inside, as PyTorch's allocator may count them, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor) and func._schema.returns[0].alias_info is None:
            self._add(made.nbytes + (2**20 if made.nbytes > 2**20 else 512))  # including the rest of its block
            weakref.finalize(made, self._add, -(made.nbytes + (2**20 if made.nbytes > 2**20 else 512)))
        return made

    def _add(self, nbytes: int) -> None:
        self.live += nbytes
        self.most = max(self.most, self.live)


class Launches(TorchDispatchMode):
    """Counts the launches inside: the kernels it stands in for, and every operator of PyTorch that does some work."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __getitem__(self, grid: object) -> Callable[..., None]:
        self.count += 1
        return lambda *arguments, **options: None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket not in (torch.ops.aten.empty, torch.ops.aten.new_empty)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> Launches:
    """Stands in for all kernels of the search."""
    found = Launches()
    for module in (prepare, scan, rerank):
        for name in [name for name in vars(module) if name.endswith("_kernel")]:
            monkeypatch.setattr(module, name, found)
    return found


@pytest.mark.parametrize("properties", [A100, H100, B200])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_search_stays_within_its_memory_limit(
    monkeypatch: pytest.MonkeyPatch, launches: Launches, shape: tuple[int, int, int], properties: DeviceProperties
):
    """Run all launches of a search on meta tensors, and measure its peak memory beside inputs and outputs."""
    n, k, d = shape
    monkeypatch.setattr(launch, "device_properties", lambda device: properties)
    x, codebook = (torch.empty(rows, d, device="meta") for rows in (n, k))
    with Allocations() as allocations:
        found = launch.search(x, codebook, [])
        assert allocations.most - allocations.live <= workspace_limit(n, k, d)
    assert found[0].shape == (n,)


@pytest.mark.parametrize("shape", [(8_192, 4_096, 256), (8_192, 4_096, 64), (65_536, 65_536, 50)])
def test_a_search_makes_two_launches_and_preparing_a_codebook_two_more(launches: Launches, shape: tuple[int, int, int]):
    n, k, d = shape
    x, codebook = (torch.empty(rows, d, device="meta") for rows in (n, k))
    with launches:
        prepared = launch.prepare(codebook)
        assert launches.count == 2
        launch.search(x, codebook, prepared)
        assert launches.count == 4
        launch.search(x, codebook, [])
        assert launches.count == 8


def test_few_rows_split_the_codebook():
    config = pick_config(256, 1_024, 512, torch.float32, H100)
    plan = plan_search(256, 1_024, config, H100)
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


def test_tiles_do_not_read_past_the_padded_codes():
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
def test_unaligned_views_get_a_tile_that_does_not_spill(properties: DeviceProperties, d: int, aligned: bool, name: str):
    assert pick_config(65_536, 1_024, d, torch.float32, properties, aligned=aligned).name == name


@pytest.mark.parametrize("properties", [A100, H100, B200])
@pytest.mark.parametrize("d", [8, 50, 100])
def test_rows_are_unaligned_if_16_does_not_divide_their_length(d: int, properties: DeviceProperties):
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
