"""A store for one life of a job: torchrun keeps the same store when it begins a job anew.

The addresses of the processes that died still stand in it, and a process that reads one of them never finds the others
(github.com/pytorch/pytorch/issues/135712). Nor is there a number that all processes would know a life by: the torchrun
of each machine counts the restarts that it has seen itself.
"""

import time
from datetime import timedelta
from uuid import uuid4

from torch.distributed.distributed_c10d import PrefixStore, Store

PATIENCE = timedelta(minutes=5)
_POLL_S = 0.02


def store_of_this_life(store: Store, rank: int, world_size: int, patience: timedelta = PATIENCE) -> PrefixStore:
    """The part of a job's store that only those use who are alive now.

    Each process calls out a name that nobody had before. The first one answers each name with the name of this life,
    and goes on answering until each process has repeated that; who is dead does not.

    Args:
        store: of the job.
        rank: of this process, in [0, world_size).
        world_size: how many there are.
        patience: how long to wait for the others.

    Raises:
        RuntimeError: some process did not come in time.
    """
    name = uuid4().hex
    if rank:
        store.set(f"name/{rank}", name)
        store.wait([f"life/{name}"], patience)
        life = store.get(f"life/{name}").decode()
        store.set(f"heard/{life}/{rank}", "")
        return PrefixStore(life, store)
    missing, deadline = set(range(1, world_size)), time.monotonic() + patience.total_seconds()
    while missing:
        for other in missing:
            if store.check([f"name/{other}"]):
                store.set(f"life/{store.get(f'name/{other}').decode()}", name)
        missing = {other for other in missing if not store.check([f"heard/{name}/{other}"])}
        if missing and time.monotonic() > deadline:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {patience}")
        time.sleep(_POLL_S)
    return PrefixStore(name, store)
