"""Measures everything that needs a GPU, in one command of at most nine minutes.

    python benchmarks/gpu.py              # on an H100 or H200, with torch 2.11 or newer
    python benchmarks/gpu.py --dry-run    # the same at toy sizes on a CPU, in Triton's interpreter

The parts, in order. Each runs in its own process, ends at its time limit, and appends each row to --out immediately:

    checks      tests/gpu: accumulator, score bound and first checks; shares of certified and exhaustive rows
    times       searches and the baselines: time, wrong indices, peak memory; training steps of quantizers
    train       vqae.train for 60 s, and its images per second compared with plain PyTorch
    exactness   10^7 rows against float64, then as many as the time allows
    suite       the other tests marked gpu; compute-sanitizer on small sizes; times of the scan configurations

It prints one page: a line per part, what failed, and the tables. The exit status is 1 if a part or a test failed, or if
an index was wrong. `python -m benchmarks.tables` writes the tables to the documentation.
"""

import importlib.util
import json
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple
from xml.etree import ElementTree

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import pytest
import torch
import tyro
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks import exactness
from benchmarks.baselines import CONTENDERS
from benchmarks.data import SearchData, make_search_data
from benchmarks.results import RESULTS, ROOT, Row, aligned, append_row, environment, read_rows
from benchmarks.search import GRAPH_ROWS, Shape, bench
from benchmarks.tables.gpu import gpu_table
from benchmarks.timing import burst, failure, peak_mib, quantiles, time_in_turn
from benchmarks.train import plain_images_per_s
from benchmarks.training_runs import find_dataset
from benchmarks.verification import checked_rows, wrong_rows
from vq_kernels import VectorQuantizer, search_statistics
from vq_kernels.search.triton.launch import device_properties, prepare, search_with_plan
from vq_kernels.search.triton.plan import CONFIGS, pick_config, plan_search
from vqae.config import Config
from vqae.data.load import load_images

PartName = Literal["checks", "times", "train", "exactness", "suite"]

LIMITS_S: dict[PartName, float] = {"checks": 60, "times": 150, "train": 90, "exactness": 90, "suite": 180}

_CONTENDERS = [
    "cdist",
    "addmm-chunked",
    "flash-kmeans",
    "triton",
    "triton-prepared",
    "gemm",
    "gemm-tf32",
    "gemm-bfloat16",
]
_PYTEST = ("-q", "-m", "gpu", "-p", "no:cacheprovider")
_CHECK_BUDGET = 1e10  # float64 subtractions per shape
_GRACE_S = 10.0  # a part is killed this long after its limit
_PAGE = ("bars", "gpu-search", "steps", "gpu-training", "gpu-exactness", "tiles")  # tables that are printed
_SANITIZER_ERROR = 9  # exit code
_SANITIZER_SUMMARY = re.compile(r"(?:ERROR SUMMARY: (\d+) error|RACECHECK SUMMARY: (\d+) hazard)")


class Sizes(NamedTuple):
    """What is measured. Shapes are (N, K, D)."""

    long: tuple[Shape, ...]  # their throughput is compared
    short: tuple[Shape, ...]  # those of few rows are also timed as CUDA graphs
    step: Shape  # of a training step
    rows: int  # per round of the exactness part
    most_rows: int  # of all rounds
    training: tuple[str, ...]  # flags of vqae.train
    plain: tuple[int, float]  # warm-up steps and seconds of the plain loop


FULL = Sizes(
    tuple((1 << 20, 4096, code_dim) for code_dim in (64, 128, 256, 512)),
    ((65_536, 1024, 64), (8192, 1024, 256), (256, 512, 512)), (32_768, 8192, 256), 10**7, 10**9,
    ("--max-minutes", "1", "--epochs", "100"), (25, 15.0),
)  # fmt: skip
DRY = Sizes(
    ((24, 40, 16),), ((8, 40, 200),), (24, 40, 16), 10, 10,
    ("--epochs", "1", "--batch-size", "4", "--num-codes", "8", "--code-dim", "8", "--hidden-dims", "8"), (1, 0.0),
)  # fmt: skip


