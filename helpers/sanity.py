"""The sanity checks: model x images x methods x metrics x seeds -> one tidy DataFrame.

One row is one similarity of two maps of one image:

`scheme`      what was compared with the trained model's map (see `parameter_randomization`)
`role`        what the row is for: `curve`, the `floor` and `ceiling` that it is read against, a `control`, or
              `refused`, one row for what a method did not give
`seed`        the replicate
`stage`       how many stages were randomised or which one was; 0 where none was
`layer`       the stage that was randomised last, empty where none was
`method`, `metric`, `image`, `similarity`   NaN where the metric is undefined (a constant map)
`note`        why there is no similarity; empty where there is one. A row that was refused has no metric, and image -1
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from . import randomization, saliency, similarity
from .checks import check_example, check_input, check_model
from .comparing import Comparison, Pictures, Side, fixed
from .device import batches, seed_of
from .heatmaps import different_places, named, replicates
from .heatmaps import draws_noise as draws_noise  # these are of this module to those who use it
from .heatmaps import heat_of as heat_of
from .heatmaps import spectral_noise as spectral_noise
from .heatmaps import takes as takes
from .inference import predict, random_state_kept
from .planning import Preflight as Preflight
from .planning import at_one_layer, described, tried
from .rows import COLUMNS as COLUMNS
from .rows import check_frame
from .runs import Run
from .saliency.passes import at_most, checked, class_count, differentiates
from .versions import Versions
from .watching import uses

SEVERAL = 64  # images: so many are looked at to see which parameters run, where some do not


@torch.inference_mode(False)
def _lay_out(model: nn.Module, images: Tensor) -> torch.memory_format | None:
    """Store a private model's weights with channels last, faster on the CPU, where images of that layout work.

    Models that `.view()` their activations need the usual layout and keep it.
    """
    if images.is_cuda:
        return None
    wide = [tensor for tensor in (*model.parameters(), *model.buffers()) if tensor.ndim == 4]
    for layout in (torch.channels_last, torch.contiguous_format):
        for tensor in wide:
            tensor.data = tensor.data.to(memory_format=layout)
        try:
            if layout == torch.channels_last:
                predict(model, images[:2].contiguous(memory_format=layout))
                return layout
        except (RuntimeError, ValueError):  # of the model, or of `predict` about it
            continue
    return None


def _now_used(model: nn.Module, names: Sequence[str], images: Tensor) -> list[str]:
    """Which of these parameters take part in a pass of the images."""
    used = uses(model, images) if names else {}
    return [name for name in names if used[name]]


class _Test:
    """A model-parameter test as it was asked for, checked, with all that its seeds have in common."""

    def __init__(
        self, model, images, targets, methods, metrics, scheme, seeds, explain, twins, lines, indices, options
    ):
        asked = named(methods, saliency.get, "methods")
        self.metrics = named(metrics, similarity.get, "metrics")
        if scheme not in tuple(randomization.SCHEMES):
            raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(randomization.SCHEMES)}.")
        if explain not in ("targets", "argmax"):
            raise ValueError(f"explain must be 'targets' or 'argmax', got {explain!r}.")
        self.seeds = replicates(seeds)
        check_input(images, targets)
        for network in (model, *twins):
            check_model(network, images, differentiable=any(map(differentiates, asked.values())))
        known = ["seeds", "twins", "lines", "explain", "batch_size", "indices"]
        randomization.check_options(options, besides=known)
        check_example(model, options.get("example"))
        self.scheme, self.targets, self.explain, self.lines = scheme, targets, explain, lines
        drawing = partial(randomization.Redraws, model, scheme=scheme, seed=self.seeds[0])
        draws = drawing(**{"example": images[:1], **options})
        self.some = images[:SEVERAL]
        if "example" not in options and _now_used(draws.private, draws.found.unused, self.some):
            draws = drawing(**{"example": self.some, **options})  # images take different ways
        self.classes = class_count(draws.private, images[:1])
        if targets.max() >= self.classes:
            raise ValueError(f"target {targets.max().item()} is not one of the model's {self.classes} classes.")
        self.pictures = Pictures(images, different_places(indices, images), _lay_out(draws.private, images))
        self.versions = Versions(draws)
        self.methods, layer = at_one_layer(asked, draws.private, images)
        self.plan = described(
            draws.plan,
            scheme=scheme,
            stages=self.versions.names[1:],
            methods=self.methods,
            metrics=self.metrics,
            seeds=self.seeds,
            images=len(images),
            twins=len(twins),
            lines=lines,
            layer=layer,
        )

    def refuse_new_ways(self) -> None:
        """Raise where a randomised copy uses parameters that the trained model does not, and that stay as trained."""
        found = self.versions.draws.found
        drawn = tuple(f"{member}." for stage in found.stages for member in stage.members)
        unused = [name for name in found.unused if not f"{name}.".startswith(drawn)]
        if late := _now_used(self.versions.at(len(self.versions) - 1), unused, self.some):
            raise ValueError(
                f"{', '.join(map(repr, late))} do not run in the trained model, and so are in no stage, but in a "
                "randomised copy they do: name stages that hold them, or modules around them, with stages=[...]."
            )

    def explained(self) -> list[Tensor]:
        """The classes of which the maps of each version are."""
        classes, versions = [self.targets] * len(self.versions), self.versions
        if self.explain == "argmax":
            for number in range(1, len(versions)):
                answers = [
                    predict(versions.at(number), self.pictures.at(part)).argmax(1)
                    for part in batches(len(self.targets), 256)
                ]
                classes[number] = torch.cat(answers)
        return classes

    def comparison(self, seed: int, label: str, classes: Sequence[Tensor], run: Run) -> Comparison:
        method, versions, sides = self.methods[label], self.versions, []
        for number, name in enumerate(versions.names):
            about = self.scheme, "curve", number, name
            sides.append(Side(partial(versions.at, number), classes[number], seed_of(seed, label, name), *about))
        if self.lines and draws_noise(method):
            again = seed_of(seed, label, "retest")
            sides.append(Side(partial(versions.at, 0), self.targets, again, "retest", "ceiling"))
        return Comparison(method, label, seed, self.pictures, self.metrics, sides, self.lines, versions, run.tick)


@random_state_kept()
def parameter_randomization(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    scheme: str = "cascading",
    seeds: int | Iterable[int] = range(5),
    stages: str | Sequence[str] | None = None,
    explain: str = "targets",
    twins: Sequence[nn.Module] = (),
    lines: bool = True,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    show_progress: bool = True,
    **options,
) -> pd.DataFrame:
    """Compare the maps of a trained model with those of randomised copies of it.

    Parameters
    ----------
    model, images, targets : what is explained; images `(N, C, H, W)`, targets int64 `(N,)`, by custom the
        trained model's prediction.
    methods, metrics : keys of `saliency.METHODS` and `similarity.METRICS`, callables of the same signature, or
        a mapping from a label to either. Methods that take a `seed` draw fresh noise at every stage. A method is
        handed one working copy, in which the weights are exchanged: what it remembers of it is of one call.
    scheme, stages, options : `"cascading"` or `"independent"`, with the options of `randomization.cascading`
        (`init`, `batch_norm` and `calibration` among them).
    seeds : one replicate each, of the new weights and of the methods' noise; a number n stands for 0 to n - 1.
    explain : `"targets"`, fixed over all stages, or `"argmax"`, the class that each copy itself predicts.
    twins : models of the same architecture trained from other seeds.
    lines : whether to compute the reference lines that need no twin.
    batch_size : how many images a pass takes at most.
    indices : the images' places in a whole set of which they are a part, from which they draw; None counts from 0.
        Work that is cut into parts then has the rows of the whole, but for `other_image`, whose partner is of the
        same part, and for methods that draw noise without knowing places.
    show_progress : a bar on standard error, and above it what will be done and what a method refuses.

    Returns
    -------
    Tidy frame. Besides the rows of `scheme` (role `curve`; stage 0 is the trained model's map against itself) it
    holds the reference lines: with role `floor`, `other_image` (the same method's map of another image) and
    `noise` (noise with the map's own spectrum); with role `ceiling`, `retest` (the method against itself with
    other noise, for methods that draw any) and `twin` (`seed` counts the twins).

    A method that refuses the trained model or a stage has a row of role `refused` there that says why. `attrs` holds
    the `plan` of the run, as in `preflight`, and whether it is `complete`: Ctrl-C ends it with the replicates and
    methods that are done.

    Raises
    ------
    ValueError
        An unknown name, an option that does not fit, no seeds, input that a metric refuses, or a model that every
        method refuses.
    """
    test = _Test(
        model,
        images,
        targets,
        methods=methods,
        metrics=metrics,
        scheme=scheme,
        seeds=seeds,
        explain=explain,
        twins=twins,
        lines=lines,
        indices=indices,
        options={"stages": stages, **options},
    )
    total = len(test.seeds) * len(test.methods) * len(test.versions)
    with at_most(batch_size), checked(), Run(total, test.pictures.places, test.plan, show=show_progress) as run:
        for number, twin in enumerate(twins):
            for label, method in test.methods.items():
                own = Side(fixed(model), targets, seed_of(number, label))
                other = Side(fixed(twin), targets, seed_of(number, label, "twin"), "twin", "ceiling")
                pictures = Pictures(images, test.pictures.places)
                run.add(Comparison(method, label, number, pictures, test.metrics, [own, other]), other)
        for seed in test.seeds:
            test.versions.begin(seed)
            if seed == test.seeds[0]:
                test.refuse_new_ways()
            classes = test.explained()
            for label in test.methods:
                run.bar.set_postfix_str(f"seed {seed}, {label}")
                comparison = test.comparison(seed, label, classes, run)
                run.add(comparison, comparison.sides[0], len(test.versions))
            run.check()
    return run.frame()


@random_state_kept()
def preflight(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    scheme: str = "cascading",
    seeds: int | Iterable[int] = range(5),
    stages: str | Sequence[str] | None = None,
    explain: str = "targets",
    twins: Sequence[nn.Module] = (),
    lines: bool = True,
    batch_size: int | None = None,
    **options,
) -> Preflight:
    """What `parameter_randomization` would do with the same arguments, without doing it; `print` it.

    Stages, what stays as trained, the layer of Grad-CAM, and for each method its passes, a rough estimate of its time,
    and whether it refuses the trained model: found in a trial on one image. A method of more than 64 passes a map is
    not tried; its passes are counted on a model that costs nothing.

    Raises
    ------
    ValueError
        As `parameter_randomization`, but for what only a trial of all images and stages can show.
    """
    test = _Test(
        model,
        images,
        targets,
        methods=methods,
        metrics=metrics,
        scheme=scheme,
        seeds=seeds,
        explain=explain,
        twins=twins,
        lines=lines,
        indices=None,
        options={"stages": stages, **options},
    )
    with at_most(batch_size), checked():
        subject = test.versions.own.model, images[:1], targets[:1], test.classes
        trials = {label: tried(method, *subject, seed_of(0, label)) for label, method in test.methods.items()}
    return Preflight(test.plan, trials)


@random_state_kept()
def data_randomization(
    true_models: Sequence[nn.Module],
    random_models: Sequence[nn.Module],
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    lines: bool = True,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    show_progress: bool = True,
) -> pd.DataFrame:
    """Compare the maps of networks trained on true labels with those of networks trained on permuted ones.

    Parameters
    ----------
    true_models, random_models : pairs in order; the two of a pair started from the same weights.
    images, targets, methods, metrics, batch_size, indices, show_progress : as in `parameter_randomization`.

    Returns
    -------
    Tidy frame, stage 0, `seed` being the pair's number k. Schemes: `random_labels` (true network k against random
    network k, the same initial weights), `random_labels_crossed` (against random network k + 1, other initial
    weights), both of role `curve`, and `second_seed`, of role `control` (against true network k + 1: other initial
    weights, the same labels); and the floors of `parameter_randomization`. Refusals and `attrs` are as there.

    Raises
    ------
    ValueError
        Lists of different length or of fewer than two networks, input that a metric refuses, or networks that every
        method refuses.
    """
    count = len(true_models)
    if count != len(random_models) or count < 2:
        raise ValueError(
            f"two networks or more of each kind are needed, in pairs; got {count} and {len(random_models)}."
        )
    methods = named(methods, saliency.get, "methods")
    metrics = named(metrics, similarity.get, "metrics")
    check_input(images, targets)
    for network in (*true_models, *random_models):
        check_model(network, images, differentiable=any(map(differentiates, methods.values())))
    pictures = Pictures(images, different_places(indices, images))
    with at_most(batch_size), checked(), Run(count * len(methods), pictures.places, show=show_progress) as run:
        for k, model in enumerate(true_models):
            after = (k + 1) % count
            others = {
                "random_labels": random_models[k],
                "random_labels_crossed": random_models[after],
                "second_seed": true_models[after],
            }
            for label, method in methods.items():
                run.bar.set_postfix_str(f"pair {k}, {label}")
                sides = [Side(fixed(model), targets, seed_of(k, label, ""))]
                for scheme, other in others.items():
                    role = "control" if scheme == "second_seed" else "curve"
                    sides.append(Side(fixed(other), targets, seed_of(k, label, scheme), scheme, role))
                run.add(Comparison(method, label, k, pictures, metrics, sides, lines), sides[1], steps=1)
            run.check()
    return run.frame()


def table(frame: pd.DataFrame, **chosen) -> np.ndarray:
    """Similarities `[seed, image]` of the rows whose columns have the chosen values, for example `stage=1`.

    Rows of what was refused do not count.

    Raises
    ------
    ValueError
        No such rows, or more than one for a seed and image: name more columns.
    """
    check_frame(frame, ["seed", "image", "similarity", *chosen])
    frame = frame[frame.role != "refused"] if "role" in frame else frame
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
    check_frame(frame)
    frame = frame[frame.role != "refused"]
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
