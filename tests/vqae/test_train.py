"""A whole run: what it leaves, what it learns, and what is refused before anything is written."""

import dataclasses
import errno
import itertools
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter
from torchvision.datasets import CIFAR10

from tests.vqae.commands import TINY, Outcome, files_in, load
from vqae import VQAE
from vqae.config import Config
from vqae.data import load as data_load
from vqae.runtime.errors import UsageError
from vqae.training import trainer
from vqae.training.metrics import Evaluation
from vqae.training.report import write_events

Command = Callable[..., Outcome]

FILES = {"config.json", "metrics.jsonl", "last.pt", "best.pt", "reconstructions.png", "codebook.png", "curves.png"}
METRICS = {
    *("epoch", "step", "dataset", "reconstruction_loss", "codebook_loss", "train_mse", "val_mse", "test_mse"),
    *("reconstruction_loss_share", "codebook_loss_share"),
    *("psnr_db", "perplexity", "codes_used", "train_perplexity", "train_codes_used", "restarts"),
    *("images_per_s", "lr", "encoder_lr", "elapsed_s"),
}


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# -- what a run leaves


def test_a_run_writes_exactly_its_files(finished_run: Path) -> None:
    events = {name for name in files_in(finished_run) if name.startswith("events/events.out.tfevents.")}
    assert len(events) == 1
    assert files_in(finished_run) == FILES | events | {"events"}


def test_config_json_repeats_the_run(finished_run: Path, images: Path) -> None:
    config = Config.read(finished_run / "config.json")
    assert config.dataset == "imagefolder"
    assert config.data_dir == images
    assert config.out == finished_run
    assert (config.num_codes, config.epochs, config.batch_size, config.flip) == (16, 2, 16, True)


def test_metrics_have_one_line_per_epoch(finished_run: Path) -> None:
    lines = metrics(finished_run)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert [line["step"] for line in lines] == [3, 6]
    for line in lines:
        assert set(line) == METRICS
        assert line["psnr_db"] == pytest.approx(-10 * math.log10(line["test_mse"]))
        assert 0 < line["test_mse"] < 0.5
        assert 1 <= line["perplexity"] <= line["codes_used"] <= 16
        assert line["images_per_s"] > 0
    assert lines[0]["lr"] > 0
    assert lines[-1]["lr"] == lines[-1]["encoder_lr"] == pytest.approx(0, abs=1e-9)


def test_the_train_mse_is_in_pixels(finished_run: Path) -> None:
    pixel_std = load(finished_run / "last.pt")["model"]["pixel_std"].item()
    for line in metrics(finished_run):
        assert line["train_mse"] == pytest.approx(line["reconstruction_loss"] * pixel_std**2)


def test_the_shares_of_the_losses_add_up_to_1(finished_run: Path) -> None:
    for line in metrics(finished_run):
        assert line["reconstruction_loss_share"] + line["codebook_loss_share"] == pytest.approx(1)
        ratio = line["codebook_loss_share"] / line["reconstruction_loss_share"]
        assert ratio == pytest.approx(line["codebook_loss"] / line["reconstruction_loss"])


def test_the_model_sees_images_of_mean_0_and_variance_1(finished_run: Path, images: Path) -> None:
    split = data_load.load_images("imagefolder", images)
    model = load(finished_run / "last.pt")["model"]
    normalised = (split.train.double() / 255 - model["pixel_mean"]) / model["pixel_std"]
    assert normalised.mean().item() == pytest.approx(0, abs=0.1)  # the run held a fifth of them out
    assert normalised.square().mean().item() == pytest.approx(1, abs=0.1)


def test_checkpoints_are_tensors_and_plain_values_under_the_models_own_names(finished_run: Path) -> None:
    last, best = load(finished_run / "last.pt"), load(finished_run / "best.pt")
    assert set(best) == {"format", "config", "dataset", "image_size", "images", "model"}
    assert set(best) < set(last)
    assert last["finished"]
    for state in (last, best):
        assert {name.split(".")[0] for name in state["model"]} == {
            *("encoder", "quantizer", "decoder", "pixel_mean", "pixel_std")
        }


def test_best_is_the_model_of_the_lowest_validation_mse(finished_run: Path) -> None:
    last = load(finished_run / "last.pt")
    val_mse = [line["val_mse"] for line in metrics(finished_run)]
    assert last["best_val_mse"] == min(val_mse)
    same = all(
        torch.equal(value, last["model"][name]) for name, value in load(finished_run / "best.pt")["model"].items()
    )
    assert same == (val_mse[-1] == min(val_mse))


