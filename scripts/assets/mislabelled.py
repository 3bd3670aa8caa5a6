"""Describe the networks that `train.py` trained with and without wrong labels, and the course of their training.

    python scripts/assets/mislabelled.py          about two minutes on one core, after train.py

Replicate k is a whole repetition on a thousand garments of its own. Four networks learn them:

`clean`         true labels, initial weights and order of the batches from seed k
`flipped`       one label in ten wrong, same initial weights, same order
`other_order`   true labels, same initial weights, another order
`other_seed`    true labels, other initial weights, another order

Each is stored twice, early in its training and at the end. Writes, to assets/files/mislabelled,

`networks.csv`     what each of them predicts
`epochs.csv.gz`    the `flipped` trainings, epoch by epoch
`images.csv.gz`    scores of every training image, from the epochs up to either moment
`provenance.csv`   what made them: digest of the code, seeds, date, minutes
"""

import hashlib
import time
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from saliency_sanity import inference
from saliency_sanity.book import data, models, training, training_dynamics
from saliency_sanity.book.assets import assets_folder
from torch import Tensor
from torch.nn import functional as F
from train import examples, fit

PACKAGE = Path(__file__).resolve().parents[2] / "helpers"
TRAIN = Path(__file__).with_name("train.py")

NETWORKS = [name for name in models.REGISTRY if name.startswith("mislabelled_")]
FLIPPED = models.REGISTRY["mislabelled_flipped"]
EARLY = models.REGISTRY["mislabelled_flipped_early"].after


def garments(replicate: int) -> tuple[Tensor, Tensor, Tensor]:
    """Training images of a replicate, their true labels, and the labels with one in ten wrong."""
    images, true = examples("mislabelled_clean", "train", seed=replicate)
    return images, true, examples("mislabelled_flipped", "train", seed=replicate)[1]


def logits_by_epoch(replicate: int) -> Tensor:
    """What the network that learns wrong labels says of its training images after each epoch, `(epochs, N, 10)`."""
    images, logits = garments(replicate)[0], []
    fit(
        "mislabelled_flipped",
        seed=replicate,
        watch=lambda _, network: logits.append(inference.predict(network, images)),
    )
    return torch.stack(logits)


def scores(logits: Tensor, labels: Tensor) -> dict[str, Tensor]:
    """Scores of the images from the epochs so far; confidence and AUM are small where a label looks wrong."""
    return {
        "loss": F.cross_entropy(logits[-1], labels, reduction="none"),
        "aum": training_dynamics.aum(logits, labels),
        "confidence": logits.softmax(2)[:, range(len(labels)), labels].mean(0),
        "forgetting": training_dynamics.forgetting_events(logits.argmax(2) == labels),
    }


def course(replicate: int, logits: Tensor) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The frames `epochs` and `images` of one training with wrong labels."""
    _, true, given = garments(replicate)
    flipped = true != given
    epochs, images = [], []
    for epoch in range(1, len(logits) + 1):
        found, predicted = scores(logits[:epoch], given), logits[epoch - 1].argmax(1)
        row = {"seed": replicate, "epoch": epoch}
        row |= {"flipped_named_as_given": (predicted == given)[flipped].float().mean().item()}
        row |= {"flipped_named_right": (predicted == true)[flipped].float().mean().item()}
        row |= {"correct_named_right": (predicted == true)[~flipped].float().mean().item()}
        row |= {
            "flipped_loss": found["loss"][flipped].mean().item(),
            "correct_loss": found["loss"][~flipped].mean().item(),
        }
        for name, values in found.items():
            sign = -1 if name in ("aum", "confidence") else 1
            row[f"ap_{name}"] = training_dynamics.average_precision(sign * values, flipped)
        epochs.append(row)
        if epoch in (EARLY, FLIPPED.epochs):
            about = {"seed": replicate, "epoch": epoch, "image": range(len(true)), "true": true, "given": given}
            images.append(pd.DataFrame(about | found))
    return pd.DataFrame(epochs).round(4), pd.concat(images).round(3)


def main() -> None:
    torch.set_num_threads(1)
    begun, folder = time.process_time(), assets_folder() / "mislabelled"
    folder.mkdir(exist_ok=True)
    test = data.load("clothes", "test")
    networks, frames = [], []
    for replicate in range(FLIPPED.seeds):
        images, true, given = garments(replicate)
        flipped = true != given
        for name in NETWORKS:
            network, recipe = models.load(name, seed=replicate), models.REGISTRY[name]
            predicted = inference.predict(network, images).argmax(1)
            row = {"network": name, "seed": replicate, "epochs": recipe.after or recipe.epochs}
            row |= {"train_true": (predicted == true).float().mean().item()}
            row |= {"flipped_as_given": (predicted == given)[flipped].float().mean().item()}
            row |= {"flipped_right": (predicted == true)[flipped].float().mean().item()}
            row |= {"test": training.accuracy(network, test.images, test.labels)}
            networks.append(row)
        frames.append(course(replicate, logits_by_epoch(replicate)))
    pd.DataFrame(networks).round(4).sort_values(["network", "seed"]).to_csv(folder / "networks.csv", index=False)
    for name, parts in zip(("epochs", "images"), zip(*frames)):
        packed = {"method": "gzip", "mtime": 0}
        pd.concat(parts).to_csv(folder / f"{name}.csv.gz", index=False, compression=packed)
    code = b"".join(
        path.read_bytes() for path in (Path(__file__), TRAIN, PACKAGE / "book/models.py", PACKAGE / "book/training.py")
    )
    about = {"script": "scripts/assets/mislabelled.py", "code_sha256": hashlib.sha256(code).hexdigest()}
    about |= {"seeds": f"0 to {FLIPPED.seeds - 1}", "images": FLIPPED.images, "epochs": FLIPPED.epochs}
    about |= {"early": EARLY, "lr": FLIPPED.lr}
    about |= {"torch": torch.__version__, "date": date.today().isoformat()}
    minutes = round((time.process_time() - begun) / 60, 1)
    pd.DataFrame([about | {"minutes of one core": minutes}]).to_csv(folder / "provenance.csv", index=False)


if __name__ == "__main__":
    main()
