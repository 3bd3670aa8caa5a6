"""A claim of a paper or of a chapter, checked against what was just measured.

The claims of a chapter stand in a file of its own in this folder, named after it, and are written before the
experiment is run for good. Each entry begins with a line `- id: ...` and has

`id`, `title` and `statement` (in our words), `source` (`key` of the bibliography and `where` in it),
`test` (`above`: the difference exceeds `margin`; `equivalent`: it lies within plus or minus `margin`),
`expected`: `holds`, `contradicted here` or `undecided`, for the claim or, under `parts`, for each named part of it,
`design`: `crossed` (every replicate with the same images), `own images` (one number a replicate, from images of its
own or from a fixed set that the statement names), or
`{rate: unit, of: number, between: [low, high]}`, for the claim or for each part: a share of so many units, each
replicate with its own, or with `shared: number` the same for all (as without a number the images of
`D[replicate, image]`); `between` are the least and the greatest value of numbers made of shares, 0 and 1 if it is
left out, -1 and 1 for a difference of two shares (exacter for outcomes `D[replicate, unit]`), and
`history`: a list of `date`, `what` and, where it is known, `why`, which begins when the claim was written down.

Claims that were given up stand under `dropped` in the same file.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
import yaml

from . import intervals
from .card import html

FOLDER = Path(__file__).parent
MIME = "application/vnd.saliency-sanity.claim+json"
HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted here", "undecided"
LEVEL = intervals.LEVEL
FEWEST_REPLICATES = 5  # also the fewest that can convince by their signs alone: .5 ** 5 < LEVEL
DESIGNS = {  # the dimensions of the differences, and what they are
    "crossed": (2, "D[replicate, image], the same images for every replicate"),
    "own images": (1, "D[replicate], since every replicate has images, or a number, of its own"),
}


class ClaimError(AssertionError):
    """The outcome of a check is not the one that the claim expects."""


@dataclass(frozen=True)
class Finding:
    """One test: its outcome, its interval, and the replicates it rests on.

    `interval` is the 90 % interval that decides (each end a one-sided 95 % bound), `None` where nothing scatters.
    `scatter`: whether the replicates differ from one another. `p_value`: of `holds`; where `p_bound`, it is at most
    that. `units`: over how many of what (`unit`) the interval reaches beside the replicates, 0 for none.
    """

    name: str
    outcome: str
    expected: str
    p_value: float
    p_bound: bool
    mean: float
    interval: tuple[float, float] | None
    scatter: bool
    replicates: list[float]
    unit: str
    units: int
    undefined: int


@dataclass(frozen=True)
class Card:
    """The result of a check; shows itself in a notebook and is read back by the scorecard."""

    id: str
    title: str
    statement: str
    chapter: str
    source: str
    test: str
    margin: float
    replicated: str
    findings: list[Finding]

    @property
    def as_expected(self) -> bool:
        return all(finding.outcome == finding.expected for finding in self.findings)

    def __str__(self) -> str:
        lines = [f"{self.title}. {self.statement} ({self.source})"]
        for f in self.findings:
            spread = "no scatter" if f.interval is None else "interval {:.3f} to {:.3f}".format(*f.interval)
            over = f"{len(f.replicates)} {self.replicated}" + (f" and {f.units} {f.unit}" if f.units else "")
            lines.append(
                f"  {f.name or self.test}: {f.outcome} (expected: {f.expected}); mean {f.mean:.3f}, "
                f"{spread} over {over}"
            )
        return "\n".join(lines)

    def _repr_mimebundle_(self, **_) -> dict:
        return {"text/plain": str(self), "text/html": html(asdict(self)), MIME: asdict(self)}


def entry(id: str) -> dict:
    """The claim `id` with all its fields and its `chapter`; of the files, only the one that has it is parsed.

    Raises
    ------
    ValueError
        No chapter makes this claim.
    """
    for path in sorted(FOLDER.glob("*.yml")):
        if re.search(rb"^ *- id: %s\s*$" % re.escape(id.encode()), path.read_bytes(), re.MULTILINE):
            for claim in _parsed(path):
                if claim["id"] == id:
                    return claim
    raise ValueError(f"unknown claim {id!r}: no file in {FOLDER} has it among its claims.")


@cache
def _parsed(path: Path) -> list[dict]:
    return [claim | {"chapter": path.stem} for claim in yaml.safe_load(path.read_text(encoding="utf-8"))["claims"]]


def check(
    id: str,
    differences,
    *,
    replicated: str,
    objects: Sequence | None = None,
    undefined: tuple[float, float] | None = None,
) -> Card:
    """Test claim `id` on paired differences.

    Parameters
    ----------
    differences : `D[replicate, image]`, or `D[replicate]` where every replicate drew its own images, as the claim's
        design says; for a claim with parts a mapping from the part's name to such an array. At least five replicates.
    replicated : what the replicates are, for example "re-initialisations" or "training seeds".
    objects : for every image of `D[replicate, image]` the object it shows: the objects are what was drawn.
    undefined : NaN differences are counted, scored once as the first and once as the second of these numbers,
        and both must give the same outcome. By default -1 and 1, for a rate the ends of its `between`.

    Returns
    -------
    `Card`. Above: `holds` where the 95 % lower bound exceeds the margin, `contradicted here` where the upper bound
    falls short of it, else `undecided`. Equivalent: two one-sided tests, the 90 % interval within the margins. The
    interval is one for new replicates and new images at once (crossed), for new replicates (own images), or exact for
    a rate: see `intervals`. Where nothing scatters there is none, and the signs of the replicates decide.

    Raises
    ------
    ClaimError
        Under `SANITY_STRICT=1`: at `SANITY_SEED` 0 if an outcome is not the expected one, at another seed if it is
        the opposite of the expected one.
    ValueError
        Unknown id or part, too few replicates, or differences that do not have the claim's design.
    """
    claim = entry(id)
    expected = claim.get("parts") or {"": claim["expected"]}
    given = differences if isinstance(differences, Mapping) else {"": differences}
    if set(given) != set(expected):
        raise ValueError(f"claim {id!r} has the parts {list(expected)}, got {list(given)}.")
    findings = [_find(claim, name, expected[name], given[name], objects, undefined) for name in expected]
    source = f"{claim['source']['key']}, {claim['source']['where']}"
    title, statement, chapter = (claim[name] for name in ("title", "statement", "chapter"))
    card = Card(id, title, statement, chapter, source, claim["test"], claim["margin"], replicated, findings)
    if os.environ.get("SANITY_STRICT") == "1" and any(surprising(f.outcome, f.expected) for f in findings):
        raise ClaimError(f"{id}: {card}")
    return card


def surprising(outcome: str, expected: str) -> bool:
    """Whether a strict run stops here: at seed 0 for any other outcome, else only for the opposite one."""
    if int(os.environ.get("SANITY_SEED") or 0) == 0:
        return outcome != expected
    return {outcome, expected} == {HOLDS, CONTRADICTED}


def _find(claim: dict, name: str, expected: str, differences, objects, undefined) -> Finding:
    values, margin = np.asarray(differences, dtype=float), claim["margin"]
    design = _fitting_design(claim, name, values, objects)
    rate = design if isinstance(design, dict) else {}
    missing = np.isnan(values)
    fills = undefined or rate.get("between", (0.0, 1.0) if rate else (-1.0, 1.0))
    scored = [np.where(missing, fill, values) for fill in (fills if missing.any() else fills[:1])]
    means = [_mean(design, of, objects, margin) for of in scored]
    judged = [_judge(mean, claim["test"], margin) for mean in means]
    outcomes = {outcome for outcome, _ in judged}
    mean, (_, p_value) = max(zip(means, judged, strict=True), key=lambda one: one[1][1])
    scatter = any(not intervals.identical(of.reshape(len(of), -1).mean(1), margin) for of in scored)
    unit, units = _counted(design, values, objects)
    return Finding(
        name=name,
        outcome=outcomes.pop() if len(outcomes) == 1 else UNDECIDED,
        expected=expected,
        p_value=max(p_value, intervals.SMALLEST_P),
        p_bound=isinstance(mean, intervals.Same) or p_value <= intervals.SMALLEST_P,
        mean=float(np.nanmean(values)),
        interval=None if isinstance(mean, intervals.Same) else mean.bounds(LEVEL),
        scatter=scatter,
        replicates=(np.nanmean(values, axis=1) if values.ndim == 2 else values).tolist(),
        unit=unit,
        units=units,
        undefined=int(missing.sum()),
    )


def _fitting_design(claim: dict, part: str, values: np.ndarray, objects):
    """The design of the claim or of this part; differences that are not what it says are refused."""
    design = claim["design"]
    if isinstance(design, dict) and part in design:
        design = design[part]
    if isinstance(design, dict):
        low, high = design.get("between", (0, 1))
        wanted = f"shares of {design['rate']}, or numbers made of them, from {low:g} to {high:g}"
        fits = values.ndim in (1, 2) and not (np.nanmin(values) < low - 1e-9 or np.nanmax(values) > high + 1e-9)
        if values.ndim == 1 and not {"of", "shared"} & set(design):
            wanted, fits = f"D[replicate, {design['rate']}], since its design does not say of how many they are", False
    else:
        dimensions, wanted = DESIGNS[design]
        fits = values.ndim == dimensions
    if not fits:
        raise ValueError(f"claim {claim['id']!r} asks for {wanted}; got an array of shape {values.shape}.")
    if len(values) < FEWEST_REPLICATES:
        raise ValueError(
            f"claim {claim['id']!r} needs at least {FEWEST_REPLICATES} replicates; got an array of shape "
            f"{values.shape}."
        )
    if objects is not None and values.shape[1:] != (len(objects),):
        raise ValueError(
            f"objects must name one object an image: {len(objects)} objects for an array of shape {values.shape}."
        )
    if values.ndim == 2 and "of" not in design and len(set(range(values.shape[1]) if objects is None else objects)) < 2:
        raise ValueError(f"claim {claim['id']!r} needs at least two images, of two objects; draw more.")
    return design


def _counted(design, values: np.ndarray, objects) -> tuple[str, int]:
    """Over what, and how many of it, the interval reaches beside the replicates."""
    if design == "own images":
        return "", 0
    if isinstance(design, dict) and (units := design.get("of") or design.get("shared")):
        return design["rate"], units
    seen = values.shape[1] if objects is None else len(set(objects))
    if isinstance(design, dict):
        return design["rate"], seen
    return "images" if objects is None else "objects", seen


def _mean(design, values: np.ndarray, objects, margin: float) -> intervals.Mean:
    if design == "own images":
        return intervals.over_replicates(values, margin)
    if design == "crossed":
        return intervals.crossed(values, objects, margin)
    between, own, shared = design.get("between", (0.0, 1.0)), design.get("of"), design.get("shared")
    return intervals.share(values, between, margin, own=own, shared=shared, objects=objects)


def _judge(mean: intervals.Mean, test: str, margin: float) -> tuple[str, float]:
    """Outcome, and the p-value of `holds`."""
    low, high = mean.bounds(LEVEL)
    least, most = (margin, np.inf) if test == "above" else (-margin, margin)
    outcome = HOLDS if least < low and high < most else CONTRADICTED if high < least or most < low else UNDECIDED
    p_value = mean.p_above(least)
    return outcome, p_value if test == "above" else max(p_value, mean.p_below(most))
