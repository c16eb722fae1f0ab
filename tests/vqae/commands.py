"""The smallest run worth testing, and what a command leaves when it exits."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Two epochs of three steps; images are mirrored and codes restart, so that all that is random takes part.
TINY = (
    *("--num-codes", "16", "--hidden-dims", "16", "--batch-size", "16", "--epochs", "2", "--val-fraction", "0.2"),
    *("--restart-after", "32", "--flip", "--unfreeze-encoder-at", "0.5", "--device", "cpu"),
)
TIMING_KEYS = {"elapsed_s", "images_per_s"}  # of a line of metrics.jsonl: all else is the same on every run


@dataclass(frozen=True)
class Outcome:
    """How a command ended, and what it printed."""

    exit_code: int
    out: str
    err: str


def load(file: Path) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(file, weights_only=True)
    return state


def files_in(folder: Path) -> set[str]:
    return {str(file.relative_to(folder)) for file in folder.rglob("*")}


def assert_same_run(folder: Path, expected: Path) -> None:
    """The final weights and all that goes with them, bit for bit; timings may differ."""
    state, expected_state = load(folder / "last.pt"), load(expected / "last.pt")
    assert state["finished"]
    for part in ("model", "schedule", "optimizer", "test_counts", "best_val_mse", "epoch", "step"):
        assert_equal(state[part], expected_state[part])
    assert_equal(load(folder / "best.pt")["model"], load(expected / "best.pt")["model"])
    assert [_without_timings(line) for line in state["history"]] == [
        _without_timings(line) for line in expected_state["history"]
    ]


def assert_equal(value: Any, expected: Any) -> None:
    """Equality of nested dicts and lists of tensors and plain values."""
    if isinstance(expected, torch.Tensor):
        assert torch.equal(value, expected)
    elif isinstance(expected, dict):
        assert value.keys() == expected.keys()
        for key in expected:
            assert_equal(value[key], expected[key])
    elif isinstance(expected, list):
        assert len(value) == len(expected)
        for one, other in zip(value, expected, strict=True):
            assert_equal(one, other)
    else:
        assert value == expected


def _without_timings(line: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in line.items() if name not in TIMING_KEYS}
