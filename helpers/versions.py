"""The versions of a model that a scheme makes, one after the other in one working copy."""

from collections import OrderedDict, defaultdict
from collections.abc import Collection, Iterator, Sequence
from itertools import chain
from operator import is_
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .model_state import all_tensors
from .private import Fresh, refresh
from .randomization import Redraws
from .recipes import assembled

MAPPINGS = (dict, OrderedDict, defaultdict)


class Working:
    """A model whose tensors stay the same objects, whoever holds them, while their values are exchanged.

    A container, a layer's list of its weights or a function's argument may hold a parameter: all see the new values.
    """

    def __init__(self, model: nn.Module, fresh: Fresh):
        self.model = model
        self.fresh = {at: value for at, value in fresh.items() if at[1] not in model.get_submodule(at[0])._buffers}
        self.tensors = all_tensors(model)
        self.parameters = len(list(model.parameters()))  # the first of the tensors
        self.held: Sequence[Tensor] = [tensor.detach() for tensor in self.tensors]
        self.kept = [(container, _parts(container), container.copy()) for container in _containers(model)]

    @torch.inference_mode(False)
    @torch.no_grad()
    def hold(self, values: Sequence[Tensor]) -> nn.Module:
        """The model with these values in the order of `all_tensors`, as if no pass had ever been run in it.

        What passes left in modules, lists and dictionaries is put back; modes and `requires_grad` stay as they are.
        """
        for container, parts, as_it_was in self.kept:
            now = _parts(container)
            if len(now) != len(parts) or not all(map(is_, now, parts)):
                _restore(container, as_it_was)
        refresh(self.model, self.fresh)
        for tensor, old, new in zip(self.tensors, self.held, values, strict=True):
            tensor.grad = None
            if old is not new:
                tensor.data = new
        self.held = values
        return self.model


def _parts(container) -> list:
    return list(chain.from_iterable(container.items())) if isinstance(container, dict) else list(container)


def _restore(container, as_it_was) -> None:
    mode = container.get("training") if isinstance(container, dict) else None
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(as_it_was)
    if isinstance(mode, bool):
        container["training"] = mode


def _containers(model: nn.Module) -> Iterator[Any]:
    """The attributes of all modules, and the dictionaries, lists and sets that they lead to."""
    waiting: list = [vars(module) for module in model.modules()]
    seen: set[int] = set()
    while waiting:
        value = waiting.pop()
        if isinstance(value, nn.Module):
            value = vars(value)
        if type(value) not in (*MAPPINGS, list, set, tuple) or id(value) in seen:
            continue
        seen.add(id(value))
        waiting += value.values() if isinstance(value, dict) else value
        if not isinstance(value, tuple):
            yield value


class Version(NamedTuple):
    """The values of all tensors, and the identities of the tensors of the trained model that are others."""

    values: list[Tensor]
    changed: frozenset[int]


class Versions:
    """The trained model, number 0, and the randomised versions 1, 2, ... of a seed, drawn when they are asked for.

    `at(number)` is good until the next call: the randomised versions take turns in one working copy.
    """

    @torch.inference_mode(False)
    def __init__(self, draws: Redraws):
        self.draws = draws
        refresh(draws.private, draws.fresh)  # a pass may have filled a buffer since
        self.names = ["", *(stage.name for stage, _ in draws.steps)]
        self.own = Working(draws.private, draws.fresh)
        self.working = Working(assembled(draws.private, {}, draws.fresh), draws.fresh)
        count = self.own.parameters
        tensors = [tensor.detach() for tensor in self.own.tensors]
        self.trained = [*tensors[:count], *(buffer.clone() for buffer in tensors[count:])]

    def begin(self, seed: int) -> None:
        """Start again with the draws of this seed: those for a GPU are made when they are asked for, while it works."""
        self.draws.begin(seed)
        self.drawn = [Version(self._values({}), frozenset())]
        self.coming = self.draws.new_tensors(lambda new: self.working.hold(self._values(new)))
        self.own.hold(self.drawn[0].values)
        if self.draws.twin is self.draws.private:
            self.draw(len(self) - 1)

    def __len__(self) -> int:
        return len(self.names)

    @torch.inference_mode(False)
    def _values(self, new: dict[int, Tensor]) -> list[Tensor]:
        """Parameters are shared where they are equal; buffers, into which a pass may write, are each version's own."""
        values = [new.get(id(tensor), trained) for tensor, trained in zip(self.own.tensors, self.trained)]
        count = self.own.parameters
        return [*values[:count], *(buffer.clone() for buffer in values[count:])]

    def draw(self, number: int) -> None:
        """Have the versions up to this one ready, as far as there are any: drawn on the CPU, while a GPU works."""
        while len(self.drawn) <= min(number, len(self) - 1):
            _, new = next(self.coming)
            self.drawn.append(Version(self._values(new), frozenset(new)))

    def at(self, number: int) -> nn.Module:
        self.draw(number)
        return (self.working if number else self.own).hold(self.drawn[number].values)

    def changed(self, number: int) -> Collection[int]:
        return self.drawn[number].changed
