"""Images drawn by a seeded program, for where there is no data set: lit shapes in front of hills under a sky.

What varies has many values and few common ones, as in photographs: places, sizes (most objects are small, a few fill
the image), colours that keep together within an image, light, weather and the shapes themselves. Everything is
drawn for a chunk of images at once; the parameters of an image do not depend on its size.

Source of the outlines: Gielis 2003, "A generic geometric transformation that unifies a wide range of natural and
abstract shapes", American Journal of Botany 90(3).
"""

import math

import torch
from torch import Generator, Tensor

_CHUNK = 64  # images drawn at once: more, and the time goes into fetching memory
_MAX_OBJECTS = 3
_NUM_WAVES = 6  # plane waves that an image's clouds are made of

# Outlines, as the superformula's (m, n1, n2, n3): the symmetry, then three exponents.
_OUTLINES = torch.tensor(
    [
        [0.0, 1.0, 1.0, 1.0],  # disc
        [0.0, 1.0, 1.0, 1.0],  # disc, the commonest
        [4.0, 12.0, 15.0, 15.0],  # rounded square
        [3.0, 4.5, 10.0, 10.0],  # rounded triangle
        [6.0, 1.0, 1.0, 6.0],  # flower of six petals
        [5.0, 0.5, 1.0, 1.0],  # pointed star
        [5.0, 2.0, 7.0, 7.0],  # soft star
        [2.0, 1.0, 4.0, 8.0],  # lens
    ]
)


def draw_images(num_images: int, split: str, *, image_size: int = 32, seed: int = 0) -> Tensor:
    """Images that are the same for the same arguments, and different ones for train and test.

    Args:
        num_images: N; the first images of a longer draw need not be those of a shorter one.
        split: "train" or "test".
        image_size: height and width S.
        seed: any integer of 62 bits.

    Returns:
        [N, 3, S, S] uint8.
    """
    generator = torch.Generator().manual_seed(2 * seed + (split == "test"))
    images = torch.empty(num_images, 3, image_size, image_size, dtype=torch.uint8)
    num_threads = torch.get_num_threads()
    # The planes of a chunk are too small to be shared out: threads that wait for each other after every operation gain
    # little, and on a busy machine they take ten times as long as one.
    torch.set_num_threads(1)
    try:
        for start in range(0, num_images, _CHUNK):
            chunk = images[start : start + _CHUNK]
            chunk.copy_(_draw_chunk(len(chunk), image_size, generator))
    finally:
        torch.set_num_threads(num_threads)
    return images


def _draw_chunk(num_images: int, image_size: int, generator: Generator) -> Tensor:
    """Scenes from back to front, [B, 3, S, S] in [0, 255]."""
    draw = _Draw(num_images, generator)
    axis = (torch.arange(image_size) + 0.5) * (2 / image_size) - 1
    y, x = axis[:, None], axis[None, :]  # [S, 1] and [1, S]: what depends on one alone is cheap
    light_angle = draw.uniform(-0.85 * math.pi, -0.15 * math.pi)  # from above
    light = (light_angle.cos(), light_angle.sin())
    scene_hue = draw.uniform(0, 1)

    clouds = _draw_clouds(draw, x, y)
    image = _draw_sky(draw, x, y, clouds, scene_hue)
    image, ground = _draw_ground(draw, x, y, clouds, scene_hue, image)
    for _ in range(_MAX_OBJECTS):
        image = _draw_object(draw, x, y, light, scene_hue, ground, image)

    exposure = 1.1 * torch.exp(0.2 * draw.normal())
    vignette = 1 - draw.uniform(0, 0.25) * (x * x + y * y)
    return (image * (exposure * vignette)[:, None]).clamp_(0, 1).mul_(255).round_()


