"""The picture of a check: from the data of its card to HTML, so that a change of style runs no experiment again.

Needs nothing but the standard library and `card.css` beside it: the build of the pages draws cards without loading
torch, in the chapters and on the scorecard. In a notebook the same card draws itself.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from math import ceil, floor, log10
from pathlib import Path

# Where the bibliography and the scorecard are read; the build leads to its own pages.
BOOK = "https://saliency-sanity.github.io/saliency-sanity/book/"
# Outcome -> its class in card.css, its sign, and how a number of parts is said to have it.
OUTCOMES = {
    "holds": ("holds", "✓", "hold"),
    "contradicted here": ("contradicted", "✗", "contradicted here"),
    "undecided": ("undecided", "?", "undecided"),
}
# Keys that parts are named after, as the book's other figures call them.
NAMES = {
    "spearman abs": "unsigned ranks", "spearman": "signed ranks", "ssim": "SSIM", "hog": "HOG",
    "gradient": "Gradient", "input x gradient": "Input × Gradient", "integrated gradients": "Integrated Gradients",
    "smoothgrad": "SmoothGrad", "smoothgrad squared": "SmoothGrad²",
    "smoothgrad integrated gradients": "SmoothGrad-IG", "vargrad": "VarGrad",
    "expected gradients": "Expected Gradients", "guided backprop": "Guided Backprop", "deconvnet": "DeconvNet",
    "gradcam": "Grad-CAM", "grad-cam": "Grad-CAM", "guided gradcam": "Guided Grad-CAM",
    "guided grad-cam": "Guided Grad-CAM", "deeplift": "DeepLIFT", "lrp epsilon": "LRP-ε",
    "lrp alpha beta": "LRP-α2β1", "lrp alpha-beta": "LRP-α2β1", "lrp composite": "LRP composite", "lime": "LIME",
    "kernel shap": "KernelSHAP", "cnn": "CNN", "mlp": "MLP", "inception v3": "Inception v3",
    "mobilenet v2": "MobileNet v2",
}  # fmt: skip
LONGEST_FIRST = sorted(NAMES, key=len, reverse=True)
KNOWN = re.compile(rf"(?<![\w-])(?:{'|'.join(map(re.escape, LONGEST_FIRST))})(?![\w-])", re.IGNORECASE)
RESOLUTION = 1 / 4001  # the least p-value of the bootstrap, in cards that do not say whether theirs is a bound
SMALLEST = 1e-4  # a p-value below it says nothing more
INTERVALS = 4.5  # between the numbers of an axis, at most: more would not fit a phone


def html(data: Mapping, **options) -> str:
    """The card with its style: an element that needs nothing else. `options` as for `figure`."""
    return f"<style>{style()}</style>{figure(data, **options)}"


def style() -> str:
    """The style sheet of all cards of a page; it follows the colour of the text around it, light or dark."""
    return " ".join(Path(__file__).with_name("card.css").read_text(encoding="utf-8").split())


def figure(
    data: Mapping,
    *,
    book: str = BOOK,
    cited: str = "",
    history: str = "",
    revised: bool = False,
    note: str = "",
    folded: str = "",
    heading: str = "p",
) -> str:
    """A claim, what its check found, and all its parts on one axis.

    Parameters
    ----------
    data : the fields of `Card` as a mapping. A finding may have `adjusted`, its p-value after Holm's correction.
        Cards of earlier runs have an interval over replicates and one over images in the place of `interval`.
    book : the address of the folder of bibliography and scorecard, from the page that shows the card.
    cited : author and year of the source; without it they are read off the source's key.
    history : the address of the claim's history; without it the claim's line on the scorecard.
    revised : whether the claim was changed after it had been written down, which the card then says.
    note : what is said where there are no findings.
    folded : further HTML under "How it was tested".
    heading : the element of the title, `p` or `h3`.
    """
    findings, id = data["findings"], escape(data.get("id", ""))
    outcomes = {finding["outcome"] for finding in findings}
    kind = OUTCOMES[outcomes.pop()][0] if len(outcomes) == 1 else "mixed" if findings else "unchecked"
    link = history or f"{book}scorecard.html#claim-{id}"
    parts = [
        f'<{heading} class="claim-title">{escape(data["title"])}</{heading}>',
        f'<p class="claim-marks">{marks(findings)}',
        f' <a class="claim-revised" href="{escape(link)}">revised: why</a>' if revised else "",
        f'</p><p>{escape(data["statement"])}</p><p class="claim-source">{_source(data, book, cited)}</p>',
        _plot(data) if findings else f"<p>{escape(note)}</p>" if note else "",
        f"<details><summary>How it was tested</summary><p>{_test(data)}</p>",
        f"<ul>{''.join(_numbers(data, finding) for finding in findings)}</ul>" if findings else "",
        folded or f'<p><a href="{escape(link)}">The history of this claim</a></p>',
        "</details>",
    ]
    return f'<div class="claim-card claim-{kind}" id="claim-{id}">{"".join(parts)}</div>'


def words(name: str) -> str:
    """The name of a part as people say it: "guided_backprop" is Guided Backprop."""
    return KNOWN.sub(lambda match: NAMES[match[0].lower()], name.replace("_", " "))


def p_value(finding: Mapping) -> str:
    """A p-value in words, no more exact than it was measured."""
    p = finding["p_value"]
    bound = finding.get("p_bound", bool(finding.get("images")) and p <= 1.001 * RESOLUTION)
    if not _scatters(finding):
        return "all replicates are equal" + f", p ≤ {p:.2g}" * bound
    return f"p ≤ {p:.2g}" if bound else f"p < {SMALLEST:.4f}" if p < SMALLEST else f"p = {p:.2g}"


def _scatters(finding: Mapping) -> bool:
    return finding.get("scatter", len(set(finding["replicates"])) > 1)


def marks(findings: Sequence[Mapping]) -> str:
    """Each outcome as a word with its sign, and whether it was expected."""
    outcomes = Counter(finding["outcome"] for finding in findings)
    shown = []
    for outcome, count in outcomes.items():
        kind, sign, several = OUTCOMES[outcome]
        if len(outcomes) > 1:
            text = f"{count} {outcome if count == 1 else several}"
        else:
            text = outcome if count == 1 else f"{'both' if count == 2 else f'all {count}'} parts {several}"
        shown.append(f'<span class="claim-outcome claim-{kind}">{_sign(sign)} {text}</span>')
    surprises = sum(finding["outcome"] != finding["expected"] for finding in findings)
    if surprises:
        many = f"{surprises} of {len(findings)} " if len(findings) > 1 else ""
        wanted = f": {escape(findings[0]['expected'])}" if len(findings) == 1 else ""
        shown.append(f'<strong class="claim-unexpected">{_sign("≠")} {many}NOT as expected{wanted}</strong>')
    elif findings:
        shown.append(f'<span class="claim-expected">{_sign("=")} as expected</span>')
    return " ".join(shown)


def _sign(sign: str) -> str:
    return f'<span aria-hidden="true">{sign}</span>'


def _source(data: Mapping, book: str, cited: str) -> str:
    """Author and year, as a link to the reference, the place in it, and what was replicated."""
    key, _, where = data["source"].partition(", ")
    found = re.match(r"([a-z]+)(\d{4}[a-z]?(?![a-z]))|([a-z]+)(\d{4})", key)
    text = cited or (f"{(found[1] or found[3]).capitalize()}, {found[2] or found[4]}" if found else key)
    if key == "this book" or not found:
        return "This book" + f", {escape(where)}" * bool(where)
    return f'<a href="{escape(book)}bibliography.html#cite-{escape(key)}">{escape(text)}</a>, {escape(where)}'


def _span(data: Mapping) -> list[float]:
    return [-data["margin"], data["margin"]] if data["test"] == "equivalent" else [data["margin"]]


def _interval(finding: Mapping) -> Sequence[float]:
    """The interval, in cards of earlier runs the one over replicates; both ends are the mean where nothing scatters."""
    return finding.get("interval") or finding.get("replicate_interval") or [finding["mean"]] * 2


class _Axis:
    """One scale for all parts of a claim: from a value to its place between 0 and 100 %."""

    def __init__(self, data: Mapping):
        self.margins = _span(data)
        values = [0.0, *self.margins]
        for finding in data["findings"]:
            values += [*finding["replicates"], *_interval(finding), finding["mean"]]
        low, high = min(values), max(values)
        reach = (high - low) or 1.0
        self.low, self.width = low - 0.04 * reach, 1.08 * reach
        steps = [step * 10.0 ** (floor(log10(reach)) - 1) for step in (1, 2, 5, 10, 20, 50)]
        self.step = next(step for step in steps if reach / step <= INTERVALS)
        self.digits = max(0, min(4, ceil(2 - log10(reach))))  # a hundredth of what is seen

    def place(self, value: float) -> float:
        return round(100 * (value - self.low) / self.width, 2)

    def ticks(self) -> list[float]:
        first, last = -floor(-self.low / self.step), floor((self.low + self.width) / self.step)
        return [round(k * self.step, 10) + 0.0 for k in range(first, last + 1)]

    def number(self, value: float) -> str:
        return f"{round(value, self.digits) + 0.0:.{self.digits}f}".replace("-", "−")


def _short(value: float) -> str:
    return f"{value:g}".replace("-", "−")


def _plot(data: Mapping) -> str:
    """Names and numbers in HTML, so that they wrap on a phone; between them all parts in one SVG on one axis."""
    axis, findings = _Axis(data), data["findings"]
    rows = "".join(_row(axis, finding, place, len(findings)) for place, finding in enumerate(findings))
    counts = sorted({len(finding["replicates"]) for finding in findings})
    many = " to ".join(str(count) for count in dict.fromkeys((counts[0], counts[-1])))
    key = f"Dots: {many} {escape(data['replicated'])}. Stroke: mean. Bar: 90&nbsp;% interval. Shaded: the claim holds."
    alone = " claim-alone" if len(findings) == 1 and not findings[0]["name"] else ""
    return f'<div class="claim-plot{alone}">{_svg(data, axis)}{rows}</div><p class="claim-key">{key}</p>'


def _row(axis: _Axis, finding: Mapping, place: int, rows: int) -> str:
    kind, sign, _ = OUTCOMES[finding["outcome"]]
    low, high = map(axis.number, _interval(finding))
    spread = f"[{low}, {high}]" if _scatters(finding) else "no scatter"
    row = f'style="grid-row:{place + 1}"'
    surprise = "" if finding["outcome"] == finding["expected"] else f" (expected: {escape(finding['expected'])})"
    said = f'<span class="claim-said">{finding["outcome"]}: </span>' if rows > 1 else ""
    name = f"{said}{escape(words(finding['name']))}{surprise}"
    return (
        f'<div class="claim-name" {row}><span class="claim-{kind}">{_sign(sign)}</span> <span>{name}</span></div>'
        f'<div class="claim-value" {row}><b>{axis.number(finding["mean"])}</b> <span>{spread}</span></div>'
    )


def _svg(data: Mapping, axis: _Axis) -> str:
    """Places across are in per cent and sizes in pixels: the axis stretches with the page and its letters do not."""
    rows, ends = len(data["findings"]), [axis.place(margin) for margin in axis.margins]
    x = sum(ends) / len(ends)
    anchor = "start" if x < 15 else "end" if x > 85 else "middle"
    sign = "±" * (data["test"] == "equivalent")
    margin = f"margin {sign}{_short(data['margin'])}"
    label = f'<text class="claim-limit" x="{x:g}%" y="-.6em" text-anchor="{anchor}">{margin}</text>'
    numbers = [
        f'<text x="{axis.place(tick)}%" y="100%" dy="1.3em" text-anchor="middle">{_short(tick)}</text>'
        for tick in axis.ticks()
    ]
    lines = _lines(axis, ends)
    strips = [_strip(axis, finding, place, 100 / rows, lines) for place, finding in enumerate(data["findings"])]
    return (
        f'<svg role="img" aria-label="{escape(_seen(data, axis))}" width="100%" overflow="visible" '
        f'style="grid-row:1/span {rows}">{label}{"".join(strips)}{"".join(numbers)}</svg>'
    )


def _lines(axis: _Axis, ends: Sequence[float]) -> str:
    """What lies behind every strip: the zone where the claim holds, the lines of the axis, and the margins."""
    left, right = ends[0], ends[1] if len(ends) > 1 else 100
    shapes = [
        f'<rect x="{left}%" width="{round(right - left, 2)}%" height="100%" fill="currentColor" fill-opacity=".08"/>'
    ]
    for tick in axis.ticks():
        x, weight = axis.place(tick), ".6" if tick == 0 else ".15"
        shapes.append(f'<line x1="{x}%" x2="{x}%" y2="100%" stroke="currentColor" stroke-opacity="{weight}"/>')
    shapes += [f'<line class="claim-margin" x1="{x}%" x2="{x}%" y2="100%" stroke-dasharray="4 3"/>' for x in ends]
    return "".join(shapes)


def _strip(axis: _Axis, finding: Mapping, place: int, height: float, lines: str) -> str:
    """The replicates of one part, each outcome with a shape of its own, and over them interval and mean."""
    kind, shapes = OUTCOMES[finding["outcome"]][0], []
    for k, value in enumerate(finding["replicates"]):
        x, up = axis.place(value), (-3.5, 1.5, 4.5, -1)[k % 4]  # dots of one value are told apart
        if kind == "contradicted":
            shape = f'<rect x="{x}%" y="50%" width="6" height="6" transform="translate(-3 {up - 3})"/>'
        else:
            shape = f'<circle cx="{x}%" cy="50%" r="3.5" transform="translate(0 {up})"/>'
        shapes.append(shape)
    low, high, mean = map(axis.place, [*_interval(finding), finding["mean"]])
    where = f'y="{round(place * height, 3)}%" width="100%" height="{round(height, 3)}%"'
    return (
        f'<svg {where}><g class="claim-lines">{lines}</g></svg><svg {where} overflow="visible">'
        f'<g class="claim-strip claim-{kind}" fill="currentColor"><g class="claim-dots">{"".join(shapes)}</g>'
        f'<line x1="{low}%" x2="{high}%" y1="50%" y2="50%" stroke="currentColor" stroke-width="4" '
        f'stroke-linecap="round"/><rect x="{mean}%" y="50%" width="2" height="18" transform="translate(-1 -9)"/>'
        "</g></svg>"
    )


def _seen(data: Mapping, axis: _Axis) -> str:
    """What the picture shows, in a sentence a part."""
    margin = "±" * (data["test"] == "equivalent") + _short(data["margin"])
    sentences = [f"Dots and intervals on one axis, with 0 and the margin {margin} marked."]
    for finding in data["findings"]:
        name = words(finding["name"]) or "The difference"
        low, high = map(axis.number, _interval(finding))
        spread = f"interval {low} to {high}" if _scatters(finding) else "no scatter"
        dots = f"{axis.number(min(finding['replicates']))} to {axis.number(max(finding['replicates']))}"
        sentences.append(f"{name}: {len(finding['replicates'])} dots from {dots}; {spread}, {_where(data, finding)}.")
    return " ".join(sentences)


def _where(data: Mapping, finding: Mapping) -> str:
    low, high = _interval(finding)
    inner, outer = _span(data)[0], _span(data)[-1]
    if data["test"] == "equivalent":
        if inner < low and high < outer:
            return "inside the margins"
        return "outside the margins" if high < inner or low > outer else "across a margin"
    return "above the margin" if low > inner else "below the margin" if high < inner else "across the margin"


def _test(data: Mapping) -> str:
    margin = _short(data["margin"])
    bound = f"lies within ±{margin}" if data["test"] == "equivalent" else f"exceeds {margin}"
    return (
        f"The claim is that the difference {bound}. It holds where the whole interval lies there, is"
        " contradicted where the whole interval lies on the other side of the margin, and is undecided where the"
        " interval lies across. Each end of an interval is a 95 % bound."
    )


def _numbers(data: Mapping, finding: Mapping) -> str:
    """An item of the list: all that the figure leaves out."""
    name = f"<b>{escape(words(finding['name']))}:</b> " if finding["name"] else ""
    axis, replicates = _Axis(data), f"over {len(finding['replicates'])} {escape(data['replicated'])}"

    def said(ends: Sequence[float]) -> str:
        return " to ".join(map(axis.number, ends))

    if not _scatters(finding):
        spread = f"no scatter {replicates}"
    elif finding.get("interval"):
        beside = f" and {finding['units']} {escape(finding['unit'])}" if finding.get("units") else ""
        spread = f"90&nbsp;% interval {said(finding['interval'])} {replicates}{beside}"
    else:
        spread = f"90&nbsp;% interval {said(_interval(finding))} {replicates}"
        if finding.get("image_interval"):
            spread += f", {said(finding['image_interval'])} over {finding['images']} images"
    text = f"{name}mean {axis.number(finding['mean'])}; {spread}; {p_value(finding)}"
    if finding.get("adjusted") is not None:
        text += f", after Holm {finding['adjusted']:.2g}"
        text += ", which no longer holds" if finding["outcome"] == "holds" and finding["adjusted"] >= 0.05 else ""
    if finding["undefined"]:
        values = "value was" if finding["undefined"] == 1 else "values were"
        text += f"; {finding['undefined']} {values} undefined and scored both ways"
    return f"<li>{text}; {finding['outcome']}, expected: {escape(finding['expected'])}.</li>"
