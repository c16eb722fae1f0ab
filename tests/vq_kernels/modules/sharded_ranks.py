"""The program of each rank in test_sharded.py."""

import warnings
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision, fully_shard
from torch.nn.parallel import DistributedDataParallel

from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import ResidualVectorQuantizer, VectorQuantize, VectorQuantizer, attach_count_normalised_step
from vq_kernels.compat import ResidualVQ

STEPS = 3
ROWS = 40
CPU = torch.device("cpu")

FOLLOW_MEANS: dict[str, Callable[[], nn.Module]] = {
    "defaults": lambda: VectorQuantizer(16, 4),
    "heads": lambda: VectorQuantizer(16, 2, heads=2, separate_codebooks=True, init="kmeans", restart_after=1),
    "residual": lambda: ResidualVectorQuantizer(2, 16, 4, restart_after=1),
    "drop-in": lambda: VectorQuantize(4, 16, kmeans_init=True, threshold_ema_dead_code=2),
    "residual drop-in": lambda: ResidualVQ(dim=4, num_quantizers=2, codebook_size=16, kmeans_init=True),
}
LEARN_BY_GRADIENTS: dict[str, Callable[[], nn.Module]] = {
    "learnable": lambda: vector_quantizer(16, 4, commitment_weight=0.25),
    "learnable, heads": lambda: vector_quantizer(16, 2, heads=2, separate_codebooks=True),
    "learnable, residual": lambda: residual_quantizer(2, 16, 4, init=torch.ones(2, 16, 4).cumsum(1)),
    "learnable, drop-in": lambda: VectorQuantize(4, 16, learnable_codebook=True, ema_update=False),
}
WRITE_TO_A_PARAMETER: dict[str, Callable[[], nn.Module]] = {
    "data": lambda: vector_quantizer(16, 4, init="data"),
    "k-means": lambda: vector_quantizer(16, 4, init="kmeans"),
    "resets": lambda: vector_quantizer(16, 4, restart_after=5),
    "residual, data": lambda: residual_quantizer(2, 16, 4, init="data"),
    "drop-in, k-means": lambda: VectorQuantize(4, 16, learnable_codebook=True, ema_update=False, kmeans_init=True),
    "drop-in, resets": lambda: VectorQuantize(
        4, 16, learnable_codebook=True, ema_update=False, threshold_ema_dead_code=1
    ),
}
LAYERS = FOLLOW_MEANS | LEARN_BY_GRADIENTS | WRITE_TO_A_PARAMETER


