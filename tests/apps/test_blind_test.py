"""The blind test: a fair draw, maps that are what they are said to be, and a score that says no more than it can."""

import json
import re
from collections import Counter

import blind_test
import blind_test_page
import numpy as np
import pytest
import torch
from axe_playwright_python.sync_playwright import Axe
from browser import settle
from PIL import Image
from saliency_sanity import edges, saliency
from saliency_sanity.book import models, photographs
from saliency_sanity.book.assets import assets_folder
from scipy import stats

ROOT = assets_folder().parent.parent
OBJECTS = {"photographs": [f"object {i // 3}" for i in range(90)], "clothes": [str(i) for i in range(200)]}
SEEDS = range(150)
CASES = [(k, n) for n in range(1, 9) for k in range(n + 1)]
PHONE = {"width": 390, "height": 844}

# ---------------------------------------------------------------- the draw


def draws() -> list[list[blind_test.Trial]]:
    return [blind_test.draw_trials(seed, OBJECTS) for seed in SEEDS]


def test_the_trials_follow_from_the_seed_alone():
    torch.manual_seed(1)
    first = blind_test.draw_trials(7, OBJECTS)
    torch.manual_seed(2)
    assert blind_test.draw_trials(7, OBJECTS) == first != blind_test.draw_trials(8, OBJECTS)


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_the_design_is_balanced(seed):
    trials = blind_test.draw_trials(seed, OBJECTS)
    scored = [trial for trial in trials if trial.foil != "catch"]
    assert Counter((t.foil, t.method, t.ranks) for t in scored) == {
        (foil, method, ranks): 1
        for foil in ("untrained", "edges")
        for method in blind_test.METHODS
        for ranks in (False, True)
    }
    assert sum(trial.ranks for trial in trials) == 10
    for foil in ("untrained", "edges"):
        mine = [trial for trial in scored if trial.foil == foil]
        assert sorted(Counter(blind_test_page.answer(t._asdict()) for t in mine).values()) == [4, 4]
        assert Counter(trial.pool for trial in mine) == {"photographs": 4, "clothes": 4}
        assert all({trial.left, trial.right} == {"trained", foil} for trial in mine)


@pytest.mark.parametrize("seed", SEEDS[:20])
def test_catch_trials_have_no_right_answer(seed):
    caught = [trial for trial in blind_test.draw_trials(seed, OBJECTS) if trial.foil == "catch"]
    assert sorted((t.left, t.right, t.ranks) for t in caught) == [
        (kind, kind, ranks) for kind in ("trained", "untrained") for ranks in (False, True)
    ]
    for trial in caught:
        assert trial.networks[0] != trial.networks[1] and trial.weights[0] != trial.weights[1]
        assert trial.left == "untrained" or trial.pool == "clothes"  # there is one trained SqueezeNet
        assert blind_test_page.answer(trial._asdict()) is None


def test_every_eligible_image_can_be_drawn_and_no_object_comes_twice():
    drawn = {pool: set() for pool in OBJECTS}
    for trials in draws():
        for pool, names in OBJECTS.items():
            images = [trial.image for trial in trials if trial.pool == pool]
            assert len({names[i] for i in images}) == len(images) == 10
            drawn[pool] |= set(images)
    assert drawn == {pool: set(range(len(names))) for pool, names in OBJECTS.items()}


def test_sides_and_order_give_nothing_away():
    trained = Counter()
    for trials in draws():
        trained.update(number for number, t in enumerate(trials) if t.foil != "catch" and t.left == "trained")
    share = 0.8 / 2  # sixteen of twenty are scored, half of them with the trained network on the left
    assert all(stats.binomtest(trained[i], len(SEEDS), share).pvalue > 1e-4 for i in range(20)), trained


# ---------------------------------------------------------------- the maps


@pytest.fixture(scope="module")
def clothes() -> blind_test.Pool:
    return blind_test.clothes_pool()


