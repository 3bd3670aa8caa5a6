"""The explorers on the built pages, driven as readers drive them: by mouse, by keyboard, by touch, or not at all."""

import nbformat
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from browser import settle
from playwright.sync_api import expect
from saliency_sanity.book.explorer import explore

LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CASCADE = "randomization/cascading"
GALLERY, PATTERNS = "methods/cam_and_perturbation", "theory/one_layer_cnn"
CHAPTERS = [
    CASCADE, GALLERY, PATTERNS, "randomization/independent", "methods/gradient_family", "theory/input_dominance",
    "second_thoughts/forgetting_the_top",
]  # fmt: skip
each_chapter = pytest.mark.parametrize("chapter", CHAPTERS)


@pytest.fixture
def explorers(browser, site):
    """Open a chapter and return its explorers; `.page.problems` lists what went wrong."""
    contexts = []

    def visit(chapter, **options):
        context = browser.new_context(**{"viewport": LAPTOP, **options})
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.goto(f"{site}notebooks/{chapter}.html")
        settle(page)
        found = page.locator(".explorer")
        assert found.count() > 0
        return found

    yield visit
    for context in contexts:
        context.close()


def status(explorer) -> str:
    return explorer.get_by_role("status").inner_text()


def test_keys_move_the_slider(explorers):
    cascade = explorers(CASCADE).first
    slider, (_, trained, ruined) = cascade.get_by_role("slider"), cascade.locator("img").all()
    first, pictures = trained.get_attribute("src"), set()
    for key, label in {"ArrowRight": "logits", "PageUp": None, "End": "conv1", "Home": "none"}.items():
        slider.press(key)
        label = label or slider.get_attribute("aria-valuetext")
        assert slider.get_attribute("aria-valuetext") == label
        assert f"random down to {label}," in ruined.get_attribute("alt") and label in status(cascade)
        pictures.add(ruined.get_attribute("src"))
    assert len(pictures) >= 3 and trained.get_attribute("src") == first in pictures
    assert cascade.page.problems == []


def test_the_mouse_drags_the_slider(explorers):
    cascade = explorers(CASCADE).first
    slider = cascade.get_by_role("slider")
    slider.scroll_into_view_if_needed()
    box = slider.bounding_box()
    slider.page.mouse.move(box["x"] + 8, box["y"] + box["height"] / 2)
    slider.page.mouse.down()
    slider.page.mouse.move(box["x"] + box["width"] - 8, box["y"] + box["height"] / 2, steps=6)
    slider.page.mouse.up()
    assert slider.get_attribute("aria-valuetext") == "conv1" and "conv1" in status(cascade)
    assert {dot.get_attribute("data-at") for dot in cascade.locator("circle.now").all()} == {"4"}


def test_a_tap_moves_the_slider_of_a_phone(explorers):
    cascade = explorers(CASCADE, viewport=PHONE, has_touch=True, is_mobile=True).first
    slider = cascade.get_by_role("slider")
    box = slider.bounding_box()
    slider.tap(position={"x": box["width"] - 4, "y": box["height"] / 2})
    expect(slider).to_have_attribute("aria-valuetext", "conv1")
    assert "random down to conv1" in status(cascade)


def test_menus_choose(explorers):
    cascade = explorers(CASCADE).first
    curve = cascade.locator("svg [data-part] path").first
    before = curve.get_attribute("d")
    cascade.get_by_label("method").select_option("Sobel edges")
    cascade.get_by_label("image").select_option(index=2)
    cascade.get_by_role("slider").press("End")
    for text in (status(cascade), cascade.get_by_alt_text("map when random").get_attribute("alt")):
        assert "random down to conv1, method Sobel edges, image 3" in text
    assert curve.get_attribute("d") != before
    head, *rows = [row.locator("th, td").all_text_contents() for row in cascade.locator("tr").all()]
    [row] = [dict(zip(head, row)) for row in rows if row[:2] == ["conv1", "Sobel edges"] and row[2].startswith("3:")]
    name = "rank correlation"
    assert f"{name} {row[name]} (floor: another image {row[f'{name}, floor: another image']}" in status(cascade)


def stop_the_clock(page):
    """From now on time passes only in steps, by `page.clock.run_for`."""
    page.clock.install(time=0)
    page.clock.pause_at(1)


def test_play_runs_to_the_end_and_pauses(explorers):
    cascade = explorers(CASCADE, reduced_motion="no-preference").first
    slider, button, clock = cascade.get_by_role("slider"), cascade.get_by_role("button"), cascade.page.clock
    stop_the_clock(cascade.page)
    button.click()
    assert button.inner_text() == "Pause" and cascade.get_by_role("status").get_attribute("aria-live") == "off"
    clock.run_for(800)
    assert slider.input_value() == "2"
    button.click()
    clock.run_for(5000)
    assert button.inner_text() == "Play" and slider.input_value() == "2"
    button.click()
    clock.run_for(800)
    assert button.inner_text() == "Play" and slider.input_value() == "4"
    assert cascade.get_by_role("status").get_attribute("aria-live") == "polite"
    clock.run_for(5000)
    assert slider.input_value() == "4" and cascade.page.problems == []


def test_where_motion_is_unwelcome_the_button_takes_one_step(explorers):
    cascade = explorers(CASCADE, reduced_motion="reduce").first
    slider, button = cascade.get_by_role("slider"), cascade.get_by_role("button", name="Next")
    stop_the_clock(cascade.page)
    for value in "12340":
        button.click()
        cascade.page.clock.run_for(5000)
        assert slider.input_value() == value


