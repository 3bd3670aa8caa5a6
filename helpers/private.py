"""A private copy of a model: nothing of the caller's takes part in it, and nothing that an earlier pass has left."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from copy import deepcopy
from functools import partial
from types import CellType
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

from .inference import evaluating
from .model_state import Place, attributes, copied, leaves, order_of_use, plain_places
from .stages import is_norm
from .watching import Watch, counts, held_elsewhere, learned, uses

_GONE = object()
Fresh = dict[tuple[str, str], object]  # values of the modules' attributes as before any pass filled them


class PrivateCopy(NamedTuple):
    """A copy, what it must forget to be as before any pass, the order in which its tensors run, and its constants.

    The constants are tensors that take part in a pass and are neither parameters nor buffers, by the place where they
    are held, if a module leads there.
    """

    model: nn.Module
    fresh: Fresh
    order: list[int]
    constants: list[str]


@torch.inference_mode(False)
def private_copy(model: nn.Module, example: Tensor | None) -> PrivateCopy:
    """A copy that uses nothing of the caller's, and what it must forget before it is given other weights.

    Passes of `example` show that. What an earlier pass has left, and with it the trained weights, is emptied; what a
    pass of the copy leaves is found by running it twice: in the second some parameters are used less often.

    Raises
    ------
    ValueError
        The copy cannot be made, uses a tensor of the original or a parameter that is not registered, changes its
        parameters as it runs, or keeps what it computed from them where it cannot be emptied.
    """
    try:
        private = copied(model)
    except Exception as error:
        raise ValueError(f"this model cannot be copied with copy.deepcopy: {error}") from error
    if example is None:
        return PrivateCopy(private, {}, order_of_use(private, None), [])
    before = list(plain_places(private))  # what the pass stores is not what it uses
    with Watch() as watch:
        order = order_of_use(private, example)
    used = [(place, tensor) for place, tensor in before if watch.used[id(tensor)]]
    _refuse_others(model, private, watch, [place.path for place, tensor in used if learned(tensor)])
    held, first = [place for place, _ in used], counts(private, watch)
    fresh = _caches(private, held, example)
    if unused := [name for name, _ in private.named_parameters() if not first[name]]:
        fresh |= _caches(private, list(_buffers(private, watch)), example)
        fresh |= _flagged(private, fresh, unused, example)
    shared = {id(place.owner) for place, _ in plain_places(model)}
    _refuse_shared(private, [place for place in held if id(place.owner) in shared], example)
    if fresh:
        refresh(private, fresh)
        with Watch() as watch:
            order = order_of_use(private, example)
        first = counts(private, watch)
    fresh |= _left_by_a_pass(model, private, fresh, first, {place.path for place in held}, example)
    refresh(private, fresh)
    forget = partial(refresh, private, fresh)
    others = [
        (f"a tensor of shape {tuple(t.shape)} from elsewhere", t) for t in held_elsewhere(private, example, forget)
    ]
    forget()
    _refuse_hidden(name for name, tensor in others if learned(tensor))
    constants = [place for place in held if (place.module, place.attribute) not in fresh]
    _refuse_unknown(private, first, constants)
    return PrivateCopy(private, fresh, order, [*(place.path for place in constants), *(name for name, _ in others)])


def _refuse_others(model: nn.Module, private: nn.Module, watch: Watch, hidden: list[str]) -> None:
    """Raise where the pass of the private copy was not one of its own registered, unchanging tensors."""
    tensors = {id(t): name for name, t in (*model.named_parameters(), *model.named_buffers())}
    if others := [name for key, name in tensors.items() if watch.used[key]]:
        raise ValueError(
            f"a copy of this model still uses {', '.join(map(repr, others))} of the model itself: something that can "
            "not be copied, like a lambda or a nested function, refers to it. Make it a method of the module."
        )
    _refuse_hidden(hidden)
    before, after = dict(model.named_parameters()), dict(private.named_parameters())
    same = {name for name in before.keys() & after.keys() if _equal(before[name], after[name])}
    if changed := sorted((before.keys() | after.keys()) - same):
        raise ValueError(
            f"a pass in eval mode makes or changes parameters of this model: {', '.join(map(repr, changed))}. Run it "
            "once, so that it has done so, or leave its parameters alone in forward()."
        )


def _refuse_hidden(names: Iterable[str]) -> None:
    if found := ", ".join(names):
        raise ValueError(
            f"this model uses parameters that it does not register, which would stay as trained: {found}. "
            "Keep them as attributes of a module, in an nn.ModuleList or in an nn.ParameterList."
        )


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.is_meta or torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


# ---------------------------------------------------------------- what an earlier pass has left


def refresh(model: nn.Module, fresh: Fresh) -> None:
    """Put the attributes and buffers named in `fresh` back to what they are there."""
    for (name, attribute), value in fresh.items():
        module = model.get_submodule(name)
        held: dict[str, Any] = module._buffers if attribute in module._buffers else vars(module)
        if value is _GONE:
            held.pop(attribute, None)
        else:
            held[attribute] = copied(value)


def _buffers(model: nn.Module, watch: Watch) -> Iterator[Place]:
    """The float buffers that took part in the pass and are no norm's."""
    for name, module in model.named_modules():
        for key, buffer in module.named_buffers(recurse=False):
            if watch.used[id(buffer)] and buffer.is_floating_point() and not is_norm(module):
                yield Place(name, key, module, key, f"{name}.{key}".lstrip("."))


