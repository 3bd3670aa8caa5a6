"""The sanity checks: model x images x methods x metrics x seeds -> one tidy DataFrame.

One row is one similarity of two maps of one image:

`scheme`      what was compared with the trained model's map (see `parameter_randomization`)
`role`        what the row is for: `curve`, the `floor` and `ceiling` that it is read against, or a `control`
`seed`        the replicate
`stage`       how many stages were randomised or which one was; 0 where none was
`layer`       the stage that was randomised last, empty where none was
`method`, `metric`, `image`, `similarity`   NaN where the metric is undefined (a constant map)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import randomization, saliency, similarity
from .checks import check_input, check_model
from .device import generator, progress, seed_of
from .inference import predict
from .randomization import Step
from .replay import Tape
from .saliency.passes import chunks, differentiates, one_pass_of

COLUMNS = ["scheme", "role", "seed", "stage", "layer", "method", "metric", "image", "similarity"]

Function = Callable[..., Tensor]


def named(chosen, get: Callable, kind: str) -> dict[str, Function]:
    """Methods or metrics by label, from a mapping or a sequence of keys and callables."""
    if isinstance(chosen, str) or callable(chosen):
        chosen = [chosen]
    if isinstance(chosen, Mapping):
        named = {label: get(function) for label, function in chosen.items()}
    else:
        labels = [_label(item) for item in chosen]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two {kind} have the same name in {labels}; pass a dict to name them.")
        named = {label: get(item) for label, item in zip(labels, chosen)}
    if not named:
        raise ValueError(f"no {kind} given.")
    return named


def _label(item) -> str:
    """A key, a function's name, or that of a partial with its options: the same in every run."""
    if isinstance(item, str):
        return item
    if isinstance(item, partial):
        options = [*map(_shown, item.args), *(f"{key}={_shown(value)}" for key, value in item.keywords.items())]
        return f"{_label(item.func)}({', '.join(options)})" if options else _label(item.func)
    return getattr(item, "__name__", type(item).__name__)


def _shown(value) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    return _label(value) if callable(value) else repr(value)


def takes(method: Function, option: str) -> bool:
    """Whether the method has this option and the caller has not fixed it."""
    fixed = method.keywords if isinstance(method, partial) else {}
    return option in signature(method).parameters and option not in fixed


def draws_noise(method: Function) -> bool:
    """Whether the method takes a `seed` that the caller has not fixed."""
    return takes(method, "seed")


def heat_of(method: Function, model: nn.Module, images: Tensor, targets: Tensor, seed: int) -> Tensor:
    """Signed heatmaps `(N, H, W)`; methods that draw noise draw it from `seed` and the images' places."""
    given = {"seed": seed, "indices": range(len(images))}
    options = {option: value for option, value in given.items() if takes(method, option)}
    return saliency.heatmap(method(model, images, targets, **options), signed=True)


def spectral_noise(maps: Tensor, *, seed: int) -> Tensor:
    """Noise `(N, H, W)` with the power spectrum of each map: its Fourier phases are those of white noise.

    As smooth or as coarse as the maps themselves, and about nothing. A map's phases follow from `seed` and its place.
    """
    drawn = [torch.randn(maps.shape[1:], generator=generator(seed_of(seed, place))) for place in range(len(maps))]
    white = torch.fft.rfft2(torch.stack(drawn).to(maps))
    return torch.fft.irfft2(torch.fft.rfft2(maps).abs() * torch.sgn(white), s=maps.shape[-2:])


class Rows:
    """Collects similarities and makes the tidy frame of them."""

    def __init__(self, metrics: dict[str, Function]):
        self.metrics = metrics
        self.values: list[Tensor] = []  # left on their device until the end, so that no stage waits for another
        self.where: list[tuple] = []

    def against(self, reference: Tensor) -> dict[str, Function]:
        """The metrics with their first map fixed."""
        return {label: similarity.against(metric, reference) for label, metric in self.metrics.items()}

    def add(
        self, role: str, scheme: str, seed: int, stage: int, layer: str, method: str, metrics, maps: Tensor
    ) -> None:
        for label, metric in metrics.items():
            self.values.append(metric(maps).detach())
            self.where.append((scheme, role, seed, stage, layer, method, label))

    def frame(self) -> pd.DataFrame:
        sizes = [len(values) for values in self.values]
        columns = zip(*self.where)
        frame = {name: np.repeat(np.array(cells), sizes) for name, cells in zip(COLUMNS, columns)}
        frame["image"] = np.concatenate([np.arange(size) for size in sizes])
        frame["similarity"] = torch.cat([values.cpu().double() for values in self.values]).numpy()
        return pd.DataFrame(frame)[COLUMNS]


@torch.inference_mode(False)
def _lay_out(model: nn.Module, images: Tensor) -> Tensor:
    """Store a private model's weights and the images with channels last, faster on the CPU, where that works.

    Models that `.view()` their activations need the usual layout and keep it.
    """
    if images.is_cuda:
        return images
    moved = images.contiguous(memory_format=torch.channels_last)
    model.to(memory_format=torch.channels_last)
    try:
        predict(model, moved[:2])
        return moved
    except (RuntimeError, ValueError):
        model.to(memory_format=torch.contiguous_format)
        return images


