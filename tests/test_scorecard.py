"""The scorecard: cards of hand-made notebooks against the claims, the counts, and what the page says."""

import re
from pathlib import Path

import nbformat
import pytest
import scorecard
from build_book import checked, fill
from run_chapters import Run
from saliency_sanity.book import claims

ONE, TWO = Path("notebooks/part/one.ipynb"), Path("notebooks/part/two.ipynb")
FIRST = """
claims:
  - {id: more, title: More of it, statement: More is more., source: {key: adebayo2018sanity, where: section 4},
     test: above, margin: 0.1, expected: holds, design: own images, history: [{date: 2026-01-02, what: written down}]}
  - {id: both, title: Both parts, statement: Both & all., source: {key: adebayo2018sanity, where: section 5},
     test: equivalent, margin: 0.1, parts: {first: holds, second: contradicted here}, design: own images,
     history: [{date: 2026-01-02, what: written down},
               {date: 2026-01-03, what: "margin: 0.2 -> 0.1", why: It was < wide.},
               {date: 2026-01-03, what: "the statement was: “Both.”"}]}
"""
SECOND = """
claims:
  - id: other
    title: Another one
    statement: Another.
    source: {key: this book, where: Two}
    test: above
    margin: 0.1
    expected: holds
    design: crossed
    history: [{date: 2026-01-02, what: written down}]
dropped:
  - id: gone
    title: Gone for good
    statement: It goes.
    source: {key: this book, where: Two}
    test: above
    margin: 0.3
    expected: holds
    history: [{date: 2026-01-02, what: written down}, {date: 2026-01-04, what: dropped, why: Too bold.}]
"""
TOC = """
format: jb-book
root: book/index
parts:
  - caption: First steps
    chapters:
      - file: notebooks/part/one
  - caption: Second steps
    chapters:
      - file: notebooks/part/two
"""
CITED = {"adebayo2018sanity": "Adebayo et al., 2018"}


def finding(name="", outcome="holds", expected="holds", p_value=0.001) -> dict:
    return {
        "name": name, "outcome": outcome, "expected": expected, "p_value": p_value, "mean": -0.25,
        "interval": [-0.3, -0.2], "scatter": True, "p_bound": False, "replicates": [-0.3, -0.25, -0.2, -0.22, -0.28],
        "unit": "", "units": 0, "undefined": 0,
    }  # fmt: skip


def card(id, *findings) -> dict:
    test, margin = ("equivalent", 0.1) if id == "both" else ("above", 0.1)
    return {"id": id, "test": test, "margin": margin, "replicated": "training seeds", "findings": list(findings)}


MORE = card("more", finding())
BOTH = card("both", finding("first", p_value=0.03), finding("second", claims.CONTRADICTED, claims.CONTRADICTED, 1.0))
OTHER = card("other", finding(p_value=0.02))


@pytest.fixture
def book(tmp_path) -> Path:
    """A book of two chapters without outputs, and their claims."""
    folder = tmp_path / scorecard.FOLDER
    folder.mkdir(parents=True)
    for chapter, text in {ONE: FIRST, TWO: SECOND}.items():
        (folder / f"{chapter.stem}.yml").write_text(text, encoding="utf-8")
    (tmp_path / "_toc.yml").write_text(TOC, encoding="utf-8")
    for chapter in (ONE, TWO):
        write(tmp_path / chapter, f"Chapter {chapter.stem}")
    return tmp_path


def write(path: Path, title: str, *cards) -> Path:
    outputs = [nbformat.v4.new_output("display_data", {scorecard.CLAIM: card}) for card in cards]
    cells = [nbformat.v4.new_markdown_cell(f"# {title}"), nbformat.v4.new_code_cell("check()", outputs=outputs)]
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


def read(book: Path, one=(MORE, BOTH), two=(OTHER,)) -> list[scorecard.Chapter]:
    """The chapters as if they had run and shown these cards; `None`: not run."""
    ran = {}
    for chapter, cards in {ONE: one, TWO: two}.items():
        ran[chapter] = write(book / "_build/executed" / chapter, f"Chapter {chapter.stem}", *cards) if cards else None
    return scorecard.read(book, ran)


