"""The scorecard page: every claim of the book beside what its check found; used by build_book.py.

`book.claims.check` leaves a card in the output of its cell. The cards of the executed chapters are gathered
here and written as Markdown into the places that book/scorecard.md keeps for them.
"""

import os
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from rendering import CLAIM

FOLDER = "helpers/book/claims"
HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted here", "undecided"
LEVEL = 0.05
MOST_UNDECIDED = 0.02  # of all findings, where a decision was expected
FIRST_PAPER = "adebayo2018sanity"


class Chapter(NamedTuple):
    """A chapter that makes claims, those it has dropped, and the cards of its run (`None`: it was not run)."""

    path: Path
    title: str
    claims: list[dict]
    dropped: list[dict]
    cards: list[dict] | None

    @property
    def findings(self) -> list[dict]:
        return [finding for card in self.cards or [] for finding in card["findings"]]


def read(root: Path, ran: dict[Path, Path]) -> list[Chapter]:
    """The chapters that have claims or cards, in the order of `ran`: source notebook -> executed one or `None`."""
    found = []
    for source, executed in ran.items():
        notebook = nbformat.read(executed or root / source, as_version=4)
        outputs = chain.from_iterable(cell.get("outputs", []) for cell in notebook.cells)
        cards = [output["data"][CLAIM] for output in outputs if CLAIM in output.get("data", {})]
        file = root / FOLDER / f"{source.stem}.yml"
        ledger = yaml.safe_load(file.read_text(encoding="utf-8")) if file.exists() else {}
        claims, dropped = ledger.get("claims", []), ledger.get("dropped", [])
        cells = nbformat.read(root / source, as_version=4).cells  # its prose may be newer than its run
        title = next(line[2:] for cell in cells for line in cell.source.splitlines() if line.startswith("# "))
        if claims or dropped or cards:
            found.append(Chapter(source, title, claims, dropped, cards if executed else None))
    return found


def problems(book: Sequence[Chapter]) -> list[str]:
    """A line for each claim not checked, or twice, each card without a claim, and for too many undecided findings."""
    lines = []
    for chapter in book:
        if chapter.cards is None:
            continue
        shown, known = Counter(card["id"] for card in chapter.cards), {claim["id"] for claim in chapter.claims}
        lines += [f"{chapter.path}: {id!r} is claimed, but no card shows its check" for id in known - set(shown)]
        lines += [f"{chapter.path}: the card {id!r} is of no claim" for id in set(shown) - known]
        lines += [f"{chapter.path}: {id!r} has {count} cards" for id, count in shown.items() if count > 1]
    left, findings = undecided(book), sum(len(chapter.findings) for chapter in book)
    if len(left) > MOST_UNDECIDED * findings:
        lines.append(f"{len(left)} of {findings} findings are undecided, more than {100 * MOST_UNDECIDED:g} %")
    return sorted(lines)


def undecided(book: Iterable[Chapter]) -> list[str]:
    """A line for each finding that was expected to be decided and is not."""
    return [
        f"{chapter.path}: {card['id']!r}{finding['name'] and ', ' + finding['name']}: undecided"
        for chapter in book
        for card in chapter.cards or []
        for finding in card["findings"]
        if finding["outcome"] == UNDECIDED != finding["expected"]
    ]


def surprising(finding: dict) -> bool:
    """Whether a strict run stops here: at seed 0 for any other outcome than the expected, else for its opposite."""
    outcome, expected = finding["outcome"], finding["expected"]
    if int(os.environ.get("SANITY_SEED") or 0) == 0:
        return outcome != expected
    return {outcome, expected} == {HOLDS, CONTRADICTED}


def near(card: dict, finding: dict) -> bool:
    """Whether the interval would touch a margin if it were moved by its own length."""
    if not finding["interval"]:
        return False
    low, high = finding["interval"]
    margins = [-card["margin"], card["margin"]] if card["test"] == "equivalent" else [card["margin"]]
    return any(low - (high - low) <= margin <= high + (high - low) for margin in margins)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's adjusted p-values, in the order given."""
    adjusted, largest = [1.0] * len(p_values), 0.0
    for place, i in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - place)))
        adjusted[i] = largest
    return adjusted


def tested(findings: Iterable[dict]) -> list[dict]:
    """The family of Holm's correction: the tests that were expected to hold, fixed before they were run."""
    return [finding for finding in findings if finding["expected"] == HOLDS]


