"""The card of a claim as a figure: one axis for all parts, what it says in words, and cards of earlier runs."""

import re
from html import escape
from xml.etree import ElementTree

import pytest
from saliency_sanity import saliency
from saliency_sanity.book.claims import card


def finding(name="", outcome="holds", expected="holds", **fields) -> dict:
    return {
        "name": name, "outcome": outcome, "expected": expected, "p_value": 0.01, "p_bound": False, "mean": 0.5,
        "interval": [0.45, 0.55], "scatter": True, "replicates": [0.4, 0.5, 0.5, 0.5, 0.6], "unit": "images",
        "units": 64, "undefined": 0,
    } | fields  # fmt: skip


def claim(*findings, **fields) -> dict:
    return {
        "id": "a-claim", "title": "A title", "statement": "More is more.", "chapter": "one", "test": "above",
        "source": "adebayo2018sanity, section 4", "margin": 0.3, "replicated": "training seeds",
        "findings": list(findings),
    } | fields  # fmt: skip


def earlier(**fields) -> dict:
    """A finding as it was stored before there was one interval."""
    old = {
        "name": "", "outcome": "holds", "expected": "holds", "p_value": 1 / 4001, "mean": 0.5,
        "replicate_interval": [0.45, 0.55], "image_interval": [0.44, 0.56], "replicates": [0.4, 0.5, 0.5, 0.5, 0.6],
        "images": 64, "undefined": 0,
    }  # fmt: skip
    return old | fields


def picture(html: str) -> ElementTree.Element:
    """The one picture of a card, as a tree: it is well-formed."""
    [svg] = re.findall(r'<svg role="img".*</svg>', html)
    return ElementTree.fromstring(svg)


def words(html: str) -> str:
    return re.sub(r"<[^>]+>", "", re.sub(r"<style>.*?</style>", "", html)).replace("&nbsp;", " ")


def test_all_parts_share_one_axis():
    one, two = finding("one"), finding("two", replicates=[0.0, 0.1, 0.1, 0.1, 0.2], interval=[0.05, 0.15], mean=0.1)
    svg = picture(card.figure(claim(one, two)))
    dots = {float(dot.get("cx").rstrip("%")) for dot in svg.iter("circle")}
    limits = {line.get("x1") for line in svg.iter("line") if line.get("class") == "claim-margin"}
    assert len(dots) == 6 and len(limits) == 1
    places = sorted(dots)  # 0, .1, .2, .4, .5, .6
    step = places[1] - places[0]
    assert [round((place - places[0]) / step) for place in places] == [0, 1, 2, 4, 5, 6]
    assert float(limits.pop().rstrip("%")) == pytest.approx(places[0] + 3 * step, abs=0.1)


def test_zero_margin_and_interval_are_labelled_with_numbers():
    html = card.figure(claim(finding()))
    labels = [text.text for text in picture(html).iter("text")]
    assert "0" in labels and "margin 0.3" in labels
    assert "0.500 [0.450, 0.550]" in words(html)
    both = card.figure(claim(finding(), test="equivalent"))
    assert "margin ±0.3" in [text.text for text in picture(both).iter("text")]
    assert both.count('class="claim-margin"') == 2


@pytest.mark.parametrize("low, high", [(-0.02, 0.0), (0.0, 0.0), (1e-6, 2e-6), (-3.0, 900.0), (-0.5, 0.1)])
def test_every_place_is_on_the_axis_and_few_numbers_label_it(low, high):
    values = [low, high, low, high, low]
    html = card.figure(claim(finding(replicates=values, interval=[low, high], mean=(low + high) / 2), margin=0.0))
    svg = picture(html)
    places = [float(value.rstrip("%")) for one in svg.iter() for name in ("x", "x1", "x2", "cx")
              if (value := one.get(name, "")).endswith("%")]  # fmt: skip
    assert places and all(0 <= place <= 100 for place in places)
    numbers = [text.text for text in svg.iter("text") if text.get("class") is None]
    assert "0" in numbers and len(numbers) == len(set(numbers)) <= 6


@pytest.mark.parametrize("outcome, kind, sign", [
    ("holds", "holds", "✓"), ("contradicted here", "contradicted", "✗"), ("undecided", "undecided", "?"),
])  # fmt: skip
def test_an_outcome_is_said_in_a_word_a_sign_and_a_colour_of_its_own(outcome, kind, sign):
    html = card.figure(claim(finding(outcome=outcome, expected=outcome)))
    assert f'class="claim-card claim-{kind}"' in html and f"{sign} {outcome} = as expected" in words(html)
    assert f".claim-card .claim-{kind} {{" in card.style()
    squares = len([1 for one in picture(html).iter("rect") if one.get("width") == "6"])
    assert squares == (5 if kind == "contradicted" else 0)


