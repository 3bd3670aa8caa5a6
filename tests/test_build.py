"""Running the chapters: what runs again after a change, what a failing cell leaves, and how a build is stopped."""

import functools
import importlib.metadata
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import build_book
import cache
import made
import nbformat
import psutil
import pytest
import run_chapters
from address import pages
from rendering import CLAIM, EXPLORER, render

ROOT = Path(__file__).parent.parent
SCRIPTS = ROOT / "scripts"
ONE, TWO, THREE = (Path(f"notebooks/part/{name}.ipynb") for name in ("one", "two", "three"))
ADDRESS = "https://github.com/Ann/b"
SETUP = """try:
    from saliency_sanity import __version__
except ModuleNotFoundError:
    %pip install -q "saliency-sanity[book] @ git+ADDRESS@main"
if __version__ != (wanted := "0.2.0.dev0"):
    print(f"This chapter belongs to saliency-sanity {wanted}.")""".replace("ADDRESS", ADDRESS)
# The chapters run with the real package and are cached by this one: imports that it alone has stand in a function.
CODE = {
    ONE: [
        SETUP,
        "def later():\n    from saliency_sanity import alpha\n    from saliency_sanity.book import explorer",
        "from saliency_sanity.book.assets import listed, locate\nlocate('digits.npz').name, len(listed('textures'))",
        "%matplotlib inline\n1 + 1",
    ],
    TWO: [SETUP, "def later():\n    import saliency_sanity.saliency as s\n    from saliency_sanity.book import claims"],
    THREE: [SETUP, "import os\nos.environ['OMP_NUM_THREADS'], os.environ['SANITY_STATIC']"],
}
PACKAGE = {
    "__init__.py": '__version__ = "0.2.0"\n__all__ = ["alpha", "saliency"]\ndef __getattr__(name):\n'
    '    if name in __all__:\n        return import_module(f"{__name__}.{name}")\n',
    "alpha.py": "def f():\n    from . import gamma\n",
    "gamma.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .unused import X\n",
    "unused.py": "",
    "saliency/__init__.py": "from .lrp import lrp\n",
    "saliency/lrp.py": 'def lrp():\n    return import_module(".rules", __package__)\n',
    "saliency/rules.py": "from ..gamma import x\n",
    "book/__init__.py": "",
    "book/assets.py": "",
    "book/claims/__init__.py": "from .card import html\n",
    "book/claims/card.py": "def html(data):\n    return f'<b>{data}</b>'\n",
    "book/claims/one.yml": "claims: []\n",
    "book/claims/two.yml": "claims: []\n",
    "book/explorer/__init__.py": "from . import render\n",
    "book/explorer/render.py": "def html(data):\n    return f'<i>{data}</i>'\n",
    "book/explorer/explorer.css": "",
}
PROJECT = f"""[project]
name = "saliency-sanity"
dependencies = ["pandas"]
optional-dependencies = {{lrp = ["zennit"], book = ["saliency-sanity[lrp]", "pyyaml"]}}
urls.Repository = "{ADDRESS}"
"""


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def change(path: Path, old: str, new: str) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    write(path, text.replace(old, new))


def write_chapter(root: Path, chapter: Path, *sources: str, prose="# Title", **metadata) -> None:
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    cells[-1].metadata.update(metadata)
    cells.insert(1, nbformat.v4.new_markdown_cell(prose, id="prose"))
    (root / chapter).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / chapter)


def new_book(root: Path, code: dict[Path, list[str]]) -> Path:
    parts = "".join(f"  - file: {chapter.with_suffix('').as_posix()}\n" for chapter in code)
    write(root / "_toc.yml", f"format: jb-book\nroot: book/index\nchapters:\n{parts}")
    write(root / "pyproject.toml", PROJECT)
    write(root / cache.MANIFEST, "1  digits.npz\n2  clothes.npz\n3  textures/brick.png\n")
    for name, text in PACKAGE.items():
        write(root / "helpers" / name, text)
    for chapter, sources in code.items():
        write_chapter(root, chapter, *sources)
    return root


