"""What an output depends on, and where it is kept until that changes; used by run_chapters.py and made.py.

Each output is a folder under _build. It is found again by two steps: its key is the SHA-256 of all that is known before
a program runs (code, modules, claims, versions, settings), and its note names the assets that the program opened, which
must still be the same files.
"""

import ast
import hashlib
import json
import os
import platform
import shutil
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import resolve_name
from pathlib import Path
from typing import NamedTuple

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from rendering import RENDERERS

PACKAGE = "saliency_sanity"
KERNEL = ("ipykernel", "ipython", "nbclient")  # what runs a chapter besides the package and what it needs
MANIFEST = Path("assets/files/SHA256SUMS")
OPENED = "SANITY_ASSETS_NOTE"  # names the file where book/assets.py writes down what it finds
NOTE = "note.json"
KEPT = 3  # outputs of one program, the latest ones


class Surroundings(NamedTuple):
    """What programs share: the modules of the package by name, the versions, and the SHA-256 of every asset."""

    modules: dict[str, Path]
    versions: list[str]
    assets: dict[str, str]


class Kept(NamedTuple):
    """An output that was kept, and what is known about it."""

    folder: Path
    note: dict


def surroundings(root: Path) -> Surroundings:
    manifest = root / MANIFEST
    lines = manifest.read_text(encoding="utf-8").splitlines() if manifest.exists() else []
    assets = {name: sha for sha, name in (line.split(maxsplit=1) for line in lines if line)}
    return Surroundings(modules(root), versions(root), assets)


def modules(root: Path) -> dict[str, Path]:
    """The modules that outputs can depend on: those that draw cards and explorers are run by the build instead."""
    drawing = {root / path for path in RENDERERS.values()}
    found = {}
    for path in sorted((root / "helpers").rglob("*.py")):
        if path not in drawing:
            parts = path.relative_to(root / "helpers").with_suffix("").parts
            found[".".join([PACKAGE, *(part for part in parts if part != "__init__")])] = path
    return found


def versions(root: Path) -> list[str]:
    """Python and the distributions that a chapter can import: the package's own needs, the book's, and the kernel's."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project.get("optional-dependencies", {})
    waiting = [Requirement(line) for line in [*project["dependencies"], *extras.get("book", []), *KERNEL]]
    found, seen = {}, {}
    while waiting:
        one = waiting.pop()
        name = canonicalize_name(one.name)
        if name == canonicalize_name(project["name"]):
            waiting += [Requirement(line) for extra in one.extras for line in extras[extra]]
            continue
        for extra in {"", *one.extras} - seen.setdefault(name, set()):
            seen[name].add(extra)
            try:
                installed = distribution(name)
            except PackageNotFoundError:
                continue
            found[name] = installed.version
            asked = [Requirement(line) for line in installed.requires or []]
            waiting += [need for need in asked if need.marker is None or need.marker.evaluate({"extra": extra})]
    return [platform.python_version(), *(f"{name}=={version}" for name, version in sorted(found.items()))]


def closure(trees: Iterable[ast.AST], known: Mapping[str, Path]) -> set[Path]:
    """The files of all modules that code imports, directly or through others, wherever the import stands."""
    waiting, found = [name for tree in trees for name in imported(tree, PACKAGE)], set()
    while waiting:
        name, star, _ = waiting.pop().partition(".*")
        parts = name.split(".")
        names = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]  # a package runs before its modules
        if star or _loaded_by_a_rule(name, known):
            above = name if star else PACKAGE
            names += [other for other in known if other.startswith(f"{above}.")]
        for module in names:
            if module in known and known[module] not in found:
                path = known[module]
                found.add(path)
                package = module if path.name == "__init__.py" else module.rpartition(".")[0]
                more = needs(path.read_text(encoding="utf-8"), package)
                # The package itself loads on demand what others take from it: they name what they take.
                waiting += more - {f"{PACKAGE}.*"} if module == PACKAGE else more
    return found


def _loaded_by_a_rule(name: str, known: Mapping[str, Path]) -> bool:
    """Whether `name` is taken from the package itself and is neither a module nor defined there: who knows whence."""
    package, _, taken = name.rpartition(".")
    if package != PACKAGE or PACKAGE not in known or name in known:
        return False
    return taken not in defined(known[PACKAGE].read_text(encoding="utf-8"))


@cache
def needs(code: str, package: str) -> frozenset[str]:
    """What a module of the package imports."""
    return frozenset(imported(ast.parse(code), package))


def imported(tree: ast.AST, package: str) -> Iterator[str]:
    """Names of modules that the code of a package may import, or of things in them; `x.*` is all that is in x."""
    for node in running(tree):
        match node:
            case ast.Import(names):
                for alias in names:
                    yield alias.name if alias.asname else f"{alias.name.partition('.')[0]}.*"
            case ast.ImportFrom(module, names, level):
                source = resolve_name("." * level + (module or ""), package)
                yield from (f"{source}.{alias.name}" for alias in names)
            case ast.Call(ast.Name("import_module") | ast.Attribute(attr="import_module"), [name, *_]):
                literal = isinstance(name, ast.Constant)
                yield resolve_name(name.value, package) if literal else f"{package}.*"


def running(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but for what only a type checker reads."""
    waiting = [tree]
    while waiting:
        node = waiting.pop()
        if not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)):
            yield node
            waiting += ast.iter_child_nodes(node)


