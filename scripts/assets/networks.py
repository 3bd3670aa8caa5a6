"""Train the networks of the book and store them as half-precision safetensors, one file a network and labelling.

    python scripts/assets/networks.py                    all of them (about 40 minutes on two cores)
    python scripts/assets/networks.py cnn_clothes --seed 3 --labels random

True and random pairs see the same images for the same number of steps, without weight decay; `seed` sets the
initial weights, the order of the batches and the permutation of the labels.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from itertools import product

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from saliency_sanity.book import data, models, training
from saliency_sanity.book.assets import assets_folder

IMAGES = 4_000
RECORDS = assets_folder() / "checkpoints" / "records.csv"


def one(name: str, labels: str, seed: int) -> tuple[dict[str, torch.Tensor], dict]:
    """Train one network; returns its weights in half precision and the row of the record."""
    torch.set_num_threads(1)
    spec, start = models.SHIPPED[name], time.perf_counter()
    train, test = data.load(spec.data, "train"), data.load(spec.data, "test")
    images, true = train.images[:IMAGES], train.labels[:IMAGES]
    target = training.permute_labels(true, seed=seed) if labels == "random" else true
    options = {"epochs": spec.epochs, "batch_size": spec.batch_size, "lr": spec.lr}
    trained = training.train(spec.build(seed=seed), images, target, seed=seed, **options)
    weights = {k: v.half() if v.is_floating_point() else v for k, v in trained.model.state_dict().items()}
    trained.model.load_state_dict(weights)
    row = {
        "network": name,
        "labels": labels,
        "seed": seed,
        "images": len(images),
        "epochs": spec.epochs,
        "train_accuracy": round(training.accuracy(trained.model, images, target), 4),
        "test_accuracy": round(training.accuracy(trained.model, test.images, test.labels), 4),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }
    return weights, row


def store(weights: dict[str, torch.Tensor], row: dict) -> None:
    """Add one network to its file and its row to the record, replacing an older one of the same seed."""
    path = assets_folder() / models.checkpoint_name(row["network"], row["labels"])
    path.parent.mkdir(exist_ok=True)
    tensors = load_file(path) if path.exists() else {}
    tensors |= {f"{row['seed']}.{key}": value for key, value in weights.items()}
    save_file(tensors, path)
    keys = ["network", "labels", "seed"]
    old = [pd.read_csv(RECORDS, dtype={"labels": str})] if RECORDS.exists() else []
    records = pd.concat([*old, pd.DataFrame([row])]).drop_duplicates(keys, keep="last")
    records.sort_values(keys).to_csv(RECORDS, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=models.SHIPPED)
    parser.add_argument("--labels", choices=["true", "random"])
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    jobs = [
        (name, labels, seed)
        for name, spec in models.SHIPPED.items()
        for labels, seed in product(["true", "random"], range(spec.seeds))
        if options.network in (None, name) and options.labels in (None, labels) and options.seed in (None, seed)
    ]
    with ProcessPoolExecutor(2) as pool:
        for weights, row in pool.map(one, *zip(*jobs, strict=True)):
            store(weights, row)
            print(row, flush=True)