def _without(model: nn.Module, places: Iterable[Place], value: object) -> tuple[nn.Module, Fresh]:
    """A copy that holds None, or nothing at all (`_GONE`), at these places, and what its attributes then are."""
    memo: dict = {}
    private = copied(model, memo)
    fresh: Fresh = {}
    for place in places:
        owner, key = memo.get(id(place.owner)), cast(Any, place.key)
        module = private.get_submodule(place.module)
        if owner is module:
            refresh(private, {(place.module, place.attribute): value})
        elif isinstance(owner, (dict, list)):
            if value is _GONE and isinstance(owner, dict):
                del owner[key]
            else:
                owner[key] = None
        elif isinstance(key, str) and hasattr(owner, key):
            delattr(owner, key) if value is _GONE else setattr(owner, key, None)
        else:
            continue  # in something that is shared with the caller, or cannot be changed
        fresh[place.module, place.attribute] = value if owner is module else copied(vars(module)[place.attribute])
    return private, fresh


def _runs(model: nn.Module, example: Tensor) -> bool:
    try:
        with evaluating(model), torch.no_grad():
            model(example.clone())
        return True
    except Exception:
        return False


def _caches(model: nn.Module, places: list[Place], example: Tensor) -> Fresh:
    """What modules filled by themselves in an earlier pass: emptied, a pass works and fills it again."""
    if not places:
        return {}
    for value in (None, _GONE):  # `if self.kept is None`, and `if key not in self.kept`
        trial, fresh = _without(model, places, value)
        if not fresh or not _runs(trial, example):
            continue
        filled = {(place.module, place.attribute) for place, _ in plain_places(trial)}
        filled |= {(name, key) for name, part in trial.named_modules() for key, _ in part.named_buffers(recurse=False)}
        if fresh.keys() <= filled:
            return fresh
    if len(places) == 1:
        return {}
    return {at: value for place in places for at, value in _caches(model, [place], example).items()}


def _flagged(model: nn.Module, fresh: Fresh, unused: list[str], example: Tensor) -> Fresh:
    """Attributes that say, or hold, that something was computed in an earlier pass from parameters now unused.

    Turned round or emptied, more parameters take part in a pass, and the output is the same.
    """
    found: Fresh = {}
    output, uses, ran = _observed(model, fresh, example)
    waiting = [name for name in unused if not uses[name]]
    holders = {_innermost(name.rpartition(".")[0], ran) for name in waiting}
    for name in sorted(holder for holder in holders if holder is not None):
        for attribute, value in _own_state(model.get_submodule(name)).items():
            for other in _turned(value):
                tried = fresh | found | {(name, attribute): other}
                with suppress(Exception):
                    again, more, _ = _observed(model, tried, example)
                    same = [torch.allclose(a, b, rtol=1e-4, atol=1e-5) for a, b in zip(again, output, strict=True)]
                    if sum(not more[key] for key in waiting) < sum(not uses[key] for key in waiting) and all(same):
                        found[name, attribute], uses = other, more
                        break
    return found


def _observed(model: nn.Module, fresh: Fresh, example: Tensor) -> tuple[list[Tensor], Counter[str], set[str]]:
    """Output, uses of parameters and names of the modules that run, of a copy in this state."""
    trial = copied(model)
    refresh(trial, fresh)
    ran: set[str] = set()
    for name, module in trial.named_modules():
        module.register_forward_pre_hook(lambda module, inputs, name=name: ran.add(name))
    with evaluating(trial), torch.no_grad(), Watch() as watch:
        output = trial(example.clone())
    return [value for value in leaves(output) if isinstance(value, Tensor)], counts(trial, watch), ran


def _innermost(name: str, ran: set[str]) -> str | None:
    """The module of this name or the nearest one around it that runs."""
    while name and name not in ran:
        name = name.rpartition(".")[0]
    return name if name in ran else None


def _own_state(module: nn.Module) -> dict[str, object]:
    """The attributes that a module has besides those of every module."""
    return {key: value for key, value in vars(module).items() if key not in vars(nn.Module())}


