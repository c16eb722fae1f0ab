"""All that has to be shown on a real GPU, in one command that can be cut short and gone on with elsewhere.

    python benchmarks/gpu_pass.py --out DIR --data-dir PICTURES --wheels WHEELS   # until 9 minutes are over
    python benchmarks/gpu_pass.py --out DIR --data-dir PICTURES --wheels WHEELS   # again: what is left, on any machine
    python benchmarks/gpu_pass.py --out DIR --stages tests exactness --minutes 5
    python benchmarks/gpu_pass.py --out DIR --rehearse                            # in small, without a GPU

The stages, the most important first, are those of gpu/stage.py: the tests that need a GPU; 10^9 rows against float64;
compute-sanitizer; times and memory beside other searches; the choice of tiles; training; the K-sweep. Each runs in a
process of its own, so that what one breaks the next does not feel, stops by itself at its time limit, and writes every
result at once: DIR gets 6 files of JSON lines. A line says which GPU, driver, versions and commit it comes from; lines
of other sources, and those of another GPU but for the tests and the sanitizers, are kept and done again. Nothing runs
on when this process has ended, however it ended.

PICTURES is CIFAR-10: train/<class>/* and test/<class>/*, as a folder or as a .tar.xz of it, or the official files;
without it, what needs pictures is left, and said so. WHEELS holds packages that are missing or too old here (tyro and
what it needs; flash-kmeans to compare with); what is missing is said before anything runs.

The exit status is 0 when all stages asked for are finished or cannot run here, 1 when one failed or is not finished, 2
for bad options.
"""

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
from child_processes import end, exit_on_sigterm, killed_with_parent
from gpu.commands import child_environment, tail
from gpu.provisions import missing_modules, unpack_pictures, unpack_wheels
from gpu.results import Line, Results, make_header, read_lines
from gpu.stage import FINISHED, STAGES, Context, Stage

_GRACE_S = 20.0  # after its time limit, in which a stage should have stopped by itself
_END_S = 25.0  # from the signal to end on, in which it ends what it has started and writes what it has
_LEAST_S = 20.0  # a stage is not begun for less


def parse(arguments: list[str]) -> argparse.Namespace:
    """The options; `argparse` reads them, since other packages may still lie in --wheels."""
    parser = argparse.ArgumentParser(description="Show on a real GPU what can be shown on one alone.")
    names = [stage.name for stage in STAGES]
    work = Path(tempfile.gettempdir()) / "vq_kernels-gpu-pass"
    parser.add_argument("--out", type=Path, required=True, help="folder of the results, gone on with if there are any")
    parser.add_argument("--stages", nargs="+", default=names, metavar="STAGE", help=f"of {', '.join(names)}; all")
    parser.add_argument("--minutes", type=float, default=9.0, help="for the whole command (%(default)s)")
    parser.add_argument("--data-dir", type=Path, help="CIFAR-10 or a .tar.xz of it: patches, embeddings, training")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to take what is missing or too old from")
    parser.add_argument("--checkpoint", type=Path, help="of vqae.train, for trained embeddings; else one is trained")
    parser.add_argument("--work", type=Path, default=work, help="folder for what may be lost (%(default)s)")
    parser.add_argument("--commit", help="what to call the commit where the checkout is no git repository")
    parser.add_argument("--rehearse", action="store_true", help="run in small on the CPU, the kernels interpreted")
    parser.add_argument("--here", action="store_true", help="run the stages in this process")
    parser.add_argument("--until", type=float, help="when to be done, in seconds since 1970; instead of --minutes")
    return parser.parse_args(arguments)


def check(options: argparse.Namespace) -> list[Stage]:
    """The stages that are meant.

    Raises:
        ValueError: an option that cannot be used; says which.
    """
    by_name = {stage.name: stage for stage in STAGES}
    for name in options.stages:
        if name not in by_name:
            raise ValueError(f"--stages must be of {', '.join(by_name)}, got {name!r}")
    if not options.minutes > 0:
        raise ValueError(f"--minutes must be above 0, got {options.minutes}")
    if options.wheels is not None and not options.wheels.is_dir():
        raise ValueError(f"--wheels must be a folder, got {options.wheels}")
    if options.data_dir is not None and not options.data_dir.exists():
        raise ValueError(f"--data-dir must be a folder or an archive, got {options.data_dir}")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise ValueError(f"--checkpoint must be a file, got {options.checkpoint}")
    if any(line["rehearsal"] != options.rehearse for line in read_lines(options.out / "checks.jsonl")):
        raise ValueError(f"--out must hold a rehearsal or measurements, not both, got {options.out}")
    if not options.rehearse and not torch.cuda.is_available():
        raise ValueError("PyTorch sees no GPU; --rehearse runs everything in small without one")
    return [by_name[name] for name in options.stages]


