"""Tests of stored files run where the files, or the code that reads them, are not those of the last run.

Such a test is marked `files`. What a test file was last run with, all of it passing, stands in tests/files.sha256: a
digest of the manifest of the assets, of the test file, of the modules it imports and of the versions that compute.
A normal run leaves out what is stamped; `-m ""`, `-m files` and a test named with `::` run it all the same.
"""

import ast
import hashlib
from importlib.metadata import version
from pathlib import Path

import cache

ROOT = Path(__file__).parent.parent
STAMP = ROOT / "tests/files.sha256"
BESIDE = ("tests", "scripts/assets")  # where tests import from besides the package
VERSIONS = ("torch", "torchvision", "numpy", "pillow")
USUAL = "not weekly"  # the marker expression of a normal run


def digest(path: Path, root: Path = ROOT) -> str:
    """What the tests in the file `path` depend on, as 64 hexadecimal digits."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    beside = {one.stem: one for folder in BESIDE for one in (root / folder).glob("*.py")}
    read = [root / cache.MANIFEST, path, *sorted(cache.closure([tree], cache.modules(root) | beside))]
    parts = [hashlib.sha256(part.read_text(encoding="utf-8").encode()).hexdigest() for part in read]
    return cache.digest(parts, [version(name).partition("+")[0] for name in VERSIONS])


def stamped(stamp: Path = STAMP) -> dict[str, str]:
    """Test file, by its place in the book -> the digest at its last run."""
    lines = stamp.read_text(encoding="utf-8").splitlines() if stamp.exists() else []
    return {name: known for known, name in (line.split(maxsplit=1) for line in lines)}


def write(names: set[str], root: Path = ROOT, stamp: Path = STAMP) -> None:
    """Note that the tests of these files have passed as everything is now; files that are gone are forgotten."""
    known = {name: old for name, old in stamped(stamp).items() if (root / name).exists()}
    known |= {name: digest(root / name, root) for name in names}
    stamp.write_text("".join(f"{known[name]}  {name}\n" for name in sorted(known)), encoding="utf-8")


def usual(config) -> bool:
    """Whether a run is of whole files and names no tests of its own."""
    return not (config.option.keyword or any("::" in str(arg) for arg in config.args))


def split(items: list, config) -> tuple[list, list]:
    """The tests to run, and those of files that are as they were."""
    if config.option.markexpr != USUAL or not usual(config):
        return items, []
    known = stamped()
    paths = {item.path for item in items if item.get_closest_marker("files")}
    same = {path for path in paths if known.get(path.relative_to(ROOT).as_posix()) == digest(path)}
    left = [item for item in items if item.path in same and item.get_closest_marker("files")]
    return [item for item in items if item not in left], left
