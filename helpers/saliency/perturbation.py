"""Methods that only ask the model: hide parts of an image and see what becomes of the logit."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral

import numpy as np
import torch
from torch import Tensor, nn

from ..device import generator, seed_of
from .passes import at_least_one, chosen_logits, chunks, explaining, explains, is_number, places, starting_point


def _logits_of_masked(
    model: nn.Module,
    image: Tensor,
    start: Tensor,
    target: Tensor,
    count: int,
    shown: Callable[[slice], Tensor],
) -> Tensor:
    """The logit of `image` `(C, H, W)` with `start` in the place of what is not shown, `(count,)`.

    `shown(part)` gives masks `(len(part), H, W)`, bool, of those of the `count` variants.
    """
    logits = []
    with torch.no_grad():
        for part in chunks(count, image[None]):
            variants = torch.where(shown(part)[:, None], image, start)
            logits.append(chosen_logits(model, variants, target.expand(len(variants))))
    values = torch.cat(logits)
    if not torch.isfinite(values).all():
        raise ValueError("the model's logits have NaN or infinite values where part of an image is hidden.")
    return values


@explains(differentiates=False)
def occlusion(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    window: int | None = None,
    stride: int | None = None,
    baseline: float | Tensor = 0.0,
) -> Tensor:
    """How far the logit falls when a square is replaced by `baseline`; Zeiler & Fergus (2014).

    Each pixel has the mean fall over the squares that cover it, in all channels alike, as captum defines it:
    signed maps `(N, C, H, W)`, in logits. `window` is the square's side, None a seventh of the image's, and
    `stride` the step, None half a window. `baseline` is a number or a tensor that broadcasts.

    Raises
    ------
    ValueError
        The window does not fit in the image, or the stride leaves pixels out.
    """
    height, width = images.shape[2:]
    window = max(1, min(height, width) // 7) if window is None else window
    if not _whole(window) or not 1 <= window <= min(height, width):
        raise ValueError(f"window must be a whole number from 1 to {min(height, width)}, got {window!r}.")
    stride = max(1, window // 2) if stride is None else stride
    if not _whole(stride) or not 1 <= stride <= window:
        raise ValueError(f"stride must be a whole number from 1 to the window's {window}, got {stride!r}.")
    images = images.detach()
    start = starting_point(baseline, images)
    rows, columns = (_spans(size, window, stride).to(images.device) for size in (height, width))
    covering = rows.sum(0)[:, None] * columns.sum(0)

    def shown(part: slice) -> Tensor:
        square = torch.arange(part.start, part.stop, device=images.device)
        return ~(rows[square // len(columns), :, None] & columns[square % len(columns), None])

    with explaining(model):
        maps = torch.zeros_like(images)
        for i in range(len(images)):
            one = model, images[i], start[i], targets[i]
            whole = _logits_of_masked(*one, 1, lambda part: torch.ones_like(rows[:1, :1, None]))
            hidden = _logits_of_masked(*one, len(rows) * len(columns), shown)
            falls = (whole - hidden).to(images.dtype).view(len(rows), len(columns))
            maps[i] = rows.to(falls.dtype).T @ falls @ columns.to(falls.dtype) / covering
    return maps


def _whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _spans(size: int, window: int, stride: int) -> Tensor:
    """Which of `size` positions each step of a window covers, `(steps, size)`; the last may stick out."""
    starts, places = torch.arange(0, size - window + stride, stride)[:, None], torch.arange(size)
    return (starts <= places) & (places < starts + window)


def superpixels(images: Tensor, count: int = 49) -> Tensor:
    """Segments of about equal size, `(N, H, W)` int64 from 0: superpixels of photographs, else a grid.

    Colour images of 64 pixels and more, in any scale, are cut by scikit-image's SLIC (Achanta et al. 2012);
    others by a grid of as many rows as columns, or where `count` is no square, about as many. There are from half
    of `count` to twice as many segments, unless the image is too small for them: where fine texture makes SLIC run
    them into one another, colours count ever less against places.

    Raises
    ------
    ValueError
        `count` is not a whole number from 1.
    """
    if not _whole(count) or count < 1:
        raise ValueError(f"count must be a whole number of segments, at least 1, got {count!r}.")
    height, width = images.shape[2:]
    grid = _grid(height, width, count).to(images.device)
    if images.shape[1] == 3 and min(height, width) >= 64:
        return torch.stack([_slic(image, count, grid) for image in images.detach()])
    return grid.expand(len(images), -1, -1)


def _grid(height: int, width: int, count: int) -> Tensor:
    """Segments `(height, width)`: the longer side is cut into at least as many pieces as the shorter."""
    few = min(math.isqrt(count), height, width)
    many = min(count // few, max(height, width))
    down, across = (many, few) if height > width else (few, many)
    rows, columns = (torch.arange(size) * pieces // size for size, pieces in ((height, down), (width, across)))
    return rows[:, None] * across + columns


def _slic(image: Tensor, count: int, grid: Tensor) -> Tensor:
    from skimage.segmentation import slic  # here, because it takes a while and only photographs need it

    low, high = image.amin(), image.amax()
    span = torch.where(high > low, high - low, 1)
    picture = ((image - low) / span).double().permute(1, 2, 0).cpu().numpy()
    for compactness in (10, 30, 100, 300, 1000):
        found = slic(picture, n_segments=count, compactness=compactness, start_label=0)
        if count / 2 <= len(np.unique(found)) <= 2 * count:
            return torch.from_numpy(found.astype(np.int64)).to(image.device)
    return grid


def _segments(segments: Tensor | None, images: Tensor) -> Tensor:
    if segments is None:
        return superpixels(images)
    whole = isinstance(segments, Tensor) and not (segments.is_floating_point() or segments.is_complex())
    shapes = (images.shape[2:], (len(images), *images.shape[2:]))
    if not whole or segments.dtype == torch.bool or segments.shape not in shapes:
        got = f"{segments.dtype} {tuple(segments.shape)}" if isinstance(segments, Tensor) else type(segments).__name__
        raise ValueError(f"segments must be an integer tensor of shape {tuple(shapes[0])} or {shapes[1]}, got {got}.")
    return segments.to(images.device).expand(shapes[1])


def _explain_segments(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    segments: Tensor | None,
    samples: int,
    seed: int,
    indices: Sequence[int] | None,
    baseline: float | Tensor,
    draw: Callable[[int, int, torch.Generator], tuple[Tensor, Tensor]],
    fit: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Tensor:
    """`fit(kept, weights, logits)` of coalitions of segments, as maps.

    `draw(count, samples, generator)` gives which segments are kept `(M, count)`, bool, and weights `(M,)`.
    What an image draws follows from `seed` and its place in the whole set.
    """
    at_least_one("sample", samples)
    segments, images = _segments(segments, images), images.detach()
    start, whole = starting_point(baseline, images), places(indices, images)
    with explaining(model):
        maps = torch.zeros_like(images)
        for i in range(len(images)):
            names, members = segments[i].unique(return_inverse=True)
            kept, weights = draw(len(names), samples, generator(seed_of(seed, whole[i])))
            one = model, images[i], start[i], targets[i]
            logits = _logits_of_masked(*one, len(kept), partial(_pixels, kept.to(images.device), members))
            maps[i] = fit(kept.double(), weights, logits.double().cpu()).to(images)[members]
    return maps


def _pixels(kept: Tensor, members: Tensor, part: slice) -> Tensor:
    return kept[part][:, members]


def _least_squares(features: Tensor, weights: Tensor, values: Tensor) -> Tensor:
    """Weighted least squares; raises where the samples do not determine the coefficients."""
    if torch.linalg.matrix_rank(features) < features.shape[1]:
        raise ValueError(
            f"{len(features)} samples do not determine {features.shape[1]} coefficients: "
            "raise samples=, or use fewer segments."
        )
    root = weights.sqrt()
    return torch.linalg.lstsq(features * root[:, None], values * root).solution


@explains(differentiates=False)
def lime(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    segments: Tensor | None = None,
    samples: int = 256,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    baseline: float | Tensor = 0.0,
    width: float = 0.25,
) -> Tensor:
    """LIME: a linear model of the logit in which segments of the image are shown; Ribeiro et al. (2016).

    `samples` variants show each segment with probability 1/2, and `baseline` elsewhere. They weigh
    exp(-d²/2 `width`²), d the cosine distance to the whole image, as in the authors' code, in a fit by plain
    least squares. `segments` are integers `(H, W)` or `(N, H, W)`; None takes `superpixels(images)`. Every
    pixel has its segment's coefficient, in all channels alike: signed maps `(N, C, H, W)`, in logits. Draws follow
    from `seed` and the image's place as in `smoothgrad`.

    Raises
    ------
    ValueError
        The segments do not fit the images, or there are too few samples for them.
    """
    if not is_number(width) or not width > 0:
        raise ValueError(f"width must be positive, got {width!r}.")

    def draw(count: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        kept = torch.rand(samples, count, generator=generator) < 0.5
        kept[0] = True
        distance = 1 - kept.double().mean(1).sqrt()
        return kept, torch.exp(-(distance**2) / (2 * width**2))

    def fit(kept: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
        with_intercept = torch.cat((kept, torch.ones_like(kept[:, :1])), 1)
        return _least_squares(with_intercept, weights, logits)[:-1]

    return _explain_segments(model, images, targets, segments, samples, seed, indices, baseline, draw, fit)


@explains(differentiates=False)
def kernel_shap(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    segments: Tensor | None = None,
    samples: int = 256,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    baseline: float | Tensor = 0.0,
) -> Tensor:
    """KernelSHAP: Shapley values of the image's segments by weighted least squares; Lundberg & Lee (2017).

    A segment that is not shown has the values of `baseline`. Where `samples` are enough (by default for up to
    8 segments) all coalitions are run and the values are exact; else coalitions are drawn from the Shapley
    kernel, in pairs of complements. `segments` and draws as in `lime`. Every pixel has its segment's value, in all
    channels alike: signed maps `(N, C, H, W)`, in logits; the segments' values add up to f(x) - f(baseline).

    Raises
    ------
    ValueError
        The segments do not fit the images, or there are too few samples for them.
    """
    drawn = segments, samples, seed, indices, baseline
    return _explain_segments(model, images, targets, *drawn, _coalitions, _shapley_values)


def _coalitions(count: int, samples: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """All segments, none, and then coalitions between, each with its weight in the regression."""
    sizes = torch.arange(1, count)
    if 2**count - 2 <= samples:
        bits = torch.arange(1, 2**count - 1)[:, None] >> torch.arange(count)
        kept = (bits & 1).bool()
        subsets = torch.tensor([math.comb(count, size) for size in range(count + 1)])
        of = kept.sum(1)
        weights = (count - 1) / (subsets[of] * of * (count - of)).double()
    else:
        often = 1 / (sizes * (count - sizes)).double()
        chosen = sizes[torch.multinomial(often, -(-samples // 2), replacement=True, generator=generator)]
        order = torch.rand(len(chosen), count, generator=generator).argsort(1).argsort(1)
        half = order < chosen[:, None]
        kept = torch.stack((half, ~half), 1).flatten(0, 1)[:samples]
        weights = torch.ones(len(kept), dtype=torch.float64)
    ends = torch.tensor([[True], [False]]).expand(2, count)
    return torch.cat((ends, kept)), weights


def _shapley_values(kept: Tensor, weights: Tensor, logits: Tensor) -> Tensor:
    """The least squares solution whose values add up to the logit of all segments less that of none."""
    total, kept, gains = logits[0] - logits[1], kept[2:], logits[2:] - logits[1]
    last = kept[:, -1]
    first = _least_squares(kept[:, :-1] - last[:, None], weights, gains - last * total)
    return torch.cat((first, (total - first.sum())[None]))
