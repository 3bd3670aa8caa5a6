"""The search for errors that no test sees: the edits, the sample, and what counts as death, in a small book."""

import ast

import mutants
import pytest

SOURCE = '''"""Words 1 < 2."""

def within(values: "list[1]", low=0.5, ä=True):
    if not values or len(values[1:]) == 0:
        raise ValueError(f"{1 + 1}")
    values.sort()
    return [v for v in values if low <= v and v - 3 < 4] if ä else None
'''
EDITS = {
    "low=0.5": ["low=0.45"],
    "ä=True": ["ä=False"],
    "if not values or len(values[1:]) == 0:": [
        "if (not values and len(values[1:]) == 0):",
        "if (values) or len(values[1:]) == 0:",
        "if not values or (len(values[1:]) != 0):",
        "if not values or len(values[:]) == 0:",
        "if not values or len(values[0:]) == 0:",
        "if not values or len(values[1:]) == 1:",
    ],
    "values.sort()": ["pass"],
    "return [v for v in values if low <= v and v - 3 < 4] if ä else None": [
        "if (low <= v or v - 3 < 4)] if ä",
        "if (low < v) and v - 3 < 4] if ä",
        "if low <= v and (v - 3 <= 4)] if ä",
        "if low <= v and (v + 3) < 4] if ä",
        "if low <= v and v - 2 < 4] if ä",
        "if low <= v and v - 3 < 3] if ä",
        "] if (not ä) else None",
    ],
}


def test_every_kind_of_edit_is_made_and_no_word_type_or_message_changed():
    found = [mutant.lines(SOURCE) for mutant in mutants.mutants("f.py", SOURCE)]
    wanted = [(old, new) for old, news in EDITS.items() for new in news]
    assert len(found) == len(wanted)
    for old, new in wanted:
        assert [1 for _, before, after in found if old in before and new in after] == [1], new
    assert {number for number, *_ in found} == {3, 4, 6, 7}
    for mutant in mutants.mutants("f.py", SOURCE):
        assert ast.dump(ast.parse(mutant.applied(SOURCE))) != ast.dump(ast.parse(SOURCE))


def test_the_looks_of_a_figure_are_no_errors():
    assert mutants.mutants("f.py", "axis.plot(x, alpha=0.5, color=2)[0].y = z(alpha=1)\n")[1:] == []


def test_a_sample_follows_from_the_edits_and_is_even_over_files():
    sources = {"a.py": SOURCE, "b.py": "x = 1 < 2\n", "c.py": SOURCE.replace("low", "high")}
    whole = mutants.sample(sources, 1000)
    assert len(whole) == 2 * 16 + 3 and whole == sorted(whole)
    few, more = (set(mutants.sample(sources, count)) for count in (6, 12))
    assert few < more and [sum(m.file == name for m in few) for name in sources] == [2, 2, 2]
    moved = mutants.sample({name: f"# a line\n{source}" for name, source in sources.items()}, 6)
    assert {m.text for m in moved} == {m.text for m in few}


@pytest.mark.parametrize(("line", "gone"), [("x = 1 < 2", False), ("x = 1 < 3", True)])
def test_a_judgement_is_of_an_edit_that_can_be_made(line, gone, tmp_path):
    path = tmp_path / "equivalent.yml"
    path.write_text(f"- {{file: b.py, line: {line}, becomes: x = (1 <= 2), reason: none}}\n", "utf-8")
    if gone:
        with pytest.raises(ValueError, match="equivalent.yml: no mutant"):
            mutants.judged({"b.py": "x = 1 < 2\n"}, path)
    else:
        assert mutants.judged({"b.py": "x = 1 < 2\n"}, path) == {("b.py", line, "x = (1 <= 2)"): "none"}


def test_the_judgements_of_the_book_are_of_the_code_as_it_is_and_have_reasons():
    sources = {file: (mutants.ROOT / file).read_text("utf-8") for file in mutants.TESTS}
    assert all(len(reason) > 20 for reason in mutants.judged(sources).values())
    assert all((mutants.ROOT / test).exists() for tests in mutants.TESTS.values() for test in tests)


@pytest.mark.weekly  # it waits a minute for the test that never ends
def test_mutants_die_of_a_test_that_fails_or_never_ends_and_others_survive(tmp_path):
    (tmp_path / "helpers").mkdir()
    (tmp_path / "tests").mkdir()
    (tmp_path / "assets/files").mkdir(parents=True)
    source = "def count(n):\n    while n > 0:\n        n = n - 1\n    return n < 7\n"
    (tmp_path / "helpers/__init__.py").write_text(source, "utf-8")
    test = "from saliency_sanity import count\ndef test_count():\n    assert count(3)\n"
    (tmp_path / "tests/test_count.py").write_text(test, "utf-8")
    tests = {"helpers/__init__.py": ["tests/test_count.py"]}
    chosen = {new: m for m in mutants.mutants("helpers/__init__.py", source) for _, _, new in [m.lines(source)]}
    endless, false, alive = (chosen[new] for new in ("n = (n + 1)", "return n < 6", "return (n <= 7)"))
    false = false._replace(text="-6")
    found = dict(mutants.outcomes([None, endless, false, alive], tests, tmp_path, 60, 4))
    assert found == {None: False, endless: True, false: True, alive: False}
    assert (tmp_path / "helpers/__init__.py").read_text("utf-8") == source
    with pytest.raises(RuntimeError, match="could not run"):
        list(mutants.outcomes([None], {"helpers/__init__.py": ["tests/none.py"]}, tmp_path, 60, 1))