def _turned(value: object) -> list[object]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, (dict, list)):
        return [type(value)()] if value else []
    return [None, _GONE] if isinstance(value, float) or hasattr(value, "__array__") else []


# ---------------------------------------------------------------- what cannot be emptied


def _refuse_unknown(model: nn.Module, uses: Counter[str], constants: list[Place]) -> None:
    """Raise where a module uses a tensor of unknown origin and not one of its own parameters."""
    for place in constants:
        own = model.get_submodule(place.module).named_parameters(prefix=place.module, recurse=False)
        for name, _ in own:
            if not uses[name]:
                raise ValueError(
                    f"the parameter {name!r} takes no part in a pass, but the tensor at {place.path}, which is not "
                    "registered, does: if an earlier pass computed it, it would stay as trained. Empty it, or register "
                    "it with register_buffer if it is a constant."
                )


def _refuse_shared(model: nn.Module, places: list[Place], example: Tensor) -> None:
    """Raise where something that copies share, like what a hook closes over, is filled again by a pass."""
    for place in places:
        if isinstance(place.owner, nn.Module):
            continue
        with _emptied(place) as empty:
            if empty is not None and _runs(model, example) and not empty():
                raise ValueError(
                    f"this model keeps what a pass computes at {place.path}, which all copies of it share: with other "
                    "weights it would go on with the trained ones. Keep it as an attribute of a module instead."
                )


@contextmanager
def _emptied(place: Place) -> Iterator[Callable[[], bool] | None]:
    """The place without its tensor inside the block, and whether it is still so; None where it cannot be."""
    owner, key = place.owner, cast(Any, place.key)
    if isinstance(key, CellType):
        value = key.cell_contents
        key.cell_contents = None
        try:
            yield lambda: key.cell_contents is None
        finally:
            key.cell_contents = value
        return
    held = cast(Any, owner if isinstance(owner, (dict, list)) else getattr(owner, "__dict__", None))
    if not isinstance(held, (dict, list)):
        yield None
        return
    saved = held.copy()
    if isinstance(held, dict):
        del held[key]
    else:
        held[key] = None
    try:
        yield lambda: (held.get(key) if isinstance(held, dict) else held[key]) is None
    finally:
        held.clear()
        held.update(saved) if isinstance(held, dict) else held.extend(saved)


def _left_by_a_pass(
    model: nn.Module, private: nn.Module, fresh: Fresh, first: Counter[str], known: set[str], example: Tensor
) -> Fresh:
    """What a pass, whose uses are the `first`, has left in the modules and a second one reads.

    Besides tensors in places that are not `known`, this is what makes it use parameters less often.

    Raises
    ------
    ValueError
        It is left somewhere else.
    """
    filled = [(place, tensor) for place, tensor in plain_places(private) if place.path not in known]
    with evaluating(private), torch.no_grad(), Watch() as watch:
        private(example.clone())
    read = [(place, tensor) for place, tensor in filled if watch.used[id(tensor)]]
    if not read and not first - counts(private, watch):
        return {}
    before = copied(model)
    refresh(before, fresh)
    left = fresh | _differences(before, private)
    refresh(private, left)
    still = {id(tensor) for _, tensor in plain_places(private)}
    places = [place.path for place, tensor in read if id(tensor) in still]
    if lost := places or sorted(first - uses(private, example)):
        raise ValueError(
            f"a pass of this model keeps what it computes{' at' if places else ' from'} {', '.join(map(repr, lost))} "
            "where it cannot be emptied, like functools.lru_cache, a global or what a hook closes over: with other "
            "weights it would go on with the trained ones. Keep it as an attribute of a module instead."
        )
    return left


def _differences(before: nn.Module, after: nn.Module) -> Fresh:
    """The attributes and buffers of `after` that are others in `before`, as they are there."""
    found: Fresh = {}
    for name, module in after.named_modules():
        old = before.get_submodule(name)
        then = _own_state(old) | dict(old._buffers)
        for key, value in (_own_state(module) | dict(module._buffers)).items():
            if key not in then or _outline(then[key]) != _outline(value):
                found[name, key] = deepcopy(then[key]) if key in then else _GONE
    return found


def _outline(value, depth: int = 6) -> object:
    """What a value is made of, the numbers in its tensors left out."""
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if depth == 0 or isinstance(value, nn.Module):
        return type(value)
    if isinstance(value, Tensor) or hasattr(value, "__array__"):
        return type(value), tuple(value.shape), value.dtype
    if isinstance(value, dict):
        return [(str(key), _outline(item, depth - 1)) for key, item in value.items()]
    if isinstance(value, (list, tuple)):
        return [_outline(item, depth - 1) for item in value]
    return type(value), _outline(attributes(value), depth - 1)
