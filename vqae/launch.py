"""How this process was started: alone, or by torchrun as one of several. Needs no torch."""

import os
import shlex
from dataclasses import dataclass
from pathlib import Path

from vqae.errors import UsageError

_NEEDED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Launch:
    """What torchrun tells a process by its environment; the defaults are those of a process alone.

    Attributes:
        rank: of this process among all, from 0.
        world_size: how many there are.
        local_rank: of this process among those of its machine, from 0.
        local_world_size: how many of them are on this machine.
        restarts: how often torchrun has begun the job anew, after a process of it had died.
        job: the job's name, the same after such a restart; empty where there is none.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    restarts: int = 0
    job: str = ""

    @classmethod
    def from_environment(cls) -> "Launch":
        """This process's; raises UsageError where a part of it is missing or makes no sense."""
        if "RANK" not in os.environ and "WORLD_SIZE" not in os.environ:
            return cls()
        if os.environ.get("WORLD_SIZE") != "1":
            missing = [name for name in _NEEDED if not os.environ.get(name)]
            if missing:
                raise UsageError(
                    f"the environment says that this is one of several processes, but not {', '.join(missing)}: start "
                    "them with torchrun, or unset RANK and WORLD_SIZE for a process alone"
                )
        rank, world_size = _number("RANK", 0), _number("WORLD_SIZE", 1)
        local_rank, local_world_size = _number("LOCAL_RANK", 0), _number("LOCAL_WORLD_SIZE", 1)
        if not (rank < world_size and local_rank < local_world_size <= world_size):
            raise UsageError(
                f"RANK must be below WORLD_SIZE, and LOCAL_RANK below LOCAL_WORLD_SIZE, got {rank} of {world_size} and "
                f"{local_rank} of {local_world_size}"
            )
        restarts = _number("TORCHELASTIC_RESTART_COUNT", 0)
        return cls(rank, world_size, local_rank, local_world_size, restarts, _job())

    def how_to_go_on(self, folder: Path) -> str:
        """What to type to go on with the run in a folder."""
        program = "python"
        if self.world_size > 1:
            alone = f"--standalone --nproc-per-node {self.world_size}"
            program = f"torchrun {alone if self.local_world_size == self.world_size else '[its options]'}"
        return f"go on with: {program} -m vqae.train --out {shlex.quote(str(folder))} --resume"


def speaks_for_its_machine() -> bool:
    """Whether this process is the one of its machine that prints: the others would say the same."""
    local_rank = os.environ.get("LOCAL_RANK", "0")
    return not (local_rank.isdecimal() and int(local_rank))


def _job() -> str:
    """--rdzv-id; where it was left out ("none"), the folder that torchrun made for the logs of this job alone."""
    job, error_file = os.environ.get("TORCHELASTIC_RUN_ID", ""), os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return error_file.partition("/attempt_")[0] if job == "none" else job


def _number(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name} must be a number, got {text!r}")
    return int(text)
