"""Compares the quantizers of codecs in transformers with and without `vq_kernels.compat.transformers.patch`.

    python benchmarks/codecs.py --out results/codecs.jsonl

Each quantizer has the sizes of its published model and normally distributed codes. It counts the indices that differ
from float64 brute force, stage by stage for the same rows, in float32 and bfloat16, and times `encode` of 1 and 100
frames in float32, both in turn. If an index of the patched quantizer is wrong, nothing is timed and the exit status is
1. It prints JSON lines, such as

    {"op": "encode", "codec": "EnCodec", "ours_wrong_bfloat16": 0, "theirs_wrong_bfloat16": 164, "frames": 1, ...}
"""

import copy
import json
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run as a file: import the package from the checkout

import torch
import tyro
from torch import Tensor
from torch.nn import functional as F
from transformers import DacConfig, EncodecConfig, MimiConfig
from transformers.models.dac.modeling_dac import DacResidualVectorQuantizer
from transformers.models.encodec.modeling_encodec import EncodecResidualVectorQuantizer
from transformers.models.mimi.modeling_mimi import MimiResidualVectorQuantizer

from benchmarks.quantizer_step import compare
from benchmarks.results import Row, append_row, environment
from vq_kernels.compat.transformers import patch
from vq_kernels.search.reference import brute_force_nearest

CODECS: dict[str, tuple[Any, Any]] = {
    "EnCodec": (EncodecResidualVectorQuantizer, EncodecConfig(target_bandwidths=[24.0])),
    "Mimi": (MimiResidualVectorQuantizer, MimiConfig(num_quantizers=32)),
    "DAC": (DacResidualVectorQuantizer, DacConfig()),
}


@dataclass(frozen=True)
class Options:
    """Compare the time and the indices of quantizers of transformers with and without the exact search."""

    codecs: tuple[str, ...] = tuple(CODECS)
    """Which codecs."""
    frames: tuple[int, ...] = (1, 100)
    """Numbers of frames to time."""
    checked: int = 100
    """Rows whose indices are checked in each stage."""
    turns: int = 20
    """Timed calls of each."""
    out: Path | None = None
    """Append the JSON lines to this file too."""


@torch.no_grad()
def run(options: Options) -> list[Row]:
    """Returns the rows of all codecs."""
    device, rows = torch.device("cpu"), []
    for codec in options.codecs:
        theirs = make(codec)
        ours = copy.deepcopy(theirs)
        stages = list(patch(ours))
        wrong = {}
        for dtype in (torch.float32, torch.bfloat16):
            for side, module in (("ours", ours), ("theirs", theirs)):
                wide = copy.deepcopy(module).to(dtype)
                each = (num_wrong(wide.get_submodule(stage), options.checked) for stage in stages)
                wrong[f"{side}_wrong_{str(dtype).removeprefix('torch.')}"] = sum(each)
        status = "ok" if not any(count for name, count in wrong.items() if name.startswith("ours")) else "WRONG"
        row = {"op": "encode", "codec": codec, "status": status, "stages": len(stages), **environment(device)}
        row |= {"checked_rows": options.checked * len(stages), **wrong}
        for frames in options.frames if status == "ok" else ():
            x = draw(1, num_channels(theirs), frames)
            calls = [partial(encode, module, x) for module in (ours, theirs)]
            for call in calls:
                call()
            rows.append(row | {"frames": frames} | compare(calls[0], calls[1], options.turns, device))
        if status != "ok":
            rows.append(row)
    return rows


def draw(*shape: int) -> Tensor:
    """Normally distributed numbers, the same in every call."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def make(codec: str) -> Any:
    """Returns the quantizer of a codec, with normally distributed codes."""
    quantizer_class, config = CODECS[codec]
    torch.manual_seed(0)
    quantizer = quantizer_class(config).eval()
    for key, tensor in quantizer.state_dict().items():
        if "embed" in key or "codebook.weight" in key:
            tensor.normal_()
    return quantizer


def encode(quantizer: Any, x: Tensor) -> Any:
    """Quantizes x [1, D, frames]."""
    return quantizer.encode(x) if hasattr(quantizer, "encode") else quantizer(x)


def num_channels(quantizer: Any) -> int:
    """Returns D of the input."""
    if hasattr(quantizer, "quantizers"):
        return int(quantizer.quantizers[0].in_proj.in_channels)
    projection = getattr(quantizer, "input_proj", None)
    return int(quantizer.layers[0].codebook.embed.shape[1] if projection is None else projection.in_channels)


def num_wrong(stage: Any, num_rows: int) -> int:
    """Counts the wrong indices of a stage for random rows, in its own dtype."""
    if hasattr(stage, "embed"):
        x = draw(num_rows, stage.embed.shape[1]).to(stage.embed.dtype)
        return int((stage.quantize(x) != brute_force_nearest(x, stage.embed)).sum())
    weight = stage.codebook.weight
    x = draw(num_rows, weight.shape[1]).to(weight.dtype)
    nearest = brute_force_nearest(F.normalize(x), F.normalize(weight))
    return int((stage.decode_latents(x.t()[None])[1][0] != nearest).sum())


def main(options: Options) -> int:
    """Prints the lines and returns the exit status."""
    rows = run(options)
    for row in rows:
        print(json.dumps(row))
        if options.out is not None:
            append_row(options.out, row)
    return 0 if all(row["status"] == "ok" for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Options, prog="python benchmarks/codecs.py", description=__doc__)))