def cards_of(chapters) -> str:
    """All pages of the scorecard that have cards."""
    pages = scorecard.pages(chapters, CITED)
    return "\n".join(places["scorecard: claims"] for page, places in pages.items() if page != scorecard.OVERVIEW)


def test_the_words_are_those_of_the_package():
    assert scorecard.CLAIM == claims.MIME and scorecard.LEVEL == claims.LEVEL
    assert (scorecard.HOLDS, scorecard.CONTRADICTED, scorecard.UNDECIDED) == (
        claims.HOLDS, claims.CONTRADICTED, claims.UNDECIDED,
    )  # fmt: skip


def test_a_real_card_is_read(book, monkeypatch):
    monkeypatch.setattr(claims, "FOLDER", book / scorecard.FOLDER)
    data = claims.check("other", [[0.4, 0.5], [0.5, 0.6], [0.6, 0.4], [0.5, 0.5], [0.4, 0.6]], replicated="draws")
    page = cards_of(read(book, two=[data._repr_mimebundle_()[claims.MIME]]))
    assert "<b>0.500</b>" in page and "over 5 draws" in page and "2 images" in page


def test_every_claim_with_one_card_is_no_problem(book):
    assert scorecard.problems(read(book)) == []


@pytest.mark.parametrize(
    ("cards", "problem"),
    [
        ([MORE], "'both' is claimed, but no card"),
        ([MORE, BOTH, card("new", finding())], "the card 'new' is of no claim"),
        ([MORE, BOTH, OTHER], "the card 'other' is of no claim"),
        ([MORE, MORE, BOTH], "'more' has 2 cards"),
    ],
)
def test_claims_and_cards_must_match(book, cards, problem):
    [found] = scorecard.problems(read(book, one=cards))
    assert problem in found and found.startswith("notebooks/part/one.ipynb: ")


def test_a_card_in_a_chapter_without_claims_is_a_problem(book):
    (book / scorecard.FOLDER / "one.yml").unlink()
    assert len(scorecard.problems(read(book))) == 2


def test_a_mismatch_stops_the_whole_build_and_not_that_of_one_chapter(book, capsys):
    runs = {ONE: Run(write(book / "executed.ipynb", "Chapter one", MORE), 1.0, 100)}
    with pytest.raises(SystemExit, match="'both' is claimed"):
        checked(book, runs, strict=True)
    chapters = checked(book, runs, strict=False)
    assert "'both' is claimed" in capsys.readouterr().out
    assert "Not checked in this copy." in cards_of(chapters)


@pytest.mark.parametrize(
    ("p_values", "adjusted"),
    [
        ([], []),
        ([0.04], [0.04]),
        ([0.01, 0.04, 0.03], [0.03, 0.06, 0.06]),
        ([0.6, 0.001, 0.5], [1.0, 0.003, 1.0]),
    ],
)
def test_holm(p_values, adjusted):
    assert scorecard.holm(p_values) == pytest.approx(adjusted)


def test_the_summary_counts(book):
    text = scorecard.summary(read(book))
    assert "**3 claims** in 2 chapters" in text and "4 tests" in text
    assert "3 hold, 1 contradicted here, 0 undecided" in text and "None came out" in text
    assert "we test 2 claims: 1 reproduced in every part, 1 in some parts" in text
    assert "3 tests were expected to hold" in text and "0.2 would hold" in text  # 0.15
    assert "3 of the 3 stand after it" in text
    assert "| [First steps](/book/scorecard/first_steps.md) | 2 | 3 | 2 | 1 | 0 |" in text
    assert "| [](/notebooks/part/one.ipynb) | 2 | 3 | 2 | 1 | 0 |" in cards_of(read(book))


def test_holm_runs_over_a_chapter_and_only_over_what_should_hold(book):
    late = card("both", finding("first", p_value=0.04), finding("second", p_value=0.03))
    page, text = cards_of(read(book, one=[MORE, late])), scorecard.summary(read(book, one=[MORE, late]))
    assert "p = 0.04, after Holm 0.06, which no longer holds" in page
    assert "p = 0.02, after Holm 0.02;" in page  # the only one of the other chapter
    assert "2 of the 4 stand after it" in text


