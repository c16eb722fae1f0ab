"""torch.compile without graph breaks and with dynamic shapes; torch.export with the search as one node."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import NearestCode, PreparedCodebook, nearest_code

pytestmark = [
    pytest.mark.usefixtures("_fresh_compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning:torch"),
]
plain_or_prepared = pytest.mark.parametrize(
    "made_of", [lambda codes: codes, PreparedCodebook.from_codebook], ids=["plain", "prepared"]
)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def assert_same(found: NearestCode, expected: NearestCode) -> None:
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)


def test_the_search_compiles_with_dynamic_shapes() -> None:
    compiled = torch.compile(
        lambda x, codebook: nearest_code(x, codebook), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for num_rows, num_codes in ((17, 5), (64, 33), (1, 1)):
        x, codebook = draw(num_rows, 6), draw(num_codes, 6, seed=1)
        for found, expected in zip(compiled(x, codebook), nearest_code(x, codebook), strict=True):
            assert torch.equal(found, expected)


@plain_or_prepared
@pytest.mark.parametrize("sizes", [((0, 5), (17, 5), (0, 33)), ((17, 5), (0, 5), (64, 33), (1, 1))])
def test_the_search_of_no_rows_compiles(
    made_of: Callable[[Tensor], Tensor | PreparedCodebook], sizes: tuple[tuple[int, int], ...]
) -> None:
    compiled = torch.compile(nearest_code, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_rows, num_codes in sizes:
        x, codebook = draw(num_rows, 6), made_of(draw(num_codes, 6, seed=1))
        assert_same(compiled(x, codebook), nearest_code(x, codebook))


@pytest.mark.parametrize("training", [True, False])
def test_the_module_compiles_and_keeps_its_gradients(training: bool) -> None:
    torch.manual_seed(0)
    eager = vector_quantizer(20, 6, init="data", restart_after=2, warn=False).train(training)
    compiled_module = vector_quantizer(20, 6, init="data", restart_after=2, warn=False).train(training)
    compiled_module.load_state_dict(eager.state_dict())
    compiled = torch.compile(compiled_module, fullgraph=True, dynamic=True, backend="aot_eager")
    for step in range(4):
        results = []
        for call, module in ((eager, eager), (compiled, compiled_module)):
            torch.manual_seed(step)
            x = draw(30 + step, 6, seed=step).requires_grad_()
            module.zero_grad()
            quantized, indices, loss = call(x)
            (quantized.square().sum() + loss).backward()
            results.append((indices, loss.detach(), x.grad, module.codebook.grad, module.steps_unused.clone()))
        for found, expected in zip(*results, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-7)


def test_the_module_exports_as_one_node() -> None:
    quantizer = vector_quantizer(20, 6).eval()
    program = torch.export.export(quantizer, (draw(8, 6),), dynamic_shapes=({0: torch.export.Dim("n", min=2)},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("vq_kernels.nearest_code.default") == 1
    x = draw(11, 6, seed=1)
    for found, expected in zip(program.module()(x), quantizer(x), strict=True):
        assert torch.equal(found, expected)


class Search(nn.Module):
    def __init__(self, codebook: Tensor | PreparedCodebook) -> None:
        super().__init__()
        self.codebook = codebook

    def forward(self, x: Tensor) -> NearestCode:
        return nearest_code(x, self.codebook)


@plain_or_prepared
def test_a_module_that_searches_exports_as_one_node(made_of: Callable[[Tensor], Tensor | PreparedCodebook]) -> None:
    search = Search(made_of(draw(20, 6, seed=1)))
    program = torch.export.export(search, (draw(8, 6),), dynamic_shapes=({0: torch.export.Dim("n", min=0)},))
    targets = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert targets.count("vq_kernels.nearest_code.default") == 1
    for num_rows in (11, 1, 0):
        x = draw(num_rows, 6, seed=2)
        assert_same(program.module()(x), search(x))
