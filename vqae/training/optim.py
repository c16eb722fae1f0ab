"""How the model learns: SGD with parameter groups for encoder, decoder and codebook, and their learning rates."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR

from vq_kernels import attach_count_normalised_step, count_normalised_param_group
from vqae.config import Config
from vqae.model.vqae import VQAE


def build_optimizer(model: VQAE, config: Config) -> torch.optim.SGD:
    """SGD in three groups: encoder and decoder with momentum, the codebook without momentum or decay."""
    codebook = model.quantizer.codebook
    if config.codebook_step == "share":
        codebook_group = count_normalised_param_group(model.quantizer, config.codebook_lr)
    else:
        codebook_group = {"params": [codebook], "lr": config.codebook_lr, "momentum": 0.0, "weight_decay": 0.0}
    networks: list[dict[str, Any]] = [
        {"params": list(model.encoder.parameters()), "lr": config.encoder_lr},
        {"params": list(model.decoder.parameters())},
    ]
    optimizer = torch.optim.SGD(
        [*networks, codebook_group],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    if config.codebook_step == "share":
        attach_count_normalised_step(optimizer, model.quantizer)
    return optimizer


def build_schedule(optimizer: torch.optim.SGD, config: Config, progress: Callable[[], float]) -> LambdaLR:
    """The learning rates of `build_optimizer`'s groups, by the share of the run that is done, 0 to 1."""

    def whole_run(_step: int) -> float:
        return learning_rate_factor(progress(), config.warmup)

    def from_start_of_encoder(_step: int) -> float:
        share = (progress() - config.encoder_start) / (1 - config.encoder_start)
        return learning_rate_factor(share, config.warmup) if share >= 0 else 0.0

    return LambdaLR(optimizer, [from_start_of_encoder, whole_run, whole_run])


def learning_rate_factor(progress: float, warmup: float) -> float:
    """A linear rise over the first `warmup` of the run, then half a cosine down to 0; progress from 0 to 1."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
