"""Intervals for the mean difference of a claim: over replicates and images at once, over replicates, for rates.

All are two-sided with one-sided levels: at `alpha` each end is wrong with a chance of at most about `alpha`. Where a
choice had to be made between too wide and too narrow, they are too wide.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from scipy import optimize, special

SAME = 1e-6  # replicates that differ by less than this part of what is judged do not scatter
LEVEL = 0.05
SMALLEST_P = 1e-12  # below which a p-value says more of its model than of the data


class Mean(Protocol):
    """A mean with its uncertainty."""

    def bounds(self, alpha: float) -> tuple[float, float]:
        """The two one-sided bounds at level `alpha` each."""

    def p_above(self, margin: float) -> float:
        """The p-value of "the mean is not above the margin"."""

    def p_below(self, margin: float) -> float:
        """The p-value of "the mean is not below the margin"."""


@dataclass(frozen=True)
class Student:
    """Mean plus or minus Student's t times a standard error."""

    mean: float
    error: float
    freedom: float

    def bounds(self, alpha: float) -> tuple[float, float]:
        reach = -special.stdtrit(self.freedom, alpha) * self.error
        return float(self.mean - reach), float(self.mean + reach)

    def p_above(self, margin: float) -> float:
        return float(special.stdtr(self.freedom, (margin - self.mean) / self.error))

    def p_below(self, margin: float) -> float:
        return float(special.stdtr(self.freedom, (self.mean - margin) / self.error))


@dataclass(frozen=True)
class Same:
    """Replicates, and images, that all gave the same number.

    They have no interval, but they count: were the median on the other side of a margin, or on it, so many replicates
    would lie on this side with a chance of at most one half each (the sign test).
    """

    mean: float
    replicates: int

    def bounds(self, alpha: float) -> tuple[float, float]:
        reach = SAME * abs(self.mean) if 0.5**self.replicates <= alpha else np.inf  # at the margin is not beyond it
        return self.mean - reach, self.mean + reach

    def p_above(self, margin: float) -> float:
        return 0.5**self.replicates if self.mean - SAME * abs(self.mean) > margin else 1.0

    def p_below(self, margin: float) -> float:
        return 0.5**self.replicates if self.mean + SAME * abs(self.mean) < margin else 1.0


@dataclass(frozen=True)
class Share:
    """A mean of numbers in `between`, which stand for so many independent units of 0 or 1 at the two ends.

    Exact for 0 and 1, too wide for numbers between the ends. Of outcomes -1, 0 and 1 `turned` holds the shares of 1 and
    of -1: each then has an exact bound of its own, at half the level.
    """

    mean: float
    between: tuple[float, float]
    units: float
    turned: tuple[float, float] | None = None

    def bounds(self, alpha: float) -> tuple[float, float]:
        if self.turned:
            up, down = (clopper_pearson(of, self.units, alpha / 2) for of in self.turned)
            return up[0] - down[1], up[1] - down[0]
        start, length = self.between[0], self.between[1] - self.between[0]
        low, high = clopper_pearson((self.mean - start) / length, self.units, alpha)
        return start + length * low, start + length * high

    def p_above(self, margin: float) -> float:
        return self._p(lambda alpha: self.bounds(alpha)[0] - margin, self.mean - margin)

    def p_below(self, margin: float) -> float:
        return self._p(lambda alpha: margin - self.bounds(alpha)[1], margin - self.mean)

    @staticmethod
    def _p(room, gap: float) -> float:
        """The level at which a bound reaches the margin; one where the mean itself is not beyond it."""
        if gap <= 0:
            return 1.0
        if room(SMALLEST_P) > 0:
            return SMALLEST_P
        if room(0.5) <= 0:
            return 0.5
        return float(np.exp(optimize.brentq(lambda log: room(np.exp(log)), np.log(SMALLEST_P), np.log(0.5))))


def clopper_pearson(share: float, units: float, alpha: float) -> tuple[float, float]:
    """The exact bounds of a rate (Clopper & Pearson 1934), each at level `alpha`; `share * units` may be no integer."""
    hits = min(max(share, 0.0), 1.0) * units
    low = special.betaincinv(hits, units - hits + 1, alpha) if hits > 0 else 0.0
    high = special.betainccinv(hits + 1, units - hits, alpha) if hits < units else 1.0
    return float(low), float(high)


