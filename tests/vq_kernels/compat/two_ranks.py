"""The program of each rank in test_two_ranks.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from tests.vq_kernels.compat.side_by_side import DIM, MODES, NUM_CODES, draw
from vq_kernels import VectorQuantize

WORLD = 2
STEPS = 3
LAYERS: dict[str, dict[str, Any]] = {
    "default": {},
    "cosine": MODES["heads with own codes, projection, cosine"],
    "alone": {"sync_codebook": False},
    "dead codes": MODES["dead codes, cosine"],
    "many dead codes": {"threshold_ema_dead_code": 100},
    "k-means": MODES["k-means, cosine, heads with own codes"],
}


def batches(rank: int) -> list[tuple[Tensor, Tensor]]:
    """Returns x [1, 14, DIM] or [1, 9, DIM], and masks; the ranks have different numbers of rows."""
    num_rows = (14, 9)[rank]
    mask = torch.arange(num_rows)[None] % 5 != 2
    return [(draw(1, num_rows, DIM, seed=10 * number + rank), mask) for number in range(STEPS)]


def make(name: str) -> VectorQuantize:
    torch.manual_seed(0)
    return VectorQuantize(DIM, NUM_CODES, **LAYERS[name])


def run(rank: int, folder: str) -> None:
    """Creates the layers, then the process group; trains the layers and saves their states."""
    layers = {name: make(name) for name in LAYERS}
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    torch.manual_seed(rank)  # the ranks draw different random numbers
    states = {}
    for name, layer in layers.items():
        for x, mask in batches(rank):
            layer(x, mask=mask)
        states[name] = layer.state_dict()
    graph_breaks = torch._dynamo.explain(layers["dead codes"])(*batches(rank)[0][:1]).graph_break_count
    torch.save({"states": states, "graph_breaks": graph_breaks}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
