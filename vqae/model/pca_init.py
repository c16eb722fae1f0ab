"""Weights to begin with, made from images: embeddings that are principal components, and a decoder that inverts them.

Straight-through gradients teach a fresh ResNet-18 little beyond an image's few largest components, and nearest codes
in such a space are not nearest images. So the first convolution begins as principal components of patches; each later
one that halves the map begins as what it takes to predict the pixels under each position, of which it keeps the
principal components; every other branch of the network begins at zero; and the last linear layer reads the components
of the whole image off the features. All of them stand in pairs of opposite sign, since ReLU(v) - ReLU(-v) = v lets a
component through whole. The codebook stays random.

Sources: data-dependent initialisation, Krähenbühl et al. 2016, arXiv:1511.06856; filters that are principal components
of patches, Chan et al. 2015, arXiv:1404.3606; components of a prediction, Izenman 1975, "Reduced-rank regression for
the multivariate linear model"; residual branches that begin at zero, Goyal et al. 2017, arXiv:1706.02677.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import ResNet
from torchvision.models.resnet import BasicBlock

from vqae.model.encoder import Encoder
from vqae.model.vqae import VQAE, Decoder

_IMAGES = 8192  # to fit everything to
_NUMBERS = 2**25  # in these images at most, where they are large
_PATCHES = 20_000  # of a convolution's input
_MEASURED = 1024  # images, to measure by what goes through branches that begin at zero
_STEM_BIAS = 3.0  # of the first BatchNorm, in standard deviations
_RIDGE = 1e-2  # of the ridge regressions, in units of the mean variance
_BATCH = 256


@torch.no_grad()
def init_by_pca(model: VQAE, images: Tensor) -> None:
    """Set the encoder's and the decoder's weights by what images look like; torch's generator draws which ones.

    Args:
        model: its pixel statistics set; on the CPU.
        images: [N, 3, H, W] uint8.
    """
    num_chosen = max(2, min(_IMAGES, _NUMBERS // images[0].numel()))
    chosen = model.normalise(images[torch.randperm(images.shape[0])[:num_chosen]])
    was_training = model.training
    model.eval()
    _init_features(model.encoder.features, chosen)
    _init_projection(model.encoder, chosen)
    _init_decoder(model.decoder, _in_batches(model.encoder, chosen), chosen)
    model.train(was_training)


def _init_features(features: ResNet, images: Tensor) -> None:
    """The convolutions of a ResNet in eval mode, for normalised images [N, 3, H, W]."""
    conv, norm = features.conv1, features.bn1
    patches = _patches(conv, images[: _num_maps(conv, images)])
    _set_filters(conv, _principal_components(patches, conv.out_channels // 2))
    _centre(norm, _in_batches(conv, images))
    # So that hardly any value meets the ReLU at 0: the largest of v and of -v in a window then say where v lies there.
    norm.bias.copy_(_STEM_BIAS * norm.weight)
    x = _in_batches(nn.Sequential(conv, norm, nn.ReLU(), features.maxpool), images)
    for stage in (features.layer1, features.layer2, features.layer3, features.layer4):
        for block in stage:
            x = _init_block(block, x, images)


def _init_block(block: BasicBlock, x: Tensor, images: Tensor) -> Tensor:
    """Let a block pass its input [N, C, H, W] on, as it is or, where its shape changes, as components; its output."""
    if block.downsample is None:
        y = _in_batches(block.conv1, x[:_MEASURED])
        _measure(block.bn1, y)
        _measure(block.bn2, _in_batches(block.conv2, F.relu(block.bn1(y))))
        nn.init.zeros_(block.bn2.weight)
        return x
    _set_filters(block.conv1, _predicting_filters(block.conv1, x, images))
    nn.init.dirac_(block.conv2.weight)
    y = _in_batches(block.conv1, x)
    _centre(block.bn1, y)
    y = F.relu(block.bn1(y))  # what the second convolution gives, too
    _measure(block.bn2, y)
    block.bn2.weight.copy_(_std(block.bn2))
    block.bn2.bias.copy_(_statistics(block.bn2)[0])
    shortcut_conv, shortcut_norm = block.downsample
    _measure(shortcut_norm, _in_batches(shortcut_conv, x[:_MEASURED]))
    nn.init.zeros_(shortcut_norm.weight)
    return y


def _predicting_filters(conv: nn.Conv2d, x: Tensor, images: Tensor) -> Tensor:
    """[C'/2 or fewer, C·kernel²]: the components, largest first, of what patches of x [N, C, H, W] tell of the pixels.

    Each position of the output is to tell of its tile, the part of the image that is nearer to it than to any other.
    """
    num_maps = _num_maps(conv, x)
    patches = _patches(conv, x[:num_maps])  # [M, C·kernel²]
    height, width = conv(x[:1]).shape[2:]
    tile = (max(1, images.shape[2] // height), max(1, images.shape[3] // width))
    covered = F.interpolate(images[:num_maps], (height * tile[0], width * tile[1]))  # as they are, if sizes divide
    tiles = F.unfold(covered, tile, stride=tile).transpose(1, 2).flatten(0, 1)  # [M, 3·tile]
    weight, _ = _ridge_regression(patches, tiles)
    predictions = patches @ weight.T
    return _principal_components(predictions - predictions.mean(0), conv.out_channels // 2) @ weight


def _num_maps(conv: nn.Conv2d, x: Tensor) -> int:
    """How many of the maps x [N, C, H, W] have as many patches as are wanted."""
    height, width = conv(x[:1]).shape[2:]
    return -(-_PATCHES // int(height * width))


def _patches(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """What each output position of a convolution sees of x [N, C, H, W]: [N·H'·W', C·kernel²]."""
    unfold = nn.Unfold(conv.kernel_size, padding=tuple(map(int, conv.padding)), stride=conv.stride)
    patches: Tensor = unfold(x)
    return patches.transpose(1, 2).flatten(0, 1)


def _set_filters(conv: nn.Conv2d, filters: Tensor) -> None:
    """Take filters [at most C'/2, C·kernel²], each with both signs; others are zero."""
    pairs = torch.cat([filters, -filters]).view(-1, *conv.weight.shape[1:])
    nn.init.zeros_(conv.weight)
    conv.weight[: pairs.shape[0]] = pairs


def _init_projection(encoder: Encoder, x: Tensor) -> None:
    """The last linear layer, where there is one: from features to the D first components of the images themselves.

    Scaled to a mean square of 1, as random codes have; their proportions are kept, so that distances between embeddings
    are distances between images.
    """
    features = _in_batches(encoder.features, x)
    if isinstance(encoder.project, nn.Linear):
        pixels = x.flatten(1)
        pixels = pixels - pixels.mean(0)
        targets = pixels @ _principal_components(pixels, encoder.project.out_features).T  # [N, D or fewer]
        targets *= (encoder.project.out_features / targets.square().sum(1).mean().clamp(min=1e-12)).sqrt()
        nn.init.zeros_(encoder.project.weight)
        weight, bias = _ridge_regression(features, targets)
        encoder.project.weight[: weight.shape[0]] = weight
        nn.init.zeros_(encoder.project.bias)
        encoder.project.bias[: weight.shape[0]] = bias
    if isinstance(encoder.norm, _BatchNorm):
        _measure(encoder.norm, encoder.project(features))


def _init_decoder(decoder: Decoder, embeddings: Tensor, images: Tensor) -> None:
    """The linear map from embeddings [N, D] to images [N, 3, H, W], passed through the hidden layers as pairs."""
    *hidden, last = [layer for layer in decoder if isinstance(layer, nn.Linear)]
    weight, bias = _ridge_regression(embeddings, images.flatten(1))
    num_passed = min([weight.shape[1], *(layer.out_features // 2 for layer in hidden)])
    identity = torch.eye(num_passed)
    pairs = torch.cat([identity, -identity])  # [2·passed, passed]
    for depth, layer in enumerate(hidden):
        layer.weight[: 2 * num_passed] = 0
        layer.bias[: 2 * num_passed] = 0
        incoming = pairs if depth == 0 else torch.cat([pairs, -pairs], 1)
        layer.weight[: 2 * num_passed, : incoming.shape[1]] = incoming
    nn.init.zeros_(last.weight)
    weight = weight[:, :num_passed]
    outgoing = torch.cat([weight, -weight], 1) if hidden else weight
    last.weight[:, : outgoing.shape[1]] = outgoing
    last.bias.copy_(bias)


def _principal_components(rows: Tensor, count: int) -> Tensor:
    """[at most count, P] of rows [N, P], orthonormal, the largest first; fewer where N or P are smaller."""
    _, _, components = torch.pca_lowrank(rows, q=min(count, *rows.shape), niter=2)
    return components.T


def _ridge_regression(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(weight [Q, P], bias [Q]) with weight·x + bias near y, for x [N, P] and y [N, Q]."""
    x_mean, y_mean = x.mean(0), y.mean(0)
    x, y = x - x_mean, y - y_mean
    num_rows, num_columns = x.shape
    ridge = _RIDGE * (x.square().mean().double()).clamp(min=1e-12)  # the mean variance
    if num_rows < num_columns:  # the same by a smaller system
        products = (x @ x.T / num_rows).double()
        products.diagonal().add_(ridge)
        weight = torch.linalg.solve(products, (y / num_rows).double()).T.to(x.dtype) @ x
    else:
        covariance = (x.T @ x / num_rows).double()
        covariance.diagonal().add_(ridge)
        weight = torch.linalg.solve(covariance, (x.T @ y / num_rows).double()).T.to(x.dtype)
    return weight, y_mean - weight @ x_mean


def _measure(norm: _BatchNorm, y: Tensor) -> None:
    """Set a BatchNorm's running statistics to those of y [N, C, ...]."""
    axes = [axis for axis in range(y.dim()) if axis != 1]
    for statistic, measured in zip(_statistics(norm), reversed(torch.var_mean(y, axes, correction=0)), strict=True):
        statistic.copy_(measured)


def _centre(norm: _BatchNorm, y: Tensor) -> None:
    """Make a BatchNorm y [N, C, H, W] -> (y - its mean) / s, with one s for all channels, by which it spreads by 1."""
    _measure(norm, y)
    spread = _std(norm).square().mean().sqrt()
    norm.weight.copy_(_std(norm) / spread)
    nn.init.zeros_(norm.bias)


def _std(norm: _BatchNorm) -> Tensor:
    return (_statistics(norm)[1] + norm.eps).sqrt()


def _statistics(norm: _BatchNorm) -> tuple[Tensor, Tensor]:
    """The running mean and variance, [C] each, which ResNets have."""
    if norm.running_mean is None or norm.running_var is None:
        raise ValueError("norm must keep running statistics")
    return norm.running_mean, norm.running_var


def _in_batches(module: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([module(part) for part in torch.split(x, _BATCH)])
