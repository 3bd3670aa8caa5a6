"""The built pages, read in a real browser: what a reader sees on a laptop and on a phone."""

import re
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from address import files, repository
from axe_playwright_python.sync_playwright import Axe
from bs4 import BeautifulSoup
from run_chapters import chapters, toc_entries

ROOT = Path(__file__).parent.parent
PAGES = [f"{entry}.html" for entry in toc_entries(ROOT)]
CHAPTERS = [str(chapter.with_suffix(".html")) for chapter in chapters(ROOT)]
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
HEAVIEST = 3_000_000  # bytes of a page with all it loads
each_page = pytest.mark.parametrize("name", PAGES)
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


@pytest.fixture
def open_page(browser, site):
    """Open a page in a new context, to the bottom; `page.problems` lists what went wrong on the way."""
    contexts = []

    def visit(name, *, viewport=LAPTOP, color_scheme="light"):
        context = browser.new_context(viewport=viewport, color_scheme=color_scheme)
        contexts.append(context)
        page = context.new_page()
        page.problems = []
        note = page.problems.append
        page.on("console", lambda message: note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("response", lambda r: note(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: note(r.url) if not r.url.startswith((site, "data:", "blob:")) else None)
        page.goto(site + name, wait_until="networkidle")
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        page.wait_for_load_state("networkidle")
        return page

    yield visit
    for context in contexts:
        context.close()


def soup(path: Path) -> BeautifulSoup:
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


@each_page
def test_page_loads_without_a_problem(open_page, name):
    page = open_page(name)
    assert page.problems == []
    weight = page.evaluate(
        """performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
           .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
    )
    assert weight <= HEAVIEST
    images = page.eval_on_selector_all(
        "article img",
        "all => all.map(i => ({src: i.src.slice(-80), alt: i.alt, loaded: i.naturalWidth > 0,"
        " shown: i.clientHeight > 0 || Boolean(i.closest('details:not([open]), [hidden]'))}))",
    )
    assert not [image for image in images if not (image["alt"] and image["loaded"] and image["shown"])]


@each_page
def test_page_fits_a_phone(open_page, name):
    page = open_page(name, viewport=PHONE)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@each_page
@pytest.mark.parametrize("color_scheme", ["light", "dark"])
def test_page_is_accessible(open_page, name, color_scheme):
    violations = Axe().run(open_page(name, color_scheme=color_scheme)).response["violations"]
    assert not [
        f"{violation['id']}: {node['html'][:160]}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def test_search_finds_a_page(open_page):
    page = open_page("search.html?q=logit")
    results = page.locator("#search-results li a")
    results.first.wait_for()
    results.first.click()
    assert "logit" in page.locator("article").inner_text().lower()
    assert page.problems == []


def test_dark_mode_toggles(open_page):
    page = open_page(PAGES[0])
    background = "getComputedStyle(document.body).backgroundColor"
    light = page.evaluate(background)
    page.locator(".theme-switch-button:visible").first.click()
    page.wait_for_function(f"{background} != '{light}'")


@each_chapter
def test_launch_buttons_lead_to_the_notebook(html, name):
    address = urlsplit(repository()).path
    notebook = Path(name).with_suffix(".ipynb")
    assert ROOT / notebook in files(ROOT)
    links = {link["href"] for link in soup(html / name).select(".dropdown-launch-buttons a")}
    assert links == {
        f"https://mybinder.org/v2/gh{address}/main?urlpath=lab/tree/{notebook}",
        f"https://colab.research.google.com/github{address}/blob/main/{notebook}",
    }


def test_links_between_pages_have_targets(html):
    built = {path.resolve(): soup(path) for path in html.rglob("*.html") if "_static" not in path.parts}
    anchors = {path: {tag["id"] for tag in page.select("[id]")} for path, page in built.items()}
    missing = []
    for path, page in built.items():
        for link in page.select("a[href]"):
            url = urlsplit(link["href"])
            if url.scheme or url.netloc:
                continue
            target = (path.parent / unquote(url.path)).resolve() if url.path else path
            wanted = unquote(url.fragment)
            if not target.exists() or (wanted and target in anchors and wanted not in anchors[target]):
                missing.append(f"{path.relative_to(html.resolve())} -> {link['href']}")
    assert not missing


@each_chapter
def test_chapter_ran_without_warnings(html, name):
    executed = nbformat.read(html.parent / "source" / Path(name).with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    errors = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert not re.findall(r".*Warning: .*", errors)
