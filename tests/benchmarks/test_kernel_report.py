"""The kernel report: what it collects, and what it says of a few kernels compiled here."""

import dataclasses
import json
import re

import pytest

from benchmarks import kernel_report
from benchmarks.gpu import FULL
from vq_kernels.search.triton.plan import CONFIGS


def scan(arch: int, config: str) -> kernel_report.Launch:
    return next(launch for launch in kernel_report.collect_launches(arch) if launch.config == config)


def test_every_kernel_and_configuration_is_collected():
    launches = [launch for arch in (80, 90, 100) for launch in kernel_report.collect_launches(arch)]
    assert {launch.kernel for launch in launches} == {
        "_column_statistics_kernel",
        "_round_codes_kernel",
        "_scan_kernel",
        "_finish_kernel",
        "_segment_kernel",
        "_combine_kernel",
        "_atomic_kernel",
    }
    scanned = {launch.config.split()[0] for launch in launches if launch.kernel == "_scan_kernel"}
    assert scanned == {config.name for config in CONFIGS}
    for layout in ("unaligned", "transposed", "misaligned"):
        assert len([launch for launch in launches if launch.config.split()[-1] == layout]) >= 9


@pytest.mark.parametrize("arch", [80, 90, 100])
def test_what_a_launch_is_specialised_for_is_collected(arch: int):
    launches = kernel_report.collect_launches(arch)
    rounding, finishing = (
        [launch for launch in launches if (launch.kernel, launch.config) == (kernel, "float32")]
        for kernel in ("_round_codes_kernel", "_finish_kernel")
    )
    pitches = {launch.constants["PITCH"] > launch.constants["BLOCK_D"] for launch in rounding}
    assert pitches == {True, False}  # with and without a loop over the columns
    assert {launch.constants.get("D") for launch in finishing} == {1, None}  # or a number of sixteens, or any other
    for split in (True, False):
        same = [launch for launch in finishing if launch.constants["SPLIT"] == split]
        assert len({launch.aligned for launch in same if "D" not in launch.constants}) == (1 if split else 2)
    scans = [launch for launch in launches if launch.kernel == "_scan_kernel" and "tuned" not in launch.config]
    assert any(launch.constants.get("states_ptr", 0) is None for launch in scans)  # as the launchers pass them
    assert any(launch.options.get("maxnreg", 0) is None for launch in scans) or arch == 80
    for launch in scans:  # x' fits the memory of the codes
        itemsize = 4 if launch.signature["codes_ptr"] == "*fp32" else 2
        assert 2 * launch.constants["ROW_PITCH"] <= itemsize * launch.constants["D"]
    names = {launch.config.split()[0] for launch in scans}
    assert {tuple(launch.config.split()[:3:2]) for launch in scans if "/" not in launch.config} == {
        (name, dtype) for name in names for dtype in ("float32", "bfloat16", "float16")
    }
    for dtypes in ("bfloat16/float32", "float32/bfloat16"):
        assert {launch.config.split()[0] for launch in scans if dtypes in launch.config} == names - {"few_rows"}
    for dtype in ("float32", "bfloat16", "float16"):
        assert any(launch.config.endswith(f" {dtype} split") and launch.constants["RESIDENT"] for launch in scans)
    assert {launch.constants["D"] for launch in scans} >= {1, 16, 48, 64, 80, 96, 112, 128}
    for layout in ("unaligned", "transposed"):
        laid_out = {launch.config.split()[0] for launch in scans if layout in launch.config}
        assert laid_out >= {"few_rows", {80: "long_ampere", 90: "long_hopper", 100: "long_blackwell"}[arch]}
        assert any(launch.config.endswith(f"{layout} split") for launch in scans)
    for launch in launches:
        pointers = [kind for position, kind in enumerate(launch.signature) if position in launch.aligned]
        if "codebook_ptr" in launch.signature:
            assert ("codebook_ptr" in pointers) == ("misaligned" not in launch.config)
    few_rows = [launch.constants["SPLIT"] for launch in scans if launch.config.startswith("few_rows")]
    assert {*few_rows} == {True, False}


