"""What tensors a model holds and uses: parameters and buffers, the order in which they run, and state outside them."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, suppress
from copy import deepcopy
from functools import partial
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .inference import evaluating


def all_tensors(model: nn.Module) -> list[Tensor]:
    """Parameters and buffers."""
    return [*model.parameters(), *model.buffers()]


class _Detaching(TorchFunctionMode):
    """Copies results of a pass, which `copy.deepcopy` refuses, without their graph."""

    def __init__(self, memo: dict):
        super().__init__()
        self.memo = memo

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is Tensor.__deepcopy__ and not args[0].is_leaf:
            if id(args[0]) not in self.memo:
                self.memo[id(args[0])] = args[0].detach().clone()
            return self.memo[id(args[0])]
        return func(*args, **(kwargs or {}))


def copied(value: Any, memo: dict | None = None) -> Any:
    """`copy.deepcopy` of a model or a part of one, also where it has kept activations of a pass."""
    memo = {} if memo is None else memo
    with torch.no_grad(), _Detaching(memo):
        return deepcopy(value, memo)


def named_tensors(model: nn.Module, *, recurse: bool = True) -> dict[str, Tensor]:
    """What stages are known by: the parameters, and the means that norm layers keep, by all their names."""
    parameters = model.named_parameters(recurse=recurse, remove_duplicate=False)
    buffers = model.named_buffers(recurse=recurse, remove_duplicate=False)
    return dict(parameters) | {name: mean for name, mean in buffers if name.endswith("running_mean")}


class Uses(TorchFunctionMode):
    """Calls `note` with the identity of each of `tensors` that torch computes with, every time it does."""

    def __init__(self, tensors: Iterable[Tensor], note: Callable[[int], None]):
        super().__init__()
        self.known = {id(tensor) for tensor in tensors}
        self.note = note

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if result is None or any(isinstance(value, Tensor) for value in leaves(result)):  # no look at a shape
            for value in leaves((args, kwargs or {})):
                if id(value) in self.known:
                    self.note(id(value))
        return result


def leaves(value) -> Iterator:
    """What lists, tuples, dictionaries and slices hold, however deep."""
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from leaves(item)
    elif isinstance(value, dict):
        yield from leaves(list(value.values()))
    elif isinstance(value, slice):
        yield from (value.start, value.stop, value.step)
    else:
        yield value


# What a call may ask of a tensor without looking at its values.
_LOOKS = frozenset(
    "shape ndim dtype device layout is_cuda is_cpu is_mps is_meta is_sparse is_quantized is_leaf requires_grad "
    "itemsize nbytes names size dim numel nelement ndimension stride element_size is_contiguous is_floating_point "
    "is_complex is_signed storage_offset get_device __len__ is_same_size type".split()
)


def only_looks(func: Callable) -> bool:
    """Whether a torch function asks for the shape, type or place of a tensor and for nothing that its values decide."""
    name = getattr(func, "__name__", "")
    return (getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name) in _LOOKS


def _traced_order(model: nn.Module) -> list[int]:
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception as error:
        raise ValueError(
            "the order in which this model's layers run could not be traced "
            f"({type(error).__name__}); pass a batch of inputs as example=."
        ) from error
    everything = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    order: dict[int, None] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            order.setdefault(id(model.get_submodule(str(node.target))))
        if node.op in ("call_module", "get_attr"):
            order |= dict.fromkeys(id(t) for n, t in everything if f"{n}.".startswith(f"{node.target}."))
    return list(order)


def order_of_use(model: nn.Module, example: Tensor | None) -> list[int]:
    """Identities of modules, parameters and buffers in the order in which they first take part in a pass."""
    with evaluating(model), ExitStack() as hooks:
        if example is None:
            return _traced_order(model)
        order: dict[int, None] = {}
        for module in model.modules():
            hooks.callback(module.register_forward_pre_hook(lambda called, _: order.setdefault(id(called))).remove)
        with torch.no_grad(), Uses(all_tensors(model), lambda used: order.setdefault(used)):
            model(example.clone())
        return list(order)


# ---------------------------------------------------------------- state outside parameters and buffers


_REGISTERED = ("_parameters", "_buffers", "_modules")


class Place(NamedTuple):
    """Where a tensor is held: by `owner` under `key`, which the attribute of a module leads to."""

    module: str
    attribute: str
    owner: object
    key: object
    path: str


def plain_places(model: nn.Module) -> Iterator[tuple[Place, Tensor]]:
    """The tensors that the model's modules hold outside parameters and buffers.

    As attributes, in containers, objects and modules that are not registered, and in what functions close over.
    """
    registered = {id(tensor) for tensor in all_tensors(model)}
    modules = dict(model.named_modules())
    seen = {id(module) for module in modules.values()}
    waiting: list[tuple[Place, object]] = [
        (Place(name, key, module, key, f"{name}.{key}".lstrip(".")), value)
        for name, module in modules.items()
        for key, value in vars(module).items()
        if key not in _REGISTERED
    ]
    while waiting:
        place, value = waiting.pop()
        if isinstance(value, Tensor):
            if id(value) not in registered:
                yield place, value
        elif id(value) not in seen:
            seen.add(id(value))
            for key, text, held in _held_by(value):
                waiting.append((place._replace(owner=value, key=key, path=place.path + text), held))


def _held_by(value) -> Iterator[tuple[object, str, object]]:
    if isinstance(value, dict):
        yield from ((key, f"[{key!r}]", held) for key, held in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((key, f"[{key}]", held) for key, held in enumerate(value))
    elif isinstance(value, partial):
        yield from (("func", "", value.func), ("args", ".args", value.args), ("keywords", "", value.keywords))
    elif isinstance(value, nn.Module):
        own = vars(value)
        inner = own["_parameters"] | own["_buffers"] | own["_modules"]
        yield from ((key, f".{key}", held) for key, held in (own | inner).items() if key not in _REGISTERED)
    elif isinstance(value, MethodType):
        yield "__self__", "", value.__self__
    elif isinstance(value, FunctionType):
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            with suppress(ValueError):  # a name that was never bound
                yield cell, f" (its {name})", cell.cell_contents
    elif isinstance(value, (set, frozenset, deque)):
        yield from ((None, f"[{place}]", held) for place, held in enumerate(value))
    elif not isinstance(value, (type, ModuleType)):
        yield from ((key, f".{key}", held) for key, held in attributes(value).items())


def attributes(value) -> dict[str, object]:
    """What an object holds, in slots and in its dictionary."""
    found = {}
    for kind in type(value).__mro__:
        named = vars(kind).get("__slots__", ())
        for name in [named] if isinstance(named, str) else named:
            if name not in ("__dict__", "__weakref__") and hasattr(value, name):
                found[name] = getattr(value, name)
    return found | getattr(value, "__dict__", {})


def held_by_name(model: nn.Module, member: str) -> dict[str, Tensor]:
    """What `named_tensors` knows of a module, or a lone parameter, by full name."""
    return {
        name: tensor for name, tensor in named_tensors(model).items() if name == member or name.startswith(f"{member}.")
    }
