"""What the playground (book/playground.md) is served: weights, samples and colours for its scripts, and a picture.

The scripts themselves are in book/extra/playground. Nothing here is computed in the browser as well: the browser
gets the trained weights as they are stored, and computes the maps on its own.
"""

import base64
import io
import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from skimage.morphology import skeletonize
from torch import Tensor

from helpers import data, models, plots, randomization, saliency, training

FOLDER = Path("book/extra/playground")
SETS = ("digits", "clothes")
METHODS = ("gradient", "input_x_gradient", "guided_backprop", "sobel")
OF_EACH_CLASS = 2
COMPONENTS = 40
RARE = 0.01
DIGIT = 3  # of the picture that stands in for the scripts


class Patterns(NamedTuple):
    """Mean and principal components of the training images, and the share they rarely leave over."""

    mean: Tensor
    components: Tensor
    limit: float

    def left_over(self, images: Tensor) -> Tensor:
        """The part of each image that the patterns do not draw, as a share of its length, `(N,)`."""
        flat = images.flatten(1)
        rest = flat - self.mean
        rest = rest - rest @ self.components.T @ self.components
        return rest.norm(dim=1) / flat.norm(dim=1)


@cache
def patterns(name: str) -> Patterns:
    """All but one in a hundred training images of the set leave less than `limit` over."""
    images = data.load(name, "train").images
    flat = images.flatten(1)
    mean = flat.mean(0)
    _, vectors = torch.linalg.eigh(torch.cov(flat.T))
    found = Patterns(mean.half().float(), vectors.T[-COMPONENTS:].half().float(), 0.0)
    return found._replace(limit=round(found.left_over(images).quantile(1 - RARE).item(), 4))


def samples(name: str) -> Tensor:
    """Places of the first test images of each class."""
    labels = data.load(name).labels
    return torch.cat([(labels == label).nonzero()[:OF_EACH_CLASS, 0] for label in range(10)])


def pen_width() -> float:
    """Width in pixels of the pen that wrote the digits: ink over the length of the skeleton, the median."""
    digits = data.load("digits", "train").images[:500, 0].numpy()
    return round(float(np.median([digit.sum() / skeletonize(digit > 0.5).sum() for digit in digits])), 2)


def packed(values: Tensor, kind: np.dtype) -> str:
    return base64.b64encode(values.numpy().astype(kind).tobytes()).decode()


def weights(name: str, seed: int) -> str:
    """A stored network, parameter after parameter, in half precision."""
    parameters = models.load(f"cnn_{name}", seed=seed).state_dict().values()
    return packed(torch.cat([parameter.flatten() for parameter in parameters]), np.dtype("<f2"))


def script(name: str, value: object) -> bytes:
    """A classic script rather than JSON: pages that are opened from a folder may load it too."""
    return f"(globalThis.playgroundData ??= {{}}).{name} = {json.dumps(value)};\n".encode()


def shipped(name: str) -> dict:
    """All that the page needs to know of a data set and its networks."""
    test, chosen, known = data.load(name), samples(name), patterns(name)
    return {
        "classes": test.classes,
        "labels": test.labels[chosen].tolist(),
        "samples": packed((test.images[chosen] * 255).round(), np.uint8),
        "pen": pen_width(),
        "weights": {"trained": weights(name, 0), "twin": weights(name, 1)},
        "patterns": {
            "mean": packed(known.mean, np.dtype("<f2")),
            "components": packed(known.components, np.dtype("<f2")),
            "limit": known.limit,
        },
    }


def colours() -> str:
    """The 256 colours of signed maps in the book's figures, three bytes each."""
    table = matplotlib.colormaps[plots.SIGNED](np.arange(256), bytes=True)[:, :3]
    return base64.b64encode(table.tobytes()).decode()


def still() -> bytes:
    """A digit's maps while the network is randomised from the top: a PNG for readers without scripts."""
    model, digits = models.load("cnn_digits"), data.load("digits")
    image = digits.images[samples("digits")[OF_EACH_CLASS * DIGIT]][None]
    target = training.predict(model, image).argmax(1)
    stages = {"trained": model, **dict(randomization.cascading(model, seed=0))}
    rows = {
        method: torch.cat(
            [saliency.heatmap(saliency.METHODS[method](m, image, target), signed=True) for m in stages.values()]
        )
        for method in METHODS
    }
    file = io.BytesIO()
    plots.maps(rows, list(stages), signed=True, images=image.expand(len(rows), -1, -1, -1)).savefig(file)
    return file.getvalue()


def files() -> dict[Path, bytes]:
    """What is written beside the page and its scripts."""
    made = {FOLDER / f"{name}.js": script(name, shipped(name)) for name in SETS}
    return made | {FOLDER / "colours.js": script("colours", colours()), Path("book/playground.png"): still()}


def unlike() -> str:
    """The sentences that say when a drawing counts as unlike the training data, and how often that errs."""
    known = patterns("digits")
    wrong, found = ((known.left_over(data.load(name).images) > known.limit).float().mean().item() for name in SETS)
    return (
        f"That is said where the {COMPONENTS} patterns that draw the training digits best (their principal components) "
        f"leave more than {known.limit:.0%} of it over, which happens to {RARE:.0%} of them. By this rule {wrong:.1%} "
        f"of the test digits are unlike, and {found:.0%} of the garments, so that what is *not* marked may still be strange."
    )
