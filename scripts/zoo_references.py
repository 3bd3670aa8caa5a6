"""What the maps of the zoo are held against: each method in a few lines of its own; used by zoo.py.

Nothing here is imported from the package. Images are `(N, C, H, W)` in float64, the model is in eval mode.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference in an image, in units of the largest value expected in it; 0 where both are zero."""
    gap, size = (values.detach().abs().flatten(1).amax(1) for values in (found - expected, expected))
    if not size.any():
        raise ValueError("the reference is zero for all images: this check would check nothing.")
    return float(torch.where(gap == 0, gap, gap / size).amax())


def outputs(model: nn.Module, images: Tensor) -> Tensor:
    """The logits, also of a model that returns an object that holds them."""
    found = model(images)
    return getattr(found, "logits", found)


def logits_of(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    return model(images)[torch.arange(len(images)), targets]


# ---------------------------------------------------------------- by plain differentiation


def gradient(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    at = images.clone().requires_grad_()
    return torch.autograd.grad(logits_of(model, at, targets).sum(), at)[0]


def integrated_gradients(model: nn.Module, images: Tensor, targets: Tensor, steps: int) -> Tensor:
    """From zero, by Gauss and Legendre's rule."""
    points, weights = np.polynomial.legendre.leggauss(steps)
    pairs = zip((points + 1) / 2, weights / 2)
    return sum(weight * images * gradient(model, point * images, targets) for point, weight in pairs)


@contextmanager
def inputs(model: nn.Module) -> Iterator[list[Tensor]]:
    """What the model is given inside the block, batch by batch."""
    seen: list[Tensor] = []
    hook = model.register_forward_pre_hook(lambda module, args: seen.append(args[0].detach().clone()))
    try:
        yield seen
    finally:
        hook.remove()


def smoothgrad(
    model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor, seen: list[Tensor], samples: int
) -> tuple[float, str]:
    """The mean gradient at the inputs that the method was seen to use: the images with noise of .15 of their range."""
    noisy = torch.cat(seen)[-samples * len(images) :].unflatten(0, (len(images), samples))
    spread = (noisy - images[:, None]).flatten(1).std(1) / (images.amax((1, 2, 3)) - images.amin((1, 2, 3)))
    if ((spread / 0.15 - 1).abs() > 0.03).any():
        return 1.0, "the noise has not the standard deviation that it should"
    mean = sum(gradient(model, noisy[:, k], targets) for k in range(samples)) / samples
    return deviation(maps, mean), ""


def occlusion(model: nn.Module, images: Tensor, targets: Tensor, window: int, stride: int) -> Tensor:
    """Square by square; the last ones stick out of the image."""
    fall, covered = torch.zeros_like(images), torch.zeros_like(images)
    starts = range(0, images.shape[2] - window + stride, stride)
    with torch.no_grad():
        whole = logits_of(model, images, targets)
        for top in starts:
            for left in starts:
                square = (..., slice(top, top + window), slice(left, left + window))
                hidden = images.clone()
                hidden[square] = 0
                fall[square] += (whole - logits_of(model, hidden, targets)).view(-1, 1, 1, 1)
                covered[square] += 1
    return fall / covered


# ---------------------------------------------------------------- with other backward passes


class _Guided(torch.autograd.Function):
    """An activation whose backward pass keeps positive signals where its own slope is positive."""

    @staticmethod
    def forward(ctx, values: Tensor, call: Callable) -> Tensor:
        result = call(values)
        ctx.save_for_backward((result == values) & (values > 0))
        return result

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor, None]:
        return above * (above > 0) * ctx.saved_tensors[0], None


class _Secant(torch.autograd.Function):
    """A step of a batch of images and then as many baselines, whose slope is that of the line between the two."""

    @staticmethod
    def forward(ctx, values: Tensor, call: Callable) -> Tensor:
        result = call(values)
        ctx.call = call
        ctx.save_for_backward(values.clone(), result.clone())  # what follows may write into them
        return result

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor, None]:
        (image, baseline), (up, low) = (saved.chunk(2) for saved in ctx.saved_tensors)
        with torch.enable_grad():
            at = image.detach().requires_grad_()
            (slope,) = torch.autograd.grad(ctx.call(at).sum(), at)
        run = image - baseline
        flat = run.abs() < 1e-10
        sent = above.chunk(2)[0] * torch.where(flat, slope, (up - low) / torch.where(flat, 1.0, run))
        return torch.cat((sent, torch.zeros_like(sent))), None


