"""Runs that are stopped and go on: the end is the same, bit for bit."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.vqae import kill_soak
from tests.vqae.commands import Outcome, assert_same_run, files_in, load
from vqae.config import Config
from vqae.training import trainer
from vqae.training.optim import learning_rate_factor
from vqae.training.trainer import Trainer

Command = Callable[..., Outcome]
Start = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def start(environment: dict[str, str]) -> Start:
    """Begin a command in a process of its own, by which tests must not leave it running."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, *map(str, arguments)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return start


def wait_for(file: Path, process: subprocess.Popen[str]) -> None:
    """Until the file is there."""
    until = time.monotonic() + 60
    while not file.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until
        time.sleep(0.002)


# -- signals


def test_sigterm_during_training(
    start: Start, command: Command, tiny: tuple[str, ...], finished_run: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with start("-m", "vqae.train", *tiny, "--checkpoint-minutes", 0, "--out", out) as process:
        wait_for(out / "last.pt", process)
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 143
    state = load(out / "last.pt")
    assert not state["finished"]
    assert 1 <= state["epoch"] * 3 + state["step"] < 6
    steps = state["epoch"] * 3 + state["step"]
    assert err == (
        f"saved at step {steps}; resume with: python -m vqae.train --out {out} --resume\nstopped by SIGTERM\n"
    )
    outcome = command("vqae.train", "--out", out, "--resume")  # just as the message says
    assert outcome.exit_code == 0, outcome.err
    assert_same_run(out, finished_run)
    assert not [name for name in files_in(out) if name.endswith(".part")]


def test_a_terminal_that_closes_ends_in_a_checkpoint(
    tiny: tuple[str, ...], tmp_path: Path, environment: dict[str, str]
) -> None:
    """The kernel sends SIGHUP, and nothing can be printed any more."""
    code = "import fcntl, runpy, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); runpy.run_module"
    code += "('vqae.train', None, '__main__')"
    out, (master, terminal) = tmp_path / "run", os.openpty()
    settings = (*tiny, "--image-size", "8", "--epochs", "100000", "--out", str(out))
    streams = dict.fromkeys(("stdin", "stdout", "stderr"), terminal)
    with subprocess.Popen(
        [sys.executable, "-c", code, *settings], env=environment, start_new_session=True, **streams
    ) as process:
        os.close(terminal)
        wait_for(out / "best.pt", process)
        os.close(master)
        assert process.wait(60) == 129
    state = load(out / "last.pt")
    assert not state["finished"]
    assert state["epoch"] >= 1


def test_interruptions_at_every_stage_of_a_run(
    command: Command, tiny: tuple[str, ...], finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In a step, in an evaluation, in the first step of an epoch, between the plots: one after the other."""
    out = tmp_path / "run"

    def stop_at(owner: object, name: str, call: int) -> Outcome:
        original, calls = getattr(owner, name), []

        def stopping(*arguments: object, **options: object) -> object:
            calls.append(name)
            if len(calls) == call:
                signal.raise_signal(signal.SIGINT)
            return original(*arguments, **options)

        with monkeypatch.context() as patch:
            patch.setattr(owner, name, stopping)
            outcome = command("vqae.train", *tiny, "--out", out, "--resume")
        assert outcome.exit_code == 130
        assert f"resume with: python -m vqae.train --out {out} --resume\nstopped by SIGINT\n" in outcome.err
        assert "Traceback" not in outcome.err
        return outcome

    def position() -> tuple[int, int]:
        state = load(out / "last.pt")
        assert not state["finished"]
        return state["epoch"], state["step"]

    first = stop_at(Trainer, "_train_step", 2)
    assert f"no checkpoint in {out}: starting a new run" in first.err
    assert position() == (0, 2)
    stop_at(trainer, "evaluate", 2)
    assert position() == (0, 3)
    stop_at(Trainer, "_train_step", 1)
    assert position() == (1, 1)
    stop_at(trainer, "plot_reconstructions", 1)
    assert position() == (2, 0)
    assert not (out / "codebook.png").exists()
    outcome = command("vqae.train", *tiny, "--out", out, "--resume")
    assert outcome.exit_code == 0, outcome.err
    assert_same_run(out, finished_run)
    assert (out / "metrics.jsonl").read_text().count("\n") == 2
    assert (out / "curves.png").exists()


@pytest.mark.parametrize("owner", ["load_images", "build_model", "split_train"])
def test_a_signal_before_the_run_has_begun(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: str
) -> None:
    def stop(*_arguments: object, **_options: object) -> None:
        signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(f"vqae.train.{owner}", stop)
    outcome = command("vqae.train", *tiny, "--out", tmp_path / "run")
    assert (outcome.exit_code, outcome.err) == (143, "stopped by SIGTERM\n")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("module", "delay_s"), [("vqae.train", 0.8), ("vqae.train", 0.3), ("vqae.evaluate", 0.3), ("vqae.reconstruct", 0.3)]
)
def test_a_signal_while_torch_loads_leaves_no_traceback(start: Start, module: str, delay_s: float) -> None:
    code = f"import runpy; print('begun'); runpy.run_module('{module}', None, '__main__')"
    with start("-c", code, "--help") as process:
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(delay_s)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "")


def test_resuming_after_max_minutes_does_not_train_again(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "plot_reconstructions", stop)
        outcome = command("vqae.train", *tiny, "--image-size", 8, "--max-minutes", 0.001, "--out", out)
    assert outcome.exit_code == 130
    history = load(out / "last.pt")["history"]
    outcome = command("vqae.train", "--out", out, "--resume")
    assert outcome.exit_code == 0, outcome.err
    assert load(out / "last.pt")["history"] == history


# -- SIGKILL


def test_runs_killed_at_random_moments_resume(
    tiny: tuple[str, ...], finished_run: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    out = tmp_path / "run"
    arguments = ("--kills", "4", "--longest-s", "1.2", "--", *tiny, "--checkpoint-minutes", "0", "--out", str(out))
    finished = subprocess.run(
        [sys.executable, kill_soak.__file__, *arguments],
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert finished.returncode == 0, finished.stderr
    assert int(finished.stdout.split()[-2]) >= 2  # kills that hit
    assert_same_run(out, finished_run)
    assert not [name for name in files_in(out) if name.endswith(".part")]


# -- what --resume says


def test_resuming_a_finished_run_does_nothing(command: Command, finished_run: Path) -> None:
    before = {file: file.stat().st_mtime_ns for file in finished_run.rglob("*")}
    outcome = command("vqae.train", "--out", finished_run, "--resume")
    assert (outcome.exit_code, outcome.out) == (0, f"the run in {finished_run} is finished: nothing to do\n")
    assert {file: file.stat().st_mtime_ns for file in finished_run.rglob("*")} == before


def test_a_finished_run_can_be_extended(
    command: Command, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    before = load(out / "last.pt")
    rates: list[tuple[float, float]] = []
    train_step = Trainer._train_step

    def watched(self: Trainer, images: torch.Tensor) -> None:
        if not rates:
            assert all(torch.equal(value, before["model"][name]) for name, value in self.model.state_dict().items())
        encoder, decoder, _ = self.optimizer.param_groups
        rates.append((encoder["lr"], decoder["lr"]))
        train_step(self, images)

    monkeypatch.setattr(Trainer, "_train_step", watched)
    outcome = command("vqae.train", "--out", out, "--resume", "--epochs", 5)
    assert outcome.exit_code == 0, outcome.err
    state = load(out / "last.pt")
    assert state["finished"]
    assert (state["epoch"], state["config"]["epochs"]) == (5, 5)
    assert state["history"][:2] == before["history"]
    assert [line["step"] for line in state["history"]] == [3, 6, 9, 12, 15]
    assert state["best_val_mse"] <= before["best_val_mse"]
    # The rates are those of a run of 15 steps at its steps 6 to 14. Its encoder is trained from half of the run on.
    config = Config.from_dict(state["config"], "the test")
    for step, (encoder_lr, lr) in enumerate(rates, 6):
        assert lr == pytest.approx(config.lr * learning_rate_factor(step / 15, config.warmup))
        factor = learning_rate_factor((step / 15 - 0.5) / 0.5, config.warmup) if step >= 7.5 else 0.0
        assert encoder_lr == pytest.approx(config.encoder_lr * factor)
    assert len(rates) == 9
    assert json.loads((out / "config.json").read_text())["epochs"] == 5
    outcome = command("vqae.train", "--out", out, "--resume")
    assert outcome.out == f"the run in {out} is finished: nothing to do\n"


def test_an_extended_run_that_was_interrupted_resumes(
    command: Command, finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    extended = shutil.copytree(finished_run, tmp_path / "extended")
    interrupted = shutil.copytree(finished_run, tmp_path / "interrupted")
    assert command("vqae.train", "--out", extended, "--resume", "--epochs", 3).exit_code == 0
    train_step, calls = Trainer._train_step, []

    def stopping(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        train_step(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", stopping)
        assert command("vqae.train", "--out", interrupted, "--resume", "--epochs", 3).exit_code == 143
    outcome = command("vqae.train", "--out", interrupted, "--resume")
    assert outcome.exit_code == 0, outcome.err
    assert_same_run(interrupted, extended)


def test_only_a_finished_run_can_be_extended(command: Command, stopped_run: Path) -> None:
    outcome = command("vqae.train", "--out", stopped_run, "--resume", "--epochs", 5)
    assert outcome.exit_code == 2
    assert "--epochs was 2, got 5" in outcome.err


def test_a_run_cannot_be_extended_to_fewer_epochs(command: Command, finished_run: Path) -> None:
    outcome = command("vqae.train", "--out", finished_run, "--resume", "--epochs", 1)
    assert outcome.exit_code == 2
    assert "--epochs must be at least 2, which are finished, got 1" in outcome.err


def test_resume_names_all_settings_that_differ(command: Command, finished_run: Path) -> None:
    outcome = command("vqae.train", "--out", finished_run, "--resume", "--lr", 0.5, "--num-codes", 8, "--no-flip")
    assert outcome.exit_code == 2
    for difference in ("--num-codes was 16, got 8", "--lr was 0.3, got 0.5", "--flip was True, got False"):
        assert difference in outcome.err
    assert "--epochs" not in outcome.err


def test_resume_refuses_another_dataset(command: Command, finished_run: Path) -> None:
    outcome = command("vqae.train", "--out", finished_run, "--resume", "--dataset", "synthetic")
    assert outcome.exit_code == 2
    assert "--dataset was imagefolder, got synthetic" in outcome.err


@pytest.fixture
def stopped_run(command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run on images of 8 x 8 that was stopped after its first step."""

    original = Trainer._train_step

    def step(*arguments: object) -> None:
        signal.raise_signal(signal.SIGINT)
        original(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_train_step", step)
        outcome = command("vqae.train", *tiny, "--image-size", 8, "--out", tmp_path / "run")
    assert outcome.exit_code == 130
    return tmp_path / "run"


def test_resume_refuses_fewer_images(command: Command, stopped_run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "fewer")
    for index in range(10):
        (tmp_path / "fewer" / "train" / "colours" / f"{index:02}.png").unlink()
    before = (stopped_run / "last.pt").read_bytes()
    outcome = command("vqae.train", "--out", stopped_run, "--resume", "--data-dir", tmp_path / "fewer")
    assert outcome.exit_code == 2
    assert "got others (51 training images then, 43 now)" in outcome.err
    assert (stopped_run / "last.pt").read_bytes() == before


def test_resume_refuses_other_images(command: Command, stopped_run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(images, tmp_path / "others")
    file = next((tmp_path / "others" / "test" / "colours").iterdir())
    Image.new("RGB", (32, 32), "red").save(file)
    outcome = command("vqae.train", "--out", stopped_run, "--resume", "--data-dir", tmp_path / "others")
    assert outcome.exit_code == 2
    assert "--resume: the images must be those that the run began with" in outcome.err


def test_changed_data_dir_is_saved(command: Command, stopped_run: Path, images: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(images, tmp_path / "moved")
    outcome = command("vqae.train", "--out", stopped_run, "--resume", "--data-dir", moved)
    assert outcome.exit_code == 0, outcome.err
    assert json.loads((stopped_run / "config.json").read_text())["data_dir"] == str(moved)


def test_results_without_a_checkpoint_are_not_replaced(command: Command, finished_run: Path, tmp_path: Path) -> None:
    out = shutil.copytree(finished_run, tmp_path / "run")
    (out / "last.pt").unlink()
    before = {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()}
    outcome = command("vqae.train", "--out", out, "--resume")
    assert outcome.exit_code == 2
    assert "already holds a run (config.json, metrics.jsonl, best.pt," in outcome.err
    assert {file.name: file.read_bytes() for file in out.iterdir() if file.is_file()} == before


def test_truncated_checkpoint_is_named_and_kept(command: Command, stopped_run: Path) -> None:
    last = stopped_run / "last.pt"
    half = last.read_bytes()[: last.stat().st_size // 2]
    last.write_bytes(half)
    outcome = command("vqae.train", "--out", stopped_run, "--resume")
    assert outcome.exit_code == 2
    assert f"{last} is not a checkpoint, or it is truncated or damaged" in outcome.err
    assert last.read_bytes() == half


def test_best_pt_cannot_be_resumed(command: Command, finished_run: Path, tmp_path: Path) -> None:
    for name, source in (("config.json", "config.json"), ("last.pt", "best.pt")):
        shutil.copy(finished_run / source, tmp_path / name)
    outcome = command("vqae.train", "--out", tmp_path, "--resume")
    assert outcome.exit_code == 2
    assert "last.pt holds a model alone" in outcome.err


def test_a_run_without_image_fingerprints_is_refused(command: Command, stopped_run: Path) -> None:
    state = load(stopped_run / "last.pt")
    del state["images"]
    torch.save(state, stopped_run / "last.pt")
    outcome = command("vqae.train", "--out", stopped_run, "--resume")
    assert outcome.exit_code == 2
    assert "last.pt was written by an older version of this program" in outcome.err


def test_a_run_of_version_0_1_resumes(command: Command, stopped_run: Path) -> None:
    state, old_values = load(stopped_run / "last.pt"), {"network_init": "pictures", "codebook_step": "share"}
    config = {**state["config"], **old_values, "encoder_start": state["config"]["unfreeze_encoder_at"]}
    del config["unfreeze_encoder_at"]
    state["pictures"] = state.pop("images")
    torch.save({**state, "config": config}, stopped_run / "last.pt")
    (stopped_run / "config.json").write_text(json.dumps(config))
    with pytest.warns(DeprecationWarning, match="is deprecated, use"):
        outcome = command("vqae.train", "--out", stopped_run, "--resume")
    assert outcome.exit_code == 0, outcome.err
    assert "encoder_start" not in (stopped_run / "config.json").read_text()


def test_a_run_may_move_to_another_folder(command: Command, stopped_run: Path, tmp_path: Path) -> None:
    moved = stopped_run.rename(tmp_path / "moved it")
    outcome = command("vqae.train", "--out", moved, "--resume")
    assert outcome.exit_code == 0, outcome.err
    assert load(moved / "last.pt")["finished"]
    assert not stopped_run.exists()
