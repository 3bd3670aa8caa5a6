"""Train small CNNs on garments, whole and with stages frozen, and store them in half precision.

    python scripts/assets/frozen.py                             all of them (about ten minutes on one core)
    python scripts/assets/frozen.py frozen_conv1 --seed 3

All see the same garments for the same number of steps. `seed` sets the initial weights, with which frozen stages
stay, and the order of the batches: networks of one seed start alike. The features of `frozen_features` were trained
on digits before they were frozen.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor

import torch
from saliency_sanity.book import data, models, training
from saliency_sanity.book.assets import assets_folder
from scenes import store
from torch import Tensor, nn

IMAGES, EPOCHS, RATE = 4_000, 8, 3e-3
CONV1, CONV2, CONV3 = ("conv1", "norm1"), ("conv2", "norm2"), ("conv3", "norm3")
KEPT = {
    "pooled_clothes": (),
    "frozen_conv1": CONV1,
    "frozen_conv2": (*CONV1, *CONV2),
    "frozen_features": (*CONV1, *CONV2, *CONV3),
}
RECORDS = assets_folder() / "checkpoints" / "frozen.csv"


def fit(model: nn.Module, name: str, seed: int) -> nn.Module:
    """A trained copy; parameters that ask for no gradient stay, the statistics of norms follow the images."""
    split = data.load(name, "train")
    images, labels = split.images[:IMAGES], split.labels[:IMAGES]
    return training.train(model, images, labels, epochs=EPOCHS, lr=RATE, seed=seed).model


def one(name: str, seed: int) -> tuple[dict[str, Tensor], dict]:
    """Train one network; returns its weights in half precision and the row of the record."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    model = models.pooled_cnn(seed=seed).to(memory_format=torch.channels_last)
    if name == "frozen_features":
        model = fit(model, "digits", seed)
        model.logits.load_state_dict(models.pooled_cnn(seed=seed).logits.state_dict())
    for part in KEPT[name]:
        model.get_submodule(part).requires_grad_(False)
    model = fit(model, "clothes", seed)
    weights = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    train, test = (data.load("clothes", split) for split in data.SPLITS)
    row = {
        "network": name,
        "seed": seed,
        "images": IMAGES,
        "epochs": EPOCHS,
        "train_accuracy": round(training.accuracy(model, train.images[:IMAGES], train.labels[:IMAGES]), 4),
        "test_accuracy": round(training.accuracy(model, test.images, test.labels), 4),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }
    return weights, row


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=models.FROZEN)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    jobs = [
        (name, seed)
        for name, seeds in models.FROZEN.items()
        for seed in range(seeds)
        if options.network in (None, name) and options.seed in (None, seed)
    ]
    with ProcessPoolExecutor(options.processes) as pool:
        for weights, row in pool.map(one, *zip(*jobs, strict=True)):
            store(weights, row, RECORDS)
            print(row, flush=True)