class _SecantOfMaximum(torch.autograd.Function):
    """Max-pooling: the image's place takes the rise to the larger of the two maxima, the baseline's the way back."""

    @staticmethod
    def forward(ctx, values: Tensor, call: Callable) -> Tensor:
        result, places = call(values)
        ctx.save_for_backward(values.clone(), result.clone(), places)
        return result

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor, None]:
        (image, baseline), (up, low), places = (saved.chunk(2) for saved in ctx.saved_tensors)
        run, top = (image - baseline).flatten(2), torch.maximum(up, low)
        sent = torch.zeros_like(run)
        for place, rise, slope in zip(places, (top - low, up - top), (1.0, 0.0)):
            place, width = place.flatten(2), run.gather(2, place.flatten(2))
            line = torch.where(width.abs() < 1e-10, slope, rise.flatten(2) / width)  # as captum, the slope where flat
            sent.scatter_add_(2, place, above.chunk(2)[0].flatten(2) * line)
        sent = sent.view_as(image)
        return torch.cat((sent, torch.zeros_like(sent))), None


RELUS = ["relu", "relu_", "relu6", "hardtanh"]
OTHERS = ["gelu", "silu", "hardswish", "hardsigmoid", "sigmoid", "sigmoid_", "tanh", "elu", "leaky_relu", "mish"]
IN_PLACE = {"relu": 1, "relu6": 1, "hardtanh": 3, "silu": 1, "hardswish": 1, "hardsigmoid": 1, "elu": 2, "mish": 1}


@contextmanager
def _replaced(names: list[str], step: type[torch.autograd.Function]) -> Iterator[None]:
    """Puts `step` in the place of activations, wherever torch keeps them."""

    def instead(name: str, original: Callable) -> Callable:
        def call(values, *args, inplace=None, **options):
            place = IN_PLACE.get(name)
            if inplace is None:
                inplace = name.endswith("_") or (place is not None and len(args) >= place and args[place - 1])
            rest = args[: place - 1] if place else args
            plain = original if not name.endswith("_") else getattr(torch, name.rstrip("_"))
            result = step.apply(values.clone(), lambda given: plain(given.clone(), *rest, **options))
            return values.copy_(result) if inplace else result

        return call

    with ExitStack() as stack:
        for holder in (F, torch, Tensor):
            for name in names:
                if hasattr(holder, name):
                    stack.enter_context(mock.patch.object(holder, name, instead(name, getattr(holder, name))))
        yield


def guided_backprop(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """For networks of ReLU and ReLU6."""
    with _replaced(RELUS, _Guided):
        return gradient(model, images, targets)


def deeplift(model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor) -> float:
    """From zero, by the Rescale rule: the larger of the deviation and of what is missing in the sum."""

    def pool(indexed: Callable) -> Callable:
        def call(values, *args, return_indices=False, **options):
            return _SecantOfMaximum.apply(values, lambda given: indexed(given, *args, **options))

        return call

    pools = {"max_pool2d": F.max_pool2d_with_indices, "adaptive_max_pool2d": F.adaptive_max_pool2d_with_indices}
    with _replaced(RELUS + OTHERS, _Secant), ExitStack() as stack:
        for name, indexed in pools.items():
            stack.enter_context(mock.patch.object(F, name, pool(indexed)))
        at = torch.cat((images, torch.zeros_like(images))).requires_grad_()
        logits = logits_of(model, at, targets.repeat(2))
        (slope,) = torch.autograd.grad(logits[: len(images)].sum(), at)
    image, baseline = logits.detach().chunk(2)
    missing = maps.sum((1, 2, 3)) - (image - baseline)
    return max(deviation(maps, slope[: len(images)] * images), float((missing / maps.abs().sum((1, 2, 3))).abs().max()))


# ---------------------------------------------------------------- relevance


def _moved_from_zero(values: Tensor) -> Tensor:
    """Denominators at a distance of 1e-6 root mean squares from 0."""
    size = values.square().mean(tuple(range(1, values.ndim)), keepdim=True).sqrt()
    return values + torch.where(values < 0, -1e-6, 1e-6) * size.clamp(min=1e-150)


class _Shared(torch.autograd.Function):
    """A step whose backward pass is given relevance and shares it out: `share(values, relevance)`."""

    @staticmethod
    def forward(ctx, values: Tensor, call: Callable, share: Callable) -> Tensor:
        ctx.save_for_backward(values.clone())
        ctx.share = share
        return call(values)

    @staticmethod
    def backward(ctx, relevance: Tensor) -> tuple[Tensor, None, None]:
        return ctx.share(*ctx.saved_tensors, relevance), None, None


class _SharedSum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, one: Tensor, other: Tensor, add: Callable) -> Tensor:
        ctx.save_for_backward(one.clone(), other.clone())
        return add(one, other)

    @staticmethod
    def backward(ctx, relevance: Tensor) -> tuple[Tensor, Tensor, None]:
        one, other = ctx.saved_tensors
        each = relevance / _moved_from_zero(one + other)
        return one * each, other * each, None


