"""Kill a run with SIGKILL at random moments, resume it every time, and let it finish.

    python tests/vqae/kill_soak.py --kills 20 --longest-s 1.5 -- --out runs/soak --epochs 3 ...

What follows `--` are the run's own arguments; they must not hold --resume. Prints how many kills hit a running process.
The weights that the run ends with must be those of an uninterrupted one.
"""

import argparse
import os
import random
import signal
import sys
import time

import torch

from vqae import train
from vqae.runtime.process import SignalHandler


def start(arguments: list[str]) -> int:
    """Fork a process that goes on with the run; its id. Forked, not started anew: loading torch takes seconds."""
    child = os.fork()
    if child:
        return child
    try:
        train.main([*arguments, "--resume"], SignalHandler())
        sys.stdout.flush()
        os._exit(0)
    finally:
        os._exit(1)


def main() -> None:
    """Kill, resume, and finish."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--longest-s", type=float, default=1.5, help="longest time before a kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("arguments", nargs="+")
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with several threads must not fork
    moments = random.Random(options.seed)

    kills = 0
    for _ in range(options.kills):
        child = start(options.arguments)
        time.sleep(moments.uniform(0, options.longest_s))
        os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        kills += os.WIFSIGNALED(status)
    _, status = os.waitpid(start(options.arguments), 0)
    print(f"{kills} kills")
    sys.exit(os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()
