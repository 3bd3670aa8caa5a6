"""The blind test as HTML: on the landing page, and as a sheet to print; used by build_book.py."""

import json
from html import escape
from pathlib import Path

BEHAVIOUR, STYLE = (Path(__file__).with_name(name) for name in ("blind_test.js", "style.css"))
FOLDER = "blind_test"  # of the built book; what lies there is loaded by these pages alone
SIDES = {"trained": "trained", "untrained": "untrained", "edges": "edge detector"}
FOILS = {"untrained": "untrained network", "edges": "edge detector", "catch": "no right answer"}
SURE = {3: "certain", 2: "fairly sure", 1: "a guess"}


def files(folder: Path) -> dict[Path, bytes]:
    """What is served beside the pages, by its place in the sources of the book."""
    served = [STYLE, *(path for path in folder.iterdir() if path.suffix != ".json")]
    return {Path("book/extra", FOLDER, path.name): path.read_bytes() for path in served}


def parts(folder: Path) -> dict[Path, dict[str, str]]:
    """What is written into pages of book/, by page and place."""
    about = json.loads((folder / "trials.json").read_text(encoding="utf-8"))
    return {
        Path("book/index.md"): {"blind test: trials": _raw(_test(about)), "blind test: method": _method(about)},
        Path("book/blind_test_sheet.md"): {
            "blind test: sheet": _raw(_sheet(about)),
            "blind test: key": _raw(_answer_key(about)),
            "blind test: method": _method(about),
        },
    }


def answer(trial: dict) -> str | None:
    """The side of the trained network's map; None where the pair has no right answer."""
    if trial["foil"] == "catch":
        return None
    return "left" if trial["left"] == "trained" else "right"


def _raw(html: str) -> str:
    return f'```{{raw}} html\n<link rel="stylesheet" href="../{FOLDER}/{STYLE.name}">\n{html}\n```'


def _picture(file: str, alt: str, caption: str, kind: str = "") -> str:
    image = f'<img class="dark-light {kind}" src="../{FOLDER}/{file}" alt="{escape(alt)}" width="224" height="224">'
    return f"<figure>{image}<figcaption>{caption}</figcaption></figure>"


def _pair(trial: dict, answers: str) -> str:
    """The image and its two maps, described without a hint of what they are, and under them the answers."""
    files = trial["pictures"]
    return (
        '<div class="pair">'
        + _picture(files["image"], f"The image: {trial['title']}.", "the image")
        + _picture(files["left"], "The left map, to be judged by eye.", "left map", "map")
        + _picture(files["right"], "The right map, to be judged by eye.", "right map", "map")
        + f"{answers}</div>"
    )


def _told(trial: dict) -> str:
    """What the two maps were, for after the end."""
    shown = "each pixel by its rank" if trial["ranks"] else "at its own scale"
    sides = (f"{side.capitalize()}: {SIDES[trial[side]]}." for side in ("left", "right"))
    return f"{trial['method_title']}, {shown}. {' '.join(sides)}"


def _choice(number: int, value: str, label: str) -> str:
    field = f'<input type="radio" name="pair-{number}" value="{value}" required>'
    return f"<label>{field}<span>{label}</span></label>"


def _question(number: int, trial: dict, count: int) -> str:
    answers = ""
    for side in ("left", "right"):
        choices = (_choice(number, f"{side} {sure}", f"{side}, {word}") for sure, word in SURE.items())
        answers += f'<div class="{side}">{"".join(choices)}</div>'
    answers += f'<div class="unsure">{_choice(number, "none 0", "can’t tell")}</div>'
    legend = f"Pair {number} of {count}: which map comes from the trained network?"
    hidden = " hidden" if number > 1 else ""
    return f"<fieldset{hidden}><legend>{legend}</legend>{_pair(trial, answers)}</fieldset>"


