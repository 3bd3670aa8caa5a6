"""What tensors a model holds and uses: parameters and buffers, the order in which they run, and state outside them."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
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
    everything = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    order: dict[int, None] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            order |= dict.fromkeys(id(t) for n, t in everything.items() if f"{n}.".startswith(f"{node.target}."))
    return list(order)


def order_of_use(model: nn.Module, example: Tensor | None) -> list[int]:
    """Identities of parameters and buffers in the order in which they first take part in a pass."""
    with evaluating(model):
        if example is None:
            return _traced_order(model)
        order: dict[int, None] = {}
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
                yield name, f" (its {name})", cell.cell_contents
    elif hasattr(value, "__dict__") and not isinstance(value, (type, ModuleType)):
        yield from ((key, f".{key}", held) for key, held in vars(value).items())


class _Watch(TorchFunctionMode):
    """Keeps the identities of all tensors whose values take part in a call."""

    def __init__(self) -> None:
        super().__init__()
        self.used: set[int] = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not only_looks(func) or any(isinstance(value, Tensor) for value in leaves(result)):
            self.used |= {id(value) for value in leaves((args, kwargs or {})) if isinstance(value, Tensor)}
        return result


_GONE = object()
Fresh = dict[tuple[str, str], object]  # values of the modules' attributes as before any pass filled them


def refresh(model: nn.Module, fresh: Fresh) -> None:
    for (name, attribute), value in fresh.items():
        held = vars(model.get_submodule(name))
        if value is _GONE:
            held.pop(attribute, None)
        else:
            held[attribute] = deepcopy(value)


def _without(model: nn.Module, places: Iterable[Place]) -> tuple[nn.Module, Fresh]:
    """A copy that holds nothing at these places, and what its attributes then are."""
    memo: dict = {}
    copied = deepcopy(model, memo)
    fresh: Fresh = {}
    for place in places:
        owner = memo.get(id(place.owner))
        held: Any = vars(owner) if hasattr(owner, "__dict__") and not isinstance(owner, dict) else owner
        if isinstance(held, dict) and place.key in held:
            del held[place.key]
            if owner is copied.get_submodule(place.module):
                held[place.key] = None
        elif isinstance(held, list) and isinstance(place.key, int):
            held[place.key] = None
        else:
            continue  # in something that is shared with the caller, or cannot be changed
        fresh[place.module, place.attribute] = deepcopy(vars(copied.get_submodule(place.module)).get(place.attribute))
    return copied, fresh


def _caches(model: nn.Module, places: list[Place], example: Tensor) -> Fresh:
    """What modules filled by themselves in an earlier pass: emptied, a pass works and fills it again."""
    if not places:
        return {}
    copied, fresh = _without(model, places)
    for value in (None, _GONE):  # `if self.kept is None` and `if not hasattr(self, "kept")`
        tried = {at: _GONE if was is None and value is _GONE else was for at, was in fresh.items()}
        trial = deepcopy(copied)
        refresh(trial, tried)
        try:
            with evaluating(trial), torch.no_grad():
                trial(example.clone())
        except Exception:
            continue
        filled = {(place.module, place.attribute) for place, _ in plain_places(trial)}
        if tried.keys() <= filled:
            return tried
    if len(places) == 1:
        return {}
    return {at: value for place in places for at, value in _caches(model, [place], example).items()}


@torch.inference_mode(False)
def private_copy(model: nn.Module, example: Tensor | None) -> tuple[nn.Module, Fresh, list[int], list[str]]:
    """A copy that uses nothing of the caller's, what it must forget, and the order in which its tensors run.

    One pass of `example` shows that; what an earlier pass has left in a cache, and with it the trained weights,
    is emptied.

    Raises
    ------
    ValueError
        The copy cannot be made, uses a tensor of the original, or a parameter that is not registered.
    """
    try:
        private = copied(model)
    except Exception as error:
        raise ValueError(f"this model cannot be copied with copy.deepcopy: {error}") from error
    if example is None:
        return private, {}, order_of_use(private, None), []
    with _Watch() as watch:
        order = order_of_use(private, example)
    tensors = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    if used := [name for key, name in tensors.items() if key in watch.used]:
        raise ValueError(
            f"a copy of this model still uses {', '.join(map(repr, used))} of the model itself: something that cannot "
            "be copied, like a lambda or a nested function, refers to it. Make it a method of the module."
        )
    held = [(place, tensor) for place, tensor in plain_places(private) if id(tensor) in watch.used]
    if hidden := [place.path for place, tensor in held if isinstance(tensor, nn.Parameter) or tensor.requires_grad]:
        raise ValueError(
            f"this model uses parameters that it does not register, which would stay as trained: {', '.join(hidden)}. "
            "Keep them as attributes of a module, in an nn.ModuleList or in an nn.ParameterList."
        )
    fresh = _caches(private, [place for place, _ in held], example)
    if fresh:
        refresh(private, fresh)
        order = order_of_use(private, example)
    constant = [place.path for place, _ in held if (place.module, place.attribute) not in fresh]
    return private, fresh, order, constant


def held_by_name(model: nn.Module, member: str) -> dict[str, Tensor]:
    """What `named_tensors` knows of a module, or a lone parameter, by full name."""
    return {
        name: tensor for name, tensor in named_tensors(model).items() if name == member or name.startswith(f"{member}.")
    }
