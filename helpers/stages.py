"""The stages of a model: which of its pieces are randomised together, from the output to the input."""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .dataflow import Flow
from .model_state import held_by_name, named_tensors

STATISTICS = nn.modules.batchnorm._NormBase  # batch and instance norms, which may keep running statistics
NORMS = (STATISTICS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
FEW = 5  # stages: a cascade shorter than this is made longer where the model allows it


class Stage(NamedTuple):
    """A stage's name, and the names of the modules (or lone parameters) that are randomised with it."""

    name: str
    members: tuple[str, ...]


class Plan(NamedTuple):
    """What is randomised of a model, and what is not.

    stages : from the output to the input.
    unused : parameters that never run in eval mode.
    constant : buffers and other tensors that run and are never randomised (anchors, fixed position tables, masks,
        means of the data): if one of them was learned, it stays as trained.
    fallback : parameters without an initialiser of their own, which `init="reset"` draws from a normal of the
        trained width.
    kept : parameters and statistics of the stages that stay as trained: by an option, or because they are all zero
        or have their initial value already.
    batch_norm : what happens to the statistics of randomised norms: the treatment that `"auto"` chose.
    shared : parameters of a stage that a stage nearer to the output holds too, with which they are randomised.
    """

    stages: list[Stage]
    unused: list[str]
    constant: list[str] = []
    fallback: list[str] = []
    kept: list[str] = []
    batch_norm: str = "reset"
    shared: list[str] = []


# ---------------------------------------------------------------- norms


def own_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that the module itself holds."""
    return dict(module.named_parameters(recurse=False)) | dict(module.named_buffers(recurse=False))


def keeps_statistics(module: nn.Module) -> bool:
    """Whether this is a norm with a running mean and variance, be its other two values parameters or buffers."""
    if isinstance(module, STATISTICS):
        return True
    own = own_tensors(module)
    shapes = {own[name].shape for name in ("running_mean", "running_var", "weight", "bias") if name in own}
    return {"running_mean", "running_var"} <= set(own) and len(shapes) == 1


def is_norm(module: object) -> bool:
    """Whether this is a norm: by its class, its statistics, or a scale and a shift beside an epsilon."""
    if isinstance(module, NORMS):
        return True
    if not isinstance(module, nn.Module):
        return False
    own = own_tensors(module)
    scales = all(tensor.ndim == 1 for tensor in own.values()) and "weight" in own and set(own) <= {"weight", "bias"}
    return keeps_statistics(module) or (scales and any(hasattr(module, e) for e in ("eps", "variance_epsilon")))


def initialiser(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


# ---------------------------------------------------------------- pieces


def _pieces(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Children that hold parameters or statistics, containers opened, and parameters that have no child."""
    for name, _ in model.named_parameters(recurse=False):
        yield prefix + name
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential) or type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from _pieces(child, f"{prefix}{name}.")
        elif named_tensors(child):
            yield prefix + name


