"""The layer at which a class activation map is drawn: the last with places through which everything flows."""

from collections.abc import Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..device import generator
from .passes import explaining
from .spatial import Reading, reading, watched, with_noise


class _Run(NamedTuple):
    """The last run of a module, of those on the way from the images to the logits."""

    name: str
    shape: torch.Size
    is_gate: bool  # every way from the images to the logits passes through its output


def default_layer(model: nn.Module, images: Tensor) -> str:
    """What `gradcam_layer` answers, without its checks."""
    modules = dict(model.named_modules())
    with explaining(model):
        pair = with_noise(images)
        runs = _runs(model, pair)
        good = (at for at, run in reversed(list(enumerate(runs))) if _has_places(model, pair, modules[run.name], run))
        last = next(good, None)
        if last is None:
            raise ValueError(_no_layer(runs))
        weighted = [run for run in runs[: last + 1] if _has_weights(modules[run.name])]
        if weighted and _has_places(model, pair, modules[weighted[-1].name], weighted[-1]):
            return weighted[-1].name
        return runs[last].name


def _no_layer(runs: list[_Run]) -> str:
    """Why no layer was chosen, and what to do."""
    if not runs:
        return (
            "no layer of this model can be chosen for Grad-CAM: no gradient leads from the logits to the image, for a "
            "part of the model runs under torch.no_grad() or is detached, or the logits do not depend on the image. "
            "Let it run with gradients, or name a layer behind that part with layer=."
        )
    placed = [run.name for run in runs if run.name and len(run.shape) in (3, 4) and max(run.shape[2:]) > 1]
    return (
        "no layer of this model is known to have places through which everything flows from the image to the logits: "
        "name one with layer=, and how to bring its output to (N, C, h, w) with reshape=; "
        + (f"to choose from: {', '.join(placed[-12:])}." if placed else "no output of a module has height and width.")
    )


def _runs(model: nn.Module, images: Tensor) -> list[_Run]:
    """The modules whose outputs the logits are made of, in the order in which they end."""
    noted: dict[str, tuple] = {}

    def note(name, _module, _inputs, output):
        if not isinstance(output, Tensor) or not output.requires_grad or output.is_complex():
            return None
        passed = output.clone()  # a node of its own, also where the output is one of several pieces of a tensor
        noted.pop(name, None)
        noted[name] = passed.grad_fn, output.shape
        return passed

    hooks = [module.register_forward_hook(partial(note, name)) for name, module in model.named_modules()]
    try:
        fed = images.clone().requires_grad_().clone()
        entrance = fed.grad_fn
        logits = model(fed)
    finally:
        for hook in hooks:
            hook.remove()
    way = _way(logits.grad_fn, entrance)
    gates, waiting = set(), {logits.grad_fn}
    for node in way:  # the logits' node first, no node before those that use it
        waiting.discard(node)
        if not waiting:
            gates.add(node)
        waiting.update(below for below, _ in node.next_functions if below in way)
    return [_Run(name, shape, node in gates) for name, (node, shape) in noted.items() if node in way]


def _way(top, entrance) -> dict:
    """The nodes of the backward graph on the ways from `top` to `entrance`, those of later steps first."""
    ended: dict = {}
    waiting = [(top, False)]
    while waiting:
        node, below_done = waiting.pop()
        if node is None or node in ended:
            continue
        if below_done:
            ended[node] = node is entrance or any(ended.get(below) for below, _ in node.next_functions)
        else:
            waiting.append((node, True))
            waiting += [(below, False) for below, _ in node.next_functions]
    return {node: None for node in reversed(ended) if ended[node]}


def _has_weights(module: nn.Module) -> bool:
    """Whether the module itself holds a matrix or a kernel, not only one number a channel."""
    parametrized = [child for name, child in module.named_children() if name == "parametrizations"]
    own = [
        *module.parameters(recurse=False),
        *(parameter for child in parametrized for parameter in child.parameters()),
    ]
    return any(parameter.ndim > 1 for parameter in own)


def _has_places(model: nn.Module, images: Tensor, module: nn.Module, run: _Run) -> bool:
    """Whether everything flows through this output, and through its places. `images` are two."""
    if not run.is_gate or len(run.shape) not in (3, 4):
        return False
    read = reading(model, images, module, run.name, run.shape, len(images))
    if read is None:
        return False
    grid = read(torch.zeros(run.shape, device=images.device)).shape[2:]
    if any(size == 1 < side for size, side in zip(grid, images.shape[2:])):
        return False
    return uses_places(model, images, module, run.name, run.shape, read)


def uses_places(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, shape: Sequence[int], read: Reading
) -> bool:
    """Whether logits depend on what is read of this output, if on any of it: not so for a class token's last block."""
    blank = torch.zeros(shape, device=images.device, requires_grad=True)
    placed = torch.autograd.grad(read(blank).sum(), blank)[0].bool()
    if placed.all():
        return True
    logits, output = watched(model, images, module, name)
    (gradient,) = torch.autograd.grad((logits * numbers(logits)).sum(), output)
    if gradient[placed].any():
        return True

    def is_felt(where: Tensor) -> bool:
        spoilt, _ = watched(model, images, module, name, lambda kept: kept.masked_fill(where, torch.nan))
        return bool(spoilt.isnan().any())

    # Where weights are zero there may be no gradient and yet a way. A NaN goes it, unless the model drops it.
    return is_felt(placed) or not (gradient.any() or is_felt(torch.ones_like(placed)))


def numbers(like: Tensor) -> Tensor:
    return torch.randn(like.shape, generator=generator(1), dtype=torch.float64).to(like)
