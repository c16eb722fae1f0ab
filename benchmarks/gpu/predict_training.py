"""What a step of training should take on an H200, said before one was run: results/training_predictions.jsonl.

    PYTHONPATH=.:benchmarks python -m gpu.predict_training > benchmarks/results/training_predictions.jsonl

One step each, of 256 pictures, is taken on the CPU and counted: the operations of its products, the bytes that its
operators read and write, and how many operators launch something. Three times come of that:

    operations   convolutions at TF32's published rate, which PyTorch takes for them, the other products at float32's
    bytes        every operator reads what it is given and writes what it returns, at the memory's published rate
    host         the launches, each with what Python, autograd and the driver do for it

A GPU works off what the host launches, so `low` is the greatest of the three with 4 µs a launch; `high` is the greater
of operations + bytes and the host's with 8 µs. The microseconds are assumptions. What the trainer does between steps is
not counted: the schedule, the next batch, the watch over the losses. The plain model's pictures come from a
DataLoader: with 8 workers and 50 µs a picture, an assumption too, 160,000 a second at most.
"""

import json
import sys
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from gpu.floors import PUBLISHED
from gpu.plain_model import PlainTraining
from gpu.predict import H200, MADE, launches
from gpu.results import Line, make_header
from gpu.training import our_step
from vq_kernels.search.triton.plan import pick_config, plan_search
from vqae.config import Config

_HOST_US = (4.0, 8.0)  # a launch
_TF32_TFLOPS, _FLOAT32_TFLOPS = 494.0, 67.0
_CONVOLUTIONS = ("convolution", "convolution_backward")
_ALLOCATIONS = ("empty", "new_empty", "empty_like", "new_empty_strided")


class _Counted(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Operators that launch something, and the bytes that they read and write."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.launches, self.nbytes = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        returned = func._schema.returns
        is_view = bool(returned) and all(one.alias_info and not one.alias_info.is_write for one in returned)
        name = func._schema.name.partition("::")[2]
        if returned and not is_view and name not in _ALLOCATIONS and func.namespace != "profiler":
            self.launches += 1
            self.nbytes += sum(tensor.nbytes for tensor in _tensors([args, made]))
        return made


def _tensors(values: Any) -> list[Tensor]:
    if isinstance(values, Tensor):
        return [values]
    return [tensor for value in values for tensor in _tensors(value)] if isinstance(values, list | tuple) else []


def predict(name: str, step: Callable[[], None], batch_size: int, more_launches: int = 0) -> Line:
    """The line of a model, by its step, which has run before."""
    with _Counted() as counted:
        step()
    with FlopCounterMode(display=False) as flops:
        step()
    by_operator = {str(one).partition(".")[2]: count for one, count in flops.get_flop_counts()["Global"].items()}
    convolutions = sum(count for one, count in by_operator.items() if one in _CONVOLUTIONS)
    others = sum(by_operator.values()) - convolutions
    operations_ms = 1e-9 * (convolutions / _TF32_TFLOPS + others / _FLOAT32_TFLOPS)
    bytes_ms = 1e-9 * counted.nbytes / PUBLISHED["h200"].memory_tbs
    launched = counted.launches + more_launches
    low_host_ms, high_host_ms = (1e-3 * us * launched for us in _HOST_US)
    low_ms = max(operations_ms, bytes_ms, low_host_ms)
    high_ms = max(operations_ms + bytes_ms, high_host_ms)
    return {
        "model": name, "batch_size": batch_size, "operations_ms": operations_ms, "bytes_ms": bytes_ms,
        "launches": launched, "low_ms": low_ms, "high_ms": high_ms,
    }  # fmt: skip


def main() -> int:
    """Print a line a model."""
    config = Config()
    torch.manual_seed(0)
    batch = torch.randn(config.batch_size, 3, 32, 32)
    shape = (config.batch_size, config.num_codes, config.code_dim)
    tiles = pick_config(*shape, torch.float32, H200)
    search = launches(shape[0], plan_search(*shape, tiles, H200)) - 1  # an operator on the CPU
    plain = PlainTraining(config, torch.zeros(2, 3, 32, 32, dtype=torch.uint8), batch.device)
    made = {name: entry for name, entry in make_header(("vqae", "vq_kernels"), None, True).items() if name in MADE}
    for name, step, more in (
        ("this library, encoder at rest", our_step(config, batch, amp=False, rests=True), search),
        ("this library, encoder learning", our_step(config, batch, amp=False), search),
        ("plain", lambda: plain.step(batch), 0),
    ):
        # As on a GPU, where one launch steps many parameters.
        with mock.patch("torch.optim.sgd._default_to_fused_or_foreach", return_value=(False, True)):
            step()  # makes the optimiser's state
            line = predict(name, step, config.batch_size, more)
        print(json.dumps({**line, **made}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
