"""The command that measures a checkpoint."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.vqae.commands import TINY, Outcome
from vqae import evaluate

Command = Callable[..., Outcome]


def measured(outcome: Outcome) -> dict[str, object]:
    assert outcome.exit_code == 0, outcome.err
    assert outcome.out.count("\n") == 1
    figures: dict[str, object] = json.loads(outcome.out)
    return figures


def test_one_line_of_json_with_the_figures_of_the_run(command: Command, finished_run: Path, images: Path) -> None:
    last_line = json.loads((finished_run / "metrics.jsonl").read_text().splitlines()[-1])
    folder = ("--dataset", "imagefolder", "--data-dir", images, "--split", "test")
    figures = measured(command("vqae.evaluate", "--checkpoint", finished_run / "last.pt", *folder, "--device", "cpu"))
    assert figures == {
        "mse": pytest.approx(last_line["test_mse"]),
        "psnr_db": pytest.approx(last_line["psnr_db"]),
        "perplexity": pytest.approx(last_line["perplexity"]),
        "codes_used": last_line["codes_used"],
        "images": 32,
        "dataset": "imagefolder",
        "split": "test",
    }


def test_evaluate_uses_the_data_set_of_the_run(command: Command, finished_run: Path) -> None:
    best = ("vqae.evaluate", "--checkpoint", finished_run / "best.pt", "--device", "cpu")
    assert measured(command(*best))["images"] == 32
    assert measured(command(*best, "--split", "train", "--batch-size", 7))["images"] == 64


def test_other_images(command: Command, finished_run: Path, images: Path, tmp_path: Path) -> None:
    (tmp_path / "mine" / "test").mkdir(parents=True)
    shutil.copytree(images / "train" / "colours", tmp_path / "mine" / "test" / "colours")
    arguments = ("--checkpoint", finished_run / "best.pt", "--data-dir", tmp_path / "mine", "--device", "cpu")
    assert measured(command("vqae.evaluate", *arguments))["images"] == 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--checkpoint", "none.pt"), "checkpoint none.pt cannot be read: No such file"),
        (("--dataset", "imagefolder", "--data-dir", "none"), "none does not exist"),
        (("--batch-size", "0"), "--batch-size must be at least 1, got 0"),
        (("--device", "cuda:99"), "--device cuda:99 does not exist"),
    ],
)
def test_bad_input_exits_with_2(command: Command, finished_run: Path, arguments: tuple[str, ...], message: str) -> None:
    outcome = command("vqae.evaluate", "--checkpoint", finished_run / "best.pt", *arguments)
    assert outcome.exit_code == 2
    assert outcome.out == ""
    assert outcome.err.startswith("error: ")
    assert message in outcome.err


def test_images_of_another_size(command: Command, finished_run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load_split = evaluate.load_split

    def load_small(*arguments: object, **options: object) -> object:
        return load_split(*arguments, **{**options, "image_size": 16})

    monkeypatch.setattr(evaluate, "load_split", load_small)
    outcome = command("vqae.evaluate", "--checkpoint", finished_run / "best.pt", "--device", "cpu")
    assert outcome.exit_code == 2
    assert "images must be (32, 32) as in the checkpoint, got (16, 16)" in outcome.err


def test_a_flat_folder_is_split_as_in_the_run(
    command: Command, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    shutil.copytree(images / "train" / "colours", tmp_path / "flat")
    (tmp_path / "flat" / "notes.txt").write_text("no image")
    data = ("--dataset", "imagefolder", "--data-dir", tmp_path / "flat", "--skip-unreadable", "--test-fraction", 0.25)
    outcome = command("vqae.train", *TINY, *data, "--epochs", 1, "--seed", 3, "--out", tmp_path / "run")
    assert outcome.exit_code == 0, outcome.err
    last_line = json.loads((tmp_path / "run" / "metrics.jsonl").read_text())
    best = ("vqae.evaluate", "--checkpoint", tmp_path / "run" / "best.pt", "--device", "cpu")
    caplog.clear()
    figures = measured(command(*best))
    assert figures["mse"] == pytest.approx(last_line["test_mse"])
    assert figures["images"] in (15, 16)  # a quarter of 65 files, one of which is skipped
    assert figures["images"] + measured(command(*best, "--split", "train"))["images"] == 64
    assert "are not those of the run" not in caplog.text

    for file in sorted((images / "test" / "colours").iterdir()):
        shutil.copy(file, tmp_path / "flat" / f"added {file.name}")
    assert measured(command(*best))["images"] in (23, 24)
    assert "the test images are not those of the run, which may have trained on some of these" in caplog.text
