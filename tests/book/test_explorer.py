"""An explorer holds what it was given, in one element that needs nothing else."""

import base64
import io
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from bs4 import BeautifulSoup
from IPython.core.interactiveshell import InteractiveShell
from PIL import Image
from rendering import EXPLORER
from saliency_sanity import plots, sanity
from saliency_sanity.book import data, explorer, models, photographs

FOLDER = str(Path(explorer.__file__).parent)
AXES = {"stage": ["trained", "top", "all"], "method": ["Gradient", "Sobel"]}


def draw(*shape) -> np.ndarray:
    return np.random.default_rng(0).random(shape, dtype=np.float32)


@pytest.fixture(scope="module")
def given() -> dict:
    """Panels, curves and facts of an explorer of two axes."""
    levels = np.random.default_rng(1).integers(0, 256, (3, 2, 8, 6, 3), dtype=np.uint8)
    return {
        "panels": {"map": levels, "image": draw(1, 1, 8, 6)},
        "curves": {"likeness": {"share": draw(3, 2), "other_image": draw(1, 2), "twin": draw(1, 1)}},
        "facts": {"verdict": np.array([["sane", "insane"]])},
    }


@pytest.fixture(scope="module")
def element(given) -> BeautifulSoup:
    return BeautifulSoup(explorer.explore(AXES, title="Two methods", slider="stage", **given), "html.parser")


def pixels(source: str) -> np.ndarray:
    file = io.BytesIO(base64.b64decode(source.removeprefix("data:image/webp;base64,")))
    return np.asarray(Image.open(file).convert("RGB"))


def parts(element) -> list[dict]:
    return json.loads(element.find("script", type="application/json").string)["parts"]


def at(part: dict, *places: int) -> str:
    """What the part shows in a state, as the script finds it."""
    return part["values"][part["shown"][sum(step * place for step, place in zip(part["steps"], places))]]


def test_the_first_state_stands_in_the_html(element, given):
    image, grey = element.select("img")
    assert np.array_equal(pixels(image["src"]), given["panels"]["map"][0, 0])
    assert np.array_equal(pixels(grey["src"])[..., 0], (given["panels"]["image"][0, 0] * 255).round())
    assert image["alt"] == "map: stage trained, method Gradient" and grey["alt"] == "image"
    status = element.select_one("[role=status]").text
    assert "stage trained, method Gradient" in status and f"{given['curves']['likeness']['share'][0, 0]:.2f}" in status


@pytest.mark.parametrize("place", list(np.ndindex(3, 2)))
def test_every_state_is_stored(element, given, place):
    image, grey, _, share, floor, ceiling, verdict = parts(element)
    assert image["name"] == "map" and np.array_equal(pixels(at(image, *place)), given["panels"]["map"][place])
    assert len(grey["shown"]) == 1 and np.array_equal(pixels(at(grey, *place)), pixels(at(grey, 0, 0)))
    lines = given["curves"]["likeness"]
    assert at(share, *place) == f"{lines['share'][place]:.2f}" and at(ceiling, *place) == f"{lines['twin'][0, 0]:.2f}"
    assert at(floor, *place) == f"{lines['other_image'][0, place[1]]:.2f}"
    assert at(verdict, *place) == ("sane", "insane")[place[1]]


@pytest.mark.parametrize("method", range(2))
def test_heights_of_a_chart_are_in_proportion(element, given, method):
    chart = BeautifulSoup(at(parts(element)[2], 0, method), "html.parser")
    heights = [float(dot["cy"]) for dot in chart.select("circle")]
    heights += [float(chart.select_one(f".{line}")["d"].split("H")[0].split()[1]) for line in ("other_image", "twin")]
    lines = given["curves"]["likeness"]
    numbers = [*lines["share"][:, method], lines["other_image"][0, method], lines["twin"][0, 0]]
    slope, offset = np.polyfit(numbers, heights, 1)
    assert slope < 0
    np.testing.assert_allclose(heights, slope * np.array(numbers) + offset, atol=0.2)


def test_the_ticks_of_a_chart_say_where_numbers_lie(element, given):
    ticks = {float(t.text.replace("−", "-")): float(t["y"]) - 4 for t in element.select("svg text.left")}
    chart = BeautifulSoup(at(parts(element)[2], 0, 0), "html.parser")
    slope, offset = np.polyfit(list(ticks), list(ticks.values()), 1)
    value = given["curves"]["likeness"]["share"][1, 0]
    assert float(chart.select("circle")[1]["cy"]) == pytest.approx(slope * value + offset, abs=0.2)


def test_the_table_holds_all_numbers(element, given):
    head, *rows = [[cell.text for cell in row.select("th, td")] for row in element.select("table tr")]
    assert head == [
        "stage",
        "method",
        "likeness",
        "likeness, floor: another image",
        "likeness, ceiling: a twin network",
        "verdict",
    ]
    lines = given["curves"]["likeness"]
    for row, (i, j) in zip(rows, np.ndindex(3, 2), strict=True):
        numbers = lines["share"][i, j], lines["other_image"][0, j], lines["twin"][0, 0]
        assert row == [AXES["stage"][i], AXES["method"][j], *(f"{n:.2f}" for n in numbers), ("sane", "insane")[j]]


