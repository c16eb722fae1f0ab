"""Folders of images: what is read, in which order, and what is said of a folder that will not do."""

import contextlib
import errno
import os
import signal
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vqae.data.image_folder import (
    BACKGROUND,
    check_outside,
    list_files,
    read_folders,
    read_image_folder,
    read_images,
    split_files,
)
from vqae.runtime.errors import UsageError

REAL_IMAGES = Path(__file__).parents[4] / "shared" / "data" / "cifar10-jpeg.tar.xz"


def _save(path: Path, image: Image.Image | None = None, **options: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (Image.new("RGB", (8, 6), "red") if image is None else image).save(path, **options)
    return path


def read_one(path: Path) -> torch.Tensor:
    images, _ = read_images([str(path)], None, skip_unreadable=False)
    return images[0]


def _noise(height: int, width: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two red images of 8 x 6 in each split."""
    for split in ("train", "test"):
        _save(tmp_path / split / "cats" / "1.png")
        _save(tmp_path / split / "dogs" / "1.png")
    return tmp_path


def test_reads_in_sorted_order(tmp_path: Path) -> None:
    names = ["b/2.png", "a/10.png", "b/1.png", "a/9.bmp"]
    for seed, name in enumerate(names):
        _save(tmp_path / "train" / name, _noise(6, 8, seed))
    (images,) = read_image_folder(tmp_path, ["train"], None)
    expected = [np.asarray(_noise(6, 8, names.index(name))) for name in sorted(names)]
    assert images.shape == (4, 3, 6, 8)
    assert images.dtype == torch.uint8
    assert images.is_contiguous()
    assert torch.equal(images.permute(0, 2, 3, 1), torch.from_numpy(np.stack(expected)))


def test_reads_only_the_split_that_is_asked_for(tmp_path: Path) -> None:
    _save(tmp_path / "test" / "cats" / "1.png")
    (images,) = read_image_folder(tmp_path, ["test"], None)
    assert images.shape == (1, 3, 6, 8)
    with pytest.raises(UsageError, match=r"must hold the folder train/"):
        read_image_folder(tmp_path, ["train", "test"], None)


def test_hidden_files_and_folders_are_left_out(folder: Path) -> None:
    (folder / "train" / ".DS_Store").write_bytes(b"no image")
    (folder / "train" / "cats" / ".DS_Store").write_bytes(b"no image")
    (folder / "train" / ".cache").mkdir()
    (folder / "train" / "cats" / ".thumbnails").mkdir()
    (folder / "train" / "cats" / ".thumbnails" / "1.db").write_bytes(b"no image")
    (images,) = read_image_folder(folder, ["train"], None)
    assert len(images) == 2


def test_data_dir_may_itself_be_hidden(tmp_path: Path) -> None:
    _save(tmp_path / ".images" / "test" / "cats" / "1.png")
    (images,) = read_image_folder(tmp_path / ".images", ["test"], None)
    assert len(images) == 1


def _transparent_palette() -> Image.Image:
    image = Image.new("P", (8, 6), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    return image


@pytest.mark.parametrize(
    ("image", "options", "expected"),
    [
        (Image.new("L", (8, 6), 77), {}, (77, 77, 77)),
        (Image.new("1", (8, 6), 1), {}, (255, 255, 255)),
        (Image.new("LA", (8, 6), (77, 51)), {}, (219, 219, 219)),  # a fifth of 77, the rest white
        (Image.new("RGBA", (8, 6), (200, 100, 50, 51)), {}, (244, 224, 214)),
        (Image.new("RGBA", (8, 6), (200, 100, 50, 255)), {}, (200, 100, 50)),
        (Image.new("RGBA", (8, 6), (200, 100, 50, 0)), {}, BACKGROUND),
        (Image.new("RGB", (8, 6), (200, 100, 50)), {"transparency": (200, 100, 50)}, BACKGROUND),
        (_transparent_palette(), {}, (200, 100, 50)),
        (_transparent_palette(), {"transparency": b"\x00\x33"}, (244, 224, 214)),
        (Image.fromarray(np.full((6, 8), 0x4D80, dtype=np.uint16)), {}, (77, 77, 77)),
    ],
    ids=[
        *("grey", "black and white", "grey with alpha", "RGBA", "opaque", "invisible", "transparent colour"),
        *("palette", "transparent palette", "16-bit grey"),
    ],
)
def test_every_kind_of_image_becomes_rgb(
    image: Image.Image, options: dict[str, object], expected: tuple[int, int, int], tmp_path: Path
) -> None:
    _save(tmp_path / "test" / "cats" / "1.png", image, **options)
    (images,) = read_image_folder(tmp_path, ["test"], None)
    assert images.shape == (1, 3, 6, 8)
    assert torch.equal(images[0], torch.tensor(expected, dtype=torch.uint8)[:, None, None].expand(3, 6, 8))


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp"])
def test_exif_rotation_is_applied(suffix: str, tmp_path: Path) -> None:
    upright = np.zeros((16, 24, 3), dtype=np.uint8)
    upright[:8] = 255  # white above black
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: the top of the scene is at the left of the stored image
    path = _save(tmp_path / f"1.{suffix}", Image.fromarray(np.rot90(upright).copy()), exif=exif, quality=95)
    image = read_one(path)
    assert image.shape == (3, 16, 24)
    assert image[:, :7].min() > 200
    assert image[:, 9:].max() < 50


def test_damaged_exif_is_ignored(tmp_path: Path) -> None:
    path = _save(tmp_path / "1.png", _noise(5, 7), exif=b"Exif\x00\x00no TIFF header")
    assert read_one(path).shape == (3, 5, 7)


def test_image_size_cuts_out_the_centre(tmp_path: Path) -> None:
    wide = np.zeros((8, 24, 3), dtype=np.uint8)
    wide[:, 4:20] = [200, 100, 50]  # 8 to 16 remains; antialiasing looks a little further
    _save(tmp_path / "test" / "cats" / "wide.png", Image.fromarray(wide))
    _save(tmp_path / "test" / "cats" / "tall.png", Image.fromarray(wide.transpose(1, 0, 2)))
    (images,) = read_image_folder(tmp_path, ["test"], 4)
    assert images.shape == (2, 3, 4, 4)
    assert torch.equal(images, torch.tensor([200, 100, 50], dtype=torch.uint8)[:, None, None].expand(2, 3, 4, 4))


def test_image_size_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), dtype=np.uint8)
    stripes[:, ::2] = 255
    _save(tmp_path / "test" / "cats" / "1.png", Image.fromarray(stripes))
    (images,) = read_image_folder(tmp_path, ["test"], 8)
    assert images[..., 1:-1].float().sub(127.5).abs().max() < 8  # without antialiasing 0 or 255


def test_several_sizes_name_two_files(folder: Path) -> None:
    odd = _save(folder / "train" / "dogs" / "2.png", _noise(5, 7))
    first = folder / "train" / "cats" / "1.png"
    with pytest.raises(UsageError, match=rf"--image-size is not given: {first} is 8 x 6, {odd} is 7 x 5"):
        read_image_folder(folder, ["train", "test"], None)
    train, test = read_image_folder(folder, ["train", "test"], 4)
    assert (train.shape, test.shape) == ((3, 3, 4, 4), (2, 3, 4, 4))


def test_splits_of_different_sizes(folder: Path) -> None:
    for name in ("cats", "dogs"):
        _save(folder / "test" / name / "1.png", _noise(5, 7))
    with pytest.raises(UsageError, match=r"train.cats.1\.png is 8 x 6, .*test.cats.1\.png is 7 x 5"):
        read_image_folder(folder, ["train", "test"], None)


# -- flat folders


@pytest.fixture
def flat(tmp_path: Path) -> Path:
    """Ten images of noise, some in folders."""
    for index in range(10):
        _save(tmp_path / ("" if index % 2 else f"folder {index}") / f"{index}.png", _noise(6, 8, index))
    (tmp_path / ".DS_Store").write_bytes(b"no image")
    return tmp_path


def _rows(images: torch.Tensor) -> set[bytes]:
    return {image.numpy().tobytes() for image in images}


@pytest.mark.parametrize(("test_fraction", "num_test"), [(0.1, 1), (0.26, 3), (0.001, 1), (0.999, 9)])
def test_a_flat_folder_is_split_by_seed(flat: Path, test_fraction: float, num_test: int) -> None:
    def read(*splits: str, seed: int = 0) -> list[torch.Tensor]:
        return read_image_folder(flat, splits, None, test_fraction=test_fraction, seed=seed)

    train, test = read("train", "test")
    assert (len(train), len(test)) == (10 - num_test, num_test)
    assert len(_rows(train) | _rows(test)) == 10
    assert torch.equal(read("test")[0], test)
    assert torch.equal(read("train")[0], train)
    assert len({frozenset(_rows(read("test", seed=seed)[0])) for seed in range(8)}) > 1


def test_the_split_does_not_depend_on_where_the_folder_is(flat: Path, tmp_path: Path) -> None:
    def names(folder: Path) -> list[str]:
        files = [folder / f"{index}.png" for index in range(100)]
        return [Path(file).name for file in split_files(folder, files, 0.2, 3)["test"]]

    assert names(tmp_path / "here") == names(tmp_path / "there")
    assert names(tmp_path)[:4] == ["5.png", "8.png", "11.png", "12.png"]  # on every machine


def test_most_images_keep_their_split_when_others_are_added(tmp_path: Path) -> None:
    files = [tmp_path / f"{index}.png" for index in range(220)]
    before, after = (set(split_files(tmp_path, files[:num], 0.2, 0)["test"]) for num in (200, 220))
    assert len(before - after) <= 4


def test_a_flat_folder_needs_two_images(tmp_path: Path) -> None:
    _save(tmp_path / "1.png")
    with pytest.raises(UsageError, match="must hold at least 2 images to be split into train and test, got 1"):
        read_image_folder(tmp_path, ["train", "test"], None)


def test_hidden_files_are_not_listed(flat: Path) -> None:
    _save(flat / ".cache" / "1.png")
    assert len(list_files(flat)) == 10


# -- files that cannot be read


def test_unreadable_files_are_skipped_and_counted(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = read_image_folder(folder, ["train", "test"], None)
    (folder / "train" / "cats" / "0.jpg").write_bytes(b"\xff\xd8\xff\xe0 half a header")
    (folder / "train" / "dogs" / "notes.txt").write_text("notes")
    images = read_image_folder(folder, ["train", "test"], None, skip_unreadable=True)
    assert all(torch.equal(one, other) for one, other in zip(images, expected, strict=True))
    assert [record.getMessage() for record in caplog.records] == [
        f"skipped 2 of 6 files, which cannot be read: {folder / 'train' / 'cats' / '0.jpg'} ..."
    ]


def test_a_split_without_a_readable_image_is_an_error(folder: Path) -> None:
    for name in ("cats", "dogs"):
        (folder / "test" / name / "1.png").write_bytes(b"")
    with pytest.raises(UsageError, match=r"none of the test images of .* can be read"):
        read_image_folder(folder, ["train", "test"], None, skip_unreadable=True)


def test_skipping_does_not_hide_several_sizes(folder: Path) -> None:
    _save(folder / "train" / "dogs" / "2.png", _noise(5, 7))
    with pytest.raises(UsageError, match="the images differ in size"):
        read_image_folder(folder, ["train"], None, skip_unreadable=True)


def _remove(path: Path) -> None:
    for below in path.iterdir():
        _remove(below) if below.is_dir() else below.unlink()
    path.rmdir()


def _empty(path: Path) -> None:
    _remove(path)
    path.mkdir()


@pytest.mark.parametrize(
    ("spoil", "name", "message"),
    [
        (_remove, "", r"must be a folder, but .* does not exist"),
        (_empty, "", r"must hold the folder train/"),
        (_remove, "train", r"must hold the folder train/"),
        (_remove, "test", r"must hold the folder test/"),
        (_empty, "train", r"train is empty"),
        (_empty, "test/dogs", r"dogs is empty"),
    ],
)
def test_missing_and_empty_folders(spoil: Callable[[Path], None], name: str, message: str, folder: Path) -> None:
    spoil(folder / name)
    with pytest.raises(UsageError, match=message):
        read_image_folder(folder, ["train", "test"], None)


def test_data_dir_that_is_a_file(tmp_path: Path) -> None:
    file = _save(tmp_path / "1.png")
    with pytest.raises(UsageError, match=r"must be a folder, but .* is a file"):
        read_image_folder(file, ["train", "test"], None)


def test_image_outside_a_class(folder: Path) -> None:
    stray = _save(folder / "train" / "stray.png")
    with pytest.raises(UsageError, match=rf"{stray} is not in the folder of a class"):
        read_image_folder(folder, ["train"], None)


@pytest.mark.parametrize("name", ["notes.txt", "2.jpg", "nothing"])
@pytest.mark.parametrize("content", [b"", b"these are notes", b"\xff\xd8\xff\xe0 half a header"])
def test_file_that_is_not_an_image_is_named(name: str, content: bytes, folder: Path) -> None:
    path = folder / "train" / "dogs" / name
    path.write_bytes(content)
    with pytest.raises(UsageError, match=rf"{path} is damaged, not an image"):
        read_image_folder(folder, ["train", "test"], None)


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "webp"])
def test_truncated_image_is_named(suffix: str, tmp_path: Path) -> None:
    path = _save(tmp_path / "test" / "cats" / f"1.{suffix}", _noise(64, 64))
    content = path.read_bytes()
    for num_bytes in (1, 20, 100, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:num_bytes])
        with pytest.raises(UsageError, match=rf"{path} is damaged, not an image"):
            read_image_folder(tmp_path, ["test"], None)


def test_broken_link_is_named(folder: Path) -> None:
    link = folder / "train" / "dogs" / "2.png"
    link.symlink_to(folder / "gone.png")
    with pytest.raises(UsageError, match=rf"{link} .*No such file"):
        read_image_folder(folder, ["train"], None)


def test_image_of_unknown_range(tmp_path: Path) -> None:
    path = _save(tmp_path / "test" / "cats" / "1.tif", Image.fromarray(np.ones((4, 4), dtype=np.float32)))
    with pytest.raises(UsageError, match=rf"{path} .*mode F"):
        read_image_folder(tmp_path, ["test"], None)


def test_decompression_bomb_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(UsageError, match=r"1\.png .*exceeds limit"):
        read_image_folder(folder, ["train"], None)


def test_one_image(tmp_path: Path) -> None:
    path = _save(tmp_path / "1.png", _noise(5, 7))
    image = read_one(path)
    assert image.dtype == torch.uint8
    assert torch.equal(image.permute(1, 2, 0), torch.from_numpy(np.array(_noise(5, 7))))
    for no_image in (tmp_path, tmp_path / "2.png"):
        with pytest.raises(UsageError, match=rf"{no_image} is damaged, not an image"):
            read_one(no_image)


class _StoppedError(Exception):
    """Raised by a signal handler, as a trainer's may be."""


def test_signal_handler_ends_the_reading(tmp_path: Path) -> None:
    image = _save(tmp_path / "test" / "cats" / "0.png", _noise(512, 512))
    for number in range(1, 2000):  # some 10 s of decoding
        (image.parent / f"{number}.png").hardlink_to(image)

    def stop(*_: object) -> None:
        raise _StoppedError

    handler_before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(_StoppedError):
            read_image_folder(tmp_path, ["test"], None)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler_before)


def test_real_images(tmp_path: Path) -> None:
    if not REAL_IMAGES.exists():
        pytest.skip(f"{REAL_IMAGES} is not there")
    with tarfile.open(REAL_IMAGES, "r|xz") as archive:
        for member in archive:
            archive.extract(member, tmp_path, filter="data")
            if member.name.endswith("/0199.jpg"):
                break
    (images,) = read_image_folder(tmp_path / "cifar10-jpeg", ["train"], None)
    assert images.shape == (200, 3, 32, 32)
    first = Image.open(tmp_path / "cifar10-jpeg" / "train" / "airplane" / "0000.jpg")
    with first:
        assert np.array_equal(images[0].permute(1, 2, 0).numpy(), np.asarray(first))
    assert 40 < images.float().std() < 90


# -- the folders that are read


def test_links_to_folders_are_followed_once(tmp_path: Path) -> None:
    for name in ("images/b/2.png", "images/a/1.png", "elsewhere/3.png", "hidden/4.png"):
        _save(tmp_path / name)
    (tmp_path / "images" / "c").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "images" / ".d").symlink_to(tmp_path / "hidden")
    (tmp_path / "images" / "b" / "up").symlink_to(tmp_path / "images")
    files = list_files(tmp_path / "images")
    assert [str(file.relative_to(tmp_path / "images")) for file in files] == ["a/1.png", "b/2.png", "c/3.png"]


