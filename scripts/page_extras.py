"""A Sphinx extension: what a page tells other sites, where to run it, and no script that it does not use."""

import re
from html import escape
from pathlib import Path

from docutils import nodes
from sphinx.application import Sphinx

CARD = "_static/social_card.png"  # made by scripts/social_card.py
CARD_SIZE = (1200, 630)
CARD_ALT = (
    "A photograph of a cat with maps of two methods. When the network's top layer becomes random, the map of Gradient"
    " is another; that of Guided Backprop still shows the cat's eyes."
)
LONGEST = 200  # characters of a description
# MathJax without its menu, which is half of its weight; screen readers get the formulas as MathML.
MATHJAX = ["core", "input/tex", "output/chtml", "a11y/assistive-mml"]


def description(doctree: nodes.document, longest: int = LONGEST) -> str:
    """The first paragraph of a page, cut between words."""
    words = next((paragraph.astext() for paragraph in doctree.findall(nodes.paragraph)), "").split()
    text = " ".join(words)
    while len(text) > longest:
        words.pop()
        text = " ".join(words).rstrip(",;:.") + " …"
    return text


def preview(app: Sphinx, pagename: str, title: str, about: str) -> str:
    """The tags that search engines and social networks read; addresses are absolute, from the book's `baseurl`."""
    home, book = app.config.html_baseurl, app.config.html_title
    properties = {
        "og:type": "website" if pagename == app.config.root_doc else "article",
        "og:site_name": book,
        "og:title": title,
        "og:description": about,
        "og:url": f"{home}{pagename}.html",
        "og:image": home + CARD,
        "og:image:width": str(CARD_SIZE[0]),
        "og:image:height": str(CARD_SIZE[1]),
        "og:image:alt": CARD_ALT,
    }
    tags = [f'<meta property="{name}" content="{escape(value)}" />' for name, value in properties.items()]
    names = {"description": about, "twitter:card": "summary_large_image"}
    tags += [f'<meta name="{name}" content="{escape(value)}" />' for name, value in names.items()]
    return "\n".join(["", *tags, ""])


def run_links(header_buttons: list[dict]) -> str:
    """Plain links to what the theme keeps under the rocket; nothing where a page cannot be run."""
    launch = [button for group in header_buttons if group["label"] == "launch-buttons" for button in group["buttons"]]
    links = [f'<a class="run-link" href="{escape(b["url"])}">Run in {b["text"]}</a>' for b in launch]
    return f'<p class="run-links d-print-none">{" ".join(links)}</p>' if links else ""


def edit_on_main(header_buttons: list[dict]) -> None:
    """Let *suggest edit* lead to `main`: the pages of an edition are made from a tag, and no tag can be edited."""
    for group in header_buttons:
        for button in group.get("buttons", []):
            if button.get("label") == "source-edit-button":
                button["url"] = re.sub(r"/edit/[^/]+/", "/edit/main/", button["url"])


def extend(app: Sphinx, pagename: str, templatename: str, context: dict, doctree: nodes.document | None) -> None:
    """Complete the context from which a page is written."""
    if doctree is None:  # the search page and the index
        return
    title = app.env.titles[pagename].astext()
    context["metatags"] += preview(app, pagename, title, description(doctree))
    edit_on_main(context["header_buttons"])
    context["body"] = context["body"].replace("</h1>", "</h1>" + run_links(context["header_buttons"]), 1)
    if 'class="math' not in context["body"]:  # Sphinx loads it for the formulas of all chapters below a page, too
        scripts = context["script_files"]
        context["script_files"] = [script for script in scripts if app.config.mathjax_path not in str(script.filename)]


TOGGLE = '<summary><span class="toctree-toggle"'  # of the theme, a button without a name


def name_toggles(app: Sphinx, error: Exception | None) -> None:
    """Give the buttons that open a part of the contents a name, for those who hear the page."""
    for path in Path(app.outdir).rglob("*.html"):
        text = path.read_text(encoding="utf-8")
        if TOGGLE in text:
            named = TOGGLE.replace("<summary>", '<summary aria-label="Show or hide the pages below">')
            path.write_text(text.replace(TOGGLE, named), encoding="utf-8")


def setup(app: Sphinx) -> dict:
    app.config.mathjax_path = "mathjax/startup.js"  # of sphinx-mathjax-offline
    app.config.mathjax3_config = {"loader": {"load": MATHJAX}}
    app.connect("html-page-context", extend, priority=900)  # after the theme and MathJax
    app.connect("build-finished", name_toggles)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