def parameter_randomization(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    scheme: str = "cascading",
    seeds: Iterable[int] = range(5),
    stages: str | Sequence[str] | None = None,
    explain: str = "targets",
    twins: Sequence[nn.Module] = (),
    lines: bool = True,
    show_progress: bool = True,
    **options,
) -> pd.DataFrame:
    """Compare the maps of a trained model with those of randomised copies of it.

    Parameters
    ----------
    model, images, targets : what is explained; images `(N, C, H, W)`, targets int64 `(N,)`, by custom the
        trained model's prediction.
    methods, metrics : keys of `saliency.METHODS` and `similarity.METRICS`, callables of the same signature, or
        a mapping from a label to either. Methods that take a `seed` draw fresh noise at every stage.
    scheme, stages, options : `"cascading"` or `"independent"`, with the options of `randomization.cascading`
        (`init`, `batch_norm` and `calibration` among them).
    seeds : one replicate each, of the new weights and of the methods' noise.
    explain : `"targets"`, fixed over all stages, or `"argmax"`, the class that each copy itself predicts.
    twins : models of the same architecture trained from other seeds.
    lines : whether to compute the reference lines that need no twin.

    Returns
    -------
    Tidy frame. Besides the rows of `scheme` (role `curve`; stage 0 is the trained model's map against itself) it
    holds the reference lines: with role `floor`, `other_image` (the same method's map of another image) and
    `noise` (noise with the map's own spectrum); with role `ceiling`, `retest` (the method against itself with
    other noise, for methods that draw any) and `twin` (`seed` counts the twins).

    Raises
    ------
    ValueError
        An unknown name, an option that does not fit, no seeds, or input that a method or metric refuses.
    """
    methods = named(methods, saliency.get, "methods")
    rows = Rows(named(metrics, similarity.get, "metrics"))
    if scheme not in randomization.SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(randomization.SCHEMES)}.")
    if explain not in ("targets", "argmax"):
        raise ValueError(f"explain must be 'targets' or 'argmax', got {explain!r}.")
    seeds = list(seeds)
    if not seeds:
        raise ValueError("at least one seed is needed.")
    check_input(images, targets)
    for network in (model, *twins):
        check_model(network, images, differentiable=any(map(differentiates, methods.values())))
    randomization.check_options(options, besides=["seeds", "twins", "lines", "explain"])
    options = {"scheme": scheme, "stages": stages, "example": images[:1], **options}
    stages_left = len(randomization.Redraws(model, seed=0, **options)) + 1
    for number, twin in enumerate(twins):
        for label, method in methods.items():
            own = heat_of(method, model, images, targets, seed_of(number, label))
            other = heat_of(method, twin, images, targets, seed_of(number, label, "twin"))
            rows.add("ceiling", "twin", number, 0, "", label, rows.against(own), other)
    with progress(len(seeds) * len(methods) * stages_left, show=show_progress) as bar:
        for seed in seeds:
            draws = randomization.Redraws(model, seed=seed, **options)
            pictures = _lay_out(draws.private, images)
            steps = [Step("", draws.private, frozenset()), *draws.shared_copies()]
            classes = [targets] * len(steps)
            if explain == "argmax":
                classes[1:] = [predict(step.model, pictures).argmax(1) for step in steps[1:]]
            for label, method in methods.items():
                bar.set_postfix_str(f"seed {seed}, {label}")
                maps = _stage_maps(draws, steps, label, method, pictures, classes, seed, bar)
                metric = rows.against(maps[0])
                for stage, (step, heat) in enumerate(zip(steps, maps)):
                    rows.add("curve", scheme, seed, stage, step.name, label, metric, heat)
                if lines and draws_noise(method):
                    again = heat_of(method, draws.private, pictures, targets, seed_of(seed, label, "retest"))
                    rows.add("ceiling", "retest", seed, 0, "", label, metric, again)
                if lines:
                    _add_floors(rows, seed, label, metric, maps[0])
    return rows.frame()


def _stage_maps(draws, steps, label, method, images, classes, seed, bar) -> list[Tensor]:
    """Signed heatmaps of all images at every step.

    Methods of one pass are run from a tape, a few images at a time: what lies below the changed weights runs once.
    """
    step_of_method = one_pass_of(method)
    if step_of_method is None:
        maps = []
        for step, targets in zip(steps, classes):
            maps.append(heat_of(method, step.model, images, targets, seed_of(seed, label, step.name)))
            bar.update()
        return maps
    falling = draws.cumulative and draws.order == "top_down"
    pieces: list[list[Tensor]] = [[] for _ in steps]
    for part in chunks(len(images), images):
        tape = Tape(draws.private, images[part], step_of_method, falling=falling)
        for maps, step, targets in zip(pieces, steps, classes):
            maps.append(saliency.heatmap(tape.maps(step.model, step.changed, targets[part]), signed=True))
            bar.update(part.stop == len(images))
    return [torch.cat(maps) for maps in pieces]


