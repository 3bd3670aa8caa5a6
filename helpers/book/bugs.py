"""Data sets and networks with a bug planted in them, and the exact truth about where it is.

The taxonomy is that of Adebayo et al. (2020): data can be contaminated by a background that goes with the class or
by wrong labels, a network can lose weights that it had learned, and a sound network can be fed wrongly at test time.
Draws come from a CPU generator; everything else runs where its tensors are.
"""

import math
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import NamedTuple

import torch
from scipy.ndimage import binary_fill_holes
from torch import Tensor, nn
from torchvision.transforms.v2.functional import gaussian_blur, resize

from .. import randomization
from ..device import generator
from . import photographs
from .training import check_labels

# Name of a background -> texture, its size in pixels, quarter turns, negative. Together ten that differ by eye.
BACKGROUNDS = {
    "brick": ("brick", 160, 0, False),
    "brick, turned": ("brick", 160, 1, False),
    "brick, negative": ("brick", 160, 0, True),
    "fine brick": ("brick", 72, 0, False),
    "fine brick, turned": ("brick", 72, 1, False),
    "grass": ("grass", 96, 0, False),
    "tall grass": ("grass", 400, 0, False),
    "gravel": ("gravel", 144, 0, False),
    "gravel, negative": ("gravel", 144, 0, True),
    "coarse gravel": ("gravel", 448, 0, False),
}


class Scenes(NamedTuple):
    """Objects on backgrounds, and the truth about both.

    `images` (N, C, size, size); `masks` (N, size, size), 1 on the object and 0 off it; `backgrounds`, the same
    images without their object; `which` (N,) int64, the background that each of those was cut from.
    """

    images: Tensor
    masks: Tensor
    backgrounds: Tensor
    which: Tensor


class Mislabelled(NamedTuple):
    """`labels` (N,) int64, some of them wrong, and `flipped` (F,) int64, the sorted indices of those."""

    labels: Tensor
    flipped: Tensor


def silhouettes(images: Tensor, *, threshold: float = 0.04) -> Tensor:
    """Masks `(N, H, W)` of objects on black, 1 where a pixel is on the object or enclosed by it.

    Parameters
    ----------
    images : float `(N, C, H, W)` in [0, 1], one object each on a black ground.
    threshold : a pixel is the object's where a channel is above this value.
    """
    bright = (images > threshold).any(1).cpu().numpy()
    filled = [torch.from_numpy(binary_fill_holes(picture)) for picture in bright]
    return torch.stack(filled).to(images)


def backgrounds() -> dict[str, Tensor]:
    """Ten backgrounds without an object: name -> (1, S, S) float32 in [0, 1], S from 72 to 448.

    The three photographed textures of the package at several scales, turned or in negative.
    """
    made = {}
    for name, (texture, size, turns, negative) in BACKGROUNDS.items():
        background = photographs.textures(size)[texture][:1].rot90(turns, (1, 2))
        made[name] = 1 - background if negative else background
    return made


def scenes(
    objects: Tensor, masks: Tensor, which: Tensor, backgrounds: Mapping[str, Tensor], *, size: int = 40, seed: int
) -> Scenes:
    """Paste each object at a random place on a random piece of the background chosen for it.

    Which background goes with which object is the caller's choice, and the whole difference between a shortcut
    (`which=labels`), a clean set (`which=permute_labels(labels, seed=...)`) and a swap (`which=(labels + 1) % 10`).

    Parameters
    ----------
    objects : float `(N, C, h, w)` in [0, 1].
    masks : `(N, h, w)` in [0, 1], 1 where the object covers the background.
    which : int64 `(N,)`, indices into `backgrounds`.
    backgrounds : name -> `(C, S, S)` in [0, 1], each at least `size` wide and high.
    size : side of the images in pixels.
    seed : of the places and of the pieces; neither depends on `which`.

    Raises
    ------
    ValueError
        Indices of no background, or objects or backgrounds that do not fit the size.
    """
    check_labels(objects, which, len(backgrounds))
    (height, width), stack = objects.shape[2:], list(backgrounds.values())
    if max(height, width) > size or min(min(whole.shape[1:]) for whole in stack) < size:
        raise ValueError(
            f"images of size {size} must hold the objects, ({height}, {width}), and fit into each background."
        )
    draws = torch.rand(len(objects), 4, generator=generator(seed), dtype=torch.float64)
    made = []
    for cutout, mask, number, draw in zip(objects, masks, which.tolist(), draws.tolist()):
        whole = stack[number].to(objects)
        y, x = (int(u * (side - size + 1)) for u, side in zip(draw[:2], whole.shape[1:]))
        top, left = (int(u * (size - side + 1)) for u, side in zip(draw[2:], (height, width)))
        background = whole[:, y : y + size, x : x + size]
        made.append((*photographs.blend(background, cutout, mask, top, left), background))
    images, covers, pieces = (torch.stack(tensors) for tensors in zip(*made))
    return Scenes(images, covers, pieces, which)


