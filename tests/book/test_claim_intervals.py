"""Intervals of claims: against scipy and closed forms, and how often they let a false claim pass."""

import numpy as np
import pytest
from saliency_sanity.book.claims import intervals
from scipy import stats

LEVEL = 0.05


def draws(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape)


def test_over_replicates_is_the_t_test():
    values = 0.2 + 0.1 * draws(0, 8)
    mean = intervals.over_replicates(values, 0.1)
    expected = stats.t.interval(0.9, 7, values.mean(), stats.sem(values))
    np.testing.assert_allclose(mean.bounds(LEVEL), expected)
    assert mean.p_above(0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="greater").pvalue)
    assert mean.p_below(0.1) == pytest.approx(stats.ttest_1samp(values, 0.1, alternative="less").pvalue)


def test_crossed_is_the_t_test_of_the_one_that_scatters():
    rows, columns = draws(1, 8), draws(2, 20)
    for values, one in ((np.tile(rows[:, None], 20), rows), (np.tile(columns, (8, 1)), columns)):
        expected = stats.t.interval(0.9, len(one) - 1, one.mean(), stats.sem(one))
        np.testing.assert_allclose(intervals.crossed(values, None, 0.1).bounds(LEVEL), expected)


def test_crossed_adds_the_squares_with_satterthwaites_freedom():
    values = draws(3, 6, 9) + draws(4, 6, 1) + draws(5, 1, 9)
    a, b = stats.sem(values.mean(1)), stats.sem(values.mean(0))
    freedom = (a**2 + b**2) ** 2 / (a**4 / 5 + b**4 / 8)
    expected = stats.t.interval(0.9, freedom, values.mean(), np.hypot(a, b))
    np.testing.assert_allclose(intervals.crossed(values, None, 0.1).bounds(LEVEL), expected)
    np.testing.assert_allclose(intervals.crossed(values.T, None, 0.1).bounds(LEVEL), expected)


def test_objects_of_one_size_are_images_that_were_averaged():
    values = draws(6, 6, 7, 3)
    mean = intervals.crossed(values.reshape(6, 21), np.repeat(list("abcdefg"), 3), 0.1)
    np.testing.assert_allclose(mean.bounds(LEVEL), intervals.crossed(values.mean(2), None, 0.1).bounds(LEVEL))


def test_objects_of_other_sizes_follow_the_scatter_of_the_mean_over_images():
    """The mean of all images in many redrawn sets of objects, one of which has half of the images."""
    rng, sizes = np.random.default_rng(7), np.array([12, 1, 2, 3, 1, 2, 1, 2])
    objects = np.repeat(np.arange(8), sizes)
    images = rng.normal(size=(20_000, 8))[:, objects] + 0.5 * rng.normal(size=(20_000, 24))
    wandering = images.mean(1).std()
    errors = [intervals.crossed(np.tile(of, (5, 1)), objects, 1.0).error for of in images[:2000]]
    assert wandering < np.sqrt(np.mean(np.square(errors))) < 2 * wandering
    assert intervals.effective(24, objects) == 24**2 / (sizes**2).sum() < 4
    alike = intervals.crossed(np.tile(images[0], (5, 1)), objects, 1.0)
    assert alike.freedom == pytest.approx(24**2 / (sizes**2).sum() - 1)


def test_identical_numbers_are_judged_by_their_signs():
    for values, judge in ((np.full(5, 0.3), intervals.over_replicates), (np.full((5, 3), 0.3), _crossed)):
        mean = judge(values + 1e-10, 0.1)
        assert isinstance(mean, intervals.Same)
        sign_test = stats.binomtest(5, 5, alternative="greater").pvalue
        assert mean.p_above(0.1) == sign_test and mean.p_below(0.1) == 1 and mean.p_above(mean.mean) == 1
        assert mean.bounds(LEVEL) == pytest.approx((0.3, 0.3), rel=1e-5) and mean.bounds(0.03) == (-np.inf, np.inf)
        low, high = mean.bounds(LEVEL)
        assert low < mean.mean < high
    assert not isinstance(intervals.over_replicates(1e-9 * draws(8, 5), 0.0), intervals.Same)  # small, but they differ


