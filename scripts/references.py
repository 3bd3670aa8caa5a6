"""The bibliography: one file a part in book/references, joined by build_book.py into the one that Sphinx reads."""

import re
from pathlib import Path

from pybtex.database import Entry, parse_string
from pybtex.richtext import Text

FOLDER, JOINED = Path("book/references"), Path("book/references.bib")


def joined(root: Path) -> str:
    """All entries of all parts.

    Raises
    ------
    ValueError
        Two entries have one key; BibTeX itself would silently keep one of them.
    """
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((root / FOLDER).glob("*.bib"))}
    places: dict[str, list[str]] = {}
    for path, text in texts.items():
        for key in re.findall(r"^@\w+\{\s*([^,\s]+)", text, re.MULTILINE):
            places.setdefault(key.lower(), []).append(path.name)
    twice = [f"{key!r} in {' and '.join(names)}" for key, names in places.items() if len(names) > 1]
    if twice:
        raise ValueError(f"{FOLDER} has two entries of one key: {'; '.join(twice)}.")
    return "\n".join(texts.values())


def cited(root: Path) -> dict[str, str]:
    """How the text names each work, by its key: "Adebayo et al., 2018"."""
    return {
        key: f"{_authors(entry)}, {entry.fields['year']}"
        for key, entry in parse_string(joined(root), "bibtex").entries.items()
    }


def _authors(entry: Entry) -> str:
    persons = entry.persons.get("author") or entry.persons["editor"]
    names = [str(Text.from_latex(" ".join(person.prelast_names + person.last_names))) for person in persons[:2]]
    return f"{names[0]} et al." if len(persons) > 2 else " and ".join(names)