class Model(nn.Module):
    """An encoder, a quantizer and a decoder. Their outputs end in the loss of the layer."""

    def __init__(self, name: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(6, 4)
        self.quantizer = LAYERS[name]()
        self.decoder = nn.Linear(4, 6)

    def forward(self, x: Tensor) -> Tensor:
        quantized, _, loss = self.quantizer(self.encoder(x))
        return (self.decoder(quantized) - x).square().mean() + loss.sum()


def fsdp2(model: Model, **options: Any) -> nn.Module:
    return fully_shard(model, mesh=init_device_mesh("cpu", (dist.get_world_size(),)), **options)


def fsdp2_of_the_quantizer(model: Model) -> nn.Module:
    fully_shard(model.quantizer, mesh=init_device_mesh("cpu", (dist.get_world_size(),)))
    return fsdp2(model)


def fsdp1(model: Model, **options: Any) -> nn.Module:
    return FullyShardedDataParallel(model, device_id=CPU, **{"use_orig_params": True} | options)


def flat_fsdp1(model: Model) -> nn.Module:
    return fsdp1(model, use_orig_params=False)


def average_over_ranks(parameter: Tensor) -> None:
    assert parameter.grad is not None
    dist.all_reduce(parameter.grad)
    parameter.grad /= dist.get_world_size()


def average_the_codebook(model: Model) -> None:
    for parameter in model.quantizer.parameters():
        parameter.register_post_accumulate_grad_hook(average_over_ranks)


def fsdp2_without_the_quantizer(model: Model) -> nn.Module:
    average_the_codebook(model)
    return fsdp2(model, ignored_params=set(model.quantizer.parameters()))


def fsdp1_without_the_quantizer(model: Model) -> nn.Module:
    average_the_codebook(model)
    return fsdp1(model, ignored_modules=[model.quantizer])


def ddp(model: Model) -> nn.Module:
    return DistributedDataParallel(model)


SHARD = {each.__name__: each for each in (fsdp2, fsdp2_of_the_quantizer, fsdp1, flat_fsdp1)}
LEAVE_OUT = {each.__name__: each for each in (fsdp2_without_the_quantizer, fsdp1_without_the_quantizer)}


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(ROWS, 6, generator=torch.Generator().manual_seed(10 * step + rank))


def whole_state(model: nn.Module, quantizer: nn.Module) -> dict[str, Tensor]:
    """Returns the state of the quantizer with its whole codebook."""
    if isinstance(model, FullyShardedDataParallel):
        with FullyShardedDataParallel.summon_full_params(model, writeback=False):
            return {key: value.detach().clone() for key, value in quantizer.state_dict().items()}
    state = quantizer.state_dict()
    return {key: getattr(value, "full_tensor", lambda value=value: value)() for key, value in state.items()}


def train(name: str, wrap: Callable[[Model], nn.Module]) -> dict[str, Tensor]:
    """Returns the losses and the last state of the quantizer."""
    inner = Model(name)
    model = wrap(inner)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    losses = []
    for step in range(STEPS):
        torch.manual_seed(step)
        loss = model(batch(step, dist.get_rank()))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return {"losses": torch.stack(losses), **whole_state(model, inner.quantizer)}


def error_of(call: Callable[[], Any]) -> str:
    try:
        call()
    except RuntimeError as error:
        return str(error)
    return "no error"


def refused(name: str, wrap: Callable[[Model], nn.Module]) -> tuple[str, bool]:
    """Returns the error of the first forward pass, and whether the state is the one before it."""
    inner = Model(name)
    before = {key: value.clone() for key, value in inner.quantizer.state_dict().items()}
    model = wrap(inner)
    error = error_of(lambda: model(batch(0, dist.get_rank())))
    if isinstance(model, FullyShardedDataParallel):  # in the middle of a forward pass, where whole codes exist
        after = {key: attrgetter(key)(inner.quantizer) for key in before}
    else:
        inner.reshard()
        after = whole_state(model, inner.quantizer)
    return error, all(torch.equal(value, before[key]) for key, value in after.items())


def outside_of_the_forward(wrap: Callable[[Model], nn.Module]) -> dict[str, str]:
    """Returns the errors of other methods of a sharded learnable quantizer."""
    quantizer: Any = (inner := Model("learnable")).quantizer
    model = wrap(inner)
    x = torch.randn(40, 4)
    optimizer = torch.optim.SGD(model.parameters())
    calls: dict[str, Callable[[], Any]] = {
        "set_codes": lambda: quantizer.set_codes(torch.zeros(16, 4)),
        "fit": lambda: quantizer.fit(x),
        "step": lambda: attach_count_normalised_step(optimizer, quantizer),
        "encode": lambda: quantizer.encode(x),
        "decode": lambda: quantizer.decode(torch.zeros(3).long()),
    }
    return {name: error_of(call) for name, call in calls.items()}


def narrow_buffers(name: str) -> str:
    """Returns the error of a quantizer whose buffers FSDP1 converted to bfloat16."""
    model = fsdp1(Model(name), mixed_precision=MixedPrecision(buffer_dtype=torch.bfloat16))
    return error_of(lambda: model(batch(0, dist.get_rank())))


def run(rank: int, world: int, folder: str) -> None:
    """Runs all cases and saves what they give."""
    warnings.simplefilter("ignore")
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=world)
    few = 1 if world == 1 else None  # one layer of each kind is enough on one rank
    trains = [*list(FOLLOW_MEANS)[:few], *list(LEARN_BY_GRADIENTS)[:few]]
    writes = list(WRITE_TO_A_PARAMETER)[:few]
    result: dict[str, Any] = {
        "ddp": {name: train(name, ddp) for name in (*trains, *writes)},
        "sharded": {(name, way): train(name, SHARD[way]) for name in trains for way in SHARD},
        "left out": {(name, way): train(name, LEAVE_OUT[way]) for name in writes for way in LEAVE_OUT},
        "refused": {(name, way): refused(name, SHARD[way]) for name in writes for way in SHARD},
        # FSDP1 flattens nothing on one rank
        "outside": {way: outside_of_the_forward(SHARD[way]) for way in ("fsdp2", "fsdp1")[:world]},
        "narrow": [narrow_buffers(name) for name in ("defaults", "drop-in")],
    }
    torch.save(result, Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
