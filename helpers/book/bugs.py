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
SHEETS = {
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

    `images` (N, C, size, size); `masks` (N, size, size), 1 on the object and 0 off it; `canvases`, the same
    images without their object; `backgrounds` (N,) int64, which of the backgrounds each canvas was cut from.
    """

    images: Tensor
    masks: Tensor
    canvases: Tensor
    backgrounds: Tensor


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


def sheets() -> dict[str, Tensor]:
    """Ten backgrounds without an object: name -> (1, S, S) float32 in [0, 1], S from 72 to 448.

    The three photographed textures of the package at several scales, turned or in negative.
    """
    made = {}
    for name, (texture, size, turns, negative) in SHEETS.items():
        sheet = photographs.textures(size)[texture][:1].rot90(turns, (1, 2))
        made[name] = 1 - sheet if negative else sheet
    return made


def place(
    objects: Tensor, masks: Tensor, backgrounds: Tensor, sheets: Mapping[str, Tensor], *, size: int = 40, seed: int
) -> Scenes:
    """Put each object at a random place of a random piece of the background chosen for it.

    Which background goes with which object is the caller's choice, and the whole difference between a shortcut
    (`backgrounds=labels`), a clean set (`backgrounds=permute_labels(labels, seed=...)`) and a swap
    (`backgrounds=(labels + 1) % 10`).

    Parameters
    ----------
    objects : float `(N, C, h, w)` in [0, 1].
    masks : `(N, h, w)` in [0, 1], 1 where the object covers the background.
    backgrounds : int64 `(N,)`, indices into `sheets`.
    sheets : name -> `(C, S, S)` in [0, 1], each at least `size` wide and high.
    size : side of the images in pixels.
    seed : of the places and of the pieces; neither depends on `backgrounds`.

    Raises
    ------
    ValueError
        Backgrounds that are no indices of the sheets, or objects or sheets that do not fit the size.
    """
    check_labels(objects, backgrounds, len(sheets))
    (height, width), stack = objects.shape[2:], list(sheets.values())
    if max(height, width) > size or min(min(sheet.shape[1:]) for sheet in stack) < size:
        raise ValueError(f"images of size {size} must hold the objects, ({height}, {width}), and fit into each sheet.")
    draws = torch.rand(len(objects), 4, generator=generator(seed), dtype=torch.float64)
    images, covers, canvases = [], [], []
    for cutout, mask, which, draw in zip(objects, masks, backgrounds.tolist(), draws.tolist()):
        sheet = stack[which].to(objects)
        y, x = (int(u * (side - size + 1)) for u, side in zip(draw[:2], sheet.shape[1:]))
        top, left = (int(u * (size - side + 1)) for u, side in zip(draw[2:], (height, width)))
        canvas = sheet[:, y : y + size, x : x + size]
        image, cover = canvas.clone(), canvas.new_zeros(size, size)
        box = (slice(top, top + height), slice(left, left + width))
        cover[box] = mask
        image[:, *box] = mask * cutout + (1 - mask) * canvas[:, *box]
        images.append(image)
        covers.append(cover)
        canvases.append(canvas)
    return Scenes(torch.stack(images), torch.stack(covers), torch.stack(canvases), backgrounds)


def blur_class(images: Tensor, labels: Tensor, *, label: int = 4, sigma: float = 1.0) -> Tensor:
    """The same images `(N, C, H, W)`, those of one class blurred as a whole by a Gaussian of `sigma` pixels.

    A cue without a place: no mask could say where it is.
    """
    side = 2 * math.ceil(3 * sigma) + 1
    chosen = (labels == label)[:, None, None, None]
    return torch.where(chosen, gaussian_blur(images, [side, side], [sigma, sigma]), images)


def mislabel(labels: Tensor, *, share: float = 0.1, classes: int = 10, seed: int) -> Mislabelled:
    """Give a share of the labels, drawn at random, another class, each wrong one equally often.

    Parameters
    ----------
    labels : int64 `(N,)` in `range(classes)`; left as they are.
    share : of the labels to flip, rounded to a whole number of them.
    classes : how many there are.

    Raises
    ------
    ValueError
        A share outside [0, 1], fewer than two classes, or labels that are none of them.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is in [0, 1], got {share}.")
    if classes < 2:
        raise ValueError(f"a wrong label needs at least two classes, got {classes}.")
    check_labels(labels, labels, classes)
    draw = generator(seed)
    flipped = torch.randperm(len(labels), generator=draw)[: round(share * len(labels))].sort().values
    shift = torch.randint(1, classes, (len(flipped),), generator=draw)
    flipped, shift = flipped.to(labels.device), shift.to(labels.device)
    wrong = labels.clone()
    wrong[flipped] = (labels[flipped] + shift) % classes
    return Mislabelled(wrong, flipped)


def lost_weights(
    model: nn.Module, stage: str, *, share: float = 1.0, seed: int, example: Tensor | None = None
) -> nn.Module:
    """A copy of `model` in which a stage, or a share of its channels, is as initialised: a part of a checkpoint lost.

    Parameters
    ----------
    model : any module; it is left bit for bit as it is.
    stage, example : one of `randomization.plan(model, example=example)`; norms belong to the layer before them.
    share : of the output channels of each layer in the stage, drawn at random and rounded to a whole number. Layers
        of one width, and so a norm and its layer, lose the same. The other channels keep what they have learned.

    Raises
    ------
    ValueError
        An unknown stage, a share outside [0, 1], or a model whose order of stages only an example can show.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"share is in [0, 1], got {share}.")
    copies = dict(randomization.independent(model, seed=seed, example=example))
    if stage not in copies:
        raise ValueError(f"unknown stage {stage!r}; known: {', '.join(copies)}.")
    broken, fresh = deepcopy(model), copies[stage].state_dict()
    for name, tensor in broken.state_dict().items():
        if tensor.dim() and not torch.equal(tensor, fresh[name]):
            rows = torch.randperm(len(tensor), generator=generator(seed))[: round(share * len(tensor))]
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
