"""How the model learns: SGD with a parameter group for the codebook, and the learning rate's schedule."""

import math

import torch

from vq_kernels import attach_gap_step, gap_parameter_group
from vqae.config import Config
from vqae.model import VQAE


def build_optimizer(model: VQAE, config: Config) -> torch.optim.SGD:
    """SGD with momentum for encoder and decoder; for the codebook, a group of its own without momentum or decay."""
    codebook = model.quantizer.codebook
    others = [parameter for parameter in model.parameters() if parameter is not codebook]
    if config.codebook_step == "share":
        codebook_group = gap_parameter_group(model.quantizer, config.codebook_lr)
    else:
        codebook_group = {"params": [codebook], "lr": config.codebook_lr, "momentum": 0.0, "weight_decay": 0.0}
    optimizer = torch.optim.SGD(
        [{"params": others}, codebook_group],
        lr=config.lr,
        momentum=config.momentum,
        weight_decay=config.weight_decay,
    )
    if config.codebook_step == "share":
        attach_gap_step(optimizer, model.quantizer)
    return optimizer


def learning_rate_factor(progress: float, warmup: float) -> float:
    """A linear rise over the first `warmup` of the run, then half a cosine down to 0; progress from 0 to 1."""
    if progress < warmup:
        return max(progress / warmup, 1e-3)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, (progress - warmup) / (1 - warmup))))
