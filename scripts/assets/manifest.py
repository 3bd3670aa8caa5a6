"""Write SHA256SUMS: the digest of every shipped asset.

python scripts/assets/manifest.py
"""

from helpers.assets import FOLDER, MANIFEST, digest

DATA = {".npz", ".safetensors", ".png", ".jpg", ".csv", ".gz"}

if __name__ == "__main__":
    files = sorted(path for path in FOLDER.rglob("*") if path.suffix in DATA)
    MANIFEST.write_text("".join(f"{digest(path)}  {path.relative_to(FOLDER).as_posix()}\n" for path in files))
    size = sum(path.stat().st_size for path in files)
    print(f"{len(files)} files, {size / 1e6:.1f} MB")