def test_eligible_clothes_are_those_that_all_networks_name_right(clothes):
    with torch.no_grad():
        named = torch.stack([network(clothes.images).argmax(1) for network in clothes.trained])
    assert len(clothes.trained) == 8 and (named == clothes.labels).all() and len(clothes.images) > 1000


def test_eligible_photographs_are_those_that_the_network_names_right():
    pool = blind_test.photographs_pool(["brick"])
    found = photographs.composites("brick")
    with torch.no_grad():
        named = torch.cat([pool.trained[0](photographs.normalize(part)) for part in found.images.split(4)]).argmax(1)
    right = named == found.labels
    assert torch.equal(pool.images, found.images[right]) and torch.equal(pool.labels, found.labels[right])
    assert pool.objects == [name for name, keep in zip(found.names, right) if keep]


@pytest.mark.parametrize("method", blind_test.METHODS)
def test_the_maps_are_those_of_the_stated_networks(clothes, method):
    trial = blind_test.Trial("clothes", 5, "catch", method, False, "trained", "trained", (2, 6), (11, 12))
    image, label = clothes.images[[5]], clothes.labels[[5]]
    for seed, shown in zip((2, 6), blind_test.shown(trial, clothes)):
        maps = saliency.METHODS[method](models.load("cnn_clothes", seed=seed), image, label)
        torch.testing.assert_close(shown, maps.sum(1).abs()[0])
    left, right = blind_test.shown(trial._replace(left="edges", right="untrained"), clothes)
    assert torch.equal(left, edges.sobel(image)[0])
    fresh = blind_test.untrained(clothes.trained[6], 12)
    torch.testing.assert_close(right, saliency.METHODS[method](fresh, image, label).sum(1).abs()[0])


def test_an_untrained_network_keeps_no_trained_weight(clothes):
    trained = clothes.trained[0]
    fresh, other = (blind_test.untrained(trained, seed).state_dict() for seed in (1, 2))
    for name, tensor in trained.state_dict().items():
        assert not torch.isclose(tensor, fresh[name]).all() and not torch.equal(fresh[name], other[name])


def test_a_photograph_is_explained_as_the_network_reads_it():
    pool = blind_test.photographs_pool(["grey"])
    trial = blind_test.Trial("photographs", 3, "untrained", "gradient", False, "trained", "untrained", (5, 1), (1, 2))
    shown = blind_test.shown(trial, pool)[0]
    maps = saliency.gradient(pool.trained[0], photographs.normalize(pool.images[[3]]), pool.labels[[3]])
    torch.testing.assert_close(shown, maps.sum(1).abs()[0])


def test_ranked_maps_have_equal_histograms_and_keep_the_order():
    skewed, tied = torch.rand(28, 28) ** 9, (torch.rand(28, 28) > 0.7).float()
    ranked = [blind_test.levels(values, ranks=True) for values in (skewed, tied)]
    counts = [torch.bincount(grey.flatten().long(), minlength=256) for grey in ranked]
    assert torch.equal(*counts) and counts[0].min() >= 3 and counts[0].max() <= 4
    assert stats.spearmanr(ranked[0].flatten(), skewed.flatten()).statistic > 0.999
    assert ranked[1][tied == 1].min() >= ranked[1][tied == 0].max()


def test_maps_at_their_own_scale_are_proportional_below_the_clip():
    values = torch.rand(50, 50)
    grey = blind_test.levels(values, ranks=False)
    limit = np.quantile(values.numpy(), 0.99)
    assert np.abs(grey.numpy() - np.clip(values.numpy() / limit, 0, 1) * 255).max() <= 0.51
    assert blind_test.levels(torch.zeros(4, 4), ranks=False).max() == 0


# ---------------------------------------------------------------- the page


@pytest.fixture(scope="module")
def about(html) -> dict:
    """The trials of the built page, whose pictures are beside it."""
    latest = max((html.parent / "made/blind_test").iterdir(), key=lambda path: path.stat().st_mtime)
    return json.loads((latest / "trials.json").read_text(encoding="utf-8"))


