"""A CIFAR-10 of 60 images in the official layout, and a server on this machine to download it from."""

import gzip
import hashlib
import io
import pickle
import tarfile
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from torchvision.datasets import CIFAR10


class _PicklerOf2009(pickle.Pickler):
    """Spells NumPy's uint8 as the official files do, with 0 and 1 for False and True."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, np.dtype):
            return np.dtype, ("u1", 0, 1), (3, "|", None, None, None, -1, -1, 0)
        return NotImplemented


@dataclass(frozen=True)
class TinyCifar10:
    """The images [N, 3, 32, 32] of both splits, the official files by name, and the archive of them."""

    train: npt.NDArray[np.uint8]
    test: npt.NDArray[np.uint8]
    files: dict[str, bytes]
    archive: bytes

    def write_folder(self, data_dir: Path) -> Path:
        folder = data_dir / "cifar-10-batches-py"
        folder.mkdir(parents=True)
        for name, content in self.files.items():
            (folder / name).write_bytes(content)
        return folder

    def write_archive(self, data_dir: Path, num_bytes: int | None = None) -> Path:
        data_dir.mkdir(exist_ok=True)
        archive = data_dir / "cifar-10-python.tar.gz"
        archive.write_bytes(self.archive[:num_bytes])
        return archive


def _pickled(content: dict[str, Any]) -> bytes:
    file = io.BytesIO()
    _PicklerOf2009(file, protocol=2).dump(content)
    return file.getvalue()


@pytest.fixture
def tiny_cifar10(monkeypatch: pytest.MonkeyPatch) -> TinyCifar10:
    """The tiny data set; torchvision takes its checksums for the official ones, and has nowhere to download from."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 256, (60, 3, 32, 32), dtype=np.uint8)
    names = [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]
    files = {
        name: _pickled({"data": images[10 * index : 10 * index + 10].reshape(10, 3072), "labels": list(range(10))})
        for index, name in enumerate(names)
    }
    files["batches.meta"] = _pickled({"label_names": [str(number) for number in range(10)]})

    tar = io.BytesIO()
    with tarfile.open(fileobj=tar, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    packed = gzip.compress(tar.getvalue())

    def md5(content: bytes) -> str:
        return hashlib.md5(content, usedforsecurity=False).hexdigest()

    monkeypatch.setattr(CIFAR10, "train_list", [[name, md5(files[name])] for name in names[:5]])
    monkeypatch.setattr(CIFAR10, "test_list", [[names[5], md5(files[names[5]])]])
    monkeypatch.setattr(CIFAR10, "meta", {**CIFAR10.meta, "md5": md5(files["batches.meta"])})
    monkeypatch.setattr(CIFAR10, "tgz_md5", md5(packed))
    monkeypatch.setattr(CIFAR10, "url", "http://127.0.0.1:1/cifar-10-python.tar.gz")  # nobody answers
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    return TinyCifar10(images[:50], images[50:], files, packed)


class ImageServer:
    """Serves one archive; `status`, `num_bytes` and `stalls` say how badly, `num_requests` how often it was asked."""

    def __init__(self, archive: bytes) -> None:
        self.archive = archive
        self.status = 200
        self.num_bytes = len(archive)  # what is sent of the bytes that are announced
        self.stalls = False
        self.num_requests = 0
        self.stopping = threading.Event()


@pytest.fixture
def server(tiny_cifar10: TinyCifar10, monkeypatch: pytest.MonkeyPatch) -> Iterator[ImageServer]:
    """A server of the tiny archive, from which torchvision downloads."""
    state = ImageServer(tiny_cifar10.archive)

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            state.num_requests += 1
            self.send_response(state.status)
            self.send_header("Content-Length", str(len(state.archive)))
            self.end_headers()

        def do_GET(self) -> None:
            self.do_HEAD()
            if state.status == 200:
                self.wfile.write(state.archive[: state.num_bytes])
            if state.stalls:
                self.wfile.flush()
                state.stopping.wait()

        def log_message(self, format: str, *args: object) -> None:
            """Keep the tests' output clean."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http_server:
        thread = threading.Thread(target=http_server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        monkeypatch.setattr(CIFAR10, "url", f"http://127.0.0.1:{http_server.server_address[1]}/cifar-10-python.tar.gz")
        yield state
        state.stopping.set()
        http_server.shutdown()
        thread.join()
