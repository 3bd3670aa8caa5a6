"""Compute the frames behind the chapter "verdict": every method, test and measure, and the specification curve.

    OMP_NUM_THREADS=1 python scripts/assets/verdict.py          about ten minutes on one core

Replicate k is a whole repetition: trained network k, its maps re-initialised from seed 1000 + k, its twin (trained
network k + 1) and the network that learned random labels from the twin's initial weights. Writes, to
assets/files/verdict,

`table.csv.gz`           a row for each network, replicate, test, method and metric; one column for each image
`specifications.csv.gz`  a row for each specification and replicate: mean similarity, floor and ceiling over the images
`provenance.csv`         what made them: digest of the code, seeds, images, date, minutes
"""

import hashlib
import time
from datetime import date
from functools import partial
from itertools import product
from pathlib import Path

import pandas as pd
import torch
from saliency_sanity import inference, randomization, saliency, sanity, similarity
from saliency_sanity.book import data, models
from saliency_sanity.book.assets import assets_folder
from saliency_sanity.device import generator
from torch import Tensor
from torch.nn import functional as F

PACKAGE = Path(__file__).resolve().parents[2] / "helpers"

IMAGES = 32
IMAGE_SEED = 2018
WEIGHT_SEED = 1000
NETWORKS = ("cnn_clothes", "cnn_digits", "mlp_digits")
METRICS = ("spearman", "spearman_abs", "ssim", "hog")
METHODS = {
    **{name: saliency.METHODS[name] for name in ("gradient", "input_x_gradient", "guided_backprop", "deconvnet")},
    **{name: saliency.METHODS[name] for name in ("gradcam", "guided_gradcam", "deeplift")},
    **{name: saliency.METHODS[name] for name in ("lrp_epsilon", "lrp_alpha_beta", "occlusion")},
    "integrated_gradients": partial(saliency.integrated_gradients, steps=12),
    "smoothgrad": partial(saliency.smoothgrad, samples=16),
    "vargrad": partial(saliency.vargrad, samples=16),
    "smoothgrad_integrated_gradients": partial(saliency.smoothgrad_integrated_gradients, samples=4, steps=4),
    **{name: saliency.METHODS[name] for name in ("input", "sobel", "noise")},
}
CONVOLUTIONAL = {"gradcam", "guided_gradcam"}
CASCADE = {1: "top", 2: "top two", 3: "top three", 4: "whole"}
SCHEMES = {"random_labels_crossed": "labels", "random_labels": "labels, same start", "second_seed": "twin"}
LINES = {"other_image": "other image", "retest": "retest"}

INITS = {
    "own initialiser": {"init": "reset"},
    "normal .01": {"init": "truncated_normal", "std": 0.01},
    "normal, trained scale": {"init": "truncated_normal", "std": "trained"},
    "shuffled weights": {"init": "permute"},
}
SPECIFIED = [name for name in METHODS if name not in {"lrp_alpha_beta", "occlusion", "vargrad", "input", "sobel"}]


def chosen_images(name: str, networks: list) -> tuple[Tensor, Tensor]:
    """Test images that all networks of a kind classify correctly, so that one class is explained in all of them."""
    test = data.load(models.REGISTRY[name].data, "test")
    right = torch.stack([inference.predict(network, test.images).argmax(1) == test.labels for network in networks])
    known = right.all(0).nonzero()[:, 0]
    chosen = known[torch.randperm(len(known), generator=generator(IMAGE_SEED))[:IMAGES]]
    return test.images[chosen], test.labels[chosen]


def table_of(name: str) -> pd.DataFrame:
    """All tests of one network, wide: one column an image."""
    count = models.REGISTRY[name].seeds
    true, random = ([models.load(name, seed=k, labels=labels) for k in range(count)] for labels in models.LABELS)
    images, labels = chosen_images(name, true)
    methods = {key: method for key, method in METHODS.items() if "cnn" in name or key not in CONVOLUTIONAL}
    options = {"methods": methods, "metrics": METRICS, "show_progress": False}
    by_labels = sanity.data_randomization(true, random, images, labels, lines=False, **options)
    frames = [by_labels.replace({"scheme": SCHEMES})]
    for k, network in enumerate(true):
        for scheme in ("cascading", "independent"):
            frame = sanity.parameter_randomization(
                network, images, labels, scheme=scheme, seeds=[WEIGHT_SEED + k], lines=scheme == "cascading", **options
            )
            if scheme == "cascading":
                tests = frame.stage.map(CASCADE).fillna(frame.scheme.map(LINES))
            else:
                tests = ("only " + frame.layer).where(frame.stage > 1)
            frames.append(frame.assign(scheme=tests, seed=k).dropna(subset="scheme"))
    long = pd.concat(frames).rename(columns={"seed": "replicate", "scheme": "test"})
    keys = ["test", "method", "metric", "replicate"]
    wide = long.pivot(index=keys, columns="image", values="similarity").round(3).reset_index()
    wide.insert(0, "network", name)
    return wide


