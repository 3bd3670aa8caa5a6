"""What scripts make for the pages, kept in _build/made until script or package change; used by build_book.py."""

import hashlib
import shutil
import subprocess
import sys
from pathlib import Path

from run_chapters import KEPT, surroundings


def made(root: Path, script: Path) -> Path:
    """The folder that `script FOLDER` fills, in a process of its own.

    Building imports no torch: a chapter's process would count the memory of the one that started it as its own.
    """
    key = hashlib.sha256(surroundings(root).encode() + script.read_bytes()).hexdigest()[:16]
    folder = root / "_build/made" / script.stem / key
    if folder.exists():
        folder.touch()
    else:
        print(f"Running {script.name} ...", flush=True)
        unfinished = folder.with_suffix(".unfinished")
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        if subprocess.run([sys.executable, script, unfinished], cwd=root).returncode:
            sys.exit(f"\nThe pages were not made: {script.name} failed; the error above says why.")
        unfinished.rename(folder)
    for old in sorted(folder.parent.iterdir(), key=lambda path: path.stat().st_mtime)[:-KEPT]:
        shutil.rmtree(old)
    return folder
