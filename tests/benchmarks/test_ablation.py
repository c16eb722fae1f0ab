"""The variants of the recipe, their rows, and resuming."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import ablation
from benchmarks.ablation import VARIANTS
from benchmarks.results import RESULTS, read_rows
from benchmarks.tables.learning import ablation_table
from vqae.config import Config
from vqae.runtime.errors import DivergedError, UsageError
from vqae.runtime.process import SignalHandler

# The default recipe's sizes are those of CIFAR-10: these make a run of seconds out of it.
SMALL = {"num_codes": 4, "code_dim": 8, "hidden_dims": (8,), "batch_size": 8, "val_fraction": 0.25}


@pytest.fixture
def run(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[dict[str, Any]]]:
    """Run the command with these arguments; the lines of its results."""
    monkeypatch.setattr(ablation, "Config", lambda **settings: Config(**SMALL, **settings))

    def main(*arguments: str) -> list[dict[str, Any]]:
        out = tmp_path / "ablation.jsonl"
        shared = ["--data-dir", str(image_folder), "--out", str(out), "--runs", str(tmp_path / "runs")]
        ablation.main([*shared, "--epochs", "1", "--device", "cpu", *arguments], SignalHandler())
        return [json.loads(line) for line in out.read_text().splitlines()]

    return main


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_changes_the_default_to_a_recipe_of_its_own(name: str) -> None:
    config = dataclasses.replace(Config(), **VARIANTS[name])
    config.check()
    same = [other for other, overrides in VARIANTS.items() if dataclasses.replace(Config(), **overrides) == config]
    assert same == [name]


def test_the_committed_results_are_of_the_variants_that_are_there() -> None:
    recorded = [row["overrides"] for row in read_rows(RESULTS / "cpu" / "ablation.jsonl")]
    assert recorded
    assert all(overrides in VARIANTS.values() for overrides in recorded)


def test_a_line_holds_the_figures_and_where_they_come_from(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    lines = [*run("--variants", "default", "no dead-code resets"), *run("--variants", "default", "--seeds", "1")[-1:]]
    names = [("default", 0), ("no dead-code resets", 0), ("default", 1)]
    assert [(line["variant"], line["seed"]) for line in lines] == names
    for line in lines:
        assert line["overrides"] == VARIANTS[line["variant"]]
        assert line["epochs"] == 1
        assert not line["diverged"]
        assert 1 <= line["perplexity"] <= line["codes_used"] + 1e-9 <= 4 + 1e-9
        assert min(line["train_mse"], line["val_mse"], line["test_mse"], line["minutes"]) > 0
        assert {"commit", "date", "versions", "device"} <= set(line)
        is_default = line["variant"] == "default"
        assert line["settings"]["restart_after"] == (Config.restart_after if is_default else 0)
        assert line["settings"]["unfreeze_encoder_at"] == (0 if is_default else 0.75)
        folder = tmp_path / "runs" / f"{line['variant'].replace(' ', '-')}-seed-{line['seed']}"
        metrics = json.loads((folder / "metrics.jsonl").read_text())
        for name in ("val_mse", "test_mse", "codes_used", "perplexity"):
            assert line[name] == pytest.approx(metrics[name])
    assert ablation_table(lines).count("± ") > 0


def test_what_is_finished_is_not_done_again(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run("--variants", "default")
    before = (tmp_path / "ablation.jsonl").read_text()
    train_whole, done = ablation.run_training, []
    monkeypatch.setattr(ablation, "run_training", lambda *run: (done.append(run[0]), train_whole(*run)))
    lines = run("--variants", "default", "no horizontal flips", "default")
    assert [config.flip for config in done] == [False]
    assert len(lines) == 2
    assert (tmp_path / "ablation.jsonl").read_text().startswith(before)
    monkeypatch.setattr(ablation, "load_images", None)  # would fail: it is not needed
    assert run("--variants", "default", "no horizontal flips") == lines
    with pytest.raises(UsageError, match=r"overrides {}, seed 0 with other settings \(epochs was 1, now 2\)"):
        run("--variants", "default", "--epochs", "2")


def test_a_variant_that_diverges_is_a_line_too(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def diverge(_config: Config, _signals: SignalHandler) -> None:
        raise DivergedError("a loss was not finite at step 2")

    monkeypatch.setattr(ablation, "run_training", diverge)
    (line,) = run("--variants", "no warm-up")
    assert line["diverged"]
    assert "test_mse" not in line
    assert "a loss was not finite at step 2" in capsys.readouterr().err
    assert "| no warm-up | 1, 1 diverged |" in ablation_table([line])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "no luck"], "--variants must be of 'default', .*, got 'no luck'"),
        (["--epochs", "0"], "--epochs must be above 0, got 0"),
        (["--seeds", "-1"], "--seed must be at least 0"),
        (["--limit", "0"], "--limit must be above 0, got 0"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)
    assert list(tmp_path.iterdir()) == []
