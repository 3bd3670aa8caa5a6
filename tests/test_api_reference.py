"""The reference of the package: nothing public is left out, and docstrings become legible Markdown."""

import ast
import importlib
import inspect
import re
from pathlib import Path

import api_reference
import pytest
from saliency_sanity import saliency, similarity

ROOT = Path(__file__).parent.parent
ENTRIES = {name for _, found in api_reference.entries(ROOT).values() for name in found}
PAGE = api_reference.reference(ROOT)


def test_every_entry_is_there_to_be_used():
    for entry in ENTRIES:
        module, name = entry.rsplit(".", 1)
        assert hasattr(importlib.import_module(f"saliency_sanity.{module}"), name), entry


def test_methods_and_metrics_are_all_described():
    names = {f"similarity.{name}" for name in similarity.METRICS}
    for method in saliency.METHODS.values():
        controls = method.__module__ == "saliency_sanity.saliency.controls"
        names.add(f"saliency.{'controls.' * controls}{method.__name__}")
    assert names <= ENTRIES


def test_what_the_chapters_use_is_described():
    modules = "|".join({entry.split(".")[0] for entry in ENTRIES})
    used = set()
    for path in (ROOT / "notebooks").rglob("*.ipynb"):
        used |= set(re.findall(rf"\b((?:{modules})\.[a-z]\w*)\(", path.read_text(encoding="utf-8")))
    functions = {
        name
        for name in used
        if inspect.isroutine(
            getattr(importlib.import_module(f"saliency_sanity.{name.split('.')[0]}"), name.split(".")[1], None)
        )
    }
    assert len(functions) > 20 and functions <= ENTRIES


def test_what_stays_inside_exists():
    everything = set()
    for path in (ROOT / "helpers").rglob("*.py"):
        module = ".".join(path.relative_to(ROOT / "helpers").with_suffix("").parts).removesuffix(".__init__")
        names = {node.name for node in ast.parse(path.read_text(encoding="utf-8")).body if hasattr(node, "name")}
        everything |= {module} | {f"{module}.{name}" for name in names}
        everything |= {f"saliency.{name}" for name in names if module.startswith("saliency.")}  # handed on
    assert everything >= api_reference.INSIDE


def test_every_entry_says_what_it_is():
    for entry in re.split(r"^### ", PAGE, flags=re.MULTILINE)[1:]:
        assert re.search(r"^```\n\n\S.{15}", entry, re.MULTILINE), entry[:60]


SOURCE = '''
def method(model: Module, images, *, steps: int = 50, **options) -> Tensor:
    """One line about it.

    More about it,
    on two lines.

    Parameters
    ----------
    model, images : what is explained,
        in short.
    steps : a number.

    Raises
    ------
    ValueError
        Too few.
    """
'''


def test_a_function_as_markdown():
    [function] = ast.parse(SOURCE).body
    assert api_reference.documentation(ast.get_docstring(function)) == (
        "One line about it.\n\nMore about it,\non two lines.\n\n**Parameters**\n\n"
        "`model`, `images`\n: what is explained, in short.\n\n`steps`\n: a number.\n\n"
        "**Raises**\n\n`ValueError`\n: Too few."
    )
    assert api_reference.signature(function) == (
        "```python\nmethod(\n    model: Module,\n    images,\n    *,\n    steps: int = 50,\n    **options,\n"
        ") -> Tensor\n```"
    )


@pytest.mark.parametrize(
    ("source", "shown"),
    [
        ("def f(a, b=1): pass", "f(a, b=1)"),
        ("def f(b: int, *rest): pass", "f(b: int, *rest)"),
        (
            "class C(NamedTuple):\n    '''Doc.'''\n    x: int\n    y: str = 'a'",
            "class C:\n    x: int\n    y: str = 'a'",
        ),
        ("class E(ValueError): pass", "class E"),
    ],
)
def test_signatures(source, shown):
    assert api_reference.signature(ast.parse(source).body[0]) == f"```python\n{shown}\n```"


def test_aligned_lists_become_definitions():
    assert api_reference.prose("Two:\n\n`a`     first\n`b`, `c`  second") == (
        "Two:\n\n`a`\n: first\n\n`b`, `c`\n: second"
    )
