"""Cut an edition of the book: one commit that names its tag everywhere, and the tag.

    python scripts/edition.py 1.0.0     what `make edition VERSION=1.0.0` runs

Two commits are made on `main`. In the first, which the tag v1.0.0 names, the version is 1.0.0, and every link to the
repository and every setup cell names the tag: who opens a chapter of that edition in ten years gets its package. The
second returns the links to `main` and begins the next version. Nothing is pushed. Where a step fails, the
branch and its files are left as they were, without the tag.
"""

import re
import subprocess
import sys
from datetime import date
from pathlib import Path

from address import ROOT, name_revision, revision, rewrite

MAIN = "main"
UNRELEASED = "## Unreleased"


def git(root: Path, *arguments: str) -> str:
    """What git prints; an error with what it says where it fails."""
    ran = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
    if ran.returncode:
        raise RuntimeError(f"git {' '.join(arguments)}: {ran.stderr.strip() or ran.stdout.strip()}")
    return ran.stdout.strip()


def parts(version: str) -> tuple[int, ...]:
    """The three numbers of an edition's version; an error if they are not."""
    if not re.fullmatch(r"(0|[1-9]\d*)(\.(0|[1-9]\d*)){2}", version):
        raise ValueError(f"{version!r} is not a version of the form 1.0.0.")
    return tuple(map(int, version.split(".")))


def version(root: Path) -> str:
    """The version in helpers/__init__.py, where it is kept; other files repeat it."""
    [found] = re.findall(r'^__version__ = "(.*)"$', (root / "helpers/__init__.py").read_text("utf-8"), re.MULTILINE)
    return found


def check(root: Path, new: str) -> None:
    """Raise where no edition of that version can be cut from what is here."""
    wanted = parts(new)
    if (branch := git(root, "branch", "--show-current")) != MAIN:
        raise ValueError(f"editions are cut from {MAIN}; this is {branch or 'no branch'}.")
    if changes := git(root, "status", "--porcelain"):
        raise ValueError(f"there are changes that are not committed:\n{changes}")
    tags = git(root, "tag", "--list", "v*").splitlines()
    if f"v{new}" in tags:
        raise ValueError(f"the tag v{new} exists.")
    cut = [parts(tag[1:]) for tag in tags if re.fullmatch(r"v\d+\.\d+\.\d+", tag)]
    if cut and wanted <= max(cut):
        raise ValueError(f"{new} does not come after v{'.'.join(map(str, max(cut)))}, which exists.")
    if revision(root) != MAIN:
        raise ValueError(f"the links name {revision(root)}, not {MAIN}.")
    if not re.search(rf"^{UNRELEASED}\n+(?!## )\S", (root / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE):
        raise ValueError(f"CHANGELOG.md says nothing under '{UNRELEASED}'.")


def replace(path: Path, pattern: str, new: str) -> None:
    """Replace what `pattern` finds in a file; an error where that is in no place, or in more than one."""

    def change(text: str) -> str:
        text, count = re.subn(pattern, new, text, flags=re.MULTILINE)
        if count != 1:
            raise ValueError(f"{path.name}: {count} places, not one, look like {pattern}")
        return text

    rewrite(path, change)


def name_version(root: Path, new: str) -> None:
    """Write the version into the package, the assets, the citation and the setup cell of every chapter."""
    setup = r'^( *"if __version__ != \(wanted := \\")[^"\\]*'
    places = dict.fromkeys((root / "notebooks").glob("*/*.ipynb"), setup) | {
        root / "helpers/__init__.py": r'^(__version__ = ")[^"]*',
        root / "assets/pyproject.toml": r'^(version = ")[^"]*',
        root / "CITATION.cff": r"^(version: ).*",
    }
    for path, pattern in places.items():
        replace(path, pattern, rf"\g<1>{new}")


def commit(root: Path, message: str) -> None:
    git(root, "commit", "--quiet", "--all", "--message", message)


def cut(root: Path, new: str, today: date) -> None:
    """The edition's commit with its tag, then the one that goes on towards the next."""
    check(root, new)
    start, tag = git(root, "rev-parse", "HEAD"), f"v{new}"
    changelog, citation = root / "CHANGELOG.md", root / "CITATION.cff"
    major, minor, _ = parts(new)
    try:
        name_version(root, new)
        name_revision(tag, root)
        replace(citation, r"^version: .*", rf'\g<0>\ndate-released: "{today}"')
        replace(changelog, f"^{UNRELEASED}$", f"## {new} ({today})")
        commit(root, f"Edition {new}")
        git(root, "tag", "--annotate", tag, "--message", f"Edition {new}")
        name_version(root, f"{major}.{minor + 1}.0.dev0")
        name_revision(MAIN, root)
        replace(citation, r"^date-released: .*\n", "")
        replace(changelog, rf"^## {re.escape(new)} \(", rf"{UNRELEASED}\n\n\g<0>")
        commit(root, f"After edition {new}: links name {MAIN} again")
    except BaseException:
        subprocess.run(["git", "tag", "--delete", tag], cwd=root, capture_output=True)
        git(root, "reset", "--quiet", "--hard", start)
        raise


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        sys.exit(__doc__)
    [new] = arguments
    try:
        cut(ROOT, new, date.today())
    except (ValueError, RuntimeError) as error:
        sys.exit(f"No edition was cut: {error}")
    print(f"Edition {new} is cut. To publish it: git push --atomic origin {MAIN} v{new}")


if __name__ == "__main__":
    main(sys.argv[1:])
