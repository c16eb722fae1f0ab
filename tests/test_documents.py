"""The README and the documents are true: every fenced block runs, every link and every file they name exists.

The Python blocks of a document run in order and share their names. A comment such as "# [8, 64], indices [8]" states
the shapes of what its line assigns. The sh blocks of a document run in order, line by line, in a copy of the checkout.
`REPLACEMENTS` make the commands small first and fill in what the reader has to.
"""

import ast
import re
import runpy
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import faiss
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import vq_kernels
from tests.vqae import conftest
from tests.vqae.commands import TINY, Outcome, load
from vqae import evaluate, reconstruct, train
from vqae.config import Config, flag

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SMALL = f"{shlex.join(TINY)} --epochs 1"

# Applied in this order to every line of sh. IMAGES is a folder of test images and PORT a free port.
REPLACEMENTS = (
    ("make ", "make --just-print "),
    (r"\.venv/bin/pre-commit install", "pre-commit --version"),
    (r"(python benchmarks/\w+\.py).*", r"\1 --help"),
    (r"--dataset imagefolder --data-dir DIR|--dataset synthetic", "--dataset imagefolder --data-dir IMAGES"),
    (r"--epochs \d+|--max-minutes \d+", ""),
    (r"(vqae\.train\b)(?!.*--(?:resume|help))", rf"\1 {SMALL} --dataset imagefolder --data-dir IMAGES"),
    (r"(torchrun .*vqae\.train\b)", r"\1 --image-size 8"),
    (r"IMAGES\.\.\.", "IMAGES/test/colours/00.png IMAGES/test/colours/01.png"),
    (r"--nproc-per-node 8", "--nproc-per-node 1"),
    (r"HOST:29400", "localhost:PORT"),
)

command, images = conftest.command, conftest.images  # fixtures


class Block(NamedTuple):
    """A fenced block: the document it is in, the heading above it, its language and its text."""

    document: str
    heading: str
    language: str
    text: str


def blocks_of(document: Path) -> Iterator[Block]:
    heading = ""
    for title, language, text in re.findall(
        r"^#+ (.*)$|^```(\w*)\n([\s\S]*?)^```$", document.read_text(), re.MULTILINE
    ):
        heading = title or heading
        if not title:
            yield Block(str(document.relative_to(ROOT)), heading, language, text)


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]


def documents_with(language: str) -> list[str]:
    return sorted({block.document for block in BLOCKS if block.language == language})


def test_every_block_is_of_a_kind_that_is_tested() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh", "mermaid"}
    assert sum(document.read_text().count("\n```") for document in DOCUMENTS) == 2 * len(BLOCKS)


# -- Python


def check_layer(names: dict[str, Any]) -> None:
    """The reconstruction is better than a grey image, and the codes are in use."""
    if "optimizer" in names:
        assert F.mse_loss(names["reconstruction"], names["images"]) < 0.97 * names["images"].var()
        assert names["model"].quantizer.perplexity > 100


def check_clusters(names: dict[str, Any]) -> None:
    assert names["result"].inertia < 1.01 * faiss_inertia(names["x"], 100)


def check_clusters_of_batches(names: dict[str, Any]) -> None:
    assert names["result"].inertia < 1.01 * faiss_inertia(torch.cat([*names["loader"]]), 64)


def faiss_inertia(x: Tensor, num_codes: int) -> float:
    trained = faiss.Kmeans(x.shape[1], num_codes, seed=0, min_points_per_centroid=1)
    trained.train(x.numpy())
    return float(trained.index.search(x.numpy(), 1)[0].sum())


def check_product(names: dict[str, Any]) -> None:
    if "codes" in names:
        check_fit(names["quantizer"], names["x"], faiss.ProductQuantizer(64, 4, 8))


def check_residual(names: dict[str, Any]) -> None:
    check_fit(names["fitted"], names["vectors"], greedy(64, 4, 8))


def check_semantic_ids(names: dict[str, Any]) -> None:
    check_fit(names["quantizer"], names["embeddings"], greedy(32, 3, 6))


def greedy(*sizes: int) -> Any:
    theirs = faiss.ResidualQuantizer(*sizes)
    theirs.max_beam_size, theirs.train_type = 1, faiss.ResidualQuantizer.Train_default
    return theirs


