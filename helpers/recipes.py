"""How a stage is randomised: new values for its tensors."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .device import generator, local_seed, seed_of
from .inference import evaluating, random_state_kept
from .model_state import all_tensors, copied, leaves
from .private import Fresh, refresh
from .stages import STATISTICS, Stage, find, initialiser, is_norm, keeps_statistics, own_tensors, running_tensors

SILENT = 1e-4  # the least difference of logits, in their own size: a thousand rounding errors of float32
_MOMENTS, _COUNTER = ("running_mean", "running_var"), "num_batches_tracked"


@dataclass(frozen=True)
class Recipe:
    init: str
    std: float | str
    bias: str
    affine: str
    batch_norm: str
    calibration: Tensor | None

    def draw(self, trained: Tensor) -> Tensor:
        """New values for a tensor, by `init`, from torch's global CPU generator."""
        if trained.is_complex() and self.init != "permute":  # both parts
            return torch.view_as_complex(self.draw(torch.view_as_real(trained.resolve_conj())).contiguous())
        if self.init == "reset":
            return _of_trained_width(trained)
        if self.init == "permute":
            return trained.flatten()[torch.randperm(trained.numel())].reshape(trained.shape)
        std = float(trained.float().std(correction=0) if self.std == "trained" else self.std)
        new = torch.empty(trained.shape)
        if self.init == "uniform":
            return nn.init.uniform_(new, -std * 3**0.5, std * 3**0.5)
        return nn.init.trunc_normal_(new, 0.0, std, -2 * std, 2 * std) if std else new.zero_()

    def redraw(self, holder: nn.Module) -> list[str]:
        """Randomise, in place, what the module `holder` itself holds; the names of what `_reset` had to draw."""
        norm, fell_back = is_norm(holder), []
        affine = self.affine if norm else "init"
        own = own_tensors(holder) if norm else dict(holder.named_parameters(recurse=False))
        moments = {key: tensor.clone() for key, tensor in own.items() if norm and key in (*_MOMENTS, _COUNTER)}
        values = {key: tensor for key, tensor in own.items() if key not in moments and _draws(tensor)}
        if affine == "init" and self.init == "reset" and not (norm and initialiser(holder) is None):
            fell_back = _reset(holder, values)
        elif affine != "keep":
            for key, tensor in values.items():
                if affine == "init" and self.init != "reset":
                    tensor.copy_(self.draw(tensor))
                else:
                    tensor.fill_(0.0 if "bias" in key else 1.0)
        for key in moments:  # which the layer's own initialiser resets with the rest
            value = float(key == "running_var")
            own[key].copy_(moments[key] if self.batch_norm == "keep" else torch.full_like(own[key], value))
        return fell_back

    def keeps(self, name: str, norm: bool) -> bool:
        """Whether an option says that this parameter, or statistic of a norm, stays as trained."""
        key = name.rpartition(".")[2]
        if norm:
            return (self.batch_norm if key in (*_MOMENTS, _COUNTER) else self.affine) == "keep"
        return "bias" in name and self.bias == "keep"

    def settle_bias(self, name: str, new: Tensor, trained: Tensor) -> None:
        """Biases that do not follow `init` become zero or stay as trained."""
        if "bias" in name and self.bias != "init":
            new.copy_(trained if self.bias == "keep" else torch.zeros_like(trained))


def _draws(tensor: Tensor) -> bool:
    return tensor.is_floating_point() or tensor.is_complex()


def _of_trained_width(trained: Tensor) -> Tensor:
    """Normal numbers with the standard deviation of the trained ones, or their root mean square if that is zero."""
    if trained.is_complex():
        return torch.view_as_complex(_of_trained_width(torch.view_as_real(trained.resolve_conj())))
    values = trained.double()
    width = float(values.std(correction=0))
    constant = bool((values == values.flatten()[0]).all())  # the deviation of equal numbers can be a rounding error
    return torch.randn(trained.shape) * (float(values.square().mean().sqrt()) if constant else width)