def run(root: Path) -> dict[Path, run_chapters.Run]:
    runs, failures = run_chapters.run_chapters(root, run_chapters.chapters(root))
    assert failures == []
    return runs


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    """A book of three chapters that have run."""
    root = new_book(tmp_path_factory.mktemp("book"), CODE)
    run(root)
    return root


@pytest.fixture
def book(done, tmp_path, monkeypatch) -> Path:
    """A copy of it."""
    for name in ("SANITY_SEED", "SANITY_STRICT"):
        monkeypatch.delenv(name, raising=False)
    return shutil.copytree(done, tmp_path / "book")


def stale(root: Path) -> set[Path]:
    """The chapters that would run."""
    around = cache.surroundings(root)
    return {chapter for chapter in run_chapters.chapters(root) if not run_chapters.kept_run(root, chapter, around)}


def outputs(path: Path) -> list[list[str]]:
    cells = run_chapters.code_cells(nbformat.read(path, as_version=4))
    return [[output.data["text/plain"] for output in cell.outputs] for cell in cells]


def build(root: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "build_book.py", "--root", root, "--no-html", *options]
    return subprocess.run(command, capture_output=True, text=True)


def kept_files(root: Path) -> list[Path]:
    return [path for path in (root / "_build/executed").rglob("*") if path.is_file()]


# What runs again


def test_nothing_runs_again_when_nothing_changed(book, capsys):
    assert stale(book) == set()
    before = {chapter: one.path.stat().st_mtime_ns for chapter, one in run(book).items()}
    assert capsys.readouterr().out.count("(unchanged)") == 3
    assert {chapter: one.path.stat().st_mtime_ns for chapter, one in run(book).items()} == before


def test_a_changed_sentence_or_caption_runs_nothing(book):
    write_chapter(book, ONE, *CODE[ONE], prose="# Another title", tags=["hide-input"], alt="what it shows")
    assert stale(book) == set()


def test_a_tag_that_the_execution_heeds_runs_the_chapter(book):
    write_chapter(book, ONE, *CODE[ONE], tags=["raises-exception"])
    assert stale(book) == {ONE}


def test_changed_code_runs_its_chapter(book):
    write_chapter(book, ONE, *CODE[ONE][:-1], "2 + 2")
    assert stale(book) == {ONE}


@pytest.mark.parametrize("old, new", [("@main", "@v0.3"), ("github.com/Ann", "github.com/Bob"), ("0.2.0.dev0", "0.3")])
def test_address_reference_and_version_in_the_setup_cell_run_nothing(book, old, new):
    for chapter, (setup, *rest) in CODE.items():
        assert old in setup
        write_chapter(book, chapter, setup.replace(old, new), *rest)
    assert stale(book) == set()


def test_other_changes_of_the_setup_cell_run_the_chapter(book):
    write_chapter(book, THREE, CODE[THREE][0] + "\nSEED = 1", *CODE[THREE][1:])
    assert stale(book) == {THREE}


@pytest.mark.parametrize(
    ("name", "users"),
    {
        "alpha.py": {ONE},
        "gamma.py": {ONE, TWO},  # imported in a function, and by the rules of LRP
        "saliency/lrp.py": {TWO},
        "saliency/rules.py": {TWO},  # by import_module
        "book/assets.py": {ONE},
        "book/__init__.py": {ONE, TWO},
        "book/explorer/__init__.py": {ONE},
        "book/claims/__init__.py": {TWO},
        "__init__.py": {ONE, TWO, THREE},
        "unused.py": set(),  # for a type checker only
        "book/claims/card.py": set(),  # these draw, and the build draws again
        "book/explorer/render.py": set(),
        "book/explorer/explorer.css": set(),
    }.items(),
)
def test_a_changed_file_of_the_package_runs_those_who_use_it(book, name, users):
    write(book / "helpers" / name, PACKAGE[name] + "# changed\n")
    assert stale(book) == users


