"""Run the chapters of the book and keep what they gave; used by build_book.py.

Every notebook of _toc.yml is executed by nbclient, one after the other. The result is kept in _build/executed
under a key, the SHA-256 of all that the outputs depend on: a chapter runs again only when its key changes.
"""

import hashlib
import json
import os
import platform
import re
import time
from importlib.metadata import distributions
from pathlib import Path
from typing import NamedTuple

import nbformat
import yaml
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal, DeadKernelError
from nbformat import NotebookNode

SECONDS, MEGABYTES = 60, 1500  # the budget of a chapter
CELL_TIMEOUT = 900
KEPT = 3  # executions of a chapter, the latest ones
PEAK_MEMORY = """import resource, sys
resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024**2 if sys.platform == "darwin" else 1024)"""


class ChapterFailed(Exception):
    """A cell raised or ran too long, or the kernel died."""


class Run(NamedTuple):
    """An executed chapter and what it took."""

    path: Path
    seconds: float
    megabytes: int

    @property
    def in_budget(self) -> bool:
        return self.seconds <= SECONDS and self.megabytes <= MEGABYTES


def toc_entries(root: Path) -> list[str]:
    """Every page of the table of contents in reading order, as a path without its suffix."""

    def walk(node: object) -> list[str]:
        if isinstance(node, list):
            return [entry for child in node for entry in walk(child)]
        if isinstance(node, dict):
            here = [node[key] for key in ("root", "file") if key in node]
            return here + [entry for child in node.values() for entry in walk(child)]
        return []

    return walk(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))


def chapters(root: Path) -> list[Path]:
    """The notebooks of the table of contents in reading order, relative to the root."""
    return [Path(f"{entry}.ipynb") for entry in toc_entries(root) if entry.startswith("notebooks/")]


def versions() -> list[str]:
    """Python and every installed distribution."""
    return [platform.python_version(), *sorted(f"{d.name}=={d.version}" for d in distributions())]


def surroundings(root: Path) -> str:
    """A digest of all that a chapter's outputs depend on, but for the notebook itself."""
    digest = hashlib.sha256("\n".join(versions()).encode())
    for name in ("SANITY_SEED", "SANITY_STRICT"):
        digest.update(f"{name}={os.environ.get(name, '0')}".encode())
    for path in sorted([*(root / "helpers").rglob("*"), *(root / "assets").rglob("*")]):
        if path.is_file() and "__pycache__" not in path.parts and ".egg-info" not in str(path):
            digest.update(str(path.relative_to(root)).encode() + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def key(root: Path, chapter: Path, around: str) -> str:
    """The name under which an execution of the chapter is kept."""
    return hashlib.sha256(f"{around}{chapter}".encode() + (root / chapter).read_bytes()).hexdigest()[:16]


def execute(root: Path, chapter: Path) -> NotebookNode:
    """The notebook with its outputs; what it took stands in its metadata."""
    notebook = nbformat.read(root / chapter, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PEAK_MEMORY))
    folder = root / "_build/source" / chapter.parent
    folder.mkdir(parents=True, exist_ok=True)
    now = {}
    client = NotebookClient(
        notebook,
        kernel_name="python3",
        timeout=CELL_TIMEOUT,
        extra_arguments=["--log-level=ERROR"],  # no note on every start that kernels talk over TCP
        resources={"metadata": {"path": folder}},
        on_cell_start=lambda cell, cell_index: now.update(cell=cell, number=cell_index + 1),
    )
    started = time.perf_counter()
    try:
        client.execute(
            env=os.environ | {"SANITY_STATIC": "1"}
        )  # pictures in the place of panels: see book/live_panel.py
    except (CellControlSignal, DeadKernelError) as error:
        raise ChapterFailed(failure(chapter, now["number"], now["cell"], error)) from None
    seconds = round(time.perf_counter() - started, 1)
    megabytes = int(notebook.cells.pop().outputs[-1].data["text/plain"])
    notebook.metadata["saliency_sanity"] = {"seconds": seconds, "megabytes": megabytes}
    return notebook


def failure(chapter: Path, number: int, cell: NotebookNode, error: Exception) -> str:
    """Which cell failed, how it begins, and the end of its traceback."""
    raised = [line for output in cell.outputs for line in output.get("traceback", [])]
    reason = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(raised) or f"{type(error).__name__}: {error}")
    source = cell.source.splitlines()
    source = [*source[:5], "..."] if len(source) > 5 else source
    lines = [*(f"| {line}" for line in source), "", *reason.strip().splitlines()[-12:]]
    return "\n    ".join([f"{chapter}, cell {number}:", *lines])


def kept_runs(root: Path, chapter: Path) -> list[Run]:
    """The kept executions of a chapter, latest first."""
    paths = (root / "_build/executed" / chapter.with_suffix("")).glob("*.ipynb")
    latest = sorted(paths, key=lambda path: path.stat().st_mtime, reverse=True)
    return [Run(p, **json.loads(p.read_text(encoding="utf-8"))["metadata"]["saliency_sanity"]) for p in latest]


def run_chapter(root: Path, chapter: Path, around: str) -> tuple[Run, bool]:
    """The chapter's run, and whether it was kept from before."""
    path = root / "_build/executed" / chapter.with_suffix("") / f"{key(root, chapter, around)}.ipynb"
    kept = path.exists()
    if kept:
        path.touch()
    else:
        notebook = execute(root, chapter)
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        nbformat.write(notebook, unfinished)
        unfinished.replace(path)
    latest, *others = kept_runs(root, chapter)
    for old in others[KEPT - 1 :]:
        old.path.unlink()
    return latest, kept


def run_chapters(root: Path, wanted: list[Path]) -> tuple[dict[Path, Run], list[str]]:
    """Run the chapters, a line of progress each; a failure does not keep the others from running."""
    around, runs, failures = surroundings(root), {}, []
    for position, chapter in enumerate(wanted, start=1):
        print(f"[{position}/{len(wanted)}] {chapter.with_suffix('')} ... ", end="", flush=True)
        try:
            run, kept = run_chapter(root, chapter, around)
        except ChapterFailed as failed:
            failures.append(str(failed))
            print("FAILED")
            continue
        runs[chapter] = run
        budget = "" if run.in_budget else f", over the budget of {SECONDS} s and {MEGABYTES} MB"
        print(f"{run.seconds:.1f} s, {run.megabytes} MB{budget}{' (unchanged)' if kept else ''}")
    return runs, failures
