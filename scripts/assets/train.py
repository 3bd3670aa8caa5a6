"""Train the book's networks by the recipes of `models.REGISTRY`; store them in half precision, one file a network.

    python scripts/assets/train.py                            all of them (about an hour and a half on two cores)
    python scripts/assets/train.py cnn_clothes --seed 3 --labels random

Networks of one family see the same images for the same number of steps, without weight decay. `seed` sets the
initial weights, with which frozen stages stay, the order of the batches, and what is left to chance in the data: the
permutation of the labels, which of them are wrong, the places of the garments and their backgrounds.
"""

import argparse
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from copy import deepcopy

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from saliency_sanity.book import bugs, data, models, training
from saliency_sanity.book.assets import assets_folder
from torch import Tensor, nn

TEST_SCENES = 1000  # added to the seed of the scenes for those of the test part


def examples(name: str, split: str, *, seed: int, labels: str | None = None) -> tuple[Tensor, Tensor]:
    """Images and labels of a split as this checkpoint of a network learns them, or is tested on them."""
    recipe = models.REGISTRY[name]
    if recipe.data == "scenes":
        return scenes(recipe, split, seed if split == "train" else seed + TEST_SCENES)
    images, true, _ = data.load(recipe.data, split)
    if split == "test":
        return images, true
    first = recipe.images * seed if recipe.own_images else 0
    images, true = images[first : first + recipe.images], true[first : first + recipe.images]
    if labels == "random":
        return images, training.permute_labels(true, seed=seed)
    return images, bugs.mislabel(true, seed=seed).labels if recipe.bug == "labels" else true


def scenes(recipe: models.Recipe, split: str, seed: int) -> tuple[Tensor, Tensor]:
    """Garments on backgrounds with the bug of the recipe, and their labels."""
    garments = data.load("clothes", split)
    objects, labels = garments.images[: recipe.images], garments.labels[: recipe.images]
    which = labels if recipe.bug == "background" else training.permute_labels(labels, seed=seed)
    images = bugs.scenes(objects, bugs.silhouettes(objects), which, bugs.backgrounds(), seed=seed).images
    return bugs.blur_class(images, labels) if recipe.bug == "blur" else images, labels


def fit(
    name: str,
    *,
    seed: int,
    labels: str | None = None,
    watch: Callable[[int, nn.Module], object] | None = None,
) -> nn.Module:
    """The network after its last epoch. `watch` is that of `training.train`."""
    recipe = models.REGISTRY[name]
    start = recipe.build(seed=seed + recipe.start)
    if recipe.build is models.pooled_cnn:
        start = start.to(memory_format=torch.channels_last)  # faster
    options = {"epochs": recipe.epochs, "batch_size": recipe.batch_size, "lr": recipe.lr, "seed": seed + recipe.order}
    if recipe.pretrained:
        split = data.load(recipe.pretrained, "train")
        start = training.train(start, split.images[: recipe.images], split.labels[: recipe.images], **options).model
        start.logits.load_state_dict(recipe.build(seed=seed).logits.state_dict())
    for part in recipe.frozen:  # the statistics of their norms follow the images all the same
        start.get_submodule(part).requires_grad_(False)
    images, target = examples(name, "train", seed=seed, labels=labels)
    return training.train(start, images, target, watch=watch, **options).model


def one(name: str, labels: str | None, seed: int) -> tuple[dict[str, Tensor], dict]:
    """Train one checkpoint; returns its weights in half precision and the row of the record."""
    torch.set_num_threads(1)
    recipe, start, kept = models.REGISTRY[name], time.perf_counter(), []

    def keep(epoch: int, network: nn.Module) -> None:
        if epoch + 1 == (recipe.after or recipe.epochs):
            kept.append(deepcopy(network).eval())

    fit(name, seed=seed, labels=labels, watch=keep)
    model = kept[0]
    weights = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    train, test = (examples(name, split, seed=seed, labels=labels) for split in data.SPLITS)
    row = {
        "network": name,
        **({"labels": labels} if labels else {}),
        "seed": seed,
        "images": len(train[0]),
        "epochs": recipe.epochs,
        "train_accuracy": round(training.accuracy(model, *train), 4),
        "test_accuracy": round(training.accuracy(model, *test), 4),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }
    return weights, row


def store(weights: dict[str, Tensor], row: dict) -> None:
    """Add one checkpoint to its file and its row to the record, replacing an older one of the same seed."""
    path = assets_folder() / models.checkpoint_name(row["network"], row.get("labels"))
    path.parent.mkdir(exist_ok=True)
    tensors = load_file(path) if path.exists() else {}
    save_file(tensors | {f"{row['seed']}.{key}": value for key, value in weights.items()}, path)
    if models.REGISTRY[row["network"]].record is None:
        return
    record = assets_folder() / models.REGISTRY[row["network"]].record
    keys = [key for key in ("network", "labels", "seed") if key in row]
    old = [pd.read_csv(record, dtype={"labels": str})] if record.exists() else []
    rows = pd.concat([*old, pd.DataFrame([row])]).drop_duplicates(keys, keep="last")
    rows.sort_values(keys).to_csv(record, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=models.REGISTRY)
    parser.add_argument("--labels", choices=models.LABELS)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        (name, labels, seed)
        for name, recipe in models.REGISTRY.items()
        for labels in recipe.labels or [None]
        for seed in range(recipe.seeds)
        if options.network in (None, name) and options.labels in (None, labels) and options.seed in (None, seed)
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        for weights, row in pool.map(one, *zip(*jobs, strict=True)):
            store(weights, row)
            print(row, flush=True)
