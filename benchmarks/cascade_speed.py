"""How long a cascade takes: ours, what one would write by hand, and Quantus, against the floor of plain passes.

    python benchmarks/cascade_speed.py [--rounds 5] [--cases clothes_cnn squeezenet resnet18] [--without-quantus]

Everything is measured in one run, in rounds that take each way in turn; a ratio is formed within a round. The table
is printed and written to book/speed.csv, which the book's appendix shows. Quantus is installed into _build/quantus,
out of the way of the environment.
"""

import argparse
import csv
import importlib
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import captum.attr
import numpy as np
import torch
import torchvision
from saliency_sanity import randomization, sanity
from saliency_sanity.book import data, models, photographs
from scipy import stats
from skimage.feature import hog
from skimage.metrics import structural_similarity
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
QUANTUS = ROOT / "_build" / "quantus"
METHODS = ["gradient", "guided_backprop"]
METRICS = ["spearman_abs", "ssim", "hog"]


def clothes_cnn() -> tuple[nn.Module, Tensor]:
    return models.load("cnn_clothes"), data.load("clothes").images[:100]


def squeezenet() -> tuple[nn.Module, Tensor]:
    images = photographs.composites("grass", size=227).images[:16]
    return models.load("squeezenet_imagenet"), photographs.normalize(images)


def resnet18() -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    images = photographs.composites("grass", size=224).images[:16]
    return torchvision.models.resnet18(weights=None).eval(), photographs.normalize(images)


CASES = {case.__name__: case for case in (clothes_cnn, squeezenet, resnet18)}


def floor(model: nn.Module, images: Tensor, targets: Tensor, passes: int) -> None:
    """Plain forward and backward passes to the input, nothing else."""
    for _ in range(passes):
        leaf = images.clone().requires_grad_()
        torch.autograd.grad(model(leaf).gather(1, targets[:, None]).sum(), leaf)


def by_hand(model: nn.Module, images: Tensor, targets: Tensor, methods: list, metrics: list) -> None:
    """The cascade as one would write it with captum, scipy and scikit-image, image by image."""
    side = min(images.shape[2:])
    cell = 16 if side >= 112 else side // 7
    layers = {
        "gradient": lambda m: captum.attr.Saliency(m).attribute(images, targets, abs=False),
        "guided_backprop": lambda m: captum.attr.GuidedBackprop(m).attribute(images, targets),
    }

    def features(heat: np.ndarray) -> np.ndarray:
        return hog(heat / abs(heat).max(), pixels_per_cell=(cell, cell), cells_per_block=(3, 3))

    compare = {
        "spearman_abs": lambda a, b: stats.spearmanr(abs(a).ravel(), abs(b).ravel()).statistic,
        "ssim": lambda a, b: structural_similarity(a / abs(a).max(), b / abs(b).max(), win_size=5, data_range=2),
        "hog": lambda a, b: stats.pearsonr(features(a), features(b)).statistic,
    }
    versions = [model, *(copy for _, copy in randomization.cascading(model, seed=0))]
    for method in methods:
        trained, *others = (layers[method](m).detach().sum(1).numpy() for m in versions)
        for maps in others:
            for metric in metrics:
                [compare[metric](a, b) for a, b in zip(trained, maps)]


def ours(model: nn.Module, images: Tensor, targets: Tensor, methods: list, metrics: list, stages=None) -> None:
    sanity.parameter_randomization(
        model,
        images,
        targets,
        methods=methods,
        metrics=metrics,
        seeds=[0],
        stages=stages,
        lines=False,
        show_progress=False,
    )


def layers_of(model: nn.Module) -> list[str]:
    """Every module that Quantus randomises, from the output to the input."""
    return [name for name, module in model.named_modules() if hasattr(module, "reset_parameters")][::-1]


def quantus(model: nn.Module, images: Tensor, targets: Tensor) -> None:
    """Quantus' MPRT, once for each measure; its structural similarity is handed the maps in two dimensions."""
    import quantus

    height, width = images.shape[2:]

    def explain(model, inputs, targets, **_):
        inputs, targets = torch.as_tensor(inputs).float(), torch.as_tensor(targets)
        return captum.attr.Saliency(model).attribute(inputs, targets, abs=False).sum(1, keepdim=True).numpy()

    def flat_ssim(a, b, **_):
        pairs = zip(*(m.reshape(-1, height, width) for m in (a, b)))
        return np.array([structural_similarity(x, y, win_size=5, data_range=2) for x, y in pairs])

    for similarity in (quantus.similarity_func.correlation_spearman, flat_ssim):
        quantus.MPRT(similarity_func=similarity, layer_order="top_down", disable_warnings=True)(
            model=model,
            x_batch=images.numpy(),
            y_batch=targets.numpy(),
            explain_func=explain,
            batch_size=len(images),
        )


def seconds(work: Callable[[], None]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(case: str, rounds: int, with_quantus: bool) -> list[list]:
    """Rows of the table for one case: what is compared, the median ratio, its range, seconds of ours."""
    model, images = CASES[case]()
    targets = model(images).argmax(1)
    passes = len(METHODS) * (len(randomization.plan(model, example=images[:1]).stages) + 1)
    work = {
        "floor": lambda: floor(model, images, targets, passes),
        "ours": lambda: ours(model, images, targets, METHODS, METRICS),
        "captum, scipy, scikit-image": lambda: by_hand(model, images, targets, METHODS, METRICS),
    }
    pairs = [("ours", "floor"), ("captum, scipy, scikit-image", "ours")]
    if with_quantus:
        both, layers = ["spearman_abs", "ssim"], layers_of(model)
        work["ours, single layers"] = lambda: ours(model, images, targets, ["gradient"], both, layers)
        work["Quantus, single layers"] = lambda: quantus(model, images, targets)
        pairs.append(("Quantus, single layers", "ours, single layers"))
    for name in ("floor", "ours"):  # the first passes set up torch; the others do not gain by a rehearsal
        work[name]()
    taken = [{name: seconds(run) for name, run in work.items()} for _ in range(rounds)]
    rows = []
    for above, below in pairs:
        ratios = [round[above] / round[below] for round in taken]
        median = statistics.median(round[below if "ours" in below else above] for round in taken)
        spread = f"{min(ratios):.2f} to {max(ratios):.2f}"
        rows.append([case, f"{above} / {below}", f"{statistics.median(ratios):.2f}", spread, f"{median:.2f}"])
    return rows


def install_quantus() -> None:
    needed = "quantus==0.6.0 opencv-python-headless scikit-learn joblib threadpoolctl narwhals cloudpickle".split()
    if not QUANTUS.exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(QUANTUS)]
        subprocess.run([*command, *needed], check=True)
    sys.path.append(str(QUANTUS))
    importlib.import_module("quantus")  # not in the time that is measured


def show(rows: list[list]) -> None:
    for row in rows:
        print("  ".join(f"{cell:<44}" if place == 1 else f"{cell:<14}" for place, cell in enumerate(row)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--without-quantus", action="store_true")
    options = parser.parse_args()
    if not options.without_quantus:
        install_quantus()
    machine = f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"
    table = [["Case", "Ratio of times", "Median", "Range", "Seconds (ours)"]]
    show(table)
    for case in options.cases:
        rows = measure(case, options.rounds, not options.without_quantus)
        show(rows)
        table += rows
    table.append([machine, f"{options.rounds} rounds in one run", "", "", ""])
    with open(ROOT / "book" / "speed.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows(table)
