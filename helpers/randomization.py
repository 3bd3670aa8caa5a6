"""Randomised copies of a model, stage by stage: the model-parameter tests of Adebayo et al. (2018).

A *stage* is a piece of the model that is randomised at once; stages are listed from the output to the input.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from inspect import signature
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .device import generator, local_seed
from .inference import evaluating
from .model_state import Fresh, Uses, all_tensors, held_by_name, private_copy, refresh
from .model_state import named_tensors as _named

__all__ = ["SCHEMES", "Plan", "Stage", "Uses", "cascading", "independent", "plan"]

STATISTICS = nn.modules.batchnorm._NormBase  # batch and instance norms, which may keep running statistics
NORMS = (STATISTICS, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)
CHOICES = {
    "init": ("reset", "truncated_normal", "uniform", "permute"),
    "bias": ("init", "zero", "keep"),
    "affine": ("reset", "init", "keep"),
    "batch_norm": ("reset", "keep", "recalibrate"),
    "order": ("top_down", "bottom_up"),
}


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
        elif _named(child):
            yield prefix + name


def _opened(model: nn.Module) -> list[str]:
    """The pieces of the model, or of the one network that it wraps."""
    names = list(_pieces(model))
    inner = _find(model, names[0]) if len(names) == 1 else None
    if isinstance(inner, nn.Module) and not _named(inner, recurse=False):
        return [f"{names[0]}.{name}" for name in _opened(inner)]
    return names


def _initialiser(module: nn.Module) -> Callable[[], None] | None:
    return getattr(module, "reset_parameters", None) or getattr(module, "_reset_parameters", None)


def _layers(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Modules with weights or statistics of their own, taken whole if they can initialise themselves."""
    for name, _ in model.named_parameters(recurse=False):
        yield prefix + name
    for name, child in model.named_children():
        inside = any(_named(part) for part in child.children())
        if _named(child) and (not inside or _initialiser(child)):
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
    private, _, order = private_copy(model, example)
    return _planned(private, order, stages)


def _planned(model: nn.Module, order: list[int], stages: str | Sequence[str] | None) -> Plan:
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
        if found and isinstance(_find(model, name), NORMS):
            found[-1] = Stage(found[-1].name, (*found[-1].members, name))
        else:
            found.append(Stage(name, (name,)))
    return found


def _find(model: nn.Module, name: str) -> nn.Module | nn.Parameter:
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


# ---------------------------------------------------------------- new weights


@dataclass(frozen=True)
class _Recipe:
    init: str
    std: float | str
    bias: str
    affine: str
    batch_norm: str
    calibration: Tensor | None

    def draw(self, trained: Tensor) -> Tensor:
        """New values for a tensor, by `init`, from torch's global CPU generator."""
        if self.init == "permute":
            return trained.flatten()[torch.randperm(trained.numel())].reshape(trained.shape)
        std = float(trained.float().std(correction=0) if self.std == "trained" else self.std)
        new = torch.empty(trained.shape)
        if self.init == "uniform":
            return nn.init.uniform_(new, -std * 3**0.5, std * 3**0.5)
        return nn.init.trunc_normal_(new, 0.0, std, -2 * std, 2 * std) if std else new.zero_()

    def lone(self, name: str, trained: Tensor) -> Tensor:
        """New values for a parameter that belongs to no layer."""
        settled = "bias" in name and self.bias != "init"
        if self.init == "reset" and not settled:
            raise ValueError(
                f"the parameter {name!r} belongs to no layer and has no initialiser; choose "
                "init='truncated_normal', 'uniform' or 'permute', or stages=[...] without it."
            )
        new = trained.clone() if settled else self.draw(trained)
        self.settle_bias(name, new, trained)
        return new

    def redraw(self, holder: nn.Module, name: str) -> None:
        """Randomise, in place, the parameters that the module `holder` itself holds."""
        affine = self.affine if isinstance(holder, NORMS) else "init"
        if affine == "init" and self.init == "reset":
            _reset(holder, name)
        elif affine != "keep":
            for own, parameter in holder.named_parameters(recurse=False):
                if affine == "init":
                    parameter.copy_(self.draw(parameter))
                else:
                    parameter.fill_(0.0 if "bias" in own else 1.0)
        if self.batch_norm != "keep" and isinstance(holder, STATISTICS):
            holder.reset_running_stats()

    def settle_bias(self, name: str, new: Tensor, trained: Tensor) -> None:
        """Biases that do not follow `init` become zero or stay as trained."""
        if "bias" in name and self.bias != "init":
            new.copy_(trained if self.bias == "keep" else torch.zeros_like(trained))


