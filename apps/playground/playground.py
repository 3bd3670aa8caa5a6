"""What the playground (book/playground.md) is served: weights, samples and colours for its scripts, and a picture.

    python apps/playground/playground.py FOLDER

The scripts themselves lie beside this file. Nothing here is computed in the browser as well: the browser
gets the trained weights as they are stored, and computes the maps on its own.
"""

import base64
import io
import json
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import torch
from saliency_sanity import inference, plots, randomization, saliency
from saliency_sanity.book import data, models
from skimage.morphology import skeletonize
from torch import Tensor

SETS = ("digits", "clothes")
METHODS = ("gradient", "input_x_gradient", "guided_backprop", "sobel")
OF_EACH_CLASS = 2
COMPONENTS = 40
TYPICAL = (0.005, 0.955)  # quantiles of the distance from the mean of the training images; below them are blots
DIGIT = 3  # of the picture that stands in for the scripts


class Training(NamedTuple):
    """The training images of a set as a Gaussian: mean, principal components, and one variance for all the rest."""

    mean: Tensor
    components: Tensor
    variances: Tensor
    rest: float
    limits: list[float]

    def distance(self, images: Tensor) -> Tensor:
        """Mahalanobis distance of each image from the mean, `(N,)`; 1 is the root mean square in training."""
        centred = images.flatten(1) - self.mean
        along = (centred @ self.components.T).square()
        left = centred.square().sum(1) - along.sum(1)
        return (((along / self.variances).sum(1) + left / self.rest) / self.mean.numel()).sqrt()


@cache
def training_images(name: str) -> Training:
    """Of the training images, the fraction `TYPICAL` has a distance within `limits`."""
    flat = data.load(name, "train").images.flatten(1)
    variances, vectors = torch.linalg.eigh(torch.cov(flat.T))
    mean, components = flat.mean(0).half().float(), vectors.T[-COMPONENTS:].half().float()
    rest = variances[:-COMPONENTS].mean().item()
    found = Training(mean, components, variances[-COMPONENTS:], rest, [])
    limits = found.distance(flat).quantile(torch.tensor(TYPICAL))
    return found._replace(limits=limits.double().round(decimals=3).tolist())


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
    test, chosen, known = data.load(name), samples(name), training_images(name)
    return {
        "classes": test.classes,
        "labels": test.labels[chosen].tolist(),
        "samples": packed((test.images[chosen] * 255).round(), np.uint8),
        "pen": pen_width(),
        "weights": {"trained": weights(name, 0), "twin": weights(name, 1)},
        "training": {
            "mean": packed(known.mean, np.dtype("<f2")),
            "components": packed(known.components, np.dtype("<f2")),
            "variances": known.variances.tolist(),
            "rest": known.rest,
            "limits": known.limits,
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
    target = inference.predict(model, image).argmax(1)
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


def unlike() -> str:
    """The sentences that say when a drawing counts as unlike the training data, and how often that errs."""
    known = training_images("digits")
    low, high = known.limits
    distances = {name: known.distance(data.load(name).images) for name in SETS}
    outside = {name: ((d < low) | (d > high)).double().mean().item() for name, d in distances.items()}
    return (
        "That is said where its Mahalanobis distance from the mean of the training images (from "
        f"{COMPONENTS} principal components, scaled so that 1 is typical) is not between {low:.2f} and "
        f"{high:.2f}, as it is for {TYPICAL[1] - TYPICAL[0]:.0%} of them. The rule marks {outside['digits']:.0%} of "
        f"the test digits and {outside['clothes']:.0%} of the garments: what it does *not* mark may still be strange."
    )


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    for name in SETS:
        (folder / f"{name}.js").write_bytes(script(name, shipped(name)))
    titles = {method: saliency.title(method) for method in METHODS}
    (folder / "shared.js").write_bytes(script("colours", colours()) + script("titles", titles))
    (folder / "still.png").write_bytes(still())
    (folder / "unlike.txt").write_text(unlike(), encoding="utf-8")
