"""Cards of claims and explorers as the pages show them, drawn from the data in the outputs; used by build_book.py.

The package draws them for a notebook, the build draws them again: a change of their style runs no chapter.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

CLAIM, EXPLORER = (f"application/vnd.saliency-sanity.{kind}+json" for kind in ("claim", "explorer"))
# The module of the package whose `html(data)` draws data of this type, with nothing but the standard library.
RENDERERS = {CLAIM: Path("helpers/book/claims/card.py"), EXPLORER: Path("helpers/book/explorer/render.py")}


@cache
def module(path: Path) -> ModuleType:
    """A module that is loaded by its path: importing the package would load torch."""
    spec = spec_from_file_location(path.stem, path)
    found = module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


def render(root: Path, data: dict, claims: Mapping[str, dict] | None = None) -> None:
    """Put HTML in the place of the data of an output's bundle, if it holds any of ours.

    `claims` has what the pages know of a claim, by its id: options of the function that draws its card.
    """
    for kind in RENDERERS.keys() & data.keys():
        shown = data.pop(kind)
        options = claims.get(shown["id"], {}) if claims and kind == CLAIM else {}
        data["text/html"] = module(root / RENDERERS[kind]).html(shown, **options)
