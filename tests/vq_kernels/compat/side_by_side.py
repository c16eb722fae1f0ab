"""Our `VectorQuantize` and theirs with the same state, side by side."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from vector_quantize_pytorch import VectorQuantize as Theirs

from vq_kernels import VectorQuantize

DIM = 16
NUM_CODES = 32
ROUNDING = 4e-6
"""Tolerance between float32 results of two orders of summation, relative to the largest number."""

LEARNABLE = {"learnable_codebook": True, "ema_update": False}
OWN_CODES = {"heads": 2, "separate_codebook_per_head": True, "codebook_dim": 8}
MODES: dict[str, dict[str, Any]] = {
    "default": {},
    "straight-through": {"rotation_trick": False},
    "cosine": {"use_cosine_sim": True},
    "slow and smooth": {"decay": 0.99, "eps": 1e-2, "commitment_weight": 0.25},
    "no commitment": {"commitment_weight": 0.0},
    "static": {"ema_update": False},
    "projection": {"codebook_dim": 6},
    "projection and layernorm": {"codebook_dim": 6, "layernorm_after_project_in": True},
    "heads": {"heads": 2, "codebook_dim": 8},
    "heads, projection, cosine": {"heads": 3, "codebook_dim": 5, "use_cosine_sim": True},
    "heads with own codes": OWN_CODES,
    "heads with own codes, projection, cosine": {**OWN_CODES, "codebook_dim": 5, "use_cosine_sim": True},
    "one head with own codes": {"separate_codebook_per_head": True},
    "learnable": LEARNABLE,
    "learnable, straight-through": {**LEARNABLE, "rotation_trick": False, "commitment_weight": 0.25},
    "learnable, heads with own codes": {**LEARNABLE, **OWN_CODES},
    "learnable, dead codes": {**LEARNABLE, "threshold_ema_dead_code": 1},
    "k-means": {"kmeans_init": True},
    "k-means, cosine, heads with own codes": {**OWN_CODES, "kmeans_init": True, "use_cosine_sim": True},
    "k-means, few iterations": {"kmeans_init": True, "kmeans_iters": 2},
    "dead codes": {"threshold_ema_dead_code": 2},
    "dead codes, cosine": {"threshold_ema_dead_code": 2, "use_cosine_sim": True},
    "frozen": {"freeze_codebook": True},
    "channel first": {"channel_last": False},
    "images": {"accept_image_fmap": True},
    "images, heads, projection": {"accept_image_fmap": True, "heads": 2, "codebook_dim": 5},
    "volumes": {"accept_3d_fmap": True},
    "volumes, heads with own codes": {"accept_3d_fmap": True, **OWN_CODES},
    "orthogonal": {"orthogonal_reg_weight": 3.0},
    "orthogonal, learnable, heads": {"orthogonal_reg_weight": 3.0, **LEARNABLE, **OWN_CODES},
    "orthogonal, chosen codes": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_active_codes_only": True},
    "orthogonal, few codes": {"orthogonal_reg_weight": 3.0, "orthogonal_reg_max_codes": 7, "rotation_trick": False},
    "directional": {"directional_reparam": True, "threshold_ema_dead_code": 1e-9},
    "manual averages": {"manual_ema_update": True},
    "no gradient to x": {"route_gradients_to_input": False, **LEARNABLE},
}
"""Keywords of each supported mode."""


class Step(NamedTuple):
    """The results of one call, the gradients of x and of each parameter, and the state after it."""

    quantized: Tensor
    indices: Tensor
    loss: Tensor
    gradients: dict[str, Tensor]
    state: dict[str, Tensor]


def pair(**keywords: Any) -> tuple[VectorQuantize, Theirs]:
    """Returns both layers, created with the same seed and so with the same state."""
    torch.manual_seed(0)
    ours = VectorQuantize(DIM, NUM_CODES, **keywords)
    torch.manual_seed(0)
    return ours, Theirs(DIM, NUM_CODES, **keywords)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def draw_input(keywords: dict[str, Any], seed: int = 0) -> Tensor:
    """Returns 60 or 72 vectors in the layout of these keywords."""
    if keywords.get("accept_image_fmap"):
        return draw(3, DIM, 4, 5, seed=seed)
    if keywords.get("accept_3d_fmap"):
        return draw(3, DIM, 2, 3, 4, seed=seed)
    return draw(3, 20, DIM, seed=seed) if keywords.get("channel_last", True) else draw(3, DIM, 20, seed=seed)


def step(layer: Any, x: Tensor, seed: int = 0, **call: Any) -> Step:
    """Runs a forward and a backward pass, with a loss that adds a random projection of quantized."""
    torch.manual_seed(seed)
    layer.zero_grad()
    x = x.clone().requires_grad_()
    quantized, indices, loss = layer(x, **call)
    ((quantized * draw(*quantized.shape, seed=seed + 1)).sum() + loss.sum()).backward()
    gradients = {name: value.grad for name, value in [("x", x), *layer.named_parameters()] if value.grad is not None}
    state = {name: value.clone() for name, value in layer.state_dict().items()}
    return Step(quantized.detach(), indices, loss.detach(), gradients, state)


def assert_close(found: Tensor, expected: Tensor, name: str = "") -> None:
    """Integers and booleans must be equal, others equal up to float32 rounding."""
    assert found.shape == expected.shape, name
    assert found.dtype == expected.dtype, name
    if not found.is_floating_point():
        assert torch.equal(found, expected), name
    elif found.numel():
        scale = expected.abs().max()
        assert (found - expected).abs().max() <= ROUNDING * scale, f"{name}: {(found - expected).abs().max() / scale}"


def assert_same_step(found: Step, expected: Step) -> None:
    for name in ("quantized", "indices", "loss"):
        assert_close(getattr(found, name), getattr(expected, name), name)
    for name in ("gradients", "state"):
        assert_all_close(getattr(found, name), getattr(expected, name))


def assert_all_close(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name in found:
        flag = name.endswith("initted")  # float32 here, bool there
        assert_close(found[name], expected[name].float() if flag else expected[name], name)
