"""The stages of a model: which of its pieces are randomised together, from the output to the input."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import NamedTuple

from torch import Tensor, nn

from .checks import check_example
from .model_state import held_by_name, named_tensors, private_copy

STATISTICS = nn.modules.batchnorm._NormBase  # batch and instance norms, which may keep running statistics
NORMS = (STATISTICS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Stage(NamedTuple):
    """A stage's name, and the names of the modules (or lone parameters) that are randomised with it."""

    name: str
    members: tuple[str, ...]


class Plan(NamedTuple):
    """The stages of a model from the output to the input, and its parameters that never run in eval mode."""

    stages: list[Stage]
    unused: list[str]


# ---------------------------------------------------------------- stages


def _pieces(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Children that hold parameters or statistics, containers opened, and parameters that have no child."""
    for name, _ in model.named_parameters(recurse=False):
        yield prefix + name
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential) or type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from _pieces(child, f"{prefix}{name}.")
        elif named_tensors(child):
            yield prefix + name


def _opened(model: nn.Module) -> list[str]:
    """The pieces of the model, or of the one network that it wraps."""
    names = list(_pieces(model))
    inner = find(model, names[0]) if len(names) == 1 else None
    if isinstance(inner, nn.Module) and not named_tensors(inner, recurse=False):
        return [f"{names[0]}.{name}" for name in _opened(inner)]
    return names


def initialiser(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


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


def plan(model: nn.Module, *, stages: str | Sequence[str] | None = None, example: Tensor | None = None) -> Plan:
    """The stages of `model` from the output to the input.

    Parameters
    ----------
    stages : None takes the children that hold parameters, `nn.Sequential` opened; `"layers"` goes down to
        single layers; in both, a norm layer joins the layer before it. A list of names is taken as given.
    example : a batch of inputs to run once in eval mode; None traces the model with `torch.fx`.

    Raises
    ------
    ValueError
        Unknown or overlapping names, a weight shared by two stages, nothing to randomise, or a model that
        cannot be traced.
    """
    check_example(model, example)
    private, _, order = private_copy(model, example)
    return planned(private, order, stages)


def planned(model: nn.Module, order: list[int], stages: str | Sequence[str] | None) -> Plan:
    place = {key: index for index, key in enumerate(order)}
    if stages is None or stages == "layers":
        names = _opened(model) if stages is None else list(_layers(model))
        used = {name: [place[id(t)] for t in held_by_name(model, name).values() if id(t) in place] for name in names}
        running = sorted((name for name in names if used[name]), key=lambda name: min(used[name]))
        found = _join_norms(model, running)[::-1]
    elif isinstance(stages, str) or not all(isinstance(name, str) for name in stages):
        raise ValueError(f"stages must be None, 'layers' or a list of module names, got {stages!r}.")
    else:
        known = [name for name, _ in model.named_modules() if name and held_by_name(model, name)]
        known += [name for name in _pieces(model) if name not in known]
        for name in stages:
            if name not in known:
                raise ValueError(f"unknown stage {name!r}; known: {', '.join(known)}.")
            if list(stages).count(name) > 1:
                raise ValueError(f"stage {name!r} is named twice.")
        found = [Stage(name, (name,)) for name in stages]
    if not found:
        raise ValueError("this model runs no parameters: there is nothing to randomise.")
    _refuse_shared(model, found)
    return Plan(found, [name for name, parameter in model.named_parameters() if id(parameter) not in place])


def _join_norms(model: nn.Module, running: Iterable[str]) -> list[Stage]:
    found: list[Stage] = []
    for name in running:
        if found and isinstance(find(model, name), NORMS):
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
                        "randomised without the other. Name stages that keep them together with stages=[...]."
                    )
