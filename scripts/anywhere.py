"""Imitate the places where readers run the chapters: Google Colab and Binder.

    python scripts/anywhere.py                            both, with every chapter in Binder
    python scripts/anywhere.py colab --only cascading     one chapter where only torch and its friends are installed
    python scripts/anywhere.py binder --only cascading    one chapter with one core and 2 GB of memory

Colab: a new environment in _build/colab has nothing but torch, torchvision, numpy, matplotlib and IPython, borrowed
from the present one by symbolic links. The chapter's first cell installs the package and its data there, from the last
commit instead of the published address; then the whole chapter runs. torch and numpy must be the same afterwards.
Binder: the chapter runs in a kernel on one core; it is stopped where it takes more memory or time than it may.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import venv
from collections.abc import Iterable, Sequence
from importlib.metadata import distribution
from pathlib import Path
from typing import NamedTuple

import nbformat
import psutil
from address import repository, revision
from packaging.requirements import Requirement
from run_chapters import chapters

PREINSTALLED = ("torch", "torchvision", "numpy", "matplotlib", "ipython", "matplotlib-inline")
UNTOUCHED = ("torch", "torchvision", "numpy")
OURS = {"saliency-sanity", "saliency-sanity-assets"}
BINDER_MEGABYTES, BINDER_SECONDS = 2048, 180
EXECUTE = "from nbclient.cli import main; main()"  # the command `jupyter execute`
VERSIONS = """import json
from importlib.metadata import distributions
print(json.dumps({d.name.lower(): d.version for d in distributions()}))"""


class Watched(NamedTuple):
    """How a program ran: its end (`done`, `failed`, `memory` or `time`), and what it took with all its children."""

    end: str
    seconds: float
    megabytes: int
    output: str


def resident(process: psutil.Process) -> int:
    """Megabytes that a process and all its children hold in memory."""
    total = 0
    for one in [process, *process.children(recursive=True)]:
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return total // 1024**2


def stop(process: psutil.Process) -> None:
    """Kill a process and all its children."""
    for one in [*process.children(recursive=True), process]:
        try:
            one.kill()
        except psutil.NoSuchProcess:
            pass


def watch(command: Sequence, *, megabytes: int, seconds: float, cwd: Path, env: dict[str, str]) -> Watched:
    """Run a program on one core, and stop it where it takes more than it may."""
    log = cwd / "output.txt"
    started, peak, end = time.perf_counter(), 0, ""
    with log.open("w", encoding="utf-8") as output:
        child = psutil.Popen(command, cwd=cwd, env=env, stdout=output, stderr=subprocess.STDOUT)
        if hasattr(child, "cpu_affinity"):  # children inherit it; macOS cannot
            child.cpu_affinity(child.cpu_affinity()[:1])
        while child.poll() is None and not end:
            time.sleep(0.05)
            try:
                peak = max(peak, resident(child))
            except psutil.NoSuchProcess:
                continue
            end = "memory" if peak > megabytes else "time" if time.perf_counter() - started > seconds else ""
        if end:
            stop(child)
        failed = child.wait() != 0
    return Watched(
        end or ("failed" if failed else "done"), time.perf_counter() - started, peak, log.read_text(encoding="utf-8")
    )


def closure(names: Iterable[str]) -> set[str]:
    """Distributions of the present environment with all that they require, extras included."""
    found, waiting = set(), [Requirement(name) for name in names]
    while waiting:
        wanted = waiting.pop()
        asked = {(wanted.name.lower(), extra) for extra in ("", *wanted.extras)} - found
        for needed in map(Requirement, distribution(wanted.name).requires or []) if asked else ():
            if needed.marker is None or any(needed.marker.evaluate({"extra": extra}) for _, extra in asked):
                waiting.append(needed)
        found |= asked
    return {name for name, _ in found}


def lend(names: Iterable[str], folder: Path) -> Path:
    """A new environment that has these distributions of the present one, by links; returns its interpreter."""
    venv.create(folder, with_pip=True, clear=True)
    [site] = (folder / "lib").glob("python*/site-packages")
    for name in closure(names):
        lent = distribution(name)
        for part in {file.parts[0] for file in lent.files} - {"..", "__pycache__"}:
            if not (site / part).exists():
                (site / part).symlink_to(Path(lent.locate_file(part)).resolve())
    return folder / "bin/python"


def environment() -> dict[str, str]:
    """The variables of this process without those that lead to the present environment."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "VIRTUAL_ENV", "SANITY_SEED")}
    return kept | {"OMP_NUM_THREADS": "1", "MPLBACKEND": "agg", "SANITY_STRICT": "1"}


