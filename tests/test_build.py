"""Running the chapters: when an execution is kept, when it is not, and what a failing cell leaves behind."""

import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
import run_chapters
from address import pages
from build_book import link_locally
from made import made

SCRIPTS = Path(run_chapters.__file__).parent
CHAPTER = Path("notebooks/part/one.ipynb")


@pytest.fixture
def book(tmp_path) -> Path:
    """A book of one chapter, with a helper and an asset."""
    for name, text in {
        "_toc.yml": "format: jb-book\nroot: book/index\nchapters:\n  - file: notebooks/part/one\n",
        "helpers/__init__.py": "",
        "assets/files/data.bin": "data",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    write_chapter(tmp_path, "1 + 1")
    return tmp_path


def write_chapter(root: Path, *sources: str):
    cells = [nbformat.v4.new_code_cell(source, id=f"cell-{i}") for i, source in enumerate(sources)]
    (root / CHAPTER).parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), root / CHAPTER)


def key(root: Path) -> str:
    return run_chapters.key(root, CHAPTER, run_chapters.surroundings(root))


def build(root: Path, *options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, SCRIPTS / "build_book.py", "--root", root, "--no-html", *options]
    return subprocess.run(command, capture_output=True, text=True)


def executions(root: Path) -> list[Path]:
    return [path for path in (root / "_build/executed").rglob("*") if path.is_file()]


def test_key_stays_when_nothing_changes(book):
    assert key(book) == key(book)


FILES = ["helpers/__init__.py", "assets/files/data.bin", "helpers/new.py"]


@pytest.mark.parametrize("name", FILES)
def test_key_follows_files(book, name):
    before = key(book)
    (book / name).write_text("changed")
    assert key(book) != before


def test_key_follows_the_notebook(book):
    before = key(book)
    write_chapter(book, "2 + 2")
    assert key(book) != before


@pytest.mark.parametrize("variable", ["SANITY_SEED", "SANITY_STRICT"])
def test_key_follows_the_settings(book, monkeypatch, variable):
    monkeypatch.delenv(variable, raising=False)
    before = key(book)
    monkeypatch.setenv(variable, "7")
    assert key(book) != before


def test_key_follows_the_installed_versions(book, monkeypatch):
    before = key(book)
    monkeypatch.setattr(run_chapters, "versions", lambda: ["torch==99"])
    assert key(book) != before


def test_chapter_runs_once(book):
    first, second = build(book), build(book)
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert "unchanged" not in first.stdout and "unchanged" in second.stdout
    [kept] = executions(book)
    notebook = nbformat.read(kept, as_version=4)
    assert [cell.outputs[0].data["text/plain"] for cell in notebook.cells] == ["2"]
    assert notebook.metadata.saliency_sanity.seconds > 0 and notebook.metadata.saliency_sanity.megabytes > 10


def test_chapters_know_that_nobody_presses_buttons(book):
    write_chapter(book, "import os\nos.environ['SANITY_STATIC']")
    assert build(book).returncode == 0
    [kept] = executions(book)
    assert nbformat.read(kept, as_version=4).cells[0].outputs[0].data["text/plain"] == "'1'"


def test_failing_cell_is_named_and_nothing_is_kept(book):
    write_chapter(book, "total = 0", "mean = 1 / total")
    failed = build(book)
    assert failed.returncode == 1
    for expected in (f"{CHAPTER}, cell 2", "mean = 1 / total", "ZeroDivisionError: division by zero"):
        assert expected in failed.stderr
    assert executions(book) == []


def test_dying_kernel_is_named(book):
    write_chapter(book, "import os", "os._exit(1)")
    failed = build(book)
    assert failed.returncode == 1
    assert f"{CHAPTER}, cell 2" in failed.stderr and "DeadKernelError" in failed.stderr


def test_unknown_chapter_is_refused(book):
    failed = build(book, "--only", "two")
    assert failed.returncode == 1 and "No chapter ends in 'two': one" in failed.stderr


def test_building_needs_no_torch():
    program = "import sys, build_book; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program], cwd=SCRIPTS).returncode == 0


def test_links_to_the_published_book_become_links_between_sources(book):
    (book / "pyproject.toml").write_text('[project.urls]\nRepository = "https://github.com/Ann/b"\n')
    home = pages("https://github.com/Ann/b")
    text = f"[a]({home}book/words.html#x), [b]({home}notebooks/part/one.html)"
    assert link_locally(text, book, CHAPTER) == "[a](../../book/words.md#x), [b](one.ipynb)"


def test_what_a_script_makes_is_kept_until_the_script_changes(tmp_path):
    (tmp_path / "helpers").mkdir()
    script = tmp_path / "number.py"
    program = "import pathlib, sys, time; (pathlib.Path(sys.argv[1]) / 'made').write_text(str(time.time_ns()))"
    script.write_text(program)
    first = (made(tmp_path, script) / "made").read_text()
    assert (made(tmp_path, script) / "made").read_text() == first
    script.write_text(program + "  # changed")
    assert (made(tmp_path, script) / "made").read_text() != first


def test_a_script_that_fails_stops_the_build_and_leaves_nothing_that_looks_made(tmp_path):
    (tmp_path / "helpers").mkdir()
    script = tmp_path / "broken.py"
    script.write_text("import pathlib, sys; (pathlib.Path(sys.argv[1]) / 'made').write_text('half'); sys.exit(3)")
    for _ in range(2):
        with pytest.raises(SystemExit, match="broken.py failed"):
            made(tmp_path, script)
