"""Claims: intervals against scipy, outcomes on data where the truth is known, the ledger itself."""

import json
from pathlib import Path

import numpy as np
import pytest
from saliency_sanity.book import claims
from scipy import stats

ROOT = Path(__file__).parents[2]


@pytest.fixture
def ledger(monkeypatch, tmp_path):
    """A ledger of one claim of each kind."""
    path = tmp_path / "claims.yml"
    path.write_text(
        """
- {id: more, statement: More., source: {key: a, where: b}, chapter: c, test: above, margin: 0.1, expected: holds}
- {id: same, statement: Same., source: {key: a, where: b}, chapter: c, test: equivalent, margin: 0.1, expected: holds}
- {id: less, statement: Less., source: {key: a, where: b}, chapter: c, test: above, margin: 0.1,
   expected: contradicted here}
- {id: both, statement: Both., source: {key: a, where: b}, chapter: c, test: above, margin: 0.1,
   parts: {one: holds, two: contradicted here}}
"""
    )
    monkeypatch.setattr(claims, "LEDGER", path)
    monkeypatch.delenv("SANITY_STRICT", raising=False)
    claims.ledger.cache_clear()
    yield
    claims.ledger.cache_clear()


def around(mean, spread=0.02, shape=(8, 20), seed=0):
    return np.random.default_rng(seed).normal(mean, spread, shape)


@pytest.mark.parametrize(
    ("claim", "mean", "outcome"),
    [
        ("more", 0.3, "holds"),
        ("more", 0.0, "contradicted here"),
        ("more", 0.1, "undecided"),
        ("same", 0.0, "holds"),
        ("same", 0.3, "contradicted here"),
        ("same", -0.3, "contradicted here"),
        ("same", 0.1, "undecided"),
    ],
)
@pytest.mark.parametrize("shape", [(8, 20), (8,)])
def test_outcomes_where_the_truth_is_known(ledger, claim, mean, outcome, shape):
    values = around(mean, shape=shape)
    if outcome == "undecided":
        values += mean - values.mean()
    (finding,) = claims.check(claim, values, replicated="seeds").findings
    assert finding.outcome == outcome


def test_the_interval_over_replicates_is_scipys(ledger):
    values = around(0.3)
    (finding,) = claims.check("more", values, replicated="seeds").findings
    means = values.mean(1)
    expected = stats.t.interval(0.9, len(means) - 1, means.mean(), stats.sem(means))
    np.testing.assert_allclose(finding.replicate_interval, expected)
    one_sided = stats.ttest_1samp(means, 0.1, alternative="greater").pvalue
    assert finding.p_value >= one_sided


def test_two_one_sided_tests_agree_with_scipy(ledger):
    values = around(0.05, shape=(8,), spread=0.06)
    (finding,) = claims.check("same", values, replicated="seeds").findings
    lower = stats.ttest_1samp(values, -0.1, alternative="greater").pvalue
    upper = stats.ttest_1samp(values, 0.1, alternative="less").pvalue
    assert finding.p_value == pytest.approx(max(lower, upper))
    assert (finding.outcome == "holds") == (finding.p_value < 0.05)


def test_images_of_one_object_are_resampled_together(ledger):
    values = np.repeat(around(0.3, 0.3, (8, 5)), 20, axis=1)  # 5 objects, 20 copies of each
    alone = claims.check("more", values, replicated="seeds").findings[0].image_interval
    objects = np.repeat(np.arange(5), 20)
    together = claims.check("more", values, replicated="seeds", objects=objects).findings[0].image_interval
    assert np.ptp(together) > 2 * np.ptp(alone)


def test_one_bad_group_of_images_keeps_a_claim_undecided(ledger):
    values = around(0.3)
    values[:, :8] -= 0.6  # every seed agrees, the images do not
    (finding,) = claims.check("more", values, replicated="seeds").findings
    assert finding.outcome != "holds"


