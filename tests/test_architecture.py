"""The structure of the code base: imports run one way and without circles, and few files follow one call."""

import ast
import os
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAY_IMPORT: dict[str, set[str]] = {
    "vq_kernels": set(),
    "vqae": {"vq_kernels"},
    "benchmarks": {"vq_kernels", "vqae"},
}
OLD_WORDS = re.compile(r"aloud|drained|rehears|the specification|second pass|picture", re.IGNORECASE)
OLD_NAMES = re.compile(r"\bdrained\b|\"pictures\"")  # deprecated names that still work for one release

# Runs a call and prints the files of the project in which a function was executed, one a line.
TRACER = """
import inspect, sys, threading
files = set()
def profile(frame, event, argument):
    if event == "call" and frame.f_code.co_flags & inspect.CO_OPTIMIZED:  # a function, no class body or module
        files.add(frame.f_code.co_filename)
def traced(call):
    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        call()
    except SystemExit as exit:
        assert not exit.code, exit.code
    finally:
        sys.setprofile(None)
        print("\\n".join(["traced:", *sorted(files)]))
"""
SEARCH = """
import torch
from vq_kernels import nearest_code
x, codebook = torch.randn(300, 16), torch.randn(64, 16)
codebook[32:] = codebook[:32]  # ties, so that some rows are reranked
nearest_code(x[:1], codebook, backend="{backend}")  # compiles
traced(lambda: nearest_code(x, codebook, backend="{backend}"))
"""
TRAINING_STEP = """
import torch
from vq_kernels import VectorQuantizer
quantizer = VectorQuantizer(64, 16, {options})
x = torch.randn(300, 16, requires_grad=True)
def step():
    quantized, indices, loss = quantizer(x)
    (quantized.sum() + loss).backward()
step()  # compiles
traced(step)
"""
TRAINING_RUN = """
import sys
import vqae.train
from vqae.runtime.process import run_command
sys.argv = ["vqae.train", "--dataset", "synthetic", "--limit", "64", "--batch-size", "16", "--epochs", "1",
            "--image-size", "8", "--num-codes", "8", "--device", "cpu", "--out", "{out}"]
traced(lambda: run_command("vqae.train"))
"""


def module_files(package: str) -> dict[str, Path]:
    """The package's files by dotted module name."""
    files = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        parts = file.relative_to(ROOT).with_suffix("").parts
        files[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return files


def imported_modules(name: str, file: Path) -> set[str]:
    """Every module that a file imports, inside functions too; `from package import name` may import a module."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name} has a relative import"
            names.add(node.module or "")
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def import_graph(package: str) -> dict[str, set[str]]:
    """Which modules of the package each of its modules imports. An `__init__` that only re-exports is left out of
    other modules' needs: importing `a.b` runs `a/__init__`, and that is no circle of ours."""
    files = module_files(package)
    graph = {name: (imported_modules(name, file) & files.keys()) - {name} for name, file in files.items()}
    packages = {name for name, file in files.items() if file.name == "__init__.py"}
    return {
        name: needs - {need for need in needs & packages if name.startswith(f"{need}.")}
        for name, needs in graph.items()
    }


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_no_import_circles(package: str) -> None:
    try:
        list(TopologicalSorter(import_graph(package)).static_order())
    except CycleError as error:
        pytest.fail(f"import circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("package", MAY_IMPORT)
def test_imports_run_one_way(package: str) -> None:
    for name, file in module_files(package).items():
        others = {imported.partition(".")[0] for imported in imported_modules(name, file)} & MAY_IMPORT.keys()
        assert others <= MAY_IMPORT[package] | {package}, f"{name} imports {others}"


def executed_files(script: str, **environment: str) -> list[str]:
    """The project's files in which the script's traced call executes a function."""
    process = subprocess.run(
        [sys.executable, "-c", TRACER + script],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert process.returncode == 0, process.stderr
    files = process.stdout.partition("traced:\n")[2].splitlines()
    return [file for file in files if any(Path(file).is_relative_to(ROOT / package) for package in MAY_IMPORT)]


@pytest.mark.parametrize(("backend", "most"), [("torch", 6), ("llvm", 7), ("triton", 9)])
def test_few_files_follow_a_search(backend: str, most: int) -> None:
    files = executed_files(SEARCH.format(backend=backend), TRITON_INTERPRET="1")
    assert 0 < len(files) <= most, files


@pytest.mark.parametrize("options", ["", "restart_after=10, ema_decay=None"])
def test_few_files_follow_a_training_step(options: str) -> None:
    files = executed_files(TRAINING_STEP.format(options=options))
    assert 0 < len(files) <= 14, files


def test_few_files_follow_a_training_run(tmp_path: Path) -> None:
    files = [file for file in executed_files(TRAINING_RUN.format(out=tmp_path / "run")) if "/vqae/" in file]
    assert (tmp_path / "run" / "last.pt").exists()
    assert 0 < len(files) <= 15, files


def test_no_old_words() -> None:
    documents = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md")]
    code = [file for package in MAY_IMPORT for end in ("py", "jsonl") for file in (ROOT / package).rglob(f"*.{end}")]
    found = []
    for file in documents + code:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            if OLD_WORDS.search(OLD_NAMES.sub("", line)):
                found.append(f"{file.relative_to(ROOT)}:{number}: {line.strip()}")
    assert not found, "\n".join(found)


def test_the_library_imports_triton_and_the_compiler_on_first_use() -> None:
    code = "import sys, vq_kernels; print(*sorted({'triton', 'torch._dynamo', 'torch._inductor'} & set(sys.modules)))"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert finished.stdout.split() == []
