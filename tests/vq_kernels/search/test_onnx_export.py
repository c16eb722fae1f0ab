"""ONNX export: onnxruntime returns the same indices as PyTorch, for batches of any size."""

import io
from collections.abc import Callable

import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from benchmarks.data import DATA_NAMES, make_search_data
from benchmarks.verification import wrong_rows
from tests.vq_kernels.plain import residual_quantizer, vector_quantizer
from vq_kernels import VectorQuantize, nearest_code
from vq_kernels.search import onnx_export

K, D = 130, 16  # two tiles of codes
N = 100

Run = Callable[..., list[Tensor]]


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=seeded(seed))


def export(module: nn.Module, *examples: Tensor, dynamic: int = 1) -> Run:
    """Load the exported module into onnxruntime. The first `dynamic` inputs may have any number of rows."""
    shapes = tuple({0: torch.export.Dim.DYNAMIC} if place < dynamic else None for place in range(len(examples)))
    program = torch.onnx.export(module.eval(), examples, dynamo=True, dynamic_shapes=shapes, verbose=False)
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    model = program.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    names = [each.name for each in session.get_inputs()]

    def run(*tensors: Tensor) -> list[Tensor]:
        inputs = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, inputs)]

    return run


class Search(nn.Module):
    def forward(self, x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        return nearest_code(x, codebook)


class HalfSearch(nn.Module):
    """float16 vectors and codes; bfloat16 vectors with float32 codes."""

    def forward(self, x: Tensor, codebook: Tensor) -> tuple[Tensor, ...]:
        half = nearest_code(x.half(), codebook.half())
        mixed = nearest_code(x.bfloat16(), codebook)
        return half.indices, half.codes, mixed.indices, mixed.codes.float()


@pytest.fixture(scope="module")
def search() -> Run:
    return export(Search(), draw(5, D), draw(K, D))


def check(run: Run, x: Tensor, codebook: Tensor) -> None:
    indices, codes, sq_distances = run(x, codebook)
    expected = nearest_code(x, codebook, backend="torch")  # ties within float64's rounding are decided alike
    assert torch.equal(indices, expected.indices)
    torch.testing.assert_close(codes, expected.codes, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(sq_distances, expected.sq_distances, rtol=1e-5, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", DATA_NAMES)
def test_every_data_set(search: Run, name: str) -> None:
    x, codebook = make_search_data(name, N, K, D, dtype=torch.float32, seed=3)
    check(search, x, codebook)


@pytest.mark.parametrize("num_rows", [0, 1, 7, 1000])
def test_batches_of_any_size(search: Run, num_rows: int) -> None:
    check(search, draw(num_rows, D), draw(K, D, seed=1))


@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_offsets_far_beyond_the_spread(search: Run, offset: float) -> None:
    check(search, draw(N, D) + offset, draw(K, D, seed=1) + offset)
    check(search, draw(N, D) + offset, draw(K, D, seed=1))


@pytest.mark.parametrize("scale", [1e-42, 1e-30, 1e30, 1e37])
def test_scales_across_the_range_of_float32(search: Run, scale: float) -> None:
    check(search, scale * draw(N, D), scale * draw(K, D, seed=1))
    check(search, scale * draw(N, D), draw(K, D, seed=1))


def last_bit_codes() -> Tensor:
    """Codes that differ in the last bits of their entries."""
    steps = torch.randint(-2, 3, (K, D), generator=seeded(1)) * 2.0**-10  # an ulp of numbers above 8192
    return 1e4 + steps


def test_codes_that_differ_in_the_last_bit(search: Run) -> None:
    codebook = last_bit_codes()
    x = codebook[torch.randint(K, (N,), generator=seeded(2))].clone()
    x[:, 3] += 2.0**-10
    check(search, x, codebook)


def test_identical_codes_give_the_lowest_index(search: Run) -> None:
    codebook = draw(K, D)
    codebook[K // 2 :] = codebook[: K // 2].clone()
    indices = search(codebook, codebook)[0]
    assert torch.equal(indices, torch.arange(K) % (K // 2))
    check(search, draw(N, D, seed=1), codebook)
    check(search, draw(N, D, seed=1), codebook[:1].expand(K, D).contiguous())


def test_small_integers_tie_and_the_lowest_index_wins(search: Run) -> None:
    x, codebook = (torch.randint(-1, 2, (n, D), generator=seeded(n)).float() for n in (N, K))
    check(search, x, codebook)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, -torch.inf])
def test_nan_and_inf(search: Run, poison: float) -> None:
    x, codebook = draw(N, D), draw(K, D, seed=1)
    x[::3, 5] = poison
    codebook[:4, 2] = poison
    codebook[129, 0] = poison
    check(search, x, codebook)
    codebook[:, 3] = poison
    check(search, x, codebook)  # no finite code
    codebook[77] = 1e30
    check(search, x, codebook)  # a single finite code


def test_half_precision() -> None:
    run = export(HalfSearch(), draw(5, D), draw(K, D))
    for offset in (0, 100):
        x, codebook = draw(N, D) + offset, draw(K, D, seed=1) + offset
        for found, expected in zip(run(x, codebook), HalfSearch()(x, codebook), strict=True):
            assert torch.equal(found, expected)


def test_only_uncertified_rows_are_exhaustive() -> None:
    x, codebook = draw(N, D) + 100, draw(K, D, seed=1) + 100
    assert onnx_export.search(x, codebook)[3].tolist() == [N, 0, 0]
    codebook[1:4] = codebook[0]
    x[:7] = codebook[0] + 0.1 * draw(7, D)
    assert onnx_export.search(x, codebook)[3].tolist() == [N - 7, 0, 7]


def test_scores_that_rounding_orders_wrongly(search: Run) -> None:
    """Codes that differ in the last bit, and a far one that moves the mean, so that scores are rounded to 1e-13."""
    bits = 2.0**-23 * torch.randint(-4, 5, (K + N, D), generator=seeded())
    codebook, x = 1 + bits[:K], 1 + bits[K:]
    codebook[0] = 1000
    best, certified = onnx_export._scan_tiles(x.double(), codebook.double(), torch.ones(K, dtype=torch.bool))
    assert wrong_rows(x, codebook, best).sum() > N // 10, "the attack must mislead scores"
    assert not certified.any()
    check(search, x, codebook)


@pytest.mark.parametrize("kind", ["cosine", "images", "residual"])
def test_quantizers_with_a_mask(kind: str) -> None:
    torch.manual_seed(0)
    module: nn.Module
    shape, positions = (5, D), (5,)
    if kind == "cosine":
        module = vector_quantizer(K, D, metric="cosine")
    elif kind == "residual":
        module = residual_quantizer(2, 20, D)
    else:
        module = vector_quantizer(20, 8, heads=2, separate_codebooks=True, channel_dim=1, commitment_weight=0.25)
        shape, positions = (16, 4, 5), (4, 5)
    run = export(module, draw(3, *shape), torch.ones(3, *positions, dtype=torch.bool), dynamic=2)
    for batch_size in (1, 9):
        x, mask = draw(batch_size, *shape, seed=batch_size), draw(batch_size, *positions) < 0.5
        quantized, indices, loss = run(x, mask)
        expected = module(x, mask)
        assert torch.equal(indices, expected.indices)
        assert kind == "cosine" or torch.equal(quantized, expected.quantized)
        torch.testing.assert_close(quantized, expected.quantized)  # both round the unit vectors
        torch.testing.assert_close(loss, expected.loss)


class TwoLayers(nn.Module):
    """Two layers for images with a projection; one has heads and the cosine metric."""

    def __init__(self) -> None:
        super().__init__()
        options = {"dim": 12, "codebook_dim": 6, "codebook_size": 20, "accept_image_fmap": True}
        self.one, self.other = VectorQuantize(**options), VectorQuantize(**options, heads=2, use_cosine_sim=True)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        return *self.one(x), *self.other(x)


def test_vector_quantize_layers() -> None:
    torch.manual_seed(0)
    layers = TwoLayers()
    run = export(layers, draw(3, 12, 4, 5))
    for batch_size in (1, 9):
        x = draw(batch_size, 12, 4, 5, seed=batch_size)
        for found, expected in zip(run(x), layers(x), strict=True):
            torch.testing.assert_close(found, expected)  # integers have to be equal


def test_a_captured_program_can_replace_the_operator() -> None:
    operator = torch.ops.vq_kernels.nearest_code.default
    program = torch.export.export(
        vector_quantizer(K, D).eval(), (draw(5, D),), dynamic_shapes=({0: torch.export.Dim.DYNAMIC},)
    )
    replaced = program.run_decompositions({operator: lambda x, codes, *_: onnx_export.search(x, codes)})
    targets = [[node.target for node in each.graph.nodes] for each in (program, replaced)]
    assert operator in targets[0]
    assert operator not in targets[1]
    assert targets[1].count(torch.ops.higher_order.scan) == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::torch.jit.TracerWarning")  # of the old exporter
def test_torchscript_export_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"dynamo must be True to export a search by torch\.onnx\.export, got False"):
        torch.onnx.export(vector_quantizer(K, D).eval(), (draw(5, D),), io.BytesIO(), dynamo=False)
