"""What a model did, read off the backward graph under its logits."""

from collections.abc import Callable, Collection, Iterator, Mapping

import torch
from torch import Tensor

from ..checks import NO_GRADIENT, refuse_false_zeros

# Names of backward nodes, without "Backward0": those that only move or copy values, those that add them up,
# and those that are linear as long as all factors but one are constants.
MOVES = frozenset(
    "AccumulateGrad Alias AsStrided Cat ChannelShuffle Clone ConstantPadNd Copy Expand Flip Gather Index IndexSelect "
    "NativeChannelShuffle Permute PixelShuffle PixelUnshuffle ReflectionPad2D Repeat ReplicationPad2D ReshapeAlias "
    "Roll Select Slice Split SplitWithSizes Squeeze Stack T ToCopy Transpose Unbind UnsafeSplit UnsafeView Unsqueeze "
    "UpsampleNearest2D View".split()
)
SUMS = frozenset("AdaptiveAvgPool2D Add AvgPool2D Mean Neg Sub Sum UpsampleBilinear2D".split())
PRODUCTS = frozenset(
    "Addmm Baddbmm Bmm Convolution CudnnBatchNorm CudnnConvolution Div Linear MiopenBatchNorm Mm Mul Mv "
    "MiopenConvolution MkldnnConvolution NativeBatchNorm SlowConv2D".split()
)


def nodes(outputs: Tensor, jumps: Mapping | None = None) -> Iterator:
    """The backward nodes under `outputs`, each once.

    `jumps` leads from the last node of a layer to the first node below it; what lies between is left out.
    """
    waiting, seen = [outputs.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if jumps and node in jumps:
            waiting.append(jumps[node])
            continue
        yield node
        waiting += [below for below, _ in node.next_functions]


def refuse_unknown_steps(
    logits: Tensor,
    method: str,
    known: Collection[str],
    linear: Collection[str] = (),
    jumps: Mapping | None = None,
) -> None:
    """Raise unless each node under `logits` is `known`, or `linear` with one input that is not a constant.

    What `jumps` leaves out is known.
    """
    for node in nodes(logits, jumps):
        name = node.name().removeprefix("torch::autograd::").split("Backward")[0]
        below = [lower for lower, _ in node.next_functions]
        one_signal = sum(lower is not None for lower in below) == 1 and not (name == "Div" and below[0] is None)
        of_batch = getattr(node, "_saved_training", False)  # a norm by the statistics of the batch
        if name not in known and not (name in linear and one_signal and not of_batch):
            raise ValueError(
                f"{method} has no rule for a step of this model ({name}) and would give a wrong map: explain "
                "it by its gradient, or use a network of convolutions, linear layers, ReLU and pooling."
            )


def gradient_or_zeros(
    outputs: Tensor,
    at: Tensor,
    weights: Tensor | None = None,
    *,
    retain_graph: bool = False,
    run: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Tensor:
    """The gradient of `(outputs * weights).sum()` at `at`, weights 1 if None; zero where it is not depended on.

    Parameters
    ----------
    run : `run(values, places)`, the outputs, one each, of other values of `at` for the images at these places; with it
        a zero is only returned where the output stays as it is. None where a rule of the method's own may rightly
        send nothing back.

    Raises
    ------
    ValueError
        No gradient comes back, although the outputs follow `at`, or without `run` might.
    """
    found = None
    if outputs.requires_grad:
        weights = torch.ones_like(outputs) if weights is None else weights
        (found,) = torch.autograd.grad(outputs, at, weights, allow_unused=True, retain_graph=retain_graph)
    if run is not None:
        refuse_false_zeros(run, at, found)
    elif found is None:
        raise ValueError(NO_GRADIENT)
    return torch.zeros_like(at) if found is None else found