def _test(about: dict) -> str:
    trials, end = about["trials"], about["end"]
    questions = "\n".join(_question(number, trial, len(trials)) for number, trial in enumerate(trials, start=1))
    key = [{"foil": trial["foil"], "answer": answer(trial), "text": _told(trial)} for trial in trials]
    return f"""<form id="blind-test" class="blind-test" autocomplete="off">
{questions}
<nav aria-label="Pairs" hidden><button type="button" class="btn">Back</button>
<output>1 of {len(trials)}</output>
<button type="submit" class="btn btn-primary">Next pair</button></nav>
<noscript><p>This is the first pair of {len(trials)}. Scripts are switched off here; the
<a href="blind_test_sheet.html">sheet to print</a> has all pairs, and the answers at its end.</p></noscript>
</form>
<section id="blind-test-results" class="blind-test" hidden>
<h3 tabindex="-1">What you could tell</h3>
<div class="scores"></div>
<div class="sureness"></div>
<p>That is all it says: it is about you, these pairs, two networks and four methods, and either interval misses in up
to one case of twenty. Who tells a map from an edge picture knows what edge pictures look like; it does not follow that
the map explains anything.</p>
<h3>One more pair</h3>
<div class="pair">{_last(end)}</div>
{_moral(end)}
<details><summary>Every pair with its answer</summary></details>
</section>
<script>
{BEHAVIOUR.read_text(encoding="utf-8")}
blindTest.start(...["blind-test", "blind-test-results"].map((id) => document.getElementById(id)), {json.dumps(key)});
</script>"""


def _last(end: dict) -> str:
    files = end["pictures"]
    return (
        _picture(files["image"], f"The image: {end['title']}.", "the image")
        + _picture(files["trained"], "Scattered dots: the object can hardly be made out.", "trained", "map")
        + _picture(files["untrained"], "The shape of the object in dots.", "never trained", "map")
    )


def _moral(end: dict) -> str:
    like, count = end["likeness"], end["images"]
    return f"""<p>The noisy map comes from a network that names this image right (Gradient). The one that looks like the
object comes from the same network with random weights, which has learned nothing (Guided Backprop). Weights
<em>and</em> method differ: the pair shows how maps can look, not what training does to the map of one method. It was
picked by a rule: of {count} objects on plain grey that the network names right, it is the one where the untrained map
resembles the edges of the image by most more than the trained map does (correlation {like["untrained"]:.2f} against
{like["trained"]:.2f}). The untrained map resembles the edges more in {end["untrained_more_like_edges"]} of the {count};
yet the trained map lies better on the object (area under the ROC curve) in {end["trained_more_on_object"]}. How a map
looks and what it knows are two questions.</p>
<p><strong>Looking is no test.</strong> A test changes the network and asks whether the map notices:
<a href="../notebooks/randomization/cascading.html">run the first one</a>.</p>"""


def _method(about: dict) -> str:
    """How the trials were made, in Markdown."""
    photographs, clothes = about["eligible"].values()
    count = {foil: sum(trial["foil"] == foil for trial in about["trials"]) for foil in FOILS}
    return f"""The draw follows from the seed {about["seed"]}, out of all images that the trained networks name right:
{photographs} of photographed objects on four backgrounds (SqueezeNet, trained on ImageNet) and {clothes:,} test images
of clothes (our small network, trained from eight seeds).

- {count["untrained"]} pairs set the map of a trained network against the same method on the same network with random
  weights.
- {count["edges"]} pairs set it against the Sobel edges of the image. The two kinds are scored apart.
- {count["catch"]} pairs have no right answer: two trained networks that started from different seeds, or two with
  random weights.

Each of the first two kinds meets each method twice: {", ".join(about["methods"])}.
Grad-CAM is left out, because nobody could mistake its coarse blobs for edges. Half of the pairs show each map at its
own scale, white from its 99 % quantile on. The other half show each pixel by its rank, ties in random order: both maps
have exactly the same grey levels, and contrast gives nothing away; there are too few pairs to score the two halves
apart. All maps are unsigned and explain the class that the
trained network names."""


def _sheet(about: dict) -> str:
    boxes = "".join(f"<span>☐ {word}</span>" for word in SURE.values())
    ticks = f'<p class="left">left{boxes}</p><p class="right">right{boxes}</p><p class="unsure">☐ can’t tell</p>'
    pairs = (f"<li>{_pair(trial, ticks)}</li>" for trial in about["trials"])
    return f'<ol class="blind-sheet blind-paper">{"".join(pairs)}</ol>'


def _answer_key(about: dict) -> str:
    rows = "".join(
        f"<tr><th scope='row'>{number}</th><td>{answer(trial) or 'can’t tell'}</td><td>{FOILS[trial['foil']]}</td>"
        f"<td>{_told(trial)}</td></tr>"
        for number, trial in enumerate(about["trials"], start=1)
    )
    head = "".join(f"<th scope='col'>{name}</th>" for name in ("Pair", "Answer", "Against", "The maps"))
    return (
        f'<table class="table blind-key"><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table>'
        f'<div class="blind-test blind-paper"><div class="pair">{_last(about["end"])}</div>{_moral(about["end"])}</div>'
    )
