"""The model beside K-means: what is written, that nothing is done twice, and what is refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import rate_distortion
from benchmarks.tables.learning import rate_distortion_table
from vqae.config import Config
from vqae.data.load import load_images
from vqae.runtime.errors import UsageError
from vqae.runtime.process import SignalHandler

TINY = ("--code-dim", "8", "--hidden-dims", "8", "--batch-size", "8", "--epochs", "1", "--device", "cpu")


@pytest.fixture
def run(image_folder: Path, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run the command with these arguments; the lines of its results."""

    def main(*arguments: str) -> list[dict[str, Any]]:
        shared = ["--data-dir", str(image_folder), "--out", str(tmp_path), *TINY]
        rate_distortion.main([*shared, *arguments], SignalHandler())
        return [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]

    return main


def test_both_methods_for_every_k_and_seed(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = run("--num-codes", "1", "4", "--seeds", "0", "1", "--lr", "0.1")
    assert [(line["seed"], line["num_codes"], line["method"]) for line in lines] == [
        (seed, num_codes, method) for seed in (0, 1) for num_codes in (1, 4) for method in ("kmeans", "model")
    ]
    for line in lines:
        assert (line["num_train"], line["num_test"]) == (48, 16)
        assert line["minutes"] > 0
        assert {"device", "versions", "commit", "date"} <= set(line)
        for split in ("train", "test"):
            assert 0 < line[f"{split}_mse"] < 1
            assert 1 <= line[f"{split}_perplexity"] <= line[f"{split}_codes_used"] + 1e-9 <= line["num_codes"] + 1e-9
    models = [line for line in lines if line["method"] == "model"]
    assert all(line["settings"]["lr"] == 0.1 and line["settings"]["code_dim"] == 8 for line in models)

    by_name = {(line["method"], line["num_codes"], line["seed"]): line["train_mse"] for line in lines}
    for seed in (0, 1):
        assert by_name["kmeans", 4, seed] < by_name["kmeans", 1, seed]
        for num_codes in (1, 4):  # the bound, which holds since both are measured on the same images
            assert by_name["kmeans", num_codes, seed] <= by_name["model", num_codes, seed]
    assert "| K-means |" in capsys.readouterr().out


def test_one_centroid_is_the_mean_image(
    run: Callable[..., list[dict[str, Any]]], image_folder: Path, tmp_path: Path
) -> None:
    (line,) = run("--num-codes", "1", "--seeds", "0", "--methods", "kmeans")
    images = load_images("imagefolder", image_folder)
    train, test = (part.double() / 255 for part in (images.train, images.test))
    for split, part in (("train", train), ("test", test)):
        assert line[f"{split}_mse"] == pytest.approx((part - train.mean(dim=0)).square().mean().item(), rel=1e-5)
        assert (line[f"{split}_perplexity"], line[f"{split}_codes_used"]) == (1, 1)


def test_several_codes_per_image(run: Callable[..., list[dict[str, Any]]], tmp_path: Path) -> None:
    lines = run("--num-codes", "3", "--num-quantizers", "1", "2", "--seeds", "0")
    assert [(line["num_quantizers"], line["method"]) for line in lines] == [
        (1, "kmeans"), (1, "model"), (2, "kmeans"), (2, "model"),
    ]  # fmt: skip
    by_name = {(line["num_quantizers"], line["method"]): line for line in lines}
    assert by_name[2, "kmeans"]["train_mse"] < by_name[1, "kmeans"]["train_mse"]
    assert by_name[2, "model"]["settings"]["num_quantizers"] == 2
    assert by_name[2, "kmeans"]["train_codes_used"] == 6
    assert 3 < by_name[2, "model"]["train_codes_used"] + 1 <= 7
    table = rate_distortion_table(lines)
    assert "| 2 × 3 | 3.17 | K-means |" in table
    assert "| 2 × 3 | 3.17 | model |" in table


def test_it_goes_on_where_it_stopped(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    train_whole = rate_distortion.run_training

    def stop(config: Config, signals: SignalHandler) -> None:
        if config.num_codes == 3:
            raise KeyboardInterrupt
        train_whole(config, signals)

    monkeypatch.setattr(rate_distortion, "run_training", stop)
    arguments = ("--num-codes", "2", "3", "--seeds", "0")
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    before = (tmp_path / "results.jsonl").read_text().splitlines()
    assert [json.loads(line)["method"] for line in before] == ["kmeans", "model", "kmeans"]

    done = []
    monkeypatch.setattr(
        rate_distortion,
        "run_training",
        lambda *run: (done.append(run[0].num_codes), train_whole(*run)),
    )
    monkeypatch.setattr(rate_distortion, "fit_kmeans", None)  # would fail
    assert len(run(*arguments)) == 4
    assert done == [3]
    assert (tmp_path / "results.jsonl").read_text().splitlines()[:3] == before

    monkeypatch.setattr(rate_distortion, "load_images", None)
    assert len(run(*arguments)) == 4  # nothing is left, so no images are read


def test_results_of_other_settings_are_refused(run: Callable[..., list[dict[str, Any]]]) -> None:
    arguments = ("--num-codes", "2", "--seeds", "0")
    run(*arguments, "--lr", "0.3")
    with pytest.raises(
        UsageError,
        match=r"method model, num_codes 2, num_quantizers 1, seed 0 with other settings \(lr was 0.3, now 0.2\)",
    ):
        run(*arguments, "--lr", "0.2")
    with pytest.raises(UsageError, match=r"method kmeans, .* \(starts was 3, now 1\)"):
        run(*arguments, "--starts", "1")


def test_the_limit_holds_for_both(run: Callable[..., list[dict[str, Any]]]) -> None:
    lines = run("--num-codes", "2", "--seeds", "0", "--limit", "20")
    assert [line["num_train"] for line in lines] == [20, 20]


def test_the_plain_recipe_goes_to_the_runs(run: Callable[..., list[dict[str, Any]]]) -> None:
    (line,) = run("--num-codes", "2", "--seeds", "0", "--methods", "model", "--recipe", "plain", "--max-minutes", "9")
    settings = line["settings"]
    assert (settings["restart_after"], settings["lr"], settings["max_minutes"]) == (0, 0.1, 9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--num-codes", "0"], "--num-codes must be at least 1, got"),
        (["--num-quantizers", "0"], "--num-quantizers must be at least 1, got"),
        (["--seeds", "-1"], "--seeds must be at least 0, got"),
        (["--starts", "0"], "--starts must be at least 1, got 0"),
        (["--rounds", "-1"], "--rounds must be at least 0, got -1"),
        (["--seed", "3"], "--seed is set for each run"),
        (["--overwrite"], "--overwrite is set for each run"),
        (["--lr", "-1"], "--lr must be above 0, got -1"),
        (["--num-codes", "49"], "--num-codes must be at most 48, the training images, got 49"),
    ],
)
def test_bad_input_is_refused_before_anything_is_done(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, arguments: list[str], message: str
) -> None:
    with pytest.raises(UsageError, match=message):
        run(*arguments)
    assert list(tmp_path.iterdir()) == []


def test_a_flag_that_nobody_knows(run: Callable[..., list[dict[str, Any]]], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        run("--colour", "3")
    assert exit_info.value.code == 2
    assert "--colour" in capsys.readouterr().err


def test_the_images_of_a_config_file_are_the_default(tmp_path: Path) -> None:
    file = tmp_path / "some.json"
    file.write_text(json.dumps({"dataset": "imagefolder", "data_dir": "some/images"}))
    _, config = rate_distortion.parse_options(["--config", str(file)])
    assert (config.dataset, config.data_dir) == ("imagefolder", Path("some/images"))
    _, config = rate_distortion.parse_options(["--config", str(file), "--dataset", "cifar10", "--data-dir", "others"])
    assert (config.dataset, config.data_dir) == ("cifar10", Path("others"))


def test_kmeans_sees_pixels_in_0_to_1(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def fit(x: torch.Tensor, num_codes: int, **_options: int) -> torch.Tensor:
        seen.append(x.clone())
        return x[:num_codes].clone()

    monkeypatch.setattr(rate_distortion, "fit_kmeans", fit)
    arguments = ["--data-dir", str(image_folder), "--out", str(tmp_path), "--methods", "kmeans", "--num-codes", "2"]
    rate_distortion.main([*arguments, "--seeds", "0", "--device", "cpu"], SignalHandler())
    (x,) = seen
    assert x.shape == (48, 3 * 8 * 8)
    assert torch.equal(x, load_images("imagefolder", image_folder).train.flatten(1).float() / 255)
