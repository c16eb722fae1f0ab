"""What the README and the documents show works as it stands there: every fenced block runs, every link leads somewhere.

A block of python runs as it is, and a comment such as "# [8, 64], indices [8]" tells the shapes of what its line
assigns. A block of sh runs line by line in a copy of the checkout, with the substitutions of `SUBSTITUTIONS`, which
make it small and put in what the reader has to. So a new block of sh needs an entry there.
"""

import ast
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import gpu.results
import pytest
import torch
from gpu.stage import FINISHED, STAGES

from tests.vqae import conftest
from tests.vqae.commands import TINY, Outcome, load

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")])
SMALL = f"{shlex.join(TINY)} --dataset imagefolder --data-dir PICTURES"

# By document and heading: what each text of the block is replaced by, before PICTURES and PORT are.
SUBSTITUTIONS: dict[str, tuple[tuple[str, str], ...]] = {
    "README.md, vq_kernels": (("make ", "make --just-print "),),  # the variables and targets are there
    "README.md, The auto-encoder": (
        ("--dataset imagefolder --data-dir DIR --epochs 3", f"{SMALL} --epochs 1"),
        ("--data-dir DIR", "--data-dir PICTURES"),
        ("PICTURES...", "PICTURES/test/colours/00.png PICTURES/test/colours/01.png"),
    ),
    "README.md, Several processes, several machines": (  # a line with --nnodes 2 runs twice at once
        ("-m vqae.train", f"-m vqae.train {SMALL} --image-size 8 --epochs 1"),
        ("--nproc-per-node 8", "--nproc-per-node 1"),
        ("HOST:29400", "localhost:PORT"),
    ),
    "docs/explanations/performance.md, How to measure it": (  # goes on with a finished rehearsal
        ("--out RESULTS", "--out RESULTS --rehearse"),
        ("--wheels WHEELS", "--wheels PICTURES"),
    ),
}

command, images = conftest.command, conftest.images  # fixtures


class Block(NamedTuple):
    """A fenced block: where it stands ("FILE, HEADING"), its language and its text."""

    place: str
    language: str
    text: str


def blocks_of(document: Path) -> list[Block]:
    """The blocks of a document, each with the heading that it stands under."""
    found, heading = [], ""
    pattern = r"^#+ (.*)$|^```(\w*)\n([\s\S]*?)^```$"
    for title, language, text in re.findall(pattern, document.read_text(), re.MULTILINE):
        heading = title or heading
        if not title:
            found.append(Block(f"{document.relative_to(ROOT)}, {heading}", language, text))
    return found


BLOCKS = [block for document in DOCUMENTS for block in blocks_of(document)]
each_block_of = {
    language: pytest.mark.parametrize(
        "block", [pytest.param(block, id=block.place) for block in BLOCKS if block.language == language]
    )
    for language in ("python", "sh")
}


def test_every_block_is_one_that_runs() -> None:
    assert {block.language for block in BLOCKS} == {"python", "sh"}
    assert sum(document.read_text().count("\n```") for document in DOCUMENTS) == 2 * len(BLOCKS)
    assert sorted(SUBSTITUTIONS) == sorted(block.place for block in BLOCKS if block.language == "sh")


# -- python


@each_block_of["python"]
def test_the_lines_of_python_run(block: Block) -> None:
    names: dict[str, Any] = {}
    with torch.random.fork_rng():
        for node in ast.parse(block.text).body:
            exec(compile(ast.Module([node], []), block.place, "exec"), names)  # noqa: S102 - it is our own text
            line = block.text.splitlines()[node.lineno - 1]
            told = re.findall(r"(?:(\w+) )?\[([\d, ]*)\]", line.partition("  # ")[2])
            assert isinstance(node, ast.Assign) or not told, line
            if told:
                values = [names[name] for name in re.findall(r"\w+", ast.unparse(node.targets[0]))]
                found = [getattr(values[0], name) for name, _ in told] if told[0][0] else values
                assert [str([*value.shape]) for value in found] == [f"[{shape}]" for _, shape in told], line


# -- sh


def finish_rehearsal(folder: Path) -> None:
    """All stages of a GPU pass as finished; what a pass does is tested by tests/benchmarks/gpu/test_gpu_pass.py."""
    for stage in STAGES:
        header = gpu.results.make_header(stage.folders, None, rehearse=True)
        gpu.results.Results(folder / "checks.jsonl", header).add(op="stage", stage=stage.name, outcome=FINISHED)


@pytest.fixture
def checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, to run commands in, which find the packages of the copy."""
    folder = tmp_path / "checkout"
    left = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "runs", "data", "build", "dist")
    shutil.copytree(ROOT, folder, ignore=left)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=":")
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(gpu.results, "ROOT", folder)
    finish_rehearsal(folder / "RESULTS")
    return folder


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return int(listener.getsockname()[1])


def lines_to_run(block: Block, images: Path) -> list[str]:
    text = block.text.replace("\\\n", " ")
    for shown, run in SUBSTITUTIONS[block.place]:
        assert shown in text, f"{shown!r} is to be replaced, but is not there"
        text = text.replace(shown, run)
    text = text.replace("PICTURES", shlex.quote(str(images))).replace("PORT", str(free_port()))
    return text.splitlines()


def run_line(line: str, command: Callable[..., Outcome]) -> str:
    """What a line prints that must exit with 0. Commands of vqae run in this process, which has torch loaded."""
    words = shlex.split(line, comments=True)
    if words[:2] == ["python", "-m"]:
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
    return "".join(out for out, *_ in ends)


@each_block_of["sh"]
def test_the_lines_of_sh_run(block: Block, command: Callable[..., Outcome], checkout: Path, images: Path) -> None:
    for line in lines_to_run(block, images):
        printed = run_line(line, command)
        if line.startswith("make"):  # which is content where a file has the target's name
            assert ".venv/bin/python -m " in printed
        if line.startswith("torchrun"):  # all processes are one run, told of once
            assert printed.count("51 images to train on") == printed.count("on 2 processes") == 1
        for out in re.findall(r"vqae\.train .*--out (\S+)", line):
            state = load(checkout / out / "last.pt")
            assert state["finished"]
            assert [entry["step"] for entry in state["history"]] == [3]
            assert printed.count(f"results in {out}: ") == ("--resume" not in line)


# -- links


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!https?:)([^)#]+)\)", README))))
def test_what_it_links_to_is_there(target: str) -> None:
    assert (ROOT / target).is_file()