def test_plots_have_titles(finished_run: Path) -> None:
    for name in ("reconstructions.png", "codebook.png", "curves.png"):
        with Image.open(finished_run / name) as image:
            assert image.format == "PNG"
            assert "imagefolder, K = 16, test MSE 0." in image.info["Title"]


def test_events_hold_the_metrics(finished_run: Path) -> None:
    accumulator = EventAccumulator(str(finished_run / "events"))
    accumulator.Reload()
    tags, lines = accumulator.Tags(), metrics(finished_run)
    assert set(tags["scalars"]) == METRICS - {"epoch", "step", "dataset"}
    for name in tags["scalars"]:
        values = [(event.step, event.value) for event in accumulator.Scalars(name)]
        assert values == [(line["step"], pytest.approx(line[name])) for line in lines]
    for event in accumulator.Tensors("dataset/text_summary"):
        assert event.tensor_proto.string_val[0] == b"imagefolder"


def test_a_process_writes_one_event_file(finished_run: Path) -> None:
    assert len(list((finished_run / "events").iterdir())) == 1


def test_a_resumed_run_has_no_event_twice(command: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = (*("vqae.train", *tiny, "--image-size", 8, "--out", tmp_path), "--resume")
    assert command(*run).exit_code == 0
    earlier = (tmp_path / "last.pt").read_bytes()
    assert command(*run, "--epochs", 3).exit_code == 0
    (tmp_path / "last.pt").write_bytes(earlier)  # as if the process had died before its first checkpoint
    time.sleep(1)  # TensorBoard orders files by their second
    assert command(*run, "--epochs", 4).exit_code == 0
    assert len(list((tmp_path / "events").iterdir())) == 3
    accumulator = EventAccumulator(str(tmp_path / "events"))
    accumulator.Reload()
    assert [event.step for event in accumulator.Scalars("test_mse")] == [3, 6, 9, 12]
    values = [event.value for event in accumulator.Scalars("test_mse")]
    assert values == [pytest.approx(line["test_mse"]) for line in metrics(tmp_path)]


def test_events_can_be_read_after_every_epoch(tmp_path: Path) -> None:
    writer = None
    for step in (1, 2, 3):
        writer = write_events(tmp_path, {"step": step, "test_mse": 0.5}, writer)
        accumulator = EventAccumulator(str(tmp_path))
        accumulator.Reload()
        assert [event.step for event in accumulator.Scalars("test_mse")] == list(range(1, step + 1))
    writer.close()
    assert len(files_in(tmp_path)) == 1


def test_the_checkpoint_of_a_finished_run_is_as_large_as_the_model(finished_run: Path) -> None:
    last, best = finished_run / "last.pt", finished_run / "best.pt"
    assert last.stat().st_size < 1.05 * best.stat().st_size
    assert load(last)["optimizer"]["state"] == {}


def test_no_events_in_a_folder_whose_name_is_not_utf_8(tmp_path: Path) -> None:
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    with pytest.warns(UserWarning, match=r"no TensorBoard events are written: the path '.*caf.*' is not in UTF-8"):
        assert write_events(folder, {"step": 1, "test_mse": 0.5}) is None


# -- the encoder's part


def test_the_encoder_is_frozen_until_unfreeze_encoder_at(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved: list[tuple[float, bool, bool]] = []
    train_step = trainer.Trainer._train_step

    def watched(self: trainer.Trainer, images: torch.Tensor) -> None:
        progress = self.progress()
        before = {name: value.clone() for name, value in self.model.state_dict().items()}
        train_step(self, images)
        changed = {name for name, value in self.model.state_dict().items() if not torch.equal(value, before[name])}
        parts = {name.split(".")[0] for name in changed}
        moved.append((progress, "encoder" in parts, {"quantizer", "decoder"} <= parts))

    monkeypatch.setattr(trainer.Trainer, "_train_step", watched)
    assert command("vqae.train", *tiny, "--out", tmp_path / "run", "--unfreeze-encoder-at", 0.5).exit_code == 0
    assert moved == [(step / 6, step >= 3, True) for step in range(6)]


# -- synthetic images


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/cifar-10-python.tar.gz")  # nobody answers
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("no_network")
def test_auto_falls_back_and_every_output_says_synthetic(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(data_load, "NUM_SYNTHETIC", {"train": 40, "test": 20})
    out = tmp_path / "run"
    data_dir = tmp_path / "data"
    with caplog.at_level(logging.WARNING):
        outcome = command("vqae.train", *TINY, "--epochs", 1, "--data-dir", data_dir, "--out", out)
    assert outcome.exit_code == 0, outcome.err
    assert "THE IMAGES ARE SYNTHETIC" in caplog.text
    first, beginning, epoch, *_ = outcome.out.splitlines()
    assert first.startswith("synthetic: 32 training, 8 validation, 20 test images of 32 x 32")
    assert beginning == "initialising encoder and decoder by PCA ..."
    assert epoch.startswith("epoch 1/1 (synthetic)")
    assert Config.read(out / "config.json").dataset == "synthetic"
    assert all(line["dataset"] == "synthetic" for line in metrics(out))
    for name in ("last.pt", "best.pt"):
        assert load(out / name)["dataset"] == "synthetic"
    for name in ("reconstructions.png", "codebook.png", "curves.png"):
        with Image.open(out / name) as image:
            assert "synthetic" in image.info["Title"]
    measured = command("vqae.evaluate", "--checkpoint", out / "best.pt", "--device", "cpu")
    assert json.loads(measured.out)["dataset"] == "synthetic"
    assert json.loads(measured.out)["mse"] == pytest.approx(metrics(out)[0]["test_mse"])


def test_restart_after_with_fewer_images_than_a_batch(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[trainer.Trainer] = []
    monkeypatch.setattr(trainer.Trainer, "run", lambda self: made.append(self))
    sizes = ("--limit", 20, "--val-fraction", 0, "--batch-size", 256, "--restart-after", 30)
    assert command("vqae.train", *tiny, *sizes, "--image-size", 8, "--out", tmp_path / "run").exit_code == 0
    assert made[0].batch_size == 20
    assert made[0].model.quantizer.restart_after == 2


@pytest.mark.parametrize(
    ("restart_after", "num_images", "images", "steps"),
    [
        (15_360, 49_000, 15_360, 60),
        (15_360, 7_680, 15_360, 60),
        (15_360, 289, 578, 3),
        (100, 289, 100, 1),
        (0, 9, 0, 0),
    ],
    ids=["CIFAR-10", "two epochs", "small", "small, sooner", "disabled"],
)
def test_codes_are_reset_after_two_epochs_at_the_latest(
    restart_after: int, num_images: int, images: int, steps: int
) -> None:
    config = Config(restart_after=restart_after)
    fitted = config.fitted_to(num_images)
    assert (fitted.restart_after, fitted.restart_steps) == (images, steps)
    assert fitted == dataclasses.replace(config, restart_after=images, batch_size=min(256, num_images))


def test_default_resets_on_a_small_folder(command: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    default = ("--restart-after", Config.restart_after, "--epochs", 8, "--num-codes", 64, "--image-size", 8)
    assert command("vqae.train", *tiny, *default, "--out", tmp_path / "run").exit_code == 0
    lines = metrics(tmp_path / "run")
    assert [line["restarts"] > 0 for line in lines[:2]] == [False, False]
    assert sum(line["restarts"] for line in lines[2:]) > 0
    assert lines[-1]["codes_used"] > lines[1]["codes_used"]


def test_collapse_on_a_small_folder_is_warned_of(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measure = trainer.evaluate

    def evaluate(model: VQAE, images: torch.Tensor, *others: Any) -> Evaluation:
        return measure(model, images, *others)._replace(counts=torch.tensor([images.shape[0]] + 15 * [0]))

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    default = ("--restart-after", Config.restart_after, "--epochs", 6, "--image-size", 8)
    outcome = command("vqae.train", *tiny, *default, "--out", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.err
    assert "45 held-out images use 1 of 16 codes" in outcome.err


# -- a codebook that collapses


@pytest.mark.parametrize("codes_used", [7, 16])
def test_collapse_is_warned_of_once_per_epoch(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, codes_used: int
) -> None:
    measure = trainer.evaluate

    def evaluate(model: VQAE, images: torch.Tensor, *others: Any) -> Evaluation:
        counts = torch.bincount(torch.arange(images.shape[0]) % codes_used, minlength=16)
        return measure(model, images, *others)._replace(counts=counts)

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    outcome = command("vqae.train", *tiny, "--image-size", 8, "--restart-after", 0, "--out", tmp_path)
    assert outcome.exit_code == 0, outcome.err
    said = [line for line in outcome.err.splitlines() if line.startswith("warning")]
    text = "45 held-out images use 7 of 16 codes, fewer than half of those they could use: try --restart-after"
    assert len(said) == (2 if codes_used == 7 else 0)  # two epochs
    assert all(text in line for line in said)


# -- options


def test_a_run_with_other_options(command: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    outcome = command(
        *("vqae.train", *tiny, "--epochs", 1, "--out", tmp_path / "run", "--no-flip", "--amp", "--code-dim", 8),
        *("--image-size", 8, "--embedding-norm", "none", "--codebook-init", "data", "--codebook-step", "plain"),
        *("--val-fraction", 0, "--limit", 20, "--batch-size", 1000, "--hidden-dims", 8, 8, "--warmup", 0),
    )
    assert outcome.exit_code == 0, outcome.err
    (line,) = metrics(tmp_path / "run")
    assert line["val_mse"] is None
    assert line["step"] == 1  # a batch is never larger than the images
    assert "20 training, 0 validation, 32 test images of 8 x 8" in outcome.out
    last, best = load(tmp_path / "run" / "last.pt"), load(tmp_path / "run" / "best.pt")
    assert all(torch.equal(value, last["model"][name]) for name, value in best["model"].items())


def test_a_run_of_several_codes_per_image(
    command: Command, tiny: tuple[str, ...], images: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    run = ("vqae.train", *tiny, "--image-size", 8, "--num-quantizers", 2, "--epochs", 1, "--out", out)
    assert command(*run).exit_code == 0
    resumed = command("vqae.train", "--out", out, "--resume", "--epochs", 2)
    assert resumed.exit_code == 0, resumed.err
    (*_, line) = metrics(out)
    assert f"codes used {line['codes_used']}/32" in resumed.out
    assert files_in(out) >= FILES
    with Image.open(out / "codebook.png") as image:
        assert "2 codes of K = 16" in image.info["Title"]
    evaluated = command("vqae.evaluate", "--checkpoint", out / "last.pt")
    assert json.loads(evaluated.out)["mse"] == pytest.approx(line["test_mse"])
    plotted = command("vqae.reconstruct", "--checkpoint", out / "last.pt", images / "test", "--out", tmp_path / "a.png")
    assert plotted.exit_code == 0, plotted.err


def test_overwrite_removes_the_run_and_nothing_else(command: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "events").mkdir()
    for name in (*FILES, "events/events.out.tfevents.1", "notes.txt", "events/notes.txt"):
        (tmp_path / name).write_text("old")
    outcome = command("vqae.train", *tiny, "--epochs", 1, "--image-size", 8, "--out", tmp_path, "--overwrite")
    assert outcome.exit_code == 0, outcome.err
    assert not (tmp_path / "events/events.out.tfevents.1").exists()
    for name in FILES:
        assert (tmp_path / name).read_bytes() != b"old"
    for name in ("notes.txt", "events/notes.txt"):
        assert (tmp_path / name).read_text() == "old"


def test_a_run_leaves_time_for_its_end(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each look at the clock, 0.05 s have passed since the last one."""
    ticks = itertools.count(0, 0.05)
    monkeypatch.setattr(trainer, "elapsed_s", lambda: next(ticks))
    settings = ("--image-size", 8, "--epochs", 100_000, "--max-minutes", 0.25, "--out", tmp_path)
    assert command("vqae.train", *tiny, *settings).exit_code == 0
    line = metrics(tmp_path)[-1]
    assert line["elapsed_s"] < 15 - trainer._CLOSING_S / 2
    assert line["step"] > 20  # of about 170
    assert line["lr"] < 0.01 * Config().lr  # the schedule ends where the time does
    assert files_in(tmp_path) >= FILES


# -- refused before anything is written


def _missing(tmp_path: Path) -> list[object]:
    return ["--data-dir", tmp_path / "missing"]


def _empty(tmp_path: Path) -> list[object]:
    (tmp_path / "empty").mkdir()
    return ["--data-dir", tmp_path / "empty"]


def _no_image(tmp_path: Path) -> list[object]:
    for split in ("train", "test"):
        (tmp_path / "bad" / split / "a").mkdir(parents=True)
        (tmp_path / "bad" / split / "a" / "notes.png").write_text("no image")
    return ["--data-dir", tmp_path / "bad"]


def _several_sizes(tmp_path: Path) -> list[object]:
    for split in ("train", "test"):
        (tmp_path / "sizes" / split / "a").mkdir(parents=True)
        for side in (8, 9):
            Image.new("RGB", (side, side)).save(tmp_path / "sizes" / split / "a" / f"{side}.png")
    return ["--data-dir", tmp_path / "sizes"]


def _bad_config(tmp_path: Path) -> list[object]:
    (tmp_path / "bad.json").write_text('{"colour": 1}')
    return ["--config", tmp_path / "bad.json"]


REFUSED: dict[str, tuple[Callable[[Path], list[object]], str]] = {
    "missing folder": (_missing, "missing does not exist"),
    "empty folder": (_empty, "must hold the folder train/"),
    "no folder": (lambda _: ["--dataset", "imagefolder"], "needs --data-dir"),
    "no image": (_no_image, "notes.png is damaged, not an image"),
    "several sizes": (_several_sizes, "--image-size"),
    "no network": (lambda path: ["--dataset", "cifar10", "--data-dir", path / "data"], "cannot be downloaded"),
    "no device": (lambda _: ["--device", "cuda:99"], "--device cuda:99 does not exist"),
    "out of range": (lambda _: ["--lr", "-1"], "--lr must be above 0, got -1.0"),
    "bad config": (_bad_config, "bad.json holds unknown settings: colour"),
    "too few images": (lambda _: ["--limit", "1", "--val-fraction", "0"], "at least 2 images"),
}


@pytest.mark.usefixtures("no_network")
@pytest.mark.parametrize("case", REFUSED)
def test_bad_input_exits_with_2_and_writes_nothing(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, case: str
) -> None:
    make, message = REFUSED[case]
    settings = TINY if case == "no folder" else tiny
    outcome = command("vqae.train", *settings, "--out", tmp_path / "run", *make(tmp_path))
    assert outcome.exit_code == 2
    assert outcome.err.startswith("error: ")
    assert message in outcome.err
    assert outcome.err.count("\n") == 1
    assert outcome.out == ""
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["config.json", "last.pt", "best.pt", "curves.png", "metrics.jsonl"])
def test_a_folder_with_a_run_is_refused(command: Command, tiny: tuple[str, ...], tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("{}")
    outcome = command("vqae.train", *tiny, "--out", tmp_path)
    assert outcome.exit_code == 2
    ways = "--resume, --overwrite" if name == "last.pt" else "--overwrite"
    assert f"already holds a run ({name}): use {ways} or another folder" in outcome.err
    assert files_in(tmp_path) == {name}


def test_invalid_folder_name_is_refused(command: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    for module, option in (("vqae.train", "--out"), ("vqae.evaluate", "--checkpoint")):
        outcome = command(module, *(tiny if option == "--out" else ()), option, tmp_path / ("x" * 300))
        assert outcome.exit_code == 2
        assert "cannot be read: File name too long" in outcome.err


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)])
def test_out_must_not_be_among_the_images(
    command: Command, tiny: tuple[str, ...], images: Path, tmp_path: Path, option: tuple[str, ...]
) -> None:
    (tmp_path / "images").symlink_to(images)
    (tmp_path / "run" / "events").mkdir(parents=True)
    for arguments in (
        ("--out", images / "train" / "run"),
        ("--out", tmp_path / "images" / "test" / "colours"),
        ("--data-dir", images / "train", "--out", images / "train"),  # a flat folder
        ("--data-dir", tmp_path / "run" / "events", "--out", tmp_path / "run"),  # into which TensorBoard would write
    ):
        before = files_in(images) | files_in(tmp_path)
        outcome = command("vqae.train", *tiny, *arguments, *option)
        assert (outcome.exit_code, outcome.out) == (2, "")
        assert outcome.err.startswith("error: --out must be outside ")
        assert files_in(images) | files_in(tmp_path) == before


@pytest.mark.parametrize("option", [(), ("--overwrite",), ("--resume",)])
def test_out_must_not_be_a_file(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, option: tuple[str, ...]
) -> None:
    (tmp_path / "run").write_text("mine")
    (tmp_path / "broken").symlink_to("nowhere")
    for name, kind in (("run", "file"), ("broken", "link")):
        outcome = command("vqae.train", *tiny, "--out", tmp_path / name, *option)
        assert outcome.exit_code == 2
        assert f"--out must be a folder, got the {kind} {tmp_path / name}" in outcome.err
    assert (tmp_path / "run").read_text() == "mine"


# -- runs that go wrong


def test_full_disk_ends_the_run_and_keeps_the_last_checkpoint(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync, room = os.fsync, ["config.json", "last.pt", "last.pt after step 1", "last.pt after step 2"]

    def fill_up(descriptor: int) -> None:
        if room:
            room.pop()
        else:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", fill_up)
    settings = (*tiny, "--image-size", 8, "--out", tmp_path / "run", "--checkpoint-minutes", 0)
    outcome = command("vqae.train", *settings)
    assert outcome.exit_code == 2
    assert "no space left on the disk for" in outcome.err
    assert "last.pt" in outcome.err
    assert load(tmp_path / "run" / "last.pt")["step"] == 2
    assert files_in(tmp_path / "run") == {"config.json", "last.pt"}


def test_a_loss_that_is_not_finite_stops_the_run(command: Command, tiny: tuple[str, ...], tmp_path: Path) -> None:
    out = tmp_path / "run"
    settings = ("--image-size", 8, "--warmup", 0, "--embedding-norm", "none", "--out", out)
    outcome = command("vqae.train", *tiny, *settings, "--checkpoint-minutes", 0, "--lr", "1e30")
    assert outcome.exit_code == 1
    assert "error: a loss was not finite at step 2; the last checkpoint, if there is one, is kept" in outcome.err
    assert "Traceback" not in outcome.err
    state = load(out / "last.pt")
    assert state["step"] == 1
    assert state["losses"]["sums"].isfinite().all()


def test_model_with_nan_reconstructions_is_not_saved(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def evaluate(model: VQAE, *_arguments: object) -> Evaluation:
        return Evaluation(math.nan, math.nan, 1.0, 1, 1, torch.zeros(16, dtype=torch.int64))

    monkeypatch.setattr(trainer, "evaluate", evaluate)
    outcome = command("vqae.train", *tiny, "--image-size", 8, "--out", tmp_path / "run")
    assert outcome.exit_code == 1
    assert "error: reconstructions were not finite after step 3" in outcome.err
    assert files_in(tmp_path / "run") == {"config.json", "last.pt"}
    assert load(tmp_path / "run" / "last.pt")["step"] == 0


def test_events_that_cannot_be_written_are_named(tiny: tuple[str, ...], tmp_path: Path, command: Command) -> None:
    (tmp_path / "events").write_text("a file where the folder should be")
    outcome = command("vqae.train", *tiny, "--image-size", 8, "--epochs", 1, "--out", tmp_path)
    assert outcome.exit_code == 2
    assert f"{tmp_path / 'events'} cannot be written" in outcome.err


def test_full_disk_while_events_are_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(RecordWriter, "write", fail)
    with pytest.raises(UsageError, match=f"no space left on the disk for {tmp_path}"):
        write_events(tmp_path, {"step": 1, "test_mse": 0.5})
    assert capfd.readouterr().err == ""


def test_full_disk_after_events_were_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = write_events(tmp_path, {"step": 1, "test_mse": 0.5})
    monkeypatch.setattr(RecordWriter, "write", fail)
    with pytest.raises(UsageError, match=f"no space left on the disk for {tmp_path}"):
        write_events(tmp_path, {"step": 2, "test_mse": 0.5, "dataset": "cifar10"}, writer)
    assert capfd.readouterr().err == ""


def test_a_disk_that_fills_up_ends_the_run_with_a_message(
    command: Command, tiny: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = RecordWriter.write

    def fail_later(self: RecordWriter, data: bytes) -> None:
        if len(metrics(tmp_path) if (tmp_path / "metrics.jsonl").exists() else []) == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    with monkeypatch.context() as patch:
        patch.setattr(RecordWriter, "write", fail_later)
        outcome = command("vqae.train", *tiny, "--image-size", 8, "--out", tmp_path)
    assert (outcome.exit_code, "Traceback" in outcome.err) == (2, False)
    assert f"error: no space left on the disk for {tmp_path / 'events'}" in outcome.err
    assert command("vqae.train", "--out", tmp_path, "--resume").exit_code == 0
    assert len(metrics(tmp_path)) == 2


def test_without_tensorboard_there_are_no_events(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    write_events(tmp_path, {"step": 1, "test_mse": 0.5})
    assert files_in(tmp_path) == set()
