"""The gradient family: the gradient of the logit, and averages of it over paths and over noise."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from ..device import batches, generator, seed_of
from .passes import (
    OnePass,
    at_least_one,
    chunks,
    explaining,
    explains,
    gradient_of_logits,
    is_number,
    places,
    starting_point,
)


@OnePass()
def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Gradient of the target logit at the input; Baehrens et al. (2010), Simonyan et al. (2013).

    Signed maps `(N, C, H, W)`, in logits per unit of input.
    """


@OnePass(finish=torch.mul)
def input_x_gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Input times gradient, pixel by pixel; Shrikumar et al. (2016). Signed `(N, C, H, W)`, in logits."""


class _Mean:
    """Running mean of `term(gradients, part)` over the samples of one image, in float64."""

    def __init__(self, term: Callable[[Tensor, slice], Tensor] = lambda gradients, part: gradients):
        self.term, self.count, self.total = term, 0, torch.zeros(())

    def add(self, gradients: Tensor, part: slice) -> None:
        found = self.term(gradients.double(), part).sum(0)
        self.total = self.total + found if self.count else found
        self.count += len(gradients)

    def result(self) -> Tensor:
        return self.total / self.count


class _Variance:
    """Running variance over the samples of one image, in float64: passes are merged as in Chan et al. (1983)."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, torch.zeros(()), torch.zeros(())

    def add(self, gradients: Tensor, part: slice) -> None:
        values, count = gradients.double(), len(gradients)
        mean = values.mean(0)
        squares = (values - mean).square().sum(0)
        if self.count:
            total, away = self.count + count, mean - self.mean
            mean = self.mean + away * (count / total)
            squares = self.squares + squares + away.square() * (self.count * count / total)
        self.count, self.mean, self.squares = self.count + count, mean, squares

    def result(self) -> Tensor:
        return self.squares / self.count


def _a_pass(samples: int, images: Tensor) -> int:
    """How many inputs one pass takes, where every image has `samples` of them."""
    return next(chunks(len(images) * samples, images)).stop


