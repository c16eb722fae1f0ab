"""A codebook step that does not vanish with the codebook's size, for any optimiser."""

from typing import Any

import torch

from vq_kernels.modules.codebook import LearnedCodebooks


def gap_parameter_group(quantizer: LearnedCodebooks, share: float) -> dict[str, Any]:
    """The codebook's parameter group for an SGD whose step moves each chosen code by `share` of its gap.

    Use together with `attach_gap_step`. No momentum and no weight decay: a code moves only when rows choose it.

    Args:
        quantizer: a `VectorQuantizer` or a `ResidualVectorQuantizer`, whose codebook it is.
        share: of the gap between a code and the mean of its rows that one step closes, in (0, 2).

    Raises:
        ValueError: share outside of (0, 2), where the step would diverge; or a quantizer to which this step does not
            apply: its codebook has no gradient, or one that passes through a normalisation.
    """
    if not 0 < share < 2:
        raise ValueError(f"share must be in (0, 2), got {share}")
    if quantizer.ema_decay is not None:
        raise ValueError(f"quantizer must learn by gradients, got one with ema_decay={quantizer.ema_decay}")
    if quantizer.metric != "euclidean":
        raise ValueError(f"quantizer must have metric 'euclidean', got {quantizer.metric!r}")
    return {"params": [quantizer.codebook], "lr": share, "momentum": 0.0, "weight_decay": 0.0}


def attach_gap_step(optimizer: torch.optim.Optimizer, quantizer: LearnedCodebooks) -> Any:
    """Before each step, divide each code's gradient by its share of the batch.

    The gradient of the loss at code k is 2·n_k / (N·D) times the gap between the code and the mean of its n_k rows:
    with N·D in the millions, a step of ordinary length moves nothing. Multiplied by N·D / (2·n_k) it is the gap itself,
    whatever the batch, the codebook's size and the code's use, and the learning rate is the share of it that a step
    closes.
    It expects the gradient of one training forward pass, with the loss at weight 1.

    Returns:
        The hook's handle; its `remove()` takes the hook off.

    Source: the derivation above; MacQueen 1967 for the step toward the mean.
    """

    def divide_by_counts(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        gradient = quantizer.codebook.grad
        if gradient is None:
            return
        counts = quantizer.batch_counts  # [..., K]
        factor = counts.sum() * quantizer.code_dim / (2 * counts.clamp(min=1))
        gradient.mul_(factor[..., None].to(gradient.dtype))

    return optimizer.register_step_pre_hook(divide_by_counts)
