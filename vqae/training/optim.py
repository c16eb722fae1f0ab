"""The optimizer and its learning-rate schedule."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from vq_kernels import attach_count_normalised_step, count_normalised_param_group
from vqae.config import Config
from vqae.model.vqae import VQAE


def build_optimizer(model: VQAE, config: Config) -> torch.optim.SGD:
    """SGD with one parameter group each for encoder, decoder and codebook, in this order.

    The codebook has neither momentum nor weight decay. The fused SGD reads learning rates from tensors on the device.
    """
    groups: list[dict[str, Any]] = [
        {"params": list(model.encoder.parameters()), "lr": config.encoder_lr},
        {"params": list(model.decoder.parameters())},
    ]
    if config.codebook_step == "count_normalised":
        groups.append(count_normalised_param_group(model.quantizer, config.codebook_lr))
    else:
        codebook = [model.quantizer.codebook]
        groups.append({"params": codebook, "lr": config.codebook_lr, "momentum": 0.0, "weight_decay": 0.0})
    optimizer = torch.optim.SGD(
        groups, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay, fused=True
    )
    if config.codebook_step == "count_normalised":
        attach_count_normalised_step(optimizer, model.quantizer)
    return optimizer


def build_schedule(optimizer: torch.optim.SGD, config: Config, progress: Callable[[], float]) -> LambdaLR:
    """The learning-rate schedule of `build_optimizer`'s groups. That of the encoder begins when it is unfrozen.

    `progress` returns the fraction of the run that is done, 0 to 1.
    """

    def encoder_factor(_step: int) -> float:
        encoder_progress = (progress() - config.unfreeze_encoder_at) / (1 - config.unfreeze_encoder_at)
        return learning_rate_factor(encoder_progress, config.warmup) if encoder_progress >= 0 else 0.0

    def factor(_step: int) -> float:
        return learning_rate_factor(progress(), config.warmup)

    return LambdaLR(optimizer, [encoder_factor, factor, factor])


def learning_rate_factor(progress: float, warmup: float) -> float:
    """Linear warm-up until `progress` reaches `warmup`, then cosine decay to 0 at 1."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
