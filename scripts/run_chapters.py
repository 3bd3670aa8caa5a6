"""Run the chapters of the book and keep what they gave; used by build_book.py.

The notebooks of _toc.yml are executed by nbclient, each in a kernel of its own with one thread, some at a time. What a
chapter gave is kept in _build/executed: it runs again only when something changes that its outputs depend on.
"""

import ast
import math
import os
import re
import time
from collections.abc import Iterator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import cache
import nbformat
import psutil
import yaml
from contents import entries, toc
from IPython.core.inputtransformer2 import TransformerManager
from nbclient import NotebookClient
from nbclient.exceptions import CellControlSignal
from nbformat import NotebookNode
from rendering import CLAIM
from scorecard import surprising

SECONDS, MEGABYTES = 60, 1500  # the budget of a chapter
CELL_TIMEOUT = 900
AT_ONCE = min(2, os.cpu_count() or 1)
MOMENT = 0.05  # seconds between two looks at the kernels
THREADS = [f"{library}_NUM_THREADS" for library in ("OMP", "MKL", "OPENBLAS", "NUMEXPR")] + ["VECLIB_MAXIMUM_THREADS"]
ENVIRONMENT = dict.fromkeys(THREADS, "1") | {"SANITY_STATIC": "1"}  # pictures instead of panels: book/live_panel.py
NO_SETTINGS = {"SANITY_STRICT", "SANITY_STATIC", cache.OPENED}  # outputs do not depend on them
EXECUTION_TAGS = {"skip-execution", "raises-exception"}  # those that nbclient knows
OUR_ADDRESS, A_VERSION = re.compile(r"git\+[^\s\"']+"), re.compile(r"\"\d+(\.\w+)+\"")


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
    return entries(toc(root))


def chapters(root: Path) -> list[Path]:
    """The notebooks of the table of contents in reading order, relative to the root."""
    return [Path(f"{entry}.ipynb") for entry in toc_entries(root) if entry.startswith("notebooks/")]


