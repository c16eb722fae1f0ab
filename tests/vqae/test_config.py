"""Settings: from flags, from files, and what is said of those that will not do."""

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vqae.commands import Outcome
from vqae.config import RECIPES, Config, find_device, flag
from vqae.model.vqae import build_model
from vqae.runtime.errors import UsageError
from vqae.train import parse

FIELDS = [field.name for field in dataclasses.fields(Config)]

# A value of every setting that is not its default.
OTHER: dict[str, Any] = {
    "out": "elsewhere",
    "dataset": "imagefolder",
    "data_dir": "images",
    "test_fraction": 0.5,
    "skip_unreadable": True,
    "image_size": 48,
    "limit": 100,
    "val_fraction": 0.25,
    "flip": False,
    "num_codes": 64,
    "num_quantizers": 4,
    "code_dim": 32,
    "hidden_dims": [8, 16],
    "network_init": "random",
    "embedding_norm": "batch",
    "codebook_init": "data",
    "restart_after": 0,
    "epochs": 3,
    "max_minutes": 1.5,
    "batch_size": 32,
    "lr": 0.01,
    "encoder_lr": 0.02,
    "unfreeze_encoder_at": 0.0,  # the only value with network_init="random"
    "momentum": 0.5,
    "weight_decay": 5e-4,
    "warmup": 0.25,
    "codebook_step": "plain",
    "codebook_lr": 3.0,
    "seed": 7,
    "device": "cpu",
    "amp": True,
    "compile": True,
    "cuda_graph": False,
    "checkpoint_minutes": 0.5,
}


def write(file: Path, values: object) -> Path:
    file.write_text(json.dumps(values))
    return file


@pytest.mark.parametrize("values", [{}, OTHER], ids=["defaults", "others"])
def test_round_trip_through_json(tmp_path: Path, values: dict[str, Any]) -> None:
    config = Config.from_dict(values, "the test")
    assert Config.read(write(tmp_path / "config.json", config.to_dict())) == config
    assert hash(config) == hash(Config.from_dict(json.loads(json.dumps(config.to_dict())), "the test"))


def test_other_values_cover_every_setting() -> None:
    assert list(OTHER) == FIELDS
    default, other = Config().to_dict(), Config.from_dict(OTHER, "the test").to_dict()
    assert [name for name in FIELDS if default[name] == other[name]] == ["unfreeze_encoder_at"]


def test_every_setting_is_a_flag() -> None:
    arguments = []
    for name, value in OTHER.items():
        if isinstance(value, bool):
            arguments.append(flag(name) if value else flag(f"no_{name}"))
        else:
            arguments += [flag(name), *map(str, value if isinstance(value, list) else [value])]
    assert parse(arguments).run == Config.from_dict(OTHER, "the test")


@pytest.mark.parametrize("module", ["vqae.train", "vqae.evaluate", "vqae.reconstruct"])
def test_help_shows_every_flag_and_exits_with_0(command: Callable[..., Outcome], module: str) -> None:
    outcome = command(module, "--help")
    assert outcome.exit_code == 0
    assert f"python -m {module}" in outcome.out
    shown = set(re.findall(r"--[a-z-]+", outcome.out))
    expected = {
        "vqae.train": {*map(flag, FIELDS), "--config", "--recipe", "--resume", "--overwrite"},
        "vqae.evaluate": {
            "--checkpoint",
            "--dataset",
            "--data-dir",
            "--split",
            "--batch-size",
            "--device",
            "--skip-unreadable",
        },
        "vqae.reconstruct": {"--checkpoint", "--out", "--device", "--limit", "--skip-unreadable"},
    }[module]
    assert expected <= shown


# -- --config


def test_flags_override_the_config_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.json", {"num_codes": 64, "lr": 1, "out": "there", "data_dir": None})
    run = parse(["--config", str(file), "--lr", "0.5"]).run
    assert run == Config(num_codes=64, lr=0.5, out=Path("there"))


def test_a_flag_with_the_default_value_overrides_the_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.json", {"num_codes": 64, "flip": False})
    run = parse(["--config", str(file), "--num-codes", "512", "--flip"]).run
    assert run == Config()


def test_resume_uses_the_settings_of_a_run_that_was_moved(tmp_path: Path) -> None:
    write(tmp_path / "config.json", {**Config(num_codes=64).to_dict(), "out": "where/it/was"})
    for arguments in (["--out", str(tmp_path)], [f"--out={tmp_path}"]):
        assert parse([*arguments, "--resume"]).run == Config(num_codes=64, out=tmp_path)
        assert parse([*arguments, "--resume", "--num-codes", "8"]).run.num_codes == 8
        assert parse(arguments).run == Config(out=tmp_path)


@pytest.mark.parametrize("joint", [" ", "="])
def test_flags_of_version_0_1_work_with_a_warning(joint: str) -> None:
    old = {"--encoder-start": "0.5", "--network-init": "pictures", "--codebook-step": "share"}
    arguments = [part for item in old.items() for part in joint.join(item).split()]
    with pytest.warns(DeprecationWarning, match="is deprecated, use") as warned:
        run = parse([*arguments, "--out", "share"]).run
    assert run == Config(
        unfreeze_encoder_at=0.5, network_init="pca", codebook_step="count_normalised", out=Path("share")
    )
    assert len(warned) == 3