def _reset(holder: nn.Module, own: dict[str, Tensor]) -> list[str]:
    """The layer's own initialiser, and for what has none or is not reached by it a normal of the trained width."""
    trained = {key: tensor.clone() for key, tensor in own.items()}
    reset = initialiser(holder)
    if reset is not None and own:
        for tensor in own.values():
            tensor.fill_(torch.nan)  # what is still there afterwards has not been reached
        reset()
    fell_back = []
    for key, before in trained.items():
        now = getattr(holder, key)  # an initialiser may put a new parameter there
        missed = torch.isnan(now) if reset is not None else torch.ones_like(before, dtype=torch.bool)
        if missed.any():
            now.copy_(torch.where(missed, _of_trained_width(before).to(before), now))
            fell_back.append(key)
    return fell_back


class Drawn(NamedTuple):
    """The new tensors of a stage by the identity of those they replace, and what is worth saying about them.

    fallback : parameters that had no initialiser of their own; kept : what runs and is as it was.
    """

    new: dict[int, Tensor]
    fallback: list[str]
    kept: list[str]


@torch.inference_mode(False)
@torch.no_grad()
def drawn(model: nn.Module, stage: Stage, order: Iterable[int], seed: int, recipe: Recipe) -> Drawn:
    """New values for a stage of `model`, whose tensors run in this `order`.

    Raises
    ------
    ValueError
        A tensor that runs is after all as it was, though neither an option nor its constant value explains it.
    """
    pairs: list[tuple[Tensor, Tensor]] = []
    fallback: list[str] = []
    with local_seed(seed):
        for member in stage.members:
            old = find(model, member)
            if isinstance(old, nn.Parameter):
                trained = old.detach().cpu()
                new = recipe.draw(trained).to(trained)
                recipe.settle_bias(member, new, trained)
                fallback += [member] * (recipe.init == "reset" and not ("bias" in member and recipe.bias != "init"))
                pairs.append((old, new))
                continue
            # In the order of their indices: some versions of torch fill a tensor in the order of its memory.
            fresh = copied(old).cpu().to(memory_format=torch.contiguous_format)
            for name, holder in reversed(list(fresh.named_modules(prefix=member))):
                fallback += [f"{name}.{key}" for key in recipe.redraw(holder)]  # a parent has the last word
            norms = [name for name, holder in fresh.named_modules() if is_norm(holder)]
            for (name, parameter), trained in zip(fresh.named_parameters(), old.parameters(), strict=True):
                if name.rpartition(".")[0] not in norms:
                    recipe.settle_bias(name, parameter, trained)
            pairs += zip(all_tensors(old), all_tensors(fresh), strict=True)
    kept = _unmoved(model, stage, order, {id(old): new for old, new in pairs}, recipe)
    return Drawn({id(old): torch.empty_like(old, requires_grad=False).copy_(new) for old, new in pairs}, fallback, kept)


def _unmoved(model: nn.Module, stage: Stage, order: Iterable[int], new: dict[int, Tensor], recipe: Recipe) -> list[str]:
    """The tensors of the stage that run and have not changed; an error where they ought to have."""
    running = running_tensors(model, stage, order)
    kept = {name: old for name, old in running.items() if torch.equal(old.cpu(), new[id(old)])}
    for name, old in running.items():
        if not _draws(old):
            raise ValueError(
                f"stage {stage.name!r} cannot be randomised: {name!r} holds weights of type {old.dtype}, of which none "
                "can be drawn. Give the model in floating point that it was made from."
            )
    for name, old in kept.items():
        holder = find(model, name.rpartition(".")[0]) if "." in name else model
        constant = bool((old == old.flatten()[0]).all())
        if not constant and not recipe.keeps(name, is_norm(holder)):
            raise ValueError(
                f"stage {stage.name!r} cannot be randomised: {name!r} has its trained values after it was drawn. Its "
                "reset_parameters() puts them back; choose init='truncated_normal', 'uniform' or 'permute', or "
                "stages=[...] without it."
            )
    return list(kept)


@torch.inference_mode(False)
def assembled(model: nn.Module, new: dict[int, Tensor], fresh: Fresh, *, own: bool = False) -> nn.Module:
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
    made = copied(model, memo)
    refresh(made, fresh)
    return made


