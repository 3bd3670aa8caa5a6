"""Backward passes with rules of their own."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .backward_graph import MOVES, PRODUCTS, SUMS
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


def _notes(node: Any) -> dict[str, bool]:
    """What was noted on a node of the backward graph; it stays there as long as the graph."""
    return node.metadata


class _ReluCalls(TorchFunctionMode):
    """Replaces every ReLU and ReLU6 *call*, from a module or a function, in place or not.

    On the nodes of the backward graph it notes what they do not show: whether a factor or a choice moves in steps or
    is a gate that a signal sets for itself, with no gradient ("masked"), and that what was written into a part of a
    tensor is known ("known").
    """

    PLAIN = (F.relu, torch.relu, torch.Tensor.relu)
    IN_PLACE = (torch.relu_, torch.Tensor.relu_)
    STEPS = frozenset("ceil floor heaviside round sgn sign trunc".split())
    WRITES = (torch.Tensor.copy_, torch.Tensor.__setitem__, torch.Tensor.add_, torch.Tensor.sub_)

    def __init__(self, guided: bool):
        super().__init__()
        self.guided = guided
        # what follows from signals without a gradient: whether it moves in steps, and the nodes of those signals
        self.cut_off: dict[int, tuple[Tensor, bool, set]] = {}

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
            result = func(*args, **kwargs)
            self._note(func, [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)], result)
            return result
        values = option(0, "input", None)
        into_part = in_place and values._is_view()
        result = _Rectified.apply(values, top, self.guided, in_place and not into_part)
        self._note(func, [values], result)
        if into_part:  # written there after, so that the graph shows the rule
            result = values.copy_(result)
            self._note(torch.Tensor.copy_, [values], values)
        return result

    def _note(self, func: Callable, given: list[Tensor], result: object) -> None:
        if func in self.WRITES and given[0]._is_view() or func is torch.Tensor.__setitem__:
            whole = given[0] if given[0]._base is None else given[0]._base
            if whole.grad_fn is not None:
                _notes(whole.grad_fn)["known"] = True
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor) or name.endswith("_like") or name.startswith("new_"):  # of the shape alone
            return
        cut_off = [self.cut_off[id(tensor)] for tensor in given if id(tensor) in self.cut_off]
        in_steps = any(steps for _, steps, _ in cut_off)
        of_whole_numbers = any(not tensor.is_floating_point() for tensor, _, _ in cut_off)
        if result.grad_fn is not None:
            is_product = _name(result.grad_fn) in ("Mul", "Div")
            own_gate = is_product and any(
                tensor.shape == result.shape and not signals.isdisjoint(_nodes_of(given))
                for tensor, _, signals in cut_off
            )
            _notes(result.grad_fn)["masked"] = in_steps or own_gate or (is_product and of_whole_numbers)
        elif cut_off or any(tensor.requires_grad for tensor in given):
            steps = result.dtype == torch.bool or name in self.STEPS
            steps = steps or (of_whole_numbers and result.is_floating_point())
            signals = _nodes_of(given).union(*(signals for _, _, signals in cut_off))
            self.cut_off[id(result)] = result, in_steps or steps, signals


# Names of backward nodes beside those that move, add and multiply. Through all of these the plain gradient flows: both
# papers send the signal of a pooling to the place that was chosen, and say nothing about norms and attention.
_MOVES = MOVES | frozenset(
    "Col2Im Diagonal Im2Col MaskedSelect MaxUnpool2D MaxUnpool3D ReflectionPad1D "
    "ReflectionPad3D ReplicationPad1D ReplicationPad3D Rot90 Scatter Tril Triu Unfold UpsampleNearest1D "
    "UpsampleNearest3D UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D".split()
)
_SUMS = SUMS | frozenset(
    "AdaptiveAvgPool3D AvgPool3D Cumsum FftC2C FftC2R FftR2C NativeDropout UpsampleBicubic2D UpsampleBicubic2DAa "
    "UpsampleBilinear2DAa UpsampleLinear1D UpsampleTrilinear3D ViewAsComplex ViewAsReal".split()
)
_CHOICES = frozenset(
    "AdaptiveMaxPool2D AdaptiveMaxPool3D Amax Amin FractionalMaxPool2D FractionalMaxPool3D Kthvalue Max "
    "MaxPool2DWithIndices MaxPool3DWithIndices Median Min MkldnnMaxPool2D MkldnnMaxPool3D Sort Topk".split()
)
_NORMS = frozenset(
    "FusedRmsNorm LinalgVectorNorm LogSoftmax Logsumexp NativeGroupNorm NativeLayerNorm Norm RmsNorm SafeSoftmax "
    "Softmax Std StdMean Var VarMean".split()
)
_LAYERS = (PRODUCTS - {"Mul", "Div"}) | frozenset(
    "Addbmm Addmv ConvDepthwise2D ConvDepthwise3D CudnnConvolutionTranspose Dot Glu GridSampler2D GridSampler3D "
    "Trilinear SlowConv3D SlowConvDilated2D SlowConvDilated3D SlowConvTranspose2D SlowConvTranspose3D".split()
)
# Known only as a factor that weighs another signal, or in what that is divided by.
_WEIGHS = frozenset("Abs Clamp ClampMin Exp Hardsigmoid Log Pow Reciprocal Rsqrt Sigmoid Sqrt".split())
# A value keeps its place through these.
_SAME_PLACE = _WEIGHS | frozenset(
    "Add Alias Clone Copy CudnnBatchNorm Div Expand MiopenBatchNorm Mul NativeBatchNorm Neg Permute ReshapeAlias "
    "Squeeze Sub T ToCopy Transpose UnsafeView Unsqueeze View".split()
)


def _name(node) -> str:
    return node.name().rpartition("::")[2].split("Backward")[0]


def _signals(node) -> list[tuple]:
    """Where a node's inputs come from, (node, which of its outputs), constants left out."""
    return [edge for edge in node.next_functions if edge[0] is not None]


