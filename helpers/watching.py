"""Which tensors take part in a pass of a model, and which of them it does not hold."""

from collections import Counter
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .device import memory_of
from .inference import evaluating
from .model_state import all_tensors, leaves, only_looks, plain_places

# What makes a tensor like another one, whatever the values of that are.
_LIKE = frozenset("new_empty new_full new_ones new_tensor new_zeros empty_like full_like ones_like zeros_like".split())


class Watch(TorchFunctionMode):
    """Counts, by their identities, the calls in which the values of tensors take part."""

    def __init__(self) -> None:
        super().__init__()
        self.used: Counter[int] = Counter()
        self.alive: list[Tensor] = []  # so that no later tensor has the identity, or the memory, of one that is gone

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        made = any(isinstance(value, Tensor) for value in leaves(result))
        if (made or not only_looks(func)) and getattr(func, "__name__", "") not in _LIKE:
            given = [value for value in leaves((args, kwargs or {})) if isinstance(value, Tensor)]
            self.used.update(map(id, given))
            self.alive += given
        return result


@torch.no_grad()
def watch(model: nn.Module, example: Tensor) -> Watch:
    """What a pass of `example` in eval mode has used of the model, and which tensors it has seen."""
    given = example.clone()
    with evaluating(model), Watch() as seen:
        model(given)
    return seen


def counts(model: nn.Module, seen: Watch) -> Counter[str]:
    """How often each parameter and buffer took part, by name."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return Counter({name: seen.used[id(tensor)] for name, tensor in tensors})


def uses(model: nn.Module, example: Tensor) -> Counter[str]:
    """How often each parameter and buffer takes part in a pass, by name."""
    return counts(model, watch(model, example))


def learned(tensor: Tensor) -> bool:
    """Whether a tensor is one that training changes: a parameter, or a leaf that asks for its gradient."""
    return isinstance(tensor, nn.Parameter) or (tensor.requires_grad and tensor.is_leaf)


def held_elsewhere(model: nn.Module, example: Tensor, forget: Callable[[], object]) -> list[Tensor]:
    """What two passes read from one place in memory that no module leads to.

    A global, an attribute of a class, a default argument or an array holds it: what a pass itself makes lies somewhere
    else in the second one, as long as that of the first is alive. `forget` empties what a pass has left in the model.
    """
    first = watch(model, example)
    before = {memory_of(tensor) for tensor in first.alive}
    forget()
    second = watch(model, example)
    known = {0} | {memory_of(tensor) for tensor in (*all_tensors(model), *(held for _, held in plain_places(model)))}
    found: dict[int, Tensor] = {}
    for tensor in second.alive:
        memory = memory_of(tensor)
        if memory in before - known and (memory not in found or learned(tensor)):
            found[memory] = tensor
    return list(found.values())
