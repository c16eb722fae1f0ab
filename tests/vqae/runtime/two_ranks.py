"""What each of two processes does in test_distributed.py, and, where it is to be compared, what one process does."""

import contextlib
import io
import itertools
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed
from torch import Tensor

from vqae import train
from vqae.config import Config
from vqae.data.load import evaluation_batches, training_batches
from vqae.model.vqae import VQAE, build_model
from vqae.runtime import distributed
from vqae.runtime.distributed import broadcast_from_rank0, check_same, is_rank0, max_over_ranks, on_all_ranks
from vqae.runtime.errors import UsageError
from vqae.runtime.process import Interrupted, SignalHandler
from vqae.training.metrics import Evaluation, evaluate
from vqae.training.trainer import Trainer

WORLD = 2
CPU = torch.device("cpu")
STOP_AFTER = 5  # steps of the run that is stopped
SMALL = {"num_codes": 24, "code_dim": 64, "hidden_dims": (32,), "restart_after": 51, "checkpoint_minutes": 1e6}


class Case(NamedTuple):
    """A training whose weights are compared: `steps` steps, all of one epoch.

    Attributes:
        limit: of the largest relative difference between two processes and one.
    """

    dtype: torch.dtype
    steps: int
    limit: float
    config: Config


CASES = {
    "float64": Case(
        torch.float64,
        20,
        1e-9,
        Config(batch_size=17, unfreeze_encoder_at=0.0, codebook_init="data", embedding_norm="batch", **SMALL),
    ),
    "float32": Case(torch.float32, 1, 1e-5, Config(batch_size=16, unfreeze_encoder_at=0.0, **SMALL)),
    "unfrozen": Case(torch.float64, 6, 1e-9, Config(batch_size=17, epochs=1, unfreeze_encoder_at=0.5, **SMALL)),
}
EVALUATED = ((7, 3), (8, 4), (3, 1), (1, 5), (30, 1000))  # images, and how many at a time


def noise(count: int, side: int = 8) -> Tensor:
    """Images [count, 3, side, side] uint8."""
    return torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(count))


def make_trainer(config: Config, num_images: int, dtype: torch.dtype = torch.float32) -> Trainer:
    images = noise(num_images)
    torch.manual_seed(config.seed)
    model = build_model(config, (8, 8)).to(dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias") and not parameter.any():  # see test_two_ranks_reach_the_weights_of_one_process
            torch.nn.init.normal_(parameter, std=0.1)
    return Trainer(config, model, images, images[:0], images[:1], "noise", CPU, SignalHandler())


def weights_after(name: str, steps: int) -> dict[str, Tensor]:
    """The state dict after so many steps of a case."""
    case = CASES[name]
    trainer = make_trainer(case.config, case.steps * case.config.batch_size, case.dtype)
    trainer.train_steps(steps)
    return trainer.model.state_dict()


def evaluations() -> list[Evaluation]:
    torch.manual_seed(0)
    model = build_model(Config(num_codes=16, code_dim=64, hidden_dims=(16,)), (8, 8))
    return [evaluate(model, noise(count), batch_size, CPU) for count, batch_size in EVALUATED]


def learning_rates() -> list[list[float]]:
    """Of encoder, decoder and codebook, in the steps of a run in a time box, which ends before its epoch does.

    At every look at the clock 4 s have gone by.
    """
    with mock.patch("vqae.training.trainer.elapsed_s", side_effect=itertools.count(0 if is_rank0() else 20, 4)):
        trainer = make_trainer(Config(batch_size=4, max_minutes=1.0, **SMALL), 400)
        rates, schedule_step = [], trainer.schedule.step

        def step() -> None:
            schedule_step()
            rates.append([group["lr"] for group in trainer.optimizer.param_groups])

        with mock.patch.object(trainer.schedule, "step", step):
            trainer.train_steps(trainer.steps_per_epoch)
    return rates


def complaint(do: Callable[[], object]) -> str | None:
    """The message of the UsageError that it raises."""
    try:
        do()
    except UsageError as error:
        return str(error)
    return None


def agreements(rank: int) -> dict[str, Any]:
    def fails_on(failing: int) -> Callable[[], int]:
        def do() -> int:
            if rank == failing:
                raise UsageError(f"rank {rank} cannot")
            return rank

        return do

    return {
        "from rank 0": broadcast_from_rank0(lambda: rank),
        "rank 0 fails": complaint(lambda: broadcast_from_rank0(fails_on(0))),
        "on all ranks": on_all_ranks(lambda: rank),
        "rank 1 fails": complaint(lambda: on_all_ranks(fails_on(1))),
        "maxima": max_over_ranks(0.25 * rank, -rank),
        "same": complaint(lambda: check_same("seven", 7)),
        "not the same": complaint(lambda: check_same("the rank", rank)),
    }


def refuse(*_: object) -> None:
    raise AssertionError("only the first process may write")


def stopped_run(rank: int, arguments: list[str]) -> dict[str, Any]:
    """A run that a signal stops, which comes to the last process alone, and which the first one alone may write.

    The last process rounds otherwise where it begins from the images, as another machine may.
    """
    signals = SignalHandler()
    signals.install()
    train_step_of, trainer, init_by_pca = Trainer._train_step, train.Trainer, train.init_by_pca
    begun_with: dict[str, Tensor] = {}

    def begin(model: VQAE, images: Tensor) -> None:
        init_by_pca(model, images)
        for value in model.state_dict().values() if rank == WORLD - 1 else ():
            if value.is_floating_point():
                value.mul_(1 + 1e-6)

    def trainer_of(config: Config, model: VQAE, *arguments: Any) -> Trainer:
        begun_with.update({name: value.clone() for name, value in model.state_dict().items()})
        return trainer(config, model, *arguments)

    def train_step(self: Trainer, images: Tensor) -> None:
        if self.global_step + 1 == STOP_AFTER and rank == WORLD - 1:
            signal.raise_signal(signal.SIGTERM)
        train_step_of(self, images)

    out, err, stopped_by = io.StringIO(), io.StringIO(), ""
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.multiple(train, init_by_pca=begin, Trainer=trainer_of))
        stack.enter_context(mock.patch.object(Trainer, "_train_step", train_step))
        if rank:
            stack.enter_context(mock.patch.multiple(os, replace=refuse, unlink=refuse, fsync=refuse))
        for context in (contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), signals.raising()):
            stack.enter_context(context)
        try:
            train._train(train.parse(arguments), CPU, signals)
        except Interrupted as interrupted:
            stopped_by = str(interrupted)
    return {"begun with": begun_with, "stopped by": stopped_by, "out": out.getvalue(), "err": err.getvalue()}


