"""Run the chapters and make the pages of the book.

    python scripts/build_book.py                    run what has changed, then write the pages to _build/html
    python scripts/build_book.py --only cascading   one chapter: quick, and warnings do not stop it
    python scripts/build_book.py --no-html          run the chapters only

Ctrl-C and SIGTERM stop it at once; chapters that are done are kept.

The book's sources, the notebooks with the outputs of their last run, are laid out in _build/source.
Jupyter Book makes pages of them without executing anything.
"""

import argparse
import base64
import csv
import hashlib
import inspect
import io
import json
import os
import posixpath
import re
import shutil
import signal
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

sys.path.append(str(Path(__file__).resolve().parents[1] / "apps/blind_test"))

import api_reference
import blind_test_page
import nbformat
import references
import scorecard
import zoo_page
from address import pages, repository
from cache import digest, surroundings
from made import made
from nbformat import NotebookNode
from PIL import Image
from rendering import render
from run_chapters import AT_ONCE, Run, chapters, code_cells, kept_runs, read, run_chapters, toc_entries

APPS = Path(__file__).resolve().parents[1] / "apps"


def timings(runs: dict[Path, Run]) -> str:
    """The table that book/timings.md shows, as CSV."""
    table = io.StringIO()
    rows = csv.writer(table, lineterminator="\n")
    rows.writerow(["Chapter", "Seconds", "Peak memory (MB)", "Within the budget"])
    for chapter, run in runs.items():
        rows.writerow([f"[](/{chapter.as_posix()})", run.seconds, run.megabytes, "yes" if run.in_budget else "no"])
    return table.getvalue()


def fill(page: str, parts: dict[str, str]) -> str:
    """Replace the line `% part` of a Markdown page by what was generated for it, for each part."""
    for part, text in parts.items():
        before, line, after = page.partition(f"\n% {part}\n")
        if not line:
            raise ValueError(f"the page has no line '% {part}'.")
        page = f"{before}\n{text}\n{after}"
    return page


def link_locally(text: str, home: str, root: Path, chapter: Path) -> str:
    """Turn Markdown links to the published pages, at `home`, into links between sources, which Sphinx checks."""

    def source(link: re.Match) -> str:
        suffix = ".ipynb" if (root / f"{link[1]}.ipynb").exists() else ".md"
        return f"]({posixpath.relpath(link[1], chapter.parent.as_posix())}{suffix}"

    return re.sub(rf"\]\({re.escape(home)}([\w/-]+)\.html", source, text)


def lighten(data: dict) -> None:
    """Replace a PNG figure by the lighter of two forms that look the same: 256 colours, or JPEG."""
    if "image/png" not in data:
        return
    picture = Image.open(io.BytesIO(base64.b64decode(data.pop("image/png")))).convert("RGB")
    forms = {"image/png": io.BytesIO(), "image/jpeg": io.BytesIO()}
    picture.quantize(256, dither=Image.Dither.NONE).save(forms["image/png"], "PNG", optimize=True)
    picture.save(forms["image/jpeg"], "JPEG", quality=75)
    kind = min(forms, key=lambda kind: len(forms[kind].getvalue()))
    data[kind] = base64.b64encode(forms[kind].getvalue()).decode()


def lighter(run: Run) -> NotebookNode:
    """An executed chapter with lighter figures, which are kept beside it until `lighten` changes."""
    kept = run.path.with_name(f"lighter-{digest(inspect.getsource(lighten))[:8]}.ipynb")
    if kept.exists():
        return read(kept)
    notebook = read(run.path)
    for cell in code_cells(notebook):
        for output in cell.outputs:
            lighten(output.get("data", {}))
    for old in run.path.parent.glob("lighter-*"):
        old.unlink()
    unfinished = kept.with_suffix(".unfinished")
    nbformat.write(notebook, unfinished)
    unfinished.replace(kept)
    return notebook


