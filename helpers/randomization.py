"""Randomised copies of a model, stage by stage: the model-parameter tests of Adebayo et al. (2018).

A *stage* is a piece of the model that is randomised at once; stages are listed from the output to the input.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from copy import deepcopy
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from helpers.device import batches, generator, local_seed

NORMS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm)
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


# ---------------------------------------------------------------- the order in which parameters run


class _Uses(TorchFunctionMode):
    """Notes the parameters of a model in the order in which they are first handed to a torch function."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.names = {id(parameter): name for name, parameter in model.named_parameters()}
        self.order: dict[str, None] = {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        for value in _leaves((args, kwargs or {})):
            if id(value) in self.names:
                self.order[self.names[id(value)]] = None
        return func(*args, **(kwargs or {}))


def _leaves(value) -> Iterator:
    if isinstance(value, (list, tuple)):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value


def _traced_order(model: nn.Module) -> list[str]:
    try:
        graph = torch.fx.symbolic_trace(model).graph
    except Exception as error:
        raise ValueError(
            "the order in which this model's layers run could not be traced "
            f"({type(error).__name__}); pass a batch of inputs as example=."
        ) from error
    names = [name for name, _ in model.named_parameters()]
    order: dict[str, None] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            order |= dict.fromkeys(n for n in names if n == node.target or n.startswith(f"{node.target}."))
    return list(order)


def _order_of_use(model: nn.Module, example: Tensor | None) -> list[str]:
    """Names of the parameters in the order in which they first take part in the forward pass in eval mode."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        if example is None:
            return _traced_order(model)
        with torch.no_grad(), _Uses(model) as uses:
            model(example.clone())
        return list(uses.order)
    finally:
        for module, mode in modes:
            module.training = mode


# ---------------------------------------------------------------- stages


def _pieces(model: nn.Module, prefix: str = "") -> Iterator[str]:
    """Children that hold parameters, containers opened, and parameters that belong to no child."""
    for name, _ in model.named_parameters(recurse=False):
        yield prefix + name
    for name, child in model.named_children():
        if isinstance(child, nn.Sequential) or type(child) in (nn.ModuleList, nn.ModuleDict):
            yield from _pieces(child, f"{prefix}{name}.")
        elif any(True for _ in child.parameters()):
            yield prefix + name


def _layers(model: nn.Module) -> Iterator[str]:
    """Modules that hold parameters of their own."""
    for name, module in model.named_modules():
        own = [own for own, _ in module.named_parameters(recurse=False)]
        yield from [name] if own and name else own


def _parameters(model: nn.Module, member: str) -> dict[str, Tensor]:
    """All parameters of a module, or a lone parameter, by full name."""
    return {
        name: parameter
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if name == member or name.startswith(f"{member}.")
    }


def plan(
    model: nn.Module, *, stages: str | Sequence[str] | None = None, example: Tensor | None = None
) -> Plan:
    """The stages of `model` from the output to the input.

    Parameters
    ----------
    stages : None takes the children that hold parameters, `nn.Sequential` opened; `"layers"` goes down to
        single layers; in both, a norm layer joins the layer before it. A list of module names is taken as given.
    example : a batch of inputs to run once in eval mode; None traces the model with `torch.fx`.

    Raises
    ------
    ValueError
        Unknown or overlapping names, a weight shared by two stages, nothing to randomise, or a model that
        cannot be traced.
    """
    order = _order_of_use(model, example)
    place = {name: index for index, name in enumerate(order)}
    if stages is None or stages == "layers":
        names = list(_pieces(model) if stages is None else _layers(model))
        if stages is None and len(names) == 1 and hasattr(model, names[0]):  # a wrapper around one network
            inner = getattr(model, names[0])
            if isinstance(inner, nn.Module):
                names = [f"{names[0]}.{name}" for name in _pieces(inner)]
        first = {n: min((place[p] for p in _parameters(model, n) if p in place), default=None) for n in names}
        running = sorted((n for n in names if first[n] is not None), key=first.get)
        found = _join_norms(model, running)[::-1]
    elif isinstance(stages, str) or not all(isinstance(name, str) for name in stages):
        raise ValueError(f"stages must be None, 'layers' or a list of module names, got {stages!r}.")
    else:
        known = [name for name, _ in model.named_modules() if name and _parameters(model, name)]
        known += [name for name in _pieces(model) if name not in known]
        for name in stages:
            if name not in known:
                raise ValueError(f"unknown stage {name!r}; known: {', '.join(known)}.")
        found = [Stage(name, (name,)) for name in stages]
    if not found:
        raise ValueError("this model runs no parameters: there is nothing to randomise.")
    _refuse_shared(model, found)
    unused = [name for name, _ in model.named_parameters() if name not in place]
    return Plan(found, unused)


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
            for name, parameter in _parameters(model, member).items():
                other = owner.setdefault(id(parameter), stage.name)
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
    images: Tensor | None

    def draw(self, trained: Tensor) -> Tensor:
        """New values for a tensor, by `init`, from torch's global CPU generator."""
        if self.init == "permute":
            return trained.flatten()[torch.randperm(trained.numel())].reshape(trained.shape)
        std = trained.float().std(correction=0).item() if self.std == "trained" else self.std
        new = torch.empty(trained.shape)
        if self.init == "uniform":
            return nn.init.uniform_(new, -std * 3**0.5, std * 3**0.5)
        return nn.init.trunc_normal_(new, 0.0, std, -2 * std, 2 * std) if std else new.zero_()

    def redraw(self, holder: nn.Module, name: str) -> None:
        """Randomise, in place, the parameters that the module `holder` itself holds."""
        norm = isinstance(holder, NORMS)
        if norm and self.affine == "reset":
            for own, parameter in holder.named_parameters(recurse=False):
                parameter.fill_(0.0 if "bias" in own else 1.0)
        elif norm and self.affine == "keep":
            pass
        elif self.init == "reset":
            _reset(holder, name)
        else:
            for own, parameter in holder.named_parameters(recurse=False):
                rule = self.bias if "bias" in own and not norm else "init"
                if rule == "init":
                    parameter.copy_(self.draw(parameter))
                elif rule == "zero":
                    parameter.zero_()
        if self.batch_norm != "keep" and getattr(holder, "running_mean", None) is not None:
            holder.reset_running_stats()


def _reset(holder: nn.Module, name: str) -> None:
    """The layer's own initialiser; an error where there is none or where it does not reach the weights."""
    reset = getattr(holder, "reset_parameters", None) or getattr(holder, "_reset_parameters", None)
    own = dict(holder.named_parameters(recurse=False))
    if reset is None:
        raise ValueError(
            f"{name!r} ({type(holder).__name__}) has no reset_parameters(), so its own initialiser is unknown; "
            "choose init='truncated_normal', 'uniform' or 'permute', or stages=[...] without it."
        )
    before = {key: parameter.clone() for key, parameter in own.items()}
    reset()
    for key, old in before.items():
        if torch.equal(old, own[key]) and old.numel() > 1 and old.amin() != old.amax():
            raise ValueError(
                f"reset_parameters() of {name!r} ({type(holder).__name__}) leaves its parameter {key!r} as it was; "
                "choose init='truncated_normal', 'uniform' or 'permute'."
            )


def _tensors(model: nn.Module) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


@torch.no_grad()
def _randomised(model: nn.Module, stage: Stage, seed: int, recipe: _Recipe) -> dict[int, Tensor]:
    """The new tensors of a stage, by the identity of the tensors of `model` that they replace."""
    new: dict[int, Tensor] = {}
    with local_seed(seed):
        for member in stage.members:
            old = _find(model, member)
            if isinstance(old, nn.Parameter):
                if recipe.init == "reset":
                    raise ValueError(
                        f"the parameter {member!r} belongs to no layer and has no initialiser; choose "
                        "init='truncated_normal', 'uniform' or 'permute', or stages=[...] without it."
                    )
                new[id(old)] = recipe.draw(old.cpu())
                continue
            fresh = deepcopy(old).cpu()
            inside = list(fresh.named_modules(prefix=member))
            for name, holder in reversed(inside):  # a parent's initialiser has the last word
                if any(True for _ in holder.parameters(recurse=False)) or hasattr(holder, "running_mean"):
                    recipe.redraw(holder, name)
            new |= {id(a): b.detach() for a, b in zip(_tensors(old), _tensors(fresh), strict=True)}
    return new


def _assemble(model: nn.Module, new: dict[int, Tensor]) -> nn.Module:
    """A copy of `model` with the tensors `new` in place; parameters not in it share their storage."""
    memo: dict[int, Tensor] = {}
    for parameter in model.parameters():
        values = new[id(parameter)].to(parameter, copy=True) if id(parameter) in new else parameter.detach()
        memo[id(parameter)] = nn.Parameter(values, requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = new.get(id(buffer), buffer).to(buffer, copy=True)
    return deepcopy(model, memo)


@torch.no_grad()
def _recalibrate(model: nn.Module, members: Iterable[str], images: Tensor) -> None:
    """Batch-norm statistics of the randomised stages, measured on `images`."""
    norms = [m for name in members for m in _submodules(model, name) if hasattr(m, "running_mean")]
    modes = [(module, module.training) for module in model.modules()]
    momenta = [norm.momentum for norm in norms]
    for module, _ in modes:
        module.training = False
    for norm in norms:
        norm.training, norm.momentum = True, None  # None averages over all passes
    for part in batches(len(images), 64):
        model(images[part].clone())
    for module, mode in modes:
        module.training = mode
    for norm, momentum in zip(norms, momenta):
        norm.momentum = momentum


def _submodules(model: nn.Module, name: str) -> list[nn.Module]:
    found = _find(model, name)
    return list(found.modules()) if isinstance(found, nn.Module) else []


# ---------------------------------------------------------------- the two schemes


def _copies(model, seed, stages, example, order, recipe, *, keep_earlier: bool) -> Iterator[tuple[str, nn.Module]]:
    for option, known in CHOICES.items():
        value = order if option == "order" else getattr(recipe, option)
        if value not in known:
            raise ValueError(f"unknown {option} {value!r}; known: {', '.join(known)}.")
    if recipe.std != "trained" and not (isinstance(recipe.std, (int, float)) and recipe.std > 0):
        raise ValueError(f"std must be a positive number or 'trained', got {recipe.std!r}.")
    if recipe.batch_norm == "recalibrate" and recipe.images is None:
        raise ValueError("batch_norm='recalibrate' needs images= to measure the statistics on.")
    seeds = generator(seed)
    try:
        private = deepcopy(model)
    except Exception as error:
        raise ValueError(f"this model cannot be copied with copy.deepcopy: {error}") from error
    found = plan(private, stages=stages, example=example).stages
    draws = torch.randint(2**62, (len(found),), generator=seeds).tolist()
    steps = list(zip(found, draws))
    if order == "bottom_up":
        steps.reverse()

    def copies() -> Iterator[tuple[str, nn.Module]]:
        new: dict[int, Tensor] = {}
        members: tuple[str, ...] = ()
        for stage, draw in steps:
            if not keep_earlier:
                new, members = {}, ()
            new |= _randomised(private, stage, draw, recipe)
            members += stage.members
            randomised = _assemble(private, new)
            if recipe.batch_norm == "recalibrate":
                _recalibrate(randomised, members, recipe.images)
            yield stage.name, randomised

    return copies()


def cascading(
    model: nn.Module,
    *,
    seed: int,
    stages: str | Sequence[str] | None = None,
    init: str = "reset",
    std: float | str = 0.01,
    bias: str = "init",
    affine: str = "reset",
    batch_norm: str = "reset",
    images: Tensor | None = None,
    example: Tensor | None = None,
    order: str = "top_down",
) -> Iterator[tuple[str, nn.Module]]:
    """Randomise stage after stage, each copy keeping what was randomised before; Adebayo et al. (2018).

    Parameters
    ----------
    model : any module; it is left bit for bit as it is.
    seed : one seed, one set of new weights, the same on every device and in `independent`.
    stages, example : see `plan`.
    init : `"reset"` (each layer's own initialiser), `"truncated_normal"` (cut at two standard deviations),
        `"uniform"` (of the same standard deviation) or `"permute"` (the trained weights shuffled).
    std : standard deviation of the two distributions; `"trained"` takes that of each trained tensor.
    bias : biases follow `init`, become `"zero"`, or `"keep"` their values; `init="reset"` sees to them itself.
    affine : weight and bias of norm layers are `"reset"` to 1 and 0, follow `"init"`, or `"keep"` their values.
    batch_norm : statistics of randomised norm layers are `"reset"` to 0 and 1, `"keep"` their trained values
        (the released code of 2018), or are `"recalibrate"`d on `images`.
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
    recipe = _Recipe(init, std, bias, affine, batch_norm, images)
    return _copies(model, seed, stages, example, order, recipe, keep_earlier=True)


def independent(
    model: nn.Module,
    *,
    seed: int,
    stages: str | Sequence[str] | None = None,
    init: str = "reset",
    std: float | str = 0.01,
    bias: str = "init",
    affine: str = "reset",
    batch_norm: str = "reset",
    images: Tensor | None = None,
    example: Tensor | None = None,
    order: str = "top_down",
) -> Iterator[tuple[str, nn.Module]]:
    """Randomise one stage at a time, all others as trained; options and errors as in `cascading`."""
    recipe = _Recipe(init, std, bias, affine, batch_norm, images)
    return _copies(model, seed, stages, example, order, recipe, keep_earlier=False)


SCHEMES: dict[str, Callable[..., Iterator[tuple[str, nn.Module]]]] = {
    "cascading": cascading,
    "independent": independent,
}