@torch.enable_grad()
def _in_proportion(maps: list[tuple[Callable, Tensor]], relevance: Tensor) -> list[Tensor]:
    """Relevance shared out in proportion to what each of several inputs adds to the sum of their linear maps."""
    leaves = [values.detach().requires_grad_() for _, values in maps]
    total = sum(linear(leaf) for (linear, _), leaf in zip(maps, leaves))
    slopes = torch.autograd.grad(total, leaves, relevance / _moved_from_zero(total.detach()))
    return [leaf.detach() * slope for leaf, slope in zip(leaves, slopes)]


def _composite(call: Callable, weight: Tensor, first: bool, dense: bool) -> Callable[[Tensor, Tensor], Tensor]:
    """Flat in the first layer, epsilon in linear layers, alpha 2 beta 1 in convolutions; `call(values, weight)`."""

    def with_weight(used: Tensor) -> Callable[[Tensor], Tensor]:
        return lambda values: call(values, used)

    def share(values: Tensor, relevance: Tensor) -> Tensor:
        if first:
            return _in_proportion([(with_weight(torch.ones_like(weight)), torch.ones_like(values))], relevance)[0]
        if dense:
            return _in_proportion([(with_weight(weight), values)], relevance)[0]
        up, down = with_weight(weight.clamp(min=0)), with_weight(weight.clamp(max=0))
        high, low = values.clamp(min=0), values.clamp(max=0)
        for_it = _in_proportion([(up, high), (down, low)], relevance)
        against = _in_proportion([(down, high), (up, low)], relevance)
        return 2 * sum(for_it) - sum(against)

    return share