def test_a_folder_that_cannot_be_read_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scandir = os.scandir

    def refuse(path: str) -> object:
        if path.endswith("dogs"):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(UsageError, match="train/dogs cannot be read: Permission denied"):
        read_image_folder(folder, ["train"], None)


@pytest.mark.parametrize(
    ("out", "flat", "refused"),
    [
        ("images", True, True),
        ("images/runs/first", True, True),
        ("images/../images/cats", True, True),
        ("link/runs", True, True),
        ("elsewhere/runs", True, True),  # images/linked leads to it
        ("images/.runs/first", True, False),
        ("images/.runs", True, False),
        ("images 2", True, False),
        (".", True, False),
        ("images", False, False),
        ("images/runs", False, False),
        ("images/train", False, True),
        ("images/test/runs", False, True),
        ("images/train/.runs", False, False),
        ("images/../link/train/cats", False, True),
    ],
)
def test_out_must_be_outside_the_folders_that_are_read(out: str, flat: bool, refused: bool, tmp_path: Path) -> None:
    for name in ("train/cats/1.png", "test/cats/1.png") if not flat else ("cats/1.png", "2.png"):
        _save(tmp_path / "images" / name)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "images" / "linked").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "link").symlink_to(tmp_path / "images")
    with pytest.raises(UsageError, match="--out must be outside") if refused else contextlib.nullcontext():
        check_outside(tmp_path / out, read_folders(tmp_path / "images"))


def test_a_folder_that_does_not_exist_holds_nothing(tmp_path: Path) -> None:
    check_outside(tmp_path, read_folders(tmp_path / "missing"))
