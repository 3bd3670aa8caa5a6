"""Draw the pairs of the blind test and make their pictures; run by scripts/build_book.py.

    python apps/blind_test/blind_test.py FOLDER

Writes `trials.json`, and for each trial the pictures `NN-image`, `NN-left` and `NN-right`; `end-…` are those of the
last figure. All that is random follows from `SEED`, which the page prints.
"""

import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from PIL import Image
from saliency_sanity import edges, inference, localization, randomization, saliency, similarity
from saliency_sanity.book import data, models, photographs
from saliency_sanity.device import generator
from torch import Tensor, nn

SEED = 2018
METHODS = ("gradient", "smoothgrad", "integrated_gradients", "guided_backprop")
FOILS = ("untrained", "edges")
BACKGROUNDS = ("grey", "brick", "grass", "gravel")
CLIP = 0.99  # white is reached at this quantile of a map that is shown at its own scale


class Pool(NamedTuple):
    """Images `(N, C, H, W)` in [0, 1] that all `trained` networks classify correctly, classes, what each shows."""

    images: Tensor
    labels: Tensor
    objects: list[str]
    titles: list[str]
    trained: list[nn.Module]


class Trial(NamedTuple):
    """A pair of maps of one image. `left` and `right` are "trained", "untrained" or "edges".

    `foil` is what the trained network's map stands against, or "catch" where the pair has no right answer.
    `networks` and `weights` are the seeds of the trained networks and of the random weights, left before right.
    """

    pool: str
    image: int
    foil: str
    method: str
    ranks: bool
    left: str
    right: str
    networks: tuple[int, int]
    weights: tuple[int, int]


def photographs_pool(backgrounds: Sequence[str] = BACKGROUNDS) -> Pool:
    """Objects on backgrounds, those that SqueezeNet classifies correctly."""
    network = models.load("squeezenet_imagenet")
    names = photographs.class_names()
    images, labels, objects, titles = [], [], [], []
    for background in backgrounds:
        found = photographs.composites(background)
        known = inference.predict(network, photographs.normalize(found.images), batch_size=4).argmax(1) == found.labels
        images.append(found.images[known])
        labels.append(found.labels[known])
        kept = known.nonzero()[:, 0].tolist()
        objects += [found.names[i] for i in kept]
        titles += [f"{names[found.labels[i]]} on {background}" for i in kept]
    return Pool(torch.cat(images), torch.cat(labels), objects, titles, [network])


def clothes_pool() -> Pool:
    """Test images of clothes that the networks of all seeds classify correctly."""
    networks = [models.load("cnn_clothes", seed=k) for k in range(models.REGISTRY["cnn_clothes"].seeds)]
    test = data.load("clothes", "test")
    right = torch.stack([inference.predict(network, test.images).argmax(1) == test.labels for network in networks])
    known = right.all(0).nonzero()[:, 0]
    titles = [test.classes[label] for label in test.labels[known]]
    return Pool(test.images[known], test.labels[known], [str(i) for i in known.tolist()], titles, networks)


def draw_trials(seed: int, objects: Mapping[str, Sequence[str]]) -> list[Trial]:
    """The twenty trials of a seed.

    Parameters
    ----------
    objects : for the pools "photographs" and "clothes" the object in each eligible image; none is drawn twice.

    Returns
    -------
    Sixteen scored trials, each method against each foil at its own scale and as ranks, and four that have no
    right answer, in random order. Half of either kind shows photographs; in half the scored trials of either
    foil the trained network's map is on the left.
    """
    rng = generator(seed)
    images = {
        pool: _distinct(torch.randperm(len(names), generator=rng).tolist(), names) for pool, names in objects.items()
    }
    sides = {foil: torch.randperm(8, generator=rng).lt(4).tolist() for foil in FOILS}
    design = []
    for (f, foil), (m, method), ranks in product(enumerate(FOILS), enumerate(METHODS), (False, True)):
        pair = ("trained", foil) if sides[foil].pop() else (foil, "trained")
        design.append((("photographs", "clothes")[(f + m + ranks) % 2], foil, method, ranks, *pair))
    spare = [METHODS[i] for i in torch.randperm(len(METHODS), generator=rng).tolist()]
    for (kind, pool), ranks in product((("trained", "clothes"), ("untrained", "photographs")), (False, True)):
        design.append((pool, "catch", spare.pop(), ranks, kind, kind))
    trials = []
    for i in torch.randperm(len(design), generator=rng).tolist():
        pool, *rest = design[i]
        networks = torch.randperm(models.REGISTRY["cnn_clothes"].seeds, generator=rng)[:2].tolist()
        weights = torch.randint(2**31, (2,), generator=rng).tolist()
        trials.append(Trial(pool, next(images[pool]), *rest, tuple(networks), tuple(weights)))
    return trials


def _distinct(order: Sequence[int], names: Sequence[str]) -> Iterator[int]:
    """The first place of each name in this order."""
    first: dict[str, int] = {}
    for i in order:
        first.setdefault(names[i], i)
    return iter(first.values())


