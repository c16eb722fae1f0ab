"""Gradients past the choice of a code: straight through it, or turned along with it."""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_SHORTEST_NORM = 1e-6


def straight_through(x: Tensor, codes: Tensor) -> Tensor:
    """`codes` as they are, [..., D] in x's dtype; the gradient that arrives goes to x unchanged, and none to the codes.

    Source: Bengio et al. 2013, arXiv:1308.3432; van den Oord et al. 2017, arXiv:1711.00937, section 3.2.
    """
    passed: Tensor = _PassGradient.apply(x, codes, False)
    return passed


def rotation_trick(x: Tensor, codes: Tensor) -> Tensor:
    """`codes` as they are, [..., D] in x's dtype; x gets the gradient that arrives, turned and scaled from code to x.

    A code c is R·x·‖c‖/‖x‖, where R turns x's direction u into c's direction v: with w = (u + v)/‖u + v‖,
    R = 1 - 2·w·wᵀ + 2·v·uᵀ. Taken as constant, that gives x the gradient ‖c‖/‖x‖·(g - 2·w·(w·g) + 2·u·(v·g)); the
    codes get none. Norms under 1e-6 count as 1e-6.

    Source: Fifty et al. 2024, arXiv:2410.06424, section 4.2.
    """
    turned: Tensor = _PassGradient.apply(x, codes, True)
    return turned


class _PassGradient(torch.autograd.Function):
    """(x [..., D], codes [..., D]) -> codes [..., D]. Saves x and the codes, and only where the gradient is turned."""

    @staticmethod
    def forward(x: Tensor, codes: Tensor, turn: bool) -> Tensor:
        return codes.to(x.dtype, copy=True)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, bool], output: Tensor) -> None:
        x, codes, ctx.turn = inputs
        if ctx.turn:
            ctx.save_for_backward(x, codes)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, None, None]:
        (grad,) = grad_outputs
        if not ctx.needs_input_grad[0]:
            return None, None, None
        return (_turn_back(grad, *ctx.saved_tensors) if ctx.turn else grad), None, None


def _turn_back(grad: Tensor, x: Tensor, codes: Tensor) -> Tensor:
    """Rᵀ·grad·‖code‖/‖x‖, [..., D], in float32 at least."""
    wide = torch.promote_types(grad.dtype, torch.float32)
    g, x, codes = grad.to(wide), x.detach().to(wide), codes.detach().to(wide)
    x_norm = x.norm(dim=-1, keepdim=True).clamp(min=_SHORTEST_NORM)
    code_norm = codes.norm(dim=-1, keepdim=True)
    from_direction = x / x_norm
    to_direction = codes / code_norm.clamp(min=_SHORTEST_NORM)
    middle = F.normalize(from_direction + to_direction, dim=-1, eps=_SHORTEST_NORM)
    turned = g - 2 * middle * (middle * g).sum(dim=-1, keepdim=True)
    turned = turned + 2 * from_direction * (to_direction * g).sum(dim=-1, keepdim=True)
    grad_x: Tensor = turned * (code_norm / x_norm)
    return grad_x.to(grad.dtype)
