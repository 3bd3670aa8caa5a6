"""Fixtures that several files share: a device, and a browser that reads the built book."""

import importlib.abc
import os
import shutil
import sys
from pathlib import Path

import pytest
import stamp
import torch
from browser import FLAGS, MILLISECONDS, NO_BOOK, NO_BROWSER, StillBrowser, find_browser, serve
from networks import images, targets

ROOT = Path(__file__).parent.parent
HTML = ROOT / "_build/html"
NO_NODE = "there is no Node: install it (Debian's nodejs)"


class NoHelpers(importlib.abc.MetaPathFinder):
    """The folder of the package, which Python finds in the working directory, is not its name."""

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "helpers":
            raise ImportError("import saliency_sanity: helpers is the name of its folder only")


sys.meta_path.insert(0, NoHelpers())


@pytest.fixture
def x():
    """Four small images; some files have others."""
    return images(4, dtype=torch.float64)


@pytest.fixture
def y():
    """Their classes."""
    return targets(4)


def pytest_addoption(parser):
    parser.addoption("--library", action="store_true", help="only the tests of the library, which mirror its modules")


def pytest_ignore_collect(collection_path, config):
    """With --library, leave out what is no test of a module of the library, and what needs the book's tools."""
    place = collection_path.relative_to(ROOT / "tests") if collection_path.is_relative_to(ROOT / "tests") else None
    if not config.option.library or place is None or not place.parts:
        return None
    module = place.parts[0].removeprefix("test_")
    return module == "book" or not (ROOT / "helpers" / module).exists()


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Leave out tests of files that are as they were when these tests last passed."""
    items[:], left = stamp.split(items, config)
    if left:
        config.hook.pytest_deselected(items=left)


def pytest_sessionfinish(session, exitstatus):
    """Note which tests of files have passed: in the process that hears of all tests, and where nothing failed."""
    reporter = session.config.pluginmanager.get_plugin("terminalreporter")
    if exitstatus or not stamp.usual(session.config) or reporter is None or hasattr(session.config, "workerinput"):
        return
    passed = {report.nodeid.split("::")[0] for report in reporter.stats.get("passed", []) if "files" in report.keywords}
    if passed:
        stamp.write(passed)


@pytest.fixture(params=["cpu"] + ["cuda"] * torch.cuda.is_available())
def device(request) -> torch.device:
    """The CPU, and the GPU where there is one."""
    return torch.device(request.param)


def skip_or_fail(reason: str):
    """Skip on a reader's machine; in continuous integration a test that cannot run has failed."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="module")
def html() -> Path:
    """The folder of the built pages."""
    if not (HTML / "index.html").exists():
        skip_or_fail(NO_BOOK)
    return HTML


@pytest.fixture(scope="module")
def site(html):
    """The address at which the built pages are served on this machine; ends in a slash."""
    with serve(html) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    """Headless Chromium, steered by Playwright; its pages hold still."""
    program = find_browser()
    if program is None:
        skip_or_fail(NO_BROWSER)
    from playwright.sync_api import expect, sync_playwright

    expect.set_options(timeout=MILLISECONDS)
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=program, args=FLAGS, timeout=MILLISECONDS)
        yield StillBrowser(chromium)
        chromium.close()


@pytest.fixture(scope="module")
def node() -> str:
    """The program that runs JavaScript without a browser."""
    program = shutil.which("node")
    if program is None:
        skip_or_fail(NO_NODE)
    return program


def pytest_terminal_summary(terminalreporter):
    """Say at the end, once and plainly, what was not tested."""
    skipped = " ".join(str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
    untested = {NO_BROWSER: "THE BUILT PAGES", NO_BOOK: "THE BUILT PAGES", NO_NODE: "THE PLAYGROUND'S ENGINE"}
    for reason, what in untested.items():
        if reason in skipped:
            terminalreporter.section(f"NOT TESTED: {what}", red=True)
            terminalreporter.line(reason)
