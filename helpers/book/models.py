"""Architectures and trained weights."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import NamedTuple

import pandas as pd
import torchvision
from safetensors import safe_open
from torch import nn

from ..device import local_seed
from .assets import locate


def cnn(*, batch_norm: bool = False, seed: int = 0) -> nn.Sequential:
    """The paper's small CNN at a size that ships: conv 16, conv 32, fc 64, ten logits.

    Takes images `(N, 1, 28, 28)` in [0, 1]. With `batch_norm` a norm follows each convolution.
    PyTorch's own initialisation, drawn from `seed`.
    """

    def norm(name: str, channels: int) -> list[tuple[str, nn.Module]]:
        return [(name, nn.BatchNorm2d(channels))] if batch_norm else []

    with local_seed(seed):
        return nn.Sequential(
            OrderedDict(
                [
                    ("conv1", nn.Conv2d(1, 16, 5, padding=2)),
                    *norm("norm1", 16),
                    ("relu1", nn.ReLU()),
                    ("pool1", nn.MaxPool2d(2)),
                    ("conv2", nn.Conv2d(16, 32, 5, padding=2)),
                    *norm("norm2", 32),
                    ("relu2", nn.ReLU()),
                    ("pool2", nn.MaxPool2d(2)),
                    ("flatten", nn.Flatten()),
                    ("fc1", nn.Linear(32 * 7 * 7, 64)),
                    ("relu3", nn.ReLU()),
                    ("logits", nn.Linear(64, 10)),
                ]
            )
        )


def pooled_cnn(*, seed: int = 0) -> nn.Sequential:
    """Three convolutions with batch-norm (16, 32, 32), the mean over all places, ten logits.

    Takes images `(N, 1, H, W)` in [0, 1] of any size from 4 on. PyTorch's own initialisation, drawn from `seed`.
    """
    with local_seed(seed):
        return nn.Sequential(
            OrderedDict(
                [
                    ("conv1", nn.Conv2d(1, 16, 5, padding=2)),
                    ("norm1", nn.BatchNorm2d(16)),
                    ("relu1", nn.ReLU()),
                    ("pool1", nn.MaxPool2d(2)),
                    ("conv2", nn.Conv2d(16, 32, 3, padding=1)),
                    ("norm2", nn.BatchNorm2d(32)),
                    ("relu2", nn.ReLU()),
                    ("pool2", nn.MaxPool2d(2)),
                    ("conv3", nn.Conv2d(32, 32, 3, padding=1)),
                    ("norm3", nn.BatchNorm2d(32)),
                    ("relu3", nn.ReLU()),
                    ("mean", nn.AdaptiveAvgPool2d(1)),
                    ("flatten", nn.Flatten()),
                    ("logits", nn.Linear(32, 10)),
                ]
            )
        )


def strided_cnn(*, seed: int = 0) -> nn.Sequential:
    """Two convolutions (16, 32) that halve height and width by their stride, and ten logits of all places.

    Takes images `(N, 1, 28, 28)` in [0, 1]. Quick to train, and large enough to learn a thousand labels by heart.
    PyTorch's own initialisation, drawn from `seed`.
    """
    with local_seed(seed):
        return nn.Sequential(
            OrderedDict(
                [
                    ("conv1", nn.Conv2d(1, 16, 5, stride=2, padding=2)),
                    ("relu1", nn.ReLU()),
                    ("conv2", nn.Conv2d(16, 32, 3, stride=2, padding=1)),
                    ("relu2", nn.ReLU()),
                    ("flatten", nn.Flatten()),
                    ("logits", nn.Linear(32 * 7 * 7, 10)),
                ]
            )
        )


def mlp(*, seed: int = 0) -> nn.Sequential:
    """A multi-layer perceptron with three hidden layers (200, 100, 50), ten logits.

    Takes images `(N, 1, 28, 28)` in [0, 1]. PyTorch's own initialisation, drawn from `seed`.
    """
    with local_seed(seed):
        return nn.Sequential(
            OrderedDict(
                [
                    ("flatten", nn.Flatten()),
                    ("fc1", nn.Linear(28 * 28, 200)),
                    ("relu1", nn.ReLU()),
                    ("fc2", nn.Linear(200, 100)),
                    ("relu2", nn.ReLU()),
                    ("fc3", nn.Linear(100, 50)),
                    ("relu3", nn.ReLU()),
                    ("logits", nn.Linear(50, 10)),
                ]
            )
        )


class Shipped(NamedTuple):
    """How the stored checkpoints of a network were trained."""

    build: Callable[..., nn.Module]
    data: str
    seeds: int
    epochs: int
    batch_size: int
    lr: float


SHIPPED = {
    "cnn_clothes": Shipped(cnn, "clothes", seeds=8, epochs=90, batch_size=50, lr=1e-3),
    "cnn_digits": Shipped(cnn, "digits", seeds=8, epochs=90, batch_size=50, lr=1e-3),
    "mlp_digits": Shipped(mlp, "digits", seeds=5, epochs=60, batch_size=50, lr=2e-3),
    "cnn_bn_clothes": Shipped(partial(cnn, batch_norm=True), "clothes", seeds=3, epochs=90, batch_size=100, lr=5e-4),
}
LABELS = ("true", "random")
# Seeds of the `pooled_cnn` trained on garments on backgrounds (see `book.bugs`), by the bug planted in the data.
SCENES = {"scenes_clean": 8, "scenes_background": 8, "scenes_blur": 8}
# Seeds of the `pooled_cnn` trained on garments: whole, with stages frozen at random up to the one named, and with all
# stages but the logits frozen after a training on digits.
FROZEN = {"pooled_clothes": 10, "frozen_conv1": 6, "frozen_conv2": 6, "frozen_features": 6}
# Seeds of the `strided_cnn` trained with and without wrong labels: after 40 epochs and, with `_early`, after 5.
MISLABELLED = {
    f"mislabelled_{kind}{moment}": 6
    for kind in ("clean", "flipped", "other_order", "other_seed")
    for moment in ("", "_early")
}
TORCHVISION = ("inception_v3", "resnet50", "vgg16")


def checkpoint_name(name: str, labels: str) -> str:
    """The asset that holds all seeds of a network trained on `labels`."""
    return f"checkpoints/{name}.{labels}.safetensors"


def records() -> pd.DataFrame:
    """One row a stored checkpoint: network, labels, seed, epochs, train and test accuracy, minutes taken."""
    return pd.read_csv(locate("checkpoints/records.csv"), dtype={"labels": str})


def _shipped(name: str, *, seed: int = 0, labels: str = "true") -> nn.Module:
    spec = SHIPPED[name]
    if labels not in LABELS:
        raise ValueError(f"unknown labels {labels!r}; known: {', '.join(LABELS)}.")
    return _replicate(spec.build(), checkpoint_name(name, labels), name, seed, spec.seeds)


def _pooled(name: str, *, seed: int = 0) -> nn.Module:
    return _replicate(pooled_cnn(), checkpoint_name(name, "true"), name, seed, (SCENES | FROZEN)[name])


def _strided(name: str, *, seed: int = 0) -> nn.Module:
    return _replicate(strided_cnn(), f"checkpoints/{name}.safetensors", name, seed, MISLABELLED[name])


def _squeezenet(name: str) -> nn.Module:
    return _stored(squeezenet(), f"{name}.safetensors")


def _torchvision(name: str, *, weights: str | None = "DEFAULT", seed: int | None = None) -> nn.Module:
    if weights is not None and seed is not None:
        raise ValueError(f"{name} draws from a seed only where its weights are random: pass weights=None with it.")
    extra = {"init_weights": True} if name == "inception_v3" and weights is None else {}
    with local_seed(seed or 0):
        return torchvision.models.get_model(name, weights=weights, **extra)


def _replicate(model: nn.Module, asset: str, name: str, seed: int, seeds: int) -> nn.Module:
    """The model with the weights of one of the seeds that an asset holds."""
    if seed not in range(seeds):
        raise ValueError(f"{name} is stored for seeds 0 to {seeds - 1}, got {seed!r}.")
    return _stored(model, asset, f"{int(seed)}.")


def _stored(model: nn.Module, asset: str, prefix: str = "") -> nn.Module:
    with safe_open(locate(asset), "pt") as file:
        model.load_state_dict({key: file.get_tensor(prefix + key) for key in model.state_dict()})
    return model


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 with the ReLU after the last convolution taken out, so that logits can be negative.

    Takes images `(N, 3, H, W)` in torchvision's ImageNet normalisation. Random weights.
    """
    model = torchvision.models.squeezenet1_1(weights=None)
    model.classifier[2] = nn.Identity()
    return model


