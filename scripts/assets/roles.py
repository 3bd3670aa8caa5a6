"""Give a stored frame of before there were roles the columns of today; one that has them stays as it is.

python scripts/assets/roles.py
"""

import gzip
import io

import pandas as pd
from saliency_sanity import sanity
from saliency_sanity.book.assets import assets_folder

ROLES = {"other_image": "floor", "noise": "floor", "retest": "ceiling", "twin": "ceiling", "mirror": "ceiling"}


def converted(content: bytes) -> bytes:
    """A frame as compressed CSV under one line about it, that line and all numbers unchanged."""
    about, _, table = gzip.decompress(content).decode().partition("\n")
    frame = pd.read_csv(io.StringIO(table), dtype=str, keep_default_na=False)
    if "role" in frame:
        return content
    frame["role"] = frame.scheme.map(ROLES).fillna("curve")
    frame["layer"] = frame.layer.where(frame.layer != "trained", "")
    frame["stage"] = frame.stage.where(frame.stage != "-1", "0")
    return gzip.compress(f"{about}\n{frame[sanity.COLUMNS].to_csv(index=False)}".encode(), mtime=0)


if __name__ == "__main__":
    path = assets_folder() / "imagenet_cascade.csv.gz"
    path.write_bytes(converted(path.read_bytes()))
    print(f"{path.name}: {path.stat().st_size:,} bytes")
