"""The program of each rank in test_dead_codes.py."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import VectorQuantizer, attach_count_normalised_step, count_normalised_param_group
from vq_kernels.learning.dead_codes import evenly_spaced_rows

WORLD = 2
NUM_CODES, DIM = 20, 3
STEPS = 6
SIZES: dict[str, tuple[int, int]] = {"even": (8, 8), "uneven": (5, 12), "one rank is empty": (0, 9), "empty": (0, 0)}
LAYERS: dict[str, dict[str, Any]] = {
    "data": {"init": "data"},
    "restarts": {"restart_after": 2},
    "both": {"init": "data", "restart_after": 1, "restart_noise": 0.1},
}


def rows(size: str, step: int) -> list[Tensor]:
    """Returns the rows of each rank, [N, DIM], in float64, so that rounding does not hide differences."""
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(count, DIM, generator=generator, dtype=torch.float64) for count in SIZES[size]]


def make(name: str) -> VectorQuantizer:
    torch.manual_seed(0)
    return vector_quantizer(NUM_CODES, DIM, **LAYERS[name]).double()


def train(name: str, batches: list[Tensor], *, share: float = 1.0, seed: int = 1) -> dict[str, Tensor]:
    """Returns the state after an SGD step on each batch. `share` weights the loss; `seed` seeds the resets."""
    quantizer = make(name)
    torch.manual_seed(seed)
    parallel = DistributedDataParallel(quantizer) if torch.distributed.is_initialized() else quantizer
    optimizer = torch.optim.SGD([count_normalised_param_group(quantizer, 0.3)])
    attach_count_normalised_step(optimizer, quantizer)
    for batch in batches:
        optimizer.zero_grad()
        torch.autograd.backward(share * parallel(batch).loss)
        optimizer.step()
    return {name: value.clone() for name, value in quantizer.state_dict().items()}


def run(rank: int, folder: str) -> None:
    """Trains with the same random numbers on both ranks, then with different ones; saves all states."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    same: dict[tuple[str, str], dict[str, Tensor]] = {}
    for name in LAYERS:
        for size in ("even", "uneven"):
            share = WORLD * SIZES[size][rank] / sum(SIZES[size])
            same[name, size] = train(name, [rows(size, step)[rank] for step in range(STEPS)], share=share)

    unlike = train("both", [rows("even", step)[rank] for step in range(STEPS)], seed=100 + rank)
    waiting = make("both")
    waits = []
    for size in ("empty", "one rank is empty"):
        waiting(rows(size, 0)[rank])
        waits.append((bool(waiting.needs_data), waiting.codebook.detach().clone()))

    alone = make("both")
    alone.synchronise = False
    if rank == 1:  # neither rank waits for the other
        alone(rows("uneven", 0)[rank])

    slots, options = torch.arange(4), {"noise": 0.0, "dtype": torch.float64, "synchronise": True}
    drawn = evenly_spaced_rows(rows("uneven", 0)[rank], None, slots, torch.tensor(4), **options)
    breaks = torch._dynamo.explain(make("both"))(rows("even", 0)[rank]).graph_break_count
    found = {"same": same, "unlike": unlike, "waits": waits, "drawn": drawn, "breaks": breaks}
    torch.save({**found, "alone": alone.state_dict()}, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