class _Draw:
    """Random numbers for B images, shaped [B, 1, 1] to go with planes [B, S, S]."""

    def __init__(self, num_images: int, generator: Generator) -> None:
        self._shape = (num_images, 1, 1)
        self._generator = generator

    def uniform(self, low: float, high: float) -> Tensor:
        return torch.rand(self._shape, generator=self._generator) * (high - low) + low

    def normal(self) -> Tensor:
        return torch.randn(self._shape, generator=self._generator)

    def exponential(self, mean: float) -> Tensor:
        return -mean * torch.log1p(-torch.rand(self._shape, generator=self._generator))

    def chance(self, probability: float) -> Tensor:
        return torch.rand(self._shape, generator=self._generator) < probability

    def index(self, count: int) -> Tensor:
        return torch.randint(count, self._shape, generator=self._generator)


def _color(hue: Tensor, saturation: Tensor, value: Tensor) -> Tensor:
    """RGB [B, 3, 1, 1] of a hue in turns (any real number), saturation and value, all [B, 1, 1]."""
    offsets = torch.tensor([0.0, 2 / 3, 1 / 3])[:, None, None]
    ramp = (((hue[:, None] + offsets) % 1) * 6 - 3).abs().sub(1).clamp(0, 1)
    return value[:, None] * (1 - saturation[:, None] * (1 - ramp))


def _edge(signed_distance: Tensor, image_size: int) -> Tensor:
    """1 inside (negative distances), 0 outside, smooth over about one and a half pixels."""
    return (0.5 - signed_distance * (image_size / 3)).clamp(0, 1)


def _draw_clouds(draw: _Draw, x: Tensor, y: Tensor) -> Tensor:
    """A rough plane around 0, [B, S, S]: waves whose height falls with their frequency, as in photographs."""
    clouds = torch.zeros(())
    for octave in range(_NUM_WAVES):
        frequency = 1.5 * 1.7**octave * torch.exp(0.2 * draw.normal())
        angle = draw.uniform(0, math.pi)
        phase = draw.uniform(0, 2 * math.pi)
        wave = torch.sin(frequency * (angle.cos() * x + angle.sin() * y) + phase)
        clouds = clouds + wave * (0.7**octave)
    return clouds


def _draw_sky(draw: _Draw, x: Tensor, y: Tensor, clouds: Tensor, scene_hue: Tensor) -> Tensor:
    """A gradient between two colours, bent by clouds, [B, 3, S, S]."""
    angle = 0.5 * math.pi + 0.5 * draw.normal()
    slope = draw.uniform(0.2, 0.7)
    mixture = (0.5 + slope * (angle.cos() * x + angle.sin() * y) + draw.exponential(0.1) * clouds).clamp(0, 1)
    hue = torch.where(draw.chance(0.5), 0.57 + 0.03 * draw.normal(), scene_hue)
    top = _color(hue, draw.uniform(0.05, 0.75), 1 - draw.exponential(0.35).clamp(max=0.9))
    bottom = _color(hue + 0.12 * draw.normal(), draw.uniform(0.0, 0.6), 1 - draw.exponential(0.25).clamp(max=0.8))
    return torch.lerp(top, bottom, mixture[:, None])


def _draw_ground(
    draw: _Draw, x: Tensor, y: Tensor, clouds: Tensor, scene_hue: Tensor, image: Tensor
) -> tuple[Tensor, Tensor]:
    """Hills with furrows over the lower part of most images: the image, and what the ground covers, [B, S, S]."""
    height = torch.where(draw.chance(0.75), 0.35 + 0.35 * draw.normal(), torch.tensor(3.0))
    hill = draw.exponential(0.12) * torch.sin(draw.uniform(1, 5) * x + draw.uniform(0, 2 * math.pi))
    distance = height + hill + 0.4 * draw.normal() * x - y
    hue = torch.where(draw.chance(0.6), 0.2 + 0.07 * draw.normal(), scene_hue + 0.5)
    near = _color(hue, draw.uniform(0.1, 0.8), draw.uniform(0.1, 0.8))
    far = _color(hue + 0.05 * draw.normal(), draw.uniform(0.1, 0.6), draw.uniform(0.2, 0.9))
    angle = draw.uniform(0, math.pi)
    furrows = torch.sin(draw.uniform(6, 20) * (angle.cos() * x + angle.sin() * y))
    texture = 1 + draw.exponential(0.08) * furrows + draw.exponential(0.05) * clouds
    ground = torch.lerp(far, near, (-0.9 * distance).clamp(0, 1)[:, None]) * texture[:, None]
    cover = _edge(distance, len(y))
    return torch.lerp(image, ground, cover[:, None]), cover


