"""Forward passes that start where the weights changed, for comparing many versions of one model."""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .model_state import all_tensors, leaves, only_looks, plain_places
from .saliency.passes import OnePass, told
from .stages import STATISTICS

NUMBERS_AND_NAMES = (bool, int, float, complex, str, type(None), type(...))
KINDS = (torch.dtype, torch.device, torch.layout, torch.memory_format)
UNKNOWABLE = frozenset(("__set__", "set_", "resize_", "register_hook", "register_post_accumulate_grad_hook"))


class _Mismatch(Exception):
    """The pass is not the recorded one up to its first changed tensor."""


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _tensors_in(value) -> list[Tensor]:
    return [item for item in leaves(value) if isinstance(item, Tensor)]


def _random_state(device: torch.device) -> bytes:
    states = [torch.get_rng_state(), *([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])]
    return b"".join(state.numpy().tobytes() for state in states)


def _handed(output):
    """A recorded result for another pass, which may change the list that it gets."""
    if type(output) is list:
        return [_handed(item) for item in output]
    return {key: _handed(item) for key, item in output.items()} if type(output) is dict else output


@dataclass
class Call:
    """A call of a torch function: what it was given and returned, and which later call last wrote into that."""

    function: Callable
    given: list[int | None]
    output: object
    written_by: int
    storages: set[int] = field(default_factory=set)
    versions: list[int] = field(default_factory=list)

    def rewritten(self) -> bool:
        """Whether somebody wrote into the output after the recorded pass."""
        return [tensor._version for tensor in _tensors_in(self.output)] != self.versions


class Tape:
    """The pass of one model, from which its randomised copies take what they leave unchanged.

    The first pass, of `model` itself, records every call of a torch function and what it returned, with its graph.
    In a later one a copy is handed the recorded results up to the first call in which a changed tensor takes part,
    and computes the rest: one graph, whichever way it leads round. A pass of which anything is not a call
    seen here (a scripted part, an autograd function of the model's own, a backward hook), that writes into the model's
    tensors or draws random numbers, cannot be replayed, and all passes run from the start.

    Parameters
    ----------
    model, images, step : what is explained, at which images (those of one pass), and the method's step.
    falling : no copy is changed above the one before; what is out of reach is then let go.
    """

    def __init__(self, model: nn.Module, images: Tensor, step: OnePass, *, falling: bool = False):
        self.model, self.images, self.step, self.falling = model, images, step, falling
        self.leaf = images.detach().clone().requires_grad_()
        self.tensors = all_tensors(model)
        self.unused = {
            id(module.num_batches_tracked)
            for module in model.modules()
            if isinstance(module, STATISTICS) and module.num_batches_tracked is not None
        }  # counted in train mode only
        self.calls: list[Call] = []
        self.first_use: dict[int, int] = {}
        self.safe = images.device.type in ("cpu", "cuda")  # whose random state can be watched
        self.copy: nn.Module | None = None
        self.names_in_copy: dict[int, int] = {}
        self.copied: list[Tensor] = []

    def maps(self, model: nn.Module, changed: Collection[int], targets: Tensor) -> Tensor:
        """The maps of `model`, inside `explaining(model)`: of the tape's own one first, then of copies of it.

        `changed` holds the identities, in the tape's model, of the tensors whose values are others in the copy. All
        `targets` but the first are known to be classes of the model.
        """
        known = model is not self.model
        if self.safe and (self.calls or model is self.model):
            try:
                run = _Replay(self, model, changed) if self.calls else _Recording(self)
                found = self.step.maps(run, self.images, targets, leaf=self.leaf, known=known)
            except Exception:  # the plain pass works, or says better what is wrong
                self.safe = False
            if not self.safe:
                self.calls.clear()
            else:
                return found
        plain = partial(self.step.maps, model, self.images, targets, known=known)
        return told(plain, getattr(self.step.method, "__name__", "the method"))

    def names(self, copy: nn.Module) -> dict[int, int]:
        """Which tensor of the tape's model each tensor of a copy stands for, by their identities.

        Looked up once for a copy whose tensors stay the same objects while their values are exchanged.
        """
        if copy is not self.copy:
            self.copy, self.copied = copy, all_tensors(copy)  # held, so that no other tensor gets their identities
            pairs = zip(self.copied, self.tensors, strict=True)
            self.names_in_copy = {id(copied): id(own) for copied, own in pairs}
        return self.names_in_copy

    def cut(self, changed: Collection[int]) -> int:
        """The first call that runs: none before it uses or is written into by what is changed."""
        used = [self.first_use.get(tensor, 0) for tensor in changed if tensor not in self.unused]
        cut = min(used, default=len(self.calls))
        while late := [place for place, call in enumerate(self.calls[:cut]) if call.written_by >= cut]:
            cut = late[0]
        return cut


