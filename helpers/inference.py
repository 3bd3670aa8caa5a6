"""Inference: a model held still, what it keeps put back afterwards, and its logits for any number of images."""

import pickle
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy

import numpy as np
import torch
from torch import Tensor, nn

from .device import batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; every module's own mode is put back on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, parameters frozen, gradients on and `torch.autocast` off; put back on the way out."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    kinds = {parameter.device.type for parameter, _ in wanted} or {"cpu"}
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad(), ExitStack() as stack:
            for kind in kinds:
                stack.enter_context(torch.autocast(kind, enabled=False))  # maps would show its rounding
            yield
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)


def random_states() -> tuple:
    """The global random states of torch (CPU, and CUDA where it runs), numpy and Python: equal where nobody drew."""
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    drawn_by_torch = tuple(state.numpy().tobytes() for state in (torch.get_rng_state(), *on_cuda))
    return drawn_by_torch, pickle.dumps(np.random.get_state()), random.getstate()


@contextmanager
def random_state_kept() -> Iterator[None]:
    """The global random states of torch (CPU and CUDA), numpy and Python are put back on the way out."""
    states = torch.get_rng_state(), np.random.get_state(), random.getstate()
    on_cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    try:
        yield
    finally:
        torch.set_rng_state(states[0])
        np.random.set_state(states[1])
        random.setstate(states[2])
        if on_cuda:
            torch.cuda.set_rng_state_all(on_cuda)


@contextmanager
def buffers_kept(model: nn.Module) -> Iterator[None]:
    """The model works on copies of its buffers inside the block: what a pass counts there is not counted."""
    held = [(module._buffers, dict(module._buffers)) for module in model.modules()]
    own: dict[int, Tensor] = {}
    try:
        with torch.inference_mode(False):  # copies that a gradient may meet
            for buffers, were in held:
                for name, buffer in were.items():
                    if buffer is not None:
                        buffers[name] = own.setdefault(id(buffer), buffer.detach().clone())
        yield
    finally:
        for buffers, were in held:
            buffers.clear()
            buffers.update(were)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """For passes that nobody shall notice: buffers, random states and what modules keep as attributes are put back.

    That covers counters, caches and stored activations, in lists and dictionaries of the modules too.
    """
    attributes = [(vars(module), dict(vars(module))) for module in model.modules()]
    containers = [(value, copy(value)) for _, were in attributes for value in were.values() if _fills(value)]
    try:
        with buffers_kept(model), random_state_kept():
            yield
    finally:
        for value, was in containers:
            value.clear()
            (value.extend if isinstance(value, (list, deque)) else value.update)(was)
        for held, were in attributes:
            held.clear()
            held.update(were)


def _fills(value) -> bool:
    return type(value) in (list, deque, dict, OrderedDict, defaultdict, set)


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Logits `(N, classes)` in eval mode; model and images are left as they were.

    Raises
    ------
    ValueError
        There are no images, the model cannot run on them, or does not answer with one row of logits for each.
    """
    if not isinstance(images, Tensor) or not images.ndim or not len(images):
        got = f"shape {tuple(images.shape)}" if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(f"images must be a tensor of one image or more, got {got}.")
    answers = []
    with evaluating(model), buffers_kept(model):
        for part in batches(len(images), batch_size):
            answers.append(logits_of(model, images[part].clone()))
    return torch.cat(answers)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's answer, `(N, classes)`; whatever goes wrong in it comes back as a ValueError that says where."""
    shape = tuple(images.shape)
    try:
        answer = model(images)
    except torch.cuda.OutOfMemoryError:
        raise
    except Exception as error:
        where = f"the model cannot run on images of shape {shape}; look at their channels, size and range: {error}"
        raise ValueError(_why_not(model, images) or where) from error
    _refuse_other_outputs(answer, shape[0])
    return answer


def _why_not(model: nn.Module, images: Tensor) -> str:
    """What would break any model: weights of another type than the images, or somewhere else."""
    weights = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    for what, of in (("type", lambda t: t.dtype), ("device", lambda t: t.device)):
        found = {of(weight) for weight in weights}
        if found and of(images) not in found:
            here, there = (value if what == "type" else repr(str(value)) for value in (of(images), of(weights[0])))
            return (
                f"images are on {here} and the model's weights on {there}: bring them to one {what}, "
                f"images.to({there}) or model.to({here})."
            ).replace("on torch.", "torch.")
    return ""


def _refuse_other_outputs(output, count: int) -> None:
    """Raise unless what a model returned is floating-point logits `(count, classes)`, and say how to get them."""
    wanted = f"the model must return logits of shape ({count}, classes), got"
    if not isinstance(output, Tensor):
        raise ValueError(f"{wanted} {_kind(output)}. Wrap the model: {_way_to_logits(output)}.")
    shape = tuple(output.shape)
    if output.ndim == 1 and len(output) == count:
        raise ValueError(
            f"{wanted} {shape}, one number an image: wrap the model, Wrapped(model), which makes a column of it, "
            "and explain target 0."
        )
    if output.ndim == 4 and len(output) == count:
        raise ValueError(
            f"{wanted} {shape}: a map of logits needs a region. Wrap the model: Wrapped(model, region=mask), or "
            "Wrapped(model, reduce='mean') for the mean over all places."
        )
    if output.ndim != 2 or len(output) != count:
        raise ValueError(
            f"{wanted} {shape}: one row an image and one column a class. Wrap the model with a function that makes "
            "them: Wrapped(model, output=function)."
        )
    if not output.shape[1]:
        raise ValueError(f"{wanted} {shape}: there is no class to explain. Look at the model's last layer.")
    if not output.is_floating_point():
        raise ValueError(
            f"{wanted} {output.dtype}: only real logits in floating point can be explained. Where the model rounds "
            "or takes the argmax, take it off; of complex numbers choose real ones: Wrapped(model, output=function)."
        )


def _kind(output) -> str:
    """What was returned, and under which names it holds tensors."""
    kind = type(output).__name__
    if names := _names(output):
        return f"{kind} with {', '.join(map(repr, names))}"
    return f"{kind} of {len(output)}" if isinstance(output, (tuple, list)) else kind


def _names(output) -> list[str]:
    """Keys or attributes that hold tensors, those that look like logits first."""
    if hasattr(output, "keys"):
        items = [(key, output[key]) for key in output.keys()]
    elif hasattr(output, "_fields"):
        items = [(name, getattr(output, name)) for name in output._fields]
    else:
        items = list(getattr(output, "__dict__", {}).items())
    names = [name for name, value in items if isinstance(name, str) and isinstance(value, Tensor)]
    return sorted(names, key=lambda name: "logit" not in name)


def _way_to_logits(output) -> str:
    if names := _names(output):
        return f"Wrapped(model, output={names[0]!r})"
    if isinstance(output, (tuple, list)):
        return "Wrapped(model, output=0), the place of the logits"
    return "Wrapped(model, output=function), which takes the logits out of it"
