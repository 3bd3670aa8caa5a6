"""Train networks on garments of which one in ten has a wrong label, and on the true labels, and store what happened.

    python scripts/assets/mislabelled.py          about five minutes on one core

Replicate k is a whole repetition on a thousand garments of its own. Four networks learn them:

`clean`         true labels, initial weights and order of the batches from seed k
`flipped`       one label in ten wrong, same initial weights, same order
`other_order`   true labels, same initial weights, another order
`other_seed`    true labels, other initial weights, another order

Each is stored twice, `EARLY` epochs after the start and at the end, in half precision. Writes, to assets/files,

`checkpoints/mislabelled_*.safetensors`   the networks, one file a kind and moment
`mislabelled/networks.csv`                what each of them names
`mislabelled/epochs.csv.gz`               the `flipped` trainings, epoch by epoch
`mislabelled/images.csv.gz`               scores of every training image, from the epochs up to either moment
`mislabelled/provenance.csv`              what made them: digest of the code, seeds, date, minutes
"""

import hashlib
import time
from copy import deepcopy
from datetime import date
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import save_file
from saliency_sanity import inference
from saliency_sanity.book import bugs, data, models, training, training_dynamics
from saliency_sanity.book.assets import assets_folder
from torch import Tensor, nn
from torch.nn import functional as F

PACKAGE = Path(__file__).resolve().parents[2] / "helpers"

IMAGES, EPOCHS, EARLY, RATE = 1_000, 40, 5, 2e-3
REPLICATES = max(models.MISLABELLED.values())
MOMENTS = {"_early": EARLY, "": EPOCHS}
OTHER = 1000  # added to a seed where it must be another


def garments(replicate: int) -> tuple[Tensor, Tensor, bugs.Mislabelled]:
    """Training images of a replicate, their true labels, and the labels with one in ten wrong."""
    clothes = data.load("clothes", "train")
    part = slice(IMAGES * replicate, IMAGES * (replicate + 1))
    return clothes.images[part], clothes.labels[part], bugs.mislabel(clothes.labels[part], seed=replicate)


def run(kind: str, replicate: int) -> tuple[dict[str, nn.Module], Tensor]:
    """The network at both moments, and its logits of the training images after each epoch."""
    images, true, wrong = garments(replicate)
    start = models.strided_cnn(seed=replicate + OTHER * (kind == "other_seed"))
    order = replicate + OTHER * kind.startswith("other")
    kept, logits = {}, []

    def watch(epoch: int, network: nn.Module) -> None:
        logits.append(inference.predict(network, images))
        kept.update({moment: deepcopy(network) for moment, last in MOMENTS.items() if epoch + 1 == last})

    labels = wrong.labels if kind == "flipped" else true
    training.train(start, images, labels, epochs=EPOCHS, lr=RATE, seed=order, watch=watch)
    return kept, torch.stack(logits)


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
    _, true, wrong = garments(replicate)
    flipped = true != wrong.labels
    epochs, images = [], []
    for epoch in range(1, len(logits) + 1):
        found, named = scores(logits[:epoch], wrong.labels), logits[epoch - 1].argmax(1)
        row = {"seed": replicate, "epoch": epoch}
        row |= {"flipped_named_as_given": (named == wrong.labels)[flipped].float().mean().item()}
        row |= {"flipped_named_right": (named == true)[flipped].float().mean().item()}
        row |= {"correct_named_right": (named == true)[~flipped].float().mean().item()}
        row |= {
            "flipped_loss": found["loss"][flipped].mean().item(),
            "correct_loss": found["loss"][~flipped].mean().item(),
        }
        for name, values in found.items():
            sign = -1 if name in ("aum", "confidence") else 1
            row[f"ap_{name}"] = training_dynamics.average_precision(sign * values, flipped)
        epochs.append(row)
        if epoch in MOMENTS.values():
            about = {"seed": replicate, "epoch": epoch, "image": range(len(true)), "true": true, "given": wrong.labels}
            images.append(pd.DataFrame(about | found))
    return pd.DataFrame(epochs).round(4), pd.concat(images).round(3)


def main() -> None:
    torch.set_num_threads(1)
    begun, folder = time.process_time(), assets_folder() / "mislabelled"
    folder.mkdir(exist_ok=True)
    test = data.load("clothes", "test")
    stored, networks, frames = {name: {} for name in models.MISLABELLED}, [], []
    for replicate in range(REPLICATES):
        images, true, wrong = garments(replicate)
        for kind in ("clean", "flipped", "other_order", "other_seed"):
            kept, logits = run(kind, replicate)
            for moment, network in kept.items():
                network = network.half().float()
                named = inference.predict(network, images).argmax(1)
                row = {"network": f"mislabelled_{kind}{moment}", "seed": replicate, "epochs": MOMENTS[moment]}
                row |= {"train_true": (named == true).float().mean().item()}
                row |= {"flipped_as_given": (named == wrong.labels)[wrong.flipped].float().mean().item()}
                row |= {"flipped_right": (named == true)[wrong.flipped].float().mean().item()}
                row |= {"test": training.accuracy(network, test.images, test.labels)}
                networks.append(row)
                weights = network.half().state_dict()
                stored[row["network"]] |= {f"{replicate}.{key}": value for key, value in weights.items()}
                print(row, flush=True)
            if kind == "flipped":
                frames.append(course(replicate, logits))
    for name, tensors in stored.items():
        save_file(tensors, assets_folder() / f"checkpoints/{name}.safetensors")
    pd.DataFrame(networks).round(4).sort_values(["network", "seed"]).to_csv(folder / "networks.csv", index=False)
    for name, parts in zip(("epochs", "images"), zip(*frames)):
        packed = {"method": "gzip", "mtime": 0}
        pd.concat(parts).to_csv(folder / f"{name}.csv.gz", index=False, compression=packed)
    code = b"".join(path.read_bytes() for path in (Path(__file__), PACKAGE / "book/training.py"))
    about = {"script": "scripts/assets/mislabelled.py", "code_sha256": hashlib.sha256(code).hexdigest()}
    about |= {"seeds": f"0 to {REPLICATES - 1}", "images": IMAGES, "epochs": EPOCHS, "early": EARLY, "lr": RATE}
    about |= {"torch": torch.__version__, "date": date.today().isoformat()}
    minutes = round((time.process_time() - begun) / 60, 1)
    pd.DataFrame([about | {"minutes of one core": minutes}]).to_csv(folder / "provenance.csv", index=False)


if __name__ == "__main__":
    main()