def test_undefined_differences_must_not_decide(ledger):
    values = around(0.3)
    values[:, 0] = np.nan
    few = claims.check("more", values, replicated="seeds").findings[0]
    assert few.outcome == "holds" and few.undefined == 8
    values[:, :12] = np.nan
    assert claims.check("more", values, replicated="seeds").findings[0].outcome == "undecided"


def test_parts_have_outcomes_of_their_own(ledger):
    card = claims.check("both", {"one": around(0.3), "two": around(0.0)}, replicated="seeds")
    assert [f.outcome for f in card.findings] == ["holds", "contradicted here"] and card.as_expected


def test_identical_replicates(ledger):
    (finding,) = claims.check("more", np.full((5, 4), 0.3), replicated="seeds").findings
    assert finding.outcome == "holds" and finding.replicate_interval == (0.3, 0.3)


def test_strict_mode_raises_and_a_reader_gets_a_card(ledger, monkeypatch):
    card = claims.check("more", around(0.0), replicated="seeds")
    assert not card.as_expected and "NOT as expected" in card._repr_mimebundle_()["text/html"]
    monkeypatch.setenv("SANITY_STRICT", "1")
    with pytest.raises(claims.ClaimError, match="contradicted here"):
        claims.check("more", around(0.0), replicated="seeds")
    assert claims.check("less", around(0.0), replicated="seeds").as_expected


def test_the_card_can_be_read_back(ledger):
    card = claims.check("both", {"one": around(0.3), "two": around(0.0)}, replicated="seeds")
    stored = json.loads(json.dumps(card._repr_mimebundle_()[claims.MIME]))
    assert stored["id"] == "both" and stored["findings"][1]["outcome"] == "contradicted here"
    assert card._repr_mimebundle_()["text/html"].count("<circle") == 16


@pytest.mark.parametrize(
    ("claim", "differences", "message"),
    [
        ("nothing", np.ones((5, 3)), "unknown claim 'nothing'; known: more, same"),
        ("more", np.ones((4, 3)), "at least 5 replicates"),
        ("more", np.ones((5, 3, 2)), "shape"),
        ("both", {"one": np.ones((5, 3))}, "has the parts"),
        ("more", {"one": np.ones((5, 3))}, "has the parts"),
    ],
)
def test_bad_input(ledger, claim, differences, message):
    with pytest.raises(ValueError, match=message):
        claims.check(claim, differences, replicated="seeds")


def test_objects_must_fit_the_images(ledger):
    with pytest.raises(ValueError, match="one object an image"):
        claims.check("more", around(0.3), replicated="seeds", objects=[0, 1])


def test_intervals_cover_as_often_as_they_say(ledger):
    """Of 400 experiments with a true difference at the margin, about one in twenty 'holds'."""
    values = np.random.default_rng(0).normal(0.1, 0.1, (400, 10))
    held = [claims.check("more", v, replicated="seeds").findings[0].outcome == "holds" for v in values]
    assert 0.02 < np.mean(held) < 0.09


def test_the_ledger_of_the_book():
    entries = claims.ledger().values()
    bibliography = (ROOT / "book" / "references.bib").read_text()
    for entry in entries:
        assert set(entry) - {"expected", "parts"} == {
            "id",
            "statement",
            "source",
            "chapter",
            "test",
            "margin",
        }
        assert entry["test"] == "above" or (entry["test"] == "equivalent" and entry["margin"] > 0)
        outcomes = list((entry.get("parts") or {"": entry["expected"]}).values())
        assert outcomes and set(outcomes) <= {claims.HOLDS, claims.CONTRADICTED}
        chapter = ROOT / "notebooks" / f"{entry['chapter']}.ipynb"
        assert chapter.exists(), entry["id"]
        assert f'\\"{entry["id"]}\\"' in chapter.read_text(), f"{entry['id']} is not checked in its chapter"
        key = entry["source"]["key"]
        assert key == "this book" or f"{{{key}," in bibliography, entry["id"]
