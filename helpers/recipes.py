"""How a stage is randomised: new values for its tensors."""

from collections.abc import Iterable
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .device import local_seed
from .inference import evaluating
from .model_state import Fresh, all_tensors, refresh
from .stages import NORMS, STATISTICS, Stage, find, initialiser


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
    reset, kind = initialiser(holder), type(holder).__name__
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
def randomised(model: nn.Module, stage: Stage, seed: int, recipe: Recipe) -> dict[int, Tensor]:
    """The new tensors of a stage, by the identity of the tensors of `model` that they replace."""
    drawn: list[tuple[Tensor, Tensor]] = []
    with local_seed(seed):
        for member in stage.members:
            old = find(model, member)
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
    copied = deepcopy(model, memo)
    refresh(copied, fresh)
    return copied


@torch.inference_mode(False)
@torch.no_grad()
def recalibrate(model: nn.Module, members: Iterable[str], images: Tensor) -> None:
    """Batch-norm statistics of the randomised stages, measured on `images`."""
    pieces = [found for name in members if isinstance(found := find(model, name), nn.Module)]
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
