"""Pictures to train on and to measure with, held in memory as uint8."""

from vqae.data.image_folder import read_picture
from vqae.data.load import Pictures, load_pictures, load_split

__all__ = ["Pictures", "load_pictures", "load_split", "read_picture"]
