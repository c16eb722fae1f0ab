"""Modules in half precision: their moving averages stay in float32."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer

MODULES: dict[str, Callable[..., Any]] = {
    "quantizer": lambda decay: VectorQuantizer(4, 2, ema_decay=decay),
    "residual": lambda decay: ResidualVectorQuantizer(1, 4, 2, ema_decay=decay),
    "drop-in": lambda decay: VectorQuantize(2, 4, decay=decay, kmeans_init=True),
}
CONVERSIONS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "half": lambda module: module.half(),
    "bfloat16": lambda module: module.bfloat16(),
    "to": lambda module: module.to(torch.bfloat16),
    "to a device": lambda module: module.to("cpu", torch.float16),
    "twice": lambda module: module.half().bfloat16(),
}
COMPAT = ("cluster_size", "embed_avg")
CENTRES = torch.tensor([[3.0, 3.0], [3.0, -3.0], [-3.0, 3.0], [-3.0, -3.0]])


def codes(module: Any) -> Tensor:
    return module.codebook.float().view(4, 2)


def train(module: nn.Module, dtype: torch.dtype, num_steps: int, num_rows: int) -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(num_steps):
        chosen = torch.randint(4, (num_rows,), generator=generator)
        rows = CENTRES[chosen] + 0.5 * torch.randn(num_rows, 2, generator=generator)
        module(rows.to(dtype)[None])


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_averages_stay_in_float32(name: str, conversion: str) -> None:
    module: Any = MODULES[name](0.9)
    state = {key: value.clone() for key, value in module.state_dict().items()}
    CONVERSIONS[conversion](module)
    converted = module.state_dict()
    averages = [key for key in state if key.rpartition(".")[2] in ("cluster_sizes", "cluster_sums", *COMPAT)]
    assert len(averages) == 2
    for key in averages:
        assert converted[key].dtype == torch.float32
        assert torch.equal(converted[key], state[key])  # not rounded on the way
    assert module.codebook.dtype in (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("name", MODULES)
def test_codes_follow_as_in_float32(name: str) -> None:
    found = {}
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        torch.manual_seed(0)
        module = MODULES[name](0.99).to(dtype)
        train(module, dtype, 1200, 64)
        found[dtype] = codes(module).sort(dim=0).values
    for dtype in (torch.float16, torch.bfloat16):
        assert (found[dtype] - found[torch.float32]).abs().max() < 0.05, dtype


@pytest.mark.parametrize("name", MODULES)
def test_many_rows_do_not_overflow(name: str) -> None:
    module = MODULES[name](0.9).half()
    train(module, torch.float16, 2, 300_000)
    assert codes(module).isfinite().all()
    assert codes(module).abs().max() < 10


def test_float64_stays_float64() -> None:
    assert VectorQuantizer(4, 2).double().cluster_sums.dtype == torch.float64


def test_a_default_dtype_of_half_precision() -> None:
    torch.set_default_dtype(torch.bfloat16)
    try:
        quantizer = VectorQuantizer(4, 2)
    finally:
        torch.set_default_dtype(torch.float32)
    assert quantizer.codebook.dtype == torch.bfloat16
    assert quantizer.cluster_sums.dtype == torch.float32