def test_controls_are_named_and_wait_for_the_script(element):
    assert element.select_one(".controls").has_attr("hidden") and element.select_one("details").has_attr("open")
    slider, menu = element.select_one("input[type=range]"), element.select_one("select")
    assert (slider["max"], slider.parent.text) == ("2", "stage")
    assert [option.text for option in menu.select("option")] == AXES["method"]
    assert menu.parent.text.startswith("method")


def test_nothing_is_fetched_and_no_id_can_clash(element):
    assert not element.select("[id]") and not element.select("link, [href]")
    assert not re.findall(r"https?:|url\(|@import", str(element))


def test_labels_are_text_and_never_markup():
    label = '</script><b title="x">'
    html = explorer.explore(
        {label: [label, "b"]}, {label: draw(2, 4, 4)}, title=label, facts={f"{label}!": np.array([label, ""])}
    )
    soup = BeautifulSoup(html, "html.parser")
    assert not soup.select("b[title]") and len(soup.select("script")) == 2
    assert soup.select_one(".explorer")["aria-label"] == label
    assert soup.img["alt"] == f"{label}: {label} {label}" and soup.select_one("table td").text == label


def test_a_gap_breaks_the_curve_and_reads_undefined():
    numbers = np.array([1.0, np.nan, 2.0, 3.0])
    html = explorer.explore({"t": range(4)}, {}, title="t", slider="t", curves={"c": {"c": numbers}})
    soup = BeautifulSoup(html, "html.parser")
    assert [dot["data-at"] for dot in soup.select("circle")] == ["0", "2", "3"]
    assert [piece.count("L") for piece in soup.select_one("figure path.curve-0")["d"].split("M")[1:]] == [0, 1]
    assert "undefined" in soup.select_one("details").text


def test_large_pictures_are_small_and_look_the_same():
    photograph = photographs.whole(160)[0][0]
    html = explorer.explore({"image": ["cat"]}, {"photograph": plots.picture(photograph)[None]}, title="A cat")
    shown = torch.from_numpy(pixels(BeautifulSoup(html, "html.parser").img["src"]) / 255).permute(2, 0, 1)
    assert len(html) < 40_000 and (shown - photograph).abs().mean() < 0.02


def test_a_wipe_lays_the_second_panel_over_the_first():
    html = explorer.explore({"m": "ab"}, {"left": draw(2, 4, 4), "right": draw(1, 4, 4)}, title="t", wipe=True)
    soup = BeautifulSoup(html, "html.parser")
    assert [i["alt"] for i in soup.select(".wipe img")] == ["left: m a", "right"]
    handle = soup.select_one(".wipe input[type=range]")
    assert handle.has_attr("hidden") and "left" in handle["aria-label"] and "right" in handle["aria-label"]


def test_switches_count_in_powers_of_two():
    html = explorer.explore({"bits": range(16)}, {"p": draw(16, 2, 2)}, title="t", switches=(2, 2))
    boxes = BeautifulSoup(html, "html.parser").select("fieldset input[type=checkbox]")
    assert [box["aria-label"] for box in boxes] == [f"row {i}, column {j}" for i in (1, 2) for j in (1, 2)]


def test_a_notebook_gets_the_element_and_the_build_its_data(given, monkeypatch):
    shown = explorer.explore(AXES, title="Two methods", slider="stage", **given)
    monkeypatch.delenv("SANITY_STATIC", raising=False)
    assert set(InteractiveShell().display_formatter.format(shown)[0]) == {"text/plain", "text/html"}
    monkeypatch.setenv("SANITY_STATIC", "1")
    bundle = InteractiveShell().display_formatter.format(shown)[0]
    assert set(bundle) == {"text/plain", "text/html", EXPLORER} and explorer.MIME == EXPLORER
    assert bundle["text/html"] == shown and re.fullmatch(r"<explorer of \d+ kB>", bundle["text/plain"])


def test_the_build_draws_the_same_element_without_the_package(given):
    gap = np.array([[0.5], [np.nan], [-np.inf]])
    shown = explorer.explore(AXES, title="t", slider="stage", **given | {"curves": {"c": {"d": gap}}})
    program = "import json, render, sys; sys.stdout.write(render.html(json.load(sys.stdin)))"
    command = [sys.executable, "-I", "-S", "-c", f"import sys; sys.path.append({FOLDER!r}); {program}"]
    data = json.dumps(shown.data, allow_nan=False)
    drawn = subprocess.run(command, input=data, capture_output=True, encoding="utf-8", check=True)
    assert drawn.stdout == shown and "undefined" in shown


