"""The gradient family: the gradient of the logit, and averages of it over paths and over noise."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from ..device import batches, generator, seed_of
from .passes import VALUES_A_PASS, OnePass, chunks, explaining, explains, gradient_of_logits, places, starting_point


@OnePass()
def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Gradient of the target logit at the input; Baehrens et al. (2010), Simonyan et al. (2013).

    Signed maps `(N, C, H, W)`, in logits per unit of input.
    """


@OnePass(finish=torch.mul)
def input_x_gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Input times gradient, pixel by pixel; Shrikumar et al. (2016). Signed `(N, C, H, W)`, in logits."""


def _average(gradients: Tensor, image: int) -> Tensor:
    return gradients.mean(0)


def _over_samples(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    samples: int,
    sample: Callable[[int], Tensor],
    reduce: Callable[[Tensor, int], Tensor] = _average,
) -> Tensor:
    """`reduce(gradients, i)` of the gradients at `sample(i)`, the `(samples, C, H, W)` inputs of image i, in float64.

    Several small images share a pass; the samples of a large one take several.
    """
    if samples < 1:
        raise ValueError(f"at least one sample or step is needed, got {samples}.")
    maps = []
    with explaining(model):
        for group in batches(len(images), max(1, VALUES_A_PASS // (samples * images[0].numel()))):
            members = range(group.start, group.stop)
            inputs = torch.cat([sample(i) for i in members])
            classes = targets[group].repeat_interleave(samples)
            gradients = [gradient_of_logits(model, inputs[part], classes[part]) for part in chunks(len(inputs), images)]
            for i, own in zip(members, torch.cat(gradients).split(samples)):
                maps.append(reduce(own.double(), i).to(images.dtype))
    return torch.stack(maps)


@explains
def integrated_gradients(
    model: nn.Module, images: Tensor, targets: Tensor, *, steps: int = 50, baseline: float | Tensor = 0.0
) -> Tensor:
    """Integrated Gradients along the straight line from `baseline` (a number or a tensor that broadcasts).

    Gauss-Legendre quadrature with `steps` nodes. Signed maps `(N, C, H, W)`, in logits; they add up to
    f(x) - f(baseline) as `steps` grows. Sundararajan et al. (2017).
    """
    if steps < 1:
        raise ValueError(f"at least one step is needed, got {steps}.")
    start, images = starting_point(baseline, images), images.detach()
    nodes, weights = np.polynomial.legendre.leggauss(steps)
    at = torch.as_tensor((nodes + 1) / 2, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
    share = torch.as_tensor(weights / 2 * steps, dtype=images.dtype, device=images.device).view(-1, 1, 1, 1)
    mean = _over_samples(
        model,
        images,
        targets,
        steps,
        lambda i: start[i] + at * (images[i] - start[i]),
        lambda gradients, _: (gradients * share).mean(0),
    )
    return (images - start) * mean


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
    if references.ndim != 4 or references.shape[1:] != images.shape[1:] or not len(references):
        raise ValueError(
            f"references must be images like those explained, (R, {', '.join(map(str, images.shape[1:]))}), "
            f"got {tuple(references.shape)}."
        )
    images, draws = images.detach(), [generator(seed_of(seed, place)) for place in places(indices, images)]
    references = references.detach().to(images)
    if not torch.isfinite(references).all():
        raise ValueError("the references have NaN or infinite values.")
    chosen = [torch.randint(len(references), (samples,), generator=draw).to(images.device) for draw in draws]
    at = [torch.rand(samples, 1, 1, 1, generator=draw).to(images) for draw in draws]
    return _over_samples(
        model,
        images,
        targets,
        samples,
        lambda i: torch.lerp(references[chosen[i]], images[i].expand(samples, -1, -1, -1), at[i]),
        lambda gradients, i: (gradients * (images[i] - references[chosen[i]])).mean(0),
    )


def _noisy(
    images: Tensor, samples: int, sigma: float, seed: int, indices: Sequence[int] | None
) -> Callable[[int], Tensor]:
    """`sample(i)`: image i with Gaussian noise of standard deviation `sigma` x (max - min) of that image."""
    if sigma < 0:
        raise ValueError(f"sigma must not be negative, got {sigma}.")
    images, whole = images.detach(), places(indices, images)
    width = sigma * (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))

    def sample(i: int) -> Tensor:
        noise = torch.randn(samples, *images.shape[1:], generator=generator(seed_of(seed, whole[i]))).to(images)
        return images[i] + width[i] * noise

    return sample


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
    `seed` and `indices[i]`, its place in the whole set (None: 0, 1, ...), whatever the batch. Signed `(N, C, H, W)`.
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
    return _over_samples(model, images, targets, samples, noisy, lambda gradients, _: gradients.square().mean(0))


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
    return _over_samples(model, images, targets, samples, noisy, lambda g, _: g.var(0, correction=0))


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
    if samples < 1:
        raise ValueError(f"at least one sample is needed, got {samples}.")
    start, noisy = starting_point(baseline, images), _noisy(images, samples, sigma, seed, indices)
    maps = [
        integrated_gradients(model, noisy(i), targets[i].expand(samples), steps=steps, baseline=start[i]).mean(0)
        for i in range(len(images))
    ]
    return torch.stack(maps)
