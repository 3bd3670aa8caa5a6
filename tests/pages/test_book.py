"""The built pages, read in a real browser: what a reader sees on a laptop and on a phone."""

import functools
import re
import unicodedata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import nbformat
import pytest
from address import files, pages, repository, revision
from axe_playwright_python.sync_playwright import Axe
from browser import settle
from bs4 import BeautifulSoup
from make_pdf import make_pdf
from page_extras import CARD_SIZE
from PIL import Image
from run_chapters import chapters, toc_entries

ROOT = Path(__file__).parents[2]
PAGES = [f"{entry}.html" for entry in toc_entries(ROOT)]
CHAPTERS = [str(chapter.with_suffix(".html")) for chapter in chapters(ROOT)]
LAPTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}
A4 = {"width": 820, "height": 1160}  # at the scale of make_pdf.py
HEAVIEST = 3_000_000  # bytes of a page with all it loads
each_chapter = pytest.mark.parametrize("name", CHAPTERS)


@pytest.fixture(scope="module")
def visit(browser, site):
    """Open a page in a new context, to the bottom; `page.problems` lists what went wrong on the way."""

    def open_in_context(name, *, viewport=LAPTOP):
        page = browser.new_context(viewport=viewport).new_page()
        page.problems = []
        note = page.problems.append
        page.on("console", lambda message: note(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: note(str(error)))
        page.on("response", lambda r: note(f"{r.status} {r.url}") if r.status >= 400 else None)
        page.on("request", lambda r: note(r.url) if not r.url.startswith((site, "data:", "blob:")) else None)
        page.goto(site + name)
        settle(page)
        page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        settle(page)
        return page

    return open_in_context


@pytest.fixture
def open_page(visit):
    """Open a page of the test's own, as `visit` does."""
    opened = []

    def visit_and_note(*args, **options):
        opened.append(visit(*args, **options))
        return opened[-1]

    yield visit_and_note
    for page in opened:
        page.context.close()


@pytest.fixture(scope="module", params=PAGES)
def each_page(visit, request):
    """Every page of the book in turn, opened once for all tests that look at each."""
    page = visit(request.param)
    yield page
    page.context.close()


@functools.cache
def soup(path: Path) -> BeautifulSoup:
    """A built page, read once: some take seconds."""
    return BeautifulSoup(path.read_text(encoding="utf-8"), "html.parser")


def test_page_loads_without_a_problem(each_page):
    assert each_page.problems == []
    weight = each_page.evaluate(
        """performance.getEntriesByType("resource").concat(performance.getEntriesByType("navigation"))
           .reduce((sum, entry) => sum + entry.decodedBodySize, 0)"""
    )
    assert weight <= HEAVIEST
    images = each_page.eval_on_selector_all(
        "article img",
        "all => all.map(i => ({src: i.src.slice(-80), alt: i.alt, loaded: i.naturalWidth > 0,"
        " shown: i.clientHeight > 0 || Boolean(i.closest('details:not([open]), [hidden]'))}))",
    )
    assert not [image for image in images if not (image["alt"] and image["loaded"] and image["shown"])]


def test_page_loads_only_what_it_uses(each_page):
    loaded = each_page.evaluate("performance.getEntriesByType('resource').map(entry => entry.name)")
    assert not [address for address in loaded if "search" in address]
    formulas = each_page.locator("article .math").count()
    assert any("mathjax" in address for address in loaded) == (formulas > 0)
    assert each_page.locator("article .math mjx-container mjx-assistive-mml").count() == formulas


def test_page_fits_a_phone(each_page):
    each_page.set_viewport_size(PHONE)
    width = each_page.evaluate("document.documentElement.scrollWidth")
    each_page.set_viewport_size(LAPTOP)
    assert width <= PHONE["width"]


# Most of a page is code, formulas and rows of tables that are like one another: axe looks at one word of each kind,
# three formulas and the first rows, in half the time.
LEAVE_OUT_WHAT_REPEATS = """() => {
    const seen = new Set();
    for (const word of document.querySelectorAll(".highlight span")) {
        const kind = [word.className, word.parentElement.className, word.closest(".cell_output") !== null].join("|");
        if (seen.has(kind)) word.remove();
        seen.add(kind);
    }
    for (const table of document.querySelectorAll("article table"))
        [...table.rows].slice(4).forEach((row) => row.remove());
    [...document.querySelectorAll("article mjx-container")].slice(3).forEach((formula) => formula.remove());
}"""


@pytest.mark.parametrize(
    "scheme, rules", [("light", {}), ("dark", {"runOnly": ["color-contrast"]})], ids=["light", "dark"]
)
def test_page_is_accessible(each_page, scheme, rules):
    each_page.emulate_media(color_scheme=scheme)
    each_page.wait_for_function(f"document.documentElement.dataset.theme == '{scheme}'")
    settle(each_page)
    each_page.evaluate(LEAVE_OUT_WHAT_REPEATS)  # this page's last tests
    violations = Axe().run(each_page, options={"resultTypes": ["violations"], **rules}).response["violations"]
    assert not [
        f"{violation['id']}: {node['html'][:160]}"
        for violation in violations
        if violation["impact"] in ("serious", "critical")
        for node in violation["nodes"]
    ]


def head_of(path: Path) -> dict[str, str]:
    """What a page tells search engines and social networks."""
    tags = soup(path).select("head meta[content]")
    return {tag.get("property") or tag.get("name"): tag["content"] for tag in tags}


def test_pages_present_themselves(html):
    home = pages(repository())
    heads = {name: head_of(html / name) for name in PAGES}
    for name, head in heads.items():
        assert head["og:url"] == home + name
        assert head["og:title"] in soup(html / name).select_one("article h1").get_text()
        assert head["og:description"] == head["description"] and 20 <= len(head["description"]) <= 202
        assert head["twitter:card"] == "summary_large_image" and len(head["og:image:alt"].split()) >= 6
    assert len({head["description"] for head in heads.values()}) == len(PAGES)
    [card] = {head["og:image"] for head in heads.values()}
    assert card.startswith(home)
    picture = html / card.removeprefix(home)
    assert Image.open(picture).size == CARD_SIZE and picture.stat().st_size < 300_000


def test_the_first_address_leads_to_the_landing_page(browser, site, html):
    shared = {"og:title", "og:description", "og:image", "og:url", "twitter:card", "description"}
    first, landing = head_of(html / "index.html"), head_of(html / PAGES[0])
    assert {key: first[key] for key in shared} == {key: landing[key] for key in shared}
    page = browser.new_page()
    page.goto(site + "index.html")
    page.wait_for_url(f"**/{PAGES[0]}")
    page.close()


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
        f"https://mybinder.org/v2/gh{address}/{revision()}?urlpath=lab/tree/{notebook}",
        f"https://colab.research.google.com/github{address}/blob/{revision()}/{notebook}",
    }


