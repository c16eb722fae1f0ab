"""Two processes against one: the same weights, the same figures, the same decisions; and whatever happens to them."""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed import HashStore

from tests.ranks import run_ranks
from tests.vqae.commands import Outcome, assert_equal, files_in, load
from tests.vqae.runtime import failing_rank
from tests.vqae.runtime.two_ranks import (
    CASES,
    EVALUATED,
    STOP_AFTER,
    WORLD,
    evaluations,
    largest_difference,
    run,
    weights_after,
)
from vqae.runtime.distributed import attempt_store

Command = Callable[..., Outcome]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of two processes that was stopped after some steps."""
    return tmp_path_factory.mktemp("stopped") / "run"


@pytest.fixture(scope="module")
def ranks(tiny: tuple[str, ...], stopped: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    arguments = [*tiny, "--image-size", "8", "--checkpoint-minutes", "1000", "--out", str(stopped)]
    return run_ranks(run, tmp_path_factory.mktemp("ranks"), arguments, world=WORLD)


# -- training


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_reach_the_weights_of_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    """The rounding of float64 stays small for 20 steps; that of float32 only for one.

    In float32 each gradient is good to about 1e-5 of itself, in one process as in two. So a bias that begins at 0 would
    after its first step be good to no more, being nothing but a gradient; here they begin elsewhere.
    """
    case, beginning = CASES[name], weights_after(name, 0)
    expected = weights_after(name, case.steps)
    for rank in ranks:
        assert largest_difference(rank["weights"][name], expected) < case.limit
    for part in ("encoder.features.conv1.weight", "encoder.features.bn1.running_mean", "decoder.0.weight"):
        assert expected[part].dtype == case.dtype
        assert not torch.equal(expected[part], beginning[part]), part
    assert expected["quantizer.batch_counts"].sum() == case.config.batch_size
    assert (expected["quantizer.restarts"] > 0) == (case.steps > case.config.restart_steps)


def test_the_frozen_encoder_does_not_change_before_it_is_unfrozen() -> None:
    beginning, half_way = (weights_after("unfrozen", steps) for steps in (0, CASES["unfrozen"].steps // 2))
    for name, value in half_way.items():
        if name.startswith("encoder."):
            assert torch.equal(value, beginning[name]), name


@pytest.mark.parametrize("name", CASES)
def test_both_ranks_hold_the_same_bits(ranks: list[dict[str, Any]], name: str) -> None:
    first, second = (rank["weights"][name] for rank in ranks)
    for part, value in first.items():
        assert torch.equal(value, second[part]), part


def test_all_ranks_start_with_the_weights_of_rank_0(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["stopped run"]["begun with"] for rank in ranks)
    assert first["encoder.features.bn1.running_mean"].any()
    assert_equal(second, first)


def test_ranks_share_a_batch_without_overlap(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["batches"] for rank in ranks)
    assert [len(batch) for batch in first] == [3, 3]
    assert [len(batch) for batch in second] == [4, 4]
    assert len({*first[0], *first[1], *second[0], *second[1]}) == 14


def test_max_minutes_gives_all_ranks_one_schedule(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["learning rates"] for rank in ranks)
    assert first == second
    assert 4 < len(first) < 12
    assert first[-1] == pytest.approx([0, 0, 0], abs=1e-9)
    encoder, decoder, codebook = map(max, zip(*first, strict=True))
    assert 0 < encoder < decoder
    assert 0 < codebook < decoder


# -- evaluation


def test_ranks_share_evaluation_batches(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["in order"] for rank in ranks)
    together = [one + other for one, other in zip(first, second, strict=True)]
    assert together == [list(range(7)), list(range(7, 14)), list(range(14, 20))]


def test_an_evaluation_counts_every_image_once(ranks: list[dict[str, Any]]) -> None:
    for number, expected in enumerate(evaluations()):
        count, batch_size = EVALUATED[number]
        for rank in ranks:
            found = rank["evaluations"][number]
            assert found["images"] == count == found["counts"].sum()
            assert torch.equal(found["counts"], expected.counts), batch_size
            assert found["mse"] == pytest.approx(expected.mse, rel=1e-6)
            assert found["psnr_db"] == pytest.approx(-10 * math.log10(found["mse"]))
            assert (found["perplexity"], found["codes_used"]) == (expected.perplexity, expected.codes_used)
        assert ranks[0]["evaluations"][number]["mse"] == ranks[1]["evaluations"][number]["mse"]


# -- agreement


def test_agreement_between_ranks(ranks: list[dict[str, Any]]) -> None:
    for number, rank in enumerate(ranks):
        found = rank["agreements"]
        assert (found["from rank 0"], found["on all ranks"]) == (0, number)
        assert (found["rank 0 fails"], found["rank 1 fails"]) == ("rank 0 cannot", "rank 1 cannot")
        assert found["maxima"] == [0.25, 0]
        assert found["same"] is None
        assert found["not the same"] == "the rank must be the same in all processes, got 0 on rank 0, 1 on 1"


def test_a_signal_to_one_stops_all_after_the_same_step(ranks: list[dict[str, Any]], stopped: Path) -> None:
    assert [rank["stopped run"]["stopped by"] for rank in ranks] == ["SIGTERM", "SIGTERM"]
    state = load(stopped / "last.pt")
    assert 3 * state["epoch"] + state["step"] == STOP_AFTER
    assert not state["finished"]
    assert f"saved at step {STOP_AFTER}; resume with" in ranks[0]["stopped run"]["err"]


def test_one_rank_writes_and_prints(ranks: list[dict[str, Any]], stopped: Path) -> None:
    first, second = (rank["stopped run"] for rank in ranks)
    assert first["out"].startswith("imagefolder: 51 training")
    assert "on 2 processes" in first["out"]
    assert second["out"] == second["err"] == ""
    files = {name for name in files_in(stopped) if not name.startswith("events/events.out.tfevents.")}
    assert files == {"config.json", "last.pt", "best.pt", "metrics.jsonl", "events"}
    assert not [name for name in load(stopped / "last.pt")["model"] if name.startswith("module.")]


def test_the_group_is_destroyed_on_every_path(ranks: list[dict[str, Any]]) -> None:
    """Except after a lost process, for which destroying it would wait."""
    paths = dict.fromkeys(("None", "no", "SIGTERM", "a bug"), ([True], False))
    for rank in ranks:
        assert rank["after group"] == {**paths, "gloo: closed": ([], True)}


# -- jobs of torchrun that lose processes, are told to stop, and go on


def torchrun(environment: dict[str, str], *arguments: object, restarts: int = 0) -> subprocess.CompletedProcess[str]:
    """Two processes, started on a port that torchrun finds."""
    launcher = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", WORLD)
    command = (*launcher, "--max-restarts", restarts, "--monitor-interval", 0.05, *arguments)
    return subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=240)


@dataclass(frozen=True)
class RestartedJob:
    """Of a job that was killed twice, restarted once by torchrun and once by hand, and stopped."""

    out: Path
    killed: subprocess.CompletedProcess[str]
    stopped: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def restarted(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> RestartedJob:
    out = tmp_path_factory.mktemp("restarted") / "run"
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    arguments = (*tiny, "--image-size", 8, "--checkpoint-minutes", 0, "--out", out)
    killed = torchrun(environment, failing_rank.__file__, "kill:1@2,kill:0@4", *arguments, restarts=1)
    stopped = torchrun(environment, failing_rank.__file__, f"stop@{STOP_AFTER}", "--out", out, "--resume")
    return RestartedJob(out, killed, stopped)


def test_torchrun_restarts_a_job_that_loses_a_process(restarted: RestartedJob) -> None:
    assert restarted.killed.returncode != 0
    for survivor in (0, 1):  # of the first attempt, and of the second
        message = (
            f"error: rank {survivor} of 2 lost another process; resume with: torchrun --standalone --nproc-per-node"
        )
        assert f"{message} 2 -m vqae.train --out {restarted.out} --resume\n" in restarted.killed.stderr
    assert restarted.killed.stdout.count("51 training") == 2  # attempts
    assert "starting a new run" not in restarted.killed.stderr


def test_sigterm_to_torchrun_saves_a_checkpoint(restarted: RestartedJob) -> None:
    assert restarted.stopped.returncode != 0
    assert f"saved at step {STOP_AFTER}; resume with: torchrun" in restarted.stopped.stderr
    assert restarted.stopped.stderr.count("stopped by SIGTERM") == 1
    state = load(restarted.out / "last.pt")
    assert 3 * state["epoch"] + state["step"] == STOP_AFTER
    assert not state["finished"]


@pytest.mark.usefixtures("ranks")
def test_an_interrupted_run_is_bit_identical(restarted: RestartedJob, stopped: Path) -> None:
    state, uninterrupted = load(restarted.out / "last.pt"), load(stopped / "last.pt")
    for part in ("model", "optimizer", "schedule", "rng", "losses", "test_counts", "best_val_mse", "epoch", "step"):
        assert_equal(state[part], uninterrupted[part])


def test_one_process_resumes_the_run_of_two(restarted: RestartedJob, command: Command, tmp_path: Path) -> None:
    out = shutil.copytree(restarted.out, tmp_path / "run")
    outcome = command("vqae.train", "--out", out, "--resume")
    assert outcome.exit_code == 0, outcome.err
    assert load(out / "last.pt")["finished"]
    assert [line["step"] for line in load(out / "last.pt")["history"]] == [3, 6]


# -- the store of a restarted job


def test_each_restart_attempt_has_its_own_store() -> None:
    job = HashStore()
    for attempt in range(3):
        with ThreadPoolExecutor(3) as pool:
            stores = list(pool.map(lambda rank: attempt_store(job, rank, 3), range(3)))
        assert not stores[2].check(["address"])
        stores[0].set("address", f"of attempt {attempt}")
        assert [store.get("address").decode() for store in stores] == [f"of attempt {attempt}"] * 3


def test_dead_processes_are_not_counted() -> None:
    job = HashStore()
    job.set("name/1", "of one that is dead")
    with pytest.raises(RuntimeError, match=r"rank 1, 2 did not arrive within 0:00:00\.1"):
        attempt_store(job, 0, 3, timedelta(milliseconds=100))
    with ThreadPoolExecutor(3) as pool:
        stores = list(pool.map(lambda rank: attempt_store(job, rank, 3), range(3)))
    stores[0].set("address", "of the living")
    assert [store.get("address").decode() for store in stores] == ["of the living"] * 3


def test_waiting_for_rank_0_times_out() -> None:
    with pytest.raises(RuntimeError, match=r"(?i)time"):
        attempt_store(HashStore(), 1, 3, timedelta(milliseconds=100))