def _layers(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Modules with weights or statistics of their own, taken whole if they can initialise themselves."""
    for name, _ in model.named_parameters(recurse=False):
        yield prefix + name
    for name, child in model.named_children():
        inside = any(named_tensors(part) for part in child.children())
        if named_tensors(child) and (not inside or initialiser(child)):
            yield prefix + name
        else:
            yield from _layers(child, f"{prefix}{name}.")


class _Opening:
    """Opens pieces that are networks rather than blocks, so that a backbone is more than one stage.

    What runs one after the other inside a piece, so that each hands on all that the next ones know of the input, is a
    chain; what a skip bridges is none and stays whole. Opened are the one network that a model wraps, a chain of
    blocks, a chain that holds more than half of the layers that run, and the largest chain as long as there are fewer
    stages than `FEW`.
    """

    def __init__(self, model: nn.Module, running: Container[str], flow: Flow):
        self.model, self.running, self.flow = model, running, flow

    def inside(self, piece: str) -> list[str]:
        """The pieces of a piece that run; none of a layer."""
        module = find(self.model, piece)
        if not isinstance(module, nn.Module) or is_norm(module) or not any(map(named_tensors, module.children())):
            return []
        return [name for name in _pieces(module, f"{piece}.") if name in self.running]

    def size(self, piece: str) -> int:
        """How many layers with a matrix of weights run in a piece."""
        module = find(self.model, piece)
        parts = module.named_modules(prefix=piece) if isinstance(module, nn.Module) else ()
        return sum(self._has_weights(part) and name in self.running for name, part in parts)

    def _has_weights(self, part: nn.Module) -> bool:
        return any(parameter.ndim > 1 for parameter in part.parameters(recurse=False))

    def links(self, piece: str) -> list[str]:
        """What runs one after the other in a piece, norms not counted."""
        parts = [p for p in self.inside(piece) if isinstance(find(self.model, p), nn.Module) and self.size(p)]
        return [part for part in parts if self.flow.passes_all(piece, part)] if len(parts) > 1 else []

    def apart(self, piece: str) -> bool:
        """Whether no two pieces of a piece share a tensor."""
        held = [{id(t) for t in held_by_name(self.model, part).values()} for part in self.inside(piece)]
        return sum(map(len, held)) == len(set().union(*held))

    def opened(self) -> list[str]:
        names = [name for name in _pieces(self.model) if name in self.running]
        while (piece := self._next(names)) is not None:
            at = names.index(piece)
            names[at : at + 1] = self.inside(piece)
        return names

    def _next(self, names: list[str]) -> str | None:
        if len(names) == 1 and self.inside(names[0]) and not own_tensors(self.model.get_submodule(names[0])):
            return names[0]
        total = sum(map(self.size, names))
        modules = [name for name in names if len(self.inside(name)) > 1]
        for name in sorted(modules, key=self.size, reverse=True):
            large = 2 * self.size(name) > total or self._stages(names) < FEW
            blocks = [part for part in self.inside(name) if self.size(part) > 1]
            if (large or len(blocks) > 1) and self.apart(name) and len(links := self.links(name)) > 1:
                if large or sum(self.size(link) > 1 for link in links) > 1:
                    return name
        return None

    def _stages(self, names: list[str]) -> int:
        return sum(bool(self.size(name)) for name in names)


def planned(
    model: nn.Module, order: list[int], flow: Flow, stages: str | Sequence[str] | None, constant: Iterable[str] = ()
) -> Plan:
    """The plan of a model whose tensors run in this `order`; errors as in `randomization.plan`."""
    place = {key: index for index, key in enumerate(order)}
    first: dict[str, int] = {}  # when a tensor or a module, by name, first takes part
    for name, tensor in named_tensors(model).items():
        while id(tensor) in place and name:
            first[name] = min(place[id(tensor)], first.get(name, place[id(tensor)]))
            name = name.rpartition(".")[0]
    shared: list[str] = []
    if stages is None or stages == "layers":
        names = _Opening(model, first, flow).opened() if stages is None else [n for n in _layers(model) if n in first]
        found, shared = _apart(model, _join_norms(model, _in_order(model, names, place, first))[::-1])
    elif isinstance(stages, str) or not all(isinstance(name, str) for name in stages):
        raise ValueError(f"stages must be None, 'layers' or a list of module names, got {stages!r}.")
    else:
        known = [name for name, _ in model.named_modules() if name and held_by_name(model, name)]
        known += [name for name, _ in model.named_parameters(recurse=False)]
        lone = [name for name, _ in model.named_parameters(remove_duplicate=False)]
        for name in stages:
            if name not in known and name not in lone:
                raise ValueError(f"unknown stage {name!r}; known: {', '.join(known)}.")
            if list(stages).count(name) > 1:
                raise ValueError(f"stage {name!r} is named twice.")
        found = [Stage(name, (name,)) for name in stages]
        _refuse_shared(model, found)
    if not found:
        raise ValueError("this model runs no parameters: there is nothing to randomise.")
    unused = [name for name, parameter in model.named_parameters() if id(parameter) not in place]
    return Plan(found, unused, [*_constants(model, place), *constant], shared=shared)


def _constants(model: nn.Module, place: dict[int, int]) -> list[str]:
    """Buffers that run, can be learned and are no norm's: all but indices."""
    return [
        f"{name}.{key}".lstrip(".")
        for name, module in model.named_modules()
        for key, buffer in module.named_buffers(recurse=False)
        if id(buffer) in place and buffer.dtype not in (torch.int32, torch.int64) and not is_norm(module)
    ]


def running_tensors(model: nn.Module, stage: Stage, order: Iterable[int]) -> dict[str, Tensor]:
    """Parameters and norms' statistics of a stage that take part in a pass, by full name."""
    known = set(order)
    found: dict[str, Tensor] = {}
    for member in stage.members:
        piece = find(model, member)
        if not isinstance(piece, nn.Module):
            found |= {member: piece} if id(piece) in known else {}
            continue
        for name, module in piece.named_modules(prefix=member):
            own = own_tensors(module) if is_norm(module) else dict(module.named_parameters(recurse=False))
            own.pop("num_batches_tracked", None)  # a count, which weighs nothing in eval mode
            found |= {f"{name}.{key}": tensor for key, tensor in own.items() if id(tensor) in known}
    return found


def _in_order(model: nn.Module, names: list[str], place: dict[int, int], first: dict[str, int]) -> list[str]:
    """The pieces as they run: by what is theirs alone or, where they share all, by the first call of each."""
    held = {name: {id(tensor) for tensor in held_by_name(model, name).values()} for name in names}
    pieces_with = Counter(key for keys in held.values() for key in keys)

    def when(name: str) -> int:
        own = [place[key] for key in held[name] if key in place and pieces_with[key] == 1]
        return min(own) if own else place.get(id(find(model, name)), first[name])

    return sorted(names, key=when)


def _apart(model: nn.Module, stages: list[Stage]) -> tuple[list[Stage], list[str]]:
    """The stages, each without what one before it holds; and the names of that."""
    found: list[Stage] = []
    shared: list[str] = []
    taken: set[int] = set()
    for stage in stages:
        held = {name: tensor for member in stage.members for name, tensor in held_by_name(model, member).items()}
        if others := [name for name, tensor in held.items() if id(tensor) in taken]:
            shared += others
            stage = Stage(stage.name, tuple(part for name in stage.members for part in _without(model, name, taken)))
        found += [stage] if stage.members else []
        taken |= {id(tensor) for tensor in held.values()}
    return found, shared


def _without(model: nn.Module, member: str, taken: set[int]) -> list[str]:
    """The parts of a member, which hold nothing that is taken: itself if it does not."""
    held, piece = held_by_name(model, member), find(model, member)
    if taken.isdisjoint(map(id, held.values())):
        return [member] if held else []
    if not isinstance(piece, nn.Module):
        return []
    parts = [*piece.named_parameters(recurse=False), *piece.named_children()]
    return [name for key, _ in parts for name in _without(model, f"{member}.{key}", taken)]


def _join_norms(model: nn.Module, running: Iterable[str]) -> list[Stage]:
    found: list[Stage] = []
    for name in running:
        if found and is_norm(find(model, name)):
            found[-1] = Stage(found[-1].name, (*found[-1].members, name))
        else:
            found.append(Stage(name, (name,)))
    return found


def find(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
    parent, _, last = name.rpartition(".")
    return getattr(model.get_submodule(parent), last)


def _refuse_shared(model: nn.Module, stages: list[Stage]) -> None:
    owner: dict[int, str] = {}
    for stage in stages:
        for member in stage.members:
            for name, tensor in held_by_name(model, member).items():
                other = owner.setdefault(id(tensor), stage.name)
                if other != stage.name:
                    raise ValueError(
                        f"stages {other!r} and {stage.name!r} share the weight {name!r}: one cannot be "
                        "randomised without the other. Name one of them, or a module that holds both; without "
                        "stages=[...] such a weight goes with the first stage that holds it."
                    )