@dataclass(frozen=True)
class Options:
    """Measure everything that needs a GPU."""

    out: Path | None = None
    """File that the results are appended to. Default: benchmarks/results/<gpu>/gpu.jsonl; with --dry-run a
    temporary file."""
    parts: tuple[PartName, ...] = tuple(LIMITS_S)
    """Parts to run."""
    minutes: float = 9.0
    """Time limit of the whole command."""
    data_dir: Path | None = None
    """Folder of CIFAR-10; see --data-dir of vqae.train."""
    commit: str | None = None
    """Commit to record if the checkout is not a git repository."""
    dry_run: bool = False
    """Run everything at toy sizes on the CPU, in Triton's interpreter."""


@dataclass(frozen=True)
class Context:
    """The data that a part needs."""

    options: Options
    file: Path
    until: float  # in seconds since 1970
    where: dict[str, Any]  # entries of every row
    sizes: Sizes
    device: torch.device

    def left_s(self) -> float:
        """Seconds left for the part."""
        return self.until - time.time()

    def add(self, op: str, **entries: Any) -> None:
        """Appends a row to the results."""
        append_row(self.file, {"op": op, **entries, **self.where})

    def gaussian(self, shape: Shape) -> SearchData:
        """Gaussian data on the device."""
        return make_search_data("gaussian", *shape, device=self.device, draw_on_device=True)


# -- checks


def checks(context: Context) -> None:
    """Runs tests/gpu, and counts which rows of Gaussian data are certified and which are searched exhaustively."""
    _run_tests(context, [ROOT / "tests" / "gpu"])
    for shape in (*context.sizes.long, *context.sizes.short):
        statistics = search_statistics(*context.gaussian(shape), backend="triton")
        shares = [100 * count / shape[0] for count in statistics]
        names = (f"{step}_percent" for step in exactness.STEPS)
        context.add("shares", **_size(shape), **dict(zip(names, shares, strict=True)))


def _run_tests(context: Context, paths: list[Path]) -> None:
    start = time.monotonic()
    # Versions that were never tested together may warn; that is not a failure of the kernels.
    command = [*_PYTEST, "-W", "default", "--continue-on-collection-errors", *map(str, paths)]
    if not context.options.dry_run and importlib.util.find_spec("xdist"):
        command += ["-n", str(min(12, os.cpu_count() or 1))]  # compile in parallel
    with tempfile.TemporaryDirectory() as folder:
        pytest.main([*command, f"--junitxml={folder}/tests.xml"])
        cases = list(ElementTree.parse(f"{folder}/tests.xml").getroot().iter("testcase"))  # noqa: S314 - our own file
    counts = dict.fromkeys(("passed", "failed", "skipped"), 0)
    for case in cases:
        failed = [*case.iter("failure"), *case.iter("error")]
        counts["failed" if failed else "skipped" if case.find("skipped") is not None else "passed"] += 1
        if failed:
            name = f"{case.get('classname')}::{case.get('name')}"
            context.add("failure", test=name, text=(failed[0].text or "")[-1500:])
    names = [str(path.relative_to(ROOT)) for path in paths]
    context.add("tests", paths=names, seconds=_since(start), **counts)


# -- times


def times(context: Context) -> None:
    """Times searches and training steps."""
    shapes = (*context.sizes.long, *context.sizes.short)
    if not context.options.dry_run:
        with ProcessPoolExecutor(8, mp_context=multiprocessing.get_context("spawn")) as pool:
            list(pool.map(_compile, [(context, shape) for shape in shapes]))
    for shape in shapes:
        few_rows = shape in context.sizes.short and shape[0] <= GRAPH_ROWS
        for graph in (False, True) if few_rows else (False,):
            if context.left_s() > 0:
                _bench(context, shape, graph)
    for dtype in (torch.float32, torch.bfloat16):
        _training_steps(context, dtype)


def _compile(case: tuple[Context, Shape]) -> None:
    """Searches once, so that the kernels are in Triton's cache."""
    CONTENDERS["triton"].build(*case[0].gaussian(case[1]))()
    torch.cuda.synchronize()


def _bench(context: Context, shape: Shape, graph: bool) -> None:
    contenders = [CONTENDERS[name] for name in _CONTENDERS]
    if context.options.dry_run:
        contenders = [replace(contender, devices=("cpu",)) for contender in contenders]
    rounds, data = 1 if context.options.dry_run else 5, context.gaussian(shape)
    torch.cuda.empty_cache()  # frees the scores of the previous shape
    for row in bench(contenders, data, rounds=rounds, burst_ms=50, budget=_CHECK_BUDGET, graph=graph):
        context.add(**row, data="gaussian", graph=graph)


