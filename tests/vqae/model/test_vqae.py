"""The auto-encoder: its gradients against formulas written out, its shapes, and what is made of it afterwards."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.vq_kernels.plain import vector_quantizer
from vq_kernels import nearest_code
from vqae import VQAE
from vqae.config import Config
from vqae.model.vqae import build_model
from vqae.training.checkpoint import save_checkpoint

NUM_CODES, BATCH = 16, 8


def build(image_size: tuple[int, int] = (32, 32), code_dim: int = 512, norm: str = "batch") -> VQAE:
    torch.manual_seed(0)
    return VQAE(image_size, code_dim, (16,), vector_quantizer(NUM_CODES, code_dim), embedding_norm=norm)


def random_images(image_size: tuple[int, int] = (32, 32), count: int = BATCH) -> Tensor:
    """[count, 3, H, W] in [0, 1]."""
    return torch.rand(count, 3, *image_size, generator=torch.Generator().manual_seed(1))


class Pass:
    """One training pass over normalised images, with the tensors between the parts kept."""

    def __init__(self, model: VQAE) -> None:
        self.target = model.normalise(random_images())
        with kept_output(model.encoder) as embeddings, kept_input(model.decoder) as codes:
            self.output = model(self.target)
        self.embeddings, self.codes = embeddings[0], codes[0]
        self.reconstruction_loss = F.mse_loss(self.output.reconstruction, self.target)


class kept_output:  # noqa: N801 - used as a function
    """The outputs of a module's calls inside of the block, with their gradients."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors: list[Tensor] = []
        self.handle = module.register_forward_hook(lambda _module, _inputs, output: self.keep(output))

    def keep(self, tensor: Tensor) -> None:
        tensor.retain_grad()
        self.tensors.append(tensor)

    def __enter__(self) -> list[Tensor]:
        return self.tensors

    def __exit__(self, *_exception: object) -> None:
        self.handle.remove()


class kept_input(kept_output):  # noqa: N801
    """The inputs of a module's calls."""

    def __init__(self, module: nn.Module) -> None:
        self.tensors = []
        self.handle = module.register_forward_pre_hook(lambda _module, inputs: self.keep(inputs[0]))


@pytest.fixture
def model() -> VQAE:
    return build()


# -- gradients


def test_the_encoder_receives_exactly_the_decoders_input_gradient(model: VQAE) -> None:
    step = Pass(model)
    (step.reconstruction_loss + step.output.codebook_loss).backward()

    codes = model.quantizer.codebook[step.output.indices].detach().requires_grad_()  # the decoder, on its own
    (expected,) = torch.autograd.grad(F.mse_loss(model.decoder(codes), step.target), codes)
    assert expected.abs().min() > 0
    assert torch.equal(step.codes.grad, expected)
    assert torch.equal(step.embeddings.grad, expected)


def test_encoder_weights_get_no_other_gradient(model: VQAE) -> None:
    step = Pass(model)
    (step.reconstruction_loss + step.output.codebook_loss).backward()
    parameters = list(model.encoder.parameters())
    actual = [parameter.grad for parameter in parameters]
    expected = torch.autograd.grad(model.encoder(step.target), parameters, grad_outputs=step.embeddings.grad)
    assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_codebook_gradients_are_exactly_those_of_the_codebook_loss(model: VQAE) -> None:
    step = Pass(model)
    (step.reconstruction_loss + step.output.codebook_loss).backward()
    embeddings, indices = step.embeddings.detach().double(), step.output.indices
    codebook = model.quantizer.codebook
    assert 1 < indices.unique().numel() < NUM_CODES
    for code in range(NUM_CODES):
        rows = embeddings[indices == code]  # [n_k, D]
        expected = 2 / embeddings.numel() * (codebook[code].detach().double() - rows).sum(dim=0)
        if rows.shape[0]:
            torch.testing.assert_close(codebook.grad[code].double(), expected, rtol=1e-5, atol=1e-9)
        else:
            assert not codebook.grad[code].any()
    expected_loss = (embeddings - codebook.detach()[indices].double()).square().mean()
    torch.testing.assert_close(step.output.codebook_loss.detach().double(), expected_loss, rtol=1e-6, atol=0)


