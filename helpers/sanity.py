"""The sanity checks: model x images x methods x metrics x seeds -> one tidy DataFrame.

One row is one similarity of two maps of one image:

`scheme`      what was compared with the trained model's map (see `parameter_randomization`)
`seed`        the replicate
`stage`       how many stages were randomised or which one was (0: the trained model; -1: a reference line)
`layer`       the stage's name
`method`, `metric`, `image`, `similarity`   NaN where the metric is undefined (a constant map)
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from inspect import signature

import numpy as np
import pandas as pd
import torch
from torch import Tensor, nn

from helpers import randomization, saliency, similarity
from helpers.device import generator, progress
from helpers.training import predict

COLUMNS = ["scheme", "seed", "stage", "layer", "method", "metric", "image", "similarity"]
FLOORS = ("other_image", "noise")
CEILINGS = ("retest", "twin")

Function = Callable[..., Tensor]


def _named(chosen, get: Callable, kind: str) -> dict[str, Function]:
    """Methods or metrics by label, from a mapping or a sequence of keys and callables."""
    if isinstance(chosen, str) or callable(chosen):
        chosen = [chosen]
    if isinstance(chosen, Mapping):
        named = {label: get(function) for label, function in chosen.items()}
    else:
        labels = [item if isinstance(item, str) else getattr(item, "__name__", repr(item)) for item in chosen]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two {kind} have the same name in {labels}; pass a dict to name them.")
        named = {label: get(item) for label, item in zip(labels, chosen)}
    if not named:
        raise ValueError(f"no {kind} given.")
    return named


def _draws_noise(method: Function) -> bool:
    """Whether the method takes a `seed` that the caller has not fixed."""
    fixed = method.keywords if isinstance(method, partial) else {}
    return "seed" in signature(method).parameters and "seed" not in fixed


def _explain(method: Function, model: nn.Module, images: Tensor, targets: Tensor, seed: int) -> Tensor:
    """Signed heatmaps `(N, H, W)`; methods that draw noise draw it from `seed`."""
    options = {"seed": seed} if _draws_noise(method) else {}
    return saliency.heatmap(method(model, images, targets, **options), signed=True)


def spectral_noise(maps: Tensor, *, seed: int) -> Tensor:
    """Noise `(N, H, W)` with the power spectrum of each map: its Fourier phases are those of white noise.

    As smooth or as coarse as the maps themselves, and about nothing.
    """
    white = torch.fft.rfft2(torch.randn(maps.shape, generator=generator(seed)).to(maps))
    return torch.fft.irfft2(torch.fft.rfft2(maps).abs() * torch.sgn(white), s=maps.shape[-2:])


class _Rows:
    """Collects similarities and makes the tidy frame of them."""

    def __init__(self, metrics: dict[str, Function]):
        self.metrics = metrics
        self.frames: list[pd.DataFrame] = []

    def add(self, scheme: str, seed: int, stage: int, layer: str, method: str, a: Tensor, b: Tensor) -> None:
        for label, metric in self.metrics.items():
            values = metric(a, b)
            where = (scheme, seed, stage, layer, method, label)
            frame = pd.DataFrame({"image": range(len(values)), "similarity": values.double().cpu().numpy()})
            self.frames.append(frame.assign(**dict(zip(COLUMNS, where))))

    def frame(self) -> pd.DataFrame:
        return pd.concat(self.frames, ignore_index=True)[COLUMNS]


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
    scheme, stages, options : `"cascading"` or `"independent"`, with the options of `randomization.cascading`.
    seeds : one replicate each, of the new weights and of the methods' noise.
    explain : `"targets"`, fixed over all stages, or `"argmax"`, the class that each copy itself predicts.
    twins : models of the same architecture trained from other seeds.

    Returns
    -------
    Tidy frame. Besides the rows of `scheme` (stage 0 is the trained model's map against itself) it holds, at
    stage -1, the reference lines: the floors `other_image` (the same method's map of another image) and
    `noise` (noise with the map's own spectrum); the ceilings `retest` (the method against itself with other
    noise, for methods that draw any) and `twin` (`seed` counts the twins).

    Raises
    ------
    ValueError
        An unknown name, an option that does not fit, no seeds, or input that a method or metric refuses.
    """
    methods = _named(methods, saliency.get, "methods")
    rows = _Rows(_named(metrics, similarity.get, "metrics"))
    if scheme not in randomization.SCHEMES:
        raise ValueError(f"unknown scheme {scheme!r}; known: {', '.join(randomization.SCHEMES)}.")
    if explain not in ("targets", "argmax"):
        raise ValueError(f"explain must be 'targets' or 'argmax', got {explain!r}.")
    seeds = list(seeds)
    if not seeds:
        raise ValueError("at least one seed is needed.")
    copies = partial(
        randomization.SCHEMES[scheme], model, stages=stages, **{"example": images[:1], **options}
    )
    count = len(randomization.plan(model, stages=stages, example=options.get("example", images[:1])).stages)
    still = {label: method for label, method in methods.items() if not _draws_noise(method)}
    trained = {label: _explain(method, model, images, targets, 0) for label, method in still.items()}
    for number, twin in enumerate(twins):
        for label, method in methods.items():
            maps = _explain(method, model, images, targets, 2 * number)
            rows.add(
                "twin", number, -1, "", label, maps, _explain(method, twin, images, targets, 2 * number + 1)
            )
    with progress(len(seeds) * count * len(methods), show=show_progress) as bar:
        for seed in seeds:
            noise = torch.randint(2**62, (count + 3,), generator=generator(seed)).tolist()
            for label, method in methods.items():
                if label not in still:
                    trained[label] = _explain(method, model, images, targets, noise[0])
                    again = _explain(method, model, images, targets, noise[1])
                    rows.add("retest", seed, -1, "", label, trained[label], again)
                _add_floors(rows, seed, label, trained[label], noise[2])
                rows.add(scheme, seed, 0, "trained", label, trained[label], trained[label])
            for stage, (layer, copy) in enumerate(copies(seed=seed), start=1):
                classes = targets if explain == "targets" else predict(copy, images).argmax(1)
                for label, method in methods.items():
                    bar.set_postfix_str(f"seed {seed}, {layer}, {label}")
                    maps = _explain(method, copy, images, classes, noise[stage + 2])
                    rows.add(scheme, seed, stage, layer, label, trained[label], maps)
                    bar.update()
    return rows.frame()


