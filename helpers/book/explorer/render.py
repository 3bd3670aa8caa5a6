"""The element of an explorer from its data, so that a change of style runs no experiment again.

Needs nothing but the standard library: the build of the pages draws explorers without loading torch. The data is what
`explore` puts together: `title`, `axes` (pairs of name and labels), `slider`, `switches`, `wipe`, and

- `panels`: `name`, `shape` over the axes, `size` (height and width), `exact` (stored without loss), `pictures` (base64
  of WebP, each once) and `shown`, the place of each state's picture among them;
- `charts`: `name`, `ticks`, and `lines` with `name`, `role` (the key of a reference line, else empty), `shape` and
  `values`, `None` where undefined;
- `facts`: `name`, `shape` and `values`, numbers or words.
"""

import json
from collections.abc import Sequence
from html import escape
from itertools import product
from math import prod
from pathlib import Path

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 260, 150, 34, 24, 10, 24  # of a chart and its margins

Axes = Sequence[tuple[str, Sequence[str]]]


def html(data: dict) -> str:
    """One element that needs nothing else."""
    axes, slider, charts = data["axes"], data["slider"], data["charts"]
    parts: list[dict] = []  # whatever changes with the state
    figures = _figures([(panel["name"], _image(panel, axes, parts)) for panel in data["panels"]], data["wipe"])
    drawn = [_chart(chart, slider, axes, parts) for chart in charts]
    status = _status(axes, charts, data["facts"], parts)
    stored = json.dumps({"axes": axes, "parts": parts}, separators=(",", ":")).replace("<", "\\u003c")
    style, script = (Path(__file__).with_name(f"explorer.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    return (
        f'<div class="explorer" role="group" aria-label="{escape(data["title"])}">\n<style>\n{style}</style>\n'
        f'<div class="controls" hidden>{_controls(axes, slider, data["switches"])}</div>\n'
        f'<div class="panels">{"".join(figures)}</div>\n<div class="charts">{"".join(drawn)}</div>\n'
        f"{_legend(charts, slider, axes)}{status}\n"
        f"{_table(axes, charts, data['facts'])}\n"
        f'<script type="application/json">{stored}</script>\n<script>\n{script}</script>\n</div>'
    )


def _place(name: str, axes: Axes) -> int:
    return [axis for axis, _ in axes].index(name)


def _steps(shape: Sequence[int]) -> list[int]:
    """How far apart neighbours along each axis lie among the values of an array; 0 where all are one."""
    return [prod(shape[k + 1 :]) * (size > 1) for k, size in enumerate(shape)]


def _at(array: dict, places: Sequence[int]):
    """The value of an array in a state; an axis of length 1 makes no difference."""
    return array["values"][sum(step * place for step, place in zip(_steps(array["shape"]), places))]


def _add(parts: list, shown: list[str], shape: Sequence[int]) -> str:
    """Store a part, what it shows state after state; returns the first, and `parts` says where to look for others."""
    places = {value: place for place, value in enumerate(dict.fromkeys(shown))}
    shown_places = [places[value] for value in shown]
    parts.append({"name": "", "steps": _steps(shape), "values": list(places), "shown": shown_places})
    return shown[0]


def _state(axes: Axes, shape: Sequence[int]) -> str:
    """The first state in words; axes that make no difference are left out."""
    return ", ".join(f"{name} {labels[0]}" for (name, labels), size in zip(axes, shape) if size > 1)


def _word(value: str | float | None) -> str:
    """A number as one reads it, or a word as it is."""
    if isinstance(value, str | int):
        return str(value)
    digits = "undefined" if value is None else f"{value:.2f}" if abs(value) < 1 else f"{value:.3g}"
    return digits.replace("-", "−")


def _status(axes: Axes, charts: list[dict], facts: list[dict], parts: list) -> str:
    """In words, what the state is and what its numbers are."""

    def number(tag: str, array: dict) -> str:
        first = _add(parts, [_word(value) for value in array["values"]], array["shape"])
        return f'<{tag} data-part="{len(parts) - 1}">{escape(first)}</{tag}>'

    lines = [f'<span class="state">{escape(_state(axes, [len(labels) for _, labels in axes]))}</span>']
    for chart in charts:
        first, *others = chart["lines"]
        shown = number("b", first)
        rest = "; ".join(f"{escape(line['name'])} {number('span', line)}" for line in others)
        lines.append(f"{escape(chart['name'])} {shown}{f' ({rest})' * bool(rest)}")
    lines += [f"{escape(fact['name'])} {number('b', fact)}" for fact in facts]
    return f'<div role="status" aria-atomic="true">{"".join(f"<p>{line}</p>" for line in lines)}</div>'


def _table(axes: Axes, charts: list[dict], facts: list[dict]) -> str:
    """All numbers, one row a state."""
    arrays = {
        f"{chart['name']}, {line['name']}" if k else chart["name"]: line
        for chart in charts
        for k, line in enumerate(chart["lines"])
    }
    arrays |= {fact["name"]: fact for fact in facts}
    if not arrays:
        return ""
    rows = []
    for places in product(*(range(len(labels)) for _, labels in axes)):
        state = [labels[place] for (_, labels), place in zip(axes, places)]
        rows.append(_row("td", [*state, *(_word(_at(array, places)) for array in arrays.values())]))
    head = _row("th", [*(name for name, _ in axes), *arrays])
    table = f'<table class="dataframe"><thead>{head}</thead><tbody>{"".join(rows)}</tbody></table>'
    return f'<details open><summary>All numbers</summary><div class="table" tabindex="0">{table}</div></details>'


def _row(tag: str, cells: list[str]) -> str:
    return f"<tr>{''.join(f'<{tag}>{escape(cell, quote=False)}</{tag}>' for cell in cells)}</tr>"


def _controls(axes: Axes, slider: str | None, switches: Sequence[int] | None) -> str:
    controls = []
    for k, (name, labels) in enumerate(axes):
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


def _image(panel: dict, axes: Axes, parts: list) -> str:
    """The first picture of a panel."""
    name, (height, width), pictures, shown = panel["name"], panel["size"], panel["pictures"], panel["shown"]
    alt = f"{name}: {_state(axes, panel['shape'])}".removesuffix(": ")
    kind = ' class="squares"' if panel["exact"] else ""
    source = f"data:image/webp;base64,{pictures[shown[0]]}"
    place = len(parts)
    parts.append({"name": name, "steps": _steps(panel["shape"]), "values": pictures, "shown": shown})
    return f'<img{kind} data-part="{place}" src="{source}" alt="{escape(alt)}" width="{width}" height="{height}">'


def _figures(images: list[tuple[str, str]], wipe: bool) -> list[str]:
    """Each panel with its name; with `wipe` the first two make one figure."""
    figures = [(escape(name), image) for name, image in images]
    if wipe:
        (left, under), (right, over), *figures = figures
        about = f'aria-label="{left}, against {right}: share shown"'
        handle = f'<input type="range" value="50" autocomplete="off" {about} hidden>'
        figures.insert(0, (f"{left} | {right}", f'<div class="wipe">{under}{over}{handle}</div>'))
    return [f"<figure>{image}<figcaption>{name}</figcaption></figure>" for name, image in figures]


def _kinds(lines: list[dict], along: int) -> list[str]:
    """The class of each line in the style sheet."""
    kinds, curves = [], 0
    for line in lines:
        is_curve = not line["role"] and line["shape"][along] > 1
        kinds.append(line["role"] or (f"curve-{curves}" if is_curve else "reference"))
        curves += is_curve
    return kinds


def _chart(chart: dict, slider: str, axes: Axes, parts: list) -> str:
    """A chart of curves along the slider's axis, with straight lines for what does not change along it."""
    along, lines, ticks = _place(slider, axes), chart["lines"], chart["ticks"]
    labels, name = axes[along][1], chart["name"]
    across, down = WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM
    x = [round(LEFT + across * k / max(len(labels) - 1, 1), 1) for k in range(len(labels))]

    def y(value: float) -> float:
        return round(TOP + down * (ticks[-1] - value) / (ticks[-1] - ticks[0]), 1)

    shape = [max(sizes) for sizes in zip(*(line["shape"] for line in lines))]
    shape[along] = 1
    shown = []
    for places in product(*map(range, shape)):
        drawn = ""
        for line, kind in zip(lines, _kinds(lines, along)):
            row = [_at(line, [*places[:along], k, *places[along + 1 :]]) for k in range(line["shape"][along])]
            heights = [None if value is None else y(value) for value in row]
            drawn += _curve(kind, x, heights) if len(row) > 1 else _straight(kind, heights[0])
        shown.append(drawn)
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
        f'<figure class="chart"><svg role="img" aria-label="{escape(name)}, along {escape(slider)}" '
        f'viewBox="0 0 {WIDTH} {HEIGHT}">{grid}{below}{first}</svg><figcaption>{escape(name)}</figcaption></figure>'
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


def _legend(charts: list[dict], slider: str, axes: Axes) -> str:
    """What the lines mean, each once for all charts."""
    kinds: dict[str, str] = {}
    for chart in charts:
        kinds |= {
            line["name"]: kind for line, kind in zip(chart["lines"], _kinds(chart["lines"], _place(slider, axes)))
        }
    keys = "".join(
        f'<li><svg viewBox="0 0 28 10" aria-hidden="true"><path class="{kind}" d="M0 5H28"/></svg>{escape(name)}</li>'
        for name, kind in kinds.items()
    )
    return f'<ul class="keys">{keys}</ul>' if keys else ""