def lrp(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """EpsilonAlpha2Beta1Flat, without biases, for models of convolutions, ReLU, batch norms, pooling and sums.

    Relevance passes batch norms, as it does where they are merged with the layer before, if they turn no sign.
    """
    layers = 0

    def weighted(original: Callable, dense: bool) -> Callable:
        def layer(values, weight, bias=None, *args, **options):
            nonlocal layers
            layers += 1
            share = _composite(lambda v, w: original(v, w, None, *args, **options), weight, layers == 1, dense)
            return _Shared.apply(values, lambda v: original(v, weight, bias, *args, **options), share)

        return layer

    def average(original: Callable) -> Callable:
        def call(values, *args, **options):
            def mean(values: Tensor) -> Tensor:
                return original(values, *args, **options)

            share = lambda v, relevance: _in_proportion([(mean, v)], relevance)[0]  # noqa: E731
            return _Shared.apply(values, mean, share) if values.requires_grad else mean(values)

        return call

    def added(original: Callable) -> Callable:
        def add(one, other, **options):
            both = all(isinstance(value, Tensor) and value.requires_grad for value in (one, other))
            return _SharedSum.apply(one, other, torch.add) if both else original(one, other, **options)

        return add

    def passed(original: Callable, in_place: int) -> Callable:
        def call(values, *args, inplace=False, **options):
            here = inplace or (len(args) >= in_place > 0 and args[in_place - 1])
            rest = args[: in_place - 1] if in_place else args
            result = _Shared.apply(values, lambda v: original(v.clone(), *rest, **options), lambda v, above: above)
            return values.copy_(result) if here else result

        return call

    places = [(F, "conv2d", weighted(F.conv2d, False)), (F, "linear", weighted(F.linear, True))]
    places += [(F, name, average(getattr(F, name))) for name in ("avg_pool2d", "adaptive_avg_pool2d")]
    places += [(Tensor, "mean", average(Tensor.mean)), (F, "batch_norm", passed(F.batch_norm, 0))]
    places += [(F, name, passed(getattr(F, name), IN_PLACE[name])) for name in ("relu", "relu6", "hardtanh")]
    places += [(Tensor, name, added(getattr(Tensor, name))) for name in ("__add__", "__iadd__", "add", "add_")]
    at = images.clone().requires_grad_()
    with ExitStack() as stack:
        for holder, name, instead in places:
            stack.enter_context(mock.patch.object(holder, name, instead))
        logits = logits_of(model, at, targets)
    return torch.autograd.grad(logits, at, logits.detach())[0]


# ---------------------------------------------------------------- class activation maps


def _outputs(model: nn.Module, images: Tensor, use: Callable) -> Tensor:
    """The logits, with `use(name, run, output)` in the place of each output of a module that is a tensor."""
    runs: dict[str, int] = {}
    hooks = []
    for name, module in model.named_modules():
        if name:

            def after(module, args, output, name=name):
                runs[name] = runs.get(name, -1) + 1
                return use(name, runs[name], output) if isinstance(output, Tensor) else None

            hooks.append(module.register_forward_hook(after))
    try:
        return model(images)
    finally:
        for hook in hooks:
            hook.remove()


def _grids(values: Tensor) -> Iterator[Callable[[Tensor], Tensor]]:
    """The ways to read an output as `(N, C, h, w)` with height and width above 1."""
    if values.ndim == 4:
        if min(values.shape[2:]) > 1:
            yield lambda values: values
        if min(values.shape[1:3]) > 1:
            yield lambda values: values.permute(0, 3, 1, 2)
    if values.ndim == 3:
        side = int(values.shape[1] ** 0.5)
        if side > 1:
            yield lambda values: values[:, -side * side :].transpose(1, 2).unflatten(2, (side, side))


def gradcam(model: nn.Module, images: Tensor, targets: Tensor, maps: Tensor) -> tuple[float, str]:
    """Which outputs of modules have this Grad-CAM, and whether one of them is a sound place for it.

    All that the logits know of the image must be in it: with that output held at what it was for other images, the
    logits are theirs. And it must be late: weights that run after it lead to no other such output of which the logits
    use the places. (Behind the last block of a transformer they may use the class token alone.)
    """
    kept: dict[tuple[str, int], Tensor] = {}

    def keep(name: str, run: int, output: Tensor) -> Tensor:
        if output.requires_grad and output.is_floating_point():
            output.retain_grad()
            kept[name, run] = output
        return output.clone()

    logits = _outputs(model, images.clone().requires_grad_(), keep)
    logits[torch.arange(len(images)), targets].sum().backward()
    model.zero_grad(set_to_none=True)
    closest, same = 1.0, []
    for call, output in kept.items():
        if output.grad is None or len(output) != len(images):
            continue
        for grid in _grids(output):
            values, slopes = grid(output.detach()), grid(output.grad)
            small = (slopes.mean((2, 3), keepdim=True) * values).sum(1, keepdim=True).clamp(min=0)
            large = F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False)
            if large.any():
                found = deviation(maps, large)
                closest = min(closest, found)
                same += [call] * (found < 1e-9)
    if not same:
        return closest, "no output of a module has this Grad-CAM"
    others = images.flip(0)

    @torch.no_grad()
    def held(call: tuple[str, int]) -> bool:
        def hold(name: str, run: int, output: Tensor) -> Tensor | None:
            return kept[call].detach() if (name, run) == call else None

        return deviation(_outputs(model, others, hold), logits) < 1e-9

    sound = [call for call in dict.fromkeys(same) if held(call)]
    if not sound:
        return 1.0, f"the logits know more of the image than {same[0][0]} does"
    modules, order, weighed = dict(model.named_modules()), list(kept), False
    for later in order[order.index(sound[-1]) + 1 :]:
        output = kept[later]
        counts = output.grad is not None and any(grid(output.grad).any() for grid in _grids(output))
        if counts:
            weighed |= any(weight.ndim > 1 for weight in modules[later[0]].parameters(recurse=False))
            if weighed and held(later):
                return 1.0, f"{sound[-1][0]} comes early: {later[0]} has a grid of places, too"
    return closest, f"at {sound[-1][0]}"


# ---------------------------------------------------------------- randomised copies


def _trained(model: nn.Module) -> dict[str, Tensor]:
    """What training moves: weights, and the statistics of norms."""
    statistics = {name: values for name, values in model.named_buffers() if "running_" in name}
    return dict(model.named_parameters()) | statistics


@torch.no_grad()
def shuffle(model: nn.Module, seed: int = 0) -> nn.Module:
    """The model, the values of each weight now in another order: the same widths, another function."""
    draw = torch.Generator().manual_seed(seed)
    for weight in _trained(model).values():
        weight.copy_(weight.flatten()[torch.randperm(weight.numel(), generator=draw)].view_as(weight))
    return model


@torch.no_grad()
def as_trained(trained: nn.Module, copied: nn.Module, images: Tensor) -> list[str]:
    """The weights and statistics of a copy that have the trained values, of those that decide the logits."""
    before, logits, found = _trained(trained), outputs(trained, images), []
    for name, values in _trained(copied).items():
        if torch.equal(values, before[name]):
            old = before[name].clone()
            before[name].add_(0.5 * old.abs().mean() + 0.1)
            if not torch.equal(outputs(trained, images), logits):
                found.append(name)
            before[name].copy_(old)
    return found
