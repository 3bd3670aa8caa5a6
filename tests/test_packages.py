"""The two distributions as a reader installs them: what is in them, what they need, and that they hide nothing."""

import ast
import inspect
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile
from collections.abc import Iterable
from email import message_from_bytes
from email.message import Message
from importlib import import_module
from pathlib import Path
from types import FunctionType

import nbformat
import pytest
from address import files
from anywhere import environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from run_chapters import chapters

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
ASSETS = tomllib.loads((ROOT / "assets/pyproject.toml").read_text(encoding="utf-8"))
PROJECT = SETTINGS["project"]
MODULES = {
    ".".join(("saliency_sanity", *path.relative_to(ROOT / "helpers").with_suffix("").parts)).removesuffix(".__init__")
    for path in (ROOT / "helpers").rglob("*.py")
}
DISTRIBUTION = {"PIL": "pillow", "skimage": "scikit-image", "yaml": "pyyaml"}
# What none of the checks needs by itself: it comes with an extra, with the book, or with a function that asks for it.
LATER = ("PIL", "captum", "ipywidgets", "matplotlib", "scipy", "skimage", "torchvision", "yaml", "zennit")
SMALL_MODEL = """
import torch
from torch import nn
torch.manual_seed(0)
model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(16, 3))
images, targets = torch.rand(2, 1, 16, 16), torch.tensor([0, 2])
"""
BLOCK = f"""
import sys
class Missing:
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in {LATER}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing)
"""


def run(code: str, python: Path | str = sys.executable, folder: Path = ROOT) -> str:
    """What a program prints that runs in a process of its own; an environment of its own sees no other's paths."""
    env = dict(os.environ) if python == sys.executable else environment()
    ran = subprocess.run([python, "-c", code], cwd=folder, env=env, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def readme_example() -> str:
    code, *_ = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    return code


def wheel(source: Path, into: Path) -> Path:
    """The wheel of a distribution, made without a network from the files that git knows."""
    for path in files(ROOT):
        if path.is_relative_to(source) and path.parts[len(ROOT.parts)] in ("helpers", "assets", path.name):
            copy = into / "source" / path.relative_to(source)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*command, "--wheel-dir", into, into / "source"], check=True)
    [made] = into.glob("*.whl")
    return made


@pytest.fixture(scope="module")
def library(tmp_path_factory) -> Path:
    return wheel(ROOT, tmp_path_factory.mktemp("library"))


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Path:
    return wheel(ROOT / "assets", tmp_path_factory.mktemp("assets"))


