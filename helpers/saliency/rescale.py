"""DeepLIFT: differences from a baseline sent back through the network."""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .backward_graph import MOVES, PRODUCTS, SUMS, gradient_or_zeros, refuse_unknown_steps
from .passes import chosen_logits, chunks, explaining, explains, starting_point


class _Rescale(TorchFunctionMode):
    """Makes activations and max-pooling straight lines from the baseline's value to the image's.

    The batch holds `count` images, then their baselines. No value changes, only the images' backward pass.
    """

    ACTIVATIONS = frozenset(
        "celu clamp clamp_ clamp_min clamp_min_ clip clip_ elu gelu hardshrink hardsigmoid hardswish hardtanh "
        "hardtanh_ leaky_relu leaky_relu_ log_sigmoid logsigmoid mish prelu relu relu_ relu6 selu sigmoid sigmoid_ "
        "silu softplus softshrink softsign tanh tanh_ tanhshrink threshold threshold_".split()
    )  # of one signal, element by element
    POOLS: dict[str, Callable] = {
        "max_pool2d": F.max_pool2d_with_indices,
        "adaptive_max_pool2d": F.adaptive_max_pool2d_with_indices,
    }

    def __init__(self, count: int):
        super().__init__()
        self.count = count

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if name not in self.ACTIVATIONS | self.POOLS.keys():
            return func(*args, **kwargs)
        values, rest = (args[0], args[1:]) if args else (kwargs.pop("input"), ())
        others = any(isinstance(value, Tensor) and value.requires_grad for value in (*rest, *kwargs.values()))
        if not values.requires_grad or others or kwargs.get("return_indices"):
            return func(values, *rest, **kwargs)
        if len(values) != 2 * self.count:
            raise ValueError("DeepLIFT needs a model that keeps the images of a batch apart along dimension 0.")
        if name in self.POOLS:
            return self._pool(lambda values: self.POOLS[name](values, *rest, **kwargs), values)
        return self._activation(lambda values: func(values, *rest, **kwargs), values)

    def _activation(self, call: Callable, values: Tensor) -> Tensor:
        before, after = values.detach().requires_grad_(), values.detach().clone()
        result = call(after)
        in_place = result is after
        (slopes,) = torch.autograd.grad(call(before.clone()).sum(), before)
        before = before.detach()
        run, rise = (pair[: self.count] - pair[self.count :] for pair in (before, result))
        ends = slopes.split(self.count)
        slope, secant = (ends[0] + ends[1]) / 2, rise / run
        # A short secant is mostly rounding. Where no more than that parts it from the slopes at both ends, they are
        # the better number: so in all units, whether they are large or small.
        rounding = torch.finfo(values.dtype).eps * sum(part.abs() for part in result.split(self.count)) / run.abs()
        apart = (secant - slope).abs() + (ends[0] - ends[1]).abs() > rounding
        line = torch.where(apart, secant, slope) * values[: self.count]
        result = _backward_through(line, result)
        return values.copy_(result) if in_place else result

    def _pool(self, call: Callable, values: Tensor) -> Tensor:
        # From the baseline's maximum up to the larger of the two, then down to the image's, as captum has it.
        result, places = call(values.detach())
        run = (values[: self.count] - values[self.count :]).detach().flatten(2)
        images, baselines = result.split(self.count)
        top = torch.maximum(images, baselines)
        lines = []
        steps = zip(places.split(self.count), (top - baselines, images - top), (1.0, 0.0))
        for place, rise, slope in steps:
            place = place.flatten(2)
            width = run.gather(2, place)
            multiplier = torch.where(width == 0, slope, rise.flatten(2) / width)  # no rise is higher than it is wide
            lines.append(multiplier * values[: self.count].flatten(2).gather(2, place))
        return _backward_through((lines[0] + lines[1]).view_as(images), result)


def _backward_through(line: Tensor, result: Tensor) -> Tensor:
    """The values of `result`; its first rows, as many as `line` has, send what comes back through `line`."""
    return torch.cat([result[: len(line)] + (line - line.detach()), result[len(line) :]])


def _check_sums(maps: Tensor, at_images: Tensor, at_baselines: Tensor) -> None:
    """Raise where a map is not the difference of the two logits, up to rounding."""
    change, rounding = at_images - at_baselines, 200 * torch.finfo(maps.dtype).eps
    gap = (maps.flatten(1).sum(1) - change).abs()
    near = max(1e-3, rounding) * (maps.flatten(1).abs().sum(1) + change.abs())
    wrong = ~(gap <= near + rounding * (at_images.abs() + at_baselines.abs()))
    if wrong.any():
        raise ValueError(
            f"DeepLIFT's map misses f(x) - f(baseline) by {gap[wrong][0].item():.3g}: the baseline is not "
            "finite, or this model draws noise, or chooses among its values in a way the rule does not know."
        )


@explains
def deeplift(model: nn.Module, images: Tensor, targets: Tensor, *, baseline: float | Tensor = 0.0) -> Tensor:
    """DeepLIFT with the Rescale rule, from `baseline` (a number or a tensor that broadcasts).

    Right for activations and max-pooling as modules or functions, in place and re-used. Signed maps
    `(N, C, H, W)`, in logits; those of an image add up to f(x) - f(baseline). Shrikumar et al. (2017).
    An image and its baseline share a pass: it takes `batch_size` of both together, at least one pair.

    Raises
    ------
    ValueError
        A step of the model is neither linear, nor an activation of one input, nor max-pooling; or the maps do
        not add up.
    """
    images, maps = images.detach(), []
    starts = starting_point(baseline, images)
    with explaining(model):
        for part in chunks(len(images), images, each=2):
            leaf, start = images[part].clone().requires_grad_(), starts[part]
            both = torch.cat((leaf, start))
            with _Rescale(len(leaf)):
                logits = chosen_logits(model, both, targets[part].repeat(2))
            refuse_unknown_steps(logits, "DeepLIFT", MOVES | SUMS, PRODUCTS)
            at_images, at_baselines = logits.split(len(leaf))
            found = gradient_or_zeros(at_images, leaf) * (leaf - start).detach()
            _check_sums(found, at_images.detach(), at_baselines.detach())
            maps.append(found)
    return torch.cat(maps)
