"""The table of contents, _toc.yml; used by run_chapters.py and scorecard.py."""

from pathlib import Path

import yaml


def toc(root: Path) -> dict:
    """The table of contents as it stands."""
    return yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))


def entries(node: object) -> list[str]:
    """The pages of a table of contents, or of a piece of one, in reading order."""
    if isinstance(node, list):
        return [entry for child in node for entry in entries(child)]
    if isinstance(node, dict):
        here = [node[key] for key in ("root", "file") if key in node]
        return here + [entry for child in node.values() for entry in entries(child)]
    return []
