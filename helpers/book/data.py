"""The book's small data sets: digits and clothes. Photographs are in `saliency_sanity.book.photographs`."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .assets import locate

CLASSES = {
    "digits": tuple("0123456789"),
    "clothes": (
        "T-shirt",
        "trousers",
        "pullover",
        "dress",
        "coat",
        "sandal",
        "shirt",
        "sneaker",
        "bag",
        "ankle boot",
    ),
}
SPLITS = ("train", "test")


class Images(NamedTuple):
    """A data set: `images` float32 `(N, 1, 28, 28)` in [0, 1], `labels` int64 `(N,)`, class names."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]


def load(name: str, split: str = "test") -> Images:
    """Load `digits` (MNIST: 4,000 train, 1,000 test) or `clothes` (Fashion-MNIST: 12,000 and 2,000).

    Balanced over the ten classes, in a fixed random order; nothing is downloaded.

    Raises
    ------
    ValueError
        Unknown name or split; the message lists the known ones.
    saliency_sanity.book.assets.AssetError
        The file is missing or damaged.
    """
    if name not in CLASSES:
        raise ValueError(f"unknown data set {name!r}; known: {', '.join(CLASSES)}.")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; known: {', '.join(SPLITS)}.")
    with np.load(locate(f"{name}.npz")) as file:
        images, labels = file[f"{split}_images"], file[f"{split}_labels"]
    pixels = torch.from_numpy(images).to(torch.float32).div(255)[:, None]
    return Images(pixels, torch.from_numpy(labels).to(torch.int64), CLASSES[name])