def read(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def key(root: Path, chapter: Path, around: cache.Surroundings) -> str:
    """The digest of all that the chapter's outputs depend on, but for the assets that it opens.

    Neither prose nor metadata; of the first code cell, which installs the package, neither its address nor its version.
    """
    cells = code_cells(read(root / chapter))
    sources = [cell.source for cell in cells]
    sources[:1] = [A_VERSION.sub('""', OUR_ADDRESS.sub("", source)) for source in sources[:1]]
    tags = [sorted(EXECUTION_TAGS.intersection(cell.metadata.get("tags", []))) for cell in cells]
    used = cache.closure(trees(sources), around.modules)
    files = [*cache.contents(root, used), tested(root / "helpers/book/claims" / f"{chapter.stem}.yml")]
    settings = {name: value for name, value in os.environ.items() if name.startswith("SANITY_")}
    settings = {"SANITY_SEED": "0"} | {name: settings[name] for name in sorted(settings.keys() - NO_SETTINGS)}
    return cache.digest(sources, tags, files, around.versions, settings)


def tested(file: Path) -> list[dict] | None:
    """The claims of a chapter's file, without their history, which no output holds; `None` where there is no file."""
    if not file.exists():
        return None
    claims = yaml.safe_load(file.read_text(encoding="utf-8"))["claims"]
    return [{name: value for name, value in claim.items() if name != "history"} for claim in claims]


def trees(sources: list[str]) -> Iterator[ast.AST]:
    """The code of cells, those aside that are no Python: they fail when they run."""
    for source in sources:
        code = re.sub("^%%.*", "", source)
        for python in (str, TransformerManager().transform_cell):  # as it stands, for speed, or without magics
            with suppress(SyntaxError):
                yield ast.parse(python(code))
                break


def shelf(root: Path, chapter: Path) -> Path:
    """The folder of all that is kept of a chapter."""
    return root / "_build/executed" / chapter.with_suffix("")


class Execution:
    """A chapter that is run in a thread of its own while the main thread watches the memory of its kernel."""

    def __init__(self, root: Path, chapter: Path, around: cache.Surroundings):
        self.root, self.chapter, self.around = root, chapter, around
        self.seconds, self.megabytes, self.client = 0.0, 0, None

    def run(self) -> Run:
        """Execute the chapter and keep it."""
        found = key(self.root, self.chapter, self.around)
        return as_run(cache.keep(shelf(self.root, self.chapter), found, self.around.assets, self.execute))

    def execute(self, folder: Path, environment: dict[str, str]) -> dict:
        """Write the notebook with its outputs into a folder; what it took is returned."""
        notebook = read(self.root / self.chapter)
        desk = self.root / "_build/source" / self.chapter.parent
        desk.mkdir(parents=True, exist_ok=True)
        now = {}
        self.client = NotebookClient(
            notebook,
            kernel_name="python3",
            timeout=CELL_TIMEOUT,
            extra_arguments=["--log-level=ERROR"],  # no note on every start that kernels talk over TCP
            resources={"metadata": {"path": desk}},
            on_cell_start=lambda cell, cell_index: now.update(cell=cell, number=cell_index + 1),
        )
        try:
            self.client.execute(env=os.environ | ENVIRONMENT | environment)
        except (CellControlSignal, RuntimeError) as error:  # of these, RuntimeError is the death of a kernel
            raise ChapterFailed(failure(self.chapter, error, **now)) from None
        nbformat.write(notebook, folder / "notebook.ipynb")
        took = {"seconds": round(self.seconds, 1), "megabytes": self.megabytes}
        return took | {"strict": strict() or not surprises(notebook)}

    def watch(self) -> None:
        """Note the kernel's time on a core, and the memory that it holds now, if it is more than ever before."""
        provisioner = getattr(getattr(self.client, "km", None), "provisioner", None)
        if number := getattr(provisioner, "pid", None):
            with suppress(psutil.NoSuchProcess):
                kernel = psutil.Process(number)
                self.seconds = max(self.seconds, sum(kernel.cpu_times()[:2]))  # a busy machine does not count
                self.megabytes = max(self.megabytes, kernel.memory_info().rss // 1024**2)


def failure(chapter: Path, error: Exception, cell: NotebookNode | None = None, number: int = 0) -> str:
    """Which cell failed, how it begins, and the end of its traceback."""
    if cell is None:
        return f"{chapter.as_posix()}, before its first cell:\n    {type(error).__name__}: {error}"
    raised = [line for output in cell.outputs for line in output.get("traceback", [])]
    reason = re.sub(r"\x1b\[[\d;]*m", "", "\n".join(raised) or f"{type(error).__name__}: {error}")
    source = cell.source.splitlines()
    source = [*source[:5], "..."] if len(source) > 5 else source
    lines = [*(f"| {line}" for line in source), "", *reason.strip().splitlines()[-12:]]
    return "\n    ".join([f"{chapter.as_posix()}, cell {number}:", *lines])


def strict() -> bool:
    return os.environ.get("SANITY_STRICT") == "1"


def surprises(notebook: NotebookNode) -> list[str]:
    """The claims whose checks came out as a strict run does not let pass."""
    outputs = [output for cell in code_cells(notebook) for output in cell.outputs]
    cards = [output.data[CLAIM] for output in outputs if CLAIM in output.get("data", {})]
    return [card["id"] for card in cards if any(map(surprising, card["findings"]))]


def as_run(kept: cache.Kept) -> Run:
    return Run(kept.folder / "notebook.ipynb", kept.note["seconds"], kept.note["megabytes"])


def kept_runs(root: Path, chapter: Path) -> list[Run]:
    """The kept executions of a chapter, latest first."""
    return [as_run(one) for one in cache.kept(shelf(root, chapter))]


def kept_run(root: Path, chapter: Path, around: cache.Surroundings) -> Run | None:
    """The kept execution that another one would only repeat."""
    found = cache.find(shelf(root, chapter), key(root, chapter, around), around.assets)
    return as_run(found) if found and (found.note["strict"] or not strict()) else None


def expected_seconds(root: Path, chapter: Path) -> float:
    """How long the chapter ran the last time; one that never ran comes first."""
    latest = kept_runs(root, chapter)
    return latest[0].seconds if latest else math.inf


def run_chapters(root: Path, wanted: list[Path], at_once: int = AT_ONCE) -> tuple[dict[Path, Run], list[str]]:
    """Run the chapters that changed, the longest first; a failure does not keep the others from running.

    A line is printed for each chapter that is done. Where this is interrupted, the kernels are killed, and what was
    done is kept.
    """
    around, failures = cache.surroundings(root), {}
    runs = {chapter: run for chapter in wanted if (run := kept_run(root, chapter, around))}
    for number, (chapter, run) in enumerate(runs.items(), start=1):
        report(number, len(wanted), chapter, f"{took(run)} (unchanged)")
    changed = sorted((chapter for chapter in wanted if chapter not in runs), key=lambda c: -expected_seconds(root, c))
    if changed:
        together = f", {at_once} at a time" if len(changed) > at_once > 1 else ""
        print(f"Running {len(changed)} of {len(wanted)} chapters{together} ...", flush=True)
    with ThreadPoolExecutor(at_once) as pool:
        executions = {pool.submit(one.run): one for one in (Execution(root, chapter, around) for chapter in changed)}
        try:
            while executions:
                done, _ = wait(executions, MOMENT, FIRST_COMPLETED)
                for execution in executions.values():
                    execution.watch()
                for future in done:
                    chapter = executions.pop(future).chapter
                    try:
                        runs[chapter] = future.result()
                        ended = took(runs[chapter])
                    except ChapterFailed as failed:
                        failures[chapter], ended = str(failed), "FAILED"
                    report(len(runs) + len(failures), len(wanted), chapter, ended)
        except BaseException:  # also Ctrl-C and SIGTERM
            pool.shutdown(wait=False, cancel_futures=True)
            while not all(future.done() for future in executions):
                kill_children()
                time.sleep(MOMENT)
            raise
    return {c: runs[c] for c in wanted if c in runs}, [failures[c] for c in wanted if c in failures]


def took(run: Run) -> str:
    budget = "" if run.in_budget else f", over the budget of {SECONDS} s and {MEGABYTES} MB"
    return f"{run.seconds:.1f} s, {run.megabytes} MB{budget}"


def report(number: int, count: int, chapter: Path, ended: str) -> None:
    print(f"[{number}/{count}] {chapter.with_suffix('').as_posix()}: {ended}", flush=True)


def kill_children() -> None:
    """End all processes that this one started, and theirs."""
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            process.kill()
