"""The playground: its numbers are torch's and scipy's, and it does what it says to mouse, finger and keyboard."""

import numpy as np
import playground as served
import pytest
import torch
from scipy import stats
from skimage.morphology import skeletonize

from helpers import data, models, saliency, similarity

PAGE = "book/playground.html"
LAYERS = ["logits", "fc1", "conv2", "conv1"]
READY = "#playground[aria-busy=false]"
UNSEEN = torch.rand(1, 28, 28, generator=torch.Generator().manual_seed(0))
ANSWER = """form => form.shown.results.map(({net, logits, probabilities, seen, target, maps}) => ({
    logits: [...logits], probabilities, seen, target,
    maps: Object.fromEntries(Object.entries(maps).map(([name, map]) => [name, [...map]])),
    numbers: Object.fromEntries(engine.LAYERS.flatMap(({name}) =>
        ["weight", "bias"].map(part => [`${name}.${part}`, [...net[name][part]]]))),
}))"""


@pytest.fixture
def visit(browser, site):
    """Open the playground in a new context and wait until it is up to date; nothing may go wrong on the way."""
    contexts, problems = [], []

    def opened(address=site + PAGE, *, ready=READY, **options):
        contexts.append(browser.new_context(**{"viewport": {"width": 1280, "height": 900}} | options))
        page = contexts[-1].new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda r: problems.append(r.url) if not r.url.startswith((site, "file:", "data:")) else None)
        page.goto(address)
        page.wait_for_selector(ready)
        return page

    yield opened
    for context in contexts:
        context.close()
    assert problems == []


@pytest.fixture
def page(visit):
    return visit()


def settle(page):
    """Wait until all that was asked for is computed."""
    page.wait_for_timeout(50)
    page.wait_for_selector(READY)


def switch(page, *layers):
    for layer in layers:
        page.check(f"input[value={layer}]")
    settle(page)


def choose(page, name):
    page.check(f"input[value={name}]")
    page.wait_for_selector(f"#playground[data-set={name}]")
    settle(page)


def shown(page, path):
    """A part of the numbers behind the page."""
    return page.eval_on_selector("#playground", f"form => form.shown.{path}")


def image(page):
    return torch.tensor(shown(page, "image.reduce((all, value) => [...all, value], [])")).view(1, 1, 28, 28)


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


# ---------------------------------------------------------------- the engine


@pytest.mark.parametrize(
    "layers", [[], ["logits"], ["conv1"], LAYERS], ids=lambda layers: "+".join(layers) or "trained"
)
@pytest.mark.parametrize("name", served.SETS)
def test_numbers_agree_with_torch(page, name, layers):
    choose(page, name)
    page.locator("[data-part=samples] button").nth(5).click()
    switch(page, *layers)
    picture = image(page)
    assert torch.equal(picture, data.load(name).images[served.samples(name)[5]][None])
    answers = page.eval_on_selector("#playground", ANSWER)
    assert len(answers) == 6
    trained = models.load(f"cnn_{name}")
    for column, answer in enumerate(answers[:3]):
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


def test_numbers_agree_with_torch_on_an_image_of_noise(page):
    found = page.evaluate(
        """async pixels => {
            const net = engine.network(engine.halves(playgroundData.digits.weights.twin));
            const image = Float32Array.from(pixels);
            const pass = engine.forward(net, image);
            const maps = engine.maps(net, image, pass, 7);
            return {logits: [...pass.logits], maps: Object.fromEntries(Object.entries(maps).map(([k, v]) => [k, [...v]]))};
        }""",
        UNSEEN.flatten().tolist(),
    )
    twin = models.load("cnn_digits", seed=1)
    assert_close(found["logits"], twin(UNSEEN[None]))
    for method in served.METHODS:
        assert_close(found["maps"][method], saliency.METHODS[method](twin, UNSEEN[None], torch.tensor([7])))


def test_rank_correlation_is_that_of_scipy(page):
    rng = np.random.default_rng(0)
    smooth, tied = rng.normal(size=784), rng.integers(-2, 3, 784).astype(float)
    tied[:300] = 0
    for a, b in [(smooth, tied), (tied, tied[::-1]), (smooth, -smooth), (smooth, np.ones(784))]:
        found = page.evaluate(
            "([a, b]) => engine.correlation(...[a, b].map(map => engine.unitRanks(Float32Array.from(map))))",
            [a.tolist(), b.tolist()],
        )
        if np.ptp(b) == 0:
            assert np.isnan(found)
        else:
            assert found == pytest.approx(
                stats.spearmanr(a.astype(np.float32), b.astype(np.float32)).statistic, abs=1e-10
            )


