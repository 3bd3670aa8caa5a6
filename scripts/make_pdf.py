"""Print the built pages in reading order into one file, _build/book.pdf.

    python scripts/make_pdf.py                          the whole book
    python scripts/make_pdf.py notebooks/theory/linear_model book/glossary     these pages only

Needs Chromium (or its address in the variable CHROMIUM). Links to other pages lead to the published book.
"""

import argparse
import io
import os
import sys
from pathlib import Path

from address import pages, repository
from browser import FLAGS, NO_BOOK, NO_BROWSER, find_browser, serve, settle
from pypdf import PdfReader, PdfWriter
from run_chapters import toc_entries

FOOTER = """<p style="font-size: 8px; text-align: center; width: 100%">
<span class="title"></span> · <span class="pageNumber"></span></p>"""
PAPER = {"format": "A4", "scale": 0.8, "margin": dict.fromkeys(["top", "bottom", "left", "right"], "18mm")}
PAPER |= {"print_background": True, "display_header_footer": True, "header_template": "<p></p>"}
OUTWARD = """home => {
    for (const link of document.querySelectorAll("a[href]"))
        if (link.href.startsWith(location.origin) && !link.getAttribute("href").startsWith("#"))
            link.href = link.href.replace(location.origin + "/", home);
}"""


def print_page(page, address: str, home: str) -> PdfReader:
    """The PDF of one page, with formulas set and links that leave it led to the published book at `home`."""
    page.goto(address)
    settle(page)
    page.evaluate(OUTWARD, home)
    printed = page.pdf(**PAPER, footer_template=FOOTER)
    return PdfReader(io.BytesIO(printed))


def make_pdf(root: Path, entries: list[str], browser) -> PdfWriter:
    """The pages `entries` one after the other, each with a bookmark."""
    book = PdfWriter()
    with serve(root / "_build/html") as site:
        page = browser.new_page(color_scheme="light")
        for entry in entries:
            printed = print_page(page, f"{site}{entry}.html", pages(repository(root)))
            book.append(printed, outline_item=page.locator("article h1").first.inner_text().strip("#\n "))
            print(f"{entry}: {len(printed.pages)} pages", flush=True)
    return book


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", metavar="page", help="as in _toc.yml; all of them if none is named")
    options = parser.parse_args()
    root = Path(__file__).resolve().parent.parent
    known = toc_entries(root)
    if unknown := [entry for entry in options.entries if entry not in known]:
        sys.exit(f"Not in _toc.yml: {', '.join(unknown)}")
    if not (root / "_build/html/index.html").exists():
        sys.exit(f"The book was not printed: {NO_BOOK}.")
    if (program := find_browser()) is None:
        sys.exit(f"The book was not printed: {NO_BROWSER}.")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        book = make_pdf(root, options.entries or known, playwright.chromium.launch(executable_path=program, args=FLAGS))
    book.write(root / "_build/book.pdf")
    print(f"The book is printed: {os.path.relpath(root / '_build/book.pdf')}, {len(book.pages)} pages")


if __name__ == "__main__":
    main()
