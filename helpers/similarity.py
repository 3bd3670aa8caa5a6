"""How alike two saliency maps are: batched metrics `metric(a, b, **options) -> (N,)` on `(N, H, W)` maps.

Every metric gives the number that scipy or scikit-image gives image by image, NaN where it is undefined (a
constant map), and raises `ValueError` for NaN or infinite pixels, naming the image. Maps may be of any float
type; the result is float32, or float64 for float64 maps.
"""

import math
from collections.abc import Callable
from functools import reduce
from numbers import Integral, Real
from operator import add
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_maps
from .device import batches

PIXELS_A_PART = 8 * 224 * 224  # 8 photographs' maps or 512 digits': what is compared at once, to bound the memory


def _checked(*maps: Tensor) -> list[Tensor]:
    """The maps in float32, or in float64 where they are, after the checks that all metrics share."""
    for name, m in zip("ab", maps):
        check_maps(m, name)
    if len({m.shape for m in maps}) > 1:
        raise ValueError(f"the maps differ in shape: {' and '.join(str(tuple(m.shape)) for m in maps)}.")
    if len({m.device for m in maps}) > 1:
        raise ValueError(f"the maps are on different devices: {' and '.join(str(m.device) for m in maps)}.")
    return [m if m.dtype == torch.float64 else m.float() for m in (m.detach() for m in maps)]


def _constant(maps: Tensor) -> Tensor:
    """Which images have one value in all pixels."""
    flat = maps.flatten(1)
    return flat.amin(1) == flat.amax(1)