@pytest.fixture(scope="module")
def python(library, assets, tmp_path_factory) -> Path:
    """An interpreter that has the two wheels, and what else is installed here but for our own working copy."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder)
    [interpreter] = [path for path in (folder / "bin/python", folder / "Scripts/python.exe") if path.exists()]
    command = [sys.executable, "-m", "pip", "--python", interpreter, "install", "--quiet", "--no-deps", "--no-index"]
    subprocess.run([*command, library, assets], check=True)
    site = Path(run("import sysconfig; print(sysconfig.get_path('purelib'))", interpreter, folder).strip())
    here = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    # a .pth file that lies there is not read: no working copy
    (site / "here.pth").write_text("\n".join(sorted(here)), encoding="utf-8")
    return interpreter


def contents(made: Path) -> set[str]:
    with zipfile.ZipFile(made) as archive:
        return set(archive.namelist())


def metadata(made: Path) -> Message:
    with zipfile.ZipFile(made) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return message_from_bytes(archive.read(name))


def test_every_subpackage_is_listed():
    packages = {name for name in MODULES if (ROOT / "helpers" / Path(*name.split(".")[1:]) / "__init__.py").exists()}
    assert set(SETTINGS["tool"]["setuptools"]["packages"]) == packages


def test_the_library_holds_the_package_and_nothing_else(library):
    of_git = [path.relative_to(ROOT / "helpers") for path in files(ROOT) if path.is_relative_to(ROOT / "helpers")]
    assert {path.suffix for path in of_git} <= {".py", ".yml", ".css", ".js", ".typed"}
    held = {name for name in contents(library) if ".dist-info/" not in name}
    assert held == {f"saliency_sanity/{path.as_posix()}" for path in of_git}
    assert library.stat().st_size <= 1_000_000


def test_the_library_is_mit_alone(library):
    about = metadata(library)
    assert about["License-Expression"] == "MIT" and about["License-File"] == "LICENSE"
    assert [name for name in contents(library) if name.endswith(".dist-info/licenses/LICENSE")]


def test_the_assets_hold_every_published_file(assets):
    lines = (ROOT / "assets/files/SHA256SUMS").read_text(encoding="utf-8").splitlines()
    held = contents(assets)
    assert {f"saliency_sanity_assets/{line.split(maxsplit=1)[1]}" for line in lines} <= held
    assert {f"saliency_sanity_assets/{name}" for name in ("SHA256SUMS", "README.md", "__init__.py")} <= held


def test_the_assets_carry_their_licences(assets):
    about = metadata(assets)
    held = contents(assets)
    assert all(any(name.endswith(f"/licenses/{file}") for name in held) for file in about.get_all("License-File"))
    assert set(about.get_all("License-File")) == set(ASSETS["project"]["license-files"])
    assert "LICENSE-MIT" in about.get_all("License-File")
    named = set(about["License-Expression"].split(" AND "))
    table = re.findall(r"^\|(?:[^|\n]*\|){3}([^|\n]*)\|", (ROOT / "assets/files/README.md").read_text("utf-8"), re.M)
    column = re.findall(r"\bMIT\b|GPL-[\w.-]+|CC0|CC BY(?:-SA)? [\d.]+", " / ".join(table))
    assert {licence.replace(" ", "-").replace("CC0", "CC0-1.0") for licence in column} == named


def test_no_extra_asks_for_the_assets(library):
    """Neither name is in the registry that pip asks: an extra that names the other could not be installed."""
    wanted = [Requirement(line).name for line in metadata(library).get_all("Requires-Dist")]
    assert "torch" in wanted and "saliency-sanity-assets" not in wanted
    assert set(PROJECT["optional-dependencies"]) == {"lrp", "book"}


def imported(sources: Iterable[str]) -> set[str]:
    """The distributions, of other people, that Python code imports."""
    found = set()
    for source in sources:
        for node in ast.walk(ast.parse(re.sub(r"^(\s*)[%!].*", r"\1pass", source, flags=re.MULTILINE))):
            if isinstance(node, ast.Import):
                found |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                found.add(node.module.split(".")[0])
    found -= {*sys.stdlib_module_names, "saliency_sanity", "saliency_sanity_assets"}
    return {canonicalize_name(DISTRIBUTION.get(name, name)) for name in found}


def test_requirements_are_what_is_imported():
    """Each name once: the library's among the dependencies, LRP's and the book's in their extras."""
    rooms = {True: [], False: []}
    for path in (ROOT / "helpers").rglob("*.py"):
        rooms[path.is_relative_to(ROOT / "helpers/book")].append(path.read_text(encoding="utf-8"))
    for chapter in chapters(ROOT):
        cells = nbformat.read(ROOT / chapter, as_version=4).cells
        rooms[True] += [cell.source for cell in cells if cell.cell_type == "code"]
    names = {
        extra: {Requirement(line).name for line in lines}
        for extra, lines in {"": PROJECT["dependencies"], **PROJECT["optional-dependencies"]}.items()
    }
    assert imported(rooms[False]) == names[""] | names["lrp"]
    assert imported(rooms[True]) - names[""] - names["lrp"] == names["book"] - {"saliency-sanity"}


