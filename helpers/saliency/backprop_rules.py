"""Backward passes with rules of their own."""

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.autograd.function import BackwardCFunction
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .backward_graph import nodes
from .passes import OnePass


class _Rectified(torch.autograd.Function):
    """min(max(x, 0), top) forward; backward only what is positive, with `guided` only where 0 < x < top."""

    @staticmethod
    def forward(ctx, values: Tensor, top: float, guided: bool, in_place: bool) -> Tensor:
        ctx.open = (values > 0) & (values < top) if guided and top < math.inf else None
        rectified = values.clamp_(0, top) if in_place else values.clamp(0, top)
        if in_place:
            ctx.mark_dirty(values)
        if guided and top == math.inf:  # a plain ReLU keeps its result for the backward pass, and so does this
            ctx.save_for_backward(rectified)
        return rectified

    @staticmethod
    def backward(ctx, above: Tensor) -> tuple[Tensor, None, None, None]:
        above = above.clamp(min=0)
        for rectified in ctx.saved_tensors:
            above = torch.ops.aten.threshold_backward(above, rectified, 0)  # zero where rectified <= 0
        return above if ctx.open is None else above * ctx.open, None, None, None


class _ReluCalls(TorchFunctionMode):
    """Replaces every ReLU and ReLU6 *call*, from a module or a function, in place or not."""

    PLAIN = (F.relu, torch.relu, torch.Tensor.relu)
    IN_PLACE = (torch.relu_, torch.Tensor.relu_)

    def __init__(self, guided: bool):
        super().__init__()
        self.guided = guided

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}

        def option(place: int, name: str, default):
            return args[place] if len(args) > place else kwargs.get(name, default)

        top = math.inf
        if func in self.IN_PLACE:
            in_place = True
        elif func in self.PLAIN:
            in_place = option(1, "inplace", False)
        elif func is F.relu6:
            top, in_place = 6.0, option(1, "inplace", False)
        elif func is F.hardtanh and option(1, "min_val", -1.0) == 0:
            top, in_place = option(2, "max_val", 1.0), option(3, "inplace", False)
        else:
            return func(*args, **kwargs)
        values = option(0, "input", None)
        return _Rectified.apply(values, top, self.guided, in_place)


# The backward nodes of steps for which the two methods have no rule, or of a ReLU that was not seen as one.
_OTHER_STEPS = frozenset(
    "Celu DifferentiableGraph Elu Gelu Hardshrink Hardswish Hardtanh LeakyRelu LogSigmoid Maximum "
    "Minimum Mish PreluKernel Relu RreluWithNoise Silu Softplus Softshrink Tanh Threshold Where".split()
)


def _refuse_other_activations(logits: Tensor) -> None:
    """Raise if the graph under `logits` holds an activation that was not replaced."""
    for node in nodes(logits):
        name = node.name().rpartition("::")[2].split("Backward")[0]
        low = getattr(node, "_saved_min", None) if name in ("Clamp", "ClampMin") else None
        at_zero = low is not None and bool((torch.as_tensor(low) == 0).any())
        unseen = isinstance(node, BackwardCFunction) and not isinstance(node, _Rectified._backward_cls)
        if name in _OTHER_STEPS or at_zero or unseen:
            raise ValueError(
                f"this model has a step ({name}) that may be an activation and is not a call of ReLU "
                "or ReLU6: there is no rule for it, and the map would be silently wrong."
            )


@OnePass(rule=partial(_ReluCalls, guided=True), inspect=_refuse_other_activations)
def guided_backprop(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Backward pass that keeps, at every ReLU, only positive signals at active units.

    Right for ReLU and ReLU6 as modules or functions, in place and re-used. Signed maps `(N, C, H, W)`.
    Springenberg et al. (2014).

    Raises
    ------
    ValueError
        The model has an activation for which the rule is not defined, or a ReLU that cannot be reached.
    """


@OnePass(rule=partial(_ReluCalls, guided=False), inspect=_refuse_other_activations)
def deconvnet(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Backward pass that keeps, at every ReLU, only positive signals, whether the unit is active or not.

    Same scope and errors as `guided_backprop`. Signed maps `(N, C, H, W)`. Zeiler & Fergus (2014).
    """
