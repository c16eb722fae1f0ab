"""The memory of the autotuned choice; timing itself needs a GPU."""

import json
from pathlib import Path

import pytest
import torch

from vq_kernels.search import autotune
from vq_kernels.search.triton_plan import CONFIGS


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "vq_kernels" / "scan_configs.json"


def test_a_choice_is_remembered_for_its_bucket():
    config = next(config for config in CONFIGS if config.name == "few_rows")
    autotune.remember(1000, 512, 64, torch.float32, "GPU", config)
    assert autotune.remembered(1024, 500, 64, torch.float32, "GPU") == config
    assert autotune.remembered(1025, 512, 64, torch.float32, "GPU") is None
    assert autotune.remembered(1000, 512, 63, torch.float32, "GPU") is None
    assert autotune.remembered(1000, 512, 64, torch.float16, "GPU") is None
    assert autotune.remembered(1000, 512, 64, torch.float32, "other GPU") is None


def test_choices_add_up(cache: Path):
    for k in (512, 1024):
        autotune.remember(1000, k, 64, torch.float32, "GPU", CONFIGS[0])
    assert len(json.loads(cache.read_text())) == 2
    assert [path.name for path in cache.parent.iterdir()] == [cache.name]


def test_choices_of_another_process_are_kept(cache: Path):
    autotune.remember(1000, 512, 64, torch.float32, "GPU", CONFIGS[0])
    stored = json.loads(cache.read_text())
    cache.write_text(json.dumps(stored | {"another": "medium"}))
    autotune.remember(1000, 1024, 64, torch.float32, "GPU", CONFIGS[0])
    assert len(json.loads(cache.read_text())) == 3


def test_a_search_does_not_read_the_file_again(cache: Path):
    autotune.remember(1000, 512, 64, torch.float32, "GPU", CONFIGS[0])
    assert autotune.remembered(1000, 512, 64, torch.float32, "GPU") == CONFIGS[0]
    cache.unlink()
    assert autotune.remembered(1000, 512, 64, torch.float32, "GPU") == CONFIGS[0]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"key": 3}'])
def test_a_damaged_file_is_as_good_as_none(cache: Path, content: str):
    cache.parent.mkdir()
    cache.write_text(content)
    assert autotune.remembered(1000, 512, 64, torch.float32, "GPU") is None


def test_a_choice_that_cannot_serve_is_not_taken():
    autotune.remember(1000, 512, 4096, torch.float32, "GPU", next(c for c in CONFIGS if c.resident))
    assert autotune.remembered(1000, 512, 4096, torch.float32, "GPU") is None


def test_only_a_gpu_is_timed():
    with pytest.raises(ValueError, match="device must be a CUDA device to be timed, got 'cpu'"):
        autotune.autotune(10, 10, 10, torch.float32, "cpu")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_autotune_stores_what_it_returns():
    config = autotune.autotune(4096, 1024, 64, torch.float32, "cuda")
    assert autotune.remembered(4096, 1024, 64, torch.float32, torch.cuda.get_device_name()) == config