@each_chapter
def test_run_links_stand_under_the_title(html, name):
    page = soup(html / name)
    under = page.select_one("article h1").find_next_sibling()
    links = {link["href"]: link.get_text() for link in under.select("a")}
    assert set(links) == {link["href"] for link in page.select(".dropdown-launch-buttons a")}
    assert sorted(links.values()) == ["Run in Binder", "Run in Colab"]


@pytest.mark.parametrize("viewport", [LAPTOP, PHONE], ids=["laptop", "phone"])
def test_run_links_are_seen_at_once(open_page, viewport):
    page = open_page(CHAPTERS[0], viewport=viewport)
    page.evaluate("window.scrollTo(0, 0)")
    for link in page.locator(".run-link").all():
        box = link.bounding_box()
        assert box["height"] >= 24 and box["y"] + box["height"] < viewport["height"]


def test_keyboard_reaches_text_and_contents(open_page):
    page = open_page(CHAPTERS[0], viewport=PHONE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to main content"
    page.wait_for_function("document.activeElement.getBoundingClientRect().top >= 0")
    page.keyboard.press("Enter")
    seen = []
    for _ in range(12):
        page.keyboard.press("Tab")
        ring = "(({outlineStyle, boxShadow}) => [outlineStyle, boxShadow])(getComputedStyle(document.activeElement))"
        assert page.evaluate(ring) != ["none", "none"], page.evaluate("document.activeElement.outerHTML")
        seen.append(page.evaluate("document.activeElement.className"))
    assert any("primary-toggle" in name for name in seen) and any("run-link" in name for name in seen)
    page.locator(".bd-header-article .primary-toggle").press("Enter")
    page.locator("#pst-primary-sidebar-modal a[href*='how_to_use']").wait_for()
    page.keyboard.press("Escape")
    assert not page.locator("#pst-primary-sidebar-modal").is_visible()


def test_print_shows_all_and_nothing_to_click(open_page):
    page = open_page(CHAPTERS[0], viewport=A4)
    page.emulate_media(media="print")
    for gone in (".bd-sidebar-primary", ".bd-sidebar-secondary", ".run-links", ".prev-next-footer", ".copybtn"):
        assert not page.locator(gone).first.is_visible()
    below = "all => all.map(e => e.clientHeight - e.querySelector('summary').clientHeight)"
    answers = page.locator("article details:not([open])").evaluate_all(below)
    assert answers and min(answers) > 10
    right = "all => all.map(e => e.getBoundingClientRect().right)"
    assert max(page.locator("article").locator("pre, img, svg, table").evaluate_all(right)) <= A4["width"]


def test_the_book_prints(browser, html):
    def squeezed(text: str) -> str:
        return re.sub(r"\s", "", unicodedata.normalize("NFKC", text))

    book = make_pdf(ROOT, [page.removesuffix(".html") for page in (PAGES[0], CHAPTERS[0])], browser)
    text = squeezed("".join(page.extract_text() for page in book.pages))
    folded = [fold for fold in soup(html / CHAPTERS[0]).select("article details") if not fold.select(".math, table")]
    answers = ["".join(squeezed(str(part)) for part in fold.select("summary")[0].next_siblings) for fold in folded]
    plain = [answer for answer in answers if "<" not in answer]
    assert len(plain) >= 6  # a page may end within an answer, but not within its beginning and its end
    assert not [answer for answer in plain if answer[:30] not in text and answer[-30:] not in text]
    assert len(book.outline) == 2
    notes = [note.get_object() for page in book.pages for note in page.get("/Annots", [])]
    links = [note["/A"]["/URI"] for note in notes if "/URI" in note.get("/A", {})]
    assert f"{pages(repository())}book/glossary.html" in {link.partition("#")[0] for link in links}
    assert not [link for link in links if "127.0.0.1" in link]


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
def test_chapter_leaves_no_dead_widget(html, name):
    executed = html.parent / "source" / Path(name).with_suffix(".ipynb")
    assert "application/vnd.jupyter.widget" not in executed.read_text(encoding="utf-8")


PANEL = "live_panel.panel("


def has_panel(name: str) -> bool:
    return PANEL in (ROOT / name).with_suffix(".ipynb").read_text(encoding="utf-8")


def test_some_chapters_have_a_panel():
    assert any(map(has_panel, CHAPTERS))


@pytest.mark.parametrize("name", [name for name in CHAPTERS if has_panel(name)])
def test_panel_is_a_picture_with_a_way_to_get_it_live(html, name):
    page = soup(html / name)
    [cell] = [cell for cell in page.select("div.cell") if PANEL in cell.get_text()]
    assert len(cell.select("figure img[alt]")) == 1
    assert "run this chapter in Binder or Colab" in cell.select_one("figcaption").get_text()


@each_chapter
def test_chapter_ran_without_warnings(html, name):
    executed = nbformat.read(html.parent / "source" / Path(name).with_suffix(".ipynb"), as_version=4)
    outputs = [output for cell in executed.cells for output in cell.get("outputs", [])]
    errors = "".join(output.text for output in outputs if output.get("name") == "stderr")
    assert not re.findall(r".*Warning: .*", errors)