def verdict(findings: Iterable[dict]) -> str:
    """One word for a claim with all its parts."""
    outcomes = {finding["outcome"] for finding in findings}
    return outcomes.pop() if len(outcomes) == 1 else "mixed"


def count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def summary(book: Sequence[Chapter]) -> str:
    """The counts over the whole book, and a table of them by chapter."""
    ran = [chapter for chapter in book if chapter.cards is not None]
    cards = [card for chapter in ran for card in chapter.cards]
    findings = [finding for chapter in ran for finding in chapter.findings]
    outcomes = Counter(finding["outcome"] for finding in findings)
    surprises = sum(finding["outcome"] != finding["expected"] for finding in findings)
    close = sum(near(card, finding) for card in cards for finding in card["findings"])
    family = tested(findings)
    standing = sum(a < LEVEL for chapter in ran for a in holm([f["p_value"] for f in tested(chapter.findings)]))
    of_paper = {claim["id"] for chapter in ran for claim in chapter.claims if claim["source"]["key"] == FIRST_PAPER}
    paper = Counter(verdict(card["findings"]) for card in cards if card["id"] in of_paper)
    lines = [
        f"- **{count(len(cards), 'claim')}** in {count(len(ran), 'chapter')}, some of them with several parts: "
        f"{count(len(findings), 'test')}. Random numbers follow from seed {os.environ.get('SANITY_SEED', '0')}.",
        f"- **Outcomes of the tests:** {outcomes[HOLDS]} hold, {outcomes[CONTRADICTED]} contradicted here, "
        f"{outcomes[UNDECIDED]} undecided. {surprises or 'None'} came out other than expected.",
        f"- **Close calls.** {close} of {len(findings)} findings lie within one interval of their margin: had "
        "their interval been moved by its own length, it could have touched the margin.",
        f"- **Of the 2018 paper** {{cite}}`{FIRST_PAPER}` we test {count(sum(paper.values()), 'claim')}: "
        f"{paper[HOLDS]} reproduced in every part, {paper['mixed']} in some parts and not in others, "
        f"{paper[CONTRADICTED]} contradicted here, {paper[UNDECIDED]} undecided.",
        f"- **False holds.** {len(family)} tests were expected to hold. If every one of them lay just on the wrong "
        f"side of its margin, {LEVEL * len(family):.1f} would hold all the same at the level of {100 * LEVEL:g} %.",
        f"- **Holm's correction** over the tests of each chapter keeps the chance of any false hold in it at "
        f"{100 * LEVEL:g} %, where each test keeps its own level. {standing} of the {len(family)} stand after it.",
        "",
        "| Chapter | Claims | Tests | Hold | Contradicted here | Undecided |",
        "|:--|--:|--:|--:|--:|--:|",
    ]
    for chapter in book:
        found = Counter(finding["outcome"] for finding in chapter.findings)
        numbers = [len(chapter.findings), *(found[outcome] for outcome in (HOLDS, CONTRADICTED, UNDECIDED))]
        cells = numbers if chapter.cards is not None else ["not run", "", "", ""]
        lines.append(f"| [](/{chapter.path}) | {len(chapter.claims)} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def claims(book: Sequence[Chapter]) -> str:
    """Every claim with its findings, chapter by chapter."""
    parts = []
    for chapter in book:
        adjusted = iter(holm([finding["p_value"] for finding in tested(chapter.findings)]))
        cards = {card["id"]: card for card in chapter.cards or []}
        for card in cards.values():
            for finding in tested(card["findings"]):
                finding["adjusted"] = next(adjusted)
        parts += [f"## {chapter.title}", f"[Read the chapter](/{chapter.path})"]
        parts += [_claim(claim, cards.get(claim["id"])) for claim in chapter.claims]
    return "\n\n".join(parts)


def dropped(book: Sequence[Chapter]) -> str:
    """The claims that were given up, chapter by chapter, with dates and reasons."""
    parts = []
    for chapter in book:
        if chapter.dropped:
            parts += [f"**{chapter.title}**", *(_dropped(claim) for claim in chapter.dropped)]
    return "\n\n".join(parts) or "None."


def _claim(claim: dict, card: dict | None) -> str:
    """A claim as a block that can be linked to, `#claim-` and its id."""
    findings = card["findings"] if card else []
    expected = all(finding["outcome"] == finding["expected"] for finding in findings)
    items = "".join(_finding(claim, card["replicated"], finding) for finding in findings)
    return "\n\n".join([
        f"(claim-{claim['id']})=",
        f":::{{div}} claim{'' if expected else ' claim-unexpected'}",
        f"**{claim['title']}.** {claim['statement']}",
        f"{_source_and_test(claim)} Id: `{claim['id']}`.",
        f'<ul class="findings">{items}</ul>' if findings else "Not checked in this copy.",
        f"<details><summary>History</summary>{_history(claim)}</details>",
        ":::",
    ])  # fmt: skip


def _dropped(claim: dict) -> str:
    texts = [f"**{claim['title']}.** {claim['statement']}", f"{_source_and_test(claim)} Id: `{claim['id']}`."]
    return "\n\n".join([":::{div} claim claim-dropped", *texts, _history(claim), ":::"])


def _source_and_test(claim: dict) -> str:
    key, where = claim["source"]["key"], claim["source"]["where"]
    source = f"This book, {where}" if key == "this book" else f"{{cite:t}}`{key}`, {where}"
    test = "exceeds" if claim["test"] == "above" else "lies within ±"
    return f"{source}. Test: the difference {test} {claim['margin']:g}."


def _history(claim: dict) -> str:
    """What became of a claim, event by event, as a list in HTML."""
    items = ""
    for event in claim["history"]:
        what, why = (escape(event.get(part, "")).replace("-&gt;", "→") for part in ("what", "why"))
        stop = "" if what.endswith(".”") else "."
        items += f"<li><time>{event['date']}</time>: {what}{stop}{why and ' ' + why}</li>"
    return f'<ul class="history">{items}</ul>'


def number(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}".replace("-", "−")


def _interval(ends: Sequence[float]) -> str:
    return " to ".join(map(number, ends))


def _finding(claim: dict, replicated: str, finding: dict) -> str:
    """An item of the list: outcome, estimate, interval, p-value, and a picture of the replicates."""
    expected, adjusted = finding["expected"], finding.get("adjusted")
    text = f"{escape(finding['name'])}: " if finding["name"] else ""
    text += f"<strong>{finding['outcome']}</strong>"
    text += ", as expected." if finding["outcome"] == expected else f", <strong>not as expected</strong> ({expected})."
    spread = f"90&nbsp;% interval {_interval(finding['interval'])}" if finding["interval"] else "no scatter"
    text += f" Mean {number(finding['mean'])}; {spread} over {len(finding['replicates'])} {escape(replicated)}"
    if finding["units"]:
        text += f" and {finding['units']} {escape(finding['unit'])}"
    if finding["undefined"]:
        text += f"; {count(finding['undefined'], 'undefined value')}, scored both ways"
    if adjusted is not None:
        text += (
            f". p&nbsp;{'≤' if finding['p_bound'] else '='}&nbsp;{finding['p_value']:.2g}, after Holm {adjusted:.2g}"
        )
        text += ", which no longer holds" if finding["outcome"] == HOLDS and adjusted >= LEVEL else ""
    return f"<li><span>{text}.</span>{_picture(claim, finding)}</li>"


def _picture(claim: dict, finding: dict) -> str:
    """Replicates as dots, their interval as a line, margins dashed."""
    margins = [-claim["margin"], claim["margin"]] if claim["test"] == "equivalent" else [claim["margin"]]
    ends = finding["interval"] or [finding["mean"]] * 2
    values = [*finding["replicates"], *margins, *ends, 0.0]
    low, width = min(values), (max(values) - min(values)) or 1.0

    def x(value: float) -> float:
        return round(8 + 184 * (value - low) / width, 1)

    a, b = map(x, ends)
    shapes = [f'<line x1="{x(0)}" x2="{x(0)}" y1="9" y2="15" stroke="currentColor"/>']
    shapes += [f'<line x1="{a}" x2="{b}" y1="12" y2="12" stroke="currentColor" stroke-width="2"/>']
    shapes += [f'<line class="margin" x1="{x(m)}" x2="{x(m)}" y1="1" y2="23" stroke-dasharray="3 2"/>' for m in margins]
    shapes += [f'<circle cx="{x(value)}" cy="12" r="3.5"/>' for value in finding["replicates"]]
    dots, mean = len(finding["replicates"]), number(finding["mean"])
    label = f"{dots} replicates as dots around {mean}, margin {claim['margin']:g}"
    return f'<svg role="img" aria-label="{label}" viewBox="0 0 200 24" width="200" height="24">{"".join(shapes)}</svg>'
