"""Contributions sent back through the network by rules: DeepLIFT, and layer-wise relevance propagation (LRP).

Both are right only where every step of the network is one that the rules know. What runs is therefore read off
the backward graph under the logits, and a network with any other step is refused.
"""

import copy
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.overrides import TorchFunctionMode
from zennit.core import Composite, Hook
from zennit.layer import Sum
from zennit.rules import AlphaBeta, Epsilon, Flat, Norm, Pass

from helpers.saliency.core import check, chosen_logits, chunks, explaining
from helpers.saliency.gradients import _baseline

# Backward nodes that move or copy values, and of two that make sums of them (by name, without "Backward0").
_MOVES = frozenset(
    "AccumulateGrad Alias AsStrided Cat Clone ConstantPadNd Copy CopySlices Expand Flip Gather Index IndexSelect "
    "Permute PixelShuffle ReflectionPad2D Repeat ReplicationPad2D ReshapeAlias Roll Select Slice Split "
    "SplitWithSizes Squeeze Stack T ToCopy Transpose Unbind UnsafeSplit UnsafeView Unsqueeze UpsampleNearest2D "
    "View".split()
)
_SUMS = frozenset("AdaptiveAvgPool2D Add AvgPool2D Mean Neg Sub Sum UpsampleBilinear2D".split())
_PRODUCTS = frozenset(  # linear as long as one factor is a constant
    "Addmm Baddbmm Bmm Convolution CudnnBatchNorm CudnnConvolution Div Linear MiopenBatchNorm MiopenConvolution "
    "MkldnnConvolution Mm Mul Mv NativeBatchNorm SlowConv2D".split()
)
_POOLS = frozenset("AdaptiveMaxPool2D MaxPool2DWithIndices".split())  # LRP: the largest value takes all