class _Recording(TorchFunctionMode):
    """A plain pass of the tape's model that notes on the tape what it sees."""

    def __init__(self, tape: Tape):
        super().__init__()
        self.tape = tape
        self.own = {id(tensor) for tensor in tape.tensors}
        constants = [*tape.tensors, *(tensor for _, tensor in plain_places(tape.model))]
        self.constants = {id(tensor) for tensor in constants}
        self.constant_storages = {_storage(tensor) for tensor in constants}
        # Tensors of this pass, the node that made them and their version, as the last call left them.
        self.known: dict[int, tuple] = {}
        self._know(tape.leaf)

    def __call__(self, leaf: Tensor) -> Tensor:
        tape = self.tape
        with self:
            output = tape.model(leaf.clone())
        same = [id(tensor) for tensor in all_tensors(tape.model)] == [id(tensor) for tensor in tape.tensors]
        tape.safe = tape.safe and same and isinstance(output, Tensor) and self._made_here(output)
        for call in tape.calls:
            call.versions = [tensor._version for tensor in _tensors_in(call.output)]
        self.known.clear()
        return output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, tape = kwargs or {}, self.tape
        if not tape.safe:
            return func(*args, **kwargs)
        given, place = _tensors_in((args, kwargs)), len(tape.calls)
        seen = all(id(tensor) in self.constants or self._made_here(tensor) for tensor in given)
        versions, drawn = [tensor._version for tensor in given], _random_state(tape.images.device)
        output = func(*args, **kwargs)
        knowable = getattr(func, "__name__", "") not in UNKNOWABLE and drawn == _random_state(tape.images.device)
        tape.safe = seen and knowable and _can_be_kept((args, kwargs, output))
        if tape.safe:
            written = {_storage(t) for t, before in zip(given, versions) if t._version != before}
            if written:
                tape.safe = not written & self.constant_storages
                self._rewrite(written, place)
            made = _tensors_in(output)
            if made or not only_looks(func):
                for tensor in given:
                    if id(tensor) in self.own:
                        tape.first_use.setdefault(id(tensor), place)
            names = [id(t) if id(t) in self.known or id(t) in self.own else None for t in given]
            tape.calls.append(Call(func, names, output, place, {_storage(t) for t in made}))
            for tensor in (*made, *given):
                if id(tensor) not in self.constants:
                    self._know(tensor)
        return output

    def _know(self, tensor: Tensor) -> None:
        self.known[id(tensor)] = tensor, tensor.grad_fn, tensor._version

    def _made_here(self, tensor: Tensor) -> bool:
        """Whether calls that were seen made the tensor what it is."""
        _, node, version = self.known.get(id(tensor), (None, None, -1))
        return node is tensor.grad_fn and version == tensor._version

    def _rewrite(self, written: set[int], place: int) -> None:
        for call in self.tape.calls:
            if call.storages & written:
                call.written_by = place
                for tensor in _tensors_in(call.output):
                    if id(tensor) in self.known:
                        self._know(tensor)


def _can_be_kept(values) -> bool:
    return all(isinstance(item, (Tensor, *NUMBERS_AND_NAMES, *KINDS)) for item in leaves(values))


class _Replay(TorchFunctionMode):
    """A pass of a copy: handed what was recorded before the cut, run from there."""

    def __init__(self, tape: Tape, model: nn.Module, changed: Collection[int]):
        super().__init__()
        self.tape, self.model, self.place = tape, model, 0
        self.cut = tape.cut(changed)
        for call in tape.calls[self.cut :] if tape.falling else []:
            call.output = None
        self.kept = tape.calls[: self.cut]
        self.storages = set[int]().union(*(call.storages for call in self.kept))
        self.names = {id(tensor): id(tensor) for call in self.kept for tensor in _tensors_in(call.output)}
        self.names[id(tape.leaf)] = id(tape.leaf)
        self.names |= tape.names(model)

    def __call__(self, leaf: Tensor) -> Tensor:
        with self:
            output = self.model(leaf.clone())
        if self.place < self.cut or any(call.rewritten() for call in self.kept):
            self._fail()
        return output

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs, place = kwargs or {}, self.place
        self.place += 1
        given = _tensors_in((args, kwargs))
        if place < self.cut:
            call = self.kept[place]
            if call.function != func or call.given != [self.names.get(id(tensor)) for tensor in given]:
                self._fail()
            if not given and not call.storages:
                return func(*args, **kwargs)  # switches something, gradients for example
            return _handed(call.output)
        versions = [tensor._version for tensor in given]
        output = func(*args, **kwargs)
        if any(t._version != before and _storage(t) in self.storages for t, before in zip(given, versions)):
            self._fail()
        return output

    def _fail(self) -> None:
        self.tape.safe = False
        raise _Mismatch