class _PlainQuantizer(nn.Module):
    """A typical hand-written quantizer: cdist, argmin and straight-through."""

    def __init__(self, num_codes: int, code_dim: int) -> None:
        super().__init__()
        self.codebook = nn.Parameter(torch.randn(num_codes, code_dim))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Quantized x [N, D], indices [N] and the codebook's loss []."""
        indices = torch.cdist(x.detach().float(), self.codebook.detach()).argmin(dim=1)
        codes = F.embedding(indices, self.codebook)
        return x + (codes - x).detach(), indices, F.mse_loss(codes, x.detach().float())


def _vector_quantize_pytorch(num_codes: int, code_dim: int) -> nn.Module:
    from vector_quantize_pytorch import VectorQuantize  # may be missing

    layer: nn.Module = VectorQuantize(code_dim, num_codes, learnable_codebook=True, ema_update=False)
    return layer


_QUANTIZERS: dict[str, Callable[[int, int], nn.Module]] = {
    "VectorQuantizer": partial(
        VectorQuantizer, init="normal", restart_after=0, ema_decay=None, commitment_weight=0.0, backend="triton"
    ),
    "cdist + argmin": _PlainQuantizer,
    "vector-quantize-pytorch": _vector_quantize_pytorch,
}


def _training_steps(context: Context, dtype: torch.dtype) -> None:
    """Forward and backward of each quantizer: wrong indices, time and memory."""
    num_vectors, num_codes, code_dim = context.sizes.step
    torch.manual_seed(0)
    x = torch.randn(1, num_vectors, code_dim, device=context.device).to(dtype).requires_grad_()
    rows = checked_rows(*context.sizes.step, budget=_CHECK_BUDGET).to(context.device)
    found: dict[str, Row] = {name: {"status": "ok"} for name in _QUANTIZERS}
    steps: dict[str, Callable[[], Any]] = {}
    for name, build in _QUANTIZERS.items():
        try:
            layer: Any = build(num_codes, code_dim).to(context.device)
            inner = x if name == "vector-quantize-pytorch" else x[0]
            codebook = layer.codebook.detach().clone()
            indices = layer(inner)[1].flatten()
            wrong = wrong_rows(x.detach()[0][rows], codebook, indices[rows])
            found[name]["wrong_percent"] = 100 * wrong.double().mean().item()
            _step(layer, inner)
            steps[name] = partial(_step, layer, inner)
        except Exception as error:  # a quantizer that does not run is a result
            found[name]["status"] = failure(error)
    elapsed_ms = time_in_turn(steps, context.device, rounds=1 if context.options.dry_run else 5, burst_ms=100)
    size = _size(context.sizes.step) | {"dtype": str(dtype).removeprefix("torch.")}
    for name, row in found.items():
        if name in steps:
            row |= quantiles(elapsed_ms[name]) | {"peak_mib": peak_mib(steps[name], context.device)}
        context.add("training_step", contender=name, **size, **row)


def _step(layer: Any, x: Tensor) -> tuple[Tensor | None, ...]:
    quantized, _, loss = layer(x)
    outputs, inputs = [quantized, loss], [x, *layer.parameters()]
    return torch.autograd.grad(outputs, inputs, [torch.ones_like(out) for out in outputs], allow_unused=True)


# -- train


def train(context: Context) -> None:
    """Runs vqae.train for a minute, and the plain PyTorch loop for some seconds."""
    with tempfile.TemporaryDirectory() as folder:
        out, data_dir = Path(folder, "run"), context.options.data_dir
        if context.options.dry_run:
            data_dir = _noise_images(Path(folder, "images"))
        dataset = "imagefolder" if find_dataset(None, data_dir) == "imagefolder" else "auto"
        command = [sys.executable, "-m", "vqae.train", "--out", str(out), "--dataset", dataset, *context.sizes.training]
        subprocess.run([*command, *(["--data-dir", str(data_dir)] if data_dir else [])], check=True, cwd=ROOT)
        lines = read_rows(out / "metrics.jsonl")
        rate = len(lines) / sum(1 / line["images_per_s"] for line in lines)  # epochs have equally many images
        last = {name: lines[-1][name] for name in ("dataset", "test_mse", "codes_used", "epoch")}
        context.add("training", contender="vqae.train", seconds=lines[-1]["elapsed_s"], images_per_s=rate, **last)
        images = load_images(last["dataset"], data_dir).train
        warm_up, seconds = context.sizes.plain
        config = Config.read(out / "config.json")
        rate = plain_images_per_s(config, images, context.device, warm_up=warm_up, seconds=seconds)
        context.add("training", contender="plain PyTorch", seconds=seconds, images_per_s=rate, dataset=last["dataset"])