@torch.inference_mode(False)
@torch.no_grad()
def settled(
    recipe: Recipe, model: nn.Module, fresh: Fresh, order: list[int], stages: list[Stage], example: Tensor | None
) -> Recipe:
    """The recipe with `batch_norm="auto"` decided: `"reset"`, unless that silences the network.

    The stages are randomised one after the other with statistics reset, from seed 0 whatever the caller's seed. If the
    logits then come to depend so little on the image (one, and the same with its pixels shuffled) that rounding errors
    show, statistics are recalibrated: on the calibration images, or on the example and its mirror image.
    """
    images = example if recipe.calibration is None else recipe.calibration
    pieces = [found for stage in stages for name in stage.members if isinstance(found := find(model, name), nn.Module)]
    reset = replace(recipe, batch_norm="reset", calibration=None)
    if images is None or not any(keeps_statistics(module) for piece in pieces for module in piece.modules()):
        return reset
    pair = torch.cat([images[:1], _shuffled(images[:1])])
    if torch.equal(*pair):
        return reset  # an image of one colour tells nothing
    new: dict[int, Tensor] = {}
    every = -(-len(stages) // 8)
    for left, stage in zip(reversed(range(len(stages))), stages):
        new |= drawn(model, stage, order, seed_of(0, stage.name), reset).new
        if left % every == 0 and not _spread(assembled(model, new, fresh), pair) >= SILENT:
            seen = torch.cat([images, images.flip(-1)]) if recipe.calibration is None else images
            return replace(recipe, batch_norm="recalibrate", calibration=seen)
    return reset


def _shuffled(images: Tensor) -> Tensor:
    places = torch.randperm(images[0, 0].numel(), generator=generator(0)).to(images.device)
    return images.flatten(2)[..., places].reshape(images.shape)


def _spread(model: nn.Module, pair: Tensor) -> float:
    """How far the logits of two images lie apart, as a fraction of the largest; NaN where one is not finite."""
    with evaluating(model):
        logits = next(value for value in leaves(model(pair.clone())) if isinstance(value, Tensor)).double()
    return float((logits[0] - logits[1]).abs().max() / logits.abs().max())


@random_state_kept()
@torch.inference_mode(False)
@torch.no_grad()
def recalibrate(model: nn.Module, members: Iterable[str], images: Tensor) -> None:
    """Batch-norm statistics of the randomised stages, measured on `images`.

    Raises
    ------
    ValueError
        A norm sees a single number a channel, which has no variance.
    """
    pieces = [found for name in members if isinstance(found := find(model, name), nn.Module)]
    norms = [norm for piece in pieces for norm in piece.modules() if keeps_statistics(norm)]
    measuring = [norm for norm in norms if isinstance(norm, STATISTICS)]
    momenta = [norm.momentum for norm in measuring]
    frozen = {norm: _Measured(norm) for norm in norms if norm not in measuring}
    try:
        with evaluating(model):
            for norm in measuring:
                norm.reset_running_stats()
                norm.training, norm.momentum = True, None  # None averages over all passes, of about one size
            for part in images.tensor_split(-(-len(images) // 64)):
                model(part.clone())
    except ValueError as error:
        if "more than 1 value per channel" not in str(error):
            raise
        raise ValueError("a batch norm sees one number a channel: give more images as calibration=.") from error
    finally:
        for norm, momentum in zip(measuring, momenta):
            norm.momentum = momentum
        for measured in frozen.values():
            measured.settle()


class _Measured:
    """Gives a norm that has no train mode the statistics of the batch it sees, and in the end their mean."""

    def __init__(self, norm: nn.Module):
        self.norm = norm
        self.seen: list[Tensor] = []
        self.hook = norm.register_forward_pre_hook(lambda module, inputs: self.see(inputs[0]))

    def see(self, images: Tensor) -> None:
        values = images.transpose(0, 1).flatten(1)
        if values.shape[1] < 2:
            raise ValueError("Expected more than 1 value per channel")
        self.seen.append(torch.stack([values.mean(1), values.var(1)]))
        self.write(self.seen[-1])

    def write(self, moments: Tensor) -> None:
        for name, values in zip(_MOMENTS, moments):
            getattr(self.norm, name).copy_(values)

    def settle(self) -> None:
        self.hook.remove()
        if self.seen:
            self.write(torch.stack(self.seen).mean(0))