def test_a_changed_claim_runs_its_chapter_and_its_history_nothing(book):
    claim = "claims:\n- id: a\n  margin: .1\n  history: []\n"
    write(book / "helpers/book/claims/one.yml", claim)
    assert stale(book) == {ONE}
    first = run_chapters.key(book, ONE, cache.surroundings(book))
    for old, new, same in (
        ("[]", "[{what: written down}]", True),
        ("claims:", "dropped: []\nclaims:", True),
        (".1", ".2", False),
    ):
        write(book / "helpers/book/claims/one.yml", claim.replace(old, new))
        assert (run_chapters.key(book, ONE, cache.surroundings(book)) == first) == same


def test_another_version_of_the_package_runs_nothing(book):
    change(book / "helpers/__init__.py", '"0.2.0"', '"0.3.0"')
    assert stale(book) == set()


def test_a_first_claims_file_and_one_that_goes_run_the_chapter(book):
    write(book / "helpers/book/claims/three.yml", "claims: []\n")
    (book / "helpers/book/claims/two.yml").unlink()
    assert stale(book) == {TWO, THREE}


@pytest.mark.parametrize(
    ("old", "new", "users"),
    [
        ("1  digits.npz", "9  digits.npz", {ONE}),
        ("1  digits.npz\n", "", {ONE}),
        ("2  clothes.npz", "9  clothes.npz", set()),
        ("3  textures/brick.png", "9  textures/brick.png", set()),  # its name was read, its content was not
        ("3  textures/brick.png", "3  textures/brick.png\n4  textures/grass.png", {ONE}),
    ],
)
def test_a_changed_asset_runs_those_who_opened_it(book, old, new, users):
    before = (book / cache.MANIFEST).read_text(encoding="utf-8")
    change(book / cache.MANIFEST, old, new)
    assert stale(book) == users
    write(book / cache.MANIFEST, before)
    assert stale(book) == set()


