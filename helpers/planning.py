"""What a run will do, in words and as plain data: stages, what stays as trained, passes and time."""

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from textwrap import shorten, wrap

import torch
from torch import Tensor, nn

from . import saliency
from .heatmaps import Function, Refusal, draws_noise, heat_of, refusing, takes
from .stages import Plan

MOST_TRIED = 64  # passes: a method that takes more of them for one map is not tried beforehand
WIDTH = 110  # characters of a line
FIELDS = {
    "unused": "stay as trained, because they do not run",
    "constant": "stay as they are, being no parameters",
    "fallback": "without an initialiser, drawn from a normal of the trained width",
    "kept": "as before, by an option or because it is their initial value",
    "batch_norm": "statistics of batch norm",
    "shared": "randomised with an earlier stage, which shares them",
}


def at_one_layer(methods: Mapping[str, Function], model: nn.Module, images: Tensor) -> tuple[dict, str | None]:
    """The methods, those of Grad-CAM with one layer for all copies where the caller names none; and its name."""
    find = getattr(saliency.cam, "gradcam_layer", None)
    open_to = [label for label, method in methods.items() if _of_grad_cam(method) and takes(method, "layer")]
    if find is None or not open_to:
        return dict(methods), None
    try:
        layer = find(model, images[:1])
    except ValueError:  # the methods say why, each in its row
        return dict(methods), None
    return {k: partial(m, layer=layer) if k in open_to else m for k, m in methods.items()}, layer


def _of_grad_cam(method: Function) -> bool:
    while isinstance(method, partial):
        method = method.func
    return method in (saliency.gradcam, saliency.guided_gradcam)


def described(
    plan: Plan,
    *,
    scheme: str,
    stages: Sequence[str],
    methods: Mapping[str, Function],
    metrics: Iterable[str],
    seeds: Sequence[int],
    images: int,
    twins: int,
    lines: bool,
    layer: str | None,
) -> dict:
    """The plan of a run as numbers, strings, lists and dictionaries; `maps` are those of each image, by method."""
    once = {label: len(stages) + 1 + (lines and draws_noise(method)) for label, method in methods.items()}
    others = {name: _plain(value) for name, value in plan._asdict().items() if name != "stages"}
    return {
        "scheme": scheme,
        "stages": list(stages),
        **others,
        "gradcam_layer": layer,
        "metrics": list(metrics),
        "seeds": [int(seed) for seed in seeds],
        "images": images,
        "maps": {label: len(seeds) * count + 2 * twins for label, count in once.items()},
    }


def _plain(value):
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple, set, frozenset)):
        return [_plain(item) for item in value]
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def in_words(plan: Mapping) -> str:
    """A plan in a few lines."""
    count, known = len(plan["stages"]), ("scheme", "stages", "gradcam_layer", "metrics", "seeds", "images", "maps")
    first = f"{plan['scheme']}: {count} stages, {len(plan['seeds'])} seeds, {plan['images']} images"
    lines = [f"{first}, {sum(plan['maps'].values()) * plan['images']:,} maps", f"stages: {_list(plan['stages'])}"]
    for name, value in plan.items():
        if name not in known and value:
            lines.append(f"{FIELDS.get(name, name.replace('_', ' '))}: {_list(value)}")
    lines += [f"Grad-CAM looks at: {plan['gradcam_layer']}"] if plan["gradcam_layer"] else []
    return "\n".join("\n".join(wrap(line, WIDTH, subsequent_indent="    ")) for line in lines)


def _list(value) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} ({item})" for key, item in value.items())
    if not isinstance(value, list):
        return str(value)
    shown = [str(item) for item in value]
    return ", ".join(shown if len(shown) <= 40 else [*shown[:20], f"... {len(shown) - 40} more ...", *shown[-20:]])


@dataclass(frozen=True)
class Trial:
    """What one map of a method takes, and why the method refuses, if it does.

    `passes` are those of one image, None where they are not known. `seconds` are of a trial on one image, NaN where
    there was none.
    """

    passes: int | None
    seconds: float = math.nan
    refusal: str = ""


@dataclass(frozen=True)
class Preflight:
    """What a run will do: `plan` as in the frame's `attrs`, and a trial of each method. `str()` tells it in words."""

    plan: dict
    trials: dict[str, Trial]

    def passes(self, method: str) -> int | None:
        """Passes of single images through the model in the whole run; None where they are not known."""
        found = self.trials[method].passes
        return None if found is None else found * self.plan["maps"][method] * self.plan["images"]

    def seconds(self, method: str) -> float:
        """A rough estimate for the whole run, from the trial, or from the passes and the pace of other trials."""
        trial = self.trials[method]
        if not math.isnan(trial.seconds):
            return trial.seconds * self.plan["maps"][method] * self.plan["images"]
        pace = min((t.seconds / t.passes for t in self.trials.values() if t.passes and t.seconds > 0), default=math.nan)
        return pace * (self.passes(method) or math.nan)

    def __str__(self) -> str:
        lines, width = [in_words(self.plan)], max(map(len, self.trials))
        for label, trial in self.trials.items():
            if trial.refusal:
                lines.append(f"  {label:<{width}}  refuses: {shorten(trial.refusal, WIDTH)}")
                continue
            took = self.seconds(label)
            known = trial.passes is not None
            passes = f"{trial.passes:,} a map, {self.passes(label):,} image passes" if known else "passes not known"
            tried = "" if not math.isnan(trial.seconds) else " (not tried)"
            estimate = "" if math.isnan(took) else f", roughly {took:,.0f} s" if took >= 1 else ", under a second"
            lines.append(f"  {label:<{width}}  {passes}{estimate}{tried}")
        return "\n".join(lines)


class _StandIn(nn.Module):
    """A model that costs nothing, for counting the passes of methods that look at no layer."""

    def __init__(self, classes: int):
        super().__init__()
        self.classes = classes

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).mean(1, keepdim=True).expand(-1, self.classes)


def tried(method: Function, model: nn.Module, image: Tensor, target: Tensor, classes: int, seed: int) -> Trial:
    """A trial of a method on one image; one that takes many passes is only counted, on a stand-in for the model."""
    try:
        passes = _counted(method, _StandIn(classes), image, target, seed)[0]
    except Exception:  # it asks for layers, or what else a model has
        passes = None
    if passes is not None and passes > MOST_TRIED:
        return Trial(passes)
    start = time.perf_counter()
    try:
        with refusing():
            passes, finished = _counted(method, model, image, target, seed)
    except Refusal as refusal:
        return Trial(None, refusal=str(refusal))
    return Trial(passes, finished - start)


def _counted(method: Function, model: nn.Module, image: Tensor, target: Tensor, seed: int) -> tuple[int, float]:
    """The images that went through the model for one map, and when it was there."""
    seen: list[int] = []
    hook = model.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0]) if inputs else 1))
    try:
        heat_of(method, model, image, target, seed)
        if image.is_cuda:
            torch.cuda.synchronize(image.device)
        return sum(seen), time.perf_counter()
    finally:
        hook.remove()
