"""The count-normalised codebook step: the online k-means rate 1/n_k as an SGD step, for any codebook size."""

from typing import Any

import torch

from vq_kernels.modules.base import QuantizerBase


def count_normalised_param_group(quantizer: QuantizerBase, fraction: float) -> dict[str, Any]:
    """Returns an SGD parameter group whose step moves each chosen code `fraction` of the way to the mean of its rows.

    Use it together with `attach_count_normalised_step`. It has no momentum and no weight decay, so a code moves only
    when rows choose it.

    Args:
        quantizer: a `VectorQuantizer` or a `ResidualVectorQuantizer`.
        fraction: in (0, 2); 1 is a k-means step.

    Raises:
        ValueError: fraction is outside (0, 2), where the step diverges; or the quantizer's codebook has no gradient
            (`ema_decay`), or a gradient that passes through a normalisation (`metric="cosine"`).
    """
    if not 0 < fraction < 2:
        raise ValueError(f"fraction must be in (0, 2), got {fraction}")
    _check_learns_by_gradients(quantizer)
    if quantizer.metric != "euclidean":
        raise ValueError(f"quantizer must have metric 'euclidean', got {quantizer.metric!r}")
    return {"params": [quantizer.codebook], "lr": fraction, "momentum": 0.0, "weight_decay": 0.0}


def attach_count_normalised_step(optimizer: torch.optim.Optimizer, quantizer: QuantizerBase) -> Any:
    """Adds a hook to the optimizer that divides each code's gradient by its share of the batch before each step.

    The gradient of the loss at code k is 2·n_k / (N·D) times the difference between the code and the mean of its n_k
    rows. Since N·D can be in the millions, a step with a usual learning rate hardly moves the code. The hook multiplies
    the gradient by N·D / (2·n_k), which leaves the difference itself. The learning rate is then the fraction of this
    difference that a step covers, regardless of the batch size, the codebook size and the code's usage. The gradient
    must be that of one training forward pass, with the loss at weight 1.

    Returns:
        The handle of the hook; `handle.remove()` removes it.

    Raises:
        ValueError: the quantizer's codebook has no gradient (`ema_decay`).
        RuntimeError: the codebook is sharded or has a parametrization.

    Source: the derivation above; MacQueen 1967 for the step towards the mean.
    """

    _check_learns_by_gradients(quantizer)

    def divide_by_counts(_optimizer: Any, _args: Any, _kwargs: Any) -> None:
        gradient = quantizer.codebook.grad
        if gradient is None:
            return
        counts = quantizer.batch_counts  # [..., K]
        factor = counts.sum() * quantizer.code_dim / (2 * counts.clamp(min=1))
        gradient.mul_(factor[..., None].to(gradient.dtype))

    return optimizer.register_step_pre_hook(divide_by_counts)


def _check_learns_by_gradients(quantizer: QuantizerBase) -> None:
    if quantizer.ema_decay is not None:
        raise ValueError(f"quantizer must have ema_decay=None, to learn by gradients, got {quantizer.ema_decay!r}")
    quantizer._check_owned()