@pytest.mark.parametrize("name, value", [("SANITY_SEED", "7"), ("SANITY_ONLINE", "1")])
def test_other_settings_run_all(book, monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert stale(book) == set(CODE)


def test_the_seed_that_is_meant_where_none_is_given_runs_nothing(book, monkeypatch):
    monkeypatch.setenv("SANITY_SEED", "0")
    assert stale(book) == set()


@pytest.mark.parametrize(
    ("name", "users"),
    [
        ("pandas", set(CODE)),
        ("python-dateutil", set(CODE)),  # needed by pandas
        ("zennit", set(CODE)),  # by the extra of an extra
        ("ipykernel", set(CODE)),
        ("pytest", set()),
        ("sphinx", set()),
        ("saliency-sanity", set()),
    ],
)
def test_a_version_runs_all_if_chapters_can_import_it(book, monkeypatch, name, users):
    class Newer(importlib.metadata.PathDistribution):
        version = "99"

    def distribution(wanted: str) -> importlib.metadata.Distribution:
        found = importlib.metadata.distribution(wanted)
        return Newer(found._path) if wanted == name else found

    monkeypatch.setattr(cache, "distribution", distribution)
    assert stale(book) == users


@pytest.mark.parametrize(
    ("outcome", "first", "again"), [("undecided", "0", True), ("undecided", "1", False), ("holds", "0", False)]
)
def test_what_ran_without_strictness_does_not_slip_through_a_strict_build(tmp_path, monkeypatch, outcome, first, again):
    card = {"id": "a", "findings": [{"outcome": outcome, "expected": "holds"}]}
    show = f"from IPython.display import display\ndisplay({{{CLAIM!r}: {card}, 'text/plain': 'a'}}, raw=True)"
    new_book(tmp_path, {ONE: [show]})
    monkeypatch.setenv("SANITY_STRICT", first)
    run(tmp_path)
    assert stale(tmp_path) == set()
    monkeypatch.setenv("SANITY_STRICT", "1")
    assert stale(tmp_path) == ({ONE} if again else set())


def test_the_closure_holds_all_that_an_import_loads():
    """Each module of the real package is imported in a fresh state; what came with it must be in its closure."""
    known = cache.modules(ROOT)
    program = """import sys
    for name in sys.argv[1:]:
        for old in [one for one in sys.modules if one.split(".")[0] == "saliency_sanity"]:
            del sys.modules[old]
        __import__(name)
        print(name, *(one for one in sys.modules if one.split(".")[0] == "saliency_sanity"))
    """.replace("\n    ", "\n")
    ran = subprocess.run([sys.executable, "-c", program, *known], capture_output=True, text=True, check=True)
    drawing = {".".join(["saliency_sanity", *path.with_suffix("").parts[1:]]) for path in cache.RENDERERS.values()}
    lines = [line.split() for line in ran.stdout.splitlines()]
    assert [name for name, *_ in lines] == list(known)
    for name, *loaded in lines:
        parent, _, last = name.rpartition(".")
        code = f"from {parent} import {last}" if parent else "from saliency_sanity import __version__"
        found = cache.closure(run_chapters.trees([code]), known)
        assert {known[one] for one in set(loaded) - drawing} <= found, name


@pytest.mark.parametrize(
    ("code", "among", "without"),
    [
        ("from saliency_sanity import __version__", {"__init__.py"}, {"alpha.py"}),
        ("import saliency_sanity", {"alpha.py", "book/assets.py"}, set()),  # whatever is taken from it later
        ("from saliency_sanity import *", {"alpha.py", "unused.py"}, set()),
        ("from saliency_sanity import something_lazy", {"alpha.py", "unused.py"}, set()),
        ("import saliency_sanity.alpha as a", {"alpha.py", "gamma.py"}, {"unused.py"}),
        ("from importlib import import_module\nimport_module(NAME)", {"alpha.py", "book/assets.py"}, set()),
        ("%%time\nfrom saliency_sanity import alpha", {"alpha.py"}, {"unused.py"}),
        ("!ls\nx = %pwd\nfrom saliency_sanity import alpha", {"alpha.py"}, {"unused.py"}),
        ("from numpy import alpha", set(), {"__init__.py", "alpha.py"}),
        ("this is no Python", set(), {"__init__.py"}),
    ],
)
def test_the_closure_of_other_forms_of_import(book, code, among, without):
    found = cache.closure(run_chapters.trees([code]), cache.modules(book))
    names = {path.relative_to(book / "helpers").as_posix() for path in found}
    assert among <= names and not without & names


# What runs


def test_outputs_are_kept_with_what_it_took(done):
    [one] = run_chapters.kept_runs(done, ONE)
    textures = len((ROOT / cache.MANIFEST).read_text(encoding="utf-8").split("textures/")) - 1
    assert outputs(one.path) == [[], [], [f"('digits.npz', {textures})"], ["2"]]
    assert one.seconds > 0 and one.megabytes > 10 and one.in_budget


def test_chapters_have_one_thread_and_know_that_nobody_presses_buttons(done):
    [three] = run_chapters.kept_runs(done, THREE)
    assert outputs(three.path)[1] == ["('1', '1')"]


def test_peak_memory_is_that_of_the_kernel(tmp_path):
    new_book(tmp_path, {ONE: ["import time\nheld = bytearray(300 * 2**20)\ntime.sleep(2)\ndel held"], TWO: ["1"]})
    runs = run(tmp_path)
    assert 300 <= runs[ONE].megabytes <= runs[TWO].megabytes + 400 and 10 < runs[TWO].megabytes < 300


def test_the_longest_comes_first_and_before_it_what_never_ran(book):
    for chapter, seconds in {ONE: 1.0, TWO: 30.0, THREE: 2.0}.items():
        [kept] = cache.kept(run_chapters.shelf(book, chapter))
        write(kept.folder / cache.NOTE, json.dumps(kept.note | {"seconds": seconds}))
    new = Path("notebooks/part/new.ipynb")
    order = sorted([ONE, TWO, new, THREE], key=lambda chapter: -run_chapters.expected_seconds(book, chapter))
    assert order == [new, TWO, THREE, ONE]


def test_only_the_latest_outputs_are_kept(tmp_path):
    for k in range(cache.KEPT + 2):
        cache.keep(tmp_path, f"key {k}", {}, lambda folder, environment: {"number": k})  # noqa: B023
        time.sleep(0.02)
    cache.find(tmp_path, f"key {cache.KEPT - 1}", {})  # the oldest one, but now the latest to be used
    cache.keep(tmp_path, "another key", {}, lambda folder, environment: {"number": -1})
    assert [one.note["number"] for one in cache.kept(tmp_path)] == [-1, cache.KEPT - 1, cache.KEPT + 1]


def test_failing_cells_are_named_and_nothing_of_them_is_kept(tmp_path):
    new_book(tmp_path, {ONE: ["total = 0", "mean = 1 / total"], TWO: ["import os", "os._exit(1)"], THREE: ["1"]})
    failed = build(tmp_path)
    assert failed.returncode == 1
    for expected in (f"{ONE}, cell 3", "mean = 1 / total", "ZeroDivisionError: division by zero"):
        assert expected in failed.stderr
    assert f"{TWO}, cell 3" in failed.stderr and "DeadKernelError" in failed.stderr
    assert {path.parent.parent.name for path in kept_files(tmp_path)} == {"three"}
    assert stale(tmp_path) == {ONE, TWO}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_ends_at_once_keeps_what_is_done_and_leaves_nothing_running(tmp_path, number):
    slow = "import pathlib, time\npathlib.Path('started').touch()\ntime.sleep(6000)"
    new_book(tmp_path, {ONE: ["1"], TWO: [slow], THREE: [slow.replace("started", "started, too")]})
    command = [sys.executable, SCRIPTS / "build_book.py", "--root", tmp_path, "--no-html", "--at-once", "2"]
    default = functools.partial(signal.signal, number, signal.SIG_DFL)  # a shell's background job ignores Ctrl-C
    pipe = subprocess.PIPE
    building = subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, preexec_fn=default)
    desk = tmp_path / "_build/source/notebooks/part"
    while not all((desk / name).exists() for name in ("started", "started, too")):
        assert building.poll() is None
        time.sleep(0.05)
    kernels = psutil.Process(building.pid).children(recursive=True)
    assert len(kernels) >= 2
    building.send_signal(number)
    output, errors = building.communicate(timeout=600)  # of the hours that its cells would take
    assert building.returncode == 130 and errors == "\nStopped. What was done is kept.\n"
    assert not [kernel for kernel in kernels if kernel.is_running() and kernel.status() != psutil.STATUS_ZOMBIE]
    assert "notebooks/part/one: " in output
    assert stale(tmp_path) == {TWO, THREE}
    assert {path.parent.parent.name for path in kept_files(tmp_path)} == {"one"}