def _crossed(values, margin):
    return intervals.crossed(values, None, margin)


@pytest.mark.parametrize(("hits", "units"), [(24, 24), (8, 8), (0, 8), (1, 6), (17, 24), (3, 300)])
@pytest.mark.parametrize("margin", [0.1, 0.5, 0.8])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_a_rate_is_scipys_binomial(hits, units, margin, kind):
    exact = stats.binomtest(hits, units, margin, alternative="two-sided").proportion_ci(0.9, method="exact")
    mean = intervals.share(np.full(6, hits / units), (0, 1), margin, **{kind: units})
    np.testing.assert_allclose(mean.bounds(LEVEL), (exact.low, exact.high), atol=1e-9)
    if hits / units > margin:
        one_sided = stats.binomtest(hits, units, margin, alternative="greater").pvalue
        assert mean.p_above(margin) == pytest.approx(max(one_sided, intervals.SMALLEST_P), rel=1e-3)
    else:
        one_sided = stats.binomtest(hits, units, margin, alternative="less").pvalue
        expected = 1 if hits / units == margin else max(min(one_sided, 0.5), intervals.SMALLEST_P)
        assert mean.p_below(margin) == pytest.approx(expected, rel=1e-3)


def test_a_share_held_against_a_bar_has_the_same_interval():
    shares = np.array([0.8, 0.9, 1, 1, 0.7, 0.9])
    plain = intervals.share(shares, (0, 1), 0.5, own=60).bounds(LEVEL)
    above = intervals.share(shares - 0.5, (-0.5, 0.5), 0.0, own=60).bounds(LEVEL)
    below = intervals.share(0.5 - shares, (-0.5, 0.5), 0.0, own=60).bounds(LEVEL)
    np.testing.assert_allclose(above, np.array(plain) - 0.5)
    np.testing.assert_allclose(below, 0.5 - np.array(plain)[::-1])


def test_replicates_that_differ_make_units_count_for_fewer():
    shares, units = np.array([0.5, 0.9, 0.9, 0.9, 0.9, 0.9]), 6000
    mean, variance = shares.mean(), shares.var(ddof=1) / 6
    few = (stats.t.ppf(0.95, units - 1) / stats.t.ppf(0.95, 5)) ** 2
    for kind, scatter in {"own": variance, "shared": variance + mean * (1 - mean) / units}.items():
        found = intervals.share(shares, (0, 1), 0.5, **{kind: units})
        n = mean * (1 - mean) / scatter * few
        assert 6 < n < 30 and found.units == pytest.approx(n)
        low, high = stats.beta.ppf(0.05, mean * n, n - mean * n + 1), stats.beta.ppf(0.95, mean * n + 1, n - mean * n)
        np.testing.assert_allclose(found.bounds(LEVEL), (low, high))
    by_binomial = np.array([0.8, 0.9, 0.8, 0.9, 0.8, 0.9])  # scatter less than chance would have it
    assert intervals.share(by_binomial, (0, 1), 0.5, own=60).units == 60


def test_images_that_are_seen_count_for_what_they_scatter():
    values = (draws(11, 1, 30) + 0.5 * draws(12, 8, 30) < 1).astype(float)
    joint, p = intervals.crossed(values, None, 0.5), values.mean()
    few = (stats.t.ppf(0.95, 29) / stats.t.ppf(0.95, joint.freedom)) ** 2
    found = intervals.share(values, (0, 1), 0.5)
    assert found.units == pytest.approx(p * (1 - p) / joint.error**2 * few) and 20 < found.units < 240
    pairs = np.repeat(np.arange(15), 2)
    assert intervals.share(np.ones((8, 30)), (0, 1), 0.5, objects=pairs).units == 15
    of_pairs = intervals.share(values[:, pairs], (0, 1), 0.5, objects=pairs)
    assert of_pairs.units < intervals.share(values[:, pairs], (0, 1), 0.5).units


