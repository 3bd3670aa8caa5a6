"""The bibliography: the files of the parts are one, and no key stands twice."""

import re
from pathlib import Path

import pytest
import references
import yaml

ROOT = Path(__file__).parent.parent
ONE, TWO = "@misc{a2020one,\n  year = {2020}\n}\n", "@article{b2021two,\n  year = {2021}\n}\n"


def write(root: Path, **parts: str) -> Path:
    (root / references.FOLDER).mkdir(parents=True)
    for part, text in parts.items():
        (root / references.FOLDER / f"{part}.bib").write_text(text, encoding="utf-8")
    return root


def test_the_parts_are_joined(tmp_path):
    assert references.joined(write(tmp_path, theory=TWO, methods=ONE)) == f"{ONE}\n{TWO}"


@pytest.mark.parametrize("again", [ONE, ONE.replace("a2020one", "A2020One"), ONE.replace("{a2020one", "{ a2020one")])
def test_two_entries_of_one_key_are_refused_with_their_files(tmp_path, again):
    with pytest.raises(ValueError, match="'a2020one' in methods.bib and theory.bib"):
        references.joined(write(tmp_path, theory=TWO + again, methods=ONE))


def test_two_entries_in_one_file_are_refused(tmp_path):
    with pytest.raises(ValueError, match="'a2020one' in methods.bib and methods.bib"):
        references.joined(write(tmp_path, methods=ONE + ONE))


def test_the_bibliography_of_the_book():
    text = references.joined(ROOT)
    assert len(re.findall(r"(?m)^@", text)) > 80
    options = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))["sphinx"]["config"]
    assert options["bibtex_bibfiles"] == [references.JOINED.as_posix()]
