"""The page of the zoo: the stored table of zoo.py as HTML; used by build_book.py, and free of torch as that is."""

import csv
from collections import Counter
from collections.abc import Mapping
from html import escape
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

FILE = Path("book/zoo.csv")
METHODS = {
    "gradient": "Gradient",
    "integrated_gradients": "Integrated Gradients",
    "smoothgrad": "SmoothGrad",
    "guided_backprop": "Guided Backprop",
    "gradcam": "Grad-CAM",
    "deeplift": "DeepLIFT",
    "lrp_composite": "LRP composite",
    "occlusion": "Occlusion",
}
SIGNS = {"right": "✓", "yes": "✓", "refused": "–"}  # the words stay for those who listen
RANDOMISATION = {"stages": "Stages", "cascade": "Nothing left as trained", "run": "Check runs"}


class Row(NamedTuple):
    """A line of the stored table, as zoo.py writes it."""

    library: str
    network: str
    pixels: str
    check: str
    outcome: str
    deviation: str
    says: str


def read(root: Path) -> list[Row]:
    with (root / FILE).open(encoding="utf-8", newline="") as file:
        head, *lines = csv.reader(file)
    if head != list(Row._fields):
        raise ValueError(f"{FILE} has the columns {head}, not those that scripts/zoo.py writes.")
    return [Row(*line) for line in lines]


def summary(rows: list[Row]) -> str:
    """The counts, and the versions they are of."""
    of_methods = [row for row in rows if row.check in METHODS]
    found = Counter(row.outcome for row in of_methods)
    libraries = list(dict.fromkeys(row.library for row in rows))
    networks = {row.network for row in rows}
    rest = sum(count for outcome, count in found.items() if outcome not in ("right", "refused"))
    return (
        f"{len(networks)} networks, {len(METHODS)} methods, {len(of_methods)} cells: **{found['right']} right**, "
        f"**{found['refused']} refused**, {rest or 'none'} wrong or unclear. Tested with {', '.join(libraries[:-1])} "
        f"and {libraries[-1]}."
    )


def _cell(check: str, row: Row) -> str:
    """A cell of the table: a word, or a number of stages."""
    _, _, undefined = row.says.partition("undefined at ")
    if check not in RANDOMISATION or row.outcome != "right":
        word = row.outcome
    elif undefined:
        word = f"{len(undefined.split(', '))} undefined"
    else:
        word = row.says if check == "stages" else "yes"
    if sign := SIGNS.get(word):
        word = f'<span aria-hidden="true">{sign}</span><span class="visually-hidden">{word}</span>'
    return f'<td class="zoo-{row.outcome}">{word}</td>'


def table(rows: list[Row], checks: Mapping[str, str], caption: str) -> str:
    """One row a network, one column a check, grouped by library. The names stay in sight when it scrolls."""
    head = "".join(f'<th scope="col">{escape(title)}</th>' for title in checks.values())
    name = f"zoo-{next(iter(checks))}"
    lines = [
        f'<div class="pst-scrollable-table-container zoo" role="region" aria-labelledby="{name}" tabindex="0">',
        '<table class="table">',
        f'<caption id="{name}">{caption}</caption>',
        f'<thead><tr><th scope="col">Network</th>{head}</tr></thead>',
    ]
    for library, of_library in groupby(rows, key=lambda row: row.library):
        lines.append(f'<tbody><tr><th scope="rowgroup" colspan="{len(checks) + 1}">{escape(library)}</th></tr>')
        for network, found in groupby(of_library, key=lambda row: row.network):
            by_check = {row.check: row for row in found}
            cells = "".join(_cell(check, by_check[check]) for check in checks)
            lines.append(f'<tr><th scope="row">{escape(network)}</th>{cells}</tr>')
        lines.append("</tbody>")
    return "\n".join([*lines, "</table>", "</div>"])


def refusals(rows: list[Row]) -> str:
    """What each method says where it refuses, and of how many networks, the commonest first."""
    lines = []
    for check, title in (METHODS | RANDOMISATION).items():
        said = Counter(row.says for row in rows if row.check == check and row.outcome == "refused")
        if said:
            items = [f"  - “{escape(text)}” ({count})" for text, count in said.most_common()]
            lines.append("\n".join([f"- **{title}**", *items]))
    return "\n".join(lines) or "None."


def parts(root: Path) -> dict[str, str]:
    """What is written into book/zoo.md, by place."""
    rows = read(root)
    return {
        "zoo: summary": summary(rows),
        "zoo: methods": table(rows, METHODS, "✓ right, – refuses."),
        "zoo: randomisation": table(
            rows,
            RANDOMISATION,
            "✓ holds, – refuses. Undefined are stages at which the random network has no map to compare.",
        ),
        "zoo: refusals": refusals(rows),
    }
