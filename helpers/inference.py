"""Inference: a model held still, what it keeps put back afterwards, and its logits for any number of images."""

import pickle
import random
from collections import OrderedDict, defaultdict, deque
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from copy import copy
from inspect import signature

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .device import batches, memory_of


class ModelError(ValueError):
    """What is wrong with a model, said by who has seen it in a pass: nothing is to be added."""


def check_module(model: nn.Module) -> None:
    """Raise unless `model` is a module of Python, whose parts can be reached and put back."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}: make its call the forward() of one."
        )
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            where = f"its part {name!r}" if name else "the model"
            raise ValueError(f"{where} is TorchScript, whose steps cannot be seen: pass the module it was made from.")


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


class weights_unwritten(TorchFunctionMode):
    """Inside, what would write into a parameter of `model` raises before it has done so."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.own = {memory_of(parameter): name for name, parameter in model.named_parameters()}
        self.own.pop(0, None)  # of those that lie nowhere

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        sets = name == "__set__" and getattr(getattr(func, "__self__", None), "__name__", "") == "data"
        writes = sets or name in _WRITES or (name.endswith("_") and not name.endswith("__") and name not in _NO_WRITES)
        for written in (args[0] if writes and args else None, kwargs.get("out")):
            if isinstance(written, Tensor) and (where := self.own.get(memory_of(written))) is not None:
                raise ModelError(
                    f"a pass of the model writes into its parameter {where!r}: run it once first, if only "
                    "its first pass does, or explain a model whose forward() leaves its parameters alone."
                )
        return func(*args, **kwargs)


_WRITES = frozenset(("__setitem__", *(f"__i{name}__" for name in "add sub mul truediv floordiv mod pow".split())))
_NO_WRITES = frozenset(("requires_grad_", "detach_", "share_memory_", "rename_", "_"))


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
    check_module(model)
    answers = []
    with untouched(model), evaluating(model), weights_unwritten(model):
        for part in batches(len(images), batch_size):
            answers.append(logits_of(model, images[part].clone()))
    return torch.cat(answers)


def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """The model's answer, `(N, classes)`; whatever goes wrong in it comes back as a ValueError that says where."""
    shape, with_gradient = tuple(images.shape), torch.is_grad_enabled()
    try:
        answer = model(images)
        switched_off = with_gradient and not torch.is_grad_enabled()
    except (torch.cuda.OutOfMemoryError, ModelError):
        raise
    except Exception as error:
        where = f"the model cannot run on images of shape {shape}; look at their channels, size and range: {error}"
        raise ValueError(_why_not(model, images) or where) from error
    finally:
        torch.set_grad_enabled(with_gradient)
    if switched_off:
        raise ValueError(
            "the model leaves gradients switched off, as torch.set_grad_enabled(False) in forward() does: use a block, "
            "with torch.no_grad(): ..., for what needs none."
        )
    _refuse_other_outputs(answer, shape[0])
    return answer


def _why_not(model: nn.Module, images: Tensor) -> str:
    """What is commonly the matter: type and place of the weights, a forward() of more, axes, a batch of one."""
    weights = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    for what, of in (("type", lambda t: t.dtype), ("device", lambda t: t.device)):
        found = {of(weight) for weight in weights}
        if found and of(images) not in found:
            here, there = (value if what == "type" else repr(str(value)) for value in (of(images), of(weights[0])))
            return (
                f"images are on {here} and the model's weights on {there}: bring them to one {what}, "
                f"images.to({there}) or model.to({here})."
            ).replace("on torch.", "torch.")
    try:
        signature(model.forward).bind(images)
    except TypeError as error:
        return (
            f"the model's forward() does not take images alone ({error}): hold what else it takes, "
            "Wrapped(model, inputs={...}), or pass a module whose forward(images) calls it."
        )
    if images.ndim == 4 and images.shape[3] <= 4 < images.shape[1] and _runs(model, images.permute(0, 3, 1, 2)):
        return (
            f"images of shape {tuple(images.shape)} have their channels last, and the model wants them first: pass "
            "images.permute(0, 3, 1, 2)."
        )
    if len(images) == 1 and _runs(model, torch.cat((images, images))):
        return (
            "the model runs on two images and not on one, so that it treats the images of a batch together, as a batch "
            "norm in train mode does: explain a model that treats each image by itself."
        )
    return ""


def _runs(model: nn.Module, images: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(images.detach().contiguous())
    except Exception:
        return False
    return True


def _refuse_other_outputs(output, count: int) -> None:
    """Raise unless what a model returned is floating-point logits `(count, classes)`, and say how to get them."""
    wanted = f"the model must return logits of shape ({count}, classes), got"
    if not isinstance(output, Tensor):
        raise ValueError(f"{wanted} {_kind(output)}. Wrap the model: {_way_to_logits(output, count)}.")
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
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return f"{kind} of {len(output)}"
    names = _names(output)
    return f"{kind} with {', '.join(map(repr, names))}" if names else kind


def _held(output) -> list[tuple]:
    """What an answer holds, with keys, attributes or places."""
    if isinstance(output, (tuple, list)) and not hasattr(output, "_fields"):
        return list(enumerate(output))
    if hasattr(output, "keys"):
        return [(key, output[key]) for key in output.keys() if isinstance(key, str)]
    if hasattr(output, "_fields"):
        return [(name, getattr(output, name)) for name in output._fields]
    return list(getattr(output, "__dict__", {}).items())


def _names(output, count: int = 0) -> list:
    """Keys, attributes or places that hold tensors, those that look like logits of so many images first."""
    found = [(name, value) for name, value in _held(output) if isinstance(value, Tensor)]

    def unlike(item: tuple) -> tuple[bool, bool]:
        name, value = item
        return "logit" not in str(name), not (value.ndim == 2 and len(value) == count)

    return [name for name, _ in sorted(found, key=unlike)]


def _way_to_logits(output, count: int) -> str:
    names = _names(output, count)
    if not names:
        return "Wrapped(model, output=function), which makes one row of logits an image of it"
    place = ", the place of the logits" if isinstance(names[0], int) else ""
    return f"Wrapped(model, output={names[0]!r}){place}"