def _draw_object(
    draw: _Draw,
    x: Tensor,
    y: Tensor,
    light: tuple[Tensor, Tensor],
    scene_hue: Tensor,
    ground: Tensor,
    image: Tensor,
) -> Tensor:
    """One rounded, lit, perhaps striped or hollow shape in four of five images, with its shadow on the ground."""
    present = draw.chance(0.8)
    radius = (0.17 * torch.exp(draw.exponential(0.65))).clamp(max=1.1)
    offset_x, offset_y = x - 0.5 * draw.normal(), y - 0.15 - 0.4 * draw.normal()
    turn = draw.uniform(0, 2 * math.pi)
    stretch = torch.exp(0.3 * draw.normal())
    cos, sin = turn.cos() / radius, turn.sin() / radius
    along = (cos * stretch) * offset_x + (sin * stretch) * offset_y  # [B, S, S], in radii
    across = (cos / stretch) * offset_y - (sin / stretch) * offset_x

    level = _level(along, across, _OUTLINES[draw.index(len(_OUTLINES))])
    hollow = draw.chance(0.15)
    level = torch.where(hollow, (level - 0.72).abs() / 0.28, level)
    cover = _edge((level - 1) * radius * torch.where(hollow, 0.28, 0.8), len(y)) * present

    # The surface bulges towards the eye; its normal leans outwards near the outline.
    inside = level.clamp(0, 1)
    distance = (offset_x.square() + offset_y.square()).sqrt()
    facing = inside.square() * (offset_x * light[0] + offset_y * light[1]) / distance.clamp(min=1e-3)
    shade = 0.8 + draw.uniform(0.1, 0.55) * facing
    gloss = draw.exponential(0.35) * (facing - 0.25 * (1 - inside) - 0.35).clamp(min=0)
    frequency = draw.uniform(2.5, 7)
    sharpness = 0.35 * len(y) * radius / frequency  # stripes of few pixels fade instead of flickering
    stripes = sharpness * torch.sin(frequency * along + draw.uniform(0, 2 * math.pi))

    hue = scene_hue + torch.where(draw.chance(0.5), 0.08 * draw.normal(), draw.uniform(0, 1))
    base = _color(hue, draw.uniform(0.2, 1.0), draw.uniform(0.3, 1.1))
    second = _color(hue + draw.uniform(0, 1), draw.uniform(0.0, 0.8), draw.uniform(0.2, 1.1))
    striped = (0.5 + stripes).clamp(0, 1) * draw.chance(0.3)
    color = torch.lerp(base, second, striped[:, None])
    surface = torch.addcmul(gloss[:, None], color, shade[:, None])

    shadow_x, shadow_y = offset_x / radius, (offset_y - 0.9 * radius) / (0.4 * radius)
    shadow = draw.uniform(0.2, 0.7) * present * (-shadow_x.square()).exp() * (-shadow_y.square()).exp()
    image = image * (1 - shadow * ground)[:, None]
    return torch.lerp(image, surface, cover[:, None])


def _level(along: Tensor, across: Tensor, outline: Tensor) -> Tensor:
    """How far out a point lies, [B, S, S]: 0 in the centre, 1 on the outline (Gielis' formula, [B, 1, 1, 4])."""
    symmetry, n1, n2, n3 = outline.unbind(-1)
    quarter = torch.atan2(across, along) * (symmetry / 4)
    # exp(n * log(x)) instead of x ** n: half the time
    inverse = (n2 * quarter.cos().abs().log()).exp() + (n3 * quarter.sin().abs().log()).exp()
    return (along.square() + across.square()).sqrt() * (inverse.log() / n1).exp()
