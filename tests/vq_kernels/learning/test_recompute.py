"""Training gives the same numbers eagerly, compiled, under activation checkpointing, and with both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import VectorQuantize

AVERAGES = {"ema_decay": 0.5, "commitment_weight": 0.25}
RESTARTS = {"restart_after": 1, "init": "data"}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "averages": lambda: vector_quantizer(20, 6, **AVERAGES),
    "averages, cosine": lambda: vector_quantizer(20, 6, metric="cosine", **AVERAGES),
    "averages, residual": lambda: residual_quantizer(2, 20, 6, **AVERAGES),
    "averages, restarts": lambda: vector_quantizer(20, 6, **AVERAGES, **RESTARTS),
    "restarts": lambda: vector_quantizer(20, 6, commitment_weight=0.25, **RESTARTS),
    "k-means": lambda: vector_quantizer(20, 6, **AVERAGES, restart_after=1, init="kmeans"),
    "drop-in": lambda: VectorQuantize(6, 20),
    "drop-in, cosine, dead codes": lambda: VectorQuantize(6, 20, use_cosine_sim=True, threshold_ema_dead_code=2),
    "drop-in, learnable, dead codes": lambda: VectorQuantize(
        6, 20, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=2
    ),
}

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]


def draw(seed: int) -> Tensor:
    return torch.randn(30, 6, generator=torch.Generator().manual_seed(seed))


def steps(name: str, way: str = "eager", backend: str = "aot_eager") -> dict[str, Tensor]:
    """Returns the losses, gradients and states of two training steps."""

    def compiled(function: Any) -> Any:
        return torch.compile(function, fullgraph=True, backend=backend)

    torch.manual_seed(0)
    module = MODULES[name]()
    call = compiled(module) if way in ("compiled", INSIDE) else module

    def block(x: Tensor) -> Tensor:
        quantized, _, loss = call(x)
        total: Tensor = quantized.square().sum() + 100 * loss
        return total

    def checkpointed(x: Tensor) -> Tensor:
        total: Tensor = checkpoint(block, x, use_reentrant=False)
        return total

    model = checkpointed if "checkpoint" in way else block
    model = compiled(model) if way == AROUND else model
    left: dict[str, Tensor] = {}
    for step in range(2):
        torch.manual_seed(step)
        x = draw(step).requires_grad_()
        module.zero_grad()
        loss = model(x)
        loss.backward()
        assert x.grad is not None
        found = {"loss": loss.detach(), "x": x.grad, **module.state_dict()}
        found |= {f"gradient of {key}": value.grad for key, value in module.named_parameters()}
        left |= {f"{key}, step {step}": value.clone() for key, value in found.items()}
    return left


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in found.items():
        torch.testing.assert_close(
            value, expected[key], rtol=1e-5, atol=1e-6, msg=lambda text, key=key: f"{key}: {text}"
        )


INSIDE, AROUND = "compiled in a checkpoint", "a checkpoint, compiled"


@pytest.mark.parametrize("name", ["averages, cosine", "averages, residual"])
def test_a_compiled_backward_uses_the_searched_codes(name: str) -> None:
    assert_same(steps(name, "compiled"), steps(name))


@pytest.mark.parametrize(
    ("name", "way"),
    [
        ("averages, residual", INSIDE),
        ("averages, residual", AROUND),
        ("averages, restarts", INSIDE),
        ("restarts", INSIDE),
        ("restarts", AROUND),
        ("k-means", INSIDE),
        ("k-means", AROUND),
        ("drop-in", AROUND),
        ("drop-in, cosine, dead codes", INSIDE),
        ("drop-in, learnable, dead codes", AROUND),
    ],
)
def test_compiled_recomputation_repeats_the_forward_and_learns_nothing(name: str, way: str) -> None:
    assert_same(steps(name, way), steps(name))


def test_compiled_recomputation_with_inductor() -> None:
    assert_same(steps("averages", AROUND, backend="inductor"), steps("averages"))


@pytest.mark.parametrize("cosine", [False, True])
def test_recomputation_in_eval_mode_searches_the_current_codebook(cosine: bool) -> None:
    quantizer = vector_quantizer(20, 6, metric="cosine" if cosine else "euclidean", **AVERAGES)
    quantizer(draw(0))
    quantizer.eval()
    gradients = []
    for checkpointed in (False, True):
        x = draw(1).requires_grad_()

        def block(x: Tensor) -> Tensor:
            quantized, _, loss = quantizer(x)
            total: Tensor = quantized.square().sum() + loss
            return total

        (checkpoint(block, x, use_reentrant=False) if checkpointed else block(x)).backward()
        gradients.append(x.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", MODULES)
def test_two_forward_passes_before_the_backward_are_refused(name: str, reentrant: bool) -> None:
    torch.manual_seed(0)
    module = MODULES[name]()
    layer = nn.Linear(6, 6)

    def block(x: Tensor) -> Tensor:
        quantized, _, loss = module(layer(x))
        total: Tensor = quantized.square().sum() + loss
        return total

    losses = [checkpoint(block, draw(seed).requires_grad_(), use_reentrant=reentrant) for seed in range(2)]
    losses[1].backward()  # that of the last forward pass
    with pytest.raises(RuntimeError, match="must be that of the last forward pass"):
        losses[0].backward()


@pytest.mark.parametrize(
    ("way", "error"),
    [(INSIDE, "must be that of the last forward pass"), (AROUND, "modified by an inplace operation")],
)
def test_two_compiled_forward_passes_before_the_backward_are_refused(way: str, error: str) -> None:
    module = MODULES["averages"]()

    def block(x: Tensor) -> Tensor:
        total: Tensor = module(x).loss
        return total

    inner = torch.compile(block, backend="aot_eager") if way == INSIDE else block

    def checkpointed(x: Tensor) -> Tensor:
        total: Tensor = checkpoint(inner, x.sin(), use_reentrant=False)
        return total

    model = torch.compile(checkpointed, backend="aot_eager") if way == AROUND else checkpointed
    losses = [model(draw(seed).requires_grad_()) for seed in range(2)]
    with pytest.raises(RuntimeError, match=error):
        losses[0].backward()


def test_a_batch_may_be_recomputed_twice_and_without_rows() -> None:
    module = MODULES["averages"]()
    for rows in (30, 0):
        x = draw(0)[:rows].requires_grad_()
        loss = checkpoint(lambda x: module(x)[0].square().sum(), x, use_reentrant=False)
        first, second = (torch.autograd.grad(loss, x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
