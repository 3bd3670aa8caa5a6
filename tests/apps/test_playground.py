"""The playground in its page: its numbers are torch's and scipy's, and it does what it says."""

import json
from contextlib import contextmanager

import numpy as np
import playground as served
import pytest
import torch
from browser import settle
from saliency_sanity import saliency, similarity
from saliency_sanity.book import data, models
from scipy import stats

PAGE = "book/playground.html"
LAYERS = ["logits", "fc1", "conv2", "conv1"]
READY = "#playground[aria-busy=false]"
UNSEEN = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
ANSWERS = """form => JSON.stringify(form.shown.results.slice(0, 3).map(
    ({net, logits, probabilities, seen, target, maps}) => ({
        logits: [...logits], probabilities, seen, target,
        maps: Object.fromEntries(Object.entries(maps).map(([name, map]) => [name, [...map]])),
        numbers: Object.fromEntries(engine.LAYERS.flatMap(({name}) =>
            ["weight", "bias"].map(part => [`${name}.${part}`, [...net[name][part]]]))),
    })))"""


@contextmanager
def visiting(browser, site):
    """Open the playground in new contexts and wait until it is up to date; nothing may go wrong on the way."""
    contexts, problems = [], []

    def opened(address=site + PAGE, *, ready=READY, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((site, "file:", "data:")) else None)
        page.goto(address)
        page.wait_for_selector(ready)
        settle(page)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def visit(browser, site):
    with visiting(browser, site) as opened:
        yield opened


@pytest.fixture(scope="module")
def lasting(browser, site):
    """One page for tests that do not mind what was done to it before."""
    with visiting(browser, site) as opened:
        yield opened()


@pytest.fixture
def page(visit):
    return visit()


def switch(page, *layers):
    """Make these layers random, and no others."""
    for layer in LAYERS:
        page.set_checked(f"input[value={layer}]", layer in layers)
    settle(page)


def choose(page, name):
    page.check(f"input[value={name}]")
    page.wait_for_selector(f"#playground[data-set={name}]")
    settle(page)


def shown(page, path):
    """A part of the numbers behind the page."""
    return page.eval_on_selector("#playground", f"form => form.shown.{path}")


def answers(page):
    """Networks, logits and maps of the trained network and of two draws."""
    return json.loads(page.eval_on_selector("#playground", ANSWERS))


def image(page):
    picture = page.eval_on_selector("#playground", "form => [...form.shown.image]")
    return torch.tensor(picture).view(1, 1, 28, 28)


def in_torch(numbers):
    """The network with these parameters."""
    model = models.cnn()
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    model.load_state_dict({name: torch.tensor(numbers[name]).view(shape) for name, shape in shapes.items()})
    return model.eval()


def assert_close(found, expected):
    """Equal to 1e-4 of the largest |expected|."""
    expected = expected.detach().double().flatten()
    limit = 1e-4 * max(expected.abs().max().item(), 1e-12)
    assert (torch.tensor(found).double().flatten() - expected).abs().max().item() <= limit


# ---------------------------------------------------------------- the numbers


@pytest.mark.parametrize(
    "layers", [[], ["logits"], ["conv1"], LAYERS], ids=lambda layers: "+".join(layers) or "trained"
)
@pytest.mark.parametrize("name", served.SETS)
def test_numbers_agree_with_torch(lasting, name, layers):
    choose(lasting, name)
    lasting.locator("[data-part=samples] button").nth(5).click()
    switch(lasting, *layers)
    picture = image(lasting)
    assert torch.equal(picture, data.load(name).images[served.samples(name)[5]][None])
    trained = models.load(f"cnn_{name}")
    for column, answer in enumerate(answers(lasting)):
        model = in_torch(answer["numbers"])
        changed = {
            key.partition(".")[0] for key, own in model.state_dict().items() if not own.equal(trained.state_dict()[key])
        }
        assert changed == (set(layers) if column else set())
        logits = model(picture)
        assert_close(answer["logits"], logits)
        assert_close(answer["probabilities"], logits.softmax(1))
        assert answer["seen"] == logits.argmax()
        target = torch.tensor([answer["target"]])
        for method in served.METHODS:
            assert_close(answer["maps"][method], saliency.METHODS[method](model, picture, target))


def test_training_digits_are_centred_as_drawings_are():
    digits = data.load("digits", "train").images[:, 0]
    places = torch.arange(28) + 0.5
    for axis in (1, 2):
        centre = (digits.sum(3 - axis) * places).sum(1) / digits.sum((1, 2))
        assert abs(centre.mean() - 14) < 0.6
    height, width = ((digits > 0).any(axis).sum(1) for axis in (2, 1))
    assert (torch.maximum(height, width) == 20).float().mean() > 0.95


# ---------------------------------------------------------------- unlike the training data