def test_the_page_shows_the_published_draw(about, clothes, html):
    names = blind_test.photographs_pool().objects
    trials = blind_test.draw_trials(blind_test.SEED, {"photographs": names, "clothes": clothes.objects})
    for written, trial in zip(about["trials"], trials, strict=True):
        assert blind_test.Trial(**{key: written[key] for key in trial._fields})._asdict() == {
            **trial._asdict(), "networks": list(trial.networks), "weights": list(trial.weights)
        }  # fmt: skip
    for written, trial in zip(about["trials"], trials):
        if trial.pool == "clothes":
            maps = blind_test.shown(trial, clothes)
            for side, (name, values) in enumerate(zip(("left", "right"), maps)):
                picture = Image.open(html / "blind_test" / written["pictures"][name])
                grey = blind_test.levels(values, ranks=trial.ranks, seed=side).numpy().astype(int)
                assert np.abs(np.asarray(picture).astype(int) - grey).max() <= 1


@pytest.fixture
def visit(browser, site):
    """Open the landing page in a fresh context; `page.asked` lists all requests after it was loaded."""
    contexts = []

    def open_page(**options):
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        page = context.new_page()
        page.goto(site + "book/index.html")
        settle(page)
        page.asked = []
        page.on("request", lambda request: page.asked.append(request.url))
        return page

    yield open_page
    for context in contexts:
        context.close()


def play(page, answers: list[str], *, keyboard: bool = False) -> None:
    """Answer all pairs; an answer is the value of a radio button, such as "left 3"."""
    order = [f"{side} {sure}" for side in ("left", "right") for sure in (3, 2, 1)] + ["none 0"]
    if keyboard:
        page.locator("#blind-test fieldset:not([hidden]) input").first.focus()
    for answer in answers:
        if keyboard:
            page.keyboard.press("Space")
            for _ in range(order.index(answer)):
                page.keyboard.press("ArrowDown")
            assert page.evaluate("document.activeElement.value") == answer
            page.keyboard.press("Enter")
        else:
            page.locator(f"#blind-test fieldset:not([hidden]) label:has(input[value='{answer}'])").click()
            page.locator("#blind-test button[type=submit]").click()


def answers_for(trials: list[dict], right: int) -> list[str]:
    """The first `right` pairs of each foil right, the others wrong, the catch pairs "left, certain"."""
    seen, answers = Counter(), []
    for trial in trials:
        correct = blind_test_page.answer(trial)
        seen[trial["foil"]] += 1
        wrong = {"left": "right", "right": "left", None: "left"}[correct]
        answers.append(f"{correct if correct and seen[trial['foil']] <= right else wrong} {3 if not correct else 2}")
    return answers


def scores(page) -> dict[str, str]:
    page.locator("#blind-test-results").wait_for()
    found = page.locator("#blind-test-results .score").all()
    return {score.get_attribute("data-foil"): re.sub(r"\s+", " ", score.inner_text()) for score in found}


