"""Data and weights of the book, a distribution of their own (`saliency-sanity-assets`), verified on first use."""

import hashlib
import os
from difflib import get_close_matches
from functools import cache
from importlib.util import find_spec
from pathlib import Path

MANIFEST = "SHA256SUMS"


class AssetError(RuntimeError):
    """The assets are not installed, or a file of them is missing or is not the file that was published."""


@cache
def assets_folder() -> Path:
    """Where the assets are installed.

    Raises
    ------
    AssetError
        They are not.
    """
    found = find_spec("saliency_sanity_assets")
    if found is None or found.origin is None:
        raise AssetError(
            "the book's data and weights are not installed; from a clone: pip install ./assets. "
            "The first code cell of every chapter installs them, too."
        )
    return Path(found.origin).parent


def digest(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest() -> dict[str, str]:
    """File name (relative to the assets folder) -> published SHA-256."""
    lines = (assets_folder() / MANIFEST).read_text(encoding="utf-8").splitlines()
    return {name: sha for sha, name in (line.split(maxsplit=1) for line in lines if line)}


def listed(folder: str) -> list[str]:
    """Names of the assets in a folder, such as "textures", in order."""
    _note(f"{folder}/")
    return sorted(name for name in manifest() if name.startswith(f"{folder}/"))


def _note(name: str) -> None:
    """Where the build asks which assets a program uses, write one more name into its file."""
    if file := os.environ.get("SANITY_ASSETS_NOTE"):
        with open(file, "a", encoding="utf-8") as note:
            note.write(f"{name}\n")


@cache
def _verified(path: Path, modified_ns: int, published: str) -> Path:
    if digest(path) != published:
        raise AssetError(
            f"{path} is damaged: its SHA-256 is not the published one. Reinstall saliency-sanity-assets, "
            "or rebuild the file with `make assets` and commit the new SHA256SUMS."
        )
    return path


def locate(name: str) -> Path:
    """Path of the asset `name`, after checking that it is the published file.

    Raises
    ------
    AssetError
        The file is not in the manifest, is missing, or has another SHA-256.
    """
    path, known = assets_folder() / name, manifest()
    if name not in known:
        near = get_close_matches(name, known, n=3) or sorted({file.split("/")[0] for file in known})
        raise AssetError(f"{name!r} is not one of the assets; there are: {', '.join(near)}.")
    if not path.is_file():
        raise AssetError(f"{path} is missing. Reinstall saliency-sanity-assets, or rebuild it with `make assets`.")
    _note(name)
    return _verified(path, path.stat().st_mtime_ns, known[name])