def test_a_surprise_is_marked(book):
    chapters = read(book, two=[card("other", finding(outcome="undecided"))])
    assert "1 came out other than expected" in scorecard.summary(chapters)
    page = cards_of(chapters)
    assert page.count('<strong class="claim-unexpected">') == 1 and "NOT as expected: holds" in page
    assert 'data-outcome="undecided|surprise"' in page


def test_the_scorecards_strictness_is_that_of_the_package(monkeypatch):
    words = (claims.HOLDS, claims.CONTRADICTED, claims.UNDECIDED)
    for seed in ("", "0", "3"):
        monkeypatch.setenv("SANITY_SEED", seed)
        found = {(o, e): scorecard.surprising({"outcome": o, "expected": e}) for o in words for e in words}
        assert found == {pair: claims.surprising(*pair) for pair in found}
        assert sum(found.values()) == (2 if seed == "3" else 6)


def test_too_many_undecided_findings_are_a_problem(book, capsys):
    sure = [finding(str(n)) for n in range(45)]
    one, two = finding("open", outcome="undecided"), finding("open, too", outcome="undecided")
    told = finding("told", outcome="undecided", expected="undecided")
    few = read(book, one=[MORE, card("both", *sure, told)], two=[card("other", one, *sure)])
    assert scorecard.problems(few) == [] and scorecard.undecided(few) == [f"{TWO}: 'other', open: undecided"]
    many = read(book, one=[MORE, card("both", *sure, told)], two=[card("other", one, two, *sure)])
    assert len(scorecard.undecided(many)) == 2
    assert scorecard.problems(many) == ["2 of 94 findings are undecided, more than 2 %"]
    runs = {ONE: Run(book / "_build/executed" / ONE, 1.0, 100), TWO: Run(book / "_build/executed" / TWO, 1.0, 100)}
    with pytest.raises(SystemExit, match="2 of 94 findings are undecided"):
        checked(book, runs, strict=True)
    assert "'other', open, too: undecided" in capsys.readouterr().out


@pytest.mark.parametrize(("test", "interval", "near"), [
    ("above", [0.15, 0.19], False), ("above", [0.13, 0.17], True), ("above", [0.02, 0.04], False),
    ("above", [0.05, 0.2], True), ("equivalent", [-0.05, -0.04], False), ("equivalent", [-0.09, -0.07], True),
    ("equivalent", [0.07, 0.09], True), ("above", None, False),
])  # fmt: skip
def test_close_calls_are_counted(book, test, interval, near):
    close = card("more", finding() | {"interval": interval}) | {"test": test}
    assert scorecard.near(close, close["findings"][0]) == near
    far = [card("both"), card("other", finding() | {"interval": [5.0, 5.1]})]
    text = scorecard.summary(read(book, one=[close, far[0]], two=[far[1]]))
    assert f"{int(near)} of 2 findings lie within one interval of their margin" in text


def test_no_scatter_and_a_bound_of_p_are_said(book):
    alike = finding(p_value=1 / 32) | {"interval": None, "scatter": False, "p_bound": True}
    page = cards_of(read(book, two=[card("other", alike)]))
    assert "no scatter over 5 training seeds; all replicates are equal, p ≤ 0.031" in page


def test_a_claim_names_its_source_and_its_chapter(book):
    page = cards_of(read(book))
    assert '<h3 class="claim-title">Both parts</h3>' in page and "<p>Both &amp; all.</p>" in page
    link = '<a href="../bibliography.html#cite-adebayo2018sanity">Adebayo et al., 2018</a>, section 5'
    assert link in page and '<p class="claim-source">This book, Two</p>' in page
    assert "## Chapter two\n\n[Read the chapter](/notebooks/part/two.ipynb)" in page
    assert '<a href="../../notebooks/part/two.html#claim-other">In its chapter</a>' in page
    assert page.count("<circle") + page.count('<rect x="0') >= 3 * 5


