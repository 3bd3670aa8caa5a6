"""Continuous integration: valid workflows that run the project's two commands, with no more rights than they need."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {path.name: yaml.safe_load(path.read_text(encoding="utf-8")) for path in PATHS}
JOBS = {(name, job): about for name, workflow in WORKFLOWS.items() for job, about in workflow["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def check(*paths: Path) -> subprocess.CompletedProcess:
    """Hold files against the schema of workflows that comes with check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    return subprocess.run([*command, *paths], capture_output=True, text=True)


def test_workflows_follow_the_schema(tmp_path):
    assert {path.name for path in PATHS} == {"anywhere.yml", "binder.yml", "book.yml", "library.yml", "newest.yml"}
    assert check(*PATHS).returncode == 0, check(*PATHS).stdout
    wrong = PATHS[0].read_text(encoding="utf-8").replace("runs-on", "run-on")
    (tmp_path / "wrong.yml").write_text(wrong, encoding="utf-8")
    assert check(tmp_path / "wrong.yml").returncode == 1


@pytest.mark.skipif(
    shutil.which("actionlint") is None, reason="there is no actionlint (https://rhysd.github.io/actionlint)"
)
def test_workflows_pass_actionlint():
    ran = subprocess.run(["actionlint", *PATHS], capture_output=True, encoding="utf-8")
    assert ran.returncode == 0, ran.stdout


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)
def test_a_workflow_says_first_that_it_was_not_run(path):
    assert path.read_text(encoding="utf-8").startswith("# Not run here yet: ")


def test_the_library_is_tested_on_three_systems_with_every_python_that_it_promises():
    job = JOBS["library.yml", "test"]
    assert job["strategy"]["matrix"] == {
        "os": ["ubuntu-latest", "macos-latest", "windows-latest"],
        "python": ["3.11", "3.12", "3.13"],
    }
    assert not [step["run"] for step in job["steps"] if "make" in step.get("run", "")], "Windows has no make"
    assert JOBS["book.yml", "build"]["runs-on"] == "ubuntu-latest"


def test_the_tests_of_the_library_mirror_its_modules(pytestconfig):
    conftest = pytestconfig.pluginmanager.get_plugin(str(ROOT / "tests" / "conftest.py"))
    config = SimpleNamespace(option=SimpleNamespace(library=True))
    paths = (ROOT / "tests").rglob("test_*.py")
    found = {path.relative_to(ROOT) for path in paths if not conftest.pytest_ignore_collect(path, config)}
    assert {Path("tests/test_similarity.py"), Path("tests/test_sanity.py")} < found
    assert {path.parent.name for path in found} == {"tests", "saliency"}
    assert not [path for path in found if path.stem in ("test_build", "test_project", "test_workflows")]


def test_rights_are_the_least():
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    assert {job: about["permissions"] for job, about in JOBS.items() if "permissions" in about} == {
        ("book.yml", "publish"): {"pages": "write", "id-token": "write"},
        ("newest.yml", "report"): {"issues": "write"},
    }


def test_code_of_others_gets_no_rights():
    triggers = [workflow[True] for workflow in WORKFLOWS.values()]  # YAML reads `on` as true
    assert not [trigger for trigger in triggers if "pull_request_target" in trigger or "workflow_run" in trigger]
    assert not [path.name for path in PATHS if "secrets." in path.read_text(encoding="utf-8")]
    assert not [step["run"] for step in STEPS if "${{" in step.get("run", "")], "an expression in a script is code"
    assert JOBS["book.yml", "publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert WORKFLOWS["book.yml"][True]["push"] == {"branches": ["main"], "tags": ["v*"]}
    assert all(step["uses"].startswith("actions/") for step in STEPS if "uses" in step)
    assert all(step["with"]["persist-credentials"] is False for step in STEPS if "checkout" in step.get("uses", ""))


@pytest.mark.parametrize("name", ["book.yml", "newest.yml"])
def test_workflow_runs_style_and_types_and_the_two_commands(name):
    assert ".ci/run" in [step.get("run") for step in JOBS[name, "build"]["steps"]]
    script = (ROOT / ".ci/run").read_text(encoding="utf-8").splitlines()
    assert script[-3:] == ["make lint", "make book", 'make "${TESTS:-test}"'] and os.access(ROOT / ".ci/run", os.X_OK)


def test_only_the_weekly_run_is_of_all_tests():
    assert JOBS["newest.yml", "build"]["env"]["TESTS"] == "test-all" and "env" not in JOBS["book.yml", "build"]
    plans = {}
    for target in ("test", "test-all"):
        planned = subprocess.run(
            ["make", "--no-print-directory", "--dry-run", target], cwd=ROOT, capture_output=True, encoding="utf-8"
        )
        plans[target] = planned.stdout.strip().splitlines()[-1]
    assert plans["test-all"].split() == [*plans["test"].split(), "-m", '""']


def test_lint_is_style_and_types_of_both_languages():
    planned = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "lint"], cwd=ROOT, capture_output=True, encoding="utf-8"
    )
    run = [line.removeprefix(".venv/bin/") for line in planned.stdout.splitlines() if line.startswith(".venv/bin/")]
    assert run[-4:] == ["ruff check .", "ruff format --check .", "mypy", "oxlint --deny-warnings ."]


def test_the_newest_versions_are_kept_and_pinned_by_nothing():
    job = JOBS["newest.yml", "build"]
    assert not [step for step in job["steps"] if "cache" in str(step)]
    command = ["make", "--dry-run", "--always-make", "book"]
    plans = {}
    for name, settings in (("tested", {}), ("newest", job["env"])):
        planned = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
        plans[name] = planned.stdout
    assert "-c constraints.txt" in plans["tested"]
    assert "-r requirements.txt" in plans["newest"] and " -c " not in plans["newest"]