def over_replicates(values: np.ndarray, margin: float) -> Student | Same:
    """Student's t over replicates that have images of their own."""
    return _student(values, _error(values, margin), len(values) - 1)


def crossed(values: np.ndarray, objects: Sequence | None, margin: float) -> Student | Same:
    """The mean of D[replicate, image] for new replicates and new images.

    The squares of the standard errors over replicates and over images (or objects) are added, the degrees of freedom
    are Satterthwaite's (1946). The scatter of single cells is in both, so that the interval is rather too wide.
    """
    square, freedom = _square(values, objects, margin)
    return _student(values, np.sqrt(square), freedom)


def share(
    values: np.ndarray,
    between: tuple[float, float],
    margin: float,
    *,
    own: float | None = None,
    shared: float | None = None,
    objects: Sequence | None = None,
) -> Share:
    """A rate, or a difference of rates.

    Each replicate has units of its own, `own` in all; or all replicates share the same `shared` units; or, with
    neither, they share the images (or objects) of D[replicate, image], whose scatter can be seen.

    The units count for as many as would scatter like the mean does (Korn & Graubard 1998), and for fewer again as few
    replicates tell how much that is. If nothing scatters there is nothing to tell them from independent ones.
    """
    mean = float(values.mean())
    outcomes = values.ndim == 2 and tuple(between) == (-1, 1) and set(np.unique(values)) <= {-1.0, 0.0, 1.0}
    turned = (float((values > 0).mean()), float((values < 0).mean())) if outcomes else None
    single = sum(turned) - mean**2 if turned else (mean - between[0]) * (between[1] - mean)
    if own or shared:
        units = most = own or shared or 0.0
        square, freedom = _error(values.reshape(len(values), -1).mean(1), margin) ** 2, len(values) - 1.0
        square += single / units if shared and square else 0.0
    else:
        units, most = effective(values.shape[1], objects), float(values.size)
        square, freedom = _square(values, objects, margin)
    if square and single > 0:
        few = special.stdtrit(units - 1, LEVEL) / special.stdtrit(freedom, LEVEL)
        units = min(most, single / square * few**2)
    return Share(mean, (between[0], between[1]), units, turned)


def identical(values: np.ndarray, margin: float) -> bool:
    """Whether the values differ by no more than rounding, measured by themselves and by what they are held against."""
    return bool(np.ptp(values) <= SAME * max(abs(margin), np.abs(values).max()))


def effective(images: int, objects: Sequence | None) -> float:
    """How many images, or objects of equal size, count as much as these."""
    sizes = np.unique(range(images) if objects is None else np.asarray(objects), return_counts=True)[1]
    return float(sizes.sum() ** 2 / (sizes**2).sum())


def _square(values: np.ndarray, objects: Sequence | None, margin: float) -> tuple[float, float]:
    """The squared standard error of the mean of D[replicate, image], and its degrees of freedom."""
    a, (b, freedom_b) = _error(values.mean(1), margin), _clustered(values.mean(0), objects, margin)
    square, freedom_a = a**2 + b**2, len(values) - 1.0
    return square, square**2 / (a**4 / freedom_a + b**4 / freedom_b) if square else freedom_a


def _student(values: np.ndarray, error: float, freedom: float) -> Student | Same:
    mean = float(values.mean())
    return Student(mean, float(error), freedom) if error else Same(mean, len(values))


def _error(values: np.ndarray, margin: float) -> float:
    return 0.0 if identical(values, margin) else float(values.std(ddof=1) / np.sqrt(len(values)))


def _clustered(means: np.ndarray, objects: Sequence | None, margin: float) -> tuple[float, float]:
    """Standard error of the mean over images, and its degrees of freedom, by leaving out one object after another."""
    groups = np.unique(range(len(means)) if objects is None else np.asarray(objects), return_inverse=True)[1]
    totals, sizes = np.bincount(groups, means), np.bincount(groups)
    left = (means.sum() - totals) / (len(means) - sizes)
    if identical(totals / sizes, margin):
        return 0.0, 1.0
    error = np.sqrt((1 - 1 / len(sizes)) * ((left - means.mean()) ** 2).sum())
    return float(error), effective(len(means), objects) - 1
