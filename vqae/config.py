"""The options of a run. Command-line flags, their help texts and config.json are generated from `Config`."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from vqae.runtime.errors import UsageError

Dataset = Literal["auto", "cifar10", "imagefolder", "synthetic"]


@dataclass(frozen=True)
class Config:
    """A training run.

    Training minimises two losses: the reconstruction loss, whose gradient the straight-through estimator copies from
    the decoder's input to the encoder's output, and the codebook loss, which moves the codes towards their embeddings.
    There is no commitment loss, and by default the codebook is initialised at random.
    """

    out: Path = Path("runs/default")
    """Output folder of the run."""
    dataset: Dataset = "auto"
    """auto: CIFAR-10 if it is found or can be downloaded, otherwise synthetic images (with a warning)."""
    data_dir: Path | None = None
    """imagefolder: a folder with train/<class>/* and test/<class>/*, or with images alone, which are then split.
    EXIF rotation is applied, and transparent pixels become white. cifar10: the folder to read or download to."""
    test_fraction: float = 0.1
    """imagefolder without train/ and test/: fraction of the images in the test split, drawn by --seed and the path."""
    skip_unreadable: bool = False
    """imagefolder: skip and count files that are damaged or not images. By default, the first one is an error."""
    image_size: int | None = None
    """Resize and crop images to squares of this side. Required if the images differ in size."""
    limit: int | None = None
    """Use only N training images, drawn at random with --seed."""
    val_fraction: float = 0.02
    """Fraction of the training images held out for validation, which selects best.pt.
    With 0, best.pt is the model after the last epoch."""
    flip: bool = True
    """Random horizontal flip (p = 0.5). Reduces the gap between training and test MSE."""

    num_codes: int = 512
    """Codebook size K."""
    num_quantizers: int = 1
    """Codes per image Q. Each further code comes from a codebook of its own and quantizes what the others left."""
    code_dim: int = 64
    """Code dimension D. 512 uses the features of ResNet-18 without a projection."""
    hidden_dims: tuple[int, ...] = (1024,)
    """Widths of the decoder's hidden layers."""
    network_init: Literal["pca", "random"] = "pca"
    """Initialise encoder and decoder by principal components of training images, or at random.
    Random initialisation yields embeddings with few effective dimensions, so images map to poor codes."""
    embedding_norm: Literal["batch", "none"] = "none"
    """batch: BatchNorm without affine parameters before the quantizer, so that all dimensions have variance 1."""
    codebook_init: Literal["normal", "uniform", "data"] = "normal"
    """Initialisation of the codebook: random (normal, uniform), or embeddings of the first batch (data)."""
    restart_after: int = 15_360
    """Reset a code to a random embedding after this many images without use, but at the latest after two epochs.
    0 disables resets."""

    epochs: int = 12
    """Maximum number of epochs."""
    max_minutes: float | None = None
    """Maximum wall time of the process, in minutes. The learning-rate schedule adapts to it."""
    batch_size: int = 256
    """Images per step, over all processes."""
    lr: float = 0.3
    """Peak learning rate of the decoder."""
    encoder_lr: float = 0.003
    """Peak learning rate of the encoder."""
    unfreeze_encoder_at: float = 0.0
    """Fraction of the run during which the encoder is frozen. By default it learns from the first step."""
    momentum: float = 0.9
    """SGD momentum of encoder and decoder. The codebook has none."""
    weight_decay: float = 0.0
    """SGD weight decay of encoder and decoder. The codebook has none."""
    warmup: float = 0.05
    """Fraction of the run with a linear learning-rate warm-up. Cosine decay follows."""
    codebook_step: Literal["count_normalised", "plain"] = "count_normalised"
    """count_normalised: move each code a fixed fraction (codebook_lr) of the way to the mean of its assigned rows.
    plain: SGD on the codebook loss, which moves a code 2·codebook_lr/(K·D) of the way if codes are used evenly."""
    codebook_lr: float = 0.2
    """Learning rate of the codebook, see --codebook-step."""

    seed: int = 0
    """Random seed."""
    device: str = "auto"
    """auto, cpu, cuda, or a GPU such as cuda:1."""
    amp: bool = False
    """bfloat16 autocast for encoder and decoder."""
    compile: bool = False
    """Compile the model with torch.compile."""
    cuda_graph: bool = True
    """On CUDA, capture the training step as a CUDA graph. The numbers are those of the eager step, which runs with
    --compile, with several processes, or if the search cannot run in Triton."""
    checkpoint_minutes: float = 1.0
    """Save last.pt at least this often."""

    def fitted_to(self, num_images: int) -> Config:
        """Limit batch_size to the number of training images, and restart_after to two epochs of them."""
        return dataclasses.replace(
            self, batch_size=min(self.batch_size, num_images), restart_after=min(self.restart_after, 2 * num_images)
        )

    @property
    def folder_options(self) -> dict[str, Any]:
        """How images are read, and an image folder is split: keyword arguments of `load_images` and `load_split`."""
        names = ("image_size", "seed", "test_fraction", "skip_unreadable")
        return {name: getattr(self, name) for name in names}

    @property
    def restart_steps(self) -> int:
        """`restart_after` in training steps, 0 if codes are never reset."""
        return -(-self.restart_after // self.batch_size)

    def check(self) -> None:
        """Raise UsageError if a value is out of range or two values conflict."""
        self.check_each()
        if self.unfreeze_encoder_at and self.network_init == "random":
            raise UsageError(
                "--unfreeze-encoder-at must be 0 with --network-init random, because a random encoder must be trained "
                f"from the first step, got {self.unfreeze_encoder_at}"
            )
        if self.codebook_step == "count_normalised" and self.codebook_lr >= 2:
            raise UsageError(
                f"--codebook-lr must be below 2 with --codebook-step count_normalised, got {self.codebook_lr}"
            )

    def check_each(self) -> None:
        """Raise UsageError if a value is out of range."""
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise UsageError(f"{flag(name)} must be one of {choices}, got {getattr(self, name)!r}")
        for rule, (names, holds) in _RANGES.items():
            for name in names.split():
                value = getattr(self, name)
                numbers = value if isinstance(value, tuple) else () if value is None else (value,)
                if not all(abs(number) < math.inf and holds(number) for number in numbers):
                    raise UsageError(f"{flag(name)} must be {rule}, got {' '.join(map(str, numbers))}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as in config.json and checkpoints."""
        values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(self), default=str))
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Config:
        """The inverse of `to_dict`. Missing options get their defaults, renamed ones a DeprecationWarning.

        Raises UsageError, naming the `source`, if an option is unknown, has the wrong type or is out of range.
        Conflicts between two values are left to `check`, because flags may still override them.
        """
        if not isinstance(values, dict):
            raise UsageError(f"{source} must hold an object of settings, got {type(values).__name__}")
        values = _with_current_names(values, source)
        kinds = get_type_hints(cls)
        unknown = sorted(set(values) - set(kinds))
        if unknown:
            raise UsageError(f"{source} holds unknown settings: {', '.join(unknown)}")
        try:
            config = cls(**{name: _typed(value, kinds[name], flag(name)) for name, value in values.items()})
            config.check_each()
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
        return config

    @classmethod
    def read(cls, file: Path) -> Config:
        """Read a JSON file of options. Raises UsageError as `from_dict` does, or if the file cannot be read."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"{file} is not JSON: {error}") from None
        return cls.from_dict(values, str(file))


# The range of each numeric option: the rule as messages state it, the options, the test. All must be finite.
_RANGES: dict[str, tuple[str, Callable[[float], bool]]] = {
    "above 0": (
        "num_codes num_quantizers code_dim hidden_dims epochs batch_size lr encoder_lr codebook_lr image_size limit "
        "max_minutes test_fraction",
        lambda value: value > 0,
    ),
    "at least 0": (
        "momentum weight_decay restart_after warmup unfreeze_encoder_at checkpoint_minutes val_fraction",
        lambda value: value >= 0,
    ),
    "below 1": ("momentum warmup test_fraction val_fraction unfreeze_encoder_at", lambda value: value < 1),
    "at least 2, which BatchNorm needs": ("batch_size", lambda value: value >= 2),
    "at least 0 and below 2**62": ("seed", lambda value: 0 <= value < 2**62),
}

# Presets of --recipe. A recipe sets every option that affects how the model learns, so that it does not change with the
# defaults. It does not set the model size and the length of the run.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {
        "flip": False,
        "network_init": "random",
        "embedding_norm": "none",
        "codebook_init": "normal",
        "restart_after": 0,
        "lr": 0.1,
        "encoder_lr": 0.1,
        "unfreeze_encoder_at": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0.0,
        "codebook_step": "plain",
        "codebook_lr": 0.1,
    },
}

# Deprecated names in the flags, the config.json and the checkpoints of version 0.1; to be removed after one release.
_RENAMED_OPTIONS = {"encoder_start": "unfreeze_encoder_at"}
_RENAMED_VALUES = {("network_init", "pictures"): "pca", ("codebook_step", "share"): "count_normalised"}


def _with_current_names(values: dict[str, Any], source: str) -> dict[str, Any]:
    """Replace deprecated options and values, each with a DeprecationWarning."""
    current = {}
    for name, value in values.items():
        new_name = _RENAMED_OPTIONS.get(name, name)
        new_value = _RENAMED_VALUES.get((name, value), value) if isinstance(value, str) else value
        if (new_name, new_value) != (name, value):
            message = f"{source}: {name} = {value!r} is deprecated, use {new_name} = {new_value!r}"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
        current[new_name] = new_value
    return current


def with_current_flags(arguments: list[str]) -> list[str]:
    """Replace deprecated flags and values on the command line, each with a DeprecationWarning."""
    current, name = [], ""
    for argument in arguments:
        is_flag = argument.startswith("--")
        text, equals, value = argument.partition("=") if is_flag else ("", "", argument)
        name = text[2:].replace("-", "_") if is_flag else name  # else the argument is the value of the last flag
        new_text = flag(_RENAMED_OPTIONS[name]) if is_flag and name in _RENAMED_OPTIONS else text
        new = new_text + equals + _RENAMED_VALUES.get((name, value), value)
        if new != argument:
            message = f"{argument if is_flag else f'{flag(name)} {argument}'} is deprecated, use {new}"
            warnings.warn(message, DeprecationWarning, stacklevel=3)
        current.append(new)
    return current


def flag(name: str) -> str:
    """The command-line flag of an option."""
    return "--" + name.replace("_", "-")


def _typed(value: Any, kind: Any, name: str) -> Any:
    """Convert a JSON value to the type of its option. Raises UsageError if it has another type."""
    if isinstance(kind, UnionType):
        return None if value is None else _typed(value, get_args(kind)[0], name)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(item, get_args(kind)[0], name) for item in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return value
    if get_origin(kind) is Literal or type(value) is kind:  # `check_each` tests the choices of a Literal
        return value
    raise UsageError(f"{name} must be {kind if get_origin(kind) else kind.__name__}, got {json.dumps(value)}")


def find_device(name: str) -> torch.device:
    """The device that --device names. Raises UsageError if this machine does not have it."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device {name} does not exist: this machine has {count} CUDA devices")
    return device
