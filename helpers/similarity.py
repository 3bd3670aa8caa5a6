"""How alike two saliency maps are: batched metrics `metric(a, b, **options) -> (N,)` on `(N, H, W)` maps.

Every metric gives the number that scipy or scikit-image gives image by image, NaN where it is undefined (a
constant map), and raises `ValueError` for NaN or infinite pixels, naming the image. Maps may be of any float
type; the result is float32, or float64 for float64 maps.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F


def _checked(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps in float32 or float64, after the checks that all metrics share."""
    for name, maps in (("a", a), ("b", b)):
        if not isinstance(maps, Tensor) or not maps.is_floating_point():
            raise ValueError(f"{name} must be a tensor of floats, got {getattr(maps, 'dtype', type(maps))}.")
        if maps.ndim != 3 or 0 in maps.shape:
            raise ValueError(
                f"{name} must be maps of shape (N, H, W), got {tuple(maps.shape)}; "
                "saliency.heatmap(maps, signed=...) adds up the channels."
            )
        bad = ~torch.isfinite(maps).all(-1).all(-1)
        if bad.any():
            raise ValueError(f"{name} has NaN or infinite pixels in image {bad.nonzero()[0].item()}.")
    if a.shape != b.shape:
        raise ValueError(f"the maps differ in shape: {tuple(a.shape)} and {tuple(b.shape)}.")
    if a.device != b.device:
        raise ValueError(f"the maps are on different devices: {a.device} and {b.device}.")
    dtype = torch.float64 if torch.float64 in (a.dtype, b.dtype) else torch.float32
    return a.to(dtype), b.to(dtype)


def _constant(maps: Tensor) -> Tensor:
    """Which images have one value in all pixels."""
    flat = maps.flatten(1)
    return flat.amin(1) == flat.amax(1)


