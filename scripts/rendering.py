"""Cards of claims and explorers as the pages show them, drawn from the data in the outputs; used by build_book.py.

The package draws them for a notebook, the build draws them again: a change of their style runs no chapter.
"""

from collections.abc import Callable
from functools import cache
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

CLAIM, EXPLORER = (f"application/vnd.saliency-sanity.{kind}+json" for kind in ("claim", "explorer"))
# The module of the package whose `html(data)` draws data of this type, with nothing but the standard library.
RENDERERS = {CLAIM: Path("helpers/book/claims/card.py"), EXPLORER: Path("helpers/book/explorer/render.py")}


@cache
def _html(path: Path) -> Callable[[dict], str]:
    """The function of a module that is loaded by its path: importing the package would load torch."""
    spec = spec_from_file_location(path.stem, path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.html


def render(root: Path, data: dict) -> None:
    """Put HTML in the place of the data of an output's bundle, if it holds any of ours."""
    for kind in RENDERERS.keys() & data.keys():
        data["text/html"] = _html(root / RENDERERS[kind])(data.pop(kind))
