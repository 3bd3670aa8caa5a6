"""Photographs, and photographed objects on backgrounds: images whose object is known pixel by pixel.

Images are (N, 3, H, W) float32 in [0, 1]; a network trained on ImageNet reads `normalize(images)`.
Sources and licences of the files are in `assets/files/README.md`; the objects are under the GPL, version 2
or later, see `assets/files/stamps/LICENSE.md`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torchvision.models import SqueezeNet1_1_Weights
from torchvision.transforms.v2 import functional as F

from .assets import listed, locate

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
GREY = 0.5


class Composites(NamedTuple):
    """Objects pasted on a background.

    `images` (N, 3, H, W) float32 in [0, 1]; `masks` (N, H, W) float32, the object's alpha: 1 on the object, 0
    off it, between them on its edge; `labels` (N,) int64, ImageNet class indices; `names` of the N objects.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor
    names: list[str]


def normalize(images: Tensor) -> Tensor:
    """Images in [0, 1] -> input of a network trained on ImageNet: (image − mean)/std, channel by channel.

    Parameters and result are (N, 3, H, W); a ValueError says if they are not.
    """
    _check_batch(images)
    return F.normalize(images, IMAGENET_MEAN, IMAGENET_STD)


def denormalize(images: Tensor) -> Tensor:
    """Input of a network trained on ImageNet -> images in [0, 1], inverse of `normalize`; (N, 3, H, W)."""
    _check_batch(images)
    mean, std = (images.new_tensor(c).view(3, 1, 1) for c in (IMAGENET_MEAN, IMAGENET_STD))
    return images * std + mean


def class_names() -> list[str]:
    """Names of the 1000 ImageNet classes, in order of class index (torchvision's list)."""
    return list(SqueezeNet1_1_Weights.IMAGENET1K_V1.meta["categories"])


def whole(size: int = 224) -> tuple[Tensor, list[str]]:
    """Whole photographs, centre-cropped.

    Returns
    -------
    images : (N, 3, size, size) float32 in [0, 1]
    names : N names, sorted; free licences, photographers named in `assets/files/README.md`.
    """
    found = _folder("photographs")
    return torch.stack([square_crop(_read(file), size) for file in found.values()]), list(found)


def textures(size: int = 224) -> dict[str, Tensor]:
    """Backgrounds without an object: name -> (3, size, size) float32 in [0, 1], three equal channels."""
    return {name: square_crop(_read(file), size) for name, file in _folder("textures").items()}


def stamps() -> pd.DataFrame:
    """The photographed objects, a row each.

    Columns: `name`, `file`, `class_index` and `class_name` (ImageNet), `source` (path in the Tux Paint
    stamps), `p_grey` (SqueezeNet's probability of that class on plain grey) and `grey`, `brick`, `grass`,
    `gravel`: 1 where SqueezeNet classifies the object correctly on that background, at the defaults of `composites`.
    """
    return pd.read_csv(locate("stamps/index.csv"))


def composites(
    background: str | Tensor = "grass",
    *,
    names: str | Sequence[str] | None = None,
    size: int = 224,
    scale: float = 0.7,
    position: tuple[float, float] = (0.5, 0.5),
    seed: int | None = None,
) -> Composites:
    """Objects pasted with their true alpha: alpha·object + (1 − alpha)·background.

    Parameters
    ----------
    background : "grey", the name of a texture or a photograph, or a (3, H, W) tensor in [0, 1]; a tensor sets
        the size and the device of the result.
    names : the objects, a name or several; all of `stamps()` by default.
    size : side of the images in pixels, for a background given by name.
    scale : longest side of an object as a fraction of the image's shorter side, in (0, 1].
    position : where in the free space an object lies, (across, down) in [0, 1]: (0, 0) is the upper left
        corner, (.5, .5) the middle; an object is never cut off.
    seed : draws a position for each object, instead of `position`.

    Raises
    ------
    ValueError
        An unknown name (the known ones are listed), a background that is no (3, H, W) image in [0, 1], a
        size, scale or position out of range.
    """
    index = stamps().set_index("name")
    names = [names] if isinstance(names, str) else list(index.index if names is None else names)
    if not names or (unknown := sorted({*names} - {*index.index})):
        raise ValueError(f"Unknown objects {unknown if names else names}; known: {', '.join(index.index)}.")
    if not 0 < scale <= 1:
        raise ValueError(f"scale is a fraction of the image in (0, 1], not {scale}.")
    if len(position) != 2 or not all(0 <= p <= 1 for p in position):
        raise ValueError(f"position is (across, down) in the free space, fractions in [0, 1], not {position}.")
    background = _background(background, size)
    if seed is None:
        positions = [position] * len(names)
    else:
        positions = torch.rand(len(names), 2, generator=torch.Generator().manual_seed(seed)).tolist()
    rows = index.loc[names]
    cutouts = [Image.open(locate(f"stamps/{file}")) for file in rows["file"]]
    pasted = [paste(background, cutout, scale, p) for cutout, p in zip(cutouts, positions, strict=True)]
    images, masks = (torch.stack(tensors) for tensors in zip(*pasted, strict=True))
    labels = torch.tensor(rows["class_index"].to_numpy(), device=background.device)
    return Composites(images, masks, labels, names)