def test_every_claim_is_on_one_page_once_and_on_the_overview(book):
    written = scorecard.pages(read(book), CITED)
    ids = {"first_steps": ["more", "both"], "second_steps": ["other", "gone"]}
    assert set(written) == {scorecard.OVERVIEW, *(Path(f"book/scorecard/{part}.md") for part in ids)}
    for part, expected in ids.items():
        page = written[Path(f"book/scorecard/{part}.md")]["scorecard: claims"]
        assert re.findall(r'<div class="claim-card [^>]* id="claim-([^"]+)"', page) == expected
    rows = re.findall(r'<tr id="claim-([^"]+)".*?<a href="([^"]+)">', written[scorecard.OVERVIEW]["scorecard: index"])
    assert rows == [(id, f"scorecard/{part}.html#claim-{id}") for part, found in ids.items() for id in found]


def test_the_filter_has_labels_and_shows_all_without_scripts(book):
    for places in scorecard.pages(read(book), CITED).values():
        text = places.get("scorecard: index") or places["scorecard: claims"]
        [form] = re.findall(r"<form[^>]* hidden>.*?</form>", text)
        assert len(re.findall(r'<label>\w+ <select name="(?:group|source|outcome)">', form)) == 3
        assert 'aria-live="polite"' in form and not re.search(r"<(?:tr|div)[^>]* hidden", text)
        for name in ("group", "source", "outcome"):
            found = {word for one in re.findall(rf'data-{name}="([^"]*)"', text) for word in one.split("|")}
            options = re.search(rf'name="{name}">(.*?)</select>', form)[1]
            assert set(re.findall(r'value="([^"]+)"', options)) == found


def test_a_part_without_a_page_is_named(book):
    pages = ["book/scorecard", "book/scorecard/first_steps"]
    [line] = scorecard.pageless(read(book), pages)
    assert "'Second steps'" in line and "book/scorecard/second_steps.md" in line
    assert scorecard.pageless(read(book), [*pages, "book/scorecard/second_steps"]) == []


def test_the_chapters_cards_know_the_book(book):
    found = scorecard.options(read(book), CITED)
    assert found["both"] == {
        "book": "../../book/", "cited": "Adebayo et al., 2018", "revised": True,
        "history": "../../book/scorecard/first_steps.html#history-both",
    }  # fmt: skip
    assert not found["more"]["revised"] and found["other"]["cited"] == ""
    assert 'id="history-both"' in cards_of(read(book))


def test_chapters_that_were_not_run(book):
    chapters = read(book, two=None)
    assert scorecard.problems(chapters) == []
    assert "| [Second steps](/book/scorecard/second_steps.md) | 1 | not run |" in scorecard.summary(chapters)
    assert "Not checked in this copy." in cards_of(chapters)
    assert "**0 claims** in 0 chapters" in scorecard.summary(read(book, one=None, two=None))


def test_places_of_a_page_are_filled():
    assert fill("a\n\n% x: y\n\nb\n", {"x: y": "1 \\1\n2"}) == "a\n\n1 \\1\n2\n\nb\n"
    with pytest.raises(ValueError, match="no line '% z'"):
        fill("a\n", {"z": "1"})


def test_a_claim_keeps_its_history_folded(book):
    page = cards_of(read(book))
    folded = "".join(re.findall(r"<details>.*?</details>", page))
    assert folded.count('<ul class="history">') == page.count('<ul class="history">') == 4
    assert "<li><time>2026-01-03</time>: margin: 0.2 → 0.1. It was &lt; wide.</li>" in folded
    assert "<li><time>2026-01-03</time>: the statement was: “Both.”</li></ul>" in folded


def test_dropped_claims_stay_shown(book):
    chapters = read(book)
    page = cards_of(chapters)
    assert '<h3 class="claim-title">Gone for good</h3>' in page and "<p>Dropped on 2026-01-04.</p>" in page
    assert "<li><time>2026-01-04</time>: dropped. Too bold.</li>" in page
    assert 'data-outcome="dropped"' in page and scorecard.problems(chapters) == []


def test_a_card_of_a_dropped_claim_is_a_problem(book):
    assert scorecard.problems(read(book, two=[OTHER, card("gone", finding())])) == [
        f"{TWO}: the card 'gone' is of no claim"
    ]


def test_a_chapter_without_claims_is_left_out(book):
    (book / scorecard.FOLDER / "two.yml").unlink()
    assert [chapter.path for chapter in read(book, two=None)] == [ONE]
