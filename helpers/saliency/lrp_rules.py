"""Layer-wise relevance propagation (LRP): zennit's rules, put on every step of a copy of the model.

Each layer with parameters is given a rule, and so is each call without any that is not a mere move of values.
A model with any other step is refused.
"""

import copy
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.utils import remove_spectral_norm, remove_weight_norm
from torch.nn.utils.fusion import fuse_conv_bn_weights
from torch.nn.utils.parametrize import is_parametrized
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.overrides import TorchFunctionMode
from zennit.core import Composite, Hook
from zennit.layer import Sum
from zennit.rules import Norm, Pass

from .backward_graph import MOVES, gradient_or_zeros, refuse_unknown_steps
from .passes import chosen_logits, chunks, explaining

POOLS = frozenset(("AdaptiveMaxPool2D", "MaxPool2DWithIndices"))  # the largest value takes all
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def _private_copy(model: nn.Module) -> nn.Module:
    """A copy with tensor objects of its own on the caller's memory: they may be replaced, not written to."""
    own: dict[int, Tensor] = {
        id(tensor): nn.Parameter(tensor.detach(), requires_grad=False) for tensor in model.parameters()
    }
    own |= {id(tensor): tensor.detach() for tensor in model.buffers()}
    try:
        return copy.deepcopy(model, own)
    except Exception as error:
        raise ValueError(f"LRP works on a copy of the model, and this model cannot be copied: {error}") from error


def _plain_weights(model: nn.Module) -> None:
    """Make, in place, of each weight that is computed from others, as under weight or spectral norm, its value."""
    for module in list(model.modules()):
        if is_parametrized(module):  # torch's own removal deletes from a class that the copy shares with the model
            names = [name for name, _ in module.get_submodule("parametrizations").named_children()]
            values = {name: getattr(module, name).detach() for name in names}
            module.__class__ = type(module).__bases__[0]
            del module.parametrizations
            for name, value in values.items():
                module.register_parameter(name, nn.Parameter(value, requires_grad=False))
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, WeightNorm):
                remove_weight_norm(module, hook.name)
            elif isinstance(hook, SpectralNorm):
                remove_spectral_norm(module, hook.name)


def _merge_norms(model: nn.Module, example: Tensor) -> list[nn.Module]:
    """Merge, in place, each batch-norm into the layer whose output it reads; returns the layers as they run.

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
        if type(module) in _LAYERS and "forward" not in vars(module):
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


def relative(epsilon: float = 1e-6) -> Callable[[Tensor], Tensor]:
    """A stabiliser: denominators, moved away from 0 by `epsilon` times the layer's root mean square for that image.

    Where all of them are 0 it is by a number so small that nothing comes of units to which nothing was contributed,
    and relevance overflows where contributions cancel.
    """

    def stabilised(values: Tensor) -> Tensor:
        axes = tuple(range(1, values.ndim))
        largest = values.abs().amax(axes, keepdim=True)
        unit = torch.where(largest > 0, largest, 1)  # squares of small numbers vanish
        shift = epsilon * unit * (values / unit).square().mean(axes, keepdim=True).sqrt()
        shift = torch.where(largest > 0, shift, torch.finfo(values.dtype).tiny ** 0.5)
        return values + torch.where(values < 0, -shift, shift)

    return stabilised


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

    Relevance passes ReLUs, and operations with a constant if named in `constants`, unit by unit; `norm`
    shares it out in sums and means.
    """

    PASS = frozenset("relu relu_ relu6 hardtanh hardtanh_ leaky_relu leaky_relu_".split())
    MEANS = frozenset("adaptive_avg_pool2d avg_pool2d mean sum".split())
    ADD = frozenset(("add", "add_"))

    def __init__(self, norm: Norm, constants: frozenset[str]):
        super().__init__()
        self.norm, self.constants = norm, constants
        self.kept: list[tuple] = []
        self.jumps: dict = {}

    def forget(self) -> None:
        """Let go of the last pass: its rules and its backward graph hold one another where no collector looks."""
        for _, handles in self.kept:
            handles.remove()
        self.kept.clear()
        self.jumps.clear()

    def follow(self, module: nn.Module) -> None:
        """Note in `jumps` where the backward graph of a module that has a rule begins and ends."""
        below: list = []

        def after(module, args, output):
            self.jumps[output.grad_fn] = below.pop()

        module.register_forward_pre_hook(lambda module, args: below.append(args[0].grad_fn))
        module.register_forward_hook(after, prepend=True)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), getattr(func, "__name__", "")
        if not args and "input" in kwargs:
            args = (kwargs.pop("input"),)
        signals = [isinstance(value, Tensor) and value.requires_grad for value in args]
        if name in self.PASS | self.MEANS and signals[0]:
            return self._ruled(Pass() if name in self.PASS else self.norm, func, args, kwargs)
        if kwargs or len(args) != 2:
            return func(*args, **kwargs)
        if name in self.ADD and all(signals):
            total = self._ruled(self.norm, Sum(), (torch.stack(torch.broadcast_tensors(*args), -1),), {})
            return args[0].copy_(total) if name == "add_" else total
        if name in self.constants & {"add", "mul"} and signals == [False, True]:
            args, signals = args[::-1], [True, False]
        if name in self.constants and signals == [True, False] and _fits(args[1], args[0]):
            return self._ruled(Pass(), func, args, kwargs)
        return func(*args, **kwargs)

    def _ruled(self, rule: Hook, func: Callable, args: tuple, kwargs: dict) -> Tensor:
        module = _Call(lambda values: func(values, *args[1:], **kwargs))
        self.kept.append((module, rule.copy().register(module)))  # and with it the rule, to which zennit refers weakly
        self.follow(module)
        result = module(args[0])
        return args[0].copy_(result) if module.in_place else result


