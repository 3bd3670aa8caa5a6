"""Contributions sent back through the network by rules: DeepLIFT and layer-wise relevance propagation."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from zennit.core import Hook
from zennit.rules import AlphaBeta, Epsilon, Flat

from helpers.saliency.core import check, chosen_logits, chunks, explaining, starting_point
from helpers.saliency.graph import MOVES, PRODUCTS, SUMS, pulled_back, refuse_unknown_steps
from helpers.saliency.relevance import propagate


class _Rescale(TorchFunctionMode):
    """Makes activations and max-pooling straight lines from the baseline's value to the image's.

    The batch holds `count` images, then their baselines. No value changes, only the images' backward pass.
    """

    # One input, element by element; with a kink, or smooth: there a short secant is mostly rounding.
    KINKED = frozenset("relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_ threshold threshold_".split())
    SMOOTH = frozenset("celu elu gelu hardswish mish selu sigmoid sigmoid_ silu softplus tanh tanh_".split())
    POOLS = {
        "max_pool2d": F.max_pool2d_with_indices,
        "adaptive_max_pool2d": F.adaptive_max_pool2d_with_indices,
    }
    CLOSE = 1e-10

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name not in self.KINKED | self.SMOOTH | self.POOLS.keys():
            return func(*args, **kwargs)
        values, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        if not values.requires_grad or kwargs.get("return_indices"):
            return func(values, *rest, **kwargs)
        if len(values) != 2 * self.count:
            raise ValueError("DeepLIFT needs a model that keeps the images of a batch apart along dimension 0.")
        if name in self.POOLS:
            return self._pool(lambda values: self.POOLS[name](values, *rest, **kwargs), values)
        close = self.CLOSE if name in self.KINKED else 1e-4
        return self._activation(lambda values: func(values, *rest, **kwargs), values, close)

    def _activation(self, call: Callable, values: Tensor, close: float) -> Tensor:
        before, after = values.detach(), values.detach().clone()
        result = call(after)
        in_place = result is after
        run, rise = (pair[: self.count] - pair[self.count :] for pair in (before, result))
        leaf = before[: self.count].requires_grad_()
        (slope,) = torch.autograd.grad(call(leaf.clone()).sum(), leaf)
        line = torch.where(run.abs() < close, slope, rise / run) * values[: self.count]
        result = _backward_through(line, result)
        return values.copy_(result) if in_place else result

    def _pool(self, call: Callable, values: Tensor) -> Tensor:
        # From the baseline's maximum up to the larger of the two, then down to the image's, as captum has it.
        result, places = call(values.detach())
        run = (values[: self.count] - values[self.count :]).detach().flatten(2)
        images, baselines = result.split(self.count)
        top = torch.maximum(images, baselines)
        line = 0
        steps = zip(places.split(self.count), (top - baselines, images - top), (1.0, 0.0))
        for place, rise, slope in steps:
            place = place.flatten(2)
            width = run.gather(2, place)
            multiplier = torch.where(width.abs() < self.CLOSE, slope, rise.flatten(2) / width)
            line = line + multiplier * values[: self.count].flatten(2).gather(2, place)
        return _backward_through(line.view_as(images), result)


def _backward_through(line: Tensor, result: Tensor) -> Tensor:
    """The values of `result`; its first rows, as many as `line` has, send what comes back through `line`."""
    return torch.cat([result[: len(line)] + (line - line.detach()), result[len(line) :]])


def _check_sums(maps: Tensor, at_images: Tensor, at_baselines: Tensor) -> None:
    """Raise where a map is not the difference of the two logits, up to rounding."""
    gap = (maps.flatten(1).sum(1) - (at_images - at_baselines)).abs()
    size = maps.flatten(1).abs().sum(1) + at_images.abs() + at_baselines.abs()
    wrong = ~(gap <= max(1e-3, 200 * torch.finfo(maps.dtype).eps) * size)
    if wrong.any():
        raise ValueError(
            f"DeepLIFT's map misses f(x) - f(baseline) by {gap[wrong][0].item():.3g}: the baseline is not "
            "finite, or this model draws noise, or chooses among its values in a way the rule does not know."
        )


def deeplift(model: nn.Module, images: Tensor, targets: Tensor, *, baseline: float | Tensor = 0.0) -> Tensor:
    """DeepLIFT with the Rescale rule, from `baseline` (a number or a tensor that broadcasts).

    Right for activations and max-pooling as modules or functions, in place and re-used. Signed maps
    `(N, C, H, W)`, in logits; those of an image add up to f(x) - f(baseline). Shrikumar et al. (2017).

    Raises
    ------
    ValueError
        A step of the model is neither linear, nor an activation of one input, nor max-pooling; or the maps do
        not add up.
    """
    check(images, targets)
    images, maps = images.detach(), []
    pairs = torch.stack((images, starting_point(baseline, images).detach()), 1)
    with explaining(model):
        for part in chunks(len(pairs), pairs):
            leaf, start = pairs[part, 0].clone().requires_grad_(), pairs[part, 1]
            both = torch.cat((leaf, start))
            with _Rescale(len(leaf)):
                logits = chosen_logits(model, both, targets[part].repeat(2))
            refuse_unknown_steps(logits, "DeepLIFT", MOVES | SUMS, PRODUCTS)
            at_images, at_baselines = logits.split(len(leaf))
            found = pulled_back(at_images, leaf, torch.ones_like(at_images)) * (leaf - start).detach()
            _check_sums(found, at_images.detach(), at_baselines.detach())
            maps.append(found)
    return torch.cat(maps)


def lrp_epsilon(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 1e-6,
    zero_params: str | None = "bias",
) -> Tensor:
    """LRP with the epsilon rule: relevance is shared out in proportion to contributions; Bach et al. (2015).

    Signed maps `(N, C, H, W)`, in logits. With biases left out (`zero_params="bias"`) a map adds up to the
    logit, but for what `epsilon` absorbs and what reaches units that see only zeros, as on a black ground;
    where contributions cancel, relevance of both signs grows without bound: take a larger `epsilon`.
    `zero_params=None` counts biases in the denominator: on networks of ReLU and max-pooling that tends to
    input x gradient as `epsilon` goes to 0, and does not add up to the logit.

    Raises
    ------
    ValueError
        LRP has no rule for a step of the model (see `lrp_composite`), an option is out of range, or the
        relevance overflows.
    """
    if not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive, got {epsilon}.")
    if zero_params not in ("bias", None):
        raise ValueError(f"zero_params must be 'bias' or None, got {zero_params!r}.")
    return propagate(
        model,
        images,
        targets,
        lambda layer, first: Epsilon(epsilon, zero_params),
        stabilizer=epsilon,
        with_biases=zero_params is None,
    )


def lrp_alpha_beta(
    model: nn.Module, images: Tensor, targets: Tensor, *, alpha: float = 2.0, beta: float = 1.0
) -> Tensor:
    """LRP with the alpha-beta rule in every layer, `alpha` - `beta` = 1; Bach et al. (2015), equation 60.

    Positive contributions share `alpha` times the relevance, negative ones give back `beta` times; biases are
    left out. Signed maps `(N, C, H, W)`, in logits; they add up to the logit where all units have
    contributions of both signs. Errors as `lrp_epsilon`.
    """
    if beta < 0 or alpha - beta != 1:
        raise ValueError(f"alpha - beta must be 1 and beta not negative, got alpha={alpha}, beta={beta}.")
    rule = AlphaBeta(alpha, beta, zero_params="bias")
    return propagate(model, images, targets, lambda layer, first: rule)


def lrp_composite(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """LRP by zennit's composite EpsilonAlpha2Beta1Flat; Kohlbrenner et al. (2020).

    Flat in the layer that runs first, alpha 2 beta 1 in other convolutions, epsilon in linear layers; biases
    are left out. Signed maps `(N, C, H, W)`, in logits.

    Raises
    ------
    ValueError
        A step of the model is none of: convolution, linear layer, batch-norm right after one, ReLU, pooling,
        sum, mean, concatenation and other moves of values; or a layer runs twice.
    """

    def rule(layer: nn.Module, first: bool) -> Hook:
        if first:
            return Flat()
        return Epsilon(zero_params="bias") if isinstance(layer, nn.Linear) else AlphaBeta(zero_params="bias")

    return propagate(model, images, targets, rule)
