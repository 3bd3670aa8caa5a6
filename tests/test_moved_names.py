"""Names that went to the book's room can still be had from the top, with a word about their new place."""

import subprocess
import sys
from importlib import import_module

import pytest
import saliency_sanity

PLACES = {
    "assets": "assets",
    "bugs": "bugs",
    "claims": "claims",
    "data": "data",
    "dynamics": "training_dynamics",
    "explorer": "explorer",
    "live": "live_panel",
    "models": "models",
    "photographs": "photographs",
    "training": "training",
}


@pytest.mark.parametrize("name", PLACES)
def test_a_name_that_moved_says_where_it_is(name):
    advice = rf"saliency_sanity\.{name} is now saliency_sanity\.book\.{PLACES[name]}: from saliency_sanity.book import"
    with pytest.warns(DeprecationWarning, match=advice) as caught:
        found = getattr(saliency_sanity, name)
    assert found is import_module(f"saliency_sanity.book.{PLACES[name]}")
    assert [warning.filename for warning in caught] == [__file__]
    with pytest.warns(DeprecationWarning, match=advice) as caught:
        exec(f"from saliency_sanity import {name}", {})
    assert {warning.filename for warning in caught} == {"<string>"}


def test_names_that_moved_are_not_offered():
    assert not PLACES.keys() & {*dir(saliency_sanity), *saliency_sanity.__all__}


def test_nothing_new_is_warned_about(recwarn):
    for name in saliency_sanity.__all__:
        getattr(saliency_sanity, name)
    assert not recwarn.list


def test_without_the_extra_the_error_says_what_to_install():
    program = """
import sys, warnings
warnings.simplefilter("ignore")
sys.modules["PIL"] = None
import saliency_sanity
assert "torch" not in sys.modules
saliency_sanity.data
try:
    from saliency_sanity import photographs
except ImportError as error:
    print(error)
"""
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert "saliency_sanity.book.photographs needs PIL" in ran.stdout and "[book]" in ran.stdout, ran.stderr
