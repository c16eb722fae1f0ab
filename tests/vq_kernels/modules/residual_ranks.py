"""The program of each rank in test_residual_ranks.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from tests.vq_kernels.plain import residual_quantizer
from vq_kernels import ResidualVectorQuantizer

WORLD = 2
STEPS = 4
LAYERS: dict[str, dict[str, Any]] = {
    "averages": {"ema_decay": 0.5},
    "dropout": {"ema_decay": 0.5, "quantizer_dropout": 1.0},
    "restarts": {"init": "data", "restart_after": 1},
    "k-means": {"init": "kmeans", "restart_after": 1, "ema_decay": 0.5},
    "restarts, averages, grouped": {"ema_decay": 0.5, "restart_after": 1, "heads": 2, "separate_codebooks": True},
}


def make(name: str) -> ResidualVectorQuantizer:
    torch.manual_seed(0)
    return residual_quantizer(3, 16, 4, **LAYERS[name])


def batches(rank: int, channels: int) -> list[tuple[Tensor, Tensor]]:
    """Returns x [M, channels] and masks [M]. M differs between the ranks; the last batch of rank 1 is padding."""
    num_rows = (40, 23)[rank]
    result = []
    for step in range(STEPS):
        x = torch.randn(num_rows, channels, generator=torch.Generator().manual_seed(10 * step + rank))
        result.append((x, (torch.arange(num_rows) % 5 != 2) & (rank == 0 or step + 1 < STEPS)))
    return result


def run(rank: int, folder: str) -> None:
    """Trains all layers with different random numbers on each rank; saves their states and the active stages."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(100 + rank)
    states, stages = {}, []
    for name in LAYERS:
        layer = make(name)
        for x, mask in batches(rank, 4 * layer.heads):
            indices = layer(x, mask).indices
            if name == "dropout":
                stages.append(int((indices[0] >= 0).sum()) if mask[0] else -1)
        states[name] = layer.state_dict()
    torch.save({"states": states, "stages": stages}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