def _noise_images(folder: Path) -> Path:
    """An image folder of 24 training and 8 test images of noise, 12 x 12."""
    from PIL import Image

    for split, count in (("train", 24), ("test", 8)):
        (folder / split / "noise").mkdir(parents=True)
        for number, pixels in enumerate(torch.randint(256, (count, 12, 12, 3), dtype=torch.uint8)):
            Image.fromarray(pixels.numpy()).save(folder / split / "noise" / f"{number:02}.png")
    return folder


# -- exactness


def exactness_rounds(context: Context) -> None:
    """Compares rounds of rows with float64 until the time is over."""
    total, slowest, seed = 0, 0.0, 0
    while total < context.sizes.most_rows and context.left_s() > 1.5 * slowest:
        start = time.monotonic()
        counts = exactness.soak(exactness.Options(context.sizes.rows, seed, "triton", context.device.type))
        totals = {key: sum(count[key] for count in counts.values()) for key in ("rows", "wrong")}
        context.add("exactness", seed=seed, **totals, seconds=_since(start), data=counts)
        total, seed, slowest = total + totals["rows"], seed + 1, max(slowest, _since(start))


# -- suite


def suite(context: Context) -> None:
    """Runs the other tests marked gpu, compute-sanitizer, and the scan configurations."""
    if context.options.dry_run:
        paths = [ROOT / "tests" / "vq_kernels" / "search" / "test_triton_gpu.py"]
    else:
        paths = [ROOT / "tests" / "vq_kernels" / name for name in ("search", "gradient")]
        marked = (path for path in (ROOT / "tests").rglob("test_*.py") if "mark.gpu" in path.read_text())
        paths += [path for path in marked if not path.is_relative_to(ROOT / "tests" / "gpu")]
    _run_tests(context, paths)
    _sanitize(context)
    for shape in context.sizes.long:
        if context.left_s() > 0:
            _time_configs(context, shape)


def _sanitize(context: Context) -> None:
    """Runs tests/gpu at small sizes under memcheck and racecheck."""
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None or context.options.dry_run:
        context.add("sanitizer", tool="compute-sanitizer", status="not run")
        return
    # An error that PyTorch handles, such as a query for what is there, is not one of the kernels.
    for tool, flags in {"memcheck": ["--padding", "64", "--report-api-errors", "no"], "racecheck": []}.items():
        command = [sanitizer, "--tool", tool, *flags, "--kernel-name", "kns=_kernel", "--target-processes", "all"]
        command += ["--error-exitcode", str(_SANITIZER_ERROR), sys.executable, "-m", "pytest", *_PYTEST, "tests/gpu"]
        # Without PyTorch's cache every tensor is its own allocation, so that reads past its end are found.
        environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "VQ_KERNELS_SMALL_TESTS": "1"}
        finished = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        counts = [int(one or other) for one, other in _SANITIZER_SUMMARY.findall(finished.stdout)]
        found = "errors found" if any(counts) or finished.returncode == _SANITIZER_ERROR else "failed"
        status = "clean" if finished.returncode == 0 and not any(counts) else found
        output = {} if status == "clean" else {"output": (finished.stdout + finished.stderr)[-3000:]}
        context.add("sanitizer", tool=tool, status=status, errors=sum(counts), **output)


def _time_configs(context: Context, shape: Shape) -> None:
    """Times each scan configuration that serves a shape, on a prepared codebook."""
    x, codebook = context.gaussian(shape)
    operands, properties = prepare(codebook), device_properties(x.device)
    chosen = pick_config(*shape, x.dtype, properties)
    expected = search_with_plan(x, codebook, operands, plan_search(*shape[:2], chosen, properties))[0]
    for config in CONFIGS[:6]:
        if config.resident and shape[2] > config.block_d:
            continue
        call = partial(search_with_plan, x, codebook, operands, plan_search(*shape[:2], config, properties))
        row: Row = {"status": "ok"}
        try:
            row["status"] = "ok" if torch.equal(call()[0], expected) else "WRONG"
            row |= quantiles(burst(call, 1 if context.options.dry_run else 10, context.device))
        except Exception as error:  # a configuration that does not run is a result
            row["status"] = failure(error)
        context.add("config", **_size(shape), config=config.name, chosen=config == chosen, **row)


# -- the command