def take_outputs(notebook: NotebookNode, executed: NotebookNode) -> None:
    """Put what an execution gave into the code cells of the notebook as it stands now.

    Cells of the same code have the same place. Where the code is another, in pages of chapters that were not run, the
    cells that still have their id get what they gave.
    """
    notebook.metadata.language_info = executed.metadata.language_info
    now, then = code_cells(notebook), code_cells(executed)
    same_place = len(now) == len(then)
    gave = {cell.get("id"): cell for cell in then}
    for place, cell in enumerate(now):
        if source := then[place] if same_place else gave.get(cell.get("id")):
            cell.outputs, cell.execution_count = source.outputs, source.execution_count


def checked(root: Path, runs: dict[Path, Run], *, strict: bool) -> list[scorecard.Chapter]:
    """The chapters with their claims and cards, undecided findings listed; with `strict` a problem is an error."""
    executed = {chapter: runs[chapter].path if chapter in runs else None for chapter in chapters(root)}
    found = scorecard.read(root, executed)
    if left := scorecard.undecided(found):
        print("Findings that stayed undecided:\n  " + "\n  ".join(left))
    if problems := scorecard.problems(found) + scorecard.pageless(found, toc_entries(root)):
        message = "Claims and cards:\n  " + "\n  ".join(problems)
        if strict:
            sys.exit(f"\nThe book was not built. {message}")
        print(message)
    return found


def generated(
    root: Path, claimed: list[scorecard.Chapter], blind: Path, playground: Path
) -> dict[Path, dict[str, str]]:
    """What is written into pages of book/, by page and place; the folders are what the two scripts made."""
    return (
        blind_test_page.parts(blind)
        | scorecard.pages(claimed, references.cited(root))
        | {
            Path("book/zoo.md"): zoo_page.parts(root),
            Path("book/api.md"): {"api: reference": api_reference.reference(root)},
            Path("book/playground.md"): {"playground: unlike": (playground / "unlike.txt").read_text(encoding="utf-8")},
        }
    )


def files(blind: Path, playground: Path) -> dict[Path, bytes]:
    """What is served beside the pages, by its place in the sources of the book."""
    app = [path for folder in (APPS / "playground", playground) for path in folder.iterdir()]
    loaded = {Path("book/extra/playground", path.name): path for path in app if path.suffix in (".css", ".js")}
    still = {Path("book/playground.png"): playground / "still.png"}
    return blind_test_page.files(blind) | {place: path.read_bytes() for place, path in (loaded | still).items()}


def layout(
    root: Path,
    runs: dict[Path, Run],
    places: dict[Path, dict[str, str]],
    served: dict[Path, bytes],
    cards: dict[str, dict] | None = None,
) -> dict[Path, bytes]:
    """Every source of the pages, by its path from the root.

    `places` come from `generated`, `served` from `files`, and `cards`, how claims are drawn, from `scorecard.options`.
    """
    found = [path for folder in ("_static", "_templates", "book") for path in sorted((root / folder).rglob("*"))]
    found += [root / name for name in ("_config.yml", "_toc.yml", "scripts/page_extras.py")]
    found = [path for path in found if path.is_file()]
    sources = served | {path.relative_to(root): path.read_bytes() for path in found}
    home = pages(repository(root))
    for chapter in chapters(root):
        notebook = read(root / chapter)
        if chapter in runs:
            take_outputs(notebook, lighter(runs[chapter]))
        for cell in notebook.cells:
            if cell.cell_type == "markdown":
                cell.source = link_locally(cell.source, home, root, chapter)
            for output in cell.get("outputs", []):
                render(root, output.get("data", {}), cards)
        sources[chapter] = nbformat.writes(notebook).encode()
    sources[Path("book/timings.csv")] = timings(runs).encode()
    sources[references.JOINED] = references.joined(root).encode()
    for page, parts in places.items():
        sources[page] = fill(sources[page].decode(), parts).encode()
    return sources


def write_changed(sources: dict[Path, bytes], folder: Path) -> None:
    """Make `folder` hold these files and no others; files that stay the same keep their time."""
    for path in folder.rglob("*"):
        if path.is_file() and path.relative_to(folder) not in sources:
            path.unlink()
    for name, content in sources.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


