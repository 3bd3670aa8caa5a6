"""Write SHA256SUMS: the digest of every shipped asset.

python scripts/assets/manifest.py
"""

from saliency_sanity.book.assets import MANIFEST, assets_folder, digest

DATA = {".npz", ".safetensors", ".png", ".jpg", ".csv", ".gz"}

if __name__ == "__main__":
    files = sorted(path for path in assets_folder().rglob("*") if path.suffix in DATA)
    (assets_folder() / MANIFEST).write_text(
        "".join(f"{digest(path)}  {path.relative_to(assets_folder()).as_posix()}\n" for path in files), encoding="utf-8"
    )
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB")