@pytest.mark.parametrize("resume", [False, True])
def test_options_and_values_of_version_0_1_load_with_a_warning(tmp_path: Path, resume: bool) -> None:
    old = {"encoder_start": 0.5, "network_init": "pictures", "codebook_step": "share", "num_codes": 64}
    file = write(tmp_path / "config.json", old)
    with pytest.warns(DeprecationWarning, match="is deprecated, use") as warned:
        run = parse(["--out", str(tmp_path), "--resume"] if resume else ["--config", str(file)]).run
    new = {"unfreeze_encoder_at": 0.5, "network_init": "pca", "codebook_step": "count_normalised", "num_codes": 64}
    assert {name: run.to_dict()[name] for name in new} == new
    messages = [str(warning.message) for warning in warned]
    for renamed in ("unfreeze_encoder_at = 0.5", "network_init = 'pca'", "codebook_step = 'count_normalised'"):
        assert sum(message.endswith(f"is deprecated, use {renamed}") for message in messages) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"num_codes": 64, "colour": 1, "bright": 2}', "holds unknown settings: bright, colour"),
        ('{"num_codes": "many"}', '--num-codes must be int, got "many"'),
        ('{"num_codes": 3.5}', "--num-codes must be int, got 3.5"),
        ('{"num_codes": true}', "--num-codes must be int, got true"),
        ('{"num_codes": null}', "--num-codes must be int, got null"),
        ('{"lr": "0.1"}', '--lr must be float, got "0.1"'),
        ('{"lr": true}', "--lr must be float, got true"),
        ('{"flip": 1}', "--flip must be bool, got 1"),
        ('{"hidden_dims": 16}', r"--hidden-dims must be tuple\[int, ...\], got 16"),
        ('{"hidden_dims": "16"}', r'--hidden-dims must be tuple\[int, ...\], got "16"'),
        ('{"hidden_dims": [16, "wide"]}', '--hidden-dims must be int, got "wide"'),
        ('{"limit": "all"}', '--limit must be int, got "all"'),
        ('{"out": null}', "--out must be Path, got null"),
        ('{"out": 3}', "--out must be Path, got 3"),
        ('{"dataset": "mnist"}', "--dataset must be one of auto, cifar10, imagefolder, synthetic, got 'mnist'"),
        ('{"dataset": ["auto"]}', "--dataset must be one of"),
        ('{"lr": NaN}', "--lr must be above 0, got nan"),
        ('{"epochs": 0}', "--epochs must be above 0, got 0"),
        ("[1, 2]", "must hold an object of settings, got list"),
        ('{"lr": 0.1', "is not JSON"),
        ("", "is not JSON"),
    ],
)
def test_errors_name_the_file_the_setting_and_the_value(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "bad.json"
    file.write_text(content)
    with pytest.raises(UsageError, match=message) as error:
        parse(["--config", str(file)])
    assert str(file) in str(error.value)


def test_missing_and_binary_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.json cannot be read: No such file"):
        parse(["--config", str(tmp_path / "none.json")])
    (tmp_path / "bytes.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UsageError, match=r"bytes\.json is not JSON"):
        parse(["--config", str(tmp_path / "bytes.json")])


# -- --recipe


def test_the_plain_recipe() -> None:
    plain = parse(["--recipe", "plain", "--num-codes", "64"]).run
    assert plain.lr == plain.encoder_lr == plain.codebook_lr == 0.1
    assert (plain.network_init, plain.unfreeze_encoder_at) == ("random", 0)
    assert (plain.codebook_init, plain.codebook_step, plain.restart_after) == ("normal", "plain", 0)
    assert (plain.embedding_norm, plain.momentum, plain.warmup, plain.flip) == ("none", 0.9, 0, False)
    assert plain == dataclasses.replace(Config(num_codes=64), **RECIPES["plain"])


def test_flags_override_a_recipe() -> None:
    default = str(Config.restart_after)
    for arguments in (["--restart-after", default, "--recipe", "plain"], ["--recipe", "plain", "--lr", "0.05"]):
        given = {"restart_after": int(default)} if "--restart-after" in arguments else {"lr": 0.05}
        assert parse(arguments).run == dataclasses.replace(Config(), **{**RECIPES["plain"], **given})


def test_a_recipe_overrides_a_file(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.json", {"num_codes": 64, "lr": 1.0, "out": "there"})
    run = parse(["--config", str(file), "--recipe", "plain"]).run
    assert run == dataclasses.replace(Config(num_codes=64, out=Path("there")), **RECIPES["plain"])


def test_config_json_holds_the_settings_of_the_recipe(tmp_path: Path) -> None:
    run = parse(["--recipe", "plain", "--out", str(tmp_path), "--lr", "0.2"]).run
    write(tmp_path / "config.json", run.to_dict())
    assert parse(["--out", str(tmp_path), "--resume"]).run == run
    assert parse(["--out", str(tmp_path), "--resume", "--recipe", "plain", "--lr", "0.2"]).run == run


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_name_settings_and_change_some(name: str) -> None:
    run = dataclasses.replace(Config(), **RECIPES[name])
    run.check()
    assert run != Config()
    assert Config.from_dict(run.to_dict(), "the test") == run


# -- values out of range

OUT_OF_RANGE = [
    ("--num-codes", "0"),
    ("--code-dim", "-1"),
    ("--epochs", "0"),
    ("--batch-size", "1"),
    ("--lr", "0"),
    ("--lr", "nan"),
    ("--lr", "inf"),
    ("--encoder-lr", "0"),
    ("--unfreeze-encoder-at", "1"),
    ("--unfreeze-encoder-at", "-0.1"),
    ("--codebook-lr", "-0.1"),
    ("--codebook-lr", "2"),
    ("--image-size", "0"),
    ("--limit", "0"),
    ("--max-minutes", "0"),
    ("--max-minutes", "nan"),
    ("--momentum", "1"),
    ("--momentum", "-0.5"),
    ("--weight-decay", "-1"),
    ("--restart-after", "-1"),
    ("--warmup", "1"),
    ("--test-fraction", "0"),
    ("--test-fraction", "1"),
    ("--val-fraction", "1"),
    ("--val-fraction", "-0.1"),
    ("--checkpoint-minutes", "-1"),
    ("--hidden-dims", "0"),
    ("--seed", "-1"),
    ("--seed", str(2**62)),
]


@pytest.mark.parametrize(("name", "value"), OUT_OF_RANGE)
def test_a_value_out_of_range_is_named(name: str, value: str) -> None:
    with pytest.raises(UsageError, match=rf"{name} .*must be .*got {re.escape(value)}"):
        parse([name, value])


def test_a_random_encoder_must_not_be_frozen() -> None:
    with pytest.raises(UsageError, match=r"--unfreeze-encoder-at must be 0 with --network-init random, .*got 0\.25"):
        parse(["--network-init", "random", "--unfreeze-encoder-at", "0.25"])
    parse(["--network-init", "random", "--unfreeze-encoder-at", "0"])


def test_limits_of_the_ranges_are_accepted() -> None:
    parse(["--num-codes", "1", "--code-dim", "1", "--batch-size", "2", "--limit", "1", "--seed", str(2**62 - 1)])
    parse(["--momentum", "0", "--warmup", "0", "--val-fraction", "0", "--restart-after", "0", "--hidden-dims"])
    parse(["--codebook-step", "plain", "--codebook-lr", "2"])


@pytest.mark.parametrize(("name", "value"), [("--num-codes", "many"), ("--lr", "fast"), ("--dataset", "mnist")])
def test_a_flag_of_the_wrong_type_exits_with_2(command: Callable[..., Outcome], name: str, value: str) -> None:
    outcome = command("vqae.train", name, value)
    assert outcome.exit_code == 2
    assert name in outcome.err
    assert value in outcome.err
    assert "Traceback" not in outcome.err


def test_resume_and_overwrite_exclude_each_other() -> None:
    with pytest.raises(UsageError, match="--resume and --overwrite exclude each other"):
        parse(["--resume", "--overwrite"])


# -- devices


def test_available_devices() -> None:
    assert find_device("cpu") == torch.device("cpu")
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("name", ["gpu", "", "cuda:", "cuda:-1", "cuda:x", "cuda:00", "cpu:1", "mps", "meta"])
def test_invalid_device_name(name: str) -> None:
    with pytest.raises(UsageError, match=f"--device must be auto, cpu, cuda or cuda:N, got '{name}'"):
        find_device(name)


def test_missing_device() -> None:
    with pytest.raises(
        UsageError, match=rf"--device cuda:99 does not exist: .* {torch.cuda.device_count()} CUDA devices"
    ):
        find_device("cuda:99")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_gpu() -> None:
    with pytest.raises(UsageError, match="--device cuda does not exist: this machine has 0 CUDA devices"):
        find_device("cuda")


# -- settings in other units


def test_settings_of_a_file_are_checked_together_with_the_flags(tmp_path: Path) -> None:
    (tmp_path / "some.json").write_text('{"network_init": "random", "unfreeze_encoder_at": 0.5}')
    given = ["--config", str(tmp_path / "some.json")]
    assert parse([*given, "--unfreeze-encoder-at", "0"]).run.network_init == "random"
    with pytest.raises(UsageError, match="--unfreeze-encoder-at must be 0 with --network-init random"):
        parse(given)


@pytest.mark.parametrize(
    ("images", "batch_size", "steps"), [(15_360, 256, 60), (15_360, 1000, 16), (1, 256, 1), (0, 256, 0)]
)
def test_restart_after_is_counted_in_images(images: int, batch_size: int, steps: int) -> None:
    config = Config(num_codes=4, code_dim=4, restart_after=images, batch_size=batch_size)
    assert config.restart_steps == build_model(config, (8, 8)).quantizer.restart_after == steps
