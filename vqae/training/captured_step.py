"""The training step on static buffers, which CUDA captures as a graph."""

import logging
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

_WARM_UP_STEPS = 3  # in which kernels compile, and the optimizer creates its state

_logger = logging.getLogger(__name__)


class CapturedStep:
    """A training step that is captured as a CUDA graph after its first calls, and replayed from then on.

    A graph repeats the kernels that it captured, on the same memory. So the step reads what changes between calls, the
    images and the learning rates, from tensors that each call fills. The first calls run eagerly. If they wait for the
    device, which a graph cannot capture, all calls do, and a line says why. Without `capture`, all calls run eagerly.

    Args:
        update: maps images [B, 3, H, W] to losses: forward, backward and `optimizer.step()`.
        optimizer: reads learning rates from tensors, without waiting for the device; SGD does if it is fused.
        device: of the images and the model.
        capture: whether to capture, which needs CUDA.
    """

    def __init__(
        self,
        update: Callable[[Tensor], Tensor],
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        *,
        capture: bool,
    ) -> None:
        self._update, self._optimizer = update, optimizer
        self._lrs = [torch.zeros((), device=device) for _ in optimizer.param_groups]
        self._images = self._losses = torch.empty(0)
        self._graph = CudaGraph(self._run, device) if capture else None
        self._warm_up_steps = 0
        self._replay: Callable[[], None] = self._run

    def __call__(self, images: Tensor) -> Tensor:
        """Run a step on images, of the same shape in each call. The next call overwrites the losses."""
        if not self._images.numel():
            self._images = torch.empty_like(images)
        self._images.copy_(images)
        for lr, group in zip(self._lrs, self._optimizer.param_groups, strict=True):
            lr.fill_(group["lr"])
        if self._graph is not None and self._warm_up_steps < _WARM_UP_STEPS:
            self._warm_up(self._graph)
            return self._losses
        if self._graph is not None:
            self._replay, self._graph = self._graph.capture(), None
        self._replay()
        return self._losses

    def _warm_up(self, graph: "CudaGraph") -> None:
        waits = graph.warm_up()
        self._warm_up_steps += 1
        if waits and self._warm_up_steps == _WARM_UP_STEPS:
            _logger.info("the training step is not captured as a CUDA graph: it waits for the device (%s)", waits[0])
            self._graph = None

    def _run(self) -> None:
        """Run the step on the buffers. Outside of it the learning rates are floats, as checkpoints hold them."""
        groups = self._optimizer.param_groups
        floats = [group["lr"] for group in groups]
        try:
            for group, lr in zip(groups, self._lrs, strict=True):
                group["lr"] = lr
            self._losses = self._update(self._images)
        finally:
            for group, value in zip(groups, floats, strict=True):
                group["lr"] = value


class CudaGraph:
    """Warms up and captures a function, on a stream of its own."""

    def __init__(self, function: Callable[[], None], device: torch.device) -> None:
        self._function = function
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def warm_up(self) -> list[str]:
        """Call the function. Returns the warnings of CUDA operations that waited for the device."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with warnings.catch_warnings(record=True) as caught, torch.cuda.stream(self._stream):
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")  # which warns that it is a prototype
            try:
                self._function()
            finally:
                torch.cuda.set_sync_debug_mode("default")
        current.wait_stream(self._stream)
        waits = [str(warning.message) for warning in caught if "synchronizing CUDA" in str(warning.message)]
        for warning in caught:
            if str(warning.message) not in waits and "Synchronization debug mode" not in str(warning.message):
                warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)
        return waits

    def capture(self) -> Callable[[], None]:
        """Capture the function, which does not run it. Returns what runs it."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self._stream):
            self._function()
        return graph.replay
