"""The chapters as sources: one template, one style, nothing that would break in Colab."""

import ast
import re
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path
from statistics import median

import nbformat
import pytest
import saliency_sanity
from address import pages, repository, revision
from IPython.core.interactiveshell import InteractiveShell
from run_chapters import chapters, toc_entries

ROOT = Path(__file__).parent.parent
VERSION = saliency_sanity.__version__
NOTEBOOKS = {str(path.with_suffix("")): nbformat.read(ROOT / path, as_version=4) for path in chapters(ROOT)}
PARTS = [
    "You will learn", "You need", "Predict first", "By hand, then the helper", "What can go wrong", "Check yourself",
    "Exercises", "In this chapter", "Key terms", "References",
]  # fmt: skip
each_chapter = pytest.mark.parametrize("name", NOTEBOOKS)


def code(name: str) -> list:
    return [cell for cell in NOTEBOOKS[name].cells if cell.cell_type == "code"]


def prose(name: str) -> str:
    return "\n\n".join(cell.source for cell in NOTEBOOKS[name].cells if cell.cell_type == "markdown")


def lines(cell) -> int:
    return sum(bool(line.strip()) for line in cell.source.splitlines())


def functions(name: str) -> list[str]:
    """Names of the functions and classes that a notebook defines, without methods; lines of IPython are left out."""
    found = []
    for cell in code(name):
        python = "\n".join(re.sub(r"^(\s*)[%!].*", r"\1pass", line) for line in cell.source.splitlines())
        found += [node.name for node in ast.parse(python).body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return found


def test_toc_names_every_notebook():
    on_disk = {str(path.relative_to(ROOT).with_suffix("")) for path in (ROOT / "notebooks").rglob("*.ipynb")}
    assert set(NOTEBOOKS) == {name for name in on_disk if ".ipynb_checkpoints" not in name}


def test_setup_cell_is_the_same_everywhere():
    setups = {name: code(name)[0].source for name in NOTEBOOKS}
    assert len(set(setups.values())) == 1, f"different first code cells: {list(setups)}"
    [setup] = set(setups.values())
    assert f'BOOK = "git+{repository()}@{revision()}"\n' in setup
    assert f'(wanted := "{VERSION}")' in setup
    assert max(map(len, setup.splitlines())) <= 84


def setup_cell(monkeypatch, capsys, version: str, missing: str = "") -> tuple[str, list[str]]:
    """What the first cell prints and what it lets pip install, with another version loaded or a module missing."""
    shell, installed = InteractiveShell(), []

    def pip(line: str) -> None:
        installed.append(line)
        monkeypatch.undo()

    shell.register_magic_function(pip, magic_name="pip")
    monkeypatch.setattr(saliency_sanity, "__version__", version)
    if missing:
        monkeypatch.setitem(sys.modules, missing, None)
    shell.run_cell(code(next(iter(NOTEBOOKS)))[0].source).raise_error()
    assert {"DEVICE", "SEED"} <= set(shell.user_ns)
    return capsys.readouterr().out, installed


def test_setup_cell_is_silent_where_all_is_well(monkeypatch, capsys):
    assert setup_cell(monkeypatch, capsys, VERSION) == ("", [])


def test_setup_cell_says_what_to_do_with_another_version(monkeypatch, capsys):
    said, installed = setup_cell(monkeypatch, capsys, "0.0.1")
    assert not installed and f"needs saliency-sanity {VERSION}; 0.0.1 is loaded" in said
    assert "pip install -e . -e ./assets" in said and "pip uninstall -y saliency-sanity saliency-sanity-assets" in said


@pytest.mark.parametrize("missing", ["saliency_sanity", "saliency_sanity_assets"])
def test_setup_cell_installs_both_where_one_is_missing(monkeypatch, capsys, missing):
    said, installed = setup_cell(monkeypatch, capsys, VERSION, missing)
    book = f"git+{repository()}@{revision()}"
    assert said == "" and installed == [
        f'install -q "saliency-sanity[book] @ {book}"',
        f'install -q "saliency-sanity-assets @ {book}#subdirectory=assets"',
    ]


@each_chapter
def test_is_valid_and_stripped(name):
    nbformat.validate(NOTEBOOKS[name])
    assert NOTEBOOKS[name].metadata.kernelspec.name == "python3"
    assert not [cell.source for cell in code(name) if cell.outputs or cell.execution_count]


@each_chapter
def test_follows_the_template(name):
    found = [re.search(rf"^(#+ |\*\*)?{part}", prose(name), re.MULTILINE) for part in PARTS]
    assert not [part for part, match in zip(PARTS, found) if match is None]
    starts = [match.start() for match in found]
    assert starts == sorted(starts), "the parts of the template are in another order"
    exercises = prose(name)[starts[PARTS.index("Exercises")] :]
    assert exercises.count("<details>") == exercises.count("</details>") >= 2, "solutions are folded away"


@each_chapter
def test_headings_are_in_order(name):
    text = re.sub(r"^```.*?^```", "", prose(name), flags=re.MULTILINE | re.DOTALL)
    levels = [len(marks) for marks in re.findall(r"^(#+) ", text, re.MULTILINE)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in pairwise(levels))


@each_chapter
def test_uses_plain_markdown(name):
    text = prose(name)
    assert not re.findall(r"\{[\w:-]+\}`", text), "a MyST role shows raw in Colab"
    assert not re.findall(r"^(?::::+|```+)\s*\{.*", text, re.MULTILINE), "a MyST directive shows raw in Colab"


@each_chapter
def test_links_to_the_book_name_its_pages(name):
    linked = re.findall(rf"{re.escape(pages(repository()))}([\w/-]+)\.html", prose(name))
    assert set(linked) <= set(toc_entries(ROOT))


@each_chapter
def test_cells_are_short(name):
    lengths = [lines(cell) for cell in code(name)[1:]]  # the first is no part of the argument
    assert max(lengths) <= 25
    assert median(lengths) <= 10


def test_prose_carries_the_argument():
    words = sum(len(prose(name).split()) for name in NOTEBOOKS)
    assert words >= 8 * sum(lines(cell) for name in NOTEBOOKS for cell in code(name))


def test_no_function_is_defined_twice():
    counts = Counter(function for name in NOTEBOOKS for function in functions(name))
    assert not [function for function, count in counts.items() if count > 1], "move it to helpers/"


@each_chapter
def test_figures_have_alt_text_and_caption(name, html):
    executed = nbformat.read(html.parent / "source" / f"{name}.ipynb", as_version=4)
    for number, cell in enumerate(executed.cells, start=1):
        outputs = cell.outputs if cell.cell_type == "code" else []
        pictures = [output for output in outputs if any(mime.startswith("image/") for mime in output.get("data", {}))]
        if pictures:
            about = cell.metadata.get("mystnb", {})
            where = f"{name}, cell {number}"
            assert len(pictures) == 1, f"{where}: one figure a cell"
            assert len(about.get("image", {}).get("alt", "").split()) >= 6, f"{where}: a sentence of alt text"
            assert about.get("figure", {}).get("caption"), f"{where}: a caption"
            assert about["figure"].get("name", "").startswith("fig-"), f"{where}: a name such as fig-cascade"
