"""Does the package work on my network? Every method on about sixty architectures, each cell against its own reference.

    python scripts/zoo.py                        all of them, on all cores, into _build/zoo.csv
    python scripts/zoo.py ResNet-18 "Swin v2"    some of them, in the place of their old rows

A cell is `right` (the map agrees with a reference that shares no code with the package), `refused` (an error of the
package's own that says why), `wrong` (a map that is not the method's), or `unclear` (any other error).
It needs timm and transformers, which the book does not: pip install timm transformers.
"""

import csv
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import zoo_references as references
from saliency_sanity import randomization, saliency
from saliency_sanity.sanity import parameter_randomization
from torch import Tensor, nn
from zoo_networks import NETWORKS, example, network

ROOT = Path(__file__).parent.parent
FILE = ROOT / "_build/zoo.csv"
PACKAGE = Path(saliency.__file__).resolve().parents[1]
RIGHT, REFUSED, WRONG, UNCLEAR = "right", "refused", "wrong", "unclear"
EXACT = 1e-6  # of the largest value, in float64: what rounding and a short secant may cost
ALMOST = {"lrp_composite": 1e-2}  # denominators are moved from 0 before or after a batch norm is merged


class Cell(NamedTuple):
    """What came of a check: the outcome, the largest relative deviation where there is one, and a sentence."""

    outcome: str
    deviation: float | None
    says: str


class Subject(NamedTuple):
    """What is explained: a network, images and classes."""

    name: str
    model: nn.Module
    images: Tensor
    targets: Tensor


# ---------------------------------------------------------------- the methods, and what each is held against

Judge = Callable[[Subject, Tensor], tuple[float, str]]


def _same(reference: Callable[..., Tensor]) -> Judge:
    def judge(subject: Subject, maps: Tensor) -> tuple[float, str]:
        return references.deviation(maps, reference(subject.model, subject.images, subject.targets)), ""

    return judge


def _noisy(subject: Subject, maps: Tensor) -> tuple[float, str]:
    with references.inputs(subject.model) as seen:
        saliency.smoothgrad(subject.model, subject.images, subject.targets, samples=2)
    return references.smoothgrad(subject.model, subject.images, subject.targets, maps, seen, samples=2)


def _guided(subject: Subject, maps: Tensor) -> tuple[float, str]:
    if not NETWORKS[subject.name].rectified:
        return 1.0, "a map, although the network has activations that are no ReLU"
    expected = references.guided_backprop(subject.model, subject.images, subject.targets)
    return references.deviation(maps, expected), ""


def _rescaled(subject: Subject, maps: Tensor) -> tuple[float, str]:
    return references.deeplift(subject.model, subject.images, subject.targets, maps), ""


METHODS: dict[str, tuple[Callable[..., Tensor], Judge]] = {
    "gradient": (saliency.gradient, _same(references.gradient)),
    "integrated_gradients": (
        partial(saliency.integrated_gradients, steps=3),
        _same(partial(references.integrated_gradients, steps=3)),
    ),
    "smoothgrad": (partial(saliency.smoothgrad, samples=2), _noisy),
    "guided_backprop": (saliency.guided_backprop, _guided),
    "gradcam": (
        saliency.gradcam,
        lambda subject, maps: references.gradcam(subject.model, subject.images, subject.targets, maps),
    ),
    "deeplift": (saliency.deeplift, _rescaled),
    "lrp_composite": (saliency.lrp_composite, _same(references.lrp)),
    "occlusion": (
        partial(saliency.occlusion, window=24, stride=20),
        _same(partial(references.occlusion, window=24, stride=20)),
    ),
}


# ---------------------------------------------------------------- refusals


def first_sentence(text: str) -> str:
    return " ".join(text.split()).partition(": ")[0].partition(". ")[0].rstrip(".;:")


def refusal(error: Exception) -> Cell:
    """A clear refusal is a ValueError that the package itself raises; what comes from below it explains nothing."""
    place = error.__traceback__
    while place is not None and place.tb_next is not None:
        place = place.tb_next
    ours = place is not None and Path(place.tb_frame.f_code.co_filename).resolve().is_relative_to(PACKAGE)
    if isinstance(error, ValueError) and ours:
        return Cell(REFUSED, None, first_sentence(str(error)))
    return Cell(UNCLEAR, None, f"{type(error).__name__}: {first_sentence(str(error))}"[:200])


@contextmanager
def quiet() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def explained(subject: Subject, method: str) -> Cell:
    """One method on one network."""
    call, judge = METHODS[method]
    try:
        with quiet():
            maps = call(subject.model, subject.images, subject.targets)
    except Exception as error:
        return refusal(error)
    if not torch.isfinite(maps).all():
        return Cell(WRONG, None, "the map has NaN or infinite values")
    found, why = judge(subject, maps)
    return Cell(RIGHT if found <= ALMOST.get(method, EXACT) else WRONG, found, why)


# ---------------------------------------------------------------- randomisation


def stages(subject: Subject) -> Cell:
    """How many stages the default plan has."""
    try:
        found = randomization.plan(subject.model, example=subject.images[:1]).stages
    except Exception as error:
        return refusal(error)
    return Cell(RIGHT, None, str(len(found)))