@pytest.mark.parametrize("name", served.SETS)
def test_the_limits_are_those_of_the_training_data(name):
    known, flat = served.training_images(name), data.load(name, "train").images.flatten(1).double().numpy()
    variances, vectors = np.linalg.eigh(np.cov(flat.T))
    variances[: -served.COMPONENTS] = variances[: -served.COMPONENTS].mean()
    precision = vectors / variances @ vectors.T
    centred = flat - flat.mean(0)
    distances = np.sqrt((centred @ precision * centred).mean(1))
    assert known.distance(torch.from_numpy(flat).float()) == pytest.approx(torch.from_numpy(distances), abs=2e-3)
    low, high = known.limits
    typical = ((low <= distances) & (distances <= high)).mean()
    assert typical == pytest.approx(served.TYPICAL[1] - served.TYPICAL[0], abs=0.003)
    assert np.sqrt((distances**2).mean()) == pytest.approx(1, abs=1e-3)


def test_the_page_says_what_is_unlike_the_training_data(page):
    known = served.training_images("digits")
    others = torch.stack([UNSEEN, data.load("clothes").images[0], data.load("digits").images[0]])
    found = page.evaluate(
        """images => {
            const training = playgroundData.digits.training;
            const [mean, components] = [training.mean, training.components].map(engine.halves);
            return images.map(image => engine.distance(Float32Array.from(image), {...training, mean, components}));
        }""",
        others.flatten(1).tolist(),
    )
    assert found == pytest.approx(known.distance(others).tolist(), rel=1e-4)
    low, high = known.limits
    unlike = page.locator("[data-part=unlike]")
    assert low <= shown(page, "distance") <= high and unlike.inner_text() == ""
    scribble(page, [(0.1 + 0.05 * i, (i % 2) * 0.8 + 0.1) for i in range(17)])
    assert shown(page, "distance") > high and "Unlike the training data" in unlike.inner_text()
    page.click("[data-part=clear]")
    scribble(page, [(0.5, 0.5)])  # a blot
    assert shown(page, "distance") < low and "Unlike the training data" in unlike.inner_text()


# ---------------------------------------------------------------- the page


def scribble(page, points):
    """Draw with the mouse; points are shares of the paper's sides."""
    paper = page.locator("[data-part=paper]")
    paper.scroll_into_view_if_needed()
    box = paper.bounding_box()
    places = [(box["x"] + u * box["width"], box["y"] + v * box["height"]) for u, v in points]
    page.mouse.move(*places[0])
    page.mouse.down()
    for place in places:
        page.mouse.move(*place, steps=3)
    page.mouse.up()
    settle(page)


def column(page, method, part):
    """The texts of a method's six cells."""
    body = page.locator("[data-part=maps] tbody").nth(list(served.METHODS).index(method))
    return body.locator(f"td .{part}").all_inner_texts()


def canvases(page):
    return page.eval_on_selector_all("[data-part=maps] canvas", "all => all.map(canvas => canvas.toDataURL())")


def test_nothing_is_random_at_first(page):
    for method in served.METHODS:
        assert column(page, method, "similarity") == [""] + 5 * ["1.00"]


@pytest.mark.parametrize("signs", ["absolute", "signed"])
def test_the_numbers_shown_are_those_of_scipy(page, signs):
    switch(page, "logits", "fc1")
    page.select_option("select[name=signs]", signs)
    settle(page)
    networks = answers(page)
    for method in served.METHODS:
        trained, *draws = [np.array(network["maps"][method]) for network in networks]
        sizes = [float(text.removeprefix("max ")) for text in column(page, method, "size")[:3]]
        assert sizes == pytest.approx([np.abs(map).max() for map in (trained, *draws)], rel=0.06)
        own = np.abs if signs == "absolute" else np.array
        expected = [stats.spearmanr(own(trained), own(draw)).statistic for draw in draws]
        texts = [text.replace("−", "-") for text in column(page, method, "similarity")[1:3]]
        assert [float(text) for text in texts] == pytest.approx(expected, abs=0.0051)


def test_another_drawing_and_a_twin_stand_beside_the_similarity(page):
    test, places = data.load("digits"), served.samples("digits")
    images = test.images[places]
    trained, twin = (models.load("cnn_digits", seed=seed) for seed in (0, 1))
    classes = trained(images).argmax(1)
    page.locator("[data-part=samples] button").nth(8).click()
    settle(page)
    for method in served.METHODS:
        maps = saliency.METHODS[method](trained, images, classes)[:, 0]
        maps = maps.round(decimals=6)  # where Sobel's terms cancel, float32 leaves some 1e-9
        others = torch.cat([maps[:8], maps[9:]])
        floor = similarity.spearman_abs(maps[8].expand_as(others), others)
        ceiling = similarity.spearman_abs(maps[8:9], saliency.METHODS[method](twin, images[8:9], classes[8:9])[:, 0])
        assert shown(page, f"lines.{method}.others") == pytest.approx(floor.tolist(), abs=1e-3)
        assert shown(page, f"lines.{method}.twin") == pytest.approx(ceiling.item(), abs=1e-3)