@pytest.mark.parametrize("layer", LAYERS)
def test_random_layers_are_drawn_as_pytorch_draws_them(page, layer):
    def draw(seed):
        call = f"(() => {{ const {{weight, bias}} = engine.randomLayer('{layer}', {seed}); return [[...weight], [...bias]]; }})()"
        return map(np.array, page.evaluate(call))

    weight, bias = draw(1)
    own = getattr(models.cnn(), layer)
    assert weight.size == own.weight.numel() and bias.size == own.bias.numel()
    bound = 1 / own.weight[0].numel() ** 0.5  # of kaiming_uniform_ with a = sqrt(5), and of the bias
    assert own.weight.abs().max() <= bound and np.abs(weight).max() <= bound and np.abs(bias).max() <= bound
    assert stats.kstest(weight, "uniform", (-bound, 2 * bound)).pvalue > 0.001
    again, _ = draw(1)
    other, _ = draw(2)
    assert np.array_equal(weight, again)
    assert abs(np.corrcoef(weight, other)[0, 1]) < 4 / weight.size**0.5


def drawn(page, strokes, width=2.8):
    found = page.evaluate("([strokes, width]) => [...engine.normalise(strokes, width)]", [strokes, width])
    return np.array(found).reshape(28, 28)


SEVEN = [[[8, 6], [18, 6], [12, 20]], [[10, 13], [16, 12]]]


def test_drawings_are_made_like_the_training_data(page):
    picture = drawn(page, SEVEN)
    ink = picture > 0.2
    assert 19 <= max(np.ptp(np.nonzero(ink)[axis]) + 1 for axis in (0, 1)) <= 21
    rows, columns = np.indices(picture.shape)
    centre = [(places * picture).sum() / picture.sum() + 0.5 for places in (rows, columns)]
    assert np.abs(np.array(centre) - 14).max() < 0.1
    assert picture.sum() / skeletonize(picture > 0.5).sum() == pytest.approx(2.8, rel=0.15)
    assert picture.min() == 0 and picture.max() == 1
    moved = [[[2 + 0.6 * x, 5 + 0.6 * y] for x, y in stroke] for stroke in SEVEN]
    assert drawn(page, moved) == pytest.approx(picture, abs=1e-5)
    assert not drawn(page, []).any()
    assert 4 < drawn(page, [[[3, 3]]]).sum() < 8  # a tap is a dot of the pen's width


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
def test_the_limit_is_that_of_the_training_data(name):
    known = served.patterns(name)
    flat = data.load(name, "train").images.flatten(1)
    rest = torch.from_numpy(pca_rest(flat.numpy(), served.COMPONENTS))
    assert known.left_over(flat) == pytest.approx(rest, abs=2e-3)
    assert (rest > known.limit).float().mean() == pytest.approx(served.RARE, abs=0.002)


def pca_rest(flat, components):
    """What the mean and the first right singular vectors leave over, as a share."""
    centred = flat - flat.mean(0)
    vectors = np.linalg.svd(centred, full_matrices=False)[2][:components]
    return np.linalg.norm(centred - centred @ vectors.T @ vectors, axis=1) / np.linalg.norm(flat, axis=1)


def test_the_page_says_what_is_unlike_the_training_data(page):
    known = served.patterns("digits")
    others = torch.stack([UNSEEN, data.load("clothes").images[0], data.load("digits").images[0]])
    found = page.evaluate(
        """images => {
            const {mean, components} = playgroundData.digits.patterns;
            const patterns = {mean: engine.halves(mean), components: engine.halves(components)};
            return images.map(image => engine.leftOver(Float32Array.from(image), patterns));
        }""",
        others.flatten(1).tolist(),
    )
    assert found == pytest.approx(known.left_over(others).tolist(), abs=1e-4)
    assert page.inner_text("[data-part=unlike]") == ""
    scribble(page, [(0.1 + 0.05 * i, (i % 2) * 0.8 + 0.1) for i in range(17)])
    assert shown(page, "share") > known.limit
    assert "Unlike the training data" in page.inner_text("[data-part=unlike]")


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
    maps = [
        {name: np.array(map) for name, map in answer["maps"].items()}
        for answer in page.eval_on_selector("#playground", ANSWER)
    ]
    own = (lambda map: map) if signs == "signed" else np.abs
    for method in served.METHODS:
        expected = [stats.spearmanr(own(maps[0][method]), own(other[method])).statistic for other in maps[1:]]
        texts = [text.replace("−", "-") for text in column(page, method, "similarity")[1:]]
        assert [float(text) for text in texts] == pytest.approx(expected, abs=0.0051)
        sizes = [float(text.removeprefix("max ")) for text in column(page, method, "size")]
        assert sizes == pytest.approx([np.abs(map[method]).max() for map in maps], rel=0.06)


def test_another_drawing_and_a_twin_stand_beside_the_similarity(page):
    test, places = data.load("digits"), served.samples("digits")
    images = test.images[places]
    trained, twin = (models.load("cnn_digits", seed=seed) for seed in (0, 1))
    classes = trained(images).argmax(1)
    page.locator("[data-part=samples] button").nth(8).click()
    settle(page)
    for method in served.METHODS:
        maps = saliency.METHODS[method](trained, images, classes)[:, 0]
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
    switch(page, "logits")
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


def test_with_scripts_the_picture_makes_room(page):
    assert not page.locator("#playground-still").is_visible()


def test_the_page_works_from_a_folder(visit, html):
    page = visit((html / PAGE).resolve().as_uri())
    assert shown(page, "results.length") == 6
