"""The scorecard: every claim of the book beside what its check found; used by build_book.py.

`book.claims.check` leaves a card in the output of its cell. The cards of the executed chapters are gathered here and
drawn again: one page a part of the book has them with their histories, and book/scorecard.md the counts and a line for
each claim. What is written goes into the places that these pages keep for it.
"""

import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from itertools import chain
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from contents import entries, toc
from rendering import CLAIM, RENDERERS, module

FOLDER = "helpers/book/claims"
HERE = Path(__file__).resolve().parent
CARD = module(HERE.parent / RENDERERS[CLAIM])
OVERVIEW = Path("book/scorecard.md")
HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted here", "undecided"
LEVEL = 0.05
MOST_UNDECIDED = 0.02  # of all findings, where a decision was expected
FIRST_PAPER = "adebayo2018sanity"
FILTERED = {  # what a claim can be looked for by: the words of the filter, and the mark of an entry
    "a part holds": HOLDS, "a part is contradicted here": CONTRADICTED, "a part is undecided": UNDECIDED,
    "not as expected": "surprise", "revised": "revised", "not checked in this copy": "unchecked", "dropped": "dropped",
}  # fmt: skip


class Chapter(NamedTuple):
    """A chapter that makes claims, those it has dropped, and the cards of its run (`None`: it was not run)."""

    path: Path
    title: str
    part: str
    claims: list[dict]
    dropped: list[dict]
    cards: list[dict] | None

    @property
    def findings(self) -> list[dict]:
        return [finding for card in self.cards or [] for finding in card["findings"]]

    @property
    def page(self) -> Path:
        """The page of the scorecard that has this chapter's claims."""
        return Path("book/scorecard", re.sub(r"\W+", "_", self.part.lower()).strip("_") + ".md")


class Entry(NamedTuple):
    """A claim of the ledger with its chapter and the findings of its card, each with its p-value after Holm."""

    chapter: Chapter
    claim: dict
    card: dict | None
    dropped: bool

    @property
    def findings(self) -> list[dict]:
        return self.card["findings"] if self.card else []

    @property
    def revised(self) -> bool:
        return len(self.claim["history"]) > 1 + self.dropped

    @property
    def kinds(self) -> list[str]:
        """The marks, of `FILTERED`, under which it is found."""
        kinds = [kind for kind in (HOLDS, CONTRADICTED, UNDECIDED) if kind in {f["outcome"] for f in self.findings}]
        kinds += ["surprise"] * any(finding["outcome"] != finding["expected"] for finding in self.findings)
        kinds += ["revised"] * self.revised
        return kinds + (["dropped"] if self.dropped else ["unchecked"] * (not self.findings))


def read(root: Path, ran: dict[Path, Path]) -> list[Chapter]:
    """The chapters that have claims or cards, in the order of `ran`: source notebook -> executed one or `None`."""
    found, part_of = [], {}
    for part in toc(root).get("parts", []):
        part_of |= {Path(f"{entry}.ipynb"): part["caption"] for entry in entries(part)}
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
            part = part_of.get(source, "Claims")
            found.append(Chapter(source, title, part, claims, dropped, cards if executed else None))
    return found


def pageless(book: Iterable[Chapter], pages: Iterable[str]) -> list[str]:
    """A line for each part of the book whose claims no page of the table of contents, `pages`, shows."""
    wanted = {chapter.part: chapter.page for chapter in book}
    return [
        f"the claims of the part {part!r} have no page: write {page}, and list it under {OVERVIEW} in _toc.yml"
        for part, page in wanted.items()
        if page.with_suffix("").as_posix() not in set(pages)
    ]


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
    if not finding.get("interval"):
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
    ]
    parts = {f"[{chapter.part}](/{chapter.page})": [] for chapter in book}
    for chapter in book:
        parts[f"[{chapter.part}](/{chapter.page})"].append(chapter)
    return "\n".join(lines) + "\n" + _table("Part", parts)