def cascade(subject: Subject) -> Cell:
    """Whether all that runs is new after a full cascade, by two proofs that read no plan.

    No tensor that decides the logits is as trained; and of two networks that differ only in the order of their
    trained weights, the same seed makes the same network.
    """
    twin = references.shuffle(network(subject.name))
    references.outputs(twin, subject.images)  # as of the subject, which may keep something of it
    try:
        with quiet():
            new, other = (
                list(randomization.cascading(model, seed=0, example=subject.images[:1]))[-1][1].eval()
                for model in (subject.model, twin)
            )
    except Exception as error:
        return refusal(error)
    if kept := references.as_trained(subject.model, new, subject.images):
        return Cell(WRONG, None, f"runs as trained: {', '.join(kept)}")
    with torch.no_grad():
        found = references.deviation(*(references.outputs(model, subject.images) for model in (new, other)))
    return Cell(RIGHT, None, "") if found < 1e-2 else Cell(WRONG, found, "the trained weights still show")


def randomised(subject: Subject) -> Cell:
    """Whether the check of Gradient runs to the end, and the stages at which its similarity is undefined.

    Undefined is no fault, as where all units of a random network are silent; not to say so is one.
    """
    try:
        with quiet():
            frame = parameter_randomization(
                subject.model,
                subject.images,
                subject.targets,
                methods=["gradient"],
                metrics=["spearman"],
                seeds=[0],
                show_progress=False,
            )
    except Exception as error:
        return refusal(error)
    refused = frame[frame.role == "refused"]
    if len(refused):
        return Cell(REFUSED, None, first_sentence(refused.note.iloc[0]))
    curve = frame[frame.role == "curve"]
    by_stage = curve.groupby(["stage", "layer"], sort=False)
    undefined = [layer for (_, layer), rows in by_stage if rows.similarity.isna().all()]
    silent = [layer for (_, layer), rows in by_stage if rows.similarity.isna().all() and not rows.note.any()]
    says = f"{len(by_stage) - 1} stages" + (f", undefined at {', '.join(undefined)}" if undefined else "")
    return Cell(WRONG if silent or undefined[:1] == [""] else RIGHT, None, says)


RANDOMISATION: dict[str, Callable[[Subject], Cell]] = {"stages": stages, "cascade": cascade, "run": randomised}
CHECKS = [*METHODS, *RANDOMISATION]


# ---------------------------------------------------------------- the table


@torch.no_grad()
def subject(name: str, dtype: torch.dtype = torch.float64) -> Subject:
    """A network that has predicted, which is what people do first, and whose predictions are explained."""
    model, images = network(name).to(dtype), example(NETWORKS[name].pixels).to(dtype)
    logits = references.outputs(model, images)
    return Subject(name, model, images, logits.argmax(1))


def cells(name: str) -> dict[str, Cell]:
    """All checks of one network: of maps in double precision, of randomised copies in single."""
    torch.set_num_threads(1)
    fine, coarse = subject(name), subject(name, torch.float32)
    found = {method: explained(fine, method) for method in METHODS}
    return found | {check: run(coarse) for check, run in RANDOMISATION.items()}


def magnitude(value: float | None) -> str:
    """The power of ten at or above a deviation: its digits are another machine's rounding."""
    if value is None:
        return ""
    return next((f"1e{power}" for power in range(-16, 3) if value <= 10.0**power), "more")


COLUMNS = ["library", "network", "pixels", "check", "outcome", "deviation", "says"]


def rows(name: str, found: dict[str, Cell]) -> list[list[str]]:
    """The lines of the table for one network."""
    of = NETWORKS[name]
    where = [f"{of.library} {version(of.library)}", name, str(of.pixels)]
    return [[*where, check, one.outcome, magnitude(one.deviation), one.says] for check, one in found.items()]


def store(found: dict[str, dict[str, Cell]], file: Path = FILE) -> None:
    """Put the networks that were run into the stored table, in its order; the others stay as they are."""
    lines: dict[str, list[list[str]]] = {}
    if file.exists():
        with file.open(encoding="utf-8", newline="") as old:
            for line in list(csv.reader(old))[1:]:
                lines.setdefault(line[1], []).append(line)
    lines |= {name: rows(name, one) for name, one in found.items()}
    with file.open("w", encoding="utf-8", newline="") as new:
        table = [line for name in NETWORKS for line in lines.get(name, [])]
        csv.writer(new, lineterminator="\n").writerows([COLUMNS, *table])


def main(names: list[str]) -> None:
    if unknown := set(names) - set(NETWORKS):
        sys.exit(f"unknown: {', '.join(sorted(unknown))}; known: {', '.join(NETWORKS)}.")
    print(", ".join(f"{name} {version(name)}" for name in ("torch", "torchvision", "timm", "transformers")))
    wanted = names or list(NETWORKS)
    with ProcessPoolExecutor(os.cpu_count(), get_context("spawn"), os.nice, (19,)) as pool:
        for name, found in zip(wanted, pool.map(cells, wanted)):
            print(name, flush=True)
            for check, one in found.items():
                print(f"  {check:22s}{one.outcome:9s}{magnitude(one.deviation):8s}{one.says}", flush=True)
            store({name: found})


if __name__ == "__main__":
    main(sys.argv[1:])
