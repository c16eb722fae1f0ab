"""Files that are whole or not there, and checkpoints that will not do."""

import errno
import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.vqae.commands import files_in
from vqae import VQAE
from vqae.config import Config
from vqae.model.vqae import build_model, model_from_checkpoint
from vqae.runtime.errors import UsageError
from vqae.training.checkpoint import atomic_write, load_checkpoint, save_checkpoint

CONFIG = Config(num_codes=16, code_dim=8, hidden_dims=(16,))


def saved_bytes(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def state() -> dict[str, Any]:
    """What best.pt holds of a model for images of 8 x 8."""
    torch.manual_seed(0)
    model = build_model(CONFIG, (8, 8)).state_dict()
    return {"config": CONFIG.to_dict(), "dataset": "synthetic", "image_size": [8, 8], "model": model}


@pytest.fixture(scope="module")
def whole(state: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """A checkpoint's bytes."""
    file = tmp_path_factory.mktemp("whole") / "best.pt"
    save_checkpoint(file, state)
    return file.read_bytes()


# -- writing


def test_atomic_write_creates_folders_and_replaces_files(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b" / "file"
    atomic_write(file, b"one")
    atomic_write(file, memoryview(b"two"))
    assert file.read_bytes() == b"two"
    assert files_in(tmp_path) == {"a", "a/b", "a/b/file"}


def test_files_respect_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        atomic_write(tmp_path / "file", b"one")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (errno.ENOSPC, r"no space left on the disk for .*file; existing files are kept \(the new one has 3 bytes\)"),
        (errno.EIO, r"file cannot be written: Input/output error"),
    ],
)
def test_failed_write_keeps_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, message: str) -> None:
    def fail(_descriptor: int) -> None:
        raise OSError(code, os.strerror(code))

    atomic_write(tmp_path / "file", b"old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UsageError, match=message):
        atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"old"
    assert files_in(tmp_path) == {"file"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk(tmp_path: Path) -> None:
    (tmp_path / ".file.part").symlink_to("/dev/full")
    with pytest.raises(UsageError, match="no space left on the disk"):
        atomic_write(tmp_path / "file", b"new")
    assert files_in(tmp_path) == set()


def test_temporary_file_of_a_killed_process_is_replaced(tmp_path: Path) -> None:
    (tmp_path / ".file.part").write_bytes(b"half of a very long")
    atomic_write(tmp_path / "file", b"new")
    assert (tmp_path / "file").read_bytes() == b"new"
    assert files_in(tmp_path) == {"file"}


def test_folder_that_cannot_be_created_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(UsageError, match=r"file/below cannot be written"):
        atomic_write(tmp_path / "file" / "below", b"new")


# -- reading


def test_round_trip_without_pickled_code(tmp_path: Path, state: dict[str, Any], whole: bytes) -> None:
    (tmp_path / "best.pt").write_bytes(whole)
    loaded = load_checkpoint(tmp_path / "best.pt")
    assert loaded["config"] == state["config"]
    assert all(torch.equal(loaded["model"][name], value) for name, value in state["model"].items())
    assert not any(name.startswith("module.") for name in loaded["model"])


def test_a_checkpoint_of_version_0_1(tmp_path: Path, state: dict[str, Any]) -> None:
    config = {name: value for name, value in state["config"].items() if name != "unfreeze_encoder_at"}
    config |= {"encoder_start": 0.75, "network_init": "pictures", "codebook_step": "share"}
    old = {"format": "vqae checkpoint 1", **state, "config": config, "pictures": [(51, 3, 8, 8, 7)]}
    torch.save(old, tmp_path / "last.pt")
    assert load_checkpoint(tmp_path / "last.pt")["images"] == [(51, 3, 8, 8, 7)]
    with pytest.warns(DeprecationWarning, match="is deprecated, use"):
        model = VQAE.load(tmp_path / "last.pt")
    assert torch.equal(model.quantizer.codebook, state["model"]["quantizer.codebook"])


@pytest.mark.parametrize("share", [0.0, 0.001, 0.1, 0.5, 0.9, 0.999])
def test_truncated_checkpoint(tmp_path: Path, whole: bytes, share: float) -> None:
    file = tmp_path / "short.pt"
    file.write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(UsageError, match=r"short\.pt is not a checkpoint, or it is truncated or damaged"):
        load_checkpoint(file)


class Foreign:
    """A class that no checkpoint may bring along."""


@pytest.mark.parametrize(
    "content",
    [
        b"not a checkpoint at all",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"PK\x03\x04" + bytes(100),
        bytes(1000),
        pickle.dumps({"format": "vqae checkpoint 1"}),
        pickle.dumps(Foreign()),
        saved_bytes(Foreign()),
        saved_bytes({"model": Foreign()}),
        saved_bytes(torch.zeros(3)),
        saved_bytes({"model": {"weight": torch.zeros(3)}}),
        saved_bytes({"format": "vqae checkpoint 2", "model": {}}),
        saved_bytes({"format": "vqae checkpoint 1"}),
        saved_bytes([1, 2, 3]),
    ],
)
def test_file_that_is_not_a_checkpoint(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "foreign.pt").write_bytes(content)
    with pytest.raises(UsageError, match=r"foreign\.pt is not a checkpoint"):
        load_checkpoint(tmp_path / "foreign.pt")


def test_random_bytes(tmp_path: Path, whole: bytes) -> None:
    generator = torch.Generator().manual_seed(0)
    file = tmp_path / "random.pt"
    for head in (b"", b"PK\x03\x04", whole[:200], b"\x80\x02", b"\x80\x02}q\x00"):
        for _ in range(20):
            noise = torch.randint(256, (300,), generator=generator, dtype=torch.uint8).numpy().tobytes()
            file.write_bytes(head + noise)
            with pytest.raises(UsageError, match="is not a checkpoint"):
                load_checkpoint(file)


def test_missing_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"none\.pt cannot be read: No such file"):
        load_checkpoint(tmp_path / "none.pt")
    with pytest.raises(UsageError, match="cannot be read: Is a directory"):
        load_checkpoint(tmp_path)


# -- models


def _with_setting(state: dict[str, Any], **settings: object) -> dict[str, Any]:
    return {**state, "config": {**state["config"], **settings}}


@pytest.mark.parametrize(
    "change",
    [
        lambda state: _with_setting(state, num_codes=17),
        lambda state: _with_setting(state, code_dim=9),
        lambda state: _with_setting(state, hidden_dims=[16, 16]),
        lambda state: {**state, "image_size": [8, 9]},
        lambda state: {**state, "model": {"weight": torch.zeros(3)}},
        lambda state: {**state, "model": {**state["model"], "pixel_mean": torch.zeros(2)}},
    ],
)
def test_weights_of_another_shape(state: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    with pytest.raises(UsageError, match="the checkpoint's weights do not fit the model: "):
        model_from_checkpoint(change(state))


def test_invalid_settings_in_a_checkpoint(state: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match="the checkpoint: --num-codes must be int"):
        model_from_checkpoint(_with_setting(state, num_codes="many"))
