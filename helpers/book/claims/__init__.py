"""A claim of a paper or of a chapter, checked against what was just measured.

The ledger `claims.yml` is written before the experiment is run for good. Each entry has

`id`, `statement` (in our words), `source` (`key` of the bibliography and `where` in it), `chapter`,
`test` (`above`: the difference exceeds `margin`; `equivalent`: it lies within plus or minus `margin`), and
`expected`: `holds` or `contradicted here`, for the claim or, under `parts`, for each named part of it.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from html import escape
from pathlib import Path

import numpy as np
import yaml
from scipy import stats

LEDGER = Path(__file__).parents[2] / "claims.yml"
MIME = "application/vnd.saliency-sanity.claim+json"
HOLDS, CONTRADICTED, UNDECIDED = "holds", "contradicted here", "undecided"
LEVEL = 0.05
FEWEST_REPLICATES = 5
RESAMPLES = 4_000


class ClaimError(AssertionError):
    """The outcome of a check is not the one that the ledger expects."""


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
        lines = [f"{self.id}: {self.statement} ({self.source})"]
        for f in self.findings:
            low, high = f.replicate_interval
            lines.append(
                f"  {f.name or self.test}: {f.outcome} (expected: {f.expected}); mean {f.mean:.3f}, "
                f"interval over {len(f.replicates)} {self.replicated} {low:.3f} to {high:.3f}"
            )
        return "\n".join(lines)

    def _repr_mimebundle_(self, **_) -> dict:
        return {"text/plain": str(self), "text/html": _html(self), MIME: asdict(self)}


@cache
def ledger() -> dict[str, dict]:
    """All claims by id, in the order of the file."""
    entries = yaml.safe_load(LEDGER.read_text())
    claims = {entry["id"]: entry for entry in entries}
    if len(claims) < len(entries):
        raise ValueError("two claims of the ledger have the same id.")
    return claims


def check(
    id: str,
    differences,
    *,
    replicated: str,
    objects: Sequence | None = None,
    undefined: tuple[float, float] = (-1.0, 1.0),
) -> Card:
    """Test claim `id` of the ledger on paired differences.

    Parameters
    ----------
    differences : `D[replicate, image]`, or `D[replicate]` where every replicate drew its own images; for a
        claim with parts a mapping from the part's name to such an array. At least five replicates.
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
        Unknown id or part, too few replicates, or differences of a wrong shape.
    """
    if id not in ledger():
        raise ValueError(f"unknown claim {id!r}; known: {', '.join(ledger())}.")
    claim = ledger()[id]
    expected = claim.get("parts") or {"": claim["expected"]}
    given = differences if isinstance(differences, Mapping) else {"": differences}
    if set(given) != set(expected):
        raise ValueError(f"claim {id!r} has the parts {list(expected)}, got {list(given)}.")
    findings = [
        _find(name, expected[name], claim["test"], claim["margin"], given[name], objects, undefined)
        for name in expected
    ]
    source = f"{claim['source']['key']}, {claim['source']['where']}"
    card = Card(id, claim["statement"], claim["chapter"], source, claim["test"], claim["margin"], replicated, findings)
    if os.environ.get("SANITY_STRICT") == "1" and not card.as_expected:
        raise ClaimError(str(card))
    return card


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


def _html(card: Card) -> str:
    """The card of a check: one line of dots a finding, the margin marked, green where as expected, else red."""
    colour = "#1b7f3b" if card.as_expected else "#b3261e"
    word = {True: "as expected", False: "NOT as expected"}[card.as_expected]
    parts = "".join(_finding_html(card, finding) for finding in card.findings)
    return (
        f'<div style="border-left:4px solid {colour};padding:.4em .8em;margin:.5em 0">'
        f"<strong>{escape(card.id)}</strong> ({word}): {escape(card.statement)} "
        f"<em>{escape(card.source)}</em>{parts}</div>"
    )


def _finding_html(card: Card, f: Finding) -> str:
    marks = [-card.margin, card.margin] if card.test == "equivalent" else [card.margin]
    values = [*f.replicates, *marks, *f.replicate_interval, 0.0]
    low, width = min(values), (max(values) - min(values)) or 1.0

    def x(value: float) -> float:
        return round(10 + 280 * (value - low) / width, 1)

    ends = [x(end) for end in f.replicate_interval]
    shapes = [f'<line x1="{ends[0]}" x2="{ends[1]}" y1="14" y2="14" stroke="currentColor" stroke-width="2"/>']
    shapes += [f'<line x1="{x(m)}" x2="{x(m)}" y1="2" y2="26" stroke="#b35900" stroke-dasharray="3 2"/>' for m in marks]
    shapes += [f'<circle cx="{x(v)}" cy="14" r="4" fill="#2166ac" fill-opacity=".7"/>' for v in f.replicates]
    interval = f"{f.replicate_interval[0]:.3f} to {f.replicate_interval[1]:.3f}"
    images = f"; over {f.images} images {f.image_interval[0]:.3f} to {f.image_interval[1]:.3f}" if f.images else ""
    test = f"{'above' if card.test == 'above' else 'within &plusmn;'} {card.margin:g}"
    undefined = f"; {f.undefined} undefined similarities, scored both ways" if f.undefined else ""
    text = (
        f"{escape(f.name) + ': ' if f.name else ''}<strong>{f.outcome}</strong> (expected: {f.expected}). "
        f"Difference {test}? Mean {f.mean:.3f}; 90&nbsp;% interval over {len(f.replicates)} "
        f"{escape(card.replicated)} {interval}{images}{undefined}; p = {f.p_value:.2g}."
    )
    label = f"{len(f.replicates)} replicates as dots, mean {f.mean:.3f}, interval {interval}, margin {card.margin:g}"
    picture = (
        f'<svg role="img" aria-label="{label}" viewBox="0 0 300 28" width="300" height="28" '
        f'style="max-width:100%;display:block">{"".join(shapes)}</svg>'
    )
    return f"<div>{text}{picture}</div>"