def paste(
    background: Tensor, cutout: Image.Image, scale: float = 0.7, position: tuple[float, float] = (0.5, 0.5)
) -> tuple[Tensor, Tensor]:
    """One cut-out (RGBA) on a (3, H, W) background; `scale` and `position` as in `composites`.

    Returns
    -------
    image : (3, H, W) in [0, 1]
    mask : (H, W) in [0, 1], the alpha of the object where it lies
    """
    height, width = background.shape[1:]
    factor = scale * min(height, width) / max(cutout.size)
    w, h = (max(1, round(side * factor)) for side in cutout.size)
    fitted = cutout.convert("RGBA").resize((w, h), Image.Resampling.BICUBIC)  # Lanczos would leave a halo
    pixels = F.to_dtype(F.pil_to_tensor(fitted), scale=True).to(background)
    left, top = round(position[0] * (width - w)), round(position[1] * (height - h))
    return blend(background, pixels[:3], pixels[3], top, left)


def blend(background: Tensor, cutout: Tensor, alpha: Tensor, top: int, left: int) -> tuple[Tensor, Tensor]:
    """A cut-out `(C, h, w)` with its alpha `(h, w)` over a background `(C, H, W)`: the image, and the mask `(H, W)`."""
    image, mask = background.clone(), background.new_zeros(background.shape[1:])
    box = (slice(top, top + alpha.shape[0]), slice(left, left + alpha.shape[1]))
    mask[box] = alpha
    image[:, *box] = alpha * cutout + (1 - alpha) * background[:, *box]
    return image, mask


def square_crop(image: Tensor, size: int) -> Tensor:
    """An image (3, H, W) in [0, 1] -> (3, size, size): its shorter side resized, then its centre cropped."""
    _check_size(size)
    return F.center_crop(F.resize(image, [size], antialias=True), [size]).clamp(0, 1)


def _background(background: str | Tensor, size: int) -> Tensor:
    if isinstance(background, Tensor):
        if background.ndim != 3 or len(background) != 3 or not background.is_floating_point():
            found = f"{background.dtype} of shape {tuple(background.shape)}"
            raise ValueError(f"A background tensor is a (3, H, W) image of floats, not {found}.")
        if not (background.min() >= 0 and background.max() <= 1):
            raise ValueError("A background tensor is in [0, 1]; denormalize(...) undoes normalize(...).")
        return background
    known = _folder("textures") | _folder("photographs")
    if not isinstance(background, str) or background not in ("grey", *known):
        raise ValueError(f"Unknown background {background!r}; known: grey, {', '.join(known)}, or a tensor.")
    _check_size(size)
    if background == "grey":
        return torch.full((3, size, size), GREY)
    return square_crop(_read(known[background]), size)


def _folder(folder: str) -> dict[str, str]:
    """Stem -> asset name of the images in a folder of the assets."""
    return {file.removeprefix(f"{folder}/").rsplit(".", 1)[0]: file for file in listed(folder)}


def _read(file: str) -> Tensor:
    """(3, H, W) float32 in [0, 1]."""
    return F.to_dtype(F.pil_to_tensor(Image.open(locate(file)).convert("RGB")), scale=True)


def _check_size(size: int) -> None:
    if size < 1:
        raise ValueError(f"size is a number of pixels, at least 1, not {size}.")


def _check_batch(images: Tensor) -> None:
    if images.ndim != 4 or images.shape[1] != 3 or not images.is_floating_point():
        found = f"{images.dtype} of shape {tuple(images.shape)}"
        raise ValueError(f"Images are (N, 3, H, W) floats, not {found}; for one image, use image[None].")