def test_the_example_of_the_readme_runs_beside_a_module_of_that_name(python, tmp_path):
    (tmp_path / "helpers.py").write_text("mine = True\n", encoding="utf-8")
    code = f"import helpers\n{SMALL_MODEL}{readme_example()}\nassert helpers.mine\nprint(len(frame), helpers.__file__)"
    rows, file = run(code, python, tmp_path).split()
    assert int(rows) > 0 and Path(file).resolve() == (tmp_path / "helpers.py").resolve()


def test_a_package_of_that_name_stays_the_readers_own(python, tmp_path):
    (tmp_path / "helpers").mkdir()
    (tmp_path / "helpers/__init__.py").write_text("", encoding="utf-8")
    (tmp_path / "helpers/tools.py").write_text("mine = True\n", encoding="utf-8")
    code = """
from saliency_sanity.book import data
from helpers.tools import mine
assert mine and len(data.load("digits").images)
print(data.__file__)
"""
    [file] = run(code, python, tmp_path).split()
    assert not Path(file).is_relative_to(ROOT)


def test_nothing_imports_the_folder():
    for path in files(ROOT):
        if path.suffix in (".py", ".ipynb") and path != Path(__file__):
            found = re.search(r"^[\s\"]*(?:from|import) helpers\b", path.read_text(encoding="utf-8"), re.MULTILINE)
            assert not found, f"{path.relative_to(ROOT)}: {found.group()}"


def test_the_top_loads_nothing():
    heavy = "print(sorted({'torch', 'numpy', 'pandas', 'saliency_sanity.sanity'} & set(sys.modules)))"
    assert run(f"import sys, saliency_sanity; dir(saliency_sanity); {heavy}") == "[]\n"


def test_the_top_has_what_it_promises():
    top = import_module("saliency_sanity")
    assert re.fullmatch(r"\d+\.\d+\.\d+(\.dev0)?", top.__version__)
    assert set(top.__all__) <= set(dir(top)) and top.__all__ == sorted(top.__all__)
    held = [getattr(top, name) for name in top.__all__]
    assert {value.__name__ if inspect.ismodule(value) else value.__module__ for value in held} <= MODULES
    with pytest.raises(AttributeError, match="no attribute 'audits'"):
        top.audits  # noqa: B018
    assert (ROOT / "helpers/py.typed").exists()


@pytest.mark.parametrize("name", ["saliency_sanity", "saliency_sanity.saliency", "saliency_sanity.book"])
def test_a_package_says_what_is_public(name):
    package = import_module(name)
    for public in package.__all__:
        assert hasattr(package, public) or f"{name}.{public}" in MODULES, public


def test_every_method_is_public():
    saliency = import_module("saliency_sanity.saliency")
    own = {name for name, method in saliency.METHODS.items() if getattr(saliency, name, None) is method}
    assert len(own) > 15 and own <= set(saliency.__all__)


def test_the_book_names_its_modules():
    book = import_module("saliency_sanity.book")
    assert set(book.__all__) == {name.split(".")[2] for name in MODULES if name.startswith("saliency_sanity.book.")}


def test_no_module_and_function_share_a_name():
    modules = {name.rpartition(".")[2] for name in MODULES}
    shared = {
        f"{name}.{public}"
        for name in MODULES
        for public, value in vars(import_module(name)).items()
        if isinstance(value, FunctionType | type) and not public.startswith("_") and public in modules
    }
    assert shared == set()


def test_the_checks_need_little():
    """What is blocked comes with an extra or with the functions that ask for it; LRP says with which extra."""
    example = """
import saliency_sanity
maps = saliency_sanity.saliency.gradient(model, images, targets)
frame = saliency_sanity.sanity.parameter_randomization(
    model, images, targets, methods=["gradient"], metrics=["spearman"], seeds=[0]
)
print(maps.shape == images.shape, len(frame) > 0, "helpers" in sys.modules)
try:
    saliency_sanity.saliency.lrp_epsilon(model, images, targets)
except ImportError as error:
    print(error)
"""
    ran, error = run(BLOCK + SMALL_MODEL + example).splitlines()
    assert ran == "True True False" and "[lrp]" in error
