"""torch.export, then save, load and run: the same results, in the same types, for every module and function."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from vq_kernels import (
    ResidualVectorQuantizer,
    VectorQuantize,
    VectorQuantizer,
    most_similar_code,
    nearest_code,
    nearest_code_topk,
    vector_quantize,
)

MODULES: dict[str, Callable[[], nn.Module]] = {
    "averages": lambda: VectorQuantizer(20, 6),
    "learnable": lambda: VectorQuantizer(20, 6, ema_decay=None),
    "k-means": lambda: VectorQuantizer(20, 6, init="kmeans"),
    "cosine, heads": lambda: VectorQuantizer(20, 3, metric="cosine", heads=2, separate_codebooks=True),
    "residual": lambda: ResidualVectorQuantizer(3, 20, 6, quantizer_dropout=0.5),
    "drop-in": lambda: VectorQuantize(6, 20, threshold_ema_dead_code=2),
    "drop-in, cosine": lambda: VectorQuantize(6, 20, use_cosine_sim=True, codebook_dim=3, heads=2),
    "drop-in, learnable": lambda: VectorQuantize(6, 20, learnable_codebook=True, ema_update=False),
    "drop-in, k-means": lambda: VectorQuantize(6, 20, kmeans_init=True),
    "drop-in, learnable, k-means": lambda: VectorQuantize(
        6, 20, kmeans_init=True, learnable_codebook=True, ema_update=False
    ),
}
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "nearest_code": nearest_code,
    "nearest_code_topk": lambda x, codebook: nearest_code_topk(x, codebook, 3),
    "most_similar_code": most_similar_code,
    "vector_quantize": vector_quantize,
}
STRICT = ("averages", "drop-in, k-means")
ROWS = {0: torch.export.Dim("rows", min=2)}

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")


class Called(nn.Module):
    """A module that makes a call, with its parts as its own."""

    def __init__(self, call: Callable[..., Any], *modules: nn.Module) -> None:
        super().__init__()
        self.call, self.parts = call, nn.ModuleList(modules)

    def forward(self, *inputs: Tensor) -> Any:
        return self.call(*inputs)


def draw(num_rows: int, seed: int = 0) -> Tensor:
    return torch.randn(num_rows, 6, generator=torch.Generator().manual_seed(seed))


def make(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODULES[name]()


def saved(program: torch.export.ExportedProgram, folder: Path) -> nn.Module:
    torch.export.save(program, folder / "program.pt2")
    return torch.export.load(folder / "program.pt2").module()


def assert_same(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    for part, wanted in zip(found, expected, strict=True):
        if isinstance(wanted, tuple):
            assert_same(part, wanted)
        elif wanted.dtype == torch.int64:
            assert torch.equal(part, wanted)
        else:
            torch.testing.assert_close(part, wanted)


@pytest.mark.parametrize(("name", "strict"), [*((name, False) for name in MODULES), *((name, True) for name in STRICT)])
@pytest.mark.usefixtures("_fresh_compiler")
def test_a_saved_module_gives_the_same(name: str, strict: bool, tmp_path: Path) -> None:
    module = make(name)
    module(draw(30))
    module.eval()
    loaded = saved(torch.export.export(module, (draw(30),), dynamic_shapes=(ROWS,), strict=strict), tmp_path)
    assert_same(loaded(draw(50, seed=1)), module(draw(50, seed=1)))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_saved_function_gives_the_same(name: str, tmp_path: Path) -> None:
    inputs = draw(30), draw(20, seed=1)
    program = torch.export.export(Called(FUNCTIONS[name]), inputs)
    assert_same(saved(program, tmp_path)(*inputs), FUNCTIONS[name](*inputs))


def test_the_other_results_of_modules_can_be_saved(tmp_path: Path) -> None:
    quantizer, layer = VectorQuantizer(20, 6, init="normal").eval(), VectorQuantize(6, 20).eval()

    def call(x: Tensor) -> Any:
        return quantizer.topk(x, 2), quantizer.encode(x), layer(x, return_loss_breakdown=True)[3]

    program = torch.export.export(Called(call, quantizer, layer), (draw(30),))
    assert_same(saved(program, tmp_path)(draw(30)), call(draw(30)))


def test_another_process_loads_and_runs(tmp_path: Path) -> None:
    module = VectorQuantizer(20, 6, init="normal").eval()
    torch.export.save(torch.export.export(module, (draw(30),)), tmp_path / "program.pt2")
    torch.save(draw(30), tmp_path / "x.pt")
    script = (
        "import torch, vq_kernels; result = torch.export.load('program.pt2').module()(torch.load('x.pt'));"
        "assert type(result) is vq_kernels.Quantized; torch.save(result.indices, 'indices.pt')"
    )
    environment = {"PYTHONPATH": ":".join(path for path in sys.path if path)}
    subprocess.run([sys.executable, "-W", "ignore", "-c", script], cwd=tmp_path, env=environment, check=True)
    assert torch.equal(torch.load(tmp_path / "indices.pt"), module(draw(30)).indices)


@pytest.mark.parametrize("name", ["drop-in, k-means", "drop-in, learnable, k-means"])
def test_a_layer_that_was_exported_before_k_means_says_so(name: str, tmp_path: Path) -> None:
    module = make(name).eval()
    loaded = saved(torch.export.export(module, (draw(30),)), tmp_path)
    with pytest.raises(RuntimeError, match="before k-means; call it on a batch"):
        loaded(draw(30))
    assert not module._codebook.initted


@pytest.mark.parametrize("name", ["averages", "drop-in, k-means"])
def test_a_saved_module_in_training_mode_trains_like_the_original(name: str, tmp_path: Path) -> None:
    module = make(name)
    loaded = saved(torch.export.export(module, (draw(30),)).run_decompositions({}), tmp_path)
    results = []
    for each in (loaded, module):
        torch.manual_seed(1)
        results.append([each(draw(30, seed=step)) for step in range(3)])
    for found, expected in zip(*results, strict=True):
        assert_same(found, expected)
    state = loaded.state_dict()
    for key, value in module.state_dict().items():
        torch.testing.assert_close(state[key], value)
