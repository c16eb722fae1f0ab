"""The modules under compilation, autocast, loss scaling, copying, functional calls and export."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad

from tests.vq_kernels.copies import WAYS_TO_COPY
from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import ResidualVectorQuantizer, VectorQuantizer, nearest_code, nearest_code_topk, vector_quantize
from vq_kernels.modules.training_step import CodebookStep

# Without the warning that codes wait for data in eval mode.
LEARNING = {"commitment_weight": 0.25, "restart_after": 1, "init": "data", "warn": False}
MODULES: dict[str, Callable[[], VectorQuantizer | ResidualVectorQuantizer]] = {
    "plain": lambda: vector_quantizer(20, 6),
    "restarts": lambda: vector_quantizer(20, 6, **LEARNING),
    "averages": lambda: vector_quantizer(20, 6, ema_decay=0.5, commitment_weight=0.25),
    "cosine, heads": lambda: vector_quantizer(20, 6, metric="cosine", heads=2, **LEARNING),
    "product, images": lambda: vector_quantizer(20, 6, heads=2, separate_codebooks=True, channel_dim=1, **LEARNING),
    "residual": lambda: residual_quantizer(2, 20, 6, **LEARNING),
    "residual, averages": lambda: residual_quantizer(2, 20, 6, ema_decay=0.5, **LEARNING),
    "residual, dropout": lambda: residual_quantizer(2, 20, 6, quantizer_dropout=0.5, **LEARNING),
    "residual, grouped": lambda: residual_quantizer(2, 20, 6, heads=2, separate_codebooks=True, **LEARNING),
}

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> VectorQuantizer | ResidualVectorQuantizer:
    torch.manual_seed(0)
    return MODULES[name]()


def draw_for(
    module: VectorQuantizer | ResidualVectorQuantizer, seed: int = 0, count: int = 30
) -> tuple[Tensor, Tensor]:
    """Returns x [count, channels], or [3, channels, 2, count], and a mask."""
    channels = 6 * module.heads
    shape, leading = (
        ((3, channels, 2, count), (3, 2, count)) if module.channel_dim == 1 else ((count, channels), (count,))
    )
    return draw(*shape, seed=seed), draw(*leading, seed=seed + 1) < 1


def steps(module: nn.Module, call: Any, num_steps: int = 3, **given: Any) -> list[Tensor]:
    """Returns the results, gradients and states of a few training steps, and the results in eval mode."""
    left: list[Tensor] = []
    for step in range(num_steps):
        torch.manual_seed(step)
        x, mask = draw_for(module, seed=step, count=30 + step)
        x.requires_grad_()
        module.zero_grad()
        quantized, indices, loss = call(x, mask) if given.get("masked") else call(x)
        (quantized.square().sum() + loss).backward()
        left += [quantized.detach(), indices, loss.detach(), x.grad]
        left += [parameter.grad.clone() for parameter in module.parameters()]
        left += [value.clone() for value in module.state_dict().values()]
    module.eval()
    left += [part.detach() for part in call(x)]
    module.train()
    return left


def test_no_graph_break_in_the_functions() -> None:
    x, codebook = draw(30, 6).requires_grad_(), draw(20, 6, seed=1).requires_grad_()
    for function in (vector_quantize, nearest_code, lambda x, codebook: nearest_code_topk(x, codebook, 3)):
        assert torch._dynamo.explain(function)(x, codebook).graph_break_count == 0


@pytest.mark.parametrize(
    ("name", "masked"), [*((name, True) for name in MODULES), ("plain", False), ("residual, averages", False)]
)
def test_compiled_results_equal_eager_results(name: str, masked: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """In training, with and without a mask, and in eval mode, where no mask is given. A graph break raises.

    A graph always draws the random numbers of dead-code resets, so the eager pass has to draw them too.
    """
    monkeypatch.setattr(CodebookStep, "_draws", lambda *_: True)
    expected_module, module = make(name), make(name)
    expected = steps(expected_module, expected_module, masked=masked)
    compiled = torch.compile(module, fullgraph=True, dynamic=True, backend="aot_eager")
    for found, wanted in zip(steps(module, compiled, masked=masked), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", MODULES)
def test_autocast_searches_the_same_values_as_float32(name: str, dtype: torch.dtype) -> None:
    module = make(name).eval()
    x, _ = draw_for(module, count=500)
    layer = nn.Linear(x.shape[-1], x.shape[-1])
    with torch.autocast("cpu", dtype):
        half = layer(x)
        quantized, indices, loss = module(half)
    assert (half.dtype, quantized.dtype, loss.dtype) == (dtype, dtype, torch.float32)
    wide = module(half.float())
    assert torch.equal(indices, wide.indices)
    assert torch.equal(quantized, wide.quantized.to(dtype))
    torch.testing.assert_close(loss, wide.loss)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_changes_no_result_of_the_functions(dtype: torch.dtype) -> None:
    x, codebook = draw(500, 16) + 3, draw(200, 16, seed=1) + 3
    with torch.autocast("cpu", dtype):
        found = [*nearest_code(x, codebook), *vector_quantize(x, codebook)]
    for part, expected in zip(found, [*nearest_code(x, codebook), *vector_quantize(x, codebook)], strict=True):
        assert torch.equal(part, expected)


@pytest.mark.parametrize("name", MODULES)
def test_a_scaled_loss_gives_scaled_gradients(name: str) -> None:
    gradients = []
    for scale in (1.0, 1024.0):
        module, layer = make(name), nn.Identity()
        x, _ = draw_for(module)
        x.requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD([{"params": [x]}, *({"params": [p]} for p in module.parameters())], lr=0.1)
        torch.manual_seed(1)
        with torch.autocast("cpu", torch.float16):
            quantized, _, loss = module(layer(x))
            total = quantized.float().square().sum() + loss
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        gradients.append([x.grad, *(parameter.grad for parameter in module.parameters())])
        scaler.step(optimizer)
        scaler.update()
        assert all(parameter.isfinite().all() for parameter in module.parameters())
    for unscaled, scaled in zip(*gradients, strict=True):
        assert torch.equal(unscaled, scaled)  # a power of two


def test_gradients_that_overflow_skip_the_step() -> None:
    quantizer = vector_quantizer(20, 6)
    before = quantizer.codebook.detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    scaler.scale(1e9 * quantizer(1e4 * draw(30, 6)).loss).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(quantizer.codebook, before)
    assert scaler.get_scale() == 2.0**119


@pytest.mark.parametrize("way", WAYS_TO_COPY)
@pytest.mark.parametrize("name", MODULES)
def test_copies_train_like_the_original(name: str, way: Callable[[nn.Module], nn.Module]) -> None:
    module = make(name)
    steps(module, module, num_steps=2)
    other = way(module)
    for found, expected in zip(steps(other, other), steps(module, module), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("name", MODULES)
def test_functional_call(name: str) -> None:
    module, other = make(name), make(name)
    state = {
        key: value.detach().clone()
        for key, value in {**dict(other.named_parameters()), **dict(other.named_buffers())}.items()
    }
    untouched = copy.deepcopy(module.state_dict())
    x, _ = draw_for(module)
    results = []
    for call in (lambda: functional_call(module, state, (x,)), lambda: other(x)):
        torch.manual_seed(1)
        results.append(call())
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    for key, value in other.state_dict().items():
        assert torch.equal(state[key], value), key
    for key, value in module.state_dict().items():
        assert torch.equal(untouched[key], value), key


@pytest.mark.parametrize("name", MODULES)
def test_functional_gradients_in_eval_mode(name: str) -> None:
    module = make(name).eval()
    x, _ = draw_for(module)
    parameters = {key: value.detach() for key, value in module.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        quantized, _, loss = functional_call(module, parameters, (x,))
        return quantized.square().sum() + loss

    of_parameters, of_x = grad(loss_of, argnums=(0, 1))(parameters, x)
    x.requires_grad_()
    loss_of(dict(module.named_parameters()), x).backward()
    assert torch.equal(of_x, x.grad)
    for key, parameter in module.named_parameters():
        assert torch.equal(of_parameters[key], parameter.grad)


@pytest.mark.parametrize("name", ["averages", "residual, averages"])
def test_functional_gradients_in_training_need_cloned_buffers(name: str) -> None:
    module = make(name)
    x, _ = draw_for(module)

    def loss_of(x: Tensor, copies: dict[str, Tensor]) -> Tensor:
        torch.manual_seed(1)
        quantized, _, loss = functional_call(module, copies, (x,))
        return quantized.square().sum() + loss

    with pytest.raises(RuntimeError, match="would mutate a captured Tensor"):
        grad(loss_of)(x, {})
    before = {key: value.clone() for key, value in module.named_buffers()}
    of_x = grad(lambda x: loss_of(x, {key: value.clone() for key, value in module.named_buffers()}))(x)
    assert all(torch.equal(value, before[key]) for key, value in module.named_buffers())
    x.requires_grad_()
    loss_of(x, {}).backward()
    assert torch.equal(of_x, x.grad)


@pytest.mark.parametrize("name", MODULES)
def test_export(name: str) -> None:
    module = make(name)
    steps(module, module, num_steps=1)
    module.eval()
    x, _ = draw_for(module)
    batch = torch.export.Dim("batch", min=2)
    program = torch.export.export(module, (x,), dynamic_shapes=({0: batch},))
    names = ("vq_kernels.nearest_code", "vq_kernels.most_similar_code")
    searches = [node for node in program.graph.nodes if str(node.target).startswith(names)]
    assert len(searches) == module.codebook.shape[:-2].numel()
    other, _ = draw_for(module, seed=1)
    other = torch.cat([other, other])
    for found, expected in zip(program.module()(other), module(other), strict=True):
        torch.testing.assert_close(found, expected)
