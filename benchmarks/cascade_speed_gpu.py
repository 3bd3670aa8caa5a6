"""How long a cascade takes on a GPU, against plain passes and metric kernels alone.

    python benchmarks/cascade_speed_gpu.py [--rounds 5] [--cases squeezenet resnet18 resnet50] [--images 32 256]

Everything is measured in one run on one card, in rounds that take each way in turn; a ratio is formed within a round.
The floor of a cascade is one plain forward and backward pass to the input for each stage and for the trained model,
and where metrics are taken the same metrics of ready maps. Drawing the weights of a cascade on the CPU, which the
cascade does while the card works, is timed apart. The table is printed and written to book/speed_gpu.csv. Where there
is no CUDA device one line says so, and nothing is written.
"""

import argparse
import csv
import os
import statistics
import sys
import time
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import torch
import torchvision
from saliency_sanity import randomization, saliency, sanity, similarity
from saliency_sanity.saliency.passes import at_most, chunks
from torch import Tensor, nn

ROOT = Path(__file__).parent.parent
METRICS = ["spearman_abs", "ssim", "hog"]
CASES = {"squeezenet": "squeezenet1_1", "resnet18": "resnet18", "resnet50": "resnet50"}
SAMPLES = 50
SAMPLED = {
    "Integrated Gradients": partial(saliency.integrated_gradients, steps=SAMPLES),
    "SmoothGrad": partial(saliency.smoothgrad, samples=SAMPLES),
    "VarGrad": partial(saliency.vargrad, samples=SAMPLES),
}
HEADER = ["Network", "Images", "Ratio of times", "Median", "Range", "Seconds (ours)"]


def made(case: str, count: int) -> tuple[nn.Module, Tensor, Tensor]:
    """A network with random weights, and noise for images: the time does not depend on what they show."""
    torch.manual_seed(0)
    model = torchvision.models.get_model(CASES[case], weights=None).eval().cuda()
    images = torch.randn(count, 3, 224, 224, device="cuda")
    with torch.no_grad():
        targets = torch.cat([model(part).argmax(1) for part in images.split(64)])
    return model, images, targets


def plain_passes(model: nn.Module, images: Tensor, targets: Tensor, passes: int) -> None:
    """Forward and backward passes to the input, of as many images as the cascade takes in one, and nothing else."""
    with at_most(None):
        parts = list(chunks(len(images), images))
    for _ in range(passes):
        for part in parts:
            leaf = images[part].clone().requires_grad_()
            torch.autograd.grad(model(leaf).gather(1, targets[part, None]).sum(), leaf)


def kernels(maps: list[Tensor]) -> None:
    """The metrics of ready maps with the first of them, each side of which is described once."""
    fixed = [similarity.against(similarity.METRICS[metric], maps[0]) for metric in METRICS]
    for others in maps:
        for compare in fixed:
            compare(others)


def cascade(model: nn.Module, images: Tensor, targets: Tensor, metrics: list) -> None:
    sanity.parameter_randomization(
        model,
        images,
        targets,
        methods=["gradient"],
        metrics=metrics,
        seeds=[0],
        lines=False,
        show_progress=False,
    )


def nothing(a: Tensor, b: Tensor) -> Tensor:
    """A metric that costs nothing: what is left of a cascade is its maps."""
    return b[:, 0, 0]


def draws(model: nn.Module) -> None:
    """The weights of one cascade, on one core."""
    for _ in randomization.Redraws(model, scheme="cascading", seed=0).copies():
        pass


def seconds(work: Callable[[], object]) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - start


def ratios(taken: list[dict[str, float]], ours: str, *floor: str) -> tuple[str, str, str]:
    """Median and range of ours over the sum of the floor's parts, and the median of ours in seconds."""
    found = [once[ours] / sum(once[part] for part in floor) for once in taken]
    spread = f"{min(found):.2f} to {max(found):.2f}"
    return f"{statistics.median(found):.2f}", spread, f"{statistics.median(once[ours] for once in taken):.3f}"


def measure(case: str, count: int, rounds: int) -> list[list]:
    """Rows of the table for a network and a number of images."""
    model, images, targets = made(case, count)
    stages = len(randomization.plan(model, example=images[:1]).stages) + 1
    maps = list(torch.randn(stages, count, 224, 224, device="cuda"))
    work: dict[str, Callable[[], object]] = {
        "passes": lambda: plain_passes(model, images, targets, stages),
        "kernels": lambda: kernels(maps),
        "maps": lambda: cascade(model, images, targets, [nothing]),
        "all": lambda: cascade(model, images, targets, METRICS),
    }
    if count == 32:
        work["one pass"] = lambda: plain_passes(model, images, targets, 1)
        work |= {name: partial(method, model, images, targets) for name, method in SAMPLED.items()}
    on_cpu = deepcopy(model).cpu()
    work["draws"] = lambda: draws(on_cpu)
    for run in work.values():  # the first passes set up the card
        run()
    taken = [{name: seconds(run) for name, run in work.items()} for _ in range(rounds)]
    rows = [
        ["maps of a cascade / plain passes", *ratios(taken, "maps", "passes")],
        ["maps and metrics / (passes + metric kernels)", *ratios(taken, "all", "passes", "kernels")],
        ["weights of the cascade, drawn on one core / plain passes", *ratios(taken, "draws", "passes")],
    ]
    if count == 32:
        rows += [[f"{name}, {SAMPLES} samples / one plain pass", *ratios(taken, name, "one pass")] for name in SAMPLED]
    peak = torch.cuda.max_memory_allocated() / 2**30
    print(f"{case}, {count} images: at most {peak:.1f} GB of the card", file=sys.stderr)
    torch.cuda.reset_peak_memory_stats()
    return [[case, count, *row] for row in rows]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--images", nargs="+", type=int, default=[32, 256])
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("There is no CUDA device: nothing is timed on one.")
        sys.exit()
    table = [row for case in options.cases for count in options.images for row in measure(case, count, options.rounds)]
    machine = f"{torch.cuda.get_device_name()}, {os.cpu_count()} cores, torch {torch.__version__}"
    table.append([machine, "", f"{options.rounds} rounds in one run", "", "", ""])
    for line in [HEADER, *table]:
        print("  ".join(f"{cell!s:<{width}}" for cell, width in zip(line, (12, 8, 58, 8, 16, 8))))
    with open(ROOT / "book" / "speed_gpu.csv", "w", newline="", encoding="utf-8") as file:
        csv.writer(file, lineterminator="\n").writerows([HEADER, *table])
