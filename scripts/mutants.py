"""Would the tests notice? One small error at a time in the modules that compute what is claimed; `make mutants`.

A mutant is a module with one edit: another comparison, sum, number, half of a slice, a condition turned round, a call
left out. Each of a sample, which follows from the text of the edits, runs the tests of its module in a copy of the book
up to the first that fails. An edit that changes nothing a reader relies on stands in tests/equivalent_mutants.yml with
its reason. Ends with status 1 where fewer than 90 % of the others die, or more than 10 % are called equivalent.
"""

import argparse
import ast
import hashlib
import importlib
import multiprocessing.connection
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml

ROOT = Path(__file__).parent.parent
FIRST = ["tests/test_reference_lines.py", "tests/test_defaults.py"]  # the quick ones
RUNS = [*FIRST, "tests/test_runs.py", "tests/test_comparing.py", "tests/test_sanity.py"]
TESTS = {
    **dict.fromkeys(["helpers/sanity.py", "helpers/comparing.py", "helpers/heatmaps.py"], RUNS),
    "helpers/followups.py": [*FIRST, "tests/test_followups.py", "tests/test_runs.py"],
    "helpers/similarity.py": [*FIRST, "tests/test_similarity.py"],
    "helpers/localization.py": ["tests/test_localization.py"],
    "helpers/plots.py": ["tests/test_defaults.py", "tests/test_plots.py"],
    "helpers/book/claims/__init__.py": ["tests/book/test_claims.py"],
}
LOOKS = {"alpha", "color", "figsize", "fontsize", "frameon", "ha", "linewidth", "ncols", "rotation", "stacklevel", "va"}
PAIRS = "FloorDiv Mult, Mod Mult, Pow Mult, Mult Div, Add Sub, Lt LtE, Gt GtE, Eq NotEq, Is IsNot, In NotIn, And Or, "
TYPES = [[getattr(ast, name) for name in pair.split()] for pair in (PAIRS + "BitAnd BitOr").split(", ")]
SWAPS = {one: other for pair in TYPES for one, other in (pair, pair[::-1])}  # of two for one type the last counts


class Mutant(NamedTuple):
    """An edit: what stands between two places of a file, counted in characters, becomes another text."""

    file: str
    start: int
    end: int
    text: str

    def applied(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]

    def lines(self, source: str) -> tuple[int, str, str]:
        """The number of the first line that changes, and the lines that do, before and after."""
        first, last = source.rfind("\n", 0, self.start) + 1, source.find("\n", self.end)
        new = source[first : self.start] + self.text + source[self.end : last]
        return source.count("\n", 0, first) + 1, " ".join(source[first:last].split()), " ".join(new.split())


def edits(node: ast.AST) -> Iterator[ast.AST | str]:
    """What may stand in the place of a piece of code."""
    if isinstance(node, ast.Compare):
        for i, op in enumerate(node.ops):
            yield ast.Compare(node.left, [*node.ops[:i], SWAPS[type(op)](), *node.ops[i + 1 :]], node.comparators)
    elif isinstance(node, (ast.BinOp, ast.BoolOp)) and type(node.op) in SWAPS:
        yield type(node)(**{**vars(node), "op": SWAPS[type(node.op)]()})
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Constant) and type(node.value) in (bool, int, float):
        value = node.value
        yield ast.Constant({bool: not value, int: value - 1 if value else 1, float: 0.9 * value}[type(value)])
    elif isinstance(node, ast.Slice):
        yield from (ast.Slice(**{**vars(node), end: None}) for end in ("lower", "upper") if getattr(node, end))
    elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        yield "pass"
    elif isinstance(node, (ast.If, ast.IfExp)) and not isinstance(node.test, (ast.Compare, ast.BoolOp, ast.UnaryOp)):
        yield ast.UnaryOp(ast.Not(), node.test)


def code(node: ast.AST) -> Iterator[ast.AST]:
    """The pieces of code under a node, without messages, types and what only changes how a figure looks."""
    if isinstance(node, (ast.JoinedStr, ast.Raise)) or isinstance(node, ast.keyword) and node.arg in LOOKS:
        return
    yield node
    for name, value in ast.iter_fields(node):
        if name not in ("annotation", "returns", "decorator_list"):
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from code(child)


def mutants(file: str, source: str) -> list[Mutant]:
    """All mutants of a file, each once."""
    rows = source.splitlines(keepends=True)

    def at(line: int, column: int) -> int:
        return sum(map(len, rows[: line - 1])) + len(rows[line - 1].encode()[:column].decode())

    found: dict[Mutant, None] = {}
    for node in code(ast.parse(source)):
        for new in edits(node):
            place = node.test if isinstance(node, (ast.If, ast.IfExp)) else node
            plain = isinstance(new, (ast.Slice, ast.Constant))
            text = new if isinstance(new, str) else ast.unparse(new) if plain else f"({ast.unparse(new)})"
            ends = at(place.lineno, place.col_offset), at(place.end_lineno, place.end_col_offset)
            found[Mutant(file, *ends, text)] = None
    return list(found)