def _table(first: str, rows: Mapping[str, Sequence[Chapter]]) -> str:
    """The numbers of claims, tests and outcomes of some chapters in each row."""
    lines = [f"| {first} | Claims | Tests | Hold | Contradicted here | Undecided |", "|:--|--:|--:|--:|--:|--:|"]
    for name, chapters in rows.items():
        findings = [finding for chapter in chapters for finding in chapter.findings]
        found = Counter(finding["outcome"] for finding in findings)
        numbers = [len(findings), *(found[outcome] for outcome in (HOLDS, CONTRADICTED, UNDECIDED))]
        cells = ["not run", "", "", ""] if all(chapter.cards is None for chapter in chapters) else numbers
        lines.append(f"| {name} | {sum(len(c.claims) for c in chapters)} | {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def entries_of(chapter: Chapter) -> list[Entry]:
    """The claims of a chapter in the order of its ledger, those that were dropped last."""
    adjusted = iter(holm([finding["p_value"] for finding in tested(chapter.findings)]))
    cards = {}
    for card in chapter.cards or []:
        findings = [f | {"adjusted": next(adjusted) if f["expected"] == HOLDS else None} for f in card["findings"]]
        cards[card["id"]] = card | {"findings": findings}
    live = [Entry(chapter, claim, cards.get(claim["id"]), dropped=False) for claim in chapter.claims]
    return live + [Entry(chapter, claim, None, dropped=True) for claim in chapter.dropped]


def pages(book: Sequence[Chapter], cited: Mapping[str, str]) -> dict[Path, dict[str, str]]:
    """What the pages say, by page and place; `cited` has how the text names each work, by its key."""
    written = {OVERVIEW: {"scorecard: summary": summary(book), "scorecard: index": index(book, cited)}}
    for page in dict.fromkeys(chapter.page for chapter in book):
        chapters = [chapter for chapter in book if chapter.page == page]
        written[page] = {"scorecard: claims": part(chapters, cited)}
    return written


def index(book: Sequence[Chapter], cited: Mapping[str, str]) -> str:
    """A line for every claim, part by part, that leads to its card; links to `#claim-` and its id end here."""
    texts, shown = [], [entry for chapter in book for entry in entries_of(chapter)]
    for name in dict.fromkeys(chapter.part for chapter in book):
        rows = "".join(_line(entry, cited) for entry in shown if entry.chapter.part == name)
        head = "".join(f'<th scope="col">{word}</th>' for word in ("Claim", "Source", "Outcome"))
        table = f'<table class="claim-index"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        texts += [f"### {name}", _raw(table)]
    return "\n\n".join([_raw(_filter("Part", [e.chapter.part for e in shown], shown, cited)), *texts])


def part(chapters: Sequence[Chapter], cited: Mapping[str, str]) -> str:
    """Every claim of a part of the book with its card, chapter by chapter, and those that were dropped."""
    shown = [entry for chapter in chapters for entry in entries_of(chapter)]
    texts = [
        _table("Chapter", {f"[](/{chapter.path})": [chapter] for chapter in chapters}),
        _raw(_filter("Chapter", [entry.chapter.title for entry in shown], shown, cited)),
    ]
    for chapter in chapters:
        texts += [f"## {chapter.title}", f"[Read the chapter](/{chapter.path})"]
        texts += [_raw(_card(entry, cited)) for entry in shown if entry.chapter == chapter]
    return "\n\n".join([_raw(f"<style>{CARD.style()}</style>"), *texts])


def options(book: Iterable[Chapter], cited: Mapping[str, str]) -> dict[str, dict]:
    """How the chapters draw the cards of their claims: what `card.figure` takes beside the data, by the claim's id."""
    found = {}
    for entry in chain.from_iterable(map(entries_of, book)):
        home, id = "../" * (len(entry.chapter.path.parts) - 1), entry.claim["id"]
        found[id] = {
            "book": f"{home}book/",
            "cited": cited.get(entry.claim["source"]["key"], ""),
            "history": f"{home}{entry.chapter.page.with_suffix('.html').as_posix()}#history-{id}",
            "revised": entry.revised,
        }
    return found


def _raw(html: str) -> str:
    return f"```{{raw}} html\n{html}\n```"


def _source(claim: dict, cited: Mapping[str, str]) -> str:
    """Author and year of a claim's source."""
    key = claim["source"]["key"]
    return "This book" if key == "this book" else cited.get(key, key)


def _attributes(entry: Entry, group: str, cited: Mapping[str, str]) -> str:
    """What the filter looks at."""
    values = {"group": group, "source": _source(entry.claim, cited), "outcome": "|".join(entry.kinds)}
    return " ".join(f'data-{name}="{escape(value)}"' for name, value in values.items())


def _filter(what: str, groups: Iterable[str], shown: Sequence[Entry], cited: Mapping[str, str]) -> str:
    """Form controls that leave some claims, and the script that makes them work; without it all claims are shown."""
    sources = sorted({_source(entry.claim, cited) for entry in shown}, key=lambda name: (name != "This book", name))
    kinds = {kind for entry in shown for kind in entry.kinds}
    choices = {
        "group": (what, {name: name for name in groups}),
        "source": ("Source", {name: name for name in sources}),
        "outcome": ("Outcome", {words: kind for words, kind in FILTERED.items() if kind in kinds}),
    }
    controls = ""
    for name, (label, values) in choices.items():
        shut = "".join(f'<option value="{escape(value)}">{escape(words)}</option>' for words, value in values.items())
        controls += f'<label>{label} <select name="{name}"><option value="">all</option>{shut}</select></label>'
    script = (HERE / "scorecard.js").read_text(encoding="utf-8")
    return (
        f'<form class="claim-filter" role="search" aria-label="Filter the claims" hidden>{controls}'
        '<button type="reset">Show all</button><output aria-live="polite"></output></form>'
        f"<script>{' '.join(script.split())}</script>"
    )


def _line(entry: Entry, cited: Mapping[str, str]) -> str:
    """A row of the overview."""
    id, address = entry.claim["id"], entry.chapter.page.relative_to("book").with_suffix(".html").as_posix()
    marks = CARD.marks(entry.findings) or ("dropped" if entry.dropped else "not checked in this copy")
    return (
        f'<tr id="claim-{id}" {_attributes(entry, entry.chapter.part, cited)}><th scope="row">'
        f'<a href="{address}#claim-{id}">{escape(entry.claim["title"])}</a></th>'
        f"<td>{escape(_source(entry.claim, cited))}</td><td>{marks}</td></tr>"
    )


def _card(entry: Entry, cited: Mapping[str, str]) -> str:
    """A claim as a block that can be linked to, `#claim-` and its id, with its history folded."""
    chapter, claim = entry.chapter, entry.claim
    id, source = claim["id"], claim["source"]
    said = {name: claim[name] for name in ("id", "title", "statement", "test", "margin")}
    data = {"findings": [], "replicated": ""} | (entry.card or {}) | said
    data["source"] = f"{source['key']}, {source['where']}"
    note = f"Dropped on {claim['history'][-1]['date']}." if entry.dropped else "Not checked in this copy."
    address = f"../../{chapter.path.with_suffix('.html').as_posix()}" + f"#claim-{id}" * bool(entry.card)
    where = f'<a href="{address}">In its chapter</a>, where its name is <code>{id}</code>.'
    figure = CARD.figure(
        data,
        book="../",
        cited=cited.get(source["key"], ""),
        history=f"#history-{id}",
        revised=entry.revised or entry.dropped,
        note=note,
        folded=f'<p>{where}</p><p id="history-{id}">History:</p>{_history(claim)}',
        heading="h3",
    )
    return f'<div class="claim-entry" {_attributes(entry, chapter.title, cited)}>{figure}</div>'


def _history(claim: dict) -> str:
    """What became of a claim, event by event, as a list in HTML."""
    items = ""
    for event in claim["history"]:
        what, why = (escape(event.get(part, "")).replace("-&gt;", "→") for part in ("what", "why"))
        stop = "" if what.endswith(".”") else "."
        items += f"<li><time>{event['date']}</time>: {what}{stop}{why and ' ' + why}</li>"
    return f'<ul class="history">{items}</ul>'