def common_scale_ssim(a: Tensor, b: Tensor) -> Tensor:
    """SSIM (window 5, range 2) of two maps that are both divided by the largest |pixel| of the first."""
    largest = a.abs().amax((1, 2), keepdim=True).clamp_min(torch.finfo(a.dtype).tiny)
    x, y = (a / largest)[:, None].double(), (b / largest)[:, None].double()
    mean_x, mean_y, unbiased = F.avg_pool2d(x, 5, 1), F.avg_pool2d(y, 5, 1), 25 / 24
    var_x = unbiased * (F.avg_pool2d(x * x, 5, 1) - mean_x**2)
    var_y = unbiased * (F.avg_pool2d(y * y, 5, 1) - mean_y**2)
    both = unbiased * (F.avg_pool2d(x * y, 5, 1) - mean_x * mean_y)
    c1, c2 = 0.02**2, 0.06**2
    above, below = (2 * mean_x * mean_y + c1) * (2 * both + c2), (mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2)
    return (above / below).flatten(1).mean(1).float()


def clipped(maps: Tensor) -> Tensor:
    """Maps with |pixels| above their 99 % quantile set to it, as they are often shown."""
    limit = maps.abs().flatten(1).quantile(0.99, dim=1)[:, None, None]
    return maps.clamp(-limit, limit)


def lifted(maps: Tensor) -> Tensor:
    """Maps moved up so that their smallest pixel is zero."""
    return maps - maps.amin((1, 2), keepdim=True)


MEASURES = {
    ("ranks", "-"): similarity.spearman,
    ("ssim", "largest"): similarity.ssim,
    ("ssim", "min-max"): lambda a, b: similarity.ssim_abs(lifted(a), lifted(b)),
    ("ssim", "clipped"): lambda a, b: similarity.ssim(clipped(a), clipped(b)),
    ("ssim", "none"): common_scale_ssim,
    ("hog", "largest"): similarity.hog,
    ("hog", "clipped"): lambda a, b: similarity.hog(clipped(a), clipped(b)),
}
SIGNS = {"signed": lambda maps: maps, "absolute": torch.abs}


def measured(reference: Tensor, maps: Tensor, **about) -> list[dict]:
    """One row a sign and measure: the mean over images, and how many were undefined."""
    rows = []
    for (sign, view), ((measure, normalisation), metric) in product(SIGNS.items(), MEASURES.items()):
        values = metric(view(reference), view(maps))
        where = {"sign": sign, "measure": measure, "normalisation": normalisation}
        scores = {"similarity": round(values.nanmean().item(), 4), "undefined": int(values.isnan().sum())}
        rows.append({**about, **where, **scores})
    return rows


def specifications(name: str) -> pd.DataFrame:
    """Top and whole randomisation under every specification, with floor and ceiling of each."""
    networks = [models.load(name, seed=k) for k in range(models.REGISTRY[name].seeds)]
    images, labels = chosen_images(name, networks)
    rows = []
    for k, network in enumerate(networks):
        twin = networks[(k + 1) % len(networks)]
        copies = {}
        for init, options in INITS.items():
            found = [copy for _, copy in randomization.cascading(network, seed=WEIGHT_SEED + k, **options)]
            copies |= {("top", init): found[0], ("whole", init): found[-1]}
        for method in SPECIFIED:
            explain = partial(sanity.heat_of, METHODS[method])
            own = explain(network, images, labels, 0)
            about = {"method": method, "replicate": k}
            rows += measured(own, own.roll(1 + k, 0), test="floor", **about)
            rows += measured(own, explain(twin, images, labels, 1), test="ceiling", **about)
            for (test, init), copy in copies.items():
                for explained in ("fixed", "argmax"):
                    classes = labels if explained == "fixed" else inference.predict(copy, images).argmax(1)
                    maps = explain(copy, images, classes, 2)
                    rows += measured(own, maps, test=test, init=init, explained=explained, **about)
    return pd.DataFrame(rows)


if __name__ == "__main__":
    start, folder = time.perf_counter(), assets_folder() / "verdict"
    folder.mkdir(exist_ok=True)
    table = pd.concat([table_of(name) for name in NETWORKS])
    table.to_csv(folder / "table.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    minutes = [(time.perf_counter() - start) / 60]
    frame = specifications("cnn_clothes")
    frame.to_csv(folder / "specifications.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
    minutes.append((time.perf_counter() - start) / 60 - minutes[0])
    code = b"".join(path.read_bytes() for path in [Path(__file__), *sorted(PACKAGE.rglob("*.py"))])
    about = {"script": "scripts/assets/verdict.py", "code_sha256": hashlib.sha256(code).hexdigest()}
    about |= {"images": IMAGES, "image_seed": IMAGE_SEED, "weight_seeds": f"{WEIGHT_SEED} + replicate"}
    about |= {"torch": torch.__version__, "date": date.today().isoformat()}
    files = [{"file": file, **about, "minutes": round(m, 1)} for file, m in zip(("table", "specifications"), minutes)]
    pd.DataFrame(files).to_csv(folder / "provenance.csv", index=False)
