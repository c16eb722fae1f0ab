"""Compiles every Triton kernel without a GPU and reports registers, spills, shared memory and what runs in parallel.

    python benchmarks/kernel_report.py --arch 80 90 100

Prints one JSON line per kernel, configuration and architecture. The exit status is 2 if a kernel does not compile, and
1 if one spills, or copies nothing ahead although it has more than two stages. "bfloat16/float32" in a configuration
means the dtypes of x and of the codebook, if they differ; "tuned" one that only benchmarks/gpu.py launches.

    {"kernel": "_scan_kernel", "config": "short_shared D=64 float32", "arch": 90, "registers": 124, "spill_bytes": 0,
     "stack_bytes": 0, "shared_bytes": 40960, "mma": "HGMMA.64x64x16.F32", "copies_ahead": 1, "products_pending": 0,
     "programs_per_multiprocessor": 2}

copies_ahead and products_pending are the asynchronous copies and matrix products that may still run when the loop over
the codes waits for one of them.

The launches are recorded, not listed by hand: the launchers run on meta tensors, and each recorded launch is compiled.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from vq_kernels.gradient.triton_backend import codebook_gradient
from vq_kernels.search.triton.launch import search_with_plan
from vq_kernels.search.triton.plan import CONFIGS, DeviceProperties, ScanConfig, pick_config, plan_search

_MULTIPROCESSORS = {80: 108, 90: 132, 100: 148}  # of the A100, H100 and B200
_SHARED_BYTES = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # per multiprocessor
_REGISTERS, _WARPS, _RESERVED_BYTES = 65_536, 64, 1024  # per multiprocessor, and of its shared memory per program
_MATRIX_INSTRUCTION = re.compile(r"\b((?:HGMMA|HMMA|UTCHMMA)[.\w]*)")
_STORE_WIDTHS = {"STL": 4, "STL.64": 8, "STL.128": 16}
_F32, _F16, _BF16 = torch.float32, torch.float16, torch.bfloat16
# (rows, codes, D, dtype). Together they cover every configuration at each width of its products, with and without a
# split codebook, with D a power of two and not.
_SHAPES = (
    *((65_536, 1_024, d, _F32) for d in (3, 16, 32, 50, 64, 100, 128, 512, 1_000)),
    *((65_536, 1_024, d, dtype) for d in (64, 128, 512) for dtype in (_BF16, _F16)),
    *((1_024, 4_096, 64, _F32), (1_024, 65_536, 128, _F32), (1_024, 65_536, 512, _F32)),
    *((256, 1_024, 128, _F16), (256, 1_024, 512, _F32)),
)
# (rows, codes, D, dtype of x, dtype of the codebook).
# D = 1; multiples of 16 that do not fill a product; 16-bit rows whose x' is not padded; a split codebook of short codes
# and in 16 bits; few rows without a split; two dtypes, as under autocast and the other way round.
_MIXED_SHAPES = (
    (65_536, 1_024, 1, _F32, _F32),
    *((65_536, 1_024, d, _F32, _F32) for d in (48, 80, 96, 112)),
    *((65_536, 1_024, d, _BF16, _BF16) for d in (48, 96, 300)),
    *((1_024, 4_096, 16, _F32, _F32), (1_024, 4_096, 64, _BF16, _BF16), (1_024, 4_096, 64, _F16, _F16)),
    *((1_024, 65_536, 128, _BF16, _BF16), (256, 1_024, 128, _BF16, _BF16), (12_800, 128, 128, _F32, _F32)),
    *((65_536, 1_024, d, _BF16, _F32) for d in (64, 128, 512)),
    *((65_536, 1_024, d, _F32, _BF16) for d in (64, 128, 512)),
    *((65_536, 1_024, 64, _F16, _F32), (1_024, 4_096, 64, _BF16, _F32)),
)
# Shapes of _SHAPES for which x is also a view with unaligned rows, a transposed view, and one that starts, like its
# codebook, at an address that 16 does not divide.
_VIEWED_SHAPES = (
    *((65_536, 1_024, 32, _F32), (65_536, 1_024, 64, _BF16), (65_536, 1_024, 128, _F32), (65_536, 1_024, 512, _F32)),
    *((1_024, 4_096, 64, _F32), (256, 1_024, 128, _F16)),
)
_TUNED_SHAPES = tuple((1 << 20, 4_096, d, _F32) for d in (64, 128, 256, 512))  # benchmarks/gpu.py times every config
_POINTEES = {
    **{torch.float64: "fp64", torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"},
    **{torch.int64: "i64", torch.int32: "i32"},
}


@dataclass(frozen=True)
class Launch:
    """One compilation: the kernel (module and name), its label, and what Triton specialises it for."""

    module: str
    kernel: str
    config: str
    arch: int
    signature: dict[str, str]
    constants: dict[str, Any]
    aligned: tuple[int, ...]
    options: dict[str, Any]


def _describe(kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any], config: str, arch: int) -> Launch:
    """Derives what Triton's launcher does from the arguments: types, constants, and divisibility by 16."""
    names = kernel.arg_names
    values = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in kwargs if name in names}
    signature: dict[str, str] = {}
    constants: dict[str, Any] = {}
    aligned = []
    for position, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialised = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (specialised and type(value) is int and value == 1):
            signature[parameter.name] = "constexpr"
            constants[parameter.name] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + _POINTEES[value.dtype]
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
        # A meta tensor has no address: its storage counts as aligned, as an allocation of PyTorch is.
        offset = value.storage_offset() * value.element_size() if isinstance(value, torch.Tensor) else value
        if (specialised or isinstance(value, torch.Tensor)) and offset % 16 == 0:
            aligned.append(position)
    options = {name: kwargs[name] for name in kwargs if name not in names}
    return Launch(kernel.fn.__module__, kernel.__name__, config, arch, signature, constants, tuple(aligned), options)