def test_outcomes_in_pairs_are_two_rates():
    values = np.zeros((6, 10))
    values[:, 0] = 1
    mean = intervals.share(values, (-1, 1), 0.1, own=60)
    up, down = (stats.binomtest(hits, 60).proportion_ci(0.95, method="exact") for hits in (6, 0))
    np.testing.assert_allclose(mean.bounds(LEVEL), (up.low - down.high, up.high - down.low))
    shares = intervals.share(values.mean(1), (-1, 1), 0.1, own=60)
    low, high = stats.binomtest(33, 60).proportion_ci(0.9, method="exact")  # .1 is .55 of the way from -1 to 1
    np.testing.assert_allclose(shares.bounds(LEVEL), (2 * low - 1, 2 * high - 1))
    assert shares.bounds(LEVEL)[0] < mean.bounds(LEVEL)[0] < shares.mean
    values[0] = [1, 1, 1, 1, 1, 1, 0, 0, -1, -1]  # one replicate apart from the others
    apart = intervals.share(values, (-1, 1), 0.1, own=60)
    assert apart.units < 60 and apart.turned == pytest.approx((11 / 60, 2 / 60))


@pytest.mark.parametrize("values", [draws(9, 5, 4), draws(9, 8, 1) + draws(10, 8, 30)])
def test_p_and_bounds_are_the_same_decision(values):
    outcomes = (values > 1.5).astype(float) - (values < -1)
    rates = [intervals.share(of, (-1, 1), 0.1, shared=40) for of in (outcomes, outcomes.mean(1))]
    for mean in (intervals.crossed(values, None, 0.1), *rates):
        for alpha in (0.2, 0.05, 0.001):
            low, high = mean.bounds(alpha)
            assert mean.p_above(low) == pytest.approx(alpha, rel=1e-4)
            assert mean.p_below(high) == pytest.approx(alpha, rel=1e-4)


EXPERIMENTS = 1000
SIMULATION_ERROR = 3 * np.sqrt(0.055 * 0.945 / EXPERIMENTS)


def passes(experiments, margin, judge):
    """The shares of experiments in which a mean at the margin is found above it, and one there within the margins."""
    low, high = np.array([judge(values).bounds(LEVEL) for values in experiments]).T
    return (low > margin).mean(), ((-margin < low) & (high < margin)).mean()


@pytest.mark.parametrize(("replicates", "images"), [(5, 5), (5, 30), (10, 48)])
@pytest.mark.parametrize("of_images", [0.0, 1.0, 2.5])  # the part of the images in the scatter, that of replicates is 1
def test_level_of_crossed_claims(replicates, images, of_images):
    rng, margin = np.random.default_rng(replicates + images), 3.0
    shape = (EXPERIMENTS, replicates, images)
    values = margin + rng.normal(size=(EXPERIMENTS, replicates, 1)) + 0.5 * rng.normal(size=shape)
    values += of_images * np.sqrt(images / replicates) * rng.normal(size=(EXPERIMENTS, 1, images))
    found = passes(values, margin, lambda of: intervals.crossed(of, None, margin))
    assert max(found) <= 0.055 + SIMULATION_ERROR and found[0] >= 0.025


@pytest.mark.parametrize("sizes", [[4] * 8, [1, 1, 2, 2, 3, 4, 6, 9]])
def test_level_of_crossed_claims_about_objects(sizes):
    rng, margin, objects = np.random.default_rng(1), 3.0, np.repeat(np.arange(8), sizes)
    values = margin + 0.3 * rng.normal(size=(EXPERIMENTS, 6, 1)) + rng.normal(size=(EXPERIMENTS, 1, 8))[..., objects]
    values = values + 0.5 * rng.normal(size=(EXPERIMENTS, 6, len(objects)))
    found = passes(values, margin, lambda of: intervals.crossed(of, objects, margin))
    assert max(found) <= 0.055 + SIMULATION_ERROR and found[0] >= 0.01


