"""Randomised copies of a model, stage by stage: the model-parameter tests of Adebayo et al. (2018).

A *stage* is a piece of the model that is randomised at once (`stages`); stages are listed from the output to the input.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property, partial
from inspect import signature

import torch
from torch import Tensor, nn

from .checks import check_example
from .dataflow import Flow
from .device import generator
from .inference import random_state_kept
from .model_state import Uses, all_tensors, copied
from .model_state import named_tensors as _named  # noqa: F401  for those who watch a copy themselves, as `Uses`
from .private import private_copy
from .recipes import Drawn, Recipe, assembled, drawn, recalibrate, settled
from .stages import Plan, Stage, planned

__all__ = ["SCHEMES", "Plan", "Stage", "Uses", "cascading", "independent", "plan"]

CHOICES = {
    "init": ("reset", "truncated_normal", "uniform", "permute"),
    "bias": ("init", "zero", "keep"),
    "affine": ("reset", "init", "keep"),
    "batch_norm": ("reset", "keep", "recalibrate", "auto"),
    "order": ("top_down", "bottom_up"),
}


def plan(model: nn.Module, *, stages: str | Sequence[str] | None = None, example: Tensor | None = None) -> Plan:
    """The stages of `model` from the output to the input, and what is not randomised.

    Parameters
    ----------
    stages : None takes the children that hold parameters, `nn.Sequential` opened, and so are networks among them
        (a backbone, an encoder): what runs one after the other inside them. What a skip bridges, like the block of a
        residual network or a transformer, stays whole. `"layers"` goes down to single layers. In both, a norm joins
        the layer before it, a lone parameter (class token, position table) is a stage, and a weight that several
        stages share is randomised with the first of them, so that all is random down to there. A list of names is
        taken as given.
    example : a batch of inputs to run a few times in eval mode; None traces the model with `torch.fx`.

    Raises
    ------
    ValueError
        Unknown or overlapping names, a weight shared by two named stages, nothing to randomise, a model that cannot be
        copied or traced, or one that keeps what it computed from its weights where it cannot be emptied.
    """
    check_example(model, example)
    return Redraws(model, scheme="cascading", seed=0, stages=stages, example=example).plan


class Redraws:
    """The steps of a scheme on a private copy of the model, `private`, drawn one after the other."""

    @random_state_kept()
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
        batch_norm: str = "auto",
        calibration: Tensor | None = None,
        example: Tensor | None = None,
        order: str = "top_down",
    ):
        self.recipe = Recipe(init, std, bias, affine, batch_norm, calibration)
        self.cumulative, self.order = scheme == "cascading", order
        for option, known in CHOICES.items():
            value = order if option == "order" else getattr(self.recipe, option)
            if value not in known:
                raise ValueError(f"unknown {option} {value!r}; known: {', '.join(known)}.")
        if std != "trained" and not (isinstance(std, (int, float)) and std > 0):
            raise ValueError(f"std must be a positive number or 'trained', got {std!r}.")
        if batch_norm == "recalibrate" and calibration is None:
            raise ValueError(
                "batch_norm='recalibrate' needs calibration=, the images to measure the statistics on; "
                "batch_norm='auto' recalibrates on the example, and where it has to."
            )
        if batch_norm not in ("recalibrate", "auto") and calibration is not None:
            raise ValueError("calibration= is used with batch_norm='recalibrate' or 'auto' only.")
        seeds = generator(seed)
        self.private, self.fresh, order_in_use, constant = private_copy(model, example)
        self.found = planned(self.private, order_in_use, Flow(self.private, example), stages, constant)
        self.twin = _twin_on_cpu(self.private)
        self.ready: dict[tuple[Stage, int], Drawn] = {}  # what the plan had to draw, until it is taken
        self.pairs = list(zip(all_tensors(self.twin), all_tensors(self.private), strict=True))
        of_twin = {id(own): id(twin) for twin, own in self.pairs}
        self.order_in_use = [of_twin.get(key, key) for key in order_in_use]
        self._take(seeds)
        if batch_norm == "auto":
            drawn_in_order = [stage for stage, _ in self.steps]
            self.recipe = settled(self.recipe, self.private, self.fresh, order_in_use, drawn_in_order, example)

    def _take(self, seeds: torch.Generator) -> None:
        draws = torch.randint(2**62, (len(self.found.stages),), generator=seeds).tolist()
        self.steps = list(zip(self.found.stages, draws))[:: -1 if self.order == "bottom_up" else 1]
        self.ready = {step: self.ready[step] for step in self.steps if step in self.ready}

    def begin(self, seed: int) -> None:
        """Draw from another seed from now on, in the same private copy."""
        self._take(generator(seed))

    def __len__(self) -> int:
        return len(self.steps)

    @cached_property
    def plan(self) -> Plan:
        """What is randomised and what is not, known once every stage has been drawn."""
        self.ready = {step: self._draw(*step) for step in self.steps}
        fallback = [name for one in self.ready.values() for name in one.fallback]
        kept = [name for one in self.ready.values() for name in one.kept]
        return self.found._replace(fallback=fallback, kept=kept, batch_norm=self.recipe.batch_norm)

    def _draw(self, stage: Stage, draw: int) -> Drawn:
        return drawn(self.twin, stage, self.order_in_use, draw, self.recipe)

    def _drawn(self, stage: Stage, draw: int) -> dict[int, Tensor]:
        """The new tensors of a stage, by the identity of those of `private`."""
        new = (self.ready.pop((stage, draw), None) or self._draw(stage, draw)).new
        if self.twin is self.private:
            return new
        return {id(own): _sent(new[id(twin)], own.device) for twin, own in self.pairs if id(twin) in new}

    def new_tensors(self, made: Callable[[dict[int, Tensor]], nn.Module]) -> Iterator[tuple[str, dict[int, Tensor]]]:
        """(stage name, all tensors that are new by then, by the identity of those of `private`), step by step.

        `made(new)` makes a copy of `private` that holds them, in which statistics are measured.
        """
        new: dict[int, Tensor] = {}
        members: tuple[str, ...] = ()
        for stage, draw in self.steps:
            if not self.cumulative:
                new, members = {}, ()
            new = new | self._drawn(stage, draw)
            members += stage.members
            if self.recipe.batch_norm == "recalibrate" and self.recipe.calibration is not None:
                measured = made(new)
                recalibrate(measured, members, self.recipe.calibration)
                pairs = zip(self.private.buffers(), measured.buffers(), strict=True)
                new |= {id(old): buffer.detach() for old, buffer in pairs if id(old) in new}
            yield stage.name, new

    def copies(self) -> Iterator[tuple[str, nn.Module]]:
        """(stage name, randomised copy), step by step; what was randomised is each copy's own."""
        for name, new in self.new_tensors(partial(assembled, self.private, fresh=self.fresh)):
            yield name, assembled(self.private, new, self.fresh, own=True)


