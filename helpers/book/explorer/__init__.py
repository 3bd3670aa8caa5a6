"""Precomputed results -> one self-contained interactive HTML element.

An explorer shows one *state* at a time: one label of each axis (a stage, a method, an image). A state has panels
(pictures), charts (curves along one of the axes) and facts (numbers or words). All states are computed beforehand
and stored in the element, so that it works on any page, without a kernel and without a network. Where scripts are
off, and in print, the first state and the table of all numbers are there.
"""

import base64
import io
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator
from PIL import Image
from torch import Tensor

from ...plots import LINES

SHOWN = "the map shown, against the trained one"
EXACT = 64  # pixels: pictures up to this side are stored without loss and shown as squares
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 260, 150, 34, 24, 10, 24  # of a chart and its margins

Array = np.ndarray | Tensor


class Explorer(str):
    """The HTML of an explorer; a notebook shows the element itself."""

    def _repr_html_(self) -> str:
        return str(self)

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
    charts = {
        chart: {name: _numbers(f"{chart}, {name}", values, axes).astype(float) for name, values in series.items()}
        for chart, series in curves.items()
    }
    facts = {name: _numbers(name, values, axes) for name, values in facts.items()}

    parts: list[dict] = []  # whatever changes with the state
    figures = _figures({name: _image(name, values, axes, parts) for name, values in pictures.items()}, wipe)
    drawn = [_chart(chart, series, slider, axes, parts) for chart, series in charts.items()]
    status = _status(axes, charts, facts, parts)
    legend = _legend(charts, list(axes).index(slider)) if charts else ""
    data = json.dumps({"axes": list(axes.items()), "parts": parts}, separators=(",", ":")).replace("<", "\\u003c")
    style, script = ((Path(__file__).parent / f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return Explorer(
        f'<div class="explorer" role="group" aria-label="{escape(title)}">\n<style>\n{style}</style>\n'
        f'<div class="controls" hidden>{_controls(axes, slider, switches)}</div>\n'
        f'<div class="panels">{"".join(figures)}</div>\n<div class="charts">{"".join(drawn)}</div>\n{legend}{status}\n'
        f"{_table(axes, charts, facts)}\n"
        f'<script type="application/json">{data}</script>\n<script>\n{script}</script>\n</div>'
    )


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


def _numbers(name: str, values: Array, axes) -> np.ndarray:
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    _fit(f"the numbers of {name!r}", array.shape, axes)
    return array


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


def _add(parts: list, shown: list[str], shape: Sequence[int], name: str = "") -> str:
    """Store a part, what it shows state after state; returns the first, and `parts` says where to look for others."""
    places = {value: place for place, value in enumerate(dict.fromkeys(shown))}
    steps = [int(np.prod(shape[k + 1 :])) * (size > 1) for k, size in enumerate(shape)]
    parts.append({"name": name, "steps": steps, "values": list(places), "shown": [places[value] for value in shown]})
    return shown[0]


def _state(axes, shape: Sequence[int]) -> str:
    """The first state in words; axes that make no difference are left out."""
    return ", ".join(f"{name} {labels[0]}" for (name, labels), size in zip(axes.items(), shape) if size > 1)


def _words(values: np.ndarray) -> list[str]:
    """Numbers as one reads them, or words as they are."""

    def word(value) -> str:
        if isinstance(value, str | int | np.integer):
            return str(value)
        digits = "undefined" if np.isnan(value) else f"{value:.2f}" if abs(value) < 1 else f"{value:.3g}"
        return digits.replace("-", "−")

    return [word(value) for value in values.ravel()]


def _line(name: str) -> str:
    return LINES[name][0] if name in LINES else name


def _status(axes, charts, facts, parts) -> str:
    """In words, what the state is and what its numbers are."""

    def number(tag: str, values: np.ndarray) -> str:
        first = _add(parts, _words(values), values.shape)
        return f'<{tag} data-part="{len(parts) - 1}">{escape(first)}</{tag}>'

    lines = [f'<span class="state">{escape(_state(axes, [len(labels) for labels in axes.values()]))}</span>']
    for chart, series in charts.items():
        (_, values), *others = series.items()
        shown = number("b", values)
        rest = "; ".join(f"{escape(_line(name))} {number('span', values)}" for name, values in others)
        lines.append(f"{escape(chart)} {shown}{f' ({rest})' * bool(rest)}")
    lines += [f"{escape(name)} {number('b', values)}" for name, values in facts.items()]
    return f'<div role="status" aria-atomic="true">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _table(axes, charts, facts) -> str:
    """All numbers, one row a state."""
    columns = dict(zip(axes, zip(*product(*axes.values()))))
    given = {f"{chart}, {_line(name)}" if k else chart: values
             for chart, series in charts.items() for k, (name, values) in enumerate(series.items())}  # fmt: skip
    for name, values in (given | facts).items():
        columns[name] = _words(np.broadcast_to(values, [len(labels) for labels in axes.values()]))
    if len(columns) == len(axes):
        return ""
    table = re.sub(r">\s+<", "><", pd.DataFrame(columns).to_html(index=False, border=0))
    return f'<details open><summary>All numbers</summary><div class="table" tabindex="0">{table}</div></details>'


def _controls(axes, slider: str | None, switches: tuple[int, int] | None) -> str:
    controls = []
    for k, (name, labels) in enumerate(axes.items()):
        attributes = f'data-axis="{k}" autocomplete="off"'
        if switches and k == 0:
            box = '<label><input type="checkbox" autocomplete="off" aria-label="row {}, column {}"></label>'
            boxes = "".join(box.format(i + 1, j + 1) for i in range(switches[0]) for j in range(switches[1]))
            grid = f'<div class="switches" style="grid-template-columns:repeat({switches[1]},44px)">{boxes}</div>'
            controls.append(f'<fieldset data-axis="0"><legend>{escape(name)}</legend>{grid}</fieldset>')
        elif name == slider:
            label = f'<label>{escape(name)}<input type="range" {attributes} max="{len(labels) - 1}" value="0"></label>'
            width = max(map(len, labels))  # so that nothing moves when the label changes
            shown = f'<span aria-hidden="true" style="min-width:{width}ch">{escape(labels[0])}</span>'
            controls.append(f'<div class="slider">{label}{shown}<button type="button">Play</button></div>')
        elif len(labels) > 1:
            options = "".join(f"<option>{escape(label)}</option>" for label in labels)
            controls.append(f"<label>{escape(name)}<select {attributes}>{options}</select></label>")
    return "".join(controls)


def _source(picture: np.ndarray) -> str:
    """A picture as base64 of WebP."""
    file, lossless = io.BytesIO(), max(picture.shape[:2]) <= EXACT
    Image.fromarray(picture).convert("RGB").save(file, "WEBP", lossless=lossless, quality=80, method=6)
    return base64.b64encode(file.getvalue()).decode()


def _image(name: str, values: np.ndarray, axes, parts) -> str:
    """The first picture of a panel."""
    shape, place = values.shape[: len(axes)], len(parts)
    pictures = values.reshape(-1, *values.shape[len(axes) :])
    source = "data:image/webp;base64," + _add(parts, [_source(picture) for picture in pictures], shape, name)
    alt = f"{name}: {_state(axes, shape)}".removesuffix(": ")
    height, width = pictures.shape[1:3]
    kind = ' class="squares"' if max(height, width) <= EXACT else ""
    return f'<img{kind} data-part="{place}" src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _figures(images: Mapping[str, str], wipe: bool) -> list[str]:
    """Each panel with its name; with `wipe` the first two make one figure."""
    figures = [(escape(name), image) for name, image in images.items()]
    if wipe:
        (left, under), (right, over), *figures = figures
        about = f'aria-label="{left}, against {right}: share shown"'
        handle = f'<input type="range" value="50" autocomplete="off" {about} hidden>'
        figures.insert(0, (f"{left} | {right}", f'<div class="wipe">{under}{over}{handle}</div>'))
    return [f"<figure>{image}<figcaption>{name}</figcaption></figure>" for name, image in figures]


def _kind(name: str, series: Mapping[str, np.ndarray], along: int) -> str:
    """The class of a line in the style sheet."""
    if name in LINES:
        return name
    changing = [other for other, values in series.items() if values.shape[along] > 1]
    return f"curve-{changing.index(name)}" if name in changing else "reference"


def _chart(chart: str, series: Mapping[str, np.ndarray], slider: str, axes, parts) -> str:
    """A chart of curves along the slider's axis, with straight lines for what does not change along it."""
    along, labels = list(axes).index(slider), axes[slider]
    finite = np.concatenate([values[np.isfinite(values)] for values in series.values()])
    if not len(finite):
        raise ValueError(f"the curves of {chart!r} hold no finite number.")
    ticks = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(finite.min(), finite.max())
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    x = [round(LEFT + across * k / max(len(labels) - 1, 1), 1) for k in range(len(labels))]

    def y(value: float) -> float:
        return round(float(TOP + down * (ticks[-1] - value) / np.ptp(ticks)), 1)

    shape = [max(sizes) for sizes in zip(*(values.shape for values in series.values()))]
    shape[along] = 1
    shown = [""] * int(np.prod(shape))
    for name, values in series.items():
        kind, full = _kind(name, series, along), shape.copy()
        full[along] = values.shape[along]
        rows = np.moveaxis(np.broadcast_to(values, full), along, -1).reshape(len(shown), -1)
        for state, row in enumerate(rows):
            heights = [y(value) if np.isfinite(value) else None for value in row]
            shown[state] += _curve(kind, x, heights) if len(row) > 1 else _straight(kind, heights[0])
    grid = "".join(
        f'<path class="grid" d="M{LEFT} {y(t)}h{across}"/>'
        f'<text class="left" x="{LEFT - 5}" y="{y(t) + 4}">{f"{t:g}".replace("-", "−")}</text>'
        for t in ticks
    )
    every = 1 if sum(len(label) + 2 for label in labels) <= 36 else max(len(labels) - 1, 1)
    below = "".join(
        f'<text x="{x[k]}" y="{HEIGHT - 6}">{escape(labels[k])}</text>' for k in range(0, len(labels), every)
    )
    first = f'<g data-part="{len(parts)}">{_add(parts, shown, shape)}</g>'
    return (
        f'<figure class="chart"><svg role="img" aria-label="{escape(chart)}, along {escape(slider)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{grid}{below}{first}</svg><figcaption>{escape(chart)}</figcaption></figure>'
    )


def _curve(kind: str, x: Sequence[float], heights: Sequence[float | None]) -> str:
    """A curve, broken where there is no number; the first of a chart has dots."""
    path, dots = "", ""
    for k, height in enumerate(heights):
        if height is not None:
            path += f"{'L' if k and heights[k - 1] is not None else 'M'}{x[k]} {height}"
            dots += f'<circle data-at="{k}" cx="{x[k]}" cy="{height}" r="3"/>'
    return f'<path class="{kind}" d="{path}"/>{dots if kind == "curve-0" else ""}'


def _straight(kind: str, height: float | None) -> str:
    return "" if height is None else f'<path class="{kind}" d="M{LEFT} {height}H{WIDTH - RIGHT}"/>'


def _legend(charts: Mapping[str, Mapping[str, np.ndarray]], along: int) -> str:
    """What the lines mean, each once for all charts."""
    kinds = {_line(name): _kind(name, series, along) for series in charts.values() for name in series}
    keys = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><path class="{kind}" d="M0 5H28"/></svg>{escape(name)}</li>'
        for name, kind in kinds.items()
    )
    return f'<ul class="keys">{keys}</ul>' if keys else ""