def check_fit(quantizer: Any, x: Tensor, theirs: Any) -> None:
    """The error is that of faiss, or less."""
    theirs.train(x.numpy())
    decoded = torch.from_numpy(theirs.decode(theirs.compute_codes(x.numpy())))
    ours = quantizer.decode(quantizer.encode(x))
    assert F.mse_loss(ours, x) < 1.01 * F.mse_loss(decoded, x)


QUALITY: dict[tuple[str, str], Callable[[dict[str, Any]], object]] = {
    ("quantizer-in-your-model", "Add the layer"): check_layer,
    ("k-means", "Cluster vectors"): check_clusters,
    ("k-means", "Data that does not fit into memory"): check_clusters_of_batches,
    ("product-quantization", "Product quantization"): check_product,
    ("residual-codes", "Fit the stages to vectors"): check_residual,
    ("semantic-ids", "Learn the codebooks"): check_semantic_ids,
}
"""Checks of the blocks that train or fit, by document and heading. The other blocks that do have assertions."""


@pytest.mark.parametrize("document", documents_with("python"))
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch", "ignore::FutureWarning:torch")
def test_python_blocks_run(document: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))  # needs no C++ compiler
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for block in BLOCKS:
            if (block.document, block.language) == (document, "python"):
                run_python(block, names)
                QUALITY.get((Path(document).stem, block.heading), dict)(names)


def run_python(block: Block, names: dict[str, Any]) -> None:
    for node in ast.parse(block.text).body:
        exec(compile(ast.Module([node], []), f"{block.document}, {block.heading}", "exec"), names)  # noqa: S102
        line = block.text.splitlines()[node.lineno - 1]
        stated = re.findall(r"(?:(\w+) )?\[([\d, ]*)\]", line.partition("  # ")[2])
        if not stated:
            continue
        assert isinstance(node, ast.Assign), line
        values = [names[name] for name in re.findall(r"\w+", ast.unparse(node.targets[0]))]
        found = [getattr(values[0], name) for name, _ in stated] if stated[0][0] else values
        assert [str([*value.shape]) for value in found] == [f"[{shape}]" for _, shape in stated], line