def test_the_wipe_follows_mouse_and_keys(explorers):
    gallery = explorers(GALLERY).first
    handle, over = gallery.get_by_role("slider"), gallery.locator(".wipe img").last
    covered = "e => Number(getComputedStyle(e).clipPath.match(/ ([\\d.]+)%/)[1])"  # from the left
    handle.scroll_into_view_if_needed()
    box = over.bounding_box()
    assert over.evaluate(covered) == 50
    page, middle = gallery.page, box["y"] + box["height"] / 2
    page.mouse.move(box["x"] + box["width"] / 2, middle)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 5, middle, steps=5)
    page.mouse.up()
    dragged = over.evaluate(covered)
    assert abs(dragged - 20) <= 3
    handle.press("ArrowRight")
    assert over.evaluate(covered) == dragged + 1
    assert gallery.locator(".wipe").bounding_box()["width"] == pytest.approx(box["width"], abs=1)
    assert page.problems == []


def test_the_gallery_names_what_it_shows(explorers):
    gallery = explorers(GALLERY).first
    methods = gallery.get_by_label("method").locator("option").all_text_contents()
    seen = {}
    for method in methods:
        gallery.get_by_label("method").select_option(method)
        image = gallery.locator(".wipe img").first
        assert image.get_attribute("alt").startswith(f"saliency map: method {method}, image ")
        seen[image.get_attribute("src")] = status(gallery)
    assert len(seen) == len(set(seen.values())) == len(methods) >= 9


def test_boxes_choose_a_pattern(explorers):
    patterns = explorers(PATTERNS).first
    patterns.get_by_label("filter").select_option("−1 in the middle, else 1")
    for box in patterns.get_by_role("checkbox").all():
        box.check()
    assert "gradient 7" in status(patterns) and "between 0 and 1 yes" in status(patterns)
    middle = patterns.get_by_role("checkbox", name="row 2, column 2")
    middle.press("Space")
    assert "gradient 8" in status(patterns) and "between 0 and 1 yes" in status(patterns)
    patterns.get_by_role("checkbox", name="row 1, column 1").press("Space")
    assert "responses 2, 3, 4, 6, 7, 8, 9," in status(patterns) and "between 0 and 1 no" in status(patterns)
    assert "gradient 7" in status(patterns) and patterns.page.problems == []


@each_chapter
def test_without_scripts_the_first_state_and_the_table_are_there(explorers, chapter):
    for explorer in explorers(chapter, java_script_enabled=False).all():
        assert not explorer.locator(".controls").is_visible()
        assert all(image.is_visible() for image in explorer.locator("img").all())
        assert explorer.locator("table").is_visible() and explorer.get_by_role("status").is_visible()
    assert explorer.page.locator(".explorer img").evaluate_all("all => all.every(i => i.naturalWidth > 0 && i.alt)")


@each_chapter
def test_explorers_are_accessible_fit_a_phone_and_print(explorers, chapter):
    found = explorers(chapter, viewport=PHONE, color_scheme="dark")
    found.page.locator(".explorer summary").evaluate_all("all => all.forEach(s => s.click())")
    violations = Axe().run(found.page, context=".explorer").response["violations"]
    assert not [f"{v['id']}: {n['html'][:120]}" for v in violations for n in v["nodes"]]
    assert found.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    low = "all => all.filter(e => e.getBoundingClientRect().height < 43).map(e => e.outerHTML)"
    assert found.locator("button, select, input[type=range], .switches label, summary").evaluate_all(low) == []
    found.page.locator(".explorer summary").evaluate_all("all => all.forEach(s => s.click())")
    found.page.emulate_media(media="print")
    found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for explorer in found.all():
        assert explorer.locator("table").is_visible() and not explorer.locator(".controls").is_visible()


@each_chapter
def test_the_page_keeps_the_element_as_it_was_computed(html, chapter):
    """What the chapter's cells gave stands in the page, character for character."""
    executed = nbformat.read(html.parent / "source/notebooks" / f"{chapter}.ipynb", as_version=4)
    outputs = [
        output.data["text/html"]
        for cell in executed.cells
        for output in cell.get("outputs", [])
        if "text/html" in output.get("data", {})
    ]
    explorers = [text for text in outputs if text.startswith('<div class="explorer"')]
    page = (html / f"notebooks/{chapter}.html").read_text(encoding="utf-8")
    assert explorers and all(text in page for text in explorers)


INSERT = """html => {  // as JupyterLab does: not yet on the page, and scripts of innerHTML do not run by themselves
    const host = document.createElement("div");
    host.innerHTML = html;
    for (const old of host.querySelectorAll("script")) {
        const script = document.createElement("script");
        for (const {name, value} of old.attributes) script.setAttribute(name, value);
        script.textContent = old.textContent;
        old.replaceWith(script);
    }
    document.body.append(host);
}"""


def test_explorers_inserted_by_a_notebook_live_side_by_side(browser):
    html = explore({"t": "abc"}, {"p": np.random.default_rng(0).random((3, 4, 4))}, title="t", slider="t")
    page = browser.new_page()
    problems = []
    page.on("pageerror", lambda error: problems.append(str(error)))
    for count in (1, 2, 3):
        page.evaluate(INSERT, html)
        expect(page.get_by_role("slider")).to_have_count(count)
    page.get_by_role("slider").nth(1).press("End")
    assert [status(element) for element in page.locator(".explorer").all()] == ["t a", "t c", "t a"]
    assert problems == []
    page.close()
