"""Data and weights shipped with the package, verified on first use."""

import hashlib
from difflib import get_close_matches
from functools import cache
from pathlib import Path

FOLDER = Path(__file__).parent
MANIFEST = FOLDER / "SHA256SUMS"


class AssetError(RuntimeError):
    """A file of the package is missing or is not the file that was published."""


def digest(path: Path) -> str:
    """SHA-256 of a file as 64 hexadecimal digits."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def manifest() -> dict[str, str]:
    """File name (relative to the assets folder) -> published SHA-256."""
    lines = MANIFEST.read_text().splitlines()
    return {name: sha for sha, name in (line.split(maxsplit=1) for line in lines if line)}


@cache
def _verified(path: Path, modified_ns: int, published: str) -> Path:
    if digest(path) != published:
        raise AssetError(
            f"{path} is damaged: its SHA-256 is not the published one. Reinstall the package, "
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
    path, known = FOLDER / name, manifest()
    if name not in known:
        near = get_close_matches(name, known, n=3) or sorted({file.split("/")[0] for file in known})
        raise AssetError(f"{name!r} is not an asset of this package; there are: {', '.join(near)}.")
    if not path.is_file():
        raise AssetError(f"{path} is missing. Reinstall the package, or rebuild it with `make assets`.")
    return _verified(path, path.stat().st_mtime_ns, known[name])
