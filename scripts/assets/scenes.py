"""Train networks on garments on backgrounds, without a bug and with one of two, and store them in half precision.

    python scripts/assets/scenes.py                                 all of them (about 15 minutes on two cores)
    python scripts/assets/scenes.py scenes_background --seed 3

All see the same garments for the same number of steps. `seed` sets the initial weights, the order of the batches,
the places of the garments, and which backgrounds they get where that is left to chance.
"""

import argparse
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from saliency_sanity.book import bugs, data, models, training
from saliency_sanity.book.assets import assets_folder
from torch import Tensor

IMAGES, EPOCHS, RATE = 4_000, 8, 3e-3
RECORDS = assets_folder() / "checkpoints" / "scenes.csv"


def scenes(name: str, split: str, seed: int) -> tuple[bugs.Scenes, Tensor]:
    """Images of a split with the network's bug planted in them, and their labels."""
    garments = data.load("clothes", split)
    objects, labels = garments.images[:IMAGES], garments.labels[:IMAGES]
    which = labels if name == "scenes_background" else training.permute_labels(labels, seed=seed)
    made = bugs.place(objects, bugs.silhouettes(objects), which, bugs.sheets(), seed=seed)
    if name == "scenes_blur":
        made = made._replace(images=bugs.blur_class(made.images, labels))
    return made, labels


def one(name: str, seed: int) -> tuple[dict[str, Tensor], dict]:
    """Train one network; returns its weights in half precision and the row of the record."""
    torch.set_num_threads(1)
    start = time.perf_counter()
    (train, labels), (test, wanted) = scenes(name, "train", seed), scenes(name, "test", 1000 + seed)
    start_model = models.pooled_cnn(seed=seed).to(memory_format=torch.channels_last)
    model = training.train(start_model, train.images, labels, epochs=EPOCHS, lr=RATE, seed=seed).model
    weights = {
        key: (value.half() if value.is_floating_point() else value).contiguous()
        for key, value in model.state_dict().items()
    }
    model.load_state_dict(weights)
    row = {
        "network": name,
        "seed": seed,
        "images": len(labels),
        "epochs": EPOCHS,
        "train_accuracy": round(training.accuracy(model, train.images, labels), 4),
        "test_accuracy": round(training.accuracy(model, test.images, wanted), 4),
        "minutes": round((time.perf_counter() - start) / 60, 2),
    }
    return weights, row


def store(weights: dict[str, Tensor], row: dict, record: Path) -> None:
    """Add one network to its file and its row to the record, replacing an older one of the same seed."""
    path = assets_folder() / models.checkpoint_name(row["network"], "true")
    tensors = load_file(path) if path.exists() else {}
    save_file(tensors | {f"{row['seed']}.{key}": value for key, value in weights.items()}, path)
    old = [pd.read_csv(record)] if record.exists() else []
    rows = pd.concat([*old, pd.DataFrame([row])]).drop_duplicates(["network", "seed"], keep="last")
    rows.sort_values(["network", "seed"]).to_csv(record, index=False)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("network", nargs="?", choices=models.SCENES)
    parser.add_argument("--seed", type=int)
    options = parser.parse_args()
    jobs = [
        (name, seed)
        for seed in range(max(models.SCENES.values()))
        for name in models.SCENES
        if seed < models.SCENES[name] and options.network in (None, name) and options.seed in (None, seed)
    ]
    with ProcessPoolExecutor(2) as pool:
        for weights, row in pool.map(one, *zip(*jobs, strict=True)):
            store(weights, row, RECORDS)
            print(row, flush=True)
