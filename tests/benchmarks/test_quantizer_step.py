"""The quantizer's benchmark, in small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import quantizer_step
from benchmarks.quantizer_step import Options
from vq_kernels import compat

SMALL = {"batch": 2, "length": 20, "dim": 8, "num_codes": 30, "turns": 3}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"layer": "ResidualVQ", "num_quantizers": 3},
        {"layer": "GroupedResidualVQ", "num_quantizers": 3, "groups": 2},
        {"layer": "SimVQ"},
        {"layer": "ResidualSimVQ", "num_quantizers": 3},
    ],
)
def test_it_prints_the_ratios_beside_theirs(
    options: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "line.jsonl"
    assert quantizer_step.main(Options(**SMALL, **options, out=out)) == 0
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert json.loads(out.read_text()) == line
    assert (line["status"], line["wrong_rows"]) == ("ok", 0)
    assert line["checked_rows"] == -(-40 // (line["num_quantizers"] * line["groups"]))
    assert "vector-quantize-pytorch 1.32.0" in line["versions"]
    assert line["time_ratio"] == sorted(line["time_ratios"])[1]
    assert min(line["ours_ms"], line["theirs_ms"]) > 0
    assert min(line["ours_peak_mib"], line["theirs_peak_mib"]) >= 0


def test_a_step_holds_less_than_a_distance_for_each_pair() -> None:
    line = quantizer_step.run(Options(batch=2, length=1000, dim=8, num_codes=4000, turns=1))
    pairs_mib = 4 * 2000 * 4000 / 2**20
    assert line["theirs_peak_mib"] > pairs_mib
    assert line["ours_peak_mib"] < pairs_mib


@pytest.mark.parametrize("part", ["indices", "loss", "gradient"])
@pytest.mark.parametrize("layer", ["VectorQuantize", "ResidualVQ"])
def test_a_wrong_answer_is_not_timed(layer: str, part: str, monkeypatch: pytest.MonkeyPatch) -> None:
    right_step = quantizer_step.Stepper.step

    def wrong_step(stepper: quantizer_step.Stepper) -> quantizer_step.Answer:
        answer = right_step(stepper)
        if isinstance(stepper.layer, getattr(compat, layer)):
            changed = answer._replace(**{part: getattr(answer, part) + 1})
            return changed._replace(indices=changed.indices % SMALL["num_codes"])
        return answer

    monkeypatch.setattr(quantizer_step.Stepper, "step", wrong_step)
    options = Options(layer=layer, **SMALL)  # type: ignore[arg-type]
    assert quantizer_step.main(options) == 1
    line = quantizer_step.run(options)
    assert line["status"] == "WRONG"
    assert "time_ratio" not in line
    assert (line["wrong_rows"] > 0) == (part == "indices")


def test_it_times_the_whole_step() -> None:
    ours, theirs = quantizer_step.make_pair(Options(**SMALL), torch.device("cpu"))
    for stepper in (ours, theirs):
        before = stepper.layer.codebook.clone()
        assert stepper.step().gradient.any()
        assert not torch.equal(stepper.layer.codebook, before)
