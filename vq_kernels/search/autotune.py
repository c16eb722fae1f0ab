"""Tiles chosen by timing them, on request, and remembered on disk.

`autotune(...)` times every configuration that can serve a shape and stores the fastest. Searches use what is stored
only where VQ_KERNELS_AUTOTUNE=1 is set; without it, and for shapes never timed, `pick_config` decides. Indices are the
same either way.
"""

import contextlib
import functools
import json
import os
import tempfile
from pathlib import Path

import torch
import triton
import triton.testing

from vq_kernels.search.triton_backend import device_properties, search_with_plan
from vq_kernels.search.triton_plan import CONFIGS, ScanConfig, plan_search


def cache_file() -> Path:
    """Where choices are kept: vq_kernels/scan_configs.json in the user's cache folder."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vq_kernels" / "scan_configs.json"


def choice_key(n: int, k: int, d: int, dtype: torch.dtype, device_name: str) -> str:
    """What a choice holds for: the GPU, the versions, D, the dtype, and N and K up to the next power of two."""
    shape = f"{1 << (n - 1).bit_length()}x{1 << (k - 1).bit_length()}x{d}"
    return f"{device_name}|triton {triton.__version__}|torch {torch.__version__}|{shape}|{dtype}"


def candidates(d: int) -> list[ScanConfig]:
    """The configurations that can serve codes of length d."""
    return [config for config in CONFIGS if not config.resident or d <= config.block_d]


def remembered(n: int, k: int, d: int, dtype: torch.dtype, device_name: str) -> ScanConfig | None:
    """The choice stored for a shape; None if there is none that still exists."""
    name = _read(cache_file()).get(choice_key(n, k, d, dtype, device_name))
    return next((config for config in candidates(d) if config.name == name), None)


def autotune(n: int, k: int, d: int, dtype: torch.dtype, device: torch.device | str) -> ScanConfig:
    """Time the configurations for [n, d] rows of normal data among k codes, store the fastest, and return it.

    Raises:
        ValueError: the device is not a CUDA device, so that there is nothing to time.
    """
    device = torch.device(device)
    if device.type != "cuda":
        raise ValueError(f"device must be a CUDA device to be timed, got {str(device)!r}")
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(n, d, generator=generator, device=device).to(dtype)
    codebook = torch.randn(k, d, generator=generator, device=device).to(dtype)
    elapsed_ms: dict[str, float] = {}
    for config in candidates(d):
        plan = plan_search(n, k, d, config, device_properties(device))
        # The timer records its events on the current device. A tile that asks for more shared memory than the GPU has
        # is no candidate.
        with torch.cuda.device(device), contextlib.suppress(triton.runtime.errors.OutOfResources):
            elapsed_ms[config.name] = triton.testing.do_bench(
                lambda plan=plan: search_with_plan(x, codebook, [], "exact", plan), return_mode="median"
            )
    fastest = min(candidates(d), key=lambda config: elapsed_ms.get(config.name, float("inf")))
    remember(n, k, d, dtype, torch.cuda.get_device_name(device), fastest)
    return fastest


def remember(n: int, k: int, d: int, dtype: torch.dtype, device_name: str, config: ScanConfig) -> None:
    """Store a choice; the file is replaced as a whole, so that a reader never sees half of it."""
    path = cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    _read.cache_clear()  # another process may have stored choices since
    choices = _read(path) | {choice_key(n, k, d, dtype, device_name): config.name}
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False) as file:
        json.dump(choices, file, indent=1)
    os.replace(file.name, path)
    _read.cache_clear()


@functools.cache
def _read(path: Path) -> dict[str, str]:
    """The choices stored in a file. Every search asks, so it is read once a process and after every `remember`."""
    try:
        stored = json.loads(path.read_text())
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return stored if isinstance(stored, dict) else {}
