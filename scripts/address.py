"""The project's address on the web: kept once in pyproject.toml, repeated where a link must be written out.

So is the revision that links name, `main` or the tag of an edition: kept once in _config.yml; scripts/edition.py
changes it.

python scripts/address.py https://github.com/owner/name   rewrite the address everywhere
python scripts/address.py --check                         name links that do not follow pyproject.toml
"""

import re
import subprocess
import sys
import tomllib
from collections import Counter
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REPOSITORY = re.compile(r"https://github\.com/([\w-]+)/([\w.-]+)")
TEXT = {".md", ".toml", ".cff", ".yml", ".ipynb", ".py", ".bib"}
# Links that can only lead to ourselves; links to other people's repositories and pages do not match.
OURS = [
    re.compile(r"(?:git\+https://github\.com|mybinder\.org/v2/gh|colab\.research\.google\.com/github)/([\w-]+)/([\w.-]+)"),
    re.compile(r"//([\w-]+)\.github\.io/([\w.-]+)/(?:book|notebooks)/"),
    re.compile(r"^(?:  url|repository-code): \"?https://github\.com/([\w-]+)/([\w.-]+)", re.MULTILINE),
    re.compile(r"^(?:  baseurl|url): \"?https://([\w-]+)\.github\.io/([\w.-]+)", re.MULTILINE),
]  # fmt: skip


def repository(root: Path = ROOT) -> str:
    """The repository's address, such as https://github.com/owner/name."""
    return tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]


def owner_and_name(address: str) -> tuple[str, str]:
    """The two parts of a GitHub address; an error if it is not one."""
    match = REPOSITORY.fullmatch(address.removesuffix("/").removesuffix(".git"))
    if not match:
        raise ValueError(f"{address!r} is not an address of the form https://github.com/owner/name")
    return match.group(1), match.group(2)


def pages(address: str) -> str:
    """Where GitHub Pages shows the book of the repository at `address`."""
    owner, name = owner_and_name(address)
    return f"https://{owner.lower()}.github.io/{name}/"


def files(root: Path = ROOT) -> list[Path]:
    """Every file of the project: those that git tracks or would add."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, cwd=root, capture_output=True, text=True, check=True).stdout.split("\0")
    return sorted(path for path in {root / name for name in names} if path.is_file())


def texts(root: Path = ROOT) -> dict[Path, str]:
    """The text files of the project with what they say."""
    return {path: path.read_text(encoding="utf-8") for path in files(root) if path.suffix in TEXT}


def other_addresses(root: Path = ROOT) -> list[str]:
    """One line for each link to ourselves that is not to the repository of pyproject.toml."""
    owner, name = owner_and_name(repository(root))
    return [
        f"{path.relative_to(root)}: {match.group().strip()}"
        for path, text in texts(root).items()
        for pattern in OURS
        for match in pattern.finditer(text)
        if (match.group(1).lower(), match.group(2)) != (owner.lower(), name)
    ]


def rewrite(path: Path, change: Callable[[str], str]) -> bool:
    """Change what a file says; whether that made it another."""
    text = path.read_text(encoding="utf-8")
    changed = change(text)
    if changed != text:
        path.write_text(changed, encoding="utf-8", newline="\n")
    return changed != text


def move(new: str, root: Path = ROOT) -> list[Path]:
    """Rewrite the address in every file that has it; return these files."""
    old = repository(root)
    slug = re.compile(rf"(?<=/){re.escape('/'.join(owner_and_name(old)))}(?![\w-])")

    def change(text: str) -> str:
        return slug.sub("/".join(owner_and_name(new)), text.replace(pages(old), pages(new)))

    return [path for path in texts(root) if rewrite(path, change)]


def revision(root: Path = ROOT) -> str:
    """The branch or tag that links to the repository name: `main`, and in an edition its tag."""
    return re.search(r"^  branch: (\S+)$", (root / "_config.yml").read_text(encoding="utf-8"), re.MULTILINE)[1]


def naming_revisions(root: Path = ROOT) -> re.Pattern:
    """What finds a revision of our repository, its second group: in links to files, Binder and Colab, and for pip."""
    ours = re.escape("/".join(owner_and_name(repository(root))))
    before = rf"^  branch: |/{ours}(?:@|/(?:blob|tree|raw|edit)/)|/gh/{ours}/"
    return re.compile(rf"({before})([\w-]+(?:\.[\w-]+)*)", re.MULTILINE)


def revisions(root: Path = ROOT) -> Counter[str]:
    """How often each revision of our repository is named."""
    pattern = naming_revisions(root)
    return Counter(match[2] for text in texts(root).values() for match in pattern.finditer(text))


def name_revision(new: str, root: Path = ROOT) -> None:
    """Rewrite the links that name the present revision."""
    old, pattern = revision(root), naming_revisions(root)

    def change(text: str) -> str:
        return pattern.sub(lambda match: match[1] + new if match[2] == old else match[0], text)

    for path in texts(root):
        rewrite(path, change)


def main(arguments: list[str]) -> None:
    if len(arguments) != 1:
        sys.exit(__doc__)
    if arguments != ["--check"]:
        for path in move(arguments[0]):
            print(f"rewritten: {path.relative_to(ROOT)}")
    if strays := other_addresses():
        sys.exit("Links that do not lead to " + repository() + ":\n  " + "\n  ".join(strays))
    print(f"All links to the project lead to {repository()}")


if __name__ == "__main__":
    main(sys.argv[1:])
