"""The settings of a run: their one home. The command line's flags, its help and config.json are made from here."""

from __future__ import annotations

import dataclasses
import json
import re
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from vqae.runtime.errors import UsageError

Dataset = Literal["auto", "cifar10", "imagefolder", "synthetic"]


@dataclass(frozen=True)
class Config:
    """A training run. Every default beyond the specification says why it is there."""

    out: Path = Path("runs/default")
    """Folder that the run writes to."""
    dataset: Dataset = "auto"
    """auto: CIFAR-10 where it is there or can be had, else synthetic pictures, with a warning."""
    data_dir: Path | None = None
    """Where the pictures are: DIR/train/<class>/* and DIR/test/<class>/* for imagefolder; for cifar10 the folder that
    it is, or will be, downloaded to (./data)."""
    image_size: int | None = None
    """Resize and crop pictures to squares of this side; needed where they differ in size."""
    limit: int | None = None
    """Take only the first N training pictures, after a seeded shuffle."""
    val_fraction: float = 0.02
    """Share of the training pictures held out to choose best.pt by; with 0, best.pt is the last."""
    flip: bool = True
    """Mirror each training picture with probability 1/2: twice the pictures, and codes that fit unseen ones better."""

    num_codes: int = 512
    """K, the codebook's size."""
    code_dim: int = 64
    """D, the dimension of a code; 512 takes ResNet-18's features as they are."""
    hidden_dims: tuple[int, ...] = (1024,)
    """Widths of the decoder's hidden layers."""
    network_init: Literal["pictures", "random"] = "pictures"
    """How encoder and decoder begin: by principal components of the pictures, or at random. At random they learn to
    tell only a few components apart, and pictures go to codes that are not their nearest."""
    embedding_norm: Literal["batch", "none"] = "none"
    """batch: BatchNorm without affine before the quantizer. It makes all of an embedding's coordinates count alike,
    where distances between pictures depend on some more than on others."""
    codebook_init: Literal["normal", "uniform", "data"] = "normal"
    """How the codebook begins: at random, as specified, or at the first batch's embeddings."""
    restart_after: int = 15_360
    """Put a code that none of so many pictures in a row has chosen at a random embedding of the batch; 0: never. Even
    use of 512 codes gives each of them 30 of these. Without restarts most codes get no gradient, ever."""

    epochs: int = 12
    """Passes over the training pictures, at most."""
    max_minutes: float | None = None
    """Wall time from start to exit; the learning rate's schedule fits into it."""
    batch_size: int = 256
    """Pictures a step, over all processes."""
    lr: float = 0.3
    """Peak learning rate of the decoder."""
    encoder_lr: float = 0.003
    """Peak learning rate of the encoder."""
    encoder_start: float = 0.75
    """Share of the run after which the encoder begins to learn; before it, decoder and codebook settle on what it gives
    them, in steps that take a third of the time."""
    momentum: float = 0.9
    """Of SGD, for encoder and decoder; the codebook has none."""
    weight_decay: float = 0.0
    """Of SGD, for encoder and decoder; the codebook has none."""
    warmup: float = 0.05
    """Share of the run over which the learning rate rises, before it falls by a cosine."""
    codebook_step: Literal["share", "plain"] = "share"
    """share: a step closes codebook_lr of the gap between a code and the mean of its rows. plain: SGD on the MSE, whose
    step, at even use, is 2·codebook_lr/(K·D) of that gap: nearly nothing."""
    codebook_lr: float = 0.2
    """Learning rate of the codebook; see codebook_step."""

    seed: int = 0
    """Of everything random."""
    device: str = "auto"
    """auto, cpu, cuda, or one GPU such as cuda:1."""
    amp: bool = False
    """bfloat16 autocast for encoder and decoder."""
    compile: bool = False
    """torch.compile the model."""
    checkpoint_minutes: float = 1.0
    """Save last.pt at least this often."""

    @property
    def restart_steps(self) -> int:
        """`restart_after` in training steps; 0: never."""
        return -(-self.restart_after // self.batch_size)

    def check(self) -> None:
        """Raise UsageError for a value out of range, or for values that do not go together."""
        self.check_each()
        if self.encoder_start and self.network_init == "random":
            raise UsageError(
                f"--encoder-start must be 0 with --network-init random, since a random encoder has to learn from the "
                f"first step, got {self.encoder_start}"
            )
        if self.codebook_step == "share" and self.codebook_lr >= 2:
            raise UsageError(f"--codebook-lr is a share of a gap and must be below 2, got {self.codebook_lr}")

    def check_each(self) -> None:
        """Raise UsageError for a value out of range."""
        for name, kind in get_type_hints(type(self)).items():
            if get_origin(kind) is Literal and getattr(self, name) not in get_args(kind):
                choices = ", ".join(get_args(kind))
                raise UsageError(f"{flag(name)} must be one of {choices}, got {getattr(self, name)!r}")
        positive = (
            "num_codes",
            "code_dim",
            "epochs",
            "batch_size",
            "lr",
            "encoder_lr",
            "codebook_lr",
            "image_size",
            "limit",
            "max_minutes",
        )
        not_negative = (
            "momentum",
            "weight_decay",
            "restart_after",
            "warmup",
            "encoder_start",
            "checkpoint_minutes",
            "val_fraction",
        )
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise UsageError(f"{flag(name)} must be above 0, got {value}")
        for name in not_negative:
            if not 0 <= getattr(self, name) < float("inf"):
                raise UsageError(f"{flag(name)} must be at least 0, got {getattr(self, name)}")
        for name in ("momentum", "warmup", "val_fraction", "encoder_start"):
            if getattr(self, name) >= 1:
                raise UsageError(f"{flag(name)} must be below 1, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise UsageError(f"--batch-size must be at least 2, which BatchNorm needs, got {self.batch_size}")
        if any(dim < 1 for dim in self.hidden_dims):
            raise UsageError(f"--hidden-dims must be above 0, got {' '.join(map(str, self.hidden_dims))}")
        if not 0 <= self.seed < 2**62:
            raise UsageError(f"--seed must be at least 0 and below 2**62, got {self.seed}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as config.json and checkpoints hold them."""
        values = dataclasses.asdict(self)
        values["hidden_dims"] = list(self.hidden_dims)
        for name in ("out", "data_dir"):
            values[name] = None if values[name] is None else str(values[name])
        return values

    @classmethod
    def from_dict(cls, values: dict[str, Any], source: str) -> Config:
        """The opposite of `to_dict`; raises UsageError, naming `source`, for what is no setting, or is out of range.

        Whether the values go together is for `check` to say: flags may still change some.
        """
        if not isinstance(values, dict):
            raise UsageError(f"{source} must hold an object of settings, got {type(values).__name__}")
        kinds = get_type_hints(cls)
        unknown = sorted(set(values) - set(kinds))
        if unknown:
            raise UsageError(f"{source} holds settings that are not known: {', '.join(unknown)}")
        try:
            config = cls(**{name: _typed(value, kinds[name], flag(name)) for name, value in values.items()})
            config.check_each()
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from None
        return config

    @classmethod
    def read(cls, file: Path) -> Config:
        """The settings in a JSON file; those that it leaves out have their defaults."""
        try:
            values = json.loads(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageError(f"{file} cannot be read: {error.strerror}") from None
        except ValueError as error:
            raise UsageError(f"{file} is not JSON: {error}") from None
        return cls.from_dict(values, str(file))


# Settings that --recipe sets at once, by the recipe's name. What decides how the model learns is all there, so that a
# recipe stays what it is when a default changes; the model's shape and the run's length are left as they are.
RECIPES: dict[str, dict[str, Any]] = {
    "plain": {  # the specification as written: codes N(0, 1), SGD of one learning rate, and nothing against collapse
        "flip": False,
        "network_init": "random",
        "embedding_norm": "none",
        "codebook_init": "normal",
        "restart_after": 0,
        "lr": 0.1,
        "encoder_lr": 0.1,
        "encoder_start": 0.0,
        "momentum": 0.9,
        "weight_decay": 5e-4,
        "warmup": 0.0,
        "codebook_step": "plain",
        "codebook_lr": 0.1,
    },
}


def flag(name: str) -> str:
    """A setting's name as the command line spells it."""
    return "--" + name.replace("_", "-")


def _typed(value: Any, kind: Any, name: str) -> Any:
    """A value from JSON as the type of its setting; raises UsageError, naming the setting, where it is of another."""
    if isinstance(kind, UnionType):
        return None if value is None else _typed(value, get_args(kind)[0], name)
    if get_origin(kind) is tuple and isinstance(value, list):
        return tuple(_typed(item, get_args(kind)[0], name) for item in value)
    if kind is Path and isinstance(value, str):
        return Path(value)
    if kind is float and type(value) is int:
        return value
    if get_origin(kind) is Literal or type(value) is kind:  # `check` knows the choices of a Literal
        return value
    raise UsageError(f"{name} must be {kind if get_origin(kind) else kind.__name__}, got {json.dumps(value)}")


def find_device(name: str) -> torch.device:
    """The device that --device names; raises UsageError where it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9]\d{0,2}))?", name):
        raise UsageError(f"--device must be auto, cpu, cuda or cuda:N, got {name!r}")
    device = torch.device(name)
    count = torch.cuda.device_count()
    if device.type == "cuda" and (device.index or 0) >= count:
        raise UsageError(f"--device {name} is not there: this machine has {count} CUDA devices")
    return device
