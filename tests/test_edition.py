"""Cutting an edition: its commit alone names its tag, `main` goes on, and a failure leaves everything as it was."""

import re
import shutil
import subprocess
from collections import Counter
from datetime import date
from pathlib import Path

import pytest
from address import files, name_revision, repository, revision, revisions, rewrite, texts
from edition import cut, git, version
from page_extras import edit_on_main

ROOT = Path(__file__).parent.parent
TODAY = date(2031, 5, 7)


@pytest.fixture
def clone(tmp_path, monkeypatch) -> Path:
    """A repository with the text of this one, as it is here, in one commit on `main`."""
    for name in ("AUTHOR", "COMMITTER"):
        monkeypatch.setenv(f"GIT_{name}_NAME", "Ann")
        monkeypatch.setenv(f"GIT_{name}_EMAIL", "ann@example.org")
    root = tmp_path / "clone"
    for path in files(ROOT):
        if not path.is_relative_to(ROOT / "assets/files"):
            copy = root / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copy)
    git(root, "init", "--quiet", "--initial-branch=main")
    name_revision("main", root)  # where this is an edition, go back
    rewrite(root / "CITATION.cff", lambda text: re.sub(r"date-released: .*\n", "", text))
    (root / "CHANGELOG.md").write_text(
        "# Changelog\n\n## Unreleased\n\n- A chapter.\n\n## 0.0.1 (2030-01-01)\n\n- All.\n", encoding="utf-8"
    )
    git(root, "add", "--all")
    git(root, "commit", "--quiet", "--message=Start")
    return root


def state(root: Path) -> tuple[str, str, str]:
    """What must stay as it was where no edition is cut."""
    return git(root, "rev-parse", "HEAD"), git(root, "status", "--porcelain"), git(root, "tag", "--list")


def edition(root: Path, tag: str) -> Path:
    """The tree of a tag, in a folder of its own."""
    folder = root.parent / tag
    git(root, "worktree", "add", "--quiet", str(folder), tag)
    return folder


def test_only_the_commit_of_an_edition_names_its_tag(clone):
    before = revisions(clone)
    cut(clone, "1.0.0", TODAY)
    assert revisions(clone) == before == Counter({"main": before["main"]})
    assert revisions(edition(clone, "v1.0.0")) == Counter({"v1.0.0": before["main"]})
    assert git(clone, "status", "--porcelain") == ""
    assert git(clone, "log", "--format=%s").splitlines() == [
        "After edition 1.0.0: links name main again", "Edition 1.0.0", "Start",
    ]  # fmt: skip


def test_links_of_every_kind_lead_to_the_tag(clone):
    slug = repository(clone).removeprefix("https://github.com/")
    cut(clone, "1.0.0", TODAY)
    text = "\n".join(texts(edition(clone, "v1.0.0")).values())
    for link in (f"git+https://github.com/{slug}@", f"/gh/{slug}/", f"github/{slug}/blob/", "\n  branch: "):
        assert f"{link}v1.0.0" in text and f"{link}main" not in text, link


def test_the_version_is_the_same_everywhere(clone):
    cut(clone, "1.0.0", TODAY)
    for root, expected in ((edition(clone, "v1.0.0"), "1.0.0"), (clone, "1.1.0.dev0")):
        assert version(root) == expected
        assert f'\nversion = "{expected}"\n' in (root / "assets/pyproject.toml").read_text("utf-8")
        citation = (root / "CITATION.cff").read_text("utf-8")
        assert f"\nversion: {expected}\n" in citation
        assert ('\ndate-released: "2031-05-07"\n' in citation) == (expected == "1.0.0")
        for chapter in (root / "notebooks").glob("*/*.ipynb"):
            assert f'(wanted := \\"{expected}\\")' in chapter.read_text("utf-8"), chapter.name


def test_the_changelog_dates_the_edition(clone):
    cut(clone, "1.0.0", TODAY)
    in_edition = (edition(clone, "v1.0.0") / "CHANGELOG.md").read_text("utf-8")
    assert "\n## 1.0.0 (2031-05-07)\n" in in_edition and "## Unreleased" not in in_edition
    afterwards = (clone / "CHANGELOG.md").read_text("utf-8")
    assert afterwards.replace("## Unreleased\n\n", "") == in_edition