def untrained(network: nn.Module, seed: int) -> nn.Module:
    """The network with every layer re-initialised by its own initialiser."""
    *_, (_, fresh) = randomization.cascading(network, seed=seed)
    return fresh


def heat(method: str, network: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Unsigned maps `(N, H, W)` of images in [0, 1]."""
    inputs = photographs.normalize(images) if images.shape[1] == 3 else images
    return saliency.heatmap(saliency.METHODS[method](network, inputs, labels), signed=False)


def shown(trial: Trial, pool: Pool) -> tuple[Tensor, Tensor]:
    """The two maps of a trial, `(H, W)` each, as they were computed."""
    image, label = pool.images[[trial.image]], pool.labels[[trial.image]]
    maps = []
    for side, network_seed, weight_seed in zip((trial.left, trial.right), trial.networks, trial.weights):
        network = pool.trained[network_seed % len(pool.trained)]
        if side == "edges":
            maps.append(edges.sobel(image)[0])
        else:
            network = untrained(network, weight_seed) if side == "untrained" else network
            maps.append(heat(trial.method, network, image, label)[0])
    return maps[0], maps[1]


def levels(values: Tensor, *, ranks: bool, seed: int = 0) -> Tensor:
    """A map `(H, W)` >= 0 as grey levels 0 to 255, uint8.

    At its own scale, white from the `CLIP` quantile on; or each pixel by its rank, ties in random order, so that
    all maps of a size have the same histogram.
    """
    if not ranks:
        limit = values.flatten().quantile(CLIP).clamp_min(torch.finfo(values.dtype).tiny)
        return (values / limit).clamp(0, 1).mul(255).round().to(torch.uint8)
    flat = values.flatten()
    order = torch.randperm(len(flat), generator=generator(seed))
    order = order[flat[order].argsort(stable=True)]
    rank = torch.empty_like(order)
    rank[order] = torch.arange(len(flat))
    return (rank * 256 // len(flat)).to(torch.uint8).reshape(values.shape)


def save(picture: Tensor, path: Path) -> str:
    """Write grey levels `(H, W)` or an image `(C, H, W)` in [0, 1]; small ones exactly. Returns the file's name."""
    if picture.ndim == 3:
        picture = picture.mul(255).round().to(torch.uint8).permute(1, 2, 0).squeeze(-1)
    exact = len(picture) < 64
    path = path.with_suffix(".png" if exact else ".webp")
    Image.fromarray(picture.numpy()).save(path, **({"optimize": True} if exact else {"quality": 60, "method": 6}))
    return path.name


def last_pair(folder: Path) -> dict:
    """The figure at the end: the trained network's Gradient beside the untrained network's Guided Backprop.

    Of all objects on plain grey, where every edge is the object's, the one whose untrained map resembles the
    edges (Pearson's correlation) by most more than its trained map does. The AUC on the object's mask says how
    well each map lies on the object.
    """
    pool = photographs_pool(["grey"])
    [network] = pool.trained
    outline, masks = edges.sobel(pool.images), photographs.composites("grey", names=pool.objects).masks
    maps = {
        "trained": heat("gradient", network, pool.images, pool.labels),
        "untrained": heat("guided_backprop", untrained(network, SEED), pool.images, pool.labels),
    }
    likeness = {side: similarity.pearson(values, outline) for side, values in maps.items()}
    auc = {side: localization.auc(values, masks) for side, values in maps.items()}
    gap = likeness["untrained"] - likeness["trained"]
    best = gap.argmax().item()
    pictures = {"image": pool.images[best]} | {side: levels(maps[side][best], ranks=False) for side in maps}
    return {
        "title": pool.titles[best],
        "images": len(gap),
        "untrained_more_like_edges": int((gap > 0).sum()),
        "trained_more_on_object": int((auc["trained"] > auc["untrained"]).sum()),
        "likeness": {side: round(values[best].item(), 2) for side, values in likeness.items()},
        "pictures": {name: save(picture, folder / f"end-{name}") for name, picture in pictures.items()},
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    pools = {"photographs": photographs_pool(), "clothes": clothes_pool()}
    trials = draw_trials(SEED, {name: pool.objects for name, pool in pools.items()})
    written = []
    for number, trial in enumerate(trials, start=1):
        pool = pools[trial.pool]
        pair = [levels(values, ranks=trial.ranks, seed=side) for side, values in enumerate(shown(trial, pool))]
        pictures = dict(zip(("image", "left", "right"), (pool.images[trial.image], *pair)))
        files = {name: save(picture, folder / f"{number:02}-{name}") for name, picture in pictures.items()}
        titles = {"title": pool.titles[trial.image], "method_title": saliency.title(trial.method)}
        written.append({**trial._asdict(), **titles, "pictures": files})
    about = {"seed": SEED, "eligible": {name: len(pool.images) for name, pool in pools.items()}}
    about |= {"methods": [saliency.title(method) for method in METHODS], "trials": written, "end": last_pair(folder)}
    (folder / "trials.json").write_text(json.dumps(about, indent=1), encoding="utf-8")