def test_the_reconstruction_loss_does_not_touch_the_codebook(model: VQAE) -> None:
    Pass(model).reconstruction_loss.backward()
    gradient = model.quantizer.codebook.grad
    assert gradient is None or not gradient.any()


def test_the_codebook_loss_reaches_nothing_but_the_codebook(model: VQAE) -> None:
    Pass(model).output.codebook_loss.backward()
    for name, parameter in model.named_parameters():
        reached = parameter.grad is not None and bool(parameter.grad.any())
        assert reached == (name == "quantizer.codebook"), name


def test_several_codes_per_image() -> None:
    torch.manual_seed(0)
    model = build_model(Config(num_codes=NUM_CODES, num_quantizers=3, code_dim=64, hidden_dims=(16,)), (32, 32))
    step = Pass(model)
    (step.reconstruction_loss + step.output.codebook_loss).backward()
    codes = model.quantizer.decode(step.output.indices).detach().requires_grad_()
    (expected,) = torch.autograd.grad(F.mse_loss(model.decoder(codes), step.target), codes)
    torch.testing.assert_close(step.embeddings.grad, expected)  # the codebook loss does not reach the encoder
    assert model.quantizer.codebook.grad.flatten(1).any(1).all()  # but each stage

    model.eval()
    indices = model.encode(random_images())
    residual = model.encoder(model.normalise(random_images()))
    for stage, codebook in enumerate(model.quantizer.codebook):
        assert torch.equal(indices[:, stage], nearest_code(residual, codebook).indices)
        residual = residual - codebook[indices[:, stage]]
        coarse = model.decoder(model.quantizer.codebook[range(stage + 1), indices[:, : stage + 1]].sum(1))
        expected = (coarse * model.pixel_std + model.pixel_mean).clamp(0, 1)
        torch.testing.assert_close(model.decode(indices[:, : stage + 1]), expected)
    with pytest.raises(ValueError, match=r"indices must be \[\.\.\., q\] with 1 <= q <= 3, got \(8, 4\)"):
        model.decode(torch.zeros(8, 4, dtype=torch.int64))


def test_autocast_leaves_the_search_in_float32(model: VQAE) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        step = Pass(model)
    assert step.codes.dtype == torch.float32
    assert step.output.codebook_loss.dtype == torch.float32
    rounded = step.embeddings.detach().float()
    assert torch.equal(step.output.indices, nearest_code(rounded, model.quantizer.codebook).indices)
    (step.reconstruction_loss.float() + step.output.codebook_loss).backward()
    assert torch.equal(step.embeddings.grad.float(), step.codes.grad)
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


# -- an encoder at rest


def test_a_frozen_encoder_does_not_change() -> None:
    model = build()
    model.encoder.freeze()
    model.train()
    before = {name: value.clone() for name, value in model.encoder.state_dict().items()}
    step = model(model.normalise(random_images()))
    (F.mse_loss(step.reconstruction, model.normalise(random_images())) + step.codebook_loss).backward()
    assert all(torch.equal(value, before[name]) for name, value in model.encoder.state_dict().items())
    assert all(parameter.grad is None for parameter in model.encoder.parameters())
    assert model.quantizer.codebook.grad.any()
    assert all(parameter.grad.any() for parameter in model.decoder.parameters())

    model.encoder.freeze(False)
    model.train()
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad for parameter in model.encoder.parameters())


# -- shapes


@pytest.mark.parametrize("norm", ["batch", "none"])
@pytest.mark.parametrize("code_dim", [512, 64])
@pytest.mark.parametrize("image_size", [(32, 32), (64, 48), (33, 1)])
def test_shapes(image_size: tuple[int, int], code_dim: int, norm: str) -> None:
    model = build(image_size, code_dim, norm)
    images = random_images(image_size, count=3)
    assert model.encoder(images).shape == (3, code_dim)
    reconstruction, indices, codebook_loss = model(images)
    assert reconstruction.shape == images.shape
    assert indices.shape == (3,)
    assert indices.dtype == torch.int64
    assert codebook_loss.shape == ()