def _undefined(values: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """`values` in the maps' type, NaN where either map is constant."""
    return values.to(a.dtype).masked_fill(_constant(a) | _constant(b), math.nan)


def _correlation(x: Tensor, y: Tensor, keep: Tensor | None = None) -> Tensor:
    """Pearson correlation along the last axis, in float64; `keep` is a mask of the entries that count."""
    x, y = x.double(), y.double()
    weight = torch.ones_like(x) if keep is None else keep.double()
    count = weight.sum(1, keepdim=True)
    x = (x - (x * weight).sum(1, keepdim=True) / count) * weight
    y = (y - (y * weight).sum(1, keepdim=True) / count) * weight
    scale = (x.square().sum(1) * y.square().sum(1)).sqrt()
    return ((x * y).sum(1) / scale).clamp(-1, 1)


def _sorted(values: Tensor) -> tuple[Tensor, Tensor]:
    """Values in order along the last axis and where each came from.

    On the CPU, float32 numbers are packed with their place into one integer: sorting those is many times
    faster than sorting floats with an index.
    """
    if values.is_cuda or values.dtype != torch.float32:
        return torch.sort(values, dim=1)
    bits = values.contiguous().numpy().view(np.int32).astype(np.int64)
    ordered = np.where(bits < 0, -(bits & 0x7FFFFFFF), bits)
    packed = np.sort((ordered << 32) | np.arange(values.shape[1]), axis=1)
    return torch.from_numpy(packed >> 32), torch.from_numpy(packed & 0xFFFFFFFF)


def ranks(values: Tensor) -> Tensor:
    """Ranks from 1 along the last axis of `(N, P)`, tied values sharing their average rank (scipy's `rankdata`)."""
    ordered, places = _sorted(values + 0.0)  # -0.0 becomes 0.0
    index = torch.arange(1, values.shape[1] + 1, device=values.device).expand_as(places)
    new = torch.ones_like(places, dtype=torch.bool)
    new[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    first = torch.where(new, index, 0).cummax(1).values
    ends = torch.ones_like(new)
    ends[:, :-1] = new[:, 1:]
    last = torch.where(ends, index, index.shape[1] + 1).flip(1).cummin(1).values.flip(1)
    return torch.empty(values.shape, dtype=torch.float64, device=values.device).scatter_(
        1, places, (first + last).double() / 2
    )


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the pixels, in [-1, 1] (scipy's `pearsonr`)."""
    a, b = _checked(a, b)
    return _undefined(_correlation(a.flatten(1), b.flatten(1)), a, b)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the signed pixels, average ranks on ties, in [-1, 1] (scipy's `spearmanr`)."""
    a, b = _checked(a, b)
    return _undefined(_correlation(ranks(a.flatten(1)), ranks(b.flatten(1))), a, b)


def spearman_abs(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of |pixels|, in [-1, 1]; the "ABS" of Adebayo et al. (2018)."""
    a, b = _checked(a, b)
    return spearman(a.abs(), b.abs())


def spearman_nonzero(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the signed pixels over those where neither map is exactly zero.

    Pixels that equal the baseline tie at zero in both maps and inflate the plain figure
    (Sundararajan & Taly 2018). NaN where fewer than two such pixels differ.
    """
    a, b = _checked(a, b)
    x, y = a.flatten(1), b.flatten(1)
    keep = (x != 0) & (y != 0)
    x, y = x.masked_fill(~keep, math.inf), y.masked_fill(~keep, math.inf)
    value = _correlation(ranks(x), ranks(y), keep)
    varied = [(m == m.amin(1, keepdim=True)).logical_or(~keep).all(1) for m in (x, y)]
    return value.to(a.dtype).masked_fill(varied[0] | varied[1], math.nan)


def _box(images: Tensor, size: int) -> Tensor:
    """Mean over every full `size` x `size` window of `(N, H, W)`, separably."""
    rows = images.shape[1] - size + 1
    columns = images.shape[2] - size + 1
    images = sum(images[:, shift : shift + rows] for shift in range(size))
    return sum(images[:, :, shift : shift + columns] for shift in range(size)) / size**2


def _mean_ssim(x: Tensor, y: Tensor, *, data_range: float, size: int) -> Tensor:
    if not (3 <= size <= min(x.shape[1:]) and size % 2):
        raise ValueError(
            f"win_size must be odd and from 3 to the maps' smaller side {min(x.shape[1:])}, got {size}."
        )
    mean_x, mean_y = _box(x, size), _box(y, size)
    unbiased = size**2 / (size**2 - 1)
    var_x = unbiased * (_box(x * x, size) - mean_x * mean_x)
    var_y = unbiased * (_box(y * y, size) - mean_y * mean_y)
    cov = unbiased * (_box(x * y, size) - mean_x * mean_y)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * cov + c2)
    below = (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (above / below).flatten(1).mean(1)


def ssim(a: Tensor, b: Tensor, *, win_size: int = 5) -> Tensor:
    """Structural similarity of the signed maps, each divided by its own largest |pixel|, in [-1, 1].

    scikit-image's `structural_similarity(win_size=win_size, data_range=2)`; Wang et al. (2004).
    """
    a, b = _checked(a, b)
    x, y = (m / m.abs().amax((1, 2), keepdim=True) for m in (a, b))
    return _undefined(_mean_ssim(x, y, data_range=2.0, size=win_size), a, b)


def ssim_abs(a: Tensor, b: Tensor, *, win_size: int = 5) -> Tensor:
    """Structural similarity of |maps|, each stretched to [0, 1] by its own minimum and maximum.

    scikit-image's `structural_similarity(win_size=win_size, data_range=1)`.
    """
    a, b = (m.abs() for m in _checked(a, b))
    x, y = ((m - m.amin((1, 2), keepdim=True)) / (m.amax((1, 2)) - m.amin((1, 2)))[:, None, None] for m in (a, b))
    return _undefined(_mean_ssim(x, y, data_range=1.0, size=win_size), a, b)


def hog_features(maps: Tensor, *, cell: int | None = None) -> Tensor:
    """Histograms of oriented gradients of `(N, H, W)` maps divided by their largest |pixel|, `(N, features)`.

    scikit-image's `feature.hog`: 9 orientations, blocks of 3x3 cells, L2-Hys; Dalal & Triggs (2005). `cell`
    is its side in pixels: 16 where the smaller side is at least 112, else a seventh of it, at least 2.
    """
    side = min(maps.shape[1:])
    cell = cell or (16 if side >= 112 else max(2, side // 7))
    down, across = maps.shape[1] // cell, maps.shape[2] // cell
    if min(down, across) < 3:
        raise ValueError(f"HOG needs 3 x 3 cells of {cell} pixels; the maps are {tuple(maps.shape[1:])}.")
    largest = maps.abs().amax((1, 2), keepdim=True)
    maps = maps / largest.clamp_min(torch.finfo(maps.dtype).tiny)  # a zero map stays zero
    vertical = F.pad(maps[:, 2:] - maps[:, :-2], (0, 0, 1, 1))
    horizontal = F.pad(maps[:, :, 2:] - maps[:, :, :-2], (1, 1))
    angle = torch.rad2deg(torch.atan2(vertical, horizontal)) % 180
    bins = (angle / 20).long()  # 180 degrees itself, which rounding can produce, falls in no bin
    magnitude = torch.hypot(vertical, horizontal).masked_fill(bins > 8, 0)[:, : down * cell, : across * cell]
    split = torch.zeros(len(maps), 9, down * cell, across * cell, dtype=maps.dtype, device=maps.device)
    split.scatter_(1, bins.clamp(max=8)[:, None, : down * cell, : across * cell], magnitude[:, None])
    cells = F.avg_pool2d(split, cell)
    blocks = cells.unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 4, 5, 1).flatten(3)
    for limit in (0.2, math.inf):
        blocks = (blocks / (blocks.square().sum(-1, keepdim=True) + 1e-10).sqrt()).clamp(max=limit)
    return blocks.flatten(1)


def hog(a: Tensor, b: Tensor, *, cell: int | None = None) -> Tensor:
    """Pearson correlation of the maps' HOG features (`hog_features`), in [-1, 1]."""
    a, b = _checked(a, b)
    x, y = hog_features(a, cell=cell), hog_features(b, cell=cell)
    return _undefined(_correlation(x, y), a, b)


def topk_intersection(a: Tensor, b: Tensor, *, k: float = 0.1) -> Tensor:
    """Share of the `k` largest |pixels| of one map that are among those of the other, in [0, 1].

    `k` is a share of the pixels, at least one pixel; among ties the earlier pixel counts as larger.
    Ghorbani et al. (2017).
    """
    if not 0 < k <= 1:
        raise ValueError(f"k is a share of the pixels in (0, 1], got {k}.")
    a, b = (m.abs() for m in _checked(a, b))
    size = max(1, round(k * a[0].numel()))
    chosen = []
    for m in (a, b):
        places = torch.sort(m.flatten(1), dim=1, descending=True, stable=True).indices[:, :size]
        chosen.append(torch.zeros_like(m.flatten(1)).scatter_(1, places, 1.0))
    return _undefined((chosen[0] * chosen[1]).sum(1) / size, a, b)


METRICS: dict[str, Callable[..., Tensor]] = {
    metric.__name__: metric
    for metric in (
        spearman,
        spearman_abs,
        spearman_nonzero,
        ssim,
        ssim_abs,
        hog,
        pearson,
        topk_intersection,
    )
}


def get(metric: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The metric of that name, or the callable itself; an unknown name raises with the list of the known."""
    if callable(metric):
        return metric
    if metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.")
    return METRICS[metric]