def _is_rule(node) -> bool:
    return isinstance(node, _Rectified._backward_cls)


def _sources(edge: tuple) -> set[tuple]:
    """The values of which a factor is a function place by place, itself among them."""
    waiting, seen = [edge], set()
    while waiting:
        node, output = waiting.pop()
        if (node, output) not in seen:
            seen.add((node, output))
            if _name(node) in _SAME_PLACE or _is_rule(node):
                waiting += _signals(node)
    return seen


def _nodes_of(tensors: list[Tensor]) -> set:
    """The nodes of the values of which these are functions place by place, their own among them."""
    return {
        node
        for tensor in tensors
        if tensor.grad_fn is not None
        for node, _ in _sources((tensor.grad_fn, tensor.output_nr))
    }


def _weighs(edge: tuple) -> bool:
    """Whether a factor is a weight: a sigmoid, a root or the like of its own, not of an earlier product's."""
    waiting, seen = [edge[0]], set()
    while waiting:
        node = waiting.pop()
        name, below = _name(node), [lower for lower, _ in _signals(node)]
        constant_over = name == "Div" and node.next_functions[0][0] is None
        if name in _WEIGHS or constant_over:
            return True
        if node not in seen and (name in _MOVES | {"Add", "Sub", "Neg"} or name in ("Mul", "Div") and len(below) == 1):
            seen.add(node)
            waiting += below
    return False


def _refuse_other_activations(logits: Tensor) -> None:
    """Raise unless the graph under `logits` holds replaced ReLUs, and beside them only steps that are known."""
    if logits.grad_fn is None:
        return
    waiting, seen, replaced = [(logits.grad_fn, False)], set(), False
    while waiting:
        node, weight = waiting.pop()  # in a weight, more is known
        if (node, weight) in seen or (node, False) in seen:
            continue
        seen.add((node, weight))
        name, below = _name(node), [lower for lower, _ in _signals(node)]
        if _is_rule(node):
            replaced = True
            waiting += [(lower, False) for lower in below]
            continue
        masked, known = (_notes(node).get(note) for note in ("masked", "known"))
        if name in ("Mul", "Div") and len(below) == 2 and not masked:
            first, second = _signals(node)
            of_itself = _sources(first) & _sources(second)
            weights = [name == "Mul" and _weighs(first), name == "Div" or _weighs(second)]
            if weight or not of_itself and not all(weights):
                waiting += [(lower, weight or one) for lower, one in zip(below, weights)]
                continue
        elif not masked and (
            name in _MOVES | _SUMS | _CHOICES | _NORMS | _LAYERS
            or (weight and name in _WEIGHS | {"Div"})
            or name == "Mul"
            or (name == "Div" and node.next_functions[0][0] is not None)
            or (name in ("Where", "MaskedFill") and masked is False)
            or (name == "CopySlices" and known)
            or name.startswith("ScaledDotProduct")
        ):
            waiting += [(lower, weight and name not in _LAYERS) for lower in below]
            continue
        raise ValueError(
            f"this model has a step ({name}) that may be an activation and is not a call of ReLU or ReLU6: there is "
            "no rule for it, and the map would be silently wrong."
        )
    if not replaced:
        raise ValueError(
            "this model calls no ReLU or ReLU6: Guided Backprop and DeconvNet change nothing else, and their map would "
            "be the gradient under another name. Ask for the gradient, or write activations as calls of ReLU."
        )


@OnePass(rule=partial(_ReluCalls, guided=True), inspect=_refuse_other_activations)
def guided_backprop(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Backward pass that keeps, at every ReLU, only positive signals at active units.

    Right for ReLU and ReLU6 as modules or functions, in place and re-used. Through linear steps, max-pooling, norms,
    attention and gates (a sigmoid times another signal) the plain gradient flows. Signed maps `(N, C, H, W)`.
    Springenberg et al. (2014).

    Raises
    ------
    ValueError
        The model calls no ReLU, has a step that may be another activation, or a ReLU that cannot be reached.
    """


@OnePass(rule=partial(_ReluCalls, guided=False), inspect=_refuse_other_activations)
def deconvnet(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:  # type: ignore[empty-body]
    """Backward pass that keeps, at every ReLU, only positive signals, whether the unit is active or not.

    Same scope and errors as `guided_backprop`. Signed maps `(N, C, H, W)`. Zeiler & Fergus (2014).
    """
