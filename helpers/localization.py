"""Does a map point at the object? Scores of maps `(N, H, W)` on masks `(N, H, W)` of where the object is.

A mask is bool, or in [0, 1], 1 on the object and 0 off it; a pixel on the object's edge counts in part for each side.
Undefined scores are NaN: those of a constant map, and of a mask that is all object or has none.
"""

import math

import torch
from torch import Tensor

from .checks import check_dense, check_maps


def mass_inside(maps: Tensor, masks: Tensor) -> Tensor:
    """Fraction of each map's sum that lies on the object, `(N,)` in [0, 1].

    Maps are not negative: `saliency.heatmap(maps, signed=False)`, or `.clamp(min=0)` of a signed one. A map that
    knows nothing of the object scores the object's fraction of the area, `masks.mean((1, 2))`, on average.

    Raises
    ------
    ValueError
        Negative, NaN or infinite pixels, naming the image; masks outside [0, 1]; shapes or devices that differ.
    """
    on = _checked(maps, masks).flatten(1)
    negative = (maps < 0).flatten(1).any(1)
    if negative.any():
        raise ValueError(
            f"the map of image {_first(negative)} has negative pixels, which no fraction can count; "
            "take saliency.heatmap(maps, signed=False), or .clamp(min=0)."
        )
    values = maps.detach().double().flatten(1)
    inside = (values * on).sum(1) / values.sum(1)
    return inside.masked_fill(_undefined(maps, masks), math.nan).to(maps.dtype)


def auc(maps: Tensor, masks: Tensor) -> Tensor:
    """Chance that a pixel of the object has a higher value than one off it, ties counting half, `(N,)`.

    The area under the ROC curve; .5 is chance, whatever the size of the object, and only the order of the
    pixels counts. Maps are taken as they are, signs included; `saliency.heatmap(maps, signed=False)` drops them.

    Raises
    ------
    ValueError
        NaN or infinite pixels, naming the image; masks outside [0, 1]; shapes or devices that differ.
    """
    on = _checked(maps, masks).flatten(1)
    values = maps.detach().flatten(1).contiguous()
    ranked, order = values.sort(dim=1)
    off = (1 - on).gather(1, order)
    below = torch.cat((off.new_zeros(len(off), 1), off.cumsum(1)), 1)  # weight off the object among the k smallest
    smaller, not_larger = (below.gather(1, torch.searchsorted(ranked, values, right=right)) for right in (False, True))
    score = (on * (smaller + not_larger) / 2).sum(1) / (on.sum(1) * (1 - on).sum(1))
    return score.masked_fill(_undefined(maps, masks), math.nan).to(maps.dtype)


def _undefined(maps: Tensor, masks: Tensor) -> Tensor:
    flat, on = maps.flatten(1), masks.flatten(1)
    constant = flat.amin(1) == flat.amax(1)
    return constant | (on.amax(1) == 0) | (on.amin(1) == 1)


def _checked(maps: Tensor, masks: Tensor) -> Tensor:
    """The masks in float64; raises where they or the maps do not fit."""
    check_maps(maps)
    if not isinstance(masks, Tensor) or masks.is_complex():
        raise ValueError(f"masks must be a tensor of numbers, got {getattr(masks, 'dtype', type(masks))}.")
    if maps.shape != masks.shape:
        raise ValueError(
            f"maps and masks differ in shape: {tuple(maps.shape)} and {tuple(masks.shape)}; a mask is (N, H, W)."
        )
    check_dense(masks, "masks")
    if maps.device != masks.device:
        raise ValueError(f"maps and masks are on different devices: {maps.device} and {masks.device}.")
    outside = ~((masks >= 0) & (masks <= 1)).flatten(1).all(1)
    if outside.any():
        raise ValueError(f"the mask of image {_first(outside)} is not in [0, 1]: divide bytes by 255.")
    return masks.double()


def _first(which: Tensor) -> int:
    return int(which.nonzero()[0])