def _recorder(launches: dict[str, Launch], labels: dict[str, str], other: str, arch: int) -> Callable[..., None]:
    """A replacement for JITFunction.run that records each launch once, under its first label."""

    def run(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        launch = _describe(kernel, args, kwargs, labels.get(kernel.__name__, other), arch)
        identity = asdict(launch) | {"config": None}
        # In these kernels D only sets a mask and the length of a loop. One launch per dtype represents all lengths with
        # the loop, and one all without. If ptxas unrolls the loop, other lengths take a few registers more or less.
        if kernel.__name__ != "_scan_kernel":
            loops = {k: v > launch.constants["BLOCK_D"] for k, v in launch.constants.items() if k == "PITCH"}
            identity["constants"] = launch.constants | loops
        launches.setdefault(repr(identity), launch)

    return run


def _empty(rows: int, d: int, dtype: torch.dtype, *, first: int = 0) -> torch.Tensor:
    """A contiguous meta tensor [rows, d] that starts at entry `first` of its storage."""
    return torch.empty(first + rows * d, dtype=dtype, device="meta")[first:].view(rows, d)


def _cases(properties: DeviceProperties) -> Iterator[tuple[str, torch.Tensor, torch.Tensor, ScanConfig]]:
    """Yields each case: a suffix for its layout, meta tensors x and codebook, and the configuration of its scan."""
    for n, k, d, dtype in _SHAPES:
        layouts = {"": (_empty(n, d, dtype), _empty(k, d, dtype))}
        if (n, k, d, dtype) in _VIEWED_SHAPES:
            layouts |= {
                " unaligned": (_empty(n, d + 1, dtype)[:, :d], _empty(k, d, dtype)),
                " transposed": (_empty(d, n, dtype).t(), _empty(k, d, dtype)),
                " misaligned": (_empty(n, d, dtype, first=1), _empty(k, d, dtype, first=1)),
            }
        for layout, tensors in layouts.items():
            yield layout, *tensors, pick_config(n, k, d, dtype, properties, aligned=not layout)
    for n, k, d, x_dtype, codebook_dtype in _MIXED_SHAPES:
        yield "", _empty(n, d, x_dtype), _empty(k, d, codebook_dtype), pick_config(n, k, d, x_dtype, properties)
    if properties.capability == (9, 0):
        for n, k, d, dtype in _TUNED_SHAPES:
            for config in CONFIGS:
                if not config.resident or d <= config.block_d:
                    yield " tuned", _empty(n, d, dtype), _empty(k, d, dtype), config


def collect_launches(arch: int) -> list[Launch]:
    """Collects every kernel that a search or a gradient launches on an architecture, each specialisation once."""
    properties = DeviceProperties((arch // 10, arch % 10), _MULTIPROCESSORS[arch])
    launches: dict[str, Launch] = {}
    for layout, x, codebook, config in _cases(properties):
        (n, d), k = x.shape, codebook.shape[0]
        plan = plan_search(n, k, config, properties)
        dtypes = "/".join(str(dtype).removeprefix("torch.") for dtype in dict.fromkeys((x.dtype, codebook.dtype)))
        scan_label = f"{config.name} D={d} {dtypes}{layout}{' split' if plan.splits > 1 else ''}"

        labels = {"_scan_kernel": scan_label, "_finish_kernel": dtypes + layout}
        with mock.patch.object(JITFunction, "run", _recorder(launches, labels, dtypes + layout, arch)):
            search_with_plan(x, codebook, [], plan)
        if layout not in ("", " misaligned"):
            continue
        indices = torch.empty(n, dtype=torch.int64, device="meta")
        for deterministic in (True, False):
            with mock.patch.object(JITFunction, "run", _recorder(launches, {}, dtypes + layout, arch)):
                codebook_gradient(x, codebook, indices, 1, deterministic)
    return list(launches.values())


def compile_launch(launch: Launch) -> CompiledKernel:
    """Compiles one kernel for its architecture."""
    module = sys.modules.get(launch.module) or __import__(launch.module, fromlist=["_"])
    attributes = {(position,): [["tt.divisibility", 16]] for position in launch.aligned}
    source = ASTSource(getattr(module, launch.kernel), launch.signature, launch.constants, attributes)
    return triton.compile(source, target=GPUTarget("cuda", launch.arch, 32), options=launch.options)


def report_launch(launch: Launch) -> dict[str, Any]:
    """Compiles one kernel for its architecture and returns a line of the output."""
    compiled = compile_launch(launch)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump -res-usage printed no registers: {usage!r}")
    instructions = re.findall(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)", sass)
    matrix = _MATRIX_INSTRUCTION.search(sass)
    return {
        **{"kernel": launch.kernel, "config": launch.config, "arch": launch.arch},
        "registers": int(found.group(1)),
        "spill_bytes": sum(_STORE_WIDTHS.get(name, 0) for name in instructions),
        "stack_bytes": int(found.group(2)),
        "shared_bytes": compiled.metadata.shared,
        "mma": matrix.group(1) if matrix else None,
        "copies_ahead": _most_pending(compiled.asm["ttgir"], r"async_wait .*\bnum = (\d+)"),
        "products_pending": _most_pending(compiled.asm["ttgir"], r"warp_group_dot_wait .*\bpendings = (\d+)"),
        "programs_per_multiprocessor": min(
            _REGISTERS // (-(-int(found.group(1)) // 8) * 8 * 32 * compiled.metadata.num_warps),
            _WARPS // compiled.metadata.num_warps,
            _SHARED_BYTES[launch.arch] // (compiled.metadata.shared + _RESERVED_BYTES),
        ),
    }


def _most_pending(ttgir: str, wait: str) -> int:
    """The largest number in the loops that hold products. The loops that compute x' copy ahead too."""
    loops = [loop for loop in ttgir.split("scf.for ") if re.search(r"dot\b|tc_gen5_mma", loop)]
    return max((int(number) for loop in loops for number in re.findall(wait, loop)), default=0)


def _cuobjdump(option: str, path: str) -> str:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run([tool, option, path], capture_output=True, text=True, check=True).stdout


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line. The exit status says whether all is well, as described above."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--arch", type=int, nargs="+", choices=sorted(_MULTIPROCESSORS), default=[80, 90, 100])
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes that compile in parallel")
    parser.add_argument("--only", default="", help="compile only kernels or configurations with this text")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET=1 is set: the interpreter compiles nothing")
    launches = [launch for arch in options.arch for launch in collect_launches(arch)]
    launches = [launch for launch in launches if options.only in f"{launch.kernel} {launch.config}"]
    problems, failed = [], []
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        futures = [pool.submit(report_launch, launch) for launch in launches]
        for launch, future in zip(launches, futures, strict=True):
            name = f"{launch.kernel} ({launch.config}, sm_{launch.arch})"
            error = future.exception()
            if error is not None:
                failed.append(name)
                print(f"{name} does not compile: {error}", file=sys.stderr)
                continue
            report = future.result()
            print(json.dumps(report), flush=True)
            if report["spill_bytes"]:
                problems.append(f"spills: {name}")
            if launch.options.get("num_stages", 0) > 2 and not report["copies_ahead"]:
                problems.append(f"copies nothing ahead: {name}")
    print(f"{len(launches)} compiled, {len(problems)} problems, {len(failed)} fail", file=sys.stderr)
    for problem in problems:
        print(problem, file=sys.stderr)
    return 2 if failed else int(bool(problems))


if __name__ == "__main__":
    sys.exit(main())