def _reset(holder: nn.Module, name: str) -> None:
    """The layer's own initialiser; an error where there is none or where it does not reach the weights."""
    reset, kind = _initialiser(holder), type(holder).__name__
    before = {key: parameter.clone() for key, parameter in holder.named_parameters(recurse=False)}
    if not before:
        return
    if reset is None:
        raise ValueError(
            f"{name!r} ({kind}) has no reset_parameters(), so its own initialiser is unknown; "
            "choose init='truncated_normal', 'uniform' or 'permute', or stages=[...] without it."
        )
    reset()
    for key, parameter in holder.named_parameters(recurse=False):
        old = before[key]
        if torch.equal(old, parameter) and old.numel() > 1 and old.amin() != old.amax():
            raise ValueError(
                f"reset_parameters() of {name!r} ({kind}) leaves its parameter {key!r} as it was; "
                "choose init='truncated_normal', 'uniform' or 'permute'."
            )


@torch.inference_mode(False)
@torch.no_grad()
def _randomised(model: nn.Module, stage: Stage, seed: int, recipe: _Recipe) -> dict[int, Tensor]:
    """The new tensors of a stage, by the identity of the tensors of `model` that they replace."""
    drawn: list[tuple[Tensor, Tensor]] = []
    with local_seed(seed):
        for member in stage.members:
            old = _find(model, member)
            if isinstance(old, nn.Parameter):
                drawn.append((old, recipe.lone(member, old.cpu())))
                continue
            # In the order of their indices: some versions of torch fill a tensor in the order of its memory.
            fresh = deepcopy(old).cpu().to(memory_format=torch.contiguous_format)
            for name, holder in reversed(list(fresh.named_modules(prefix=member))):
                recipe.redraw(holder, name)  # a parent's initialiser has the last word
            norms = [name for name, holder in fresh.named_modules() if isinstance(holder, NORMS)]
            for (name, parameter), trained in zip(fresh.named_parameters(), old.parameters(), strict=True):
                if name.rpartition(".")[0] not in norms:
                    recipe.settle_bias(name, parameter, trained)
            drawn += zip(all_tensors(old), all_tensors(fresh), strict=True)
    return {id(old): torch.empty_like(old, requires_grad=False).copy_(new) for old, new in drawn}


@torch.inference_mode(False)
def _assemble(model: nn.Module, new: dict[int, Tensor], fresh: Fresh, *, own: bool = False) -> nn.Module:
    """A copy of `model` with the tensors `new` in place, or copies of them where they shall be its `own`.

    All other parameters share their storage; buffers never do. What is in `fresh` starts as it says there.
    """
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        values = new.get(id(parameter), parameter).detach()
        values = values.clone() if own and id(parameter) in new else values
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = new.get(id(buffer), buffer).clone()
    copied = deepcopy(model, memo)
    refresh(copied, fresh)
    return copied