def test_the_configurations_that_are_tuned_are_collected():
    """benchmarks/gpu.py times them on a Hopper, each at every D that it serves."""
    assert [shape[:3] for shape in kernel_report._TUNED_SHAPES] == [*FULL.long]
    scans = [launch for launch in kernel_report.collect_launches(90) if launch.kernel == "_scan_kernel"]
    served = {
        (config.name, d) for config in CONFIGS for _, _, d in FULL.long if d <= config.block_d or not config.resident
    }
    assert {tuple(launch.config.split()[:3]) for launch in scans} >= {(name, f"D={d}", "float32") for name, d in served}


@pytest.mark.parametrize(
    ("arch", "config", "mma"),
    [
        (80, "long_ampere D=512 float32", "HMMA.16816.F32"),
        (90, "short_shared D=64 float32", "HGMMA.64x64x16.F32"),
        (90, "long_hopper D=512 float32", "HGMMA.64x128x16.F32"),
        (90, "few_rows D=512 float32 split", "HGMMA.64x64x16.F32"),
        (90, "medium D=50 float32", "HGMMA.64x64x16.F32"),
        (90, "medium D=128 float32", "HGMMA.64x64x16.F32"),
        (100, "few_rows D=512 float32 split", "UTCHMMA"),
    ],
)
def test_scans_use_the_matrix_units_copy_ahead_and_do_not_spill(arch: int, config: str, mma: str):
    launch = scan(arch, config)
    report = kernel_report.report_launch(launch)
    assert report["mma"] == mma
    assert report["spill_bytes"] == 0
    assert report["shared_bytes"] <= 227 * 1024
    assert (report["copies_ahead"] > 0) == (launch.options["num_stages"] > 2)
    if arch == 90:  # products run while another program folds its scores
        assert report["programs_per_multiprocessor"] >= 2


@pytest.mark.parametrize("kernel", ["_round_codes_kernel", "_finish_kernel"])
def test_atomics_order_no_other_access(kernel: str):
    """Nothing is published through them, so they need no fence."""
    launch = next(found for found in kernel_report.collect_launches(90) if found.kernel == kernel)
    ptx = kernel_report.compile_launch(launch).asm["ptx"]
    assert {*re.findall(r"\b(?:atom|red)\.global\.gpu\.(\w+)\.", ptx)} == {"relaxed"}


def test_a_line_and_the_exit_code(capsys: pytest.CaptureFixture[str]):
    assert kernel_report.main(["--arch", "90", "--jobs", "1", "--only", "_combine_kernel"]) == 0
    lines = capsys.readouterr().out.splitlines()
    keys = "kernel config arch registers spill_bytes stack_bytes shared_bytes mma copies_ahead products_pending"
    assert [list(json.loads(line)) for line in lines] == [[*keys.split(), "programs_per_multiprocessor"]] * len(lines)
    assert {json.loads(line)["mma"] for line in lines} == {None}


def test_a_spill_is_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kernel_report, "_STORE_WIDTHS", {"STG.E": 4})  # what every kernel has stands in for a spill
    monkeypatch.setattr(kernel_report, "ProcessPoolExecutor", _Here)
    assert kernel_report.main(["--arch", "90", "--only", "_combine_kernel"]) == 1
    assert "spills: _combine_kernel" in capsys.readouterr().err


def test_stages_without_copies_are_an_error(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    (launch, *_) = [found for found in kernel_report.collect_launches(90) if found.kernel == "_combine_kernel"]
    staged = dataclasses.replace(launch, options=launch.options | {"num_stages": 3})
    monkeypatch.setattr(kernel_report, "collect_launches", lambda arch: [staged])
    monkeypatch.setattr(kernel_report, "ProcessPoolExecutor", _Here)
    assert kernel_report.main(["--arch", "90"]) == 1
    assert "copies nothing ahead: _combine_kernel" in capsys.readouterr().err


class _Here:
    """A pool that works in this process, where the monkeypatch holds."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def __enter__(self) -> "_Here":
        return self

    def __exit__(self, *_: object) -> None: ...

    def submit(self, function, launch):
        from concurrent.futures import Future

        future: Future[object] = Future()
        future.set_result(function(launch))
        return future
