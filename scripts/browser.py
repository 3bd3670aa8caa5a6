"""The built pages on this machine, and the browser that reads them; used by make_pdf.py and by the tests."""

import functools
import http.server
import os
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking".split()
FLAGS += ["--disable-component-update", "--disable-sync"]
MILLISECONDS = 180_000
NO_BROWSER = "there is no Chromium: install it, or name it in the variable CHROMIUM"
NO_BOOK = "there is no built book: run `make book`"

# Pages in which nothing moves: they can be measured at any moment. The sheet is there before the page's own.
STILL = """{
    const sheet = new CSSStyleSheet();
    sheet.replaceSync(`*, *::before, *::after {
        transition: none !important; animation: none !important; scroll-behavior: auto !important;
    }`);
    document.adoptedStyleSheets.push(sheet);
}"""
# A page is complete when it has its fonts and formulas, its pictures, its explorers and what it computes.
COMPLETE = """async () => {
    const frame = () => new Promise(requestAnimationFrame);
    const busy = () => document.querySelector(".explorer:not([data-ready]), [aria-busy=true]");
    const loads = (image) => !image.complete && image.loading !== "lazy";
    await document.fonts.ready;
    await window.MathJax?.startup?.promise;
    await frame();
    do await frame(); while (busy() || [...document.images].some(loads));
    await frame();
    return true;
}"""
SCRIPTED = "matchMedia('(scripting: enabled)').matches"


def find_browser() -> str | None:
    """The program Chromium, if this machine has it."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)


class SilentHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


class StillBrowser:
    """A browser whose pages hold still: no transition, no animation, and motion is unwelcome where nothing is said.

    A machine may be slow: what is waited for has minutes to come.
    """

    def __init__(self, chromium):
        self.chromium = chromium

    def new_context(self, **options):
        context = self.chromium.new_context(**{"reduced_motion": "reduce"} | options)
        context.set_default_timeout(MILLISECONDS)
        context.add_init_script(STILL)
        return context

    def new_page(self, **options):
        return self.new_context(**options).new_page()


def settle(page) -> None:
    """Wait until a page is complete and has drawn what was asked for; input that is on its way has arrived then."""
    page.wait_for_load_state("load")
    if page.evaluate(SCRIPTED):  # elsewhere no frame is announced and no promise is kept
        page.wait_for_function(COMPLETE)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve a folder on this machine; gives its address, which ends in a slash."""
    handler = functools.partial(SilentHandler, directory=folder)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