def test_the_next_edition_comes_after(clone):
    cut(clone, "1.0.0", TODAY)
    before = state(clone)
    for version_, reason in (("1.0.0", "the tag v1.0.0 exists"), ("0.9.9", "does not come after v1.0.0")):
        with pytest.raises(ValueError, match=reason):
            cut(clone, version_, TODAY)
    with pytest.raises(ValueError, match="CHANGELOG.md says nothing"):
        cut(clone, "1.0.1", TODAY)
    assert state(clone) == before
    rewrite(clone / "CHANGELOG.md", lambda text: text.replace("## Unreleased\n", "## Unreleased\n\n- A bug.\n"))
    git(clone, "commit", "--quiet", "--all", "--message=Mended")
    cut(clone, "1.0.1", TODAY)
    assert git(clone, "tag", "--list").split() == ["v1.0.0", "v1.0.1"] and version(clone) == "1.1.0.dev0"


@pytest.mark.parametrize("bad", ["1.0", "v1.0.0", "1.0.0.dev0", "01.0.0", "", "1.0.0\n"])
def test_a_bad_version_is_refused(clone, bad):
    before = state(clone)
    with pytest.raises(ValueError, match="is not a version"):
        cut(clone, bad, TODAY)
    assert state(clone) == before


def test_a_dirty_tree_or_another_branch_is_refused(clone):
    (clone / "new.txt").write_text("not committed\n", encoding="utf-8")
    with pytest.raises(ValueError, match="not committed:\n.*new.txt"):
        cut(clone, "1.0.0", TODAY)
    (clone / "new.txt").unlink()
    git(clone, "switch", "--quiet", "--create", "aside")
    with pytest.raises(ValueError, match="from main; this is aside"):
        cut(clone, "1.0.0", TODAY)


@pytest.mark.parametrize("failing", ["Edition 1", "After edition"])
def test_what_fails_half_way_leaves_all_as_it_was(clone, failing):
    before = state(clone)
    hook = clone / ".git/hooks/commit-msg"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(f'#!/bin/sh\n! grep -q "{failing}" "$1" || {{ echo "not today" >&2; exit 1; }}\n', encoding="utf-8")
    hook.chmod(0o755)
    with pytest.raises(RuntimeError, match="not today"):
        cut(clone, "1.0.0", TODAY)
    assert state(clone) == before


def test_a_chapter_without_a_setup_cell_stops_the_edition(clone):
    chapter = sorted((clone / "notebooks").glob("*/*.ipynb"))[-1]
    rewrite(chapter, lambda text: text.replace("(wanted := ", "(expected := "))
    git(clone, "commit", "--quiet", "--all", "--message=Another cell")
    before = state(clone)
    with pytest.raises(ValueError, match=f"{chapter.name}: 0 places"):
        cut(clone, "1.0.0", TODAY)
    assert state(clone) == before


def test_the_command_says_why_it_stops(clone):
    git(clone, "tag", "v1.0.0")
    command = ["make", "--no-print-directory", "edition", "VERSION=1.0.0"]
    ran = subprocess.run(command, cwd=clone, capture_output=True, text=True)
    assert ran.returncode and "No edition was cut: the tag v1.0.0 exists." in ran.stderr
    assert "Traceback" not in ran.stderr and revision(clone) == "main"


def test_an_edition_is_edited_on_main():
    """A tag cannot be edited, and pages are made from one."""
    there = "https://github.com/ann/maps/{}/{}/notebooks/one.ipynb".format
    buttons = [
        {"label": "source-edit-button", "url": there("edit", "v1.0.0")},
        {"label": "source-file-button", "url": there("blob", "v1.0.0")},
    ]
    edit_on_main([{"label": "source-buttons", "buttons": buttons}, {"label": "toggle"}])
    assert [button["url"] for button in buttons] == [there("edit", "main"), there("blob", "v1.0.0")]