def test_whether_it_was_expected_is_a_mark_of_its_own():
    assert "✓ holds ≠ NOT as expected: undecided" in words(card.figure(claim(finding(expected="undecided"))))
    one, two = finding("one"), finding("two", outcome="undecided")
    several = words(card.figure(claim(one, two, finding("three"))))
    assert "✓ 2 hold ? 1 undecided ≠ 1 of 3 NOT as expected" in several and "two (expected: holds)" in several
    assert "✓ all 3 parts hold = as expected" in words(card.figure(claim(one, one, one)))
    assert "✓ both parts hold" in words(card.figure(claim(one, one)))


def test_the_picture_is_described():
    html = card.figure(claim(finding("ssim"), finding("hog", interval=[0.2, 0.4]), finding("low", interval=[0, 0.1])))
    label = picture(html).get("aria-label")
    assert "SSIM: 5 dots from 0.400 to 0.600; interval 0.450 to 0.550, above the margin." in label
    assert "across the margin" in label and "below the margin" in label and "margin 0.3 marked" in label


def test_what_a_claim_says_is_no_html():
    bad = "<script>alert('x')</script> & \"more\""
    one = finding(bad)
    html = card.figure(claim(one, title=bad, statement=bad, source=f"{bad}, {bad}", replicated=bad, id=bad))
    assert "<script" not in html and html.count(escape(bad)) >= 6
    picture(html)


def test_the_source_is_a_link_to_the_reference():
    html = card.figure(claim(finding()))
    assert f'<a href="{card.BOOK}bibliography.html#cite-adebayo2018sanity">Adebayo, 2018</a>, section 4' in html
    near = card.figure(claim(finding()), book="../", cited="Adebayo et al., 2018")
    assert '<a href="../bibliography.html#cite-adebayo2018sanity">Adebayo et al., 2018</a>' in near
    assert f'href="{card.BOOK}scorecard.html#claim-a-claim"' in html
    own = card.figure(claim(finding(), source="this book, Cascading"))
    assert '<p class="claim-source">This book, Cascading</p>' in own


@pytest.mark.parametrize("fields, said", [
    ({"p_value": 1 / 4001, "p_bound": True}, "p ≤ 0.00025"), ({"p_value": 0.031}, "p = 0.031"),
    ({"p_value": 1e-17}, "p < 0.0001"),
    ({"scatter": False, "interval": None, "p_value": 1 / 32, "p_bound": True}, "all replicates are equal, p ≤ 0.031"),
])  # fmt: skip
def test_a_p_value_is_no_more_exact_than_it_is(fields, said):
    assert card.p_value(finding(**fields)) == said
    assert escape(said) in card.figure(claim(finding(**fields))) or said in card.figure(claim(finding(**fields)))


def test_no_scatter_is_said():
    html = card.figure(claim(finding(replicates=[0.5] * 5, interval=None, scatter=False)))
    assert "0.500 no scatter" in words(html) and "no scatter over 5 training seeds" in words(html)
    assert "no scatter, above the margin" in picture(html).get("aria-label")


def test_details_are_folded():
    one = finding(undefined=3, adjusted=0.07)
    shown, _, folded = card.figure(claim(one)).partition("<details>")
    assert "90&nbsp;% interval 0.450 to 0.550 over 5 training seeds and 64 images" in folded
    assert "3 values were undefined and scored both ways" in folded
    assert "after Holm 0.07, which no longer holds" in folded and "p =" not in shown


def test_a_card_of_an_earlier_run_is_drawn():
    html = card.html(claim(earlier()))
    assert "over 5 training seeds, 0.440 to 0.560 over 64 images; p ≤ 0.00025" in words(html)
    same = earlier(replicates=[0.5] * 5, replicate_interval=[0.5, 0.5], image_interval=None, images=0, p_value=0.0)
    assert "no scatter" in words(card.html(claim(same))) and "p =" not in words(card.html(claim(same)))


def test_a_card_needs_nothing_but_itself():
    html = card.html(claim(finding()))
    assert html.startswith("<style>") and "\n" not in html and "url(" not in html and "<script" not in html
    assert html.endswith("</div>") and html.count("<div") == html.count("</div>")


def test_parts_are_called_what_people_call_them():
    assert card.words("input_x_gradient, spearman_abs") == "Input × Gradient, unsigned ranks"
    assert card.words("late: guided backprop") == "late: Guided Backprop" and card.words("gradients") == "gradients"
    for key, title in saliency.TITLES.items():
        assert card.words(key) == title or "_" not in key