@cache
def defined(code: str) -> set[str]:
    """The names that a module gives to something itself."""
    nodes = list(ast.walk(ast.parse(code)))
    names = {node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    names |= {node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return names | {node.asname or node.name for node in nodes if isinstance(node, ast.alias)}


def digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def contents(root: Path, paths: Iterable[Path]) -> list[tuple[str, str]]:
    """Files by their place in the book, with what is in them; our own version is nothing that outputs depend on."""
    found = []
    for path in sorted(paths):
        lines = path.read_text(encoding="utf-8").splitlines()
        lines = [line for line in lines if not line.startswith("__version__ =")]
        found.append((path.relative_to(root).as_posix(), digest(lines)))
    return found


def present(assets: Mapping[str, str], opened: Iterable[str]) -> dict[str, str | None]:
    """What was opened -> its SHA-256 today, or for a folder (`name/`) that of its list of files."""
    found = {}
    for name in sorted(set(opened)):
        inside = sorted(file for file in assets if file.startswith(name))
        found[name] = digest(inside) if name.endswith("/") else assets.get(name)
    return found


def kept(shelf: Path) -> list[Kept]:
    """The outputs of a program, latest first."""
    notes = sorted(shelf.glob(f"*/{NOTE}"), key=lambda path: path.parent.stat().st_mtime, reverse=True)
    return [Kept(path.parent, json.loads(path.read_text(encoding="utf-8"))) for path in notes]


def find(shelf: Path, key: str, assets: Mapping[str, str]) -> Kept | None:
    """The output that the same program would give again, or `None`."""
    for one in kept(shelf):
        if one.note["key"] == key and one.note["assets"] == present(assets, one.note["assets"]):
            os.utime(one.folder)
            return one
    return None


def keep(shelf: Path, key: str, assets: Mapping[str, str], fill: Callable[[Path, dict[str, str]], dict]) -> Kept:
    """Let `fill(folder, environment)` make an output, and keep it with its note; only a whole one gets its name.

    The environment asks the package to write down the assets that it opens. What `fill` returns is noted, too.
    """
    unfinished = shelf / "unfinished"
    opened = unfinished / "opened.txt"
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    try:
        opened.write_text("", encoding="utf-8")
        more = fill(unfinished, {OPENED: str(opened)})
        found = present(assets, opened.read_text(encoding="utf-8").splitlines())
        opened.unlink()
        note = {"key": key, "assets": found, **more}
        (unfinished / NOTE).write_text(json.dumps(note, indent=1), encoding="utf-8")
    except BaseException:
        shutil.rmtree(unfinished)
        raise
    folder = shelf / digest(key, found)[:16]
    shutil.rmtree(folder, ignore_errors=True)
    unfinished.rename(folder)
    os.utime(folder)
    for old in kept(shelf)[KEPT:]:
        shutil.rmtree(old.folder)
    return Kept(folder, note)
