"""Imitating Colab and Binder: what is lent, what is replaced, and that nothing takes more than it may."""

import subprocess
import sys
from pathlib import Path

import anywhere
import nbformat
import pytest
from run_chapters import chapters

ROOT = Path(__file__).parent.parent
ALLOCATE = "import time; held = bytearray(200 * 1024**2); time.sleep({})"
HOLD = ALLOCATE.format(6000)
IN_A_CHILD = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {!r}]))"


def run(code: str, folder: Path, **limits) -> anywhere.Watched:
    limits = {"megabytes": 1000, "seconds": 600} | limits
    return anywhere.watch([sys.executable, "-c", code], cwd=folder, env=anywhere.environment(), **limits)


def test_a_program_within_its_limits_is_measured(tmp_path):
    ran = run(ALLOCATE.format(1) + "; print('good')", tmp_path)
    assert ran.end == "done" and 200 <= ran.megabytes < 400 and ran.seconds >= 1
    assert ran.output == "good\n"


@pytest.mark.parametrize("code", [HOLD, IN_A_CHILD.format(HOLD)], ids=["own", "child"])
def test_too_much_memory_ends_a_program(tmp_path, code):
    ran = run(code, tmp_path, megabytes=150)
    assert ran.end == "memory" and ran.megabytes > 150


def test_too_much_time_ends_a_program(tmp_path):
    ran = run(IN_A_CHILD.format("import time; time.sleep(6000)"), tmp_path, seconds=1)
    assert ran.end == "time" and ran.seconds >= 1


def test_a_failure_is_told_with_what_was_printed(tmp_path):
    ran = run("raise SystemExit('no weights')", tmp_path)
    assert ran.end == "failed" and "no weights" in ran.output


@pytest.mark.skipif(not hasattr(anywhere.os, "sched_getaffinity"), reason="this system does not tell")
def test_a_program_has_one_core(tmp_path):
    code = "import os; print(len(os.sched_getaffinity(0)))"
    assert run(IN_A_CHILD.format(code), tmp_path).output == "1\n"


def test_closure_follows_requirements():
    found = anywhere.closure(["matplotlib"])
    assert {"matplotlib", "numpy", "pillow", "cycler"} <= found
    assert not {"torch", "pytest", "captum"} & found


def test_lent_packages_are_there_and_others_are_not(tmp_path):
    python = anywhere.lend(["packaging"], tmp_path / "new")
    assert "packaging" in anywhere.installed(python)

    def finds(module: str) -> bool:
        command = [python, "-c", f"import {module}"]
        return subprocess.run(command, cwd=tmp_path, env=anywhere.environment(), capture_output=True).returncode == 0

    assert finds("packaging.version") and not finds("numpy") and not finds("saliency_sanity")


@pytest.mark.parametrize("chapter", chapters(ROOT), ids=lambda chapter: chapter.stem)
def test_a_chapter_installs_what_is_given_instead_of_the_address(chapter):
    code = anywhere.program(ROOT, chapter, "git+file://localhost/here")
    assert code.count("git+") == 1 and 'BOOK = "git+file://localhost/here"\n' in code


def test_a_chapter_without_the_first_cell_is_refused(tmp_path):
    (tmp_path / "pyproject.toml").write_text(
        '[project.urls]\nRepository = "https://github.com/Ann/b"\n', encoding="utf-8"
    )
    (tmp_path / "_config.yml").write_text("repository:\n  branch: main\n", encoding="utf-8")
    nbformat.write(nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1 + 1")]), tmp_path / "one.ipynb")
    with pytest.raises(ValueError, match="does not install"):
        anywhere.program(tmp_path, Path("one.ipynb"), "elsewhere")
