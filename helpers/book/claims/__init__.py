"""A claim of a paper or of a chapter, checked against what was just measured.

The claims of a chapter stand in a file of its own in this folder, named after it, and are written before the
experiment is run for good. Each entry begins with a line `- id: ...` and has

`id`, `title` and `statement` (in our words), `source` (`key` of the bibliography and `where` in it),
`test` (`above`: the difference exceeds `margin`; `equivalent`: it lies within plus or minus `margin`),
`expected`: `holds` or `contradicted here`, for the claim or, under `parts`, for each named part of it,
`design`: `crossed` (every replicate with the same images), `own images` (one number a replicate), or
`{rate: unit}` (a share of such units, or a difference of shares), for the claim or for each part, and
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
from scipy import stats

from .card import html

FOLDER = Path(__file__).parent
MIME = "application/vnd.saliency-sanity.claim+json"
HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted here", "undecided"
LEVEL = 0.05
FEWEST_REPLICATES = 5
RESAMPLES = 4_000
DESIGNS = {  # the dimensions of the differences, and what they are
    "crossed": (2, "D[replicate, image], the same images for every replicate"),
    "own images": (1, "D[replicate], since every replicate has images of its own"),
}


class ClaimError(AssertionError):
    """The outcome of a check is not the one that the claim expects."""


@dataclass(frozen=True)
class Finding:
    """One test: its outcome, the largest of its p-values, and the replicates it rests on."""

    name: str
    outcome: str
    expected: str
    p_value: float
    mean: float
    replicate_interval: tuple[float, float]
    image_interval: tuple[float, float] | None
    replicates: list[float]
    images: int
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
            low, high = f.replicate_interval
            lines.append(
                f"  {f.name or self.test}: {f.outcome} (expected: {f.expected}); mean {f.mean:.3f}, "
                f"interval over {len(f.replicates)} {self.replicated} {low:.3f} to {high:.3f}"
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
    undefined: tuple[float, float] = (-1.0, 1.0),
) -> Card:
    """Test claim `id` on paired differences.

    Parameters
    ----------
    differences : `D[replicate, image]`, or `D[replicate]` where every replicate drew its own images, as the claim's
        design says; for a claim with parts a mapping from the part's name to such an array. At least five replicates.
    replicated : what the replicates are, for example "re-initialisations" or "training seeds".
    objects : for every image the object it shows; images of one object are resampled together.
    undefined : NaN differences are counted, scored once as the first and once as the second of these numbers,
        and both must give the same outcome.

    Returns
    -------
    `Card`. Above: `holds` where the 95 % lower bounds of both the mean over replicates (t) and the mean over
    images (bootstrap) exceed the margin, `contradicted here` where both upper bounds fall short of it, else
    `undecided`. Equivalent: two one-sided tests, both 90 % intervals within the margin.

    Raises
    ------
    ClaimError
        Under `SANITY_STRICT=1`, if an outcome is not the expected one.
    ValueError
        Unknown id or part, too few replicates, or differences that do not have the claim's design.
    """
    claim = entry(id)
    expected = claim.get("parts") or {"": claim["expected"]}
    given = differences if isinstance(differences, Mapping) else {"": differences}
    if set(given) != set(expected):
        raise ValueError(f"claim {id!r} has the parts {list(expected)}, got {list(given)}.")
    for name, values in given.items():
        _check_design(claim, name, values)
    findings = [
        _find(name, expected[name], claim["test"], claim["margin"], given[name], objects, undefined)
        for name in expected
    ]
    source = f"{claim['source']['key']}, {claim['source']['where']}"
    title, statement, chapter = (claim[name] for name in ("title", "statement", "chapter"))
    card = Card(id, title, statement, chapter, source, claim["test"], claim["margin"], replicated, findings)
    if os.environ.get("SANITY_STRICT") == "1" and not card.as_expected:
        raise ClaimError(f"{id}: {card}")
    return card


def _check_design(claim: dict, part: str, differences) -> None:
    """Refuse differences that are not what the claim's design, or this part's, says."""
    design, values = claim["design"], np.asarray(differences, dtype=float)
    if isinstance(design, dict) and part in design:
        design = design[part]
    if isinstance(design, dict):
        wanted = f"shares of {design['rate']}, or differences of such shares, from -1 to 1"
        fits = np.nanmax(np.abs(values), initial=0) <= 1 + 1e-9
    else:
        dimensions, wanted = DESIGNS[design]
        fits = values.ndim == dimensions
    if not fits:
        raise ValueError(f"claim {claim['id']!r} asks for {wanted}; got an array of shape {values.shape}.")


def _find(name, expected, test, margin, differences, objects, undefined) -> Finding:
    values = np.asarray(differences, dtype=float)
    if values.ndim not in (1, 2) or len(values) < FEWEST_REPLICATES:
        raise ValueError(
            f"differences must be D[replicate, image] or D[replicate] with at least {FEWEST_REPLICATES} "
            f"replicates, got shape {values.shape}."
        )
    missing = np.isnan(values)
    fills = undefined if missing.any() else undefined[:1]
    results = [_test(np.where(missing, fill, values), test, margin, objects) for fill in fills]
    outcomes = {outcome for outcome, *_ in results}
    outcome, p_value, by_replicate, by_image = max(results, key=lambda result: result[1])
    per_replicate = np.nanmean(values, axis=1) if values.ndim == 2 else values
    return Finding(
        name=name,
        outcome=outcome if len(outcomes) == 1 else UNDECIDED,
        expected=expected,
        p_value=p_value,
        mean=float(np.nanmean(values)),
        replicate_interval=by_replicate,
        image_interval=by_image,
        replicates=per_replicate.tolist(),
        images=values.shape[1] if values.ndim == 2 else 0,
        undefined=int(missing.sum()),
    )


class _Mean:
    """A mean with its 90 % interval (each end a one-sided 95 % bound) and one-sided p-values."""

    def __init__(self, interval: tuple[float, float], p_above):
        self.low, self.high = (float(end) for end in interval)
        self.p_above = p_above  # p_above(m): p-value of "the mean is not above m"

    @classmethod
    def of_replicates(cls, means: np.ndarray) -> "_Mean":
        """Student's t over the replicates."""
        centre, error = means.mean(), stats.sem(means)
        if error == 0:
            return cls((centre, centre), lambda m: float(centre <= m))
        freedom = len(means) - 1
        reach = stats.t.ppf(1 - LEVEL, freedom) * error
        return cls((centre - reach, centre + reach), lambda m: stats.t.sf((centre - m) / error, freedom))

    @classmethod
    def of_images(cls, means: np.ndarray, objects: Sequence | None) -> "_Mean":
        """Bootstrap over the images, those of one object together, with a seed of its own."""
        groups = np.unique(range(len(means)) if objects is None else np.asarray(objects), return_inverse=True)[1]
        if len(groups) != len(means):
            raise ValueError(f"objects must name one object an image: {len(means)} images, {len(groups)} objects.")
        totals, sizes = np.bincount(groups, means), np.bincount(groups)
        drawn = np.random.default_rng(0).integers(len(sizes), size=(RESAMPLES, len(sizes)))
        draws = totals[drawn].sum(1) / sizes[drawn].sum(1)
        return cls(np.quantile(draws, [LEVEL, 1 - LEVEL]), lambda m: (1 + (draws <= m).sum()) / (1 + RESAMPLES))


def _test(values: np.ndarray, test: str, margin: float, objects) -> tuple:
    """Outcome, p-value of `holds`, the interval over replicates and the one over images (or None)."""
    means = [_Mean.of_replicates(values.mean(1) if values.ndim == 2 else values)]
    if values.ndim == 2:
        means.append(_Mean.of_images(values.mean(0), objects))
    bounds = (margin, np.inf) if test == "above" else (-margin, margin)
    holds = all(bounds[0] < mean.low and mean.high < bounds[1] for mean in means)
    outside = all(mean.high < bounds[0] for mean in means) or all(mean.low > bounds[1] for mean in means)
    p_value = max(mean.p_above(bounds[0]) for mean in means)
    if test == "equivalent":
        p_value = max(p_value, *(1 - mean.p_above(bounds[1]) for mean in means))
    outcome = HOLDS if holds else CONTRADICTED if outside else UNDECIDED
    intervals = [(mean.low, mean.high) for mean in means]
    return outcome, float(p_value), intervals[0], intervals[1] if len(intervals) > 1 else None
