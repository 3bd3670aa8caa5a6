"""The picture of a check: from the data of its card to HTML, so that a change of style runs no experiment again."""

from html import escape


def html(data: dict) -> str:
    """The card of a check, given the fields of `Card` as a dictionary: its title, its statement, and each finding with
    one line of dots and the margin marked; green where all is as expected, else red.
    """
    as_expected = all(finding["outcome"] == finding["expected"] for finding in data["findings"])
    colour, word = ("#1b7f3b", "as expected") if as_expected else ("#b3261e", "NOT as expected")
    parts = "".join(_finding(data, finding) for finding in data["findings"])
    return (
        f'<div style="border-left:4px solid {colour};padding:.4em .8em;margin:.5em 0">'
        f"<strong>{escape(data['title'])}</strong> ({word}): {escape(data['statement'])} "
        f"<em>{escape(data['source'])}</em>{parts}</div>"
    )


def _finding(data: dict, finding: dict) -> str:
    margin, above = data["margin"], data["test"] == "above"
    replicates, ends = finding["replicates"], finding["interval"] or [finding["mean"]] * 2
    marks = [margin] if above else [-margin, margin]
    values = [*replicates, *marks, *ends, 0.0]
    low, width = min(values), (max(values) - min(values)) or 1.0

    def x(value: float) -> float:
        return round(10 + 280 * (value - low) / width, 1)

    shapes = [f'<line x1="{x(ends[0])}" x2="{x(ends[1])}" y1="14" y2="14" stroke="currentColor" stroke-width="2"/>']
    shapes += [f'<line x1="{x(m)}" x2="{x(m)}" y1="2" y2="26" stroke="#b35900" stroke-dasharray="3 2"/>' for m in marks]
    shapes += [f'<circle cx="{x(v)}" cy="14" r="4" fill="#2166ac" fill-opacity=".7"/>' for v in replicates]
    name = f"{escape(finding['name'])}: " if finding["name"] else ""
    mean = f"{finding['mean']:.3f}"
    interval = f"90&nbsp;% interval {ends[0]:.3f} to {ends[1]:.3f}" if finding["interval"] else "no scatter"
    units = f" and {finding['units']} {escape(finding['unit'])}" if finding["units"] else ""
    at = "&le;" if finding["p_bound"] else "="
    undefined = finding["undefined"]
    undefined = f"; {undefined} undefined similarities, scored both ways" if undefined else ""
    text = (
        f"{name}<strong>{finding['outcome']}</strong> (expected: {finding['expected']}). "
        f"Difference {'above' if above else 'within &plusmn;'} {margin:g}? Mean {mean}; {interval} over "
        f"{len(replicates)} {escape(data['replicated'])}{units}{undefined}; p {at} {finding['p_value']:.2g}."
    )
    label = f"{len(replicates)} replicates as dots, mean {mean}, {interval.replace('&nbsp;', ' ')}, margin {margin:g}"
    picture = (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 300 28" width="300" height="28" '
        f'style="max-width:100%;display:block">{"".join(shapes)}</svg>'
    )
    return f"<div>{text}{picture}</div>"