def blur_class(images: Tensor, labels: Tensor, *, label: int = 4, sigma: float = 1.0) -> Tensor:
    """The same images `(N, C, H, W)`, those of one class blurred as a whole by a Gaussian of `sigma` pixels.

    A cue without a place: no mask could say where it is.
    """
    side = 2 * math.ceil(3 * sigma) + 1
    chosen = (labels == label)[:, None, None, None]
    return torch.where(chosen, gaussian_blur(images, [side, side], [sigma, sigma]), images)


def mislabel(labels: Tensor, *, fraction: float = 0.1, classes: int = 10, seed: int) -> Mislabelled:
    """Give a fraction of the labels, drawn at random, another class, each wrong one equally often.

    Parameters
    ----------
    labels : int64 `(N,)` in `range(classes)`; left as they are.
    fraction : of the labels to flip, rounded to a whole number of them.
    classes : how many there are.

    Raises
    ------
    ValueError
        A fraction outside [0, 1], fewer than two classes, or labels that are none of them.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is in [0, 1], got {fraction}.")
    if classes < 2:
        raise ValueError(f"a wrong label needs at least two classes, got {classes}.")
    check_labels(labels, labels, classes)
    draw = generator(seed)
    flipped = torch.randperm(len(labels), generator=draw)[: round(fraction * len(labels))].sort().values
    shift = torch.randint(1, classes, (len(flipped),), generator=draw)
    flipped, shift = flipped.to(labels.device), shift.to(labels.device)
    wrong = labels.clone()
    wrong[flipped] = (labels[flipped] + shift) % classes
    return Mislabelled(wrong, flipped)


def lost_weights(
    model: nn.Module, stage: str, *, fraction: float = 1.0, seed: int, example: Tensor | None = None
) -> nn.Module:
    """A copy of `model` with a stage, or a fraction of its channels, as initialised: a part of a checkpoint lost.

    Parameters
    ----------
    model : any module; it is left bit for bit as it is.
    stage, example : one of `randomization.plan(model, example=example)`; norms belong to the layer before them.
    fraction : of the output channels of each layer in the stage, drawn at random and rounded to a whole number. Layers
        of one width, and so a norm and its layer, lose the same. The other channels keep what they have learned.

    Raises
    ------
    ValueError
        An unknown stage, a fraction outside [0, 1], or a model whose order of stages only an example can show.
    """
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction is in [0, 1], got {fraction}.")
    copies = dict(randomization.independent(model, seed=seed, example=example))
    if stage not in copies:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(copies)}.")
    broken, fresh = deepcopy(model), copies[stage].state_dict()
    for name, tensor in broken.state_dict().items():
        if tensor.dim() and not torch.equal(tensor, fresh[name]):
            rows = torch.randperm(len(tensor), generator=generator(seed))[: round(fraction * len(tensor))]
            tensor[rows] = fresh[name][rows]
    return broken


# Mistakes of a pipeline that feeds images in [0, 1] to a network trained on such images.
PREPROCESSING: dict[str, Callable[[Tensor], Tensor]] = {
    "not scaled": lambda images: 255 * images,
    "scaled to [-1, 1]": lambda images: 2 * images - 1,
    "negative": lambda images: 1 - images,
    "rows and columns exchanged": lambda images: images.transpose(-2, -1),
}


def imagenet_input(images: Tensor) -> Tensor:
    """Square RGB images `(N, 3, S, S)` in [0, 1] as a network trained on ImageNet expects them.

    Resized to `(N, 3, 224, 224)`, then normalised channel by channel; a ValueError if they are not RGB.
    """
    return photographs.normalize(_resized(images))


def _resized(images: Tensor) -> Tensor:
    return resize(images, [224, 224], antialias=True)


# Mistakes of a pipeline that should be `imagenet_input`; none of them makes the network complain.
IMAGENET_PREPROCESSING: dict[str, Callable[[Tensor], Tensor]] = {
    "red and blue exchanged": lambda images: imagenet_input(images.flip(1)),
    "not normalised": lambda images: _resized(images),
    "scaled to [-1, 1]": lambda images: 2 * _resized(images) - 1,
    "neither scaled nor normalised": lambda images: 255 * _resized(images),
    "not resized": lambda images: photographs.normalize(images),
}
