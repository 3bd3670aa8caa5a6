"""Precomputed results -> one self-contained interactive HTML element.

An explorer shows one *state* at a time: one label of each axis (a stage, a method, an image). A state has panels
(pictures), charts (curves along one of the axes) and facts (numbers or words). All states are computed beforehand
and stored in the element, so that it works on any page, without a kernel and without a network. Where scripts are
off, and in print, the first state and the table of all numbers are there.
"""

import base64
import io
import os
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ...plots import LINES
from .render import html

SHOWN = "the map shown, against the trained one"
EXACT = 64  # pixels: pictures up to this side are stored without loss and shown as squares
MIME = "application/vnd.saliency-sanity.explorer+json"

Array = np.ndarray | Tensor


class Explorer(str):
    """The HTML of an explorer, which a notebook shows; the build, where `SANITY_STATIC` is 1, draws it from `data`."""

    data: dict

    def __new__(cls, data: dict) -> "Explorer":
        element = super().__new__(cls, html(data))
        element.data = data
        return element

    def _repr_mimebundle_(self, **_) -> dict:
        shown = {"text/plain": repr(self), "text/html": str(self)}
        return shown | {MIME: self.data} if os.environ.get("SANITY_STATIC") == "1" else shown

    def __repr__(self) -> str:
        return f"<explorer of {len(self) // 1000} kB>"


def explore(
    axes: Mapping[str, Sequence],
    panels: Mapping[str, Array],
    *,
    title: str,
    slider: str | None = None,
    curves: Mapping[str, Mapping[str, Array]] | None = None,
    facts: Mapping[str, Array] | None = None,
    wipe: bool = False,
    switches: tuple[int, int] | None = None,
) -> Explorer:
    """An interactive element that leads through precomputed results.

    Every array begins with one dimension for each axis, as long as the axis, or 1 where the axis makes no difference.

    Parameters
    ----------
    axes : name -> labels. An axis is chosen from a menu, where nothing else is said below.
    panels : title -> pictures `(*axes, H, W)` or `(*axes, H, W, 3)`, bytes or floats in [0, 1].
    title : what is explored, in a few words.
    slider : the axis that a slider sets, with a button that plays it.
    curves : title of a chart -> name of a line -> numbers `(*axes)` drawn along the slider's axis, NaN for a gap.
        A line that does not change along it is a reference; `plots.LINES` has names for those of similarity.
    facts : name -> numbers or words `(*axes)`.
    wipe : lay the second panel over the first, with a handle that uncovers it.
    switches : `(rows, columns)` of check boxes that set the first axis; box k adds 2**k to the place of its label.

    Returns
    -------
    HTML that a notebook shows as an element.

    Raises
    ------
    ValueError
        Axes, arrays and options that do not fit together, or pictures with NaN or with values out of range.
    """
    axes = {name: [str(label) for label in labels] for name, labels in axes.items()}
    curves, facts = curves or {}, facts or {}
    _check(axes, panels, slider, curves, facts, switches)
    pictures = {name: _pictures(name, values, axes) for name, values in panels.items()}
    sides = [values.shape[len(axes) :][:2] for values in pictures.values()]
    if wipe and (len(sides) < 2 or sides[0] != sides[1]):
        raise ValueError("wipe=True needs two panels of the same height and width.")
    return Explorer({
        "title": title,
        "axes": list(axes.items()),
        "slider": slider,
        "switches": switches,
        "wipe": wipe,
        "panels": [_panel(name, values, axes) for name, values in pictures.items()],
        "charts": [_chart(name, series, axes) for name, series in curves.items()],
        "facts": [{"name": name, **_array(name, values, axes)} for name, values in facts.items()],
    })  # fmt: skip


def similarity_curves(frame: pd.DataFrame, names: Mapping[str, str] | None = None) -> dict[str, dict[str, np.ndarray]]:
    """The curves of `explore` from a frame of `sanity.parameter_randomization`, with their reference lines.

    Parameters
    ----------
    frame : its rows of one scheme, and those of its reference lines.
    names : metric -> title of its chart; None takes all metrics of the frame.

    Returns
    -------
    Title -> line -> means over the seeds `(stage, method, image)`, in the order of the frame.

    Raises
    ------
    ValueError
        A method without floor or without ceiling: a curve of similarity shows nothing without them.
    """
    curves = {}
    methods, images = frame.method.unique(), frame.image.unique()
    for metric, title in (names or {metric: metric for metric in frame.metric.unique()}).items():
        rows = frame[frame.metric == metric]
        series = {}
        for scheme, part in rows.groupby("scheme", sort=False):
            mean = part.groupby(["stage", "method", "image"]).similarity.mean()
            full = pd.MultiIndex.from_product([sorted(part.stage.unique()), methods, images])
            series[scheme] = mean.reindex(full).to_numpy().reshape(-1, len(methods), len(images))
        for kind in ("floor", "ceiling"):
            lines = rows.scheme[rows.role == kind].unique()
            found = [np.isfinite(series[line]).any((0, 2)) for line in lines]
            bare = methods[~np.any(found, 0)] if found else methods
            if len(bare):
                raise ValueError(f"{metric} has no {kind} for {', '.join(bare)}: run the check with lines and twins.")
        first = list(rows.scheme[rows.role == "curve"].unique())
        if len(first) != 1:
            raise ValueError(f"the frame must hold one scheme besides its reference lines, got {first}.")
        curves[title] = {SHOWN: series[first[0]]} | {line: series[line] for line in LINES if line in series}
    return curves