def front_door(landing: str, target: str) -> str:
    """The page at the book's own address: leads to the landing page, and shows other sites the same preview."""
    tags = re.findall(r'<title>.*?</title>|<meta (?:property|name)="(?:og:|twitter:|desc)[^>]*>', landing, re.DOTALL)
    head = "\n".join(['<meta charset="utf-8" />', *tags, f'<meta http-equiv="refresh" content="0; url={target}" />'])
    link = f'<a href="{target}">Read the book</a>'
    return f'<!DOCTYPE html>\n<html lang="en">\n<head>\n{head}\n</head>\n<body>{link}</body>\n</html>\n'


def make_pages(root: Path, runs: dict[Path, Run], *, strict: bool) -> None:
    """Let Jupyter Book write _build/html; with `strict` a warning is an error.

    What the pages were made from is noted in _build/pages.json: the same again is left as it is, and a change
    of more than pages and notebooks starts from nothing, so that no old page remains. So does the first
    strict build after one that was not, because Sphinx gives a page's warnings only when it reads the page.
    """
    build, note = root / "_build", root / "_build/pages.json"
    claimed = checked(root, runs, strict=strict)
    around = surroundings(root)
    folders = [made(root, APPS / name / f"{name}.py", around) for name in ("blind_test", "playground")]
    cards = scorecard.options(claimed, references.cited(root))
    sources = layout(root, runs, generated(root, claimed, *folders), files(*folders), cards)
    frame = {path: text for path, text in sources.items() if path.suffix not in (".ipynb", ".md", ".csv")}
    tools = sorted(f"{one.name}=={one.version}" for one in distributions())
    made_from = {"strict": strict}
    for name, part in (("frame", frame), ("all", sources)):
        made_from[name] = hashlib.sha256(repr([tools, sorted(part.items())]).encode()).hexdigest()
    before = json.loads(note.read_text(encoding="utf-8")) if note.exists() else {"strict": False, "frame": ""}
    if before == made_from:
        return
    note.unlink(missing_ok=True)
    if before["frame"] != made_from["frame"] or strict > before["strict"]:
        for name in ("html", ".doctrees", "jupyter_execute"):
            shutil.rmtree(build / name, ignore_errors=True)
    write_changed(sources, build / "source")
    print("Making the pages ...", flush=True)
    program = Path(sys.executable).with_name("jupyter-book")
    command = [program, "build", build / "source", "--path-output", root, "--quiet"]
    command += ["-W", "-n", "--keep-going"] if strict else []
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        sys.exit("\nThe pages were not made; the warnings above say why.")
    landing = f"{toc_entries(root)[0]}.html"
    door = front_door((build / "html" / landing).read_text(encoding="utf-8"), landing)
    (build / "html/index.html").write_text(door, encoding="utf-8")
    note.write_text(json.dumps(made_from), encoding="utf-8")


def stop(*_) -> None:
    """What SIGTERM does: the same as Ctrl-C."""
    raise KeyboardInterrupt


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    here = Path(__file__).resolve().parent.parent
    parser.add_argument("--only", metavar="SLUG", default="", help="one chapter, by the end of its path")
    parser.add_argument("--no-html", action="store_true", help="run the chapters and make no pages")
    parser.add_argument("--at-once", metavar="N", type=int, default=AT_ONCE, help="how many chapters run at a time")
    parser.add_argument("--root", type=Path, default=here, help="the folder of the book")
    options = parser.parse_args()
    root = options.root.resolve()

    wanted = [c for c in chapters(root) if c.with_suffix("").as_posix().endswith(options.only)]
    if not wanted:
        sys.exit(f"No chapter ends in {options.only!r}: " + ", ".join(c.stem for c in chapters(root)))
    runs, failures = run_chapters(root, wanted, options.at_once)
    if failures:
        sys.exit("\nThe book was not built, because these chapters failed:\n\n" + "\n\n".join(failures))
    if options.no_html:
        return
    if options.only:  # the other pages show their latest run, if there is one
        latest = {chapter: kept_runs(root, chapter) for chapter in chapters(root) if chapter not in runs}
        runs |= {chapter: kept[0] for chapter, kept in latest.items() if kept}
    make_pages(root, runs, strict=not options.only)
    print(f"The book is ready: {os.path.relpath(root / '_build/html/index.html')}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\nStopped. What was done is kept.", file=sys.stderr)
        sys.exit(130)
