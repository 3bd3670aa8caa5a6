"""Architectures and trained weights."""

from collections import OrderedDict
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

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


class Recipe(NamedTuple):
    """How the stored checkpoints of a network were trained; `scripts/assets/train.py` follows it.

    `build` makes the network from a seed. `seeds` checkpoints are stored, each trained on the first `images` of the
    training part of `data` or, with `own_images`, on that many of its own. `scenes` are garments on backgrounds.
    `labels` are the labellings to choose from, where there is a choice, and `bug` what is planted in the data (see
    `book.bugs`): `background`, `blur` or `labels`. `frozen` modules keep their weights: random ones or, with
    `pretrained`, those learned on that data. `start` and `order` are added to the seed of the initial weights and to
    that of the order of the batches. The weights after `after` epochs are kept, where that is not the last one.
    `record` is the table of the accuracies.
    """

    build: Callable[..., nn.Module]
    data: str
    seeds: int
    epochs: int
    lr: float
    batch_size: int = 50
    images: int = 4_000
    own_images: bool = False
    labels: tuple[str, ...] = ()
    bug: str | None = None
    frozen: tuple[str, ...] = ()
    pretrained: str | None = None
    start: int = 0
    order: int = 0
    after: int | None = None
    record: str | None = None


LABELS = ("true", "random")
_OTHER = 1000  # added to a seed where it must be another
_CNN: dict[str, Any] = {"seeds": 8, "epochs": 90, "lr": 1e-3, "labels": LABELS, "record": "checkpoints/records.csv"}
_POOLED: dict[str, Any] = {"build": pooled_cnn, "epochs": 8, "lr": 3e-3}
_SCENES = {**_POOLED, "data": "scenes", "seeds": 8, "record": "checkpoints/scenes.csv"}
_FROZEN = {**_POOLED, "data": "clothes", "seeds": 6, "record": "checkpoints/frozen.csv"}
_CONV1, _CONV2, _CONV3 = ("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3")
_MISLABELLED: dict[str, dict[str, Any]] = {
    "mislabelled_clean": {},
    "mislabelled_flipped": {"bug": "labels"},
    "mislabelled_other_order": {"order": _OTHER},
    "mislabelled_other_seed": {"start": _OTHER, "order": _OTHER},
}

REGISTRY = {
    "cnn_clothes": Recipe(cnn, "clothes", **_CNN),
    "cnn_digits": Recipe(cnn, "digits", **_CNN),
    "mlp_digits": Recipe(mlp, "digits", **{**_CNN, "seeds": 5, "epochs": 60, "lr": 2e-3}),
    "cnn_bn_clothes": Recipe(
        partial(cnn, batch_norm=True), "clothes", **{**_CNN, "seeds": 3, "lr": 5e-4, "batch_size": 100}
    ),
    "scenes_clean": Recipe(**_SCENES),
    "scenes_background": Recipe(**_SCENES, bug="background"),
    "scenes_blur": Recipe(**_SCENES, bug="blur"),
    "pooled_clothes": Recipe(**{**_FROZEN, "seeds": 10}),
    "frozen_conv1": Recipe(**_FROZEN, frozen=_CONV1),
    "frozen_conv2": Recipe(**_FROZEN, frozen=_CONV1 + _CONV2),
    "frozen_features": Recipe(**_FROZEN, frozen=_CONV1 + _CONV2 + _CONV3, pretrained="digits"),
} | {
    name + moment: Recipe(
        strided_cnn, "clothes", seeds=6, epochs=40, lr=2e-3, images=1_000, own_images=True, after=after, **options
    )
    for name, options in _MISLABELLED.items()
    for moment, after in {"": None, "_early": 5}.items()
}
TORCHVISION = ("inception_v3", "resnet50", "vgg16")


def checkpoint_name(name: str, labels: str | None = None) -> str:
    """The asset that holds all seeds of a network, of one labelling where there are several."""
    return f"checkpoints/{name}{f'.{labels}' if labels else ''}.safetensors"


def records() -> pd.DataFrame:
    """One row a stored checkpoint: network, labels, seed, epochs, train and test accuracy, minutes taken."""
    return pd.read_csv(locate("checkpoints/records.csv"), dtype={"labels": str})


def squeezenet() -> nn.Module:
    """SqueezeNet 1.1 with the ReLU after the last convolution taken out, so that logits can be negative.

    Takes images `(N, 3, H, W)` in torchvision's ImageNet normalisation. Random weights.
    """
    model = torchvision.models.squeezenet1_1(weights=None)
    model.classifier[2] = nn.Identity()
    return model


def load(
    name: str, *, seed: int | None = None, labels: str | None = None, weights: str | None = "DEFAULT"
) -> nn.Module:
    """A trained network in eval mode, on the CPU, in float32.

    Parameters
    ----------
    name : a key of `REGISTRY` (ours, shipped), `squeezenet_imagenet` (shipped), or `inception_v3`, `vgg16`,
        `resnet50` (torchvision downloads their weights).
    seed : which of our own checkpoints, 0 by default, or what random weights are drawn from.
    labels : of the networks that learned `"true"` and `"random"` labels which; `"true"` by default.
    weights : for torchvision's networks the name of the weights, or None for random ones.

    Raises
    ------
    ValueError
        Unknown name, labels or seed, the message lists the known ones; or an option that the network does not have.
    saliency_sanity.book.assets.AssetError
        The file is missing or damaged.
    """
    if name not in (*REGISTRY, "squeezenet_imagenet", *TORCHVISION):
        known = [*REGISTRY, "squeezenet_imagenet", *TORCHVISION]
        raise ValueError(f"unknown model {name!r}; known: {', '.join(known)}.")
    if labels is not None and not (name in REGISTRY and REGISTRY[name].labels):
        raise ValueError(f"{name} is stored for one set of labels: leave labels={labels!r} out.")
    if weights != "DEFAULT" and name not in TORCHVISION:
        raise ValueError(f"{name} has its own weights: leave weights={weights!r} out.")
    if seed is not None and name not in REGISTRY and not (name in TORCHVISION and weights is None):
        raise ValueError(f"{name} has one set of weights: leave seed={seed!r} out.")
    if name in REGISTRY:
        return _checkpoint(name, 0 if seed is None else seed, labels).eval()
    if name == "squeezenet_imagenet":
        return _stored(squeezenet(), "squeezenet_imagenet.safetensors").eval()
    extra = {"init_weights": True} if name == "inception_v3" and weights is None else {}
    with local_seed(seed or 0):
        return torchvision.models.get_model(name, weights=weights, **extra).eval()


def _checkpoint(name: str, seed: int, labels: str | None) -> nn.Module:
    recipe = REGISTRY[name]
    if recipe.labels:
        labels = "true" if labels is None else labels
        if labels not in recipe.labels:
            raise ValueError(f"unknown labels {labels!r}; known: {', '.join(recipe.labels)}.")
    if seed not in range(recipe.seeds):
        raise ValueError(f"{name} is stored for seeds 0 to {recipe.seeds - 1}, got {seed!r}.")
    return _stored(recipe.build(), checkpoint_name(name, labels), f"{int(seed)}.")


def _stored(model: nn.Module, asset: str, prefix: str = "") -> nn.Module:
    with safe_open(locate(asset), "pt") as file:
        model.load_state_dict({key: file.get_tensor(prefix + key) for key in model.state_dict()})
    return model
