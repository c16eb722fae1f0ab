"""torch.optim.swa_utils.AveragedModel over parameters and buffers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import vector_quantize_pytorch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn, update_bn

from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer, nearest_code

MODULES: dict[str, Callable[[], nn.Module]] = {
    "averages": lambda: VectorQuantizer(20, 6),
    "learnable": lambda: VectorQuantizer(20, 6, ema_decay=None),
    "k-means": lambda: VectorQuantizer(20, 6, init="kmeans"),
    "product": lambda: VectorQuantizer(20, 3, heads=2, separate_codebooks=True),
    "residual": lambda: ResidualVectorQuantizer(3, 20, 6),
    "drop-in": lambda: VectorQuantize(6, 20),
    "drop-in, learnable": lambda: VectorQuantize(6, 20, learnable_codebook=True, ema_update=False),
    "drop-in, k-means": lambda: VectorQuantize(6, 20, kmeans_init=True),
}
WAYS: dict[str, tuple[dict[str, Any], Callable[[int], float]]] = {  # and the weight of the n-th model after the first
    "default": ({}, lambda n: 1 / (n + 1)),
    "multi": ({"multi_avg_fn": get_ema_multi_avg_fn(0.9)}, lambda n: 0.1),
    "single": ({"avg_fn": get_ema_avg_fn(0.9)}, lambda n: 0.1),
    "custom": ({"avg_fn": lambda averaged, model, n: averaged + (model - averaged) / (n + 1)}, lambda n: 1 / (n + 1)),
}


def draw(seed: int) -> Tensor:
    return torch.randn(60, 6, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def train(module: nn.Module, step: int) -> None:
    optimizer = torch.optim.SGD([{"params": list(module.parameters()) or [torch.zeros(())]}], lr=1.0)
    x = draw(step).requires_grad_()
    module(x)[2].backward()
    optimizer.step()


def codes_of(module: nn.Module) -> Tensor:
    return module.codebook.detach().clone()


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in module.state_dict().items()}


@pytest.mark.parametrize("begins_before_training", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_averages_are_averages(name: str, way: str, begins_before_training: bool) -> None:
    module = make(name)
    options, weight = WAYS[way]
    averaged = AveragedModel(module, use_buffers=True, **options)
    expected = None
    for step in range(4):
        if step or not begins_before_training:
            train(module, step)
        averaged.update_parameters(module)
        codes = codes_of(module)
        expected = codes if expected is None else expected + weight(step) * (codes - expected)
    torch.testing.assert_close(codes_of(averaged.module), expected)

    before = state_of(averaged.eval())
    quantized, indices, _ = averaged(draw(9))
    if name in ("averages", "learnable", "k-means", "drop-in", "drop-in, learnable", "drop-in, k-means"):
        assert torch.equal(indices, nearest_code(draw(9), codes_of(averaged.module)).indices)
    assert quantized.isfinite().all()
    for key, value in averaged.state_dict().items():  # k-means did not run again
        assert torch.equal(value, before[key]), key


@pytest.mark.parametrize("name", MODULES)
def test_update_bn_leaves_frozen_averages(name: str) -> None:
    module = nn.Sequential(nn.BatchNorm1d(6), make(name))
    train(module, 0)
    averaged = AveragedModel(module, use_buffers=True)
    averaged.module[1].freeze_codebook = True
    before = codes_of(averaged.module[1])
    update_bn([5 + draw(1)], averaged)
    assert averaged.module[0].running_mean.min() > 4
    assert torch.equal(codes_of(averaged.module[1]), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODULES)
def test_training_goes_on_from_the_averages(name: str, way: str) -> None:
    module = make(name)
    averaged = AveragedModel(module, use_buffers=True, **WAYS[way][0])
    for step in range(3):
        averaged.update_parameters(module)  # first before any batch
        train(module, step)
    averaged.update_parameters(module)
    other = averaged.module
    for _ in range(2):
        other(torch.full((60, 6), 5.0))
    at_the_rows = (codes_of(other) - 5).norm(dim=-1) < 1  # all codes of a codebook that started again
    assert at_the_rows.float().mean() < 0.5


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_old_state_dicts_with_bool_load(name: str, assign: bool) -> None:
    module, other = make(name), make(name)
    waiting = {key: value.clone() for key, value in other.state_dict().items()}
    train(module, 0)
    key, done = ("_codebook.initted", True) if name.startswith("drop-in") else ("needs_data", False)
    trained = state_of(module)
    assert (trained[key] == float(done)).all()
    for state in (waiting, trained):
        old = {**state, key: state[key].bool()}
        other.load_state_dict(old, assign=assign)
        assert old[key].dtype == torch.bool  # the caller's dict is as it was
        assert torch.equal(other.state_dict()[key], state[key])
        averaged = AveragedModel(other, use_buffers=True)
        for _ in range(2):
            averaged.update_parameters(other)
    before = codes_of(other)
    other.eval()(draw(1))
    assert torch.equal(codes_of(other), before)


@pytest.mark.parametrize("trained", [False, True])
def test_initted_goes_to_the_original_and_back(trained: bool) -> None:
    ours = VectorQuantize(6, 20, kmeans_init=True)
    theirs = vector_quantize_pytorch.VectorQuantize(6, 20, kmeans_init=True)
    if trained:
        train(ours, 0)
    theirs.load_state_dict(ours.state_dict())
    assert theirs._codebook.initted.dtype == torch.bool
    assert bool(theirs._codebook.initted) == trained
    again = VectorQuantize(6, 20, kmeans_init=not trained)
    again.load_state_dict(theirs.state_dict())
    assert again._codebook.initted.dtype == torch.float32
    assert bool(again._codebook.initted) == trained
