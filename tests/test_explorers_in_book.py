"""The explorers on the built pages, driven as readers drive them: by mouse, by keyboard, by touch, or not at all."""

import nbformat
import pytest
from axe_playwright_python.sync_playwright import Axe

LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
CASCADE = "randomization/cascading"
CHAPTERS = [CASCADE]
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
        page.goto(f"{site}notebooks/{chapter}.html", wait_until="load")
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
    assert slider.get_attribute("aria-valuetext") == "conv1" and "conv1" in status(cascade)


def test_menus_choose(explorers):
    cascade = explorers(CASCADE).first
    curve = cascade.locator("svg [data-part] path").first
    before = curve.get_attribute("d")
    cascade.get_by_label("method").select_option("sobel")
    cascade.get_by_label("image", exact=True).select_option(index=2)
    cascade.get_by_role("slider").press("End")
    for text in (status(cascade), cascade.get_by_alt_text("map when random").get_attribute("alt")):
        assert "random down to conv1, method sobel, image 3" in text
    assert curve.get_attribute("d") != before
    head, *rows = [row.locator("th, td").all_text_contents() for row in cascade.locator("tr").all()]
    [row] = [dict(zip(head, row)) for row in rows if row[:2] == ["conv1", "sobel"] and row[2].startswith("3:")]
    name = "rank correlation"
    assert f"{name} {row[name]} (floor: another image {row[f'{name}, floor: another image']}" in status(cascade)


def test_play_runs_to_the_end_and_pauses(explorers):
    cascade = explorers(CASCADE).first
    slider, button = cascade.get_by_role("slider"), cascade.get_by_role("button")
    button.click()
    assert button.inner_text() == "Pause" and cascade.get_by_role("status").get_attribute("aria-live") == "off"
    button.click()
    paused = slider.input_value()
    cascade.page.wait_for_timeout(1000)
    assert button.inner_text() == "Play" and slider.input_value() == paused != "0"
    button.click()
    cascade.page.wait_for_function(
        "e => e.querySelector('button').textContent === 'Play'", arg=cascade.element_handle()
    )
    assert slider.input_value() == "4" and cascade.get_by_role("status").get_attribute("aria-live") == "polite"
    assert cascade.page.problems == []


def test_where_motion_is_unwelcome_the_button_takes_one_step(explorers):
    cascade = explorers(CASCADE, reduced_motion="reduce").first
    slider, button = cascade.get_by_role("slider"), cascade.get_by_role("button", name="Next")
    for value in "12340":
        button.click()
        assert slider.input_value() == value
    cascade.page.wait_for_timeout(1000)
    assert slider.input_value() == "0"


@each_chapter
def test_without_scripts_the_first_state_and_the_table_are_there(explorers, chapter):
    for explorer in explorers(chapter, java_script_enabled=False).all():
        assert not explorer.locator(".controls").is_visible()
        assert all(image.is_visible() for image in explorer.locator("img").all())
        assert explorer.locator("table").is_visible() and explorer.get_by_role("status").is_visible()
    assert explorer.page.locator(".explorer img").evaluate_all("all => all.every(i => i.naturalWidth > 0 && i.alt)")


@each_chapter
def test_print_has_the_table_and_no_controls(explorers, chapter):
    found = explorers(chapter)
    found.page.emulate_media(media="print")
    found.page.evaluate("dispatchEvent(new Event('beforeprint'))")
    for explorer in found.all():
        assert explorer.locator("table").is_visible() and not explorer.locator(".controls").is_visible()


@each_chapter
def test_explorers_are_accessible_and_fit_a_phone(explorers, chapter):
    found = explorers(chapter, viewport=PHONE, color_scheme="dark")
    found.page.locator(".explorer summary").evaluate_all("all => all.forEach(s => s.click())")
    violations = Axe().run(found.page, context=".explorer").response["violations"]
    assert not [f"{v['id']}: {n['html'][:120]}" for v in violations for n in v["nodes"]]
    assert found.page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]
    low = "all => all.filter(e => e.getBoundingClientRect().height < 43).map(e => e.outerHTML)"
    assert found.locator("button, select, input[type=range], .switches label, summary").evaluate_all(low) == []


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
