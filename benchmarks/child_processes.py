"""Processes that do not outlive what started them, and are ended with all that they have started themselves."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None
_GRACE_S = 10.0


def killed_with_parent() -> None:
    """Let the kernel kill this process when its parent dies, however that dies; Linux alone.

    For `preexec_fn`, and for programs that a tool has started.
    """
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)


def stopped_with_parent() -> None:
    """The same, with the signal that a process may answer: a training run saves itself."""
    if _LIBC is not None:
        _LIBC.prctl(_PR_SET_PDEATHSIG, int(signal.SIGTERM), 0, 0, 0)


def exit_on_sigterm() -> None:
    """Let SIGTERM raise SystemExit in this process, so that `finally` ends what it has started."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def end(process: "subprocess.Popen[bytes]", grace_s: float = _GRACE_S) -> None:
    """End a process that leads a group: SIGTERM, then, after a grace, SIGKILL to it and to all that it has started.

    What it started dies too where it has left the group. Nothing of it runs when this returns.
    """
    started = descendants(process.pid)
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(timeout=grace_s)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    for pid in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + grace_s
    while any(_runs(pid) for pid in started) and time.monotonic() < deadline:
        time.sleep(0.01)


def descendants(pid: int) -> list[int]:
    """The processes that a process has started, and those that they have; none where there is no /proc."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it has just ended
            parent = int(_after_name(file)[1])
            children.setdefault(parent, []).append(int(file.parent.name))
    found = [pid]
    for one in found:  # grows as it goes
        found += children.get(one, [])
    return found[1:]


def _runs(pid: int) -> bool:
    """Whether a process is there, and not only waits to be reaped by whoever has it now."""
    try:
        return _after_name(Path(f"/proc/{pid}/stat"))[0] not in "ZX"
    except OSError:
        return False


def _after_name(file: Path) -> list[str]:
    """The entries of /proc/PID/stat after the program's name, which may hold anything: state, parent, and on."""
    return file.read_text().rpartition(")")[2].split()