def _size(shape: Shape) -> dict[str, int]:
    return dict(zip("NKD", shape, strict=True))


def _since(start: float) -> float:
    return round(time.monotonic() - start, 2)


_PARTS: dict[PartName, Callable[[Context], None]] = {
    **{"checks": checks, "times": times, "train": train, "exactness": exactness_rounds, "suite": suite}
}


def _run_part(part: Callable[[Context], None], context: Context) -> None:
    """Runs a part in this process, the leader of a new group. Its output goes to a log beside the results."""
    os.setsid()
    log = os.open(context.file.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if context.options.dry_run:
        importlib.import_module("tests.vq_kernels.fast_interpreter")
    part(context)


def run(options: Options, file: Path) -> None:
    """Runs the parts one after the other, and adds a row for the outcome of each."""
    device = torch.device("cpu" if options.dry_run else "cuda")
    where = environment(device) | {"dry_run": options.dry_run}
    where["commit"] = options.commit or where["commit"]
    end = time.time() + 60 * options.minutes
    server = multiprocessing.get_context("forkserver")  # it has imported everything, and no CUDA context
    server.set_forkserver_preload(["benchmarks.gpu"])
    for name in options.parts:
        seconds = min(300 if options.dry_run else LIMITS_S[name], end - time.time())
        context = Context(options, file, time.time() + seconds, where, DRY if options.dry_run else FULL, device)
        status, start = "no time left", time.monotonic()
        if seconds > 0:
            process = server.Process(target=_run_part, args=(_PARTS[name], context))
            process.start()
            status = _outcome(process, seconds + min(_GRACE_S, max(0.0, end - time.time() - seconds)))
        context.add("part", part=name, status=status, seconds=_since(start))
        print(f"{name}: {status}, {_since(start):.0f} s", flush=True)


def _outcome(process: BaseProcess, seconds: float) -> str:
    """Waits for a part, and kills all of its processes afterwards."""
    try:
        process.join(seconds)
        if process.is_alive():
            return "stopped at its time limit"
        return "finished" if process.exitcode == 0 else f"failed with exit code {process.exitcode}"
    finally:
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.kill()
        process.join()


def problems(rows: list[Row]) -> list[str]:
    """The problems, one per line."""
    found = []
    for row in rows:
        if row["op"] == "failure":
            found.append(f"failed: {row['test']}")
        elif row["op"] == "part" and row["status"] != "finished":
            found.append(f"{row['part']}: {row['status']}")
        elif row["op"] == "sanitizer" and row["status"] not in ("clean", "not run"):
            found.append(f"{row['tool']}: {row['status']}")
        elif row["op"] == "exactness" and row["wrong"]:
            found.append(f"{row['wrong']} of {row['rows']} rows are wrong")
        elif row.get("status") == "WRONG":
            found.append(f"wrong indices: {json.dumps(row)[:200]}")
    return found


def main(options: Options) -> int:
    """Runs the command, prints the page, and returns the exit status."""
    if not options.dry_run and not torch.cuda.is_available():
        print("gpu.py: PyTorch sees no GPU; --dry-run runs everything at toy sizes without one", file=sys.stderr)
        return 2
    if options.dry_run:
        file = options.out or Path(tempfile.mkdtemp(prefix="gpu-dry-run-"), "gpu.jsonl")
    else:
        found = re.search(r"[A-Z]+[0-9]+", torch.cuda.get_device_name().removeprefix("NVIDIA "))
        file = options.out or RESULTS / (found[0].lower() if found else "gpu") / "gpu.jsonl"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.open("a").close()
    except OSError as error:
        print(f"gpu.py: --out must be a writable file, got {str(file)!r}: {error.strerror}", file=sys.stderr)
        return 2
    if options.dry_run:
        os.environ["TRITON_INTERPRET"] = "1"  # for the processes of the parts
    before = len(read_rows(file))
    run(options, file)
    rows = read_rows(file)[before:]
    for row in rows:
        if row["op"] == "tests":
            print(f"tests: {row['passed']} passed, {row['failed']} failed, {row['skipped']} skipped")
    print("\n".join(problems(rows)))
    for name in _PAGE:
        table = gpu_table(name, rows).partition("\n\n")[0]
        print(f"\n{aligned(table) if table else f'{name}: no results'}")
    print(f"\nresults in {file}, output of the parts in {file.with_suffix('.log')}")
    return 1 if problems(rows) else 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, description=__doc__)))
