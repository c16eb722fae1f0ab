"""A captured training step gives the numbers of the eager one, and never waits for the device.

Without a GPU, `RecordedGraph` takes the place of a CUDA graph: it too repeats operators on the same memory.
"""

import logging
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vq_kernels.modules import training_step
from vqae.config import Config
from vqae.model.encoder import FEATURE_DIM
from vqae.model.vqae import build_model
from vqae.runtime.process import SignalHandler
from vqae.training import captured_step
from vqae.training.captured_step import CudaGraph
from vqae.training.trainer import Trainer

CASES: dict[str, dict[str, Any]] = {
    "default": {},
    "unfrozen": {"unfreeze_encoder_at": 0.4, "codebook_step": "plain", "weight_decay": 0.1},
    "residual": {"num_quantizers": 2, "codebook_init": "data", "embedding_norm": "batch", "amp": True},
}
STEPS = 24


class RecordedGraph(TorchDispatchMode):
    """The operators of a function, which are called again on the same tensors.

    It refuses those that read data on the host, which a CUDA graph cannot capture.
    """

    captures = 0

    def __init__(self, function: Callable[[], None], _device: torch.device) -> None:
        super().__init__()
        self.function = function
        self.calls: list[tuple[Any, Any, Any, Any]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        reads = torch.Tag.data_dependent_output in func.tags
        reads |= torch.Tag.dynamic_output_shape in func.tags and func is not torch.ops.aten.index.Tensor
        masks = func is torch.ops.aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if reads or masks:
            raise RuntimeError(f"{func} waits for the device")
        result = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, result))
        return result

    def warm_up(self) -> list[str]:
        self.function()
        return []

    def capture(self) -> Callable[[], None]:
        with self:  # recording runs the step, so the first replay does not
            self.function()
        RecordedGraph.captures += 1
        replays = iter([lambda: None])
        return lambda: next(replays, self.replay)()

    @torch.inference_mode()
    def replay(self) -> None:
        for func, args, kwargs, recorded in self.calls:
            for old, new in zip(tree_leaves(recorded), tree_leaves(func(*args, **kwargs)), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():  # neither a view nor changed in place
                    old.copy_(new)


@pytest.fixture
def recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captured_step, "CudaGraph", RecordedGraph)
    monkeypatch.setattr(RecordedGraph, "captures", 0)
    monkeypatch.setattr(training_step, "is_readable", lambda _tensor: False)  # as on CUDA


def trained(folder: Path, device: str = "cpu", **options: Any) -> Trainer:
    """After 24 steps of two epochs."""
    sizes: dict[str, Any] = {"num_codes": 16, "code_dim": 8, "hidden_dims": (16,), "batch_size": 4, "epochs": 2}
    config = Config(out=folder, restart_after=8, **sizes, **options)
    images = torch.randint(256, (2 * STEPS, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(0)
    model = build_model(config, (8, 8))
    model.encoder.features = nn.Sequential(nn.Conv2d(3, FEATURE_DIM, 8), nn.BatchNorm2d(FEATURE_DIM), nn.Flatten())
    model = model.to(device)
    trainer = Trainer(config, model, images, images[:0], images[:1], "noise", torch.device(device), SignalHandler())
    for epoch in range(2):
        trainer.epoch, trainer.step = epoch, 0
        trainer.train_steps(trainer.steps_per_epoch)
    trainer.reporter.close()
    return trainer


def assert_same(one: Trainer, other: Trainer) -> None:
    assert one.losses.means() == other.losses.means()
    states = [trainer.model.state_dict() for trainer in (one, other)]
    for trainer, state in zip((one, other), states, strict=True):
        momenta = trainer.optimizer.state_dict()["state"]
        state.update({str(number): momentum["momentum_buffer"] for number, momentum in momenta.items()})
    assert states[0].keys() == states[1].keys()
    assert not [name for name, value in states[0].items() if not torch.equal(value, states[1][name])]
    assert one.model.quantizer.restarts > 16


@pytest.mark.parametrize("case", CASES)
def test_replayed_steps_give_the_numbers_of_eager_ones(
    case: str, recorded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    eager = trained(tmp_path, **CASES[case])
    monkeypatch.setattr(Trainer, "_captures", lambda _trainer: True)
    assert_same(eager, trained(tmp_path, **CASES[case]))
    assert RecordedGraph.captures == (2 if case == "unfrozen" else 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("case", CASES)
def test_a_cuda_graph_gives_the_numbers_of_eager_steps(
    case: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    try:
        with caplog.at_level(logging.INFO, "vqae"):
            captured = trained(tmp_path, "cuda", **CASES[case])
        assert not caplog.text
        assert_same(trained(tmp_path, "cuda", cuda_graph=False, **CASES[case]), captured)
    finally:
        torch.use_deterministic_algorithms(False)


def test_a_step_that_waits_for_the_device_is_not_captured(
    recorded: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    eager = trained(tmp_path)
    monkeypatch.setattr(Trainer, "_captures", lambda _trainer: True)
    warm_up = RecordedGraph.warm_up
    monkeypatch.setattr(RecordedGraph, "warm_up", lambda graph: [*warm_up(graph), "called item"])
    with caplog.at_level(logging.INFO, "vqae"):
        assert_same(eager, trained(tmp_path))
    assert RecordedGraph.captures == 0
    reason = "it waits for the device (called item)"
    assert caplog.messages == [f"the training step is not captured as a CUDA graph: {reason}"]


def test_a_warm_up_tells_waiting_from_other_warnings(monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []

    def set_mode(mode: str) -> None:
        modes.append(mode)
        warnings.warn("Synchronization debug mode is a prototype feature", stacklevel=1)

    def step() -> None:
        warnings.warn("called a synchronizing CUDA operation", stacklevel=1)
        warnings.warn("another", stacklevel=1)

    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", set_mode)
    for name in ("Stream", "current_stream", "stream"):
        monkeypatch.setattr(torch.cuda, name, mock.MagicMock())
    with pytest.warns(UserWarning, match="another") as warned:
        assert CudaGraph(step, torch.device("cuda")).warm_up() == ["called a synchronizing CUDA operation"]
    assert len(warned) == 1
    assert modes == ["warn", "default"]


@pytest.mark.parametrize(
    ("options", "message"), [({"compile": True}, "because of --compile"), ({"cuda_graph": False}, ""), ({}, None)]
)
def test_what_forbids_capture_is_named(
    options: dict[str, Any], message: str | None, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = object.__new__(Trainer)
    trainer.config, trainer.device = Config(out=tmp_path, **options), torch.device("cuda")
    with caplog.at_level(logging.INFO, "vqae"):
        assert trainer._captures() == (message is None)
    assert (message or "") in caplog.text
    assert len(caplog.messages) == bool(message)