class _Sides(NamedTuple):
    """A metric in two parts: what it makes of each map, and the comparison of the two."""

    describe: Callable[[Tensor], Tensor | tuple[Tensor, ...]]
    compare: Callable[..., Tensor]

    def against(self, a: Tensor) -> Callable[[Tensor], Tensor]:
        """The metric with its first map fixed and described once."""
        (own,) = _checked(a)
        parts = list(batches(len(own), max(1, PIXELS_A_PART // own[0].numel())))
        described, constant = [self.describe(own[part]) for part in parts], _constant(own)

        def compared(b: Tensor) -> Tensor:
            _, other = _checked(a, b)
            values = torch.cat([self.compare(mine, self.describe(other[part])) for mine, part in zip(described, parts)])
            values = values.to(torch.promote_types(own.dtype, other.dtype))
            return values.masked_fill(constant | _constant(other), math.nan)

        return compared


def _unit(vectors: Tensor, mean: Tensor | float | None = None) -> Tensor:
    """Vectors along the last axis, centred and of length 1: their product is Pearson's correlation."""
    centred = vectors - (vectors.mean(1, keepdim=True) if mean is None else mean)
    return centred / centred.norm(dim=1, keepdim=True)


def _product(x: Tensor, y: Tensor) -> Tensor:
    return (x * y).sum(1).clamp(-1, 1)


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
    """Ranks from 1 along the last axis of `(N, P)`, ties sharing their average (scipy's `rankdata`)."""
    ordered, places = _sorted(values + 0.0)  # -0.0 becomes 0.0
    index = torch.arange(1, values.shape[1] + 1, device=values.device).expand_as(places)
    tied = ordered[:, 1:] == ordered[:, :-1]
    if tied.any():
        edge = torch.ones_like(tied[:, :1])
        first = torch.where(torch.cat([edge, ~tied], 1), index, 0).cummax(1).values
        last = torch.where(torch.cat([~tied, edge], 1), index, index.shape[1] + 1)
        index = (first + last.flip(1).cummin(1).values.flip(1)) / 2
    dtype = torch.float64 if values.dtype == torch.float64 or values.shape[1] >= 2**23 else torch.float32
    return torch.empty(values.shape, dtype=dtype, device=values.device).scatter_(1, places, index.to(dtype))


def _unit_ranks(maps: Tensor) -> Tensor:
    values = maps.flatten(1)
    return _unit(ranks(values).double(), mean=(values.shape[1] + 1) / 2)


def _of_size_1(maps: Tensor) -> Tensor:
    """Each map times a power of two, which rounds nothing, so that no square of its pixels overflows or vanishes."""
    flat = maps.flatten(1).double()
    largest = flat.abs().amax(1, keepdim=True)
    return flat * (torch.frexp(largest).mantissa / largest).nan_to_num(1.0).clamp(max=2.0**1000)


_PEARSON = _Sides(lambda maps: _unit(_of_size_1(maps)), _product)
_SPEARMAN = _Sides(_unit_ranks, _product)
_SPEARMAN_ABS = _Sides(lambda maps: _SPEARMAN.describe(maps.abs()), _product)


def pearson(a: Tensor, b: Tensor) -> Tensor:
    """Pearson correlation of the pixels, in [-1, 1] (scipy's `pearsonr`)."""
    return _PEARSON.against(a)(b)


def spearman(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the signed pixels, average ranks on ties, in [-1, 1] (scipy's `spearmanr`)."""
    return _SPEARMAN.against(a)(b)


def spearman_abs(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of |pixels|, in [-1, 1]; the "ABS" of Adebayo et al. (2018)."""
    return _SPEARMAN_ABS.against(a)(b)


def spearman_nonzero(a: Tensor, b: Tensor) -> Tensor:
    """Rank correlation of the signed pixels over those where neither map is exactly zero.

    Pixels that equal the baseline tie at zero in both maps and inflate the plain figure
    (Sundararajan & Taly 2018). NaN where fewer than two such pixels differ.
    """
    a, b = _checked(a, b)
    x, y = a.flatten(1), b.flatten(1)
    keep = (x != 0) & (y != 0)
    x, y = x.masked_fill(~keep, math.inf), y.masked_fill(~keep, math.inf)
    count = keep.sum(1, keepdim=True)
    x, y = ((ranks(m).double() - (count + 1) / 2) * keep for m in (x, y))
    value = _product(x / x.norm(dim=1, keepdim=True), y / y.norm(dim=1, keepdim=True))
    return value.to(torch.promote_types(a.dtype, b.dtype)).masked_fill((x == 0).all(1) | (y == 0).all(1), math.nan)


def _box(images: Tensor, size: int) -> Tensor:
    """Mean over every full `size` x `size` window of `(N, H, W)`, separably."""
    rows = images.shape[1] - size + 1
    columns = images.shape[2] - size + 1
    images = reduce(add, (images[:, shift : shift + rows] for shift in range(size)))
    return reduce(add, (images[:, :, shift : shift + columns] for shift in range(size))) / size**2


def _ssim_sides(scaled: Callable[[Tensor], Tensor], data_range: float, size: int) -> _Sides:
    if isinstance(size, bool) or not isinstance(size, Integral) or size < 3 or not size % 2:
        raise ValueError(f"win_size must be odd and from 3 to the maps' smaller side, got {size!r}.")
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    unbiased = size**2 / (size**2 - 1)

    def describe(maps: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        side = min(maps.shape[1:])
        if size > side:
            raise ValueError(f"win_size must be odd and from 3 to the maps' smaller side {side}, got {size}.")
        maps = scaled(maps)
        mean = _box(maps, size)
        return maps, mean, unbiased * (_box(maps * maps, size) - mean * mean)

    def compare(one: tuple[Tensor, Tensor, Tensor], other: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        (x, mean_x, var_x), (y, mean_y, var_y) = one, other
        means = mean_x * mean_y
        covariance = unbiased * (_box(x * y, size) - means)
        above = (2 * means + c1) * (2 * covariance + c2)
        return (above / ((mean_x * mean_x + mean_y * mean_y + c1) * (var_x + var_y + c2))).flatten(1).mean(1)

    return _Sides(describe, compare)


def _over_largest(maps: Tensor) -> Tensor:
    largest = maps.abs().amax((1, 2), keepdim=True)
    return maps / largest.masked_fill(largest == 0, 1)  # a zero map stays zero


def _stretched_abs(maps: Tensor) -> Tensor:
    maps = maps.abs()
    low = maps.amin((1, 2), keepdim=True)
    return (maps - low) / (maps.amax((1, 2), keepdim=True) - low)


def ssim(a: Tensor, b: Tensor, *, win_size: int = 5) -> Tensor:
    """Structural similarity of the signed maps, each divided by its own largest |pixel|, in [-1, 1].

    scikit-image's `structural_similarity(win_size=win_size, data_range=2)`; Wang et al. (2004).
    """
    return _ssim_sides(_over_largest, 2.0, win_size).against(a)(b)


def ssim_abs(a: Tensor, b: Tensor, *, win_size: int = 5) -> Tensor:
    """Structural similarity of |maps|, each stretched to [0, 1] by its own minimum and maximum.

    scikit-image's `structural_similarity(win_size=win_size, data_range=1)`.
    """
    return _ssim_sides(_stretched_abs, 1.0, win_size).against(a)(b)


def hog_features(maps: Tensor, *, cell: int | None = None) -> Tensor:
    """Histograms of oriented gradients of `(N, H, W)` maps divided by their largest |pixel|, `(N, features)`.

    scikit-image's `feature.hog`: 9 orientations, blocks of 3x3 cells, L2-Hys; Dalal & Triggs (2005). `cell`
    is its side in pixels: 16 where the smaller side is at least 112, else a seventh of it, at least 2.
    """
    check_maps(maps)
    return _histograms(maps, cell)


def _histograms(maps: Tensor, cell: int | None) -> Tensor:
    if cell is not None and (isinstance(cell, bool) or not isinstance(cell, Integral) or cell < 1):
        raise ValueError(f"cell must be a whole number of pixels, at least 1, or None; got {cell!r}.")
    side = min(maps.shape[1:])
    cell = cell or (16 if side >= 112 else max(2, side // 7))
    down, across = maps.shape[1] // cell, maps.shape[2] // cell
    if min(down, across) < 3:
        raise ValueError(f"HOG needs 3 x 3 cells of {cell} pixels; the maps are {tuple(maps.shape[1:])}.")
    maps = _over_largest(maps)
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


def _hog_sides(cell: int | None) -> _Sides:
    return _Sides(lambda maps: _unit(_histograms(maps, cell)), _product)


def hog(a: Tensor, b: Tensor, *, cell: int | None = None) -> Tensor:
    """Pearson correlation of the maps' HOG features (`hog_features`), in [-1, 1]."""
    return _hog_sides(cell).against(a)(b)


def topk_intersection(a: Tensor, b: Tensor, *, k: float = 0.1) -> Tensor:
    """Fraction of the `k` largest |pixels| of one map that are among those of the other, in [0, 1].

    `k` is a fraction of the pixels, at least one pixel. Where pixels tie at the last place this is the expected
    value under a random order of the ties, drawn for each map on its own: two maps that are zero almost
    everywhere share about `k` of their largest pixels by chance, even a map with itself. Ghorbani et al. (2017).
    """
    if isinstance(k, bool) or not isinstance(k, Real) or not 0 < k <= 1:
        raise ValueError(f"k is a fraction of the pixels in (0, 1], got {k!r}.")

    def size(pixels: Tensor) -> int:
        return max(1, round(k * pixels.shape[1]))

    def chance(maps: Tensor) -> Tensor:
        """Of each pixel, how likely it is among the largest: 1 above the last place, 0 below, else evenly."""
        flat = maps.abs().flatten(1)
        last = flat.topk(size(flat), dim=1).values[:, -1:]
        above, tied = (flat > last).to(flat), (flat == last).to(flat)
        left = size(flat) - above.sum(1, keepdim=True)
        return (above + tied * (left / tied.sum(1, keepdim=True))).masked_fill(_constant(flat)[:, None], math.nan)

    return _Sides(chance, lambda x, y: (x * y).sum(1) / size(x)).against(a)(b)


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
    if not isinstance(metric, str) or metric not in METRICS:
        raise ValueError(f"unknown metric {metric!r}; known: {', '.join(METRICS)}.")
    return METRICS[metric]


_SIDES = {
    pearson: _PEARSON,
    spearman: _SPEARMAN,
    spearman_abs: _SPEARMAN_ABS,
    ssim: _ssim_sides(_over_largest, 2.0, 5),
    ssim_abs: _ssim_sides(_stretched_abs, 1.0, 5),
    hog: _hog_sides(None),
}


def against(metric: str | Callable[..., Tensor], reference: Tensor) -> Callable[[Tensor], Tensor]:
    """`metric(reference, maps)` as a function of the maps; the reference's side is worked out once.

    Raises
    ------
    ValueError
        The metric is unknown, or gives something else than `(N,)` numbers.
    """
    metric = get(metric)
    sides = _SIDES.get(metric)
    if sides:
        return sides.against(reference)

    def compared(maps: Tensor) -> Tensor:
        values = metric(reference, maps)
        if not isinstance(values, Tensor) or values.shape != (len(reference),) or values.is_complex():
            got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
            raise ValueError(
                f"{getattr(metric, '__name__', 'a metric')} must return a tensor of {len(reference)} numbers, one for "
                f"each pair of maps, got {got}."
            )
        return values

    return compared