def test_switches_randomise_and_train_again(page):
    before = canvases(page)
    switch(page, "conv1")
    after = canvases(page)
    changed = [old != new for old, new in zip(before, after)]
    assert changed == 3 * ([False] + 5 * [True]) + 6 * [False]  # all but the trained column and the edge detector
    page.click("[data-part=train]")
    settle(page)
    assert canvases(page) == before


def test_a_reroll_draws_anew_and_a_draw_stays_with_its_layer(page):
    def layer(name):
        return shown(page, f"results.slice(1).map(({{net}}) => net.{name}.bias[0])")

    switch(page, "fc1")
    first = layer("fc1")
    assert len(set(first)) == 5
    switch(page, "fc1", "logits")
    assert layer("fc1") == first
    page.click("[data-part=reroll]")
    settle(page)
    assert not set(layer("fc1")) & set(first)


def test_the_class_is_locked_until_it_is_unlocked(page):
    switch(page, "logits")
    seen, target = shown(page, "results.map(r => r.seen)"), shown(page, "results.map(r => r.target)")
    assert len(set(seen)) > 1 and set(target) == {seen[0]}
    page.uncheck("input[name=locked]")
    settle(page)
    assert shown(page, "results.map(r => r.seen)") == seen == shown(page, "results.map(r => r.target)")


def test_a_dead_map_says_so(page):
    switch(page, "logits")
    page.click("[data-part=clear]")
    settle(page)
    for method in ("input_x_gradient", "sobel"):
        assert column(page, method, "dead") == 6 * ["no signal"]
        assert column(page, method, "similarity") == [""] + 5 * ["undefined"]
        assert column(page, method, "size") == 6 * ["max 0"]
    assert column(page, "gradient", "dead") == 6 * [""]
    assert "blank" in page.inner_text("[data-part=unlike]")


def test_maps_follow_the_mouse(page):
    before = canvases(page)
    scribble(page, [(0.3, 0.2), (0.7, 0.2), (0.5, 0.8)])
    one = image(page)
    assert all(old != new for old, new in zip(before, canvases(page)))
    assert page.locator("[data-part=samples] [aria-pressed=true]").count() == 0
    scribble(page, [(0.4, 0.5), (0.65, 0.5)])
    assert not image(page).equal(one)
    assert shown(page, "results[0].seen") == 7


def test_a_finger_draws_and_does_not_scroll(visit):
    page = visit(viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True)
    paper = page.locator("[data-part=paper]")
    paper.scroll_into_view_if_needed()
    box, top = paper.bounding_box(), page.evaluate("scrollY")
    before = image(page)
    session = page.context.new_cdp_session(page)
    places = [{"x": box["x"] + box["width"] / 2, "y": box["y"] + box["height"] * v} for v in (0.2, 0.4, 0.6, 0.8)]
    for kind, points in [
        ("touchStart", places[:1]),
        *(("touchMove", [place]) for place in places[1:]),
        ("touchEnd", []),
    ]:
        session.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})
    settle(page)
    after = image(page)
    assert not after.equal(before)
    columns = (after[0, 0] > 0).any(0)
    assert 2 <= columns.sum() <= 5 and (after[0, 0] > 0).any(1).sum() >= 19  # an upright line
    assert page.evaluate("scrollY") == top


def test_the_keyboard_is_enough(page):
    button = page.locator("[data-part=samples] button").nth(12)
    button.focus()
    page.keyboard.press("Enter")
    settle(page)
    assert button.get_attribute("aria-pressed") == "true"
    assert image(page).equal(data.load("digits").images[served.samples("digits")[12]][None])
    page.locator("input[value=logits]").focus()
    page.keyboard.press("Space")
    settle(page)
    assert column(page, "gradient", "similarity")[1] != "1.00"


def test_the_page_is_also_there_in_words(page):
    switch(page, "logits")
    page.locator("[data-part=words]", has_text="Random: logits.").wait_for()
    words = page.locator("[data-part=words]")
    assert words.get_attribute("aria-live") == "polite"
    assert "The class explained is locked" in words.inner_text()
    assert "Guided Backprop: similarity to the trained map" in words.inner_text()


def test_clothes_fit_a_phone(visit):
    page = visit(viewport={"width": 390, "height": 844})
    choose(page, "clothes")
    switch(page, *LAYERS)
    assert page.evaluate("document.documentElement.scrollWidth") <= 390


def test_without_scripts_a_picture_stands_for_all(visit):
    page = visit(java_script_enabled=False, ready="#playground-still img")
    assert page.locator("#playground-still img").is_visible()
    assert page.locator("noscript p").is_visible()
    assert not page.locator("#playground").is_visible()


def test_the_picture_makes_room_for_the_playground_but_not_in_print(page):
    picture, playground = page.locator("#playground-still"), page.locator("#playground")
    assert playground.is_visible() and not picture.is_visible()
    page.emulate_media(media="print")
    assert picture.is_visible() and not playground.is_visible()


def test_the_page_works_from_a_folder(visit, html):
    page = visit((html / PAGE).resolve().as_uri())
    assert shown(page, "results.length") == 6
