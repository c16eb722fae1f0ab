"""The wheel holds every module, and importing vq_kernels requires only torch."""

import shutil
import subprocess
import sys
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("vq_kernels", "vqae")
IMPORT = """
import sys
from importlib.machinery import PathFinder

ABSENT = {"numpy", "triton", "torchvision", "PIL", "tyro", "tqdm", "matplotlib", "tensorboard", "einops"}

class EmptyEnvironment:
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in ABSENT else PathFinder.find_spec(name, path, target)

sys.meta_path[sys.meta_path.index(PathFinder)] = EmptyEnvironment
sys.path.insert(0, sys.argv[1])
import torch
from vq_kernels import VectorQuantizer
import vq_kernels

assert vq_kernels.__file__.startswith(sys.argv[1]), vq_kernels.__file__
quantized, indices, loss = VectorQuantizer(16, 8)(torch.randn(5, 8, requires_grad=True))
loss.backward()
print(tuple(quantized.shape), tuple(indices.shape), sorted(ABSENT & set(sys.modules)))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the wheel from a copy, because setuptools leaves files beside the sources."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for package in PACKAGES:
        shutil.copytree(ROOT / package, source / package, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / file, source)
    build = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    outcome = subprocess.run([sys.executable, "-c", build], cwd=source, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    (file,) = folder.glob("*.whl")
    return file


def test_it_holds_every_module_and_nothing_else(wheel: Path) -> None:
    found = {name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert found == {
        str(file.relative_to(ROOT))
        for package in PACKAGES
        for file in (ROOT / package).rglob("*")
        if file.suffix == ".py" or file.name == "py.typed"
    }


def test_it_requires_torch_and_its_compilers(wheel: Path) -> None:
    with ZipFile(wheel) as files:
        (name,) = [name for name in files.namelist() if name.endswith(".dist-info/METADATA")]
        metadata = message_from_string(files.read(name).decode())
    needed = [line for line in metadata.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert [line.partition(">=")[0] for line in needed] == ["torch", "triton", "llvmlite"]
    assert "platform_system" in needed[1]


def test_its_import_requires_only_torch(wheel: Path, tmp_path: Path) -> None:
    ZipFile(wheel).extractall(tmp_path)
    command = [sys.executable, "-I", "-c", IMPORT, str(tmp_path)]
    outcome = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert outcome.returncode == 0, outcome.stderr
    assert outcome.stdout == "(5, 8) (5,) []\n"