def _refuse_unknown_steps(
    logits: Tensor, method: str, known: Collection[str], linear: Collection[str] = (), jumps: Mapping | None = None
) -> None:
    """Raise unless each node under `logits` is `known`, or `linear` with one input that depends on the image.

    `jumps` leads from the last node of a layer that has a rule to the first node below that layer.
    """
    waiting, seen = [logits.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if jumps and node in jumps:
            waiting.append(jumps[node])
            continue
        name = node.name().removeprefix("torch::autograd::").split("Backward")[0]
        below = [lower for lower, _ in node.next_functions]
        one_signal = sum(lower is not None for lower in below) == 1 and not (name == "Div" and below[0] is None)
        of_batch = getattr(node, "_saved_training", False)  # a norm by the statistics of the batch
        if name not in known and not (name in linear and one_signal and not of_batch):
            raise ValueError(
                f"{method} has no rule for a step of this model ({name}), and would give a wrong map: "
                "use a network of convolutions, linear layers, ReLU and pooling, or a gradient method."
            )
        waiting += below


class _Rescale(TorchFunctionMode):
    """Makes activations and max-pooling straight lines from the baseline's value to the image's.

    The batch holds `count` images, then their baselines. Values stay; only the backward pass of the images changes.
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


_DELTAS=[]
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
    pairs = torch.stack((images, _baseline(baseline, images).detach()), 1)
    with explaining(model):
        for part in chunks(len(pairs), pairs):
            leaf, start = pairs[part, 0].clone().requires_grad_(), pairs[part, 1]
            both = torch.cat((leaf, start))
            with _Rescale(len(leaf)):
                logits = chosen_logits(model, both, targets[part].repeat(2))
            _refuse_unknown_steps(logits, "DeepLIFT", _MOVES | _SUMS, _PRODUCTS)
            at_images, at_baselines = logits.split(len(leaf))
            found = _relevance(at_images, leaf, torch.ones_like(at_images)) * (leaf - start).detach()
            _DELTAS.append((found.flatten(1).sum(1), (at_images - at_baselines).detach(), found.abs().flatten(1).sum(1)))
            maps.append(found)
    return torch.cat(maps)


def _relevance(logits: Tensor, leaf: Tensor, start: Tensor) -> Tensor:
    if not logits.requires_grad:
        return torch.zeros_like(leaf)
    (found,) = torch.autograd.grad(logits, leaf, grad_outputs=start, allow_unused=True)
    return torch.zeros_like(leaf) if found is None else found


_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy whose tensors are objects of its own on the caller's memory: to replace one leaves the caller's alone."""
    own = {id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in model.parameters()}
    own |= {id(tensor): tensor.detach() for tensor in model.buffers()}
    try:
        return copy.deepcopy(model, own)
    except Exception as error:
        raise ValueError(f"LRP works on a copy of the model, and this model cannot be copied: {error}") from error


def _merge_norms(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """Merge, in place, each batch-norm into the layer whose output it reads; the layers in the order they run.

    Which layer that is, a pass of `example` shows. A norm that reads anything else stays.
    """
    ran, outputs, norms, handles = [], {}, [], []

    def after_layer(layer, _, output):
        ran.append(layer)
        outputs[id(output)] = layer, output, output._version

    def before_norm(norm, args):
        layer, output, version = outputs.get(id(args[0]), (None, None, None))
        norms.append((norm, layer if output is args[0] and version == output._version else None))

    for module in model.modules():
        if type(module) in _LAYERS:
            handles.append(module.register_forward_hook(after_layer))
        elif type(module) in _NORMS and module.running_mean is not None:
            handles.append(module.register_forward_pre_hook(before_norm))
    plain = model(example.clone())
    for handle in handles:
        handle.remove()
    for layer in ran:
        if ran.count(layer) > 1:
            raise ValueError(f"LRP needs layers that run once; this model runs {layer} {ran.count(layer)} times.")
    for norm, layer in norms:
        if layer is not None and sum(norm is a or layer is b for a, b in norms) == 1:
            statistics = norm.running_mean, norm.running_var, norm.eps, norm.weight, norm.bias
            layer.weight, layer.bias = fuse_conv_bn_weights(layer.weight, layer.bias, *statistics)
            norm.forward = nn.Identity().forward
    merged = model(example.clone()) if norms else plain
    if isinstance(plain, Tensor) and (merged - plain).abs().max() > 1e-3 * plain.abs().max():
        raise ValueError("LRP merges batch-norms into the layers before them; this model's output changes by it.")
    return ran


class _Call(nn.Module):
    """A call as a module, which is what zennit's rules are attached to."""

    def __init__(self, call: Callable[[Tensor], Tensor]):
        super().__init__()
        self.call, self.in_place = call, False

    def forward(self, values: Tensor) -> Tensor:
        result = self.call(values)
        self.in_place = result is values
        return result


class _CallRules(TorchFunctionMode):
    """Gives a rule to the calls that have no parameters, from modules or functions.

    Relevance passes ReLUs, and operations with a constant named in `constants`, unit by unit; `norm` shares it
    out in sums and means.
    """

    PASS = frozenset("relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_".split())
    MEANS = frozenset("adaptive_avg_pool2d avg_pool2d mean sum".split())
    ADD = frozenset(("add", "add_"))

    def __init__(self, norm: Norm, constants: Collection[str]):
        super().__init__()
        self.norm, self.constants = norm, constants
        self.kept: list[nn.Module] = []
        self.jumps: dict = {}

    def follow(self, module: nn.Module) -> None:
        """Note in `jumps` where the backward graph of a module that has a rule begins and ends."""
        below = []

        def after(module, args, output):
            self.jumps[output.grad_fn] = below.pop()

        module.register_forward_pre_hook(lambda module, args: below.append(args[0].grad_fn))
        module.register_forward_hook(after)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        signals = [isinstance(value, Tensor) and value.requires_grad for value in args]
        if name in self.PASS | self.MEANS and signals[0]:
            return self._ruled(Pass() if name in self.PASS else self.norm, func, args, kwargs)
        if name in self.ADD and signals == [True, True] and not kwargs:
            total = self._ruled(self.norm, Sum(), (torch.stack(torch.broadcast_tensors(*args), -1),), {})
            return args[0].copy_(total) if name == "add_" else total
        if name in self.constants and signals == [True, False] and _fits(args[1], args[0]):
            return self._ruled(Pass(), func, args, kwargs)
        if name in self.constants & {"add", "mul"} and signals == [False, True] and _fits(args[0], args[1]):
            return self._ruled(Pass(), func, args[::-1], kwargs)
        return func(*args, **kwargs)

    def _ruled(self, rule: Hook, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        module = _Call(lambda values: func(values, *args[1:], **kwargs))
        rule.copy().register(module)
        self.follow(module)
        self.kept.append(module)  # and with it the rule, to which zennit refers weakly
        result = module(args[0])
        return args[0].copy_(result) if module.in_place else result


def _fits(constant: float | Tensor, values: Tensor) -> bool:
    return torch.broadcast_shapes(torch.as_tensor(constant).shape, values.shape) == values.shape


def _propagate(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    rule: Callable[[nn.Module, bool], Hook],
    *,
    stabilizer: float = 1e-6,
    with_biases: bool = False,
) -> Tensor:
    """Relevance of the target logit, `(N, C, H, W)`, under `rule(layer, whether it runs first)`."""
    check(images, targets)
    images, maps = images.detach(), []
    # A constant that is added is a bias: all relevance passes it only where biases are left out.
    constants = {"mul", "mul_", "div", "div_"} | (set() if with_biases else {"add", "add_", "sub", "sub_"})
    calls = _CallRules(Norm(stabilizer), constants)
    with explaining(model):
        copied = _private_copy(model)
        layers = _merge_norms(copied, images[:1])
        rules = {layer: rule(layer, layer is layers[0]) for layer in layers}
        Composite(lambda context, name, module: rules.get(module)).register(copied)
        for layer in layers:
            calls.follow(layer)
        for part in chunks(len(images), images):
            calls.kept.clear(), calls.jumps.clear()
            leaf = images[part].clone().requires_grad_()
            with calls:
                logits = chosen_logits(copied, leaf.clone(), targets[part])
            _refuse_unknown_steps(logits, "LRP", _MOVES | _POOLS | {"Identity"}, jumps=calls.jumps)
            maps.append(_relevance(logits, leaf, logits.detach()))
    return torch.cat(maps)


def lrp_epsilon(model, images, targets, *, epsilon: float = 1e-6, zero_params: str | None = "bias") -> Tensor:
    return _propagate(
        model,
        images,
        targets,
        lambda layer, first: Epsilon(epsilon, zero_params),
        stabilizer=epsilon,
        with_biases=zero_params is None,
    )


def lrp_alpha_beta(model, images, targets, *, alpha: float = 2.0, beta: float = 1.0) -> Tensor:
    return _propagate(
        model, images, targets, lambda layer, first: AlphaBeta(alpha, beta, zero_params="bias")
    )


def lrp_composite(model, images, targets) -> Tensor:
    def rule(layer, first):
        if first:
            return Flat()
        return Epsilon(zero_params="bias") if isinstance(layer, nn.Linear) else AlphaBeta(zero_params="bias")

    return _propagate(model, images, targets, rule)