def _fits(constant: float | Tensor, values: Tensor) -> bool:
    return torch.broadcast_shapes(torch.as_tensor(constant).shape, values.shape) == values.shape


def propagate(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    rule: Callable[[nn.Module, bool], Hook],
    *,
    stabiliser: Callable[[Tensor], Tensor],
    with_biases: bool = False,
) -> Tensor:
    """Relevance of the target logit, `(N, C, H, W)`, under `rule(layer, whether it runs first)`.

    `stabiliser` moves the denominators of sums and means away from 0.
    """
    images, maps, started = images.detach(), [], []
    # A constant that is added is a bias: all relevance passes it only where biases are left out.
    constants = {"mul", "mul_", "div", "div_"} | (set() if with_biases else {"add", "add_", "sub", "sub_"})
    calls = _CallRules(Norm(stabiliser), frozenset(constants))
    with explaining(model):
        copied = _private_copy(model)
        _plain_weights(copied)
        layers = _merge_norms(copied, images[:1])
        rules = {layer: rule(layer, layer is layers[0]) for layer in layers}
        with Composite(lambda context, name, module: rules.get(module)).context(copied):
            for layer in layers:
                calls.follow(layer)
            for part in chunks(len(images), images):
                leaf = images[part].clone().requires_grad_()
                try:
                    with calls:
                        logits = chosen_logits(copied, leaf.clone(), targets[part])
                    refuse_unknown_steps(logits, "LRP", MOVES | POOLS | {"Identity"}, jumps=calls.jumps)
                    maps.append(gradient_or_zeros(logits, leaf, logits.detach()))
                    started.append(logits.detach())
                finally:
                    calls.forget()
    _refuse_explosions(torch.cat(maps), torch.cat(started))
    return torch.cat(maps)


def _refuse_explosions(maps: Tensor, logits: Tensor) -> None:
    """Raise where relevance has grown so far that its sum, the logit, is lost in rounding, in half the images or more.

    Where a bias alone opens a unit, next to nothing shares out its relevance, and shares of both signs are many times
    what they add up to. That may happen in any image; where it happens layer after layer it happens in all of them.
    """
    sizes, most = maps.double().abs().flatten(1).sum(1), 0.1 / torch.finfo(maps.dtype).eps
    grown = ~(sizes <= most * logits.double().abs())
    often = 2 * grown.sum() >= (sizes != 0).sum() > 0
    if grown.any() and (often or not torch.isfinite(sizes).all()):
        named = ", ".join(map(str, grown.nonzero()[:5, 0].tolist())) + (", ..." if grown.sum() > 5 else "")
        raise ValueError(
            f"LRP's relevance overflows in {int(grown.sum())} of {len(maps)} images ({named}): its sizes add up to "
            f"more than {most:.0e} times the logit, because contributions cancel where biases are left out. Take "
            "lrp_composite, a model and images in double precision, or lrp_epsilon with zero_params=None or a larger "
            "epsilon."
        )
