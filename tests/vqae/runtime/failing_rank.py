"""Train as `python -m vqae.train` does, until something happens to the job at a step: a script for torchrun.

    torchrun ... tests/vqae/runtime/failing_rank.py EVENTS ...

EVENTS is a list such as kill:1@2,kill:0@4,stop@5, with one event for each restart attempt: kill rank 1 before step 2,
then rank 0 before step 4, then send SIGTERM to torchrun in step 5. The other arguments are those of vqae.train.
"""

import os
import signal
import sys
import time
from unittest import mock

from torch import Tensor

from vqae.runtime.process import Launch, run_command
from vqae.training.trainer import Trainer


def main() -> None:
    """Patch the step, and run the command."""
    launch = Launch.from_environment()
    events = sys.argv.pop(1).split(",")
    event, _, step = events[launch.restarts].partition("@")
    what, _, rank = event.partition(":")
    original = Trainer._train_step

    def train_step(self: Trainer, images: Tensor) -> None:
        if self.global_step + 1 == int(step):
            if what == "kill" and launch.rank == int(rank):
                os.kill(os.getpid(), signal.SIGKILL)
            if what == "stop" and launch.rank == 0:
                os.kill(os.getppid(), signal.SIGTERM)
                while not self.signals.received:  # until torchrun has passed it on
                    time.sleep(0.01)
        original(self, images)

    with mock.patch.object(Trainer, "_train_step", train_step):
        run_command("vqae.train")


if __name__ == "__main__":
    main()