def test_unknown_chapter_is_refused(book):
    failed = build(book, "--only", "four")
    assert failed.returncode == 1 and "No chapter ends in 'four': one, two, three" in failed.stderr


def test_building_needs_no_torch():
    program = "import sys, build_book; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS).returncode == 0


# What the pages are made from


def page_of(root: Path, chapter: Path) -> nbformat.NotebookNode:
    runs = run(root)
    return nbformat.reads(build_book.layout(root, runs, {}, {})[chapter].decode(), as_version=4)


def test_pages_have_todays_prose_and_the_outputs_that_were_kept(book):
    before = page_of(book, ONE)
    write_chapter(book, ONE, *CODE[ONE], prose="# Another title", alt="what it shows")
    after = page_of(book, ONE)
    assert [cell.source for cell in after.cells if cell.cell_type == "markdown"] == ["# Another title"]
    assert after.cells[-1].metadata == {"alt": "what it shows"}
    then, now = run_chapters.code_cells(before), run_chapters.code_cells(after)
    assert [cell.outputs for cell in now] == [cell.outputs for cell in then]
    assert now[-1].outputs[0].data["text/plain"] == "2" and now[-1].execution_count == then[-1].execution_count == 4
    assert after.metadata.language_info.pygments_lexer == "ipython3"


