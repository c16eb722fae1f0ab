"""Initialise the encoder with principal components of images, and the decoder as its inverse.

Straight-through gradients teach a random ResNet-18 little more than the largest principal components of the images, and
nearest codes in such a space do not belong to similar images. Therefore:

- The first convolution is set to principal components of image patches.
- Each later convolution that halves the feature map is set to the linear map that predicts the pixels under each
  position, reduced to its principal components. The other branches of the network start at zero.
- The last linear layer maps the features to the principal components of the whole image.
- Filters come in pairs of opposite sign, because ReLU(v) - ReLU(-v) = v passes a component through unchanged.

The codebook stays random.

Sources: data-dependent initialisation, Krähenbühl et al. 2016, arXiv:1511.06856; filters from PCA of patches, Chan et
al. 2015, arXiv:1404.3606; principal components of a prediction, Izenman 1975, "Reduced-rank regression for the
multivariate linear model"; zero-initialised residual branches, Goyal et al. 2017, arXiv:1706.02677.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from vqae.model.encoder import Encoder
from vqae.model.vqae import VQAE, Decoder

_NUM_IMAGES = 8192  # used for the fit
_NUM_VALUES = 2**25  # in these images at most; fewer images are used if they are large
_NUM_PATCHES = 20_000  # of a convolution's input
_NUM_MEASURED = 1024  # images for the BatchNorm statistics of branches that start at zero
_STEM_BIAS = 3.0  # of the first BatchNorm, in standard deviations
_RIDGE = 1e-2  # of the ridge regressions, relative to the mean variance
_BATCH_SIZE = 256


@torch.no_grad()
def init_by_pca(model: VQAE, images: Tensor) -> None:
    """Initialise encoder and decoder from images [N, 3, H, W] uint8, of which torch's global generator draws a sample.

    The model must be on the CPU, with its pixel statistics set.
    """
    num_images = max(2, min(_NUM_IMAGES, _NUM_VALUES // images[0].numel()))
    x = model.normalise(images[torch.randperm(images.shape[0])[:num_images]])
    was_training = model.training
    model.eval()
    _init_features(model.encoder.features, x)
    _init_projection(model.encoder, x)
    _init_decoder(model.decoder, _in_batches(model.encoder, x), x)
    model.train(was_training)


def _init_features(features: ResNet, images: Tensor) -> None:
    """Initialise the convolutions of a ResNet for normalised images [N, 3, H, W]."""
    conv, norm = features.conv1, features.bn1
    _set_filters(conv, _principal_components(_patches(conv, images), conv.out_channels // 2))
    _centre(norm, _in_batches(conv, images))
    # With the bias, the ReLU sets few values to 0. Max pooling of v and of -v then bounds v in each window.
    norm.bias.copy_(_STEM_BIAS * norm.weight)
    x = _in_batches(nn.Sequential(conv, norm, nn.ReLU(), features.maxpool), images)
    for stage in (features.layer1, features.layer2, features.layer3, features.layer4):
        for block in stage:
            x = _init_block(block, x, images)


def _init_block(block: BasicBlock, x: Tensor, images: Tensor) -> Tensor:
    """Initialise a block as the identity or, if it changes the shape, as components of x [N, C, H, W]. Its output."""
    if block.downsample is None:
        y = _in_batches(block.conv1, x[:_NUM_MEASURED])
        _measure(block.bn1, y)
        _measure(block.bn2, _in_batches(block.conv2, F.relu(block.bn1(y))))
        nn.init.zeros_(block.bn2.weight)
        return x
    _set_filters(block.conv1, _predicting_filters(block.conv1, x, images))
    nn.init.dirac_(block.conv2.weight)
    y = _in_batches(block.conv1, x)
    _centre(block.bn1, y)
    y = F.relu(block.bn1(y))
    _measure(block.bn2, y)  # and undo its normalisation
    block.bn2.weight.copy_(_std(block.bn2))
    block.bn2.bias.copy_(block.bn2.get_buffer("running_mean"))
    shortcut_conv, shortcut_norm = block.downsample
    _measure(shortcut_norm, _in_batches(shortcut_conv, x[:_NUM_MEASURED]))
    nn.init.zeros_(shortcut_norm.weight)
    return y


def _predicting_filters(conv: nn.Conv2d, x: Tensor, images: Tensor) -> Tensor:
    """Filters [C'/2 or fewer, C·kernel²] for the components of the pixels that patches of x [N, C, H, W] predict.

    Each output position predicts its tile: the pixels that are nearer to it than to any other position.
    """
    patches = _patches(conv, x)  # [M, C·kernel²]
    height, width = conv(x[:1]).shape[2:]
    tile = (max(1, images.shape[2] // height), max(1, images.shape[3] // width))
    num_maps = patches.shape[0] // (height * width)
    covered = F.interpolate(images[:num_maps], (height * tile[0], width * tile[1]))  # unchanged if the sizes divide
    tiles = F.unfold(covered, tile, stride=tile).transpose(1, 2).flatten(0, 1)  # [M, 3·tile]
    weight, _ = _ridge_regression(patches, tiles)
    predictions = patches @ weight.T
    return _principal_components(predictions - predictions.mean(0), conv.out_channels // 2) @ weight


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Inputs of the output positions of a convolution, from the first maps of x [N, C, H, W]: [M, C·kernel²]."""
    height, width = conv(x[:1]).shape[2:]
    x = x[: -(-_NUM_PATCHES // (height * width))]
    patches: Tensor = nn.Unfold(conv.kernel_size, padding=tuple(map(int, conv.padding)), stride=conv.stride)(x)
    return patches.transpose(1, 2).flatten(0, 1)


def _set_filters(conv: nn.Conv2d, filters: Tensor) -> None:
    """Set the weights to filters [at most C'/2, C·kernel²] with both signs, and the other weights to zero."""
    pairs = torch.cat([filters, -filters]).view(-1, *conv.weight.shape[1:])
    nn.init.zeros_(conv.weight)
    conv.weight[: pairs.shape[0]] = pairs


def _init_projection(encoder: Encoder, images: Tensor) -> None:
    """Initialise the last linear layer, if there is one: from features to the first D components of the images.

    Components are scaled to a mean square of 1, like random codes, by one factor: distances between embeddings are
    then proportional to distances between images.
    """
    features = _in_batches(encoder.features, images)
    if isinstance(encoder.project, nn.Linear):
        pixels = images.flatten(1)
        pixels = pixels - pixels.mean(0)
        targets = pixels @ _principal_components(pixels, encoder.project.out_features).T  # [N, D or fewer]
        targets *= (encoder.project.out_features / targets.square().sum(1).mean().clamp(min=1e-12)).sqrt()
        weight, bias = _ridge_regression(features, targets)
        nn.init.zeros_(encoder.project.weight)
        nn.init.zeros_(encoder.project.bias)
        encoder.project.weight[: weight.shape[0]] = weight
        encoder.project.bias[: weight.shape[0]] = bias
    if isinstance(encoder.norm, _BatchNorm):
        _measure(encoder.norm, encoder.project(features))


def _init_decoder(decoder: Decoder, embeddings: Tensor, images: Tensor) -> None:
    """Initialise the decoder as the linear map from embeddings [N, D] to images, in pairs through the hidden layers."""
    *hidden, last = [layer for layer in decoder if isinstance(layer, nn.Linear)]
    weight, bias = _ridge_regression(embeddings, images.flatten(1))
    num_passed = min([weight.shape[1], *(layer.out_features // 2 for layer in hidden)])
    identity = torch.eye(num_passed)
    pairs = torch.cat([identity, -identity])  # [2·passed, passed]
    for depth, layer in enumerate(hidden):
        incoming = pairs if depth == 0 else torch.cat([pairs, -pairs], 1)
        layer.weight[: 2 * num_passed] = 0
        layer.bias[: 2 * num_passed] = 0
        layer.weight[: 2 * num_passed, : incoming.shape[1]] = incoming
    weight = weight[:, :num_passed]
    outgoing = torch.cat([weight, -weight], 1) if hidden else weight
    nn.init.zeros_(last.weight)
    last.weight[:, : outgoing.shape[1]] = outgoing
    last.bias.copy_(bias)


def _principal_components(rows: Tensor, count: int) -> Tensor:
    """The largest principal components of rows [N, P], orthonormal: [count or fewer, P]."""
    _, _, components = torch.pca_lowrank(rows, q=min(count, *rows.shape), niter=2)
    return components.T


def _ridge_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Fit y [N, Q] by weight [Q, P] · x [N, P] + bias [Q]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    n = x.shape[0]
    ridge = _RIDGE * (x.square().mean().double()).clamp(min=1e-12)
    few_rows = n < x.shape[1]  # then the dual system is smaller
    system, target = (x @ x.T / n, y / n) if few_rows else (x.T @ x / n, x.T @ y / n)
    system = system.double()
    system.diagonal().add_(ridge)
    weight = torch.linalg.solve(system, target.double()).T.to(x.dtype)
    weight = weight @ x if few_rows else weight
    return weight, y_mean - weight @ x_mean


def _measure(norm: _BatchNorm, y: Tensor) -> None:
    """Set the running statistics of a BatchNorm to those of y [N, C, ...]."""
    variance, mean = torch.var_mean(y, [0, *range(2, y.dim())], correction=0)
    norm.get_buffer("running_mean").copy_(mean)
    norm.get_buffer("running_var").copy_(variance)


def _centre(norm: _BatchNorm, y: Tensor) -> None:
    """Set a BatchNorm to subtract the mean of y [N, C, H, W] and scale all channels alike, to a mean variance of 1."""
    _measure(norm, y)
    norm.weight.copy_(_std(norm) / _std(norm).square().mean().sqrt())
    nn.init.zeros_(norm.bias)


def _std(norm: _BatchNorm) -> Tensor:
    return (norm.get_buffer("running_var") + norm.eps).sqrt()


def _in_batches(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in torch.split(x, _BATCH_SIZE)])