def _add_floors(rows: _Rows, seed: int, label: str, maps: Tensor, draw: int) -> None:
    rows.add("noise", seed, -1, "", label, maps, spectral_noise(maps, seed=draw))
    if len(maps) > 1:
        shift = 1 + draw % (len(maps) - 1)
        rows.add("other_image", seed, -1, "", label, maps, maps.roll(shift, 0))


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
    Frame with `scheme seed stage layer method metric similarity floor ceiling retained_share undefined`: the
    share is NaN where floor and ceiling are within .2 of each other; `undefined` counts the maps left out of
    the mean because their similarity is NaN.
    """
    for line in (floor, ceiling):
        if line is not None and line not in set(frame.scheme):
            raise ValueError(f"the frame has no rows of {line!r}; it has: {', '.join(frame.scheme.unique())}.")
    lines = frame[frame.stage < 0].groupby(["scheme", "method", "metric"]).similarity.mean()
    curves = frame[frame.stage >= 0].groupby(
        ["scheme", "seed", "stage", "layer", "method", "metric"], sort=False
    )
    table = curves.similarity.agg(
        similarity="mean", undefined=lambda values: int(values.isna().sum())
    ).reset_index()
    of = pd.MultiIndex.from_frame(table[["method", "metric"]])
    table["floor"] = lines[floor].reindex(of).to_numpy()
    table["ceiling"] = 1.0 if ceiling is None else lines[ceiling].reindex(of).to_numpy()
    width = table.ceiling - table.floor
    table["retained_share"] = ((table.similarity - table.floor) / width).where(width > 0.2)
    return table