NETWORKS: dict[str, Callable[..., nn.Module]] = {
    **dict.fromkeys(SHIPPED, _shipped),
    **dict.fromkeys((*SCENES, *FROZEN), _pooled),
    **dict.fromkeys(MISLABELLED, _strided),
    "squeezenet_imagenet": _squeezenet,
    **dict.fromkeys(TORCHVISION, _torchvision),
}


def load(name: str, **options) -> nn.Module:
    """A trained network in eval mode, on the CPU, in float32.

    Parameters
    ----------
    name : `cnn_clothes`, `cnn_digits`, `mlp_digits`, `cnn_bn_clothes`, `scenes_clean`, `scenes_background`,
        `scenes_blur`, `pooled_clothes`, `frozen_conv1`, `frozen_conv2`, `frozen_features`, `mislabelled_clean`,
        `mislabelled_flipped`, `mislabelled_other_order`, `mislabelled_other_seed` and each of these four with
        `_early` (ours, shipped), `squeezenet_imagenet` (shipped), or `inception_v3`, `vgg16`, `resnet50`
        (torchvision downloads their weights).
    options : `seed` says which of our own checkpoints, 0 where it is left out; `labels` whether those on clothes and
        digits were trained on `"true"` or `"random"` labels; `weights` is the name of torchvision's, or None for
        random ones, drawn from `seed`.

    Raises
    ------
    ValueError
        Unknown name, labels or seed, or an option that this network does not have; the message lists the known ones.
    saliency_sanity.book.assets.AssetError
        The file is missing or damaged.
    """
    if name not in NETWORKS:
        raise ValueError(f"unknown model {name!r}; known: {', '.join(NETWORKS)}.")
    known = [option for option in signature(NETWORKS[name]).parameters if option != "name"]
    for option in options:
        if option not in known:
            raise ValueError(f"{name} has no option {option!r}; it has: {', '.join(known) or 'none'}.")
    return NETWORKS[name](name, **options).eval()