def program(root: Path, chapter: Path, source: str) -> str:
    """All code of a chapter, with the package taken from `source` instead of the published address."""
    cells = nbformat.read(root / chapter, as_version=4).cells
    code = "\n\n".join(cell.source for cell in cells if cell.cell_type == "code")
    address = f"git+{repository(root)}@{revision(root)}"
    if code.count(address) != 1:
        raise ValueError(f"{chapter} does not install the package from {address} in one place.")
    return code.replace(address, source)


def installed(python: Path) -> dict[str, str]:
    """The versions that an interpreter finds."""
    shown = subprocess.run([python, "-c", VERSIONS], env=environment(), capture_output=True, text=True, check=True)
    return json.loads(shown.stdout)


def colab(root: Path, chapter: Path) -> bool:
    """Run a chapter where little more than torch is installed; whether it ran and left torch and numpy alone."""
    folder = root / "_build/colab"
    python = lend(PREINSTALLED, folder)
    before = installed(python)
    desk = folder / "desk"
    desk.mkdir()
    (desk / "chapter.ipy").write_text(program(root, chapter, f"git+file://localhost{root}"), encoding="utf-8")
    command = [python, "-m", "IPython", "--no-banner", "--colors=NoColor", "chapter.ipy"]
    ran = subprocess.run(command, cwd=desk, env=environment(), capture_output=True, text=True)
    after = installed(python)
    new = sorted(after.keys() - before.keys())
    changed = [name for name in UNTOUCHED if after.get(name) != before[name]]
    print(f"Colab, {chapter.stem}: installed {', '.join(new) or 'nothing'}")
    if changed:
        print(f"  changed: {', '.join(f'{name} {before[name]} -> {after.get(name)}' for name in changed)}")
    if ran.returncode:
        print(f"  the chapter failed:\n{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    good = not changed and ran.returncode == 0 and OURS <= set(new)
    print("  torch, torchvision and numpy are as they were; the chapter ran" if good else "  NOT as it should be")
    shutil.rmtree(folder)
    return good


def binder(root: Path, chapter: Path) -> bool:
    """Run a chapter on one core within Binder's memory; whether it came to its end."""
    desk = root / "_build/binder"
    desk.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-c", EXECUTE, "--timeout=600", (root / chapter).resolve()]
    ran = watch(command, megabytes=BINDER_MEGABYTES, seconds=BINDER_SECONDS, cwd=desk, env=environment())
    took = f"{ran.seconds:.0f} s of {BINDER_SECONDS}, {ran.megabytes} MB of {BINDER_MEGABYTES}"
    print(f"Binder, {chapter.stem}: {ran.end}, {took}", flush=True)
    if ran.end == "failed":
        print(ran.output[-2000:])
    return ran.end == "done"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("place", nargs="?", choices=["colab", "binder"], help="both if none is named")
    parser.add_argument("--only", metavar="SLUG", help="one chapter, by its name; cascading in Colab, all in Binder")
    options = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    known = {chapter.stem: chapter for chapter in chapters(root)}
    if options.only and options.only not in known:
        sys.exit(f"No chapter is called {options.only!r}: {', '.join(known)}")
    results = []
    if options.place != "binder":
        results.append(colab(root, known[options.only or "cascading"]))
    if options.place != "colab":
        results += [binder(root, known[slug]) for slug in ([options.only] if options.only else known)]
    if not all(results):
        sys.exit("\nNot every chapter runs everywhere; see above.")


if __name__ == "__main__":
    main()
