"""Synthetic images, used if no data set is available: lit shapes in front of hills under a sky.

The distributions resemble those of photographs, with many rare values and few common ones: positions, sizes (most
objects are small, a few fill the image), colours that agree within an image, light and outlines. A chunk of images is
drawn at once. The parameters of an image do not depend on its size.

Source of the outlines: Gielis 2003, "A generic geometric transformation that unifies a wide range of natural and
abstract shapes", American Journal of Botany 90(3).
"""

import math

import torch
from torch import Generator, Tensor

_CHUNK = 64  # images drawn at once; larger chunks are limited by memory bandwidth

# Outlines as (m, n1, n2, n3) of the superformula: the symmetry, then three exponents.
_OUTLINES = torch.tensor(
    [
        [0.0, 1.0, 1.0, 1.0],  # disc
        [0.0, 1.0, 1.0, 1.0],  # disc again: it is the most common
        [4.0, 12.0, 15.0, 15.0],  # rounded square
        [3.0, 4.5, 10.0, 10.0],  # rounded triangle
        [6.0, 1.0, 1.0, 6.0],  # flower of six petals
        [5.0, 0.5, 1.0, 1.0],  # pointed star
        [5.0, 2.0, 7.0, 7.0],  # soft star
        [2.0, 1.0, 4.0, 8.0],  # lens
    ]
)


def draw_images(num_images: int, split: str, *, image_size: int = 32, seed: int = 0) -> Tensor:
    """Draw images [num_images, 3, image_size, image_size] uint8 of the split "train" or "test".

    The same arguments give the same images. Seeds have 62 bits. A longer draw need not start like a shorter one.
    """
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    images = torch.empty(num_images, 3, image_size, image_size, dtype=torch.uint8)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are too small to share: on a busy machine, threads take ten times as long
    try:
        for chunk in torch.split(images, _CHUNK):
            chunk.copy_(_Scenes(len(chunk), image_size, generator).draw())
    finally:
        torch.set_num_threads(num_threads)
    return images