def _over_samples(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    samples: int,
    inputs_of: Callable[[int], Callable[[slice], Tensor]],
    running: Callable[[int], _Mean | _Variance] = lambda i: _Mean(),
) -> Tensor:
    """What `running(i)` makes of the gradients at the `samples` inputs of image i, for every image.

    `inputs_of(i)` is a function of slices of `range(samples)`, asked in order; it gives those inputs. Several small
    images share a pass; the samples of a large one take several. No more than one pass is kept.
    """
    with explaining(model):
        maps = torch.empty(images.shape, dtype=images.dtype, device=images.device)
        most = _a_pass(samples, images)
        for group in batches(len(images), max(1, most // samples)):
            members = range(group.start, group.stop)
            streams, sums = [inputs_of(i) for i in members], [running(i) for i in members]
            for part in batches(samples, most):
                size = part.stop - part.start
                inputs = torch.cat([stream(part) for stream in streams])
                gradients = gradient_of_logits(model, inputs, targets[group].repeat_interleave(size))
                for own, found in zip(sums, gradients.split(size)):
                    own.add(found, part)
            for i, own in zip(members, sums):
                maps[i] = own.result()
    return maps


@explains
def integrated_gradients(
    model: nn.Module, images: Tensor, targets: Tensor, *, steps: int = 50, baseline: float | Tensor = 0.0
) -> Tensor:
    """Integrated Gradients along the straight line from `baseline` (a number or a tensor that broadcasts).

    Gauss-Legendre quadrature with `steps` nodes. Signed maps `(N, C, H, W)`, in logits; they add up to
    f(x) - f(baseline) as `steps` grows. Sundararajan et al. (2017).
    """
    at_least_one("step", steps)
    return _along_the_line(model, images.detach(), targets, starting_point(baseline, images), steps)


def _along_the_line(model: nn.Module, images: Tensor, targets: Tensor, start: Tensor, steps: int) -> Tensor:
    """Integrated Gradients from `start`, which has the images' shape."""
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    at = torch.as_tensor((nodes + 1) / 2, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
    fraction = torch.as_tensor(weights / 2 * steps, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
    mean = _over_samples(
        model,
        images,
        targets,
        steps,
        lambda i: lambda part: start[i] + at[part] * (images[i] - start[i]),
        lambda i: _Mean(lambda gradients, part: gradients * fraction[part]),
    )
    return mean.mul_(images - start)


@explains
def expected_gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    references: Tensor,
    samples: int = 50,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Integrated Gradients averaged over baselines drawn from `references` `(R, C, H, W)`.

    Each sample draws one reference and one point of the line to it, by `seed` and the image's place as in
    `smoothgrad`. Signed maps `(N, C, H, W)`, in logits.
    Erion et al. (2021).
    """
    is_real = isinstance(references, Tensor) and not references.is_complex()
    if not is_real or references.ndim != 4 or references.shape[1:] != images.shape[1:] or not len(references):
        got = f"{references.dtype} {tuple(references.shape)}" if isinstance(references, Tensor) else type(references)
        raise ValueError(
            f"references must be images like those explained, (R, {', '.join(map(str, images.shape[1:]))}), got {got}."
        )
    at_least_one("sample", samples)
    images, draws = images.detach(), [generator(seed_of(seed, place)) for place in places(indices, images)]
    references = references.detach().to(images)
    if not torch.isfinite(references).all():
        raise ValueError("the references have NaN or infinite values.")
    chosen = [torch.randint(len(references), (samples,), generator=draw).to(images.device) for draw in draws]
    at = [torch.rand(samples, 1, 1, 1, generator=draw).to(images) for draw in draws]

    def between(i: int, part: slice) -> Tensor:
        own = references[chosen[i][part]]
        return torch.lerp(own, images[i].expand_as(own), at[i][part])

    return _over_samples(
        model,
        images,
        targets,
        samples,
        lambda i: partial(between, i),
        lambda i: _Mean(lambda gradients, part: gradients * (images[i] - references[chosen[i][part]])),
    )


class _Noise:
    """Standard normal noise `(samples, *shape)` of one image, a few samples at a time, the same however they are cut.

    On the CPU it is that of one `torch.randn(samples, *shape)`, which fills 16 values at once and draws the last 16
    again where they are not whole: so pieces are whole sixteens, and the last is no smaller than 16.
    """

    BLOCK = 2**20

    def __init__(self, samples: int, shape: torch.Size, draw: torch.Generator):
        self.shape, self.draw = shape, draw
        self.left = samples * shape.numel()
        self.ready = torch.empty(0, device=draw.device)

    def take(self, count: int) -> Tensor:
        """The next `count` samples."""
        wanted, pieces = count * self.shape.numel(), [self.ready]
        missing = wanted - len(self.ready)
        while missing > 0:
            size = self.left if self.left < self.BLOCK + 16 else self.BLOCK
            pieces.append(torch.randn(size, generator=self.draw, device=self.draw.device))
            self.left, missing = self.left - size, missing - size
        values = torch.cat(pieces)
        self.ready = values[wanted:].clone()  # a view would keep all of them
        return values[:wanted].view(count, *self.shape)


def _noisy(
    images: Tensor, samples: int, sigma: float, seed: int, indices: Sequence[int] | None
) -> Callable[[int], Callable[[slice], Tensor]]:
    """The streams of noisy copies: image i with noise of standard deviation `sigma` x (max - min) of that image."""
    at_least_one("sample", samples)
    if not is_number(sigma) or not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must not be negative, and it must be a finite number, got {sigma!r}.")
    images, seeds = images.detach(), [seed_of(seed, place) for place in places(indices, images)]
    width = sigma * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))

    def copies(i: int) -> Callable[[slice], Tensor]:
        noise = _Noise(samples, images.shape[1:], generator(seeds[i], images.device))
        return lambda part: images[i] + width[i] * noise.take(part.stop - part.start).to(images)

    return copies


@explains
def smoothgrad(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.15,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Mean gradient over noisy copies of the input; Smilkov et al. (2017).

    `sigma` is the noise's standard deviation as a share of max - min of each image. Image i's noise follows from
    `seed` and `indices[i]`, its place in the whole set (None: 0, 1, ...), whatever the batch. It is drawn on the
    images' device: one seed gives one result on a device, and other noise on another. Signed `(N, C, H, W)`.
    """
    return _over_samples(model, images, targets, samples, _noisy(images, samples, sigma, seed, indices))


@explains
def smoothgrad_squared(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.15,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Mean squared gradient over noisy copies of the input; Hooker et al. (2019). `(N, C, H, W)` >= 0."""
    noisy = _noisy(images, samples, sigma, seed, indices)
    return _over_samples(
        model, images, targets, samples, noisy, lambda i: _Mean(lambda gradients, part: gradients.square())
    )


@explains
def vargrad(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.15,
    seed: int = 0,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Variance (over samples, not corrected) of the gradient at noisy copies; Adebayo et al. (2018).

    Maps `(N, C, H, W)` >= 0. With the same seed, SmoothGrad-squared = VarGrad + SmoothGrad x SmoothGrad.
    """
    noisy = _noisy(images, samples, sigma, seed, indices)
    return _over_samples(model, images, targets, samples, noisy, lambda i: _Variance())


@explains
def smoothgrad_integrated_gradients(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    samples: int = 50,
    sigma: float = 0.15,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    steps: int = 50,
    baseline: float | Tensor = 0.0,
) -> Tensor:
    """Integrated Gradients averaged over noisy copies of the input; Smilkov et al. (2017).

    Takes `samples` x `steps` passes an image. Signed maps `(N, C, H, W)`, in logits.
    """
    at_least_one("step", steps)
    noisy = _noisy(images, samples, sigma, seed, indices)
    start, maps = starting_point(baseline, images), torch.empty(images.shape, dtype=images.dtype, device=images.device)
    size = max(1, _a_pass(samples * steps, images) // steps)
    for i in range(len(images)):
        copies, own = noisy(i), _Mean()
        for part in batches(samples, size):
            inputs = copies(part)
            classes = targets[i].expand(len(inputs))
            own.add(_along_the_line(model, inputs, classes, start[i].expand_as(inputs), steps), part)
        maps[i] = own.result()
    return maps
