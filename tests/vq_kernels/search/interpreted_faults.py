"""Plants a fault in each kernel, and expects a test to fail. test_triton_launch.py runs this file."""

import importlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from vq_kernels import gradient
from vq_kernels.search import triton
from vq_kernels.search.triton.plan import CONFIGS

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

FIRST_CHECKS, SCORE_BOUND = "tests.gpu.test_first_checks", "tests.gpu.test_score_bound"
MARGIN, BACKEND = "tests.vq_kernels.search.test_triton_margin", "tests.vq_kernels.gradient.interpreted_triton_backend"
# The kernels, and the tests that import them.
IMPORTED_AGAIN = (
    *("vq_kernels.search.triton.", "vq_kernels.gradient.triton_backend", "tests.vq_kernels.search.triton_rows"),
    *(FIRST_CHECKS, SCORE_BOUND, MARGIN, BACKEND),
)


class Check(NamedTuple):
    """A test and its arguments."""

    module: str
    test: str
    arguments: tuple[Any, ...]


CONFIG = {config.name: config for config in CONFIGS}
PREPARED = Check(FIRST_CHECKS, "test_a_prepared_codebook", (torch.float32, 3.0, 300, 64))
MANY_CODES = PREPARED._replace(arguments=(torch.float32, 3.0, 2100, 3))
IN_PARTS = Check(FIRST_CHECKS, "test_views", ("transposed",))
TIES = Check(FIRST_CHECKS, "test_of_identical_codes_the_lowest_wins_and_none_is_certified", (3,))
MANY_TIES = TIES._replace(arguments=(8,))
RESIDENT = Check(SCORE_BOUND, "test_scores_stay_within_the_bound", (CONFIG["short"], 64, "gaussian"))
IN_PIECES = RESIDENT._replace(arguments=(CONFIG["long_hopper"], 72, "gaussian"))
ERRORS = Check(MARGIN, "test_score_errors_are_within_the_margin", ("cpu", "gaussian", 8, torch.float32))
SORTED = Check(BACKEND, "test_one_code_has_all_rows", (40 * 64, True))
ATOMIC = SORTED._replace(arguments=(40 * 64, False))

# A kernel and what is wrong with it: a text of its file, what replaces it, and the test that has to fail.
FAULTS: dict[str, tuple[str, str, Check]] = {
    "statistics: sum of the last codes": ("total += tl.sum(values", "total = tl.sum(values", MANY_CODES),
    "statistics: NaN counts": ("tl.where(finite == 1, 0.0, L", "tl.where(finite >= 0, 0.0, L", PREPARED),
    "codes: half norms 1.0001 times": ("(0.5 * square_norm)", "(0.50005 * square_norm)", PREPARED),
    "codes: no residual": ("residual = scaled - rounded", "residual = rounded - rounded", PREPARED),
    "margin: no rounding of rows": ("residual_norm * code_norm + ", "", ERRORS),
    "rows: no residual": ("residual_square += residual_part", "residual_square += 0 * residual_part", ERRORS),
    "scan: half norms 1.0001 times": ("descent = -ratio", "descent = -1.0001 * ratio", RESIDENT),
    "scan in pieces: half norms 1.0001 times": ("descent = -ratio", "descent = -1.0001 * ratio", IN_PIECES),
    "scan: no dropped scores": ("lost = tl.maximum(lost, ", "lost = tl.minimum(lost, ", RESIDENT),
    "certificate: no margin": ("tl.maximum(v1, hidden) > margin", "tl.maximum(v1, hidden) >= 0", TIES),
    "merge: the first part": ("in range(splits)", "in range(1)", IN_PARTS),
    "rerank: the last of a tie": ("least[:, None], offs_k, 2147483647", "least[:, None], -offs_k, 0", TIES),
    "exhaustive: the last of a tie": ("where(block_least < least", "where(block_least <= least", MANY_TIES),
    "segments: a row too few": ("in_segment = places < tl", "in_segment = places + 1 < tl", SORTED),
    "combination: the first segments": ("in range(first, last, COM", "in range(first, first + 1, COM", SORTED),
    "atomics: rows count twice": ("tl.full([BLOCK_N], 1, tl.int64)", "tl.full([BLOCK_N], 2, tl.int64)", ATOMIC),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_caught(name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    text, faulty, check = FAULTS[name]
    files = [(package, file) for package in (gradient, triton) for file in Path(package.__path__[0]).glob("*.py")]
    ((package, file),) = ((package, file) for package, file in files if text in file.read_text())
    assert file.read_text().count(text) == 1
    (tmp_path / file.name).write_text(file.read_text().replace(text, faulty))
    monkeypatch.setattr(package, "__path__", [str(tmp_path), *package.__path__])
    for module in [module for module in sys.modules if module.startswith(IMPORTED_AGAIN)]:
        parent, _, child = module.rpartition(".")
        monkeypatch.setattr(sys.modules[parent], child, sys.modules[module])  # restored after the test, like the next
        monkeypatch.delitem(sys.modules, module)
    test = getattr(importlib.import_module(check.module), check.test)
    with pytest.raises(AssertionError):
        test(*check.arguments)