class _Scenes:
    """B random scenes. Random numbers are [B, 1, 1], masks [B, S, S], images [B, 3, S, S]."""

    def __init__(self, num_images: int, image_size: int, generator: Generator) -> None:
        self.shape, self.size, self.generator = (num_images, 1, 1), image_size, generator
        axis = (torch.arange(image_size) + 0.5) * (2 / image_size) - 1
        self.y, self.x = axis[:, None], axis[None, :]  # [S, 1] and [1, S]
        light_angle = self.uniform(-0.85 * math.pi, -0.15 * math.pi)  # from above
        self.light = (light_angle.cos(), light_angle.sin())
        self.hue = self.uniform(0, 1)

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self.shape, generator=self.generator) * (high - low) + low

    def normal(self) -> Tensor:
        return torch.randn(self.shape, generator=self.generator)

    def exponential(self, mean: float) -> Tensor:
        return -mean * torch.log1p(-torch.rand(self.shape, generator=self.generator))

    def chance(self, probability: float) -> Tensor:
        return torch.rand(self.shape, generator=self.generator) < probability

    def draw(self) -> Tensor:
        """The scenes from back to front, [B, 3, S, S] in [0, 255]."""
        clouds = self.clouds()
        image = self.sky(clouds)
        image, ground = self.add_ground(image, clouds)
        for _ in range(3):
            image = self.add_object(image, ground)
        exposure = 1.1 * torch.exp(0.2 * self.normal())
        vignette = 1 - self.uniform(0, 0.25) * (self.x * self.x + self.y * self.y)
        return (image * (exposure * vignette)[:, None]).clamp_(0, 1).mul_(255).round_()

    def clouds(self) -> Tensor:
        """A rough plane around 0, [B, S, S]: six waves whose amplitude falls with their frequency."""
        clouds = torch.zeros(())
        for octave in range(6):
            frequency = 1.5 * 1.7**octave * torch.exp(0.2 * self.normal())
            angle = self.uniform(0, math.pi)
            phase = self.uniform(0, 2 * math.pi)
            clouds = clouds + torch.sin(frequency * self.along(angle) + phase) * (0.7**octave)
        return clouds

    def along(self, angle: Tensor) -> Tensor:
        """The coordinate in the direction of `angle`, [B, S, S]."""
        return angle.cos() * self.x + angle.sin() * self.y

    def sky(self, clouds: Tensor) -> Tensor:
        """A gradient between two colours, bent by clouds, [B, 3, S, S]."""
        angle = 0.5 * math.pi + 0.5 * self.normal()
        mixture = (0.5 + self.uniform(0.2, 0.7) * self.along(angle) + self.exponential(0.1) * clouds).clamp(0, 1)
        hue = torch.where(self.chance(0.5), 0.57 + 0.03 * self.normal(), self.hue)
        top = _color(hue, self.uniform(0.05, 0.75), 1 - self.exponential(0.35).clamp(max=0.9))
        bottom = _color(hue + 0.12 * self.normal(), self.uniform(0.0, 0.6), 1 - self.exponential(0.25).clamp(max=0.8))
        return torch.lerp(top, bottom, mixture[:, None])

    def add_ground(self, image: Tensor, clouds: Tensor) -> tuple[Tensor, Tensor]:
        """Hills with furrows over the lower part of most images. Returns the image and the mask of the ground."""
        height = torch.where(self.chance(0.75), 0.35 + 0.35 * self.normal(), torch.tensor(3.0))
        hill = self.exponential(0.12) * torch.sin(self.uniform(1, 5) * self.x + self.uniform(0, 2 * math.pi))
        distance = height + hill + 0.4 * self.normal() * self.x - self.y
        hue = torch.where(self.chance(0.6), 0.2 + 0.07 * self.normal(), self.hue + 0.5)
        near = _color(hue, self.uniform(0.1, 0.8), self.uniform(0.1, 0.8))
        far = _color(hue + 0.05 * self.normal(), self.uniform(0.1, 0.6), self.uniform(0.2, 0.9))
        angle = self.uniform(0, math.pi)
        furrows = torch.sin(self.uniform(6, 20) * self.along(angle))
        texture = 1 + self.exponential(0.08) * furrows + self.exponential(0.05) * clouds
        ground = torch.lerp(far, near, (-0.9 * distance).clamp(0, 1)[:, None]) * texture[:, None]
        mask = self.inside(distance)
        return torch.lerp(image, ground, mask[:, None]), mask

    def add_object(self, image: Tensor, ground: Tensor) -> Tensor:
        """A lit shape, perhaps striped or hollow, with its shadow on the ground, in four of five images."""
        present = self.chance(0.8)
        radius = (0.17 * torch.exp(self.exponential(0.65))).clamp(max=1.1)
        offset_x, offset_y = self.x - 0.5 * self.normal(), self.y - 0.15 - 0.4 * self.normal()
        turn = self.uniform(0, 2 * math.pi)
        stretch = torch.exp(0.3 * self.normal())
        cos, sin = turn.cos() / radius, turn.sin() / radius
        along = (cos * stretch) * offset_x + (sin * stretch) * offset_y  # [B, S, S], in radii
        across = (cos / stretch) * offset_y - (sin / stretch) * offset_x

        outline = torch.randint(len(_OUTLINES), self.shape, generator=self.generator)
        level = _level(along, across, _OUTLINES[outline])
        hollow = self.chance(0.15)
        level = torch.where(hollow, (level - 0.72).abs() / 0.28, level)
        mask = self.inside((level - 1) * radius * torch.where(hollow, 0.28, 0.8)) * present

        # The surface bulges towards the viewer; near the outline its normal points outwards.
        depth = level.clamp(0, 1)
        distance = (offset_x.square() + offset_y.square()).sqrt()
        facing = depth.square() * (offset_x * self.light[0] + offset_y * self.light[1]) / distance.clamp(min=1e-3)
        shade = 0.8 + self.uniform(0.1, 0.55) * facing
        gloss = self.exponential(0.35) * (facing - 0.25 * (1 - depth) - 0.35).clamp(min=0)
        frequency = self.uniform(2.5, 7)
        sharpness = 0.35 * self.size * radius / frequency  # fades stripes that are too fine for the pixels
        stripes = sharpness * torch.sin(frequency * along + self.uniform(0, 2 * math.pi))

        hue = self.hue + torch.where(self.chance(0.5), 0.08 * self.normal(), self.uniform(0, 1))
        base = _color(hue, self.uniform(0.2, 1.0), self.uniform(0.3, 1.1))
        second = _color(hue + self.uniform(0, 1), self.uniform(0.0, 0.8), self.uniform(0.2, 1.1))
        striped = (0.5 + stripes).clamp(0, 1) * self.chance(0.3)
        surface = torch.addcmul(gloss[:, None], torch.lerp(base, second, striped[:, None]), shade[:, None])

        shadow_x, shadow_y = offset_x / radius, (offset_y - 0.9 * radius) / (0.4 * radius)
        shadow = self.uniform(0.2, 0.7) * present * (-shadow_x.square()).exp() * (-shadow_y.square()).exp()
        image = image * (1 - shadow * ground)[:, None]
        return torch.lerp(image, surface, mask[:, None])

    def inside(self, signed_distance: Tensor) -> Tensor:
        """Mask of negative distances, smooth over about one and a half pixels."""
        return (0.5 - signed_distance * (self.size / 3)).clamp(0, 1)


def _color(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB [B, 3, 1, 1] of a hue in turns (any real number), saturation and value, [B, 1, 1] each."""
    offsets = torch.tensor([0.0, 2 / 3, 1 / 3])[:, None, None]
    ramp = (((hue[:, None] + offsets) % 1) * 6 - 3).abs().sub(1).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * (1 - ramp))


def _level(along: Tensor, across: Tensor, outline: Tensor) -> Tensor:
    """Distance from the centre relative to the outline, [B, S, S], by the superformula of `outline` [B, 1, 1, 4]."""
    symmetry, n1, n2, n3 = outline.unbind(-1)
    quarter = torch.atan2(across, along) * (symmetry / 4)
    # exp(n * log(x)) takes half the time of x ** n
    inverse = (n2 * quarter.cos().abs().log()).exp() + (n3 * quarter.sin().abs().log()).exp()
    return (along.square() + across.square()).sqrt() * (inverse.log() / n1).exp()