class User:
    """Stands for DistributedDataParallel, which must go before the group that it uses."""

    def __init__(self, gone: list[bool]) -> None:
        self.itself, self.gone = self, gone  # a reference cycle, as between trainer and schedule

    def __del__(self) -> None:
        self.gone.append(torch.distributed.is_initialized())


def after_group(rank: int, folder: str, error: BaseException | None) -> tuple[list[bool], bool]:
    """A block that raises the error: whether the group was there when its user went, and is there after the block."""
    meet, gone = f"file://{folder}/meet {error}", []
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=WORLD)
    job = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD), "LOCAL_WORLD_SIZE": str(WORLD)}
    job |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}

    def use() -> None:
        _user = User(gone)
        if error is not None:
            raise error

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.dict(os.environ, job))
        stack.enter_context(mock.patch.object(distributed, "_join"))
        stack.enter_context(contextlib.suppress(BaseException))
        stack.enter_context(distributed.process_group("cpu"))
        use()
    return gone, torch.distributed.is_initialized()


def run(rank: int, arguments: list[str], folder: str) -> None:
    """All of it; save what is found."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=WORLD)
    numbers = torch.arange(20).view(20, 1, 1, 1)
    batches = training_batches(numbers, 7, CPU, flip=False, seed=0, epoch=0)
    found = {
        "weights": {name: weights_after(name, case.steps) for name, case in CASES.items()},
        "evaluations": [evaluation._asdict() for evaluation in evaluations()],
        "learning rates": learning_rates(),
        "agreements": agreements(rank),
        "batches": [batch.flatten().tolist() for batch in batches],
        "in order": [batch.flatten().tolist() for batch in evaluation_batches(numbers, 7, CPU)],
        "stopped run": stopped_run(rank, arguments),
    }
    torch.distributed.destroy_process_group()
    errors = (None, UsageError("no"), Interrupted(signal.SIGTERM), RuntimeError("a bug"), RuntimeError("gloo: closed"))
    found["after group"] = {str(error): after_group(rank, folder, error) for error in errors}
    torch.save(found, Path(folder) / f"{rank}.pt")


def largest_difference(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference within a tensor, relative to the largest number in it; of the worst tensor."""
    worst = 0.0
    for name, value in expected.items():
        if value.is_floating_point():
            difference = (found[name].double() - value.double()).abs().max() / value.double().abs().max()
            worst = max(worst, difference.item())
        else:
            assert torch.equal(found[name], value), name
    return worst
