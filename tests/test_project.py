"""The project as a whole: one address, honest requirements, nothing of a machine and nothing too heavy."""

import re
import shutil
import subprocess
import tomllib
from pathlib import Path

import pytest
import saliency_sanity
import yaml
from address import files, move, other_addresses, pages, repository, revision, revisions, texts
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
# Some of what Google Colab has had installed since 2025; the book must not ask for more.
COLAB = {
    "ipywidgets": "7.7.1", "ipykernel": "6.17.1", "matplotlib": "3.10.0", "numpy": "2.0.2", "pandas": "2.2.2",
    "pillow": "11.2.1", "pyyaml": "6.0.2", "safetensors": "0.5.3", "scikit-image": "0.25.2",
    "scipy": "1.15.3", "torch": "2.6.0", "torchvision": "0.21.0", "tqdm": "4.67.1",
}  # fmt: skip


def requirements(lines: list[str]) -> dict[str, Requirement]:
    parsed = [Requirement(line) for line in lines if line.strip() and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in parsed}


NEEDED = requirements((ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines())
EXTRAS = PROJECT["optional-dependencies"]
EVERYTHING = requirements([*PROJECT["dependencies"], *EXTRAS["lrp"], *EXTRAS["book"]])
del EVERYTHING["saliency-sanity"]  # the extra [book] takes [lrp] in
TESTED = requirements((ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines())


def test_there_is_one_address():
    assert other_addresses() == []
    assert CONFIG["repository"]["url"] == CITATION["repository-code"] == repository()
    assert CONFIG["html"]["baseurl"] == CITATION["url"] == pages(repository())


def test_the_address_moves_everywhere(tmp_path):
    for path in texts(ROOT):
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    subprocess.run(["git", "init", "--quiet"], cwd=tmp_path, check=True)
    old = repository()
    move("https://github.com/Ann-B/maps", tmp_path)
    assert repository(tmp_path) == "https://github.com/Ann-B/maps"
    assert other_addresses(tmp_path) == []
    left = [path.name for path, text in texts(tmp_path).items() if old in text or pages(old) in text]
    assert left == []


def test_requirements_are_lower_bounds():
    for name, requirement in NEEDED.items():
        operators = sorted(part.operator for part in requirement.specifier)
        assert operators == (["<", ">="] if name == "jupyter-book" else [">="]), str(requirement)


def test_colab_meets_the_requirements():
    assert not [name for name, version in COLAB.items() if version not in NEEDED[name].specifier]


def test_the_package_needs_no_more_than_the_book():
    assert not [str(one) for name, one in EVERYTHING.items() if str(one) != str(NEEDED.get(name))]


def test_wheels_can_be_made_without_a_network():
    """Both are built by what the requirements bring, in the tests and on a machine that is offline."""
    for folder in (ROOT, ROOT / "assets"):
        [builder] = tomllib.loads((folder / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]["requires"]
        assert builder == str(NEEDED["setuptools"])


def test_every_requirement_has_a_tested_version():
    for name, requirement in NEEDED.items():
        [tested] = TESTED[name].specifier
        assert tested.operator == "==" and tested.version in requirement.specifier, name


def test_binder_installs_what_the_chapters_need():
    *conda, pip = yaml.safe_load((ROOT / ".binder/environment.yml").read_text(encoding="utf-8"))["dependencies"]
    other_names = {"pytorch-cpu": "torch", "matplotlib-base": "matplotlib"}
    lines = [re.fullmatch(r"([\w-]+)(.*)", line).groups() for line in [*conda, *pip["pip"]]]
    installed = {other_names.get(name, name): bound for name, bound in lines}
    assert installed.pop("python").startswith("=3") and installed.pop("pip") == ""
    assert installed == {name: str(one.specifier) for name, one in EVERYTHING.items()}
    late = {"captum", "zennit"}  # in conda-forge old, or not at all
    assert {Requirement(line).name for line in pip["pip"]} == late
    [*_, last] = (ROOT / ".binder/postBuild").read_text(encoding="utf-8").splitlines()
    assert last.endswith("--no-deps --no-cache-dir -e . -e ./assets")


def test_there_is_one_revision():
    assert set(revisions()) == {revision(), CONFIG["repository"]["branch"]}
    assert revisions()[revision()] > len(list((ROOT / "notebooks").glob("*/*.ipynb")))


def test_there_is_one_version():
    version = saliency_sanity.__version__
    assets = tomllib.loads((ROOT / "assets/pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert version == CITATION["version"] == assets["version"]
    assert ("date-released" in CITATION) == ("dev" not in version) == (revision() == f"v{version}")
    assert CITATION["title"].startswith(CONFIG["title"])


def test_files_are_small():
    assert not [str(path) for path in files() if path.stat().st_size > 8_000_000]
    assets = [path for path in files() if path.is_relative_to(ROOT / "assets/files")]
    assert sum(path.stat().st_size for path in assets) <= 30_000_000


@pytest.mark.parametrize(
    "pattern",
    [
        pytest.param(r"(?<![\w.:/$}-])/(?:home|root|Users|work|tmp|opt|mnt)/\w", id="a path of a machine"),
        pytest.param(r"pypi\.org|pythonhosted\.org|npmjs\.(?:org|com)|deb\.debian\.org", id="a registry"),
    ],
)
def test_nothing_names(pattern):
    assert not [
        f"{path.relative_to(ROOT)}: {match.group()}"
        for path, text in texts().items()
        for match in re.finditer(pattern, text)
    ]