def sample(sources: dict[str, str], count: int) -> list[Mutant]:
    """So many mutants, as evenly from all files as these have any, in the order of files and places."""
    by_file = []
    for file, source in sources.items():
        drawn = {m: hashlib.sha256(repr(m.lines(source)[1:]).encode()).hexdigest() for m in mutants(file, source)}
        by_file.append(sorted(drawn, key=drawn.__getitem__))
    return sorted([mutant for turn in zip_longest(*by_file) for mutant in turn if mutant is not None][:count])


def judged(sources: dict[str, str], path: Path = ROOT / "tests/equivalent_mutants.yml") -> dict[tuple, str]:
    """The mutants called equivalent, as file, line and what it becomes, with the reason; all of them must be there."""
    known = {(e["file"], e["line"], e["becomes"]): e["reason"] for e in yaml.safe_load(path.read_text("utf-8")) or []}
    there = {(m.file, *m.lines(sources[m.file])[1:]) for file in sources for m in mutants(file, sources[file])}
    if gone := [entry for entry in known if entry not in there]:
        raise ValueError(f"{path.name}: no mutant of the code as it is: {gone}. Take these entries out.")
    return known


def run_tests(mutant: Mutant | None, tests: Sequence[str], root: Path, place: str) -> None:
    """In a process of its own: copy the book, make the edit, run the tests; pytest's status is the exit status."""
    for part in root.iterdir():
        if part.name in ("helpers", "tests"):
            shutil.copytree(part, Path(place, part.name))  # compiled files too, which saves seconds
        elif part.name != ".path":
            Path(place, part.name).symlink_to(part)
    if mutant:
        Path(place, mutant.file).write_text(mutant.applied((root / mutant.file).read_text("utf-8")), "utf-8")
    (paths := Path(place, ".path")).mkdir()
    (paths / "saliency_sanity").symlink_to(Path(place, "helpers"))
    (paths / "saliency_sanity_assets").symlink_to(root / "assets/files")
    os.chdir(place)
    os.environ["PYTHONPATH"] = str(paths)
    sys.path.insert(0, str(paths))
    with open(os.devnull, "wb") as nothing:
        os.dup2(nothing.fileno(), 1)
        os.dup2(nothing.fileno(), 2)
    for name in [name for name in sys.modules if name.partition(".")[0] == "saliency_sanity"]:
        del sys.modules[name]
    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def outcomes(chosen: list, tests: dict, root: Path, limit: float, at_once: int) -> Iterator[tuple[Mutant | None, bool]]:
    """Each mutant with whether it died, as they end: by a test that fails, in an endless loop or with the process."""
    fork, waiting, running = multiprocessing.get_context("fork"), list(chosen), {}
    with tempfile.TemporaryDirectory() as folder:
        while waiting or running:
            while waiting and len(running) < at_once:
                mutant, place = waiting.pop(0), tempfile.mkdtemp(dir=folder)
                mine = tests[mutant.file] if mutant else [one for some in tests.values() for one in some]
                process = fork.Process(target=run_tests, args=(mutant, list(dict.fromkeys(mine)), root, place))
                process.start()
                running[process] = mutant, place, time.monotonic()
            multiprocessing.connection.wait([process.sentinel for process in running], timeout=1)
            latest = time.monotonic() - limit
            for process in [p for p, (_, _, start) in running.items() if start < latest or not p.is_alive()]:
                mutant, place, _ = running.pop(process)
                process.kill()
                process.join()
                shutil.rmtree(place, ignore_errors=True)
                if process.exitcode in (3, 4, 5):
                    raise RuntimeError(f"pytest could not run {tests[mutant.file] if mutant else 'the tests'}.")
                yield mutant, process.exitcode != 0


def main(arguments: Sequence[str] | None = None) -> str | None:
    options = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_argument("--sample", type=int, default=300)
    options.add_argument("--only", default="", help="modules whose path holds this text")
    asked = options.parse_args(arguments)
    sources = {file: (ROOT / file).read_text("utf-8") for file in TESTS}
    equivalent, chosen = judged(sources), [m for m in sample(sources, asked.sample) if asked.only in m.file]
    tests = {m.file: TESTS[m.file] for m in chosen}
    list(map(importlib.import_module, ("torch", "torchvision", "pandas", "scipy.stats", "skimage")))  # once for all
    start = time.monotonic()
    if any(died for _, died in outcomes([None], tests, ROOT, float("inf"), 1)):
        return "The tests fail without any mutant: mend that first."
    limit = 3 * (time.monotonic() - start) + 60
    spared = [m for m in chosen if (m.file, *m.lines(sources[m.file])[1:]) in equivalent]
    tried, survived = [m for m in chosen if m not in spared], 0
    for mutant, died in outcomes(tried, tests, ROOT, limit, os.cpu_count() or 1):
        if not died:
            survived += 1
            print("SURVIVED {}:{}\n  - {}\n  + {}".format(mutant.file, *mutant.lines(sources[mutant.file])), flush=True)
    print(f"{len(tried) - survived} of {len(tried)} died; {len(spared)} of {len(chosen)} are called equivalent.")
    few = survived <= 0.1 * len(tried) and len(spared) <= 0.1 * len(chosen)
    return None if few else "More than 10 % survive, or are called equivalent."


if __name__ == "__main__":
    sys.exit(main())