@torch.inference_mode(False)
def _twin_on_cpu(model: nn.Module) -> nn.Module:
    """A copy of a model on a GPU, from which weights are drawn while the GPU works; another model itself."""
    return copied(model).cpu() if any(tensor.is_cuda for tensor in all_tensors(model)) else model


@torch.inference_mode(False)
def _sent(values: Tensor, device: torch.device) -> Tensor:
    """Values of the CPU on their way to a device, whose work goes on meanwhile."""
    return values.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else values.to(device)


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
    init : `"reset"` (each layer's own initialiser, and for what has none a normal with the trained tensor's standard
        deviation, not cut; with its root mean square where all its values are equal, so that zeros stay),
        `"truncated_normal"` (cut at two standard deviations), `"uniform"` (of the same standard deviation) or
        `"permute"` (the trained weights shuffled).
    std : standard deviation of the two distributions, before the cut (which leaves .88 of it); `"trained"` takes
        that of each trained tensor.
    bias : biases follow `"init"`, become `"zero"`, or `"keep"` their values.
    affine : weight and bias of norms are `"reset"` to 1 and 0, follow `"init"`, or `"keep"` their values.
    batch_norm : statistics of randomised norm layers are `"reset"` to 0 and 1, `"keep"` their trained values
        (the released code of 2018), or are `"recalibrate"`d on the images `calibration`. `"auto"` resets them unless
        the logits of the randomised copies then hardly depend on the image (networks of many depthwise convolutions),
        and else recalibrates, on `calibration` or on the example; without an example it resets. The choice does not
        depend on the seed. In frozen norms these four values are buffers, which are treated alike.
    order : `"top_down"` from the output to the input, or `"bottom_up"`.

    Returns
    -------
    Iterator of (stage name, randomised copy). A copy is safe to keep; parameters of stages that are still
    trained share their memory with a private copy of the model.

    Raises
    ------
    ValueError
        An unknown option, a model that cannot be copied or traced, a stage that cannot be randomised or is after all
        as it was, a batch norm that cannot be recalibrated.
    """
    check_options(options)
    check_example(model, options.get("example"))
    return Redraws(model, scheme="cascading", seed=seed, **options).copies()


def independent(model: nn.Module, *, seed: int, **options) -> Iterator[tuple[str, nn.Module]]:
    """Randomise one stage at a time, all others as trained; options and errors as in `cascading`."""
    check_options(options)
    check_example(model, options.get("example"))
    return Redraws(model, scheme="independent", seed=seed, **options).copies()


SCHEMES: dict[str, Callable[..., Iterator[tuple[str, nn.Module]]]] = {
    "cascading": cascading,
    "independent": independent,
}
