"""`VectorQuantize` under autocast, loss scaling, checkpointing, copying, functional calls, compilation and export."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from tests.vq_kernels.compat.side_by_side import (
    DIM,
    MODES,
    NUM_CODES,
    assert_all_close,
    assert_close,
    assert_same_step,
    draw,
    draw_input,
    pair,
    step,
)
from tests.vq_kernels.copies import WAYS_TO_COPY
from vq_kernels import VectorQuantize

FEW_MODES = ["default", "cosine", "heads with own codes, projection, cosine", "learnable", "k-means", "dead codes"]
HALVES = [torch.bfloat16, torch.float16]


def make(mode: str) -> VectorQuantize:
    torch.manual_seed(0)
    return VectorQuantize(DIM, NUM_CODES, **MODES[mode])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", ["default", "learnable", "heads", "cosine", "heads, projection, cosine"])
def test_autocast_searches_the_same_values_as_float32(mode: str, dtype: torch.dtype) -> None:
    layer, before = make(mode).eval(), nn.Linear(DIM, DIM)
    x = 10 * draw(3, 200, DIM)
    with torch.autocast("cpu", dtype):
        half = before(x)
        rows = layer.project_in(half)
        found = layer(half)
        cross_entropy = layer(half, indices=found[1])[1]
    assert half.dtype == rows.dtype == dtype
    layer.project_in.register_forward_hook(lambda *_: rows.float())  # autocast may run the projection in half precision
    expected = layer(half.float())
    assert torch.equal(found[1], expected[1])
    if not layer.has_projections:
        assert torch.equal(found[0], expected[0].to(dtype))
    assert torch.equal(cross_entropy, layer(half.float(), indices=found[1])[1])


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("mode", MODES)
def test_autocast_with_a_scaled_loss_gives_scaled_gradients(mode: str, dtype: torch.dtype) -> None:
    gradients = []
    for scale in (1.0, 64.0):
        layer = make(mode)
        x = draw_input(MODES[mode]).requires_grad_()
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        optimizer = torch.optim.SGD([x, *layer.parameters()], lr=0.1)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype):
            quantized, _, loss = layer(x)
            total = quantized.float().square().sum() + loss
        assert loss.dtype == torch.float32
        scaler.scale(total).backward()
        scaler.unscale_(optimizer)
        gradients.append([value.grad for value in (x, *layer.parameters()) if value.grad is not None])
        scaler.step(optimizer)
        scaler.update()
        assert scaler.get_scale() == scale
    for unscaled, scaled in zip(*gradients, strict=True):
        assert unscaled.isfinite().all()
        assert torch.equal(unscaled, scaled)  # a power of two


CHECKPOINTED = ["default", "straight-through", "dead codes, cosine", "heads with own codes", "projection", "k-means"]


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("mode", [*CHECKPOINTED, "learnable, dead codes"])
def test_activation_checkpointing_changes_nothing(mode: str, reentrant: bool) -> None:
    left: dict[bool, list[dict[str, Tensor]]] = {False: [], True: []}
    for checkpointed in left:
        layer, before = make(mode), nn.Linear(DIM, DIM)
        for seed in range(4):
            torch.manual_seed(seed)
            x = draw(3, 20, DIM, seed=seed).requires_grad_()

            def block(x: Tensor, layer: nn.Module = layer, before: nn.Module = before) -> Tensor:
                quantized, _, loss = layer(before(x))
                rate = 0.0 if mode == "k-means" else 0.5
                return F.dropout(before(quantized).square(), rate).sum() + 100 * loss

            result = checkpoint(block, x, use_reentrant=reentrant) if checkpointed else block(x)
            layer.zero_grad()
            result.backward()
            assert x.grad is not None
            gradients = {name: value.grad for name, value in layer.named_parameters() if value.grad is not None}
            state = {f"{name} held": value.clone() for name, value in layer.state_dict().items()}
            left[checkpointed].append({"x": x.grad, **gradients, **state})
    for found, expected in zip(left[True], left[False], strict=True):
        assert found.keys() == expected.keys()
        for name in found:
            assert torch.equal(found[name], expected[name]), name


@pytest.mark.parametrize("mode", ["default", "learnable"])
def test_cross_entropy_under_activation_checkpointing(mode: str) -> None:
    targets = torch.arange(60).view(3, 20) % NUM_CODES
    gradients = []
    for checkpointed in (False, True):
        layer, x = make(mode), draw(3, 20, DIM).requires_grad_()

        def block(x: Tensor, layer: nn.Module = layer) -> Tensor:
            loss: Tensor = layer(x, indices=targets)[1]
            return loss

        (checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)).backward()
        gradients.append([value.grad for value in (x, *layer.parameters())])
    for plain, again in zip(*gradients, strict=True):
        assert torch.equal(plain, again)


@pytest.mark.parametrize("way", WAYS_TO_COPY)
@pytest.mark.parametrize("mode", FEW_MODES)
def test_copies_train_like_the_original(mode: str, way: Callable[[nn.Module], nn.Module]) -> None:
    layer = make(mode)
    step(layer, draw_input(MODES[mode]))
    other = way(layer)
    x = draw_input(MODES[mode], 1)
    assert_same_step(step(other, x), step(layer, x))


@pytest.mark.parametrize("mode", FEW_MODES)
def test_functional_call(mode: str) -> None:
    layer, other = make(mode), make(mode)
    x = draw_input(MODES[mode])
    step(other, x)  # a state that differs from the layer's
    state = {name: value.detach().clone() for name, value in other.state_dict().items()}
    untouched = copy.deepcopy(layer.state_dict())
    results = []
    for call in (lambda: functional_call(layer, state, (x,)), lambda: other(x)):
        torch.manual_seed(1)
        results.append(call())
    for found, expected in zip(*results, strict=True):
        assert torch.equal(found, expected)
    for name, value in other.state_dict().items():
        assert torch.equal(state[name], value), name
    for name, value in layer.state_dict().items():
        assert torch.equal(untouched[name], value), name


@pytest.mark.parametrize("targets", [None, torch.zeros(3, 20, dtype=torch.int64)])
@pytest.mark.parametrize("mode", ["learnable", "projection"])
def test_functional_gradients(mode: str, targets: Tensor | None) -> None:
    layer = make(mode)
    x = draw_input(MODES[mode])
    parameters = {name: value.detach() for name, value in layer.named_parameters()}

    def loss_of(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        keywords = {"indices": targets, "freeze_codebook": True}
        quantized, *_, loss = functional_call(layer, parameters, (x,), keywords)
        result: Tensor = quantized.square().sum() + loss
        return result

    of_parameters, of_x = grad(loss_of, argnums=(0, 1))(parameters, x)
    x.requires_grad_()
    loss_of(dict(layer.named_parameters()), x).backward()
    assert x.grad is not None
    assert torch.equal(of_x, x.grad)
    for name, parameter in layer.named_parameters():
        expected = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        assert torch.equal(of_parameters[name], expected), name


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    ("mode", "call"),
    [(mode, "plain") for mode in ("default", "learnable", "dead codes", "images, heads, projection")]
    + [("k-means, cosine, heads with own codes", call) for call in ("plain", "lens", "indices")],
)
def test_no_graph_break(mode: str, call: str, training: bool) -> None:
    layer = VectorQuantize(DIM, NUM_CODES, **MODES[mode]).train(training)
    x = draw_input(MODES[mode])
    keywords = {"lens": torch.tensor([20, 0, 7])} if call == "lens" else {}
    if call == "indices":
        keywords = {"indices": layer(x)[1]}
    explained = torch._dynamo.explain(layer)(x.requires_grad_(), **keywords)
    assert explained.graph_break_count == 0, explained.break_reasons
    assert explained.graph_count == 1


@pytest.mark.usefixtures("_fresh_compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch")
@pytest.mark.parametrize("mode", ["k-means, cosine, heads with own codes", "dead codes"])
def test_compiled_steps_equal_eager_steps(mode: str) -> None:
    eager, other = pair(**MODES[mode])[0], pair(**MODES[mode])[0]
    compiled = torch.compile(other, fullgraph=True, dynamic=True, backend="aot_eager")
    for seed in range(3):
        x = draw(2, 20 + seed, DIM, seed=seed)
        expected = step(eager, x, seed)
        found = step(compiled, x, seed)
        assert torch.equal(found.indices, expected.indices)
        assert_close(found.loss, expected.loss)
        assert_close(found.gradients["x"], expected.gradients["x"])
        assert_all_close(other.state_dict(), eager.state_dict())


@pytest.mark.parametrize("mode", ["default", "heads with own codes, projection, cosine"])
def test_export(mode: str) -> None:
    layer = VectorQuantize(DIM, NUM_CODES, **MODES[mode]).eval()
    program = torch.export.export(layer, (draw(4, 5, DIM),), dynamic_shapes={"x": {1: torch.export.Dim("n", min=2)}})
    x = draw(4, 9, DIM, seed=1)
    for found, expected in zip(program.module()(x), layer(x), strict=True):
        assert torch.equal(found, expected)