@torch.inference_mode(False)
@torch.no_grad()
def _recalibrate(model: nn.Module, members: Iterable[str], images: Tensor) -> None:
    """Batch-norm statistics of the randomised stages, measured on `images`."""
    pieces = [found for name in members if isinstance(found := _find(model, name), nn.Module)]
    norms = [norm for piece in pieces for norm in piece.modules() if isinstance(norm, STATISTICS)]
    momenta = [norm.momentum for norm in norms]
    with evaluating(model):
        for norm in norms:
            norm.reset_running_stats()
            norm.training, norm.momentum = True, None  # None averages over all passes, of about one size
        for part in images.tensor_split(-(-len(images) // 64)):
            model(part.clone())
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


# ---------------------------------------------------------------- the two schemes


class Step(NamedTuple):
    """A randomised copy, and the identities of the tensors of the private model that are others in it."""

    name: str
    model: nn.Module
    changed: frozenset[int]


class Redraws:
    """The steps of a scheme on a private copy of the model, `private`, drawn one after the other."""

    def __init__(
        self,
        model: nn.Module,
        *,
        scheme: str,
        seed: int,
        stages: str | Sequence[str] | None = None,
        init: str = "reset",
        std: float | str = 0.01,
        bias: str = "init",
        affine: str = "reset",
        batch_norm: str = "reset",
        calibration: Tensor | None = None,
        example: Tensor | None = None,
        order: str = "top_down",
    ):
        self.recipe = _Recipe(init, std, bias, affine, batch_norm, calibration)
        self.cumulative, self.order = scheme == "cascading", order
        for option, known in CHOICES.items():
            value = order if option == "order" else getattr(self.recipe, option)
            if value not in known:
                raise ValueError(f"unknown {option} {value!r}; known: {', '.join(known)}.")
        if std != "trained" and not (isinstance(std, (int, float)) and std > 0):
            raise ValueError(f"std must be a positive number or 'trained', got {std!r}.")
        if batch_norm == "recalibrate" and calibration is None:
            raise ValueError("batch_norm='recalibrate' needs calibration=, the images to measure the statistics on.")
        if batch_norm != "recalibrate" and calibration is not None:
            raise ValueError("calibration= is used with batch_norm='recalibrate' only.")
        seeds = generator(seed)
        self.private, self.fresh, order_in_use = private_copy(model, example)
        found = _planned(self.private, order_in_use, stages).stages
        draws = torch.randint(2**62, (len(found),), generator=seeds).tolist()
        self.steps = list(zip(found, draws))[:: -1 if order == "bottom_up" else 1]

    def __len__(self) -> int:
        return len(self.steps)

    def _new_tensors(self) -> Iterator[tuple[str, dict[int, Tensor]]]:
        new: dict[int, Tensor] = {}
        members: tuple[str, ...] = ()
        for stage, draw in self.steps:
            if not self.cumulative:
                new, members = {}, ()
            new = new | _randomised(self.private, stage, draw, self.recipe)
            members += stage.members
            if self.recipe.batch_norm == "recalibrate" and self.recipe.calibration is not None:
                measured = _assemble(self.private, new, self.fresh)
                _recalibrate(measured, members, self.recipe.calibration)
                pairs = zip(self.private.buffers(), measured.buffers(), strict=True)
                new |= {id(old): buffer for old, buffer in pairs if id(old) in new}
            yield stage.name, new

    def shared_copies(self) -> Iterator[Step]:
        """Randomised copies that share all weights that are equal, with one another and with `private`."""
        for name, new in self._new_tensors():
            yield Step(name, _assemble(self.private, new, self.fresh), frozenset(new))

    def copies(self) -> Iterator[tuple[str, nn.Module]]:
        """(stage name, randomised copy), step by step; what was randomised is each copy's own."""
        for name, new in self._new_tensors():
            yield name, _assemble(self.private, new, self.fresh, own=True)


def check_options(options: Iterable[str], *, besides: Iterable[str] = ()) -> None:
    """Raise unless all are options of `cascading`; `besides` are other names that the caller takes."""
    known = [*besides, *(name for name in signature(Redraws).parameters if name not in ("model", "scheme", "seed"))]
    for name in options:
        if name not in known:
            raise ValueError(f"unknown option {name!r}; known: {', '.join(known)}.")


def cascading(model: nn.Module, *, seed: int, **options) -> Iterator[tuple[str, nn.Module]]:
    """Randomise stage after stage, each copy keeping what was randomised before; Adebayo et al. (2018).

    Parameters
    ----------
    model : any module; it is left bit for bit as it is.
    seed : one seed, one set of new weights, the same on every device and in `independent`.
    stages, example : see `plan`.
    init : `"reset"` (each layer's own initialiser), `"truncated_normal"` (cut at two standard deviations),
        `"uniform"` (of the same standard deviation) or `"permute"` (the trained weights shuffled).
    std : standard deviation of the two distributions, before the cut (which leaves .88 of it); `"trained"` takes
        that of each trained tensor.
    bias : biases follow `"init"`, become `"zero"`, or `"keep"` their values.
    affine : weight and bias of norms are `"reset"` to 1 and 0, follow `"init"`, or `"keep"` their values.
    batch_norm : statistics of randomised norm layers are `"reset"` to 0 and 1, `"keep"` their trained values
        (the released code of 2018), or are `"recalibrate"`d on the images `calibration`.
    order : `"top_down"` from the output to the input, or `"bottom_up"`.

    Returns
    -------
    Iterator of (stage name, randomised copy). A copy is safe to keep; parameters of stages that are still
    trained share their memory with a private copy of the model.

    Raises
    ------
    ValueError
        An unknown option, a model that cannot be copied or traced, a stage that cannot be randomised.
    """
    check_options(options)
    return Redraws(model, scheme="cascading", seed=seed, **options).copies()


def independent(model: nn.Module, *, seed: int, **options) -> Iterator[tuple[str, nn.Module]]:
    """Randomise one stage at a time, all others as trained; options and errors as in `cascading`."""
    check_options(options)
    return Redraws(model, scheme="independent", seed=seed, **options).copies()


SCHEMES: dict[str, Callable[..., Iterator[tuple[str, nn.Module]]]] = {
    "cascading": cascading,
    "independent": independent,
}