def test_figures_are_made_lighter_once_for_each_run(tmp_path, monkeypatch):
    noise = "from PIL import Image\nimport numpy as np\n"
    noise += "Image.fromarray(np.random.default_rng(0).integers(0, 256, (99, 99, 3), dtype='uint8'))"
    new_book(tmp_path, {ONE: [noise]})
    first = page_of(tmp_path, ONE).cells[0].outputs[0].data
    [run] = run_chapters.kept_runs(tmp_path, ONE)
    heavy = nbformat.read(run.path, as_version=4).cells[0].outputs[0].data
    assert "image/jpeg" in first and len(first["image/jpeg"]) < len(heavy["image/png"])
    monkeypatch.setattr(build_book.Image, "open", lambda file: pytest.fail("the figure was made lighter again"))
    assert page_of(tmp_path, ONE).cells[0].outputs[0].data == first


def test_of_a_run_of_other_code_cells_keep_what_still_has_their_name(book):
    executed = nbformat.read(run_chapters.kept_runs(book, ONE)[0].path, as_version=4)
    write_chapter(book, ONE, *CODE[ONE], "new")
    notebook = nbformat.read(book / ONE, as_version=4)
    build_book.take_outputs(notebook, executed)
    *old, new = run_chapters.code_cells(notebook)
    assert [len(cell.outputs) for cell in old] == [0, 0, 1, 1] and new.outputs == []


@pytest.mark.parametrize("kind, html", [(CLAIM, "<b>7</b>"), (EXPLORER, "<i>7</i>")])
def test_cards_and_explorers_are_drawn_by_the_build(book, kind, html):
    data = {kind: 7, "text/html": "as it was drawn in the chapter", "text/plain": "7"}
    render(book, data)
    assert data == {"text/html": html, "text/plain": "7"}


def test_other_outputs_stay_as_they_are(book):
    data = {"text/html": "<table>", "image/png": "..."}
    render(book, data)
    assert data == {"text/html": "<table>", "image/png": "..."}


def test_links_to_the_published_book_become_links_between_sources(book):
    home = pages(ADDRESS)
    text = f"[a]({home}book/words.html#x), [b]({home}notebooks/part/one.html)"
    assert build_book.link_locally(text, home, book, ONE) == "[a](../../book/words.md#x), [b](one.ipynb)"


# What scripts make

SCRIPT = """import pathlib, sys, time
def later():
    import beside
    from saliency_sanity import alpha
from saliency_sanity.book.assets import locate
locate("digits.npz")
(pathlib.Path(sys.argv[1]) / "made").write_text(str(time.time_ns()))
"""


@pytest.mark.parametrize(
    ("name", "old", "new", "again"),
    [
        ("app/number.py", "later", "much_later", True),
        ("app/beside.py", "1", "2", True),
        ("app/other.py", "1", "2", False),
        ("helpers/gamma.py", "unused", "used", True),
        ("helpers/saliency/lrp.py", "lrp", "rule", False),
        (cache.MANIFEST, "1  digits", "9  digits", True),
        (cache.MANIFEST, "2  clothes", "9  clothes", False),
        ("notebooks/part/one.ipynb", "1 + 1", "2 + 2", False),
    ],
)
def test_a_script_runs_again_when_something_changes_that_it_uses(tmp_path, name, old, new, again):
    new_book(tmp_path, CODE)
    script = tmp_path / "app/number.py"
    for path, text in {script: SCRIPT, tmp_path / "app/beside.py": "a = 1", tmp_path / "app/other.py": "a = 1"}.items():
        write(path, text)

    def number() -> str:
        return (made.made(tmp_path, script, cache.surroundings(tmp_path)) / "made").read_text(encoding="utf-8")

    first = number()
    assert number() == first
    change(tmp_path / name, old, new)
    assert (number() != first) == again


def test_a_script_that_fails_stops_the_build_and_leaves_nothing_that_looks_made(tmp_path):
    new_book(tmp_path, CODE)
    script = tmp_path / "broken.py"
    write(script, "import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'made').write_text('half'); sys.exit(3)")
    for _ in range(2):
        with pytest.raises(SystemExit, match="broken.py failed"):
            made.made(tmp_path, script, cache.surroundings(tmp_path))
    assert not [path for path in (tmp_path / "_build/made").rglob("*") if path.is_file()]