GOOD = {"axes": {"m": ["a", "b"]}, "panels": {"p": draw(2, 4, 4)}}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"axes": {}}, "at least one label"),
        ({"axes": {"m": []}}, "at least one label"),
        ({"axes": {"m": ["a", "a"]}}, "same label twice"),
        ({"facts": {"m": np.zeros(2)}}, "name 'm' is used twice"),
        ({"panels": {}}, "nothing to show"),
        ({"panels": {"p": draw(3, 4, 4)}}, r"panel 'p'.*\(3,\).*m 2"),
        ({"panels": {"p": draw(4, 4)}}, r"\(\*axes, H, W\)"),
        ({"panels": {"p": draw(2, 4, 4, 4)}}, r"\(\*axes, H, W, 3\)"),
        ({"panels": {"p": np.full((2, 4, 4), np.nan)}}, "without NaN"),
        ({"panels": {"p": 2 + draw(2, 4, 4)}}, r"in \[0, 1\]"),
        ({"panels": {"p": np.zeros((2, 4, 4), dtype=int)}}, "bytes, or floats"),
        ({"facts": {"f": np.zeros(3)}}, "numbers of 'f'.*m 2"),
        ({"slider": "n"}, "not an axis; there are: m"),
        ({"curves": {"c": {"d": np.zeros(2)}}}, "name it with slider="),
        ({"slider": "m", "curves": {"c": {"d": np.zeros((2, 2))}}}, "'c, d'.*m 2"),
        ({"slider": "m", "curves": {"c": {"d": np.full(2, np.nan)}}}, "no finite number"),
        ({"switches": (3, 3)}, r"2\*\*9 labels"),
        ({"wipe": True}, "two panels of the same height"),
        ({"wipe": True, "panels": {"p": draw(2, 4, 4), "q": draw(2, 4, 5)}}, "two panels of the same height"),
    ],
)
def test_what_does_not_fit_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        explorer.explore(**(GOOD | changes), title="t")


def test_tensors_are_taken_as_they_are():
    values = torch.rand(2, 4, 4, requires_grad=True)
    html = explorer.explore({"m": "ab"}, {"p": values}, title="t")
    shown = pixels(BeautifulSoup(html, "html.parser").img["src"])[..., 0]
    assert np.array_equal(shown, (values[0].detach().numpy() * 255).round())


@pytest.fixture(scope="module")
def frame():
    images = data.load("clothes").images[:4]
    return sanity.parameter_randomization(
        models.cnn(), images, torch.zeros(4, dtype=torch.int64), methods=["gradient", "sobel"],
        metrics=["spearman", "ssim"], seeds=range(2), twins=[models.cnn(seed=1)], show_progress=False,
    )  # fmt: skip


def test_curves_of_a_check_carry_floor_and_ceiling(frame):
    curves = explorer.similarity_curves(frame, {"spearman": "ranks"})
    assert list(curves) == ["ranks"] and list(curves["ranks"])[1:] == ["other_image", "noise", "twin"]
    found = curves["ranks"][explorer.SHOWN]
    rows = frame.query("scheme == 'cascading' and metric == 'spearman'").set_index(["stage", "method", "image"])
    for stage, j, image in np.ndindex(5, 2, 4):
        mean = rows.similarity.loc[stage, ("gradient", "sobel")[j], image].mean()
        assert found[stage, j, image] == pytest.approx(mean)
    rows = frame.query("scheme == 'twin' and metric == 'spearman' and method == 'sobel' and image == 3")
    assert curves["ranks"]["twin"][0, 1, 3] == pytest.approx(rows.similarity.mean())
    assert list(explorer.similarity_curves(frame)) == ["spearman", "ssim"]


@pytest.mark.parametrize(("line", "kind"), [("twin", "ceiling"), ("other_image", "floor")])
def test_a_curve_without_its_lines_is_refused(frame, line, kind):
    floors = (frame.role == "floor") if kind == "floor" else frame.scheme == line
    with pytest.raises(ValueError, match=f"spearman has no {kind} for gradient, sobel"):
        explorer.similarity_curves(frame[~floors])
    with pytest.raises(ValueError, match=f"no {kind} for sobel:"):
        explorer.similarity_curves(frame[~(floors & (frame.method == "sobel"))])


def test_two_schemes_are_refused(frame):
    with pytest.raises(ValueError, match="one scheme"):
        explorer.similarity_curves(frame.assign(scheme=frame.scheme.where(frame.stage != 1, "independent")))


def test_colours_are_those_of_the_figures():
    values = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]])
    shown = plots.colours(values, signed=True, clip=1.0, levels=256)
    axis = plots.maps({"a": values}, ["x"], signed=True, clip=1.0).axes[0].images[0]
    np.testing.assert_allclose(shown, axis.to_rgba(axis.get_array())[None, ..., :3] * 255, atol=3)
    assert len(np.unique(plots.colours(torch.randn(2, 30, 30), signed=False, levels=8).reshape(-1, 3), axis=0)) <= 8
    with pytest.raises(ValueError, match="NaN or infinite"):
        plots.colours(torch.tensor([[float("nan")]]), signed=True)