@pytest.mark.parametrize("replicates", [5, 10])
def test_level_of_claims_about_own_images(replicates):
    values = 1 + 0.5 * draws(replicates, EXPERIMENTS, replicates)
    found = passes(values, 1.0, lambda of: intervals.over_replicates(of, 1.0))
    assert max(found) <= 0.055 + SIMULATION_ERROR and found[0] >= 0.03


@pytest.mark.parametrize("margin", [0.5, 0.9, 0.97])
@pytest.mark.parametrize("networks", [0.0, 0.3])  # the scatter of the networks' own rates, on the logit scale
@pytest.mark.parametrize("units", [3, 60])  # of each network
def test_level_of_rates(margin, networks, units):
    rng = np.random.default_rng(units)
    rates = 1 / (1 + np.exp(-(np.log(margin / (1 - margin)) + networks * rng.normal(size=(EXPERIMENTS, 8)))))
    rates += margin - 1 / (1 + np.exp(-(np.log(margin / (1 - margin)) + networks * draws(0, 100_000)))).mean()
    shares = rng.binomial(units, rates.clip(0, 1)) / units
    found = passes(shares, margin, lambda of: intervals.share(of, (0, 1), margin, own=8 * units))
    assert found[0] <= 0.055 + SIMULATION_ERROR
    moved, ends = shares - margin + 0.2, (0.2 - margin, 1.2 - margin)
    found = passes(moved, 0.2, lambda of: intervals.share(of, ends, 0.2, own=8 * units))
    assert max(found) <= 0.055 + SIMULATION_ERROR


@pytest.mark.parametrize("margin", [0.5, 0.9])
@pytest.mark.parametrize("alike", [0.5, 0.9])
def test_level_of_rates_of_images_that_all_replicates_share(margin, alike):
    rng = np.random.default_rng(3)
    easy, own = rng.normal(size=(EXPERIMENTS, 1, 40)), rng.normal(size=(EXPERIMENTS, 8, 40))
    values = (np.sqrt(alike) * easy + np.sqrt(1 - alike) * own < stats.norm.ppf(margin)).astype(float)
    found = passes(values.mean(2), margin, lambda of: intervals.share(of, (0, 1), margin, shared=40))
    assert found[0] <= 0.055 + SIMULATION_ERROR
    seen = passes(values, margin, lambda of: intervals.share(of, (0, 1), margin))
    assert found[0] <= seen[0] <= 0.055 + SIMULATION_ERROR


@pytest.mark.parametrize(("up", "down"), [(0.2, 0.0), (0.25, 0.05), (0.6, 0.4)])
@pytest.mark.parametrize("kind", ["own", "shared"])
def test_level_of_differences_of_rates(up, down, kind):
    """Outcomes -1, 0, 1 of eight networks on 40 images, the same for all or 5 of its own for each."""
    rng, images = np.random.default_rng(2), 40 if kind == "shared" else 5
    drawn = rng.uniform(size=(EXPERIMENTS, 1 if kind == "shared" else 8, images))
    drawn = (drawn + 0.2 * rng.uniform(size=(EXPERIMENTS, 8, images))) % 1  # networks agree on most of them
    values = (drawn < up).astype(float) - (drawn > 1 - down)
    given = {kind: 40}
    cases = [(values, {} if kind == "shared" else given), (values, given), (values.mean(2), given)]
    for judged, units in cases:
        found = passes(judged, 0.2, lambda of, units=units: intervals.share(of, (-1, 1), 0.2, **units))
        assert max(found) <= 0.055 + SIMULATION_ERROR