@pytest.mark.parametrize("right", [8, 6, 0])
@pytest.mark.parametrize("keyboard", [False, True])
def test_the_score_is_that_of_scipy(visit, about, right, keyboard):
    page = visit()
    play(page, answers_for(about["trials"], right), keyboard=keyboard)
    found = scores(page)
    low, high = stats.binomtest(right, 8).proportion_ci(0.95, method="exact")
    for foil in ("untrained", "edges"):
        assert f"{right} right of 8 answered, 95 % interval {100 * low:.0f} % to {100 * high:.0f} %" in found[foil]
        tail, chance = (
            ("fewer", stats.binom.cdf(0, 8, 0.5)) if right == 0 else ("more", stats.binom.sf(right - 1, 8, 0.5))
        )
        luck = 1000 * chance
        tries = f"{luck / 10:.0f} of 100" if luck >= 10 else f"{luck:.0f} of 1000"
        assert f"gets {right} or {tail} of 8 right in {tries} tries" in found[foil]
        meaning = "above" if low > 0.5 else "below" if high < 0.5 else "includes"
        assert re.search(rf"interval (lies )?{meaning} 50 %", found[foil])
    assert "“Can’t tell”: 0 of 4. You named a side in 4 (left 4, right 0)" in found["catch"]
    rows = page.locator("#blind-test-results .sureness tbody tr").all_inner_texts()
    assert [row.split("\t") for row in rows] == [
        ["certain", "0 of 0", "4"], ["fairly sure", f"{2 * right} of 16", "0"], ["a guess", "0 of 0", "0"]
    ]  # fmt: skip
    assert page.evaluate("document.activeElement.closest('section').id") == "blind-test-results"
    assert page.locator("#blind-test-results > .pair img").count() == 3


def test_who_cannot_tell_is_not_scored(visit):
    page = visit()
    play(page, ["none 0"] * 20)
    found = scores(page)
    for foil in ("untrained", "edges"):
        assert "0 right of 0 answered; “can’t tell”: 8." in found[foil] and "nothing to score" in found[foil]
    assert "“Can’t tell”: 4 of 4. Here that was the only right answer." in found["catch"]
    assert "NaN" not in page.locator("#blind-test-results").inner_text()


def test_interval_and_chance_are_those_of_scipy_for_every_count(visit):
    page = visit()
    found = page.evaluate(
        "cases => cases.map(([k, n]) => [...blindTest.interval(k, n), blindTest.atLeast(k, n, .5)])", CASES
    )
    for (k, n), got in zip(CASES, found, strict=True):
        expected = [*stats.binomtest(k, n).proportion_ci(0.95, method="exact"), stats.binom.sf(k - 1, n, 0.5)]
        np.testing.assert_allclose(got, expected, atol=1e-9)
    needed = page.evaluate("[...Array(9).keys()].map(blindTest.needed)")
    for n, k in enumerate(needed):
        above = [i for i in range(n + 1) if n and stats.binomtest(i, n).proportion_ci(0.95, method="exact").low > 0.5]
        assert k == (min(above) if above else None)


def test_the_sheet_says_what_the_binomial_says():
    text = " ".join((ROOT / "book/blind_test_sheet.md").read_text(encoding="utf-8").split())
    assert "six or more of eight about once in seven tries" in text and round(1 / stats.binom.sf(5, 8, 0.5)) == 7
    clear = [k for k in range(9) if not (ci := stats.binomtest(k, 8).proportion_ci(0.95, "exact")).low < 0.5 < ci.high]
    assert "only eight of eight (or none)" in text and clear == [0, 8]


def test_no_feedback_before_the_end(visit, about):
    page = visit()
    for number, answer in enumerate(answers_for(about["trials"], 4), start=1):
        assert page.locator("#blind-test fieldset:visible").count() == 1
        assert page.locator("#blind-test-results").is_hidden()
        pair = page.locator("#blind-test fieldset:visible")
        assert pair.locator("legend").inner_text().startswith(f"Pair {number} of 20")
        words = pair.evaluate("e => e.outerHTML.replace(/which map comes from the trained network/, '')")
        assert not re.search("trained|random|edge|sobel|gradient|backprop|catch|foil|correct", words, re.IGNORECASE)
        pair.locator(f"label:has(input[value='{answer}'])").click()
        page.locator("#blind-test button[type=submit]").click()
    assert page.locator("#blind-test-results").is_visible()


def test_a_pair_must_be_answered_and_can_be_changed(visit):
    page = visit()
    following = page.locator("#blind-test button[type=submit]")
    following.click()
    assert page.locator("#blind-test output").inner_text() == "1 of 20"
    play(page, ["left 3", "none 0"])
    page.locator("#blind-test button", has_text="Back").click()
    page.locator("#blind-test button", has_text="Back").click()
    assert page.evaluate("document.activeElement.value") == "left 3"
    play(page, ["right 1"])
    page.locator("#blind-test button", has_text="Back").click()
    assert page.evaluate("document.activeElement.value") == "right 1"