def provide(options: argparse.Namespace, stages: list[Stage]) -> None:
    """Unpack wheels and pictures, and see that no package is missing: better said now than after the first stages.

    Raises:
        ValueError: something is; says what, and for which stages.
    """
    if options.wheels is not None:
        print(f"from --wheels: {', '.join(unpack_wheels(options.wheels, options.work / 'packages')) or 'nothing'}")
    missing = missing_modules(dict.fromkeys(name for stage in stages for name in stage.needs))
    if missing:
        able = [stage.name for stage in stages if not missing_modules(stage.needs)]
        raise ValueError(
            f"--wheels must hold what is missing ({'; '.join(missing)}), or --stages be of {' '.join(able)}"
        )
    if options.data_dir is not None and options.data_dir.is_file():
        options.data_dir = unpack_pictures(options.data_dir, options.work / "pictures")


def run(options: argparse.Namespace, stages: list[Stage]) -> dict[str, str]:
    """Run the stages until the time is over, and return what came of each."""
    deadline = time.monotonic() + (60 * options.minutes if options.until is None else options.until - time.time())
    outcomes: dict[str, str] = {}
    for stage in stages:
        header = make_header(stage.folders, options.commit, options.rehearse)
        log = Results(options.out / "checks.jsonl", header, on_any_gpu=stage.on_any_gpu)
        if log.has(op="stage", stage=stage.name, outcome=FINISHED):
            outcomes[stage.name] = f"{FINISHED} before"
            continue
        seconds = deadline - time.monotonic()
        if not options.here or options.until is None:
            seconds = min(60 * stage.minutes, seconds)
        if seconds < _LEAST_S and not options.here:
            outcomes[stage.name] = "not begun: no time left"
            continue
        if not options.here:
            outcomes[stage.name] = run_apart(stage, log, options, seconds)
            continue
        print(f"{stage.name}: {stage.shows}, at most {seconds:.0f} s", flush=True)
        start = time.monotonic()
        outcomes[stage.name] = run_here(stage, log, options, start + seconds)
        add_outcome(log, stage, outcomes[stage.name], time.monotonic() - start)
    return outcomes


def run_here(stage: Stage, log: Results, options: argparse.Namespace, deadline: float) -> str:
    """Run a stage in this process; an error that it raises is its outcome."""
    context = Context(
        out=options.out,
        work=options.work / ("rehearsal" if options.rehearse else "measured"),
        header=log.header,
        deadline=deadline,
        rehearse=options.rehearse,
        on_any_gpu=stage.on_any_gpu,
        data_dir=options.data_dir,
        checkpoint=options.checkpoint,
    )
    context.work.mkdir(parents=True, exist_ok=True)
    try:
        return str(importlib.import_module(stage.module).run(context))
    except Exception:  # the next stage is worth a try, and the results are worth more than this process
        text = traceback.format_exc()
        print(text, file=sys.stderr, flush=True)
        return f"failed: {tail(text)}"


def run_apart(stage: Stage, log: Results, options: argparse.Namespace, seconds: float) -> str:
    """Run a stage in a process of its own, which writes its outcome; where it cannot, this one does."""
    flags = ["--here", "--out", options.out, "--work", options.work, "--stages", stage.name]
    # Its time runs from now on, not from when it has imported everything.
    flags += ["--until", f"{time.time() + seconds:.2f}", "--commit", log.header["commit"]]
    for name in ("data_dir", "checkpoint"):
        if getattr(options, name) is not None:
            flags += [f"--{name.replace('_', '-')}", getattr(options, name)]
    if options.rehearse:
        flags.append("--rehearse")
    command = [sys.executable, str(Path(__file__).resolve()), *map(str, flags)]
    before = read_lines(log.file)
    environment = child_environment(TRITON_CACHE_DIR=str(options.work / "triton"))
    process = subprocess.Popen(command, env=environment, start_new_session=True, preexec_fn=killed_with_parent)
    start = time.monotonic()
    outcome = f"failed: it had to be ended {_GRACE_S:.0f} s after its time limit"
    try:
        outcome = f"failed: its process ended with exit code {process.wait(timeout=seconds + _GRACE_S)}"
    except subprocess.TimeoutExpired:
        pass
    finally:
        end(process, _END_S)
    written = [line for line in read_lines(log.file)[len(before) :] if line["op"] == "stage"]
    if not written:
        written = [add_outcome(log, stage, outcome, time.monotonic() - start)]
    return str(written[-1]["outcome"])


def add_outcome(log: Results, stage: Stage, outcome: str, seconds: float) -> Line:
    """The line of what came of a stage."""
    return log.add(op="stage", stage=stage.name, outcome=outcome, seconds=round(seconds, 1))


def is_settled(outcome: str) -> bool:
    """Whether nothing of a stage is left that could be done here."""
    return outcome.startswith((FINISHED, "skipped"))


def main() -> int:
    """The command line."""
    options = parse(sys.argv[1:])
    try:
        stages = check(options)
        provide(options, stages)
    except ValueError as error:
        print(f"gpu_pass.py: {error}", file=sys.stderr)
        return 2
    exit_on_sigterm()
    options.out.mkdir(parents=True, exist_ok=True)
    if options.rehearse:
        os.environ["TRITON_INTERPRET"] = "1"  # before the stages import Triton
    outcomes = run(options, stages)
    if not options.here:
        print("\n" + "\n".join(f"{name}: {outcome}" for name, outcome in outcomes.items()), flush=True)
    return 0 if all(is_settled(outcome) for outcome in outcomes.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
