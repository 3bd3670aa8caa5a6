"""What scripts make for the pages, kept in _build/made until it would be another; used by build_book.py."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import cache


def key(root: Path, script: Path, around: cache.Surroundings) -> str:
    """The digest of all that depends on the script: itself, what it imports of the package and beside it, versions."""
    beside = {path.stem: path for path in sorted(script.parent.glob("*.py"))}
    used = cache.closure([ast.parse(script.read_text(encoding="utf-8"))], around.modules | beside)
    return cache.digest(cache.contents(root, {script, *used}), around.versions)


def made(root: Path, script: Path, around: cache.Surroundings) -> Path:
    """The folder that `script FOLDER` fills, in a process of its own: building imports no torch."""
    shelf = root / "_build/made" / script.stem

    def fill(folder: Path, environment: dict[str, str]) -> dict:
        print(f"Running {script.name} ...", flush=True)
        if subprocess.run([sys.executable, script, folder], cwd=root, env=os.environ | environment).returncode:
            sys.exit(f"\nThe pages were not made: {script.name} failed; the error above says why.")
        return {}

    wanted = key(root, script, around)
    found = cache.find(shelf, wanted, around.assets) or cache.keep(shelf, wanted, around.assets, fill)
    return found.folder
