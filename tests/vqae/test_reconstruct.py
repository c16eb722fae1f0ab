"""The command that shows what a model makes of images."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tests.vqae.commands import Outcome
from vqae.data.image_folder import read_images

Command = Callable[..., Outcome]


def test_originals_are_plotted_above_reconstructions(
    command: Command, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    files = sorted((images / "test" / "colours").iterdir())[:20]
    best, out = finished_run / "best.pt", tmp_path / "made" / "out.png"
    outcome = command("vqae.reconstruct", "--checkpoint", best, *files, "--out", out, "--device", "cpu")
    assert (outcome.exit_code, outcome.out) == (0, f"20 images in {out}\n")
    with Image.open(out) as image:
        assert image.format == "PNG"
        assert image.size == (16 * 66 + 2, 4 * 66 + 2 + 40)
        assert image.info["Title"] == "originals above reconstructions by best.pt, trained on imagefolder"
        pixels = np.asarray(image.convert("RGB"))
    with Image.open(files[0]) as original:
        np.testing.assert_array_equal(pixels[42 : 42 + 64 : 2, 2 : 2 + 64 : 2], np.asarray(original))


def test_images_of_any_size(command: Command, finished_run: Path, tmp_path: Path) -> None:
    files = []
    for width, height in ((1, 1), (300, 200), (20, 31), (500, 1)):
        files.append(tmp_path / f"{width}x{height}.png")
        Image.new("RGB", (width, height), "red").save(files[-1])
    outcome = command("vqae.reconstruct", *files, "--checkpoint", finished_run / "last.pt", "--out", tmp_path / "o.png")
    assert outcome.exit_code == 0, outcome.err
    with Image.open(tmp_path / "o.png") as image:
        assert image.size[1] == 2 * 66 + 2 + 40


@pytest.mark.parametrize("image_size", [(32, 32), (64, 48), (7, 31)])
def test_images_are_scaled_and_cropped_to_the_centre(image_size: tuple[int, int], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    file = tmp_path / "image.png"
    for height, width in torch.randint(1, 200, (40, 2), generator=generator).tolist():
        Image.new("RGB", (width, height), (200, 200, 200)).save(file)
        (fitted,), _ = read_images([str(file)], image_size, skip_unreadable=False)
        assert tuple(fitted.shape) == (3, *image_size)
        assert (fitted == 200).all()  # no edge is filled up
    same = torch.randint(256, (3, *image_size), dtype=torch.uint8, generator=generator)
    Image.fromarray(same.permute(1, 2, 0).numpy()).save(file)
    assert torch.equal(read_images([str(file)], image_size, skip_unreadable=False)[0][0], same)


def test_bad_input_exits_with_2_and_writes_nothing(command: Command, finished_run: Path, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    best, out = finished_run / "best.pt", tmp_path / "out.png"
    for arguments, message in (
        ((tmp_path / "none.png", "--checkpoint", best), "none.png"),
        ((tmp_path / "notes.txt", "--checkpoint", best), "notes.txt is damaged, not an image"),
        ((tmp_path / "notes.txt", "--checkpoint", tmp_path / "notes.txt"), "notes.txt is not a checkpoint"),
        (("--checkpoint", best), "at least one image must be given, got none"),
        ((tmp_path / "none.png", "--checkpoint", best, "--device", "cuda:99"), "--device cuda:99 does not exist"),
    ):
        outcome = command("vqae.reconstruct", *arguments, "--out", out)
        assert (outcome.exit_code, outcome.out) == (2, ""), message
        assert message in outcome.err
        assert "Traceback" not in outcome.err
        assert not out.exists()


def test_out_must_be_a_png(command: Command, finished_run: Path, tmp_path: Path) -> None:
    out = tmp_path / "made" / "out.jpg"
    outcome = command("vqae.reconstruct", "--checkpoint", finished_run / "best.pt", "any.png", "--out", out)
    assert outcome.exit_code == 2
    assert f"--out must be a .png file, got {out}" in outcome.err
    assert not out.parent.exists()


def test_folders_stand_for_the_images_in_them(
    command: Command, finished_run: Path, images: Path, tmp_path: Path
) -> None:
    single = next((images / "train" / "colours").iterdir())
    (tmp_path / "mine" / "below").mkdir(parents=True)
    for name in ("b.png", "below/a.png", ".hidden.png"):
        shutil.copy(single, tmp_path / "mine" / name)
    given = ("vqae.reconstruct", images / "test", single, tmp_path / "mine", "--checkpoint", finished_run / "best.pt")
    folders, files = tmp_path / "folders.png", tmp_path / "files.png"
    assert command(*given, "--out", folders).out == f"35 images in {folders}\n"
    test = sorted((images / "test" / "colours").iterdir())
    outcome = command(given[0], *test, single, single, single, *given[-2:], "--out", files)
    assert outcome.exit_code == 0, outcome.err
    with Image.open(folders) as one, Image.open(files) as other:
        np.testing.assert_array_equal(np.asarray(one), np.asarray(other))
    assert command(*given, "--limit", 5, "--out", files).out == f"5 of 35 images in {files}\n"


def test_unreadable_files_of_a_folder(
    command: Command, finished_run: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder, out = tmp_path / "mine", tmp_path / "out.png"
    folder.mkdir()
    arguments = ("vqae.reconstruct", folder, "--checkpoint", finished_run / "best.pt", "--out", out)
    assert f"{folder} holds no images" in command(*arguments).err
    (folder / "notes.txt").write_text("no image")
    assert "notes.txt is damaged, not an image" in command(*arguments).err
    assert "none of the 1 files can be read as an image" in command(*arguments, "--skip-unreadable").err
    shutil.copy(next((images / "train" / "colours").iterdir()), folder)
    assert not out.exists()
    assert command(*arguments, "--skip-unreadable").out == f"1 images in {out}\n"
    assert f"skipped 1 of 2 files, which cannot be read: {folder / 'notes.txt'}" in caplog.text


def test_out_must_not_be_among_the_images(command: Command, finished_run: Path, images: Path, tmp_path: Path) -> None:
    file = shutil.copy(next((images / "train" / "colours").iterdir()), tmp_path / "1.png")
    before, best = file.read_bytes(), finished_run / "best.pt"
    for arguments, message in (
        ((file, "--out", file), f"--out must not be one of the images, got {file}"),
        ((tmp_path, "--out", tmp_path / "out.png"), f"--out must be outside {tmp_path}, where every file is read"),
        ((file, "--out", images / "test" / "out.png"), f"--out must be outside {images / 'test'}"),  # read by the run
    ):
        outcome = command("vqae.reconstruct", "--checkpoint", best, *arguments)
        assert (outcome.exit_code, outcome.out) == (2, "")
        assert message in outcome.err
    assert file.read_bytes() == before
    assert not list(tmp_path.glob("out*")) + list((images / "test").glob("out*"))