def test_512_dimensions_need_no_projection() -> None:
    assert sum(parameter.numel() for parameter in build(norm="none").encoder.parameters()) == 11_176_512
    assert isinstance(build().encoder.project, nn.Identity)
    assert isinstance(build(code_dim=64).encoder.project, nn.Linear)


def test_without_hidden_layers_the_decoder_is_linear() -> None:
    model = VQAE((4, 4), 64, (), vector_quantizer(NUM_CODES, 64))
    assert [type(layer) for layer in model.decoder] == [nn.Linear, nn.Unflatten]


def test_a_quantizer_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="quantizer must have code_dim 512, got 64"):
        VQAE((32, 32), 512, (16,), vector_quantizer(NUM_CODES, 64))


# -- encode, decode, load


def test_encode_and_decode_are_the_training_pass(model: VQAE) -> None:
    model.eval()
    images = random_images()
    indices = model.encode(images)
    output = model(model.normalise(images))
    assert torch.equal(indices, output.indices)
    expected = (output.reconstruction * model.pixel_std + model.pixel_mean).clamp(0, 1)
    assert torch.equal(model.decode(indices), expected)
    assert not model.decode(indices).requires_grad


def test_decoded_images_lie_between_0_and_1(model: VQAE) -> None:
    with torch.no_grad():
        model.decoder[-2].bias.fill_(100)
    decoded = model.decode(torch.arange(NUM_CODES))
    assert decoded.shape == (NUM_CODES, 3, 32, 32)
    assert (decoded == 1).all()


def test_bytes_and_floats_are_the_same_images(model: VQAE) -> None:
    model.eval()
    images = (random_images() * 255).round().to(torch.uint8)
    torch.testing.assert_close(model.normalise(images), model.normalise(images.float() / 255))
    assert torch.equal(model.encode(images), model.encode(images.float() / 255))


@pytest.mark.parametrize("shape", [(3, 32, 32), (2, 3, 32, 31), (2, 1, 32, 32)])
def test_encode_refuses_other_shapes(model: VQAE, shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"images must be \[B, 3, 32, 32\], got \(" + ", ".join(map(str, shape))):
        model.encode(torch.zeros(shape))


@pytest.mark.parametrize("norm", ["batch", "none"])
def test_save_and_load(tmp_path: Path, norm: str) -> None:
    config = Config(num_codes=NUM_CODES, code_dim=64, hidden_dims=(16, 8), embedding_norm=norm)
    torch.manual_seed(0)
    model = build_model(config, (64, 48))
    model.pixel_mean.copy_(torch.tensor([0.1, 0.2, 0.3])[:, None, None])
    images = random_images((64, 48))
    model(model.normalise(images))  # moves the statistics of the BatchNorms
    model.eval()
    state = {"config": config.to_dict(), "dataset": "synthetic", "image_size": [64, 48], "model": model.state_dict()}
    save_checkpoint(tmp_path / "model.pt", state)
    loaded = VQAE.load(tmp_path / "model.pt")
    assert not loaded.training
    assert torch.equal(loaded.encode(images), model.encode(images))
    indices = torch.arange(NUM_CODES)
    assert torch.equal(loaded.decode(indices), model.decode(indices))


@pytest.mark.parametrize("index", [-1, 8])
def test_decode_refuses_indices_out_of_range(index: int) -> None:
    model = VQAE((32, 32), 512, (4,), vector_quantizer(8, 512)).eval()
    with pytest.raises(ValueError, match=r"indices must be in \[0, 8\), got 0 to 8|got -1 to 0"):
        model.decode(torch.tensor([0, index]))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.uint16, torch.int32])
def test_decode_takes_every_integer_dtype(dtype: torch.dtype) -> None:
    model = VQAE((32, 32), 8, (4,), vector_quantizer(8, 8)).eval()
    indices = torch.tensor([0, 1, 7])
    assert torch.equal(model.decode(indices.to(dtype)), model.decode(indices))