# -- sh


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the checkout as the working directory, whose packages are the ones imported."""
    folder = tmp_path / "checkout"
    left_out = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "build", "dist")

    def ignore(directory: str, names: list[str]) -> set[str]:
        return left_out(directory, names) | ({"data"} & set(names) if Path(directory) == ROOT else set())

    shutil.copytree(ROOT, folder, ignore=ignore)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def lines_to_run(document: str, images: Path) -> list[str]:
    text = "".join(block.text for block in BLOCKS if (block.document, block.language) == (document, "sh"))
    lines = []
    for line in text.replace("\\\n", " ").splitlines():
        for pattern, replacement in REPLACEMENTS:
            line = re.sub(pattern, replacement, line)
        lines.append(line.replace("IMAGES", shlex.quote(str(images))).replace("PORT", str(free_port())))
    return lines


def run_line(line: str, command: Callable[..., Outcome]) -> str:
    """Run a line and return what it prints. It must exit with 0, and torchrun on one machine without an error message.

    vqae and the --help of a benchmark run in this process, which has torch loaded. A line with --nnodes 2 runs twice at
    once.
    """
    words = shlex.split(line, comments=True)
    if words[0] == "python" and words[2:] == ["--help"]:
        arguments, path = patch.object(sys, "argv", words[1:]), patch.object(sys, "path", [*sys.path])
        with arguments, path, pytest.raises(SystemExit) as exit_info:
            runpy.run_path(words[1], run_name="__main__")
        assert not exit_info.value.code
        return ""
    if words[:2] == ["python", "-m"] and words[2].startswith("vqae."):
        outcome = command(*words[2:])
        assert outcome.exit_code == 0, outcome.err
        return outcome.out
    machines = int(words[words.index("--nnodes") + 1]) if "--nnodes" in words else 1
    shells = [
        subprocess.Popen(["bash", "-c", line], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(machines)
    ]
    try:
        ends = [(*shell.communicate(timeout=200), shell.returncode) for shell in shells]
    finally:
        for shell in shells:
            shell.terminate()
    assert [exit_code for *_, exit_code in ends] == [0] * machines, ends
    assert "--standalone" not in words or ends[0][1] == ""
    return "".join(out for out, *_ in ends)


@pytest.mark.parametrize("document", documents_with("sh"))
def test_sh_blocks_run(document: str, command: Callable[..., Outcome], checkout: Path, images: Path) -> None:
    for line in lines_to_run(document, images):
        printed = run_line(line, command)
        if line.startswith("make"):  # make also succeeds where a file has the target's name
            assert ".venv/bin/python -m " in printed
        if line.startswith("torchrun"):  # all processes are one run, reported once
            assert printed.count("on 2 processes") == 1
        for out in re.findall(r"vqae\.train .*--out (\S+)", line):
            state = load(checkout / out / "last.pt")
            assert state["finished"]
            assert [entry["step"] for entry in state["history"]] == [3]
            assert printed.count(f"results in {out}: ") == ("--resume" not in line)


def test_the_guide_trains_on_one_machine_and_on_two(images: Path) -> None:
    lines = lines_to_run("docs/guides/train-the-autoencoder.md", images)
    assert sorted("--nnodes 2" in line for line in lines if line.startswith("torchrun")) == [False, True]


# -- links and names


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda document: str(document.relative_to(ROOT)))
def test_links_lead_to_files(document: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)(?:#[^)]*)?\)", document.read_text()):
        assert (document.parent / target).is_file(), target


def test_files_named_in_the_documents_exist() -> None:
    pattern = r"(?<![\w/.])(?:vq_kernels|vqae|benchmarks|docs|examples|tests)/[\w/]*\.(?:py|md|png|jsonl)\b"
    for document in DOCUMENTS:
        for file in re.findall(pattern, document.read_text()):
            assert (ROOT / file).is_file(), f"{file}, in {document.name}"


def test_documents_named_in_the_code_exist() -> None:
    for package in ("vq_kernels", "vqae", "benchmarks", "tests", "examples"):
        for file in (ROOT / package).rglob("*.py"):
            for name in re.findall(r"\bdocs/[\w/-]+\.md\b", file.read_text()):
                assert (ROOT / name).is_file(), f"{name}, in {file.relative_to(ROOT)}"


def test_options_named_in_the_documents_exist() -> None:
    commands = (Config, train.Command, evaluate.Command, reconstruct.Command)
    options = {flag(field.name) for command in commands for field in fields(command)} | {"--help", "--max-restarts"}
    options |= {flag(f"no-{field.name}") for field in fields(Config) if isinstance(field.default, bool)}
    for document in DOCUMENTS:
        if document.name != "CHANGELOG.md":
            assert set(re.findall(r"`(--[a-z][a-z-]*)", document.read_text())) <= options, document.name


def test_the_boxes_of_the_architecture_exist() -> None:
    """A square box is a file or folder of the repository or a public name. A round box is a tensor."""
    for block in BLOCKS:
        if block.language != "mermaid":
            continue
        boxes = re.findall(r'\w\["([^"<]+)', block.text)
        assert boxes
        for box in boxes:
            assert (ROOT / box).exists() or box in vq_kernels.__all__, box


def test_the_arrows_between_folders_are_imports() -> None:
    picture = next(block.text for block in BLOCKS if block.language == "mermaid")
    boxes = dict(re.findall(r'(\w+)\["([^"<]+)', picture))
    arrows = re.findall(r"(\w+) --> (\w+)", re.sub(r'\[".*?"\]', "", picture))
    assert len(arrows) == picture.count("-->")
    for start, end in arrows:
        module = boxes[end].replace("/", ".").removesuffix(".py")
        assert any(name.startswith(module) for name in imports(boxes[start])), f"{start} --> {end}"


def imports(place: str) -> set[str]:
    """The modules that a file, or the files of a folder, import from; a public name counts as its own module."""
    found: set[str] = set()
    for file in sorted((ROOT / place).rglob("*.py")) or [ROOT / place]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "vq_kernels":
                found.update(getattr(vq_kernels, alias.name).__module__ for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                found.add(node.module)
    return found
