"""Continuous integration: valid workflows that run the project's two commands, with no more rights than they need."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PATHS = sorted((ROOT / ".github/workflows").glob("*.yml"))
WORKFLOWS = {path.name: yaml.safe_load(path.read_text()) for path in PATHS}
JOBS = {(name, job): about for name, workflow in WORKFLOWS.items() for job, about in workflow["jobs"].items()}
STEPS = [step for job in JOBS.values() for step in job["steps"]]


def check(*paths: Path) -> subprocess.CompletedProcess:
    """Hold files against the schema of workflows that comes with check-jsonschema."""
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.github-workflows"]
    return subprocess.run([*command, *paths], capture_output=True, text=True)


def test_workflows_follow_the_schema(tmp_path):
    assert len(PATHS) == 2
    assert check(*PATHS).returncode == 0, check(*PATHS).stdout
    (tmp_path / "wrong.yml").write_text(PATHS[0].read_text().replace("runs-on", "run-on"))
    assert check(tmp_path / "wrong.yml").returncode == 1


def test_rights_are_the_least():
    assert all(workflow["permissions"] == {"contents": "read"} for workflow in WORKFLOWS.values())
    assert {job: about["permissions"] for job, about in JOBS.items() if "permissions" in about} == {
        ("book.yml", "publish"): {"pages": "write", "id-token": "write"},
        ("newest.yml", "report"): {"issues": "write"},
    }


def test_code_of_others_gets_no_rights():
    triggers = [workflow[True] for workflow in WORKFLOWS.values()]  # YAML reads `on` as true
    assert not [trigger for trigger in triggers if "pull_request_target" in trigger or "workflow_run" in trigger]
    assert not [path.name for path in PATHS if "secrets." in path.read_text()]
    assert not [step["run"] for step in STEPS if "${{" in step.get("run", "")], "an expression in a script is code"
    assert JOBS["book.yml", "publish"]["if"] == "startsWith(github.ref, 'refs/tags/v')"
    assert WORKFLOWS["book.yml"][True]["push"] == {"branches": ["main"], "tags": ["v*"]}
    assert all(step["uses"].startswith("actions/") for step in STEPS if "uses" in step)
    assert all(step["with"]["persist-credentials"] is False for step in STEPS if "checkout" in step.get("uses", ""))


@pytest.mark.parametrize("name", WORKFLOWS)
def test_workflow_runs_the_two_commands(name):
    assert ".ci/run" in [step.get("run") for step in JOBS[name, "build"]["steps"]]
    script = (ROOT / ".ci/run").read_text().splitlines()
    assert script[-2:] == ["make book", "make test"] and os.access(ROOT / ".ci/run", os.X_OK)


def test_the_weekly_run_keeps_nothing_and_pins_nothing():
    job = JOBS["newest.yml", "build"]
    assert not [step for step in job["steps"] if "cache" in str(step)]
    command = ["make", "--dry-run", "--always-make", "book"]
    plans = {}
    for name, settings in (("tested", {}), ("newest", job["env"])):
        planned = subprocess.run(command, cwd=ROOT, env=os.environ | settings, capture_output=True, text=True)
        plans[name] = planned.stdout
    assert "-c constraints.txt" in plans["tested"]
    assert "-r requirements.txt" in plans["newest"] and " -c " not in plans["newest"]