def test_nothing_is_stored_or_asked_for(visit):
    page = visit()
    stored = "[{...localStorage}, {...sessionStorage}, document.cookie, location.href]"
    before = page.evaluate(stored)
    play(page, ["left 1"] * 20)
    scores(page)
    assert page.evaluate(stored) == before and before[2] == "" and page.asked == []
    assert page.context.cookies() == []
    page.reload()
    settle(page)
    assert page.locator("#blind-test :checked").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_played_on_a_phone_by_touch(visit, about, scheme):
    page = visit(viewport=PHONE, has_touch=True, is_mobile=True, color_scheme=scheme)
    for answer in answers_for(about["trials"], 8):
        choice = page.locator(f"#blind-test fieldset:not([hidden]) label:has(input[value='{answer}'])")
        box = choice.bounding_box()
        assert box["height"] >= 36 and box["x"] >= 0 and box["x"] + box["width"] <= PHONE["width"]
        choice.tap()
        page.locator("#blind-test button[type=submit]").tap()
    assert "8 right of 8" in scores(page)["edges"]
    page.locator("#blind-test-results summary").tap()
    for trial, pair in zip(about["trials"], page.locator("#blind-test-results fieldset").all(), strict=True):
        answer = blind_test_page.answer(trial)
        said = f"You said “{answer}, fairly sure” (right)." if answer else "You said “left, certain”."
        assert pair.locator("p").inner_text() == f"{blind_test_page._told(trial)} {said}"
    assert page.locator("#blind-test-results fieldset:visible").count() == 20
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_step_is_accessible(visit, scheme):
    page = visit(color_scheme=scheme)
    violations = []
    for answers in (["left 1"] * 3, ["right 2"] * 17):
        play(page, answers)
        if page.locator("#blind-test").is_visible():
            page.locator("#blind-test fieldset:not([hidden]) label").first.click()
        else:
            page.locator("#blind-test-results summary").click()
        violations += Axe().run(page).response["violations"]
    assert [v["id"] for v in violations if v["impact"] in ("serious", "critical")] == []


def test_without_scripts_the_first_pair_and_the_sheet_are_there(visit, browser, site):
    page = visit(java_script_enabled=False)
    assert page.locator("#blind-test fieldset:visible").count() == 1
    assert page.locator("#blind-test fieldset:visible img").count() == 3
    assert not page.locator("#blind-test button").first.is_visible()
    page.locator("#blind-test noscript a").click()
    assert page.locator(".blind-sheet li:visible").count() == 20
    assert page.locator(".blind-key tbody tr:visible").count() == 20


def test_the_sheet_has_the_same_pairs_and_their_answers(visit, about, site):
    page = visit()
    page.goto(site + "book/blind_test_sheet.html")
    settle(page)
    sources = page.eval_on_selector_all(".blind-sheet img", "all => all.map(i => i.src.split('/').pop())")
    assert sources == [trial["pictures"][part] for trial in about["trials"] for part in ("image", "left", "right")]
    key = page.locator(".blind-key tbody tr td:nth-child(2)").all_inner_texts()
    assert key == [blind_test_page.answer(trial) or "can’t tell" for trial in about["trials"]]


def test_the_sheet_prints_on_few_pages(visit, site):
    page = visit()
    page.goto(site + "book/blind_test_sheet.html")
    settle(page)
    printed = page.pdf(format="A4")
    assert 3 <= len(re.findall(rb"/Type\s*/Page\b", printed)) <= 7


def test_the_test_is_light(html):
    files = list((html / "blind_test").iterdir())
    assert sum(path.stat().st_size for path in files) < 600_000