def _check(axes, panels, slider, curves, facts, switches) -> None:
    if not axes or not all(axes.values()):
        raise ValueError("each axis needs at least one label.")
    if not panels and not curves:
        raise ValueError("there is nothing to show: give panels or curves.")
    for name, labels in axes.items():
        if len(set(labels)) < len(labels):
            raise ValueError(f"axis {name!r} has the same label twice: {labels}.")
    for name, count in Counter([*axes, *curves, *facts]).items():
        if count > 1:
            raise ValueError(f"the name {name!r} is used twice among axes, charts and facts.")
    if slider is not None and slider not in axes:
        raise ValueError(f"slider={slider!r} is not an axis; there are: {', '.join(axes)}.")
    if curves and slider is None:
        raise ValueError("curves are drawn along the slider's axis: name it with slider=.")
    first, labels = next(iter(axes.items()))
    if switches and (len(labels) != 2 ** (switches[0] * switches[1]) or slider == first):
        raise ValueError(
            f"{switches} switches need a first axis of 2**{switches[0] * switches[1]} labels of their own."
        )


def _fit(what: str, shape: tuple[int, ...], axes) -> None:
    sizes = tuple(map(len, axes.values()))
    if len(shape) != len(sizes) or any(found not in (1, size) for found, size in zip(shape, sizes)):
        wanted = ", ".join(f"{name} {size}" for name, size in zip(axes, sizes))
        raise ValueError(f"{what}: {shape} does not fit the axes ({wanted}); each may be 1 instead.")


def _array(name: str, values: Array, axes) -> dict:
    """Numbers or words as JSON knows them; what is not finite is undefined."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    _fit(f"the numbers of {name!r}", array.shape, axes)
    flat = array.ravel().tolist()
    flat = [None if isinstance(value, float) and not np.isfinite(value) else value for value in flat]
    return {"shape": list(array.shape), "values": flat}


def _pictures(name: str, values: Array, axes) -> np.ndarray:
    """Pictures as bytes `(*axes, H, W)` or `(*axes, H, W, 3)`."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    behind = array.shape[len(axes) :]
    if len(behind) not in (2, 3) or behind[2:] not in ((), (3,)):
        raise ValueError(f"panel {name!r} must have the shape (*axes, H, W) or (*axes, H, W, 3), got {array.shape}.")
    _fit(f"panel {name!r}", array.shape[: len(axes)], axes)
    if array.dtype == np.uint8:
        return array
    if array.dtype.kind != "f" or not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"panel {name!r} must hold bytes, or floats in [0, 1] without NaN.")
    return (array * 255).round().astype(np.uint8)


def _panel(name: str, values: np.ndarray, axes) -> dict:
    """The pictures of a panel, each once, and which of them a state shows."""
    shape = values.shape[: len(axes)]
    pictures = values.reshape(-1, *values.shape[len(axes) :])
    size, sources = list(pictures.shape[1:3]), [_source(picture) for picture in pictures]
    places = {source: place for place, source in enumerate(dict.fromkeys(sources))}
    shown = [places[source] for source in sources]
    exact = max(size) <= EXACT
    return {"name": name, "shape": list(shape), "size": size, "exact": exact, "pictures": list(places), "shown": shown}


def _source(picture: np.ndarray) -> str:
    """A picture as base64 of WebP."""
    file, lossless = io.BytesIO(), max(picture.shape[:2]) <= EXACT
    Image.fromarray(picture).convert("RGB").save(file, "WEBP", lossless=lossless, quality=80, method=6)
    return base64.b64encode(file.getvalue()).decode()


def _chart(chart: str, series: Mapping[str, Array], axes) -> dict:
    """The lines of a chart, with names for people, and the numbers that its scale marks."""
    lines = []
    for name, values in series.items():
        known = LINES.get(name)
        line = {"name": known[0] if known else name, "role": name if known else ""}
        lines.append(line | _array(f"{chart}, {name}", values, axes))
    finite = [value for line in lines for value in line["values"] if value is not None]
    if not finite:
        raise ValueError(f"the curves of {chart!r} hold no finite number.")
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(min(finite), max(finite))
    return {"name": chart, "ticks": [float(tick) for tick in ticks], "lines": lines}