def _add_floors(rows: Rows, seed: int, label: str, metric: dict, maps: Tensor) -> None:
    noise = spectral_noise(maps, seed=seed_of(seed, label, "noise"))
    rows.add("floor", "noise", seed, 0, "", label, metric, noise)
    if len(maps) > 1:
        others = [_other(image, len(maps), seed_of(seed, label, "other_image", image)) for image in range(len(maps))]
        rows.add("floor", "other_image", seed, 0, "", label, metric, maps[others])


def _other(image: int, count: int, draw: int) -> int:
    """Any image of the set but this one."""
    other = draw % (count - 1)
    return other + (other >= image)


def data_randomization(
    true_models: Sequence[nn.Module],
    random_models: Sequence[nn.Module],
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    lines: bool = True,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Compare the maps of networks trained on true labels with those of networks trained on permuted ones.

    Parameters
    ----------
    true_models, random_models : pairs in order; the two of a pair started from the same weights.
    images, targets, methods, metrics : as in `parameter_randomization`.

    Returns
    -------
    Tidy frame, stage 0, `seed` being the pair's number k. Schemes: `random_labels` (true network k against random
    network k, the same initial weights), `random_labels_crossed` (against random network k + 1, other initial
    weights), both of role `curve`, and `second_seed`, of role `control` (against true network k + 1: other initial
    weights, the same labels); and the floors of `parameter_randomization`.

    Raises
    ------
    ValueError
        Lists of different length or of fewer than two networks, or input that a method or metric refuses.
    """
    count = len(true_models)
    if count != len(random_models) or count < 2:
        raise ValueError(
            f"two networks or more of each kind are needed, in pairs; got {count} and {len(random_models)}."
        )
    methods = named(methods, saliency.get, "methods")
    rows = Rows(named(metrics, similarity.get, "metrics"))
    check_input(images, targets)
    for network in (*true_models, *random_models):
        check_model(network, images, differentiable=any(map(differentiates, methods.values())))
    with progress(count * len(methods), show=show_progress) as bar:
        for k, model in enumerate(true_models):
            others = {
                "random_labels": random_models[k],
                "random_labels_crossed": random_models[(k + 1) % count],
                "second_seed": true_models[(k + 1) % count],
            }
            for label, method in methods.items():
                bar.set_postfix_str(f"pair {k}, {label}")
                maps = heat_of(method, model, images, targets, seed_of(k, label, ""))
                metric = rows.against(maps)
                for scheme, other in others.items():
                    heat = heat_of(method, other, images, targets, seed_of(k, label, scheme))
                    rows.add("control" if scheme == "second_seed" else "curve", scheme, k, 0, "", label, metric, heat)
                if lines:
                    _add_floors(rows, k, label, metric, maps)
                bar.update()
    return rows.frame()


def table(frame: pd.DataFrame, **chosen) -> np.ndarray:
    """Similarities `[seed, image]` of the rows whose columns have the chosen values, for example `stage=1`.

    Raises
    ------
    ValueError
        No such rows, or more than one for a seed and image: name more columns.
    """
    for column, value in chosen.items():
        frame = frame[frame[column] == value]
    if frame.empty or frame.duplicated(["seed", "image"]).any():
        raise ValueError(f"{chosen} chooses {len(frame)} rows; it must leave one for each seed and image.")
    return frame.pivot(index="seed", columns="image", values="similarity").to_numpy()


def retained_share(frame: pd.DataFrame, *, floor: str = "other_image", ceiling: str | None = None) -> pd.DataFrame:
    """Mean similarity of each seed and stage on the scale from floor (0) to ceiling (1).

    Parameters
    ----------
    frame : of `parameter_randomization`.
    floor : the reference line that counts as 0, `"other_image"` or `"noise"`.
    ceiling : the line that counts as 1, `"twin"` or `"retest"`; None takes 1, a map against itself.

    Returns
    -------
    Frame of the rows of role `curve`, with `scheme seed stage layer method metric similarity floor ceiling
    retained_share undefined`: the share is NaN where floor and ceiling are within .2 of each other; `undefined`
    counts the maps left out of the mean because their similarity is NaN.
    """
    is_curve = frame.role == "curve"
    known = frame.scheme[~is_curve].unique()
    for line in (floor, ceiling):
        if line is not None and line not in known:
            raise ValueError(f"the frame has no reference line {line!r}; it has: {', '.join(known)}.")
    lines = frame[~is_curve].groupby(["scheme", "method", "metric"]).similarity.mean()
    curves = frame[is_curve].groupby(["scheme", "seed", "stage", "layer", "method", "metric"], sort=False)
    table = curves.similarity.agg(similarity="mean", undefined=lambda values: int(values.isna().sum())).reset_index()
    of = pd.MultiIndex.from_frame(table[["method", "metric"]])
    table["floor"] = lines[floor].reindex(of).to_numpy()
    table["ceiling"] = 1.0 if ceiling is None else lines[ceiling].reindex(of).to_numpy()
    width = table.ceiling - table.floor
    table["retained_share"] = ((table.similarity - table.floor) / width).where(width > 0.2)
    return table
