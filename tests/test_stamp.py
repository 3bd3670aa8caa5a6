"""Tests of stored files: left out as long as nothing that they depend on changes, and never longer."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import stamp


@pytest.fixture
def book(tmp_path) -> Path:
    """A book with one asset, two modules, and a test file that imports one of them."""
    for name, text in {
        "assets/files/SHA256SUMS": "00  digits.npz\n",
        "helpers/__init__.py": "",
        "helpers/read.py": "from . import deep\n",
        "helpers/deep.py": "",
        "helpers/other.py": "",
        "tests/test_read.py": "from saliency_sanity import read\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def now(book: Path) -> str:
    return stamp.digest(book / "tests/test_read.py", book)


@pytest.mark.parametrize(
    "name", ["assets/files/SHA256SUMS", "helpers/read.py", "helpers/deep.py", "tests/test_read.py"]
)
def test_what_the_tests_depend_on_changes_the_digest(book, name):
    before = now(book)
    with (book / name).open("a", encoding="utf-8") as file:
        file.write("\n# changed\n")
    assert now(book) != before


def test_nothing_else_does(book):
    before = now(book)
    (book / "helpers/other.py").write_text("changed = 1\n", encoding="utf-8")
    assert now(book) == before


def test_other_versions_do(book, monkeypatch):
    before = now(book)
    monkeypatch.setattr(stamp, "version", lambda name: "99.0")
    assert now(book) != before


def test_a_stamp_is_written_kept_and_forgotten_with_its_file(book):
    path = book / "tests/files.sha256"
    stamp.write({"tests/test_read.py"}, book, path)
    assert stamp.stamped(path) == {"tests/test_read.py": now(book)}
    (book / "tests/test_read.py").unlink()
    stamp.write(set(), book, path)
    assert stamp.stamped(path) == {}


def test_the_manifest_and_the_modules_of_this_book_are_found():
    path = stamp.ROOT / "tests/book/test_photographs.py"
    modules = stamp.cache.modules(stamp.ROOT)
    tree = stamp.ast.parse(path.read_text(encoding="utf-8"))
    used = {file.name for file in stamp.cache.closure([tree], modules)}
    assert {"photographs.py", "models.py", "assets.py"} <= used and (stamp.ROOT / stamp.cache.MANIFEST).exists()


class Item:
    def __init__(self, path: Path, *marks: str):
        self.path, self.marks = path, marks

    def get_closest_marker(self, name):
        return name if name in self.marks else None


@pytest.mark.parametrize(
    ("markers", "keyword", "args", "known", "left"),
    [
        ("not weekly", "", ["tests"], True, 1),
        ("not weekly", "", ["tests"], False, 0),
        ("not weekly", "brick", ["tests"], True, 0),
        ("not weekly", "", ["tests/test_stamp.py::test_it"], True, 0),
        ("files", "", ["tests"], True, 0),
        ("", "", ["tests"], True, 0),
    ],
)
def test_what_is_stamped_is_left_out_of_a_normal_run_only(monkeypatch, markers, keyword, args, known, left):
    here = Path(__file__).resolve()
    digest = stamp.digest(here) if known else "another"
    monkeypatch.setattr(stamp, "stamped", lambda: {here.relative_to(stamp.ROOT.resolve()).as_posix(): digest})
    monkeypatch.setattr(stamp, "ROOT", stamp.ROOT.resolve())
    items = [Item(here), Item(here, "files"), Item(here.with_name("conftest.py"), "files")]
    config = SimpleNamespace(option=SimpleNamespace(markexpr=markers, keyword=keyword), args=args)
    run, out = stamp.split(items, config)
    assert out == items[1 : 1 + left] and run == [item for item in items if item not in out]
