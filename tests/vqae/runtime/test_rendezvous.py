"""How the processes of a job's next life find each other in the store that holds what the last one left."""

from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import HashStore

from vqae.runtime.distributed import attempt_store

WORLD = 3


def test_each_life_has_a_part_of_the_store_to_itself() -> None:
    job = HashStore()
    for life in range(3):
        with ThreadPoolExecutor(WORLD) as pool:
            stores = list(pool.map(lambda rank: attempt_store(job, rank, WORLD), range(WORLD)))
        assert not stores[2].check(["address"])
        stores[0].set("address", f"of life {life}")
        assert [store.get("address").decode() for store in stores] == [f"of life {life}"] * WORLD


def test_who_died_while_the_others_were_met_is_not_taken_for_alive() -> None:
    job = HashStore()
    job.set("name/1", "of one that is dead")
    with pytest.raises(RuntimeError, match=r"rank 1, 2 did not arrive within 0:00:00\.1"):
        attempt_store(job, 0, WORLD, timedelta(milliseconds=100))
    with ThreadPoolExecutor(WORLD) as pool:
        stores = list(pool.map(lambda rank: attempt_store(job, rank, WORLD), range(WORLD)))
    stores[0].set("address", "of the living")
    assert [store.get("address").decode() for store in stores] == ["of the living"] * WORLD


def test_the_first_process_is_waited_for_no_longer_than_said() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        attempt_store(HashStore(), 1, WORLD, timedelta(milliseconds=100))
