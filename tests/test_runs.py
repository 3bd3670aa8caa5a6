"""What is refused is a row that says why, the others run, and Ctrl-C keeps what is done."""

import json
import warnings
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from networks import CLASSES, cnn, images, targets
from saliency_sanity import followups, plots, sanity
from saliency_sanity.saliency import METHODS
from saliency_sanity.saliency.passes import OnePass, checked
from torch import nn

check = partial(sanity.parameter_randomization, show_progress=False, metrics=["pearson", "spearman"])
STAGES = ["", "11", "9", "4", "0"]


@pytest.fixture
def x():
    return images(3)


@pytest.fixture
def y():
    return targets(3)


def gelu():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES))


def refused(frame):
    return frame[frame.role == "refused"]


def measured(frame):
    return frame[frame.role != "refused"]


class Stops:
    """The plain gradient, but for the maps, counted from 0, at which something else happens."""

    def __init__(self, **at):
        self.at, self.maps, self.__name__ = {int(key[1:]): what for key, what in at.items()}, 0, "stops"

    def __call__(self, model, images, targets):
        what = self.at.get(self.maps)
        self.maps += 1
        if isinstance(what, BaseException):
            raise what
        maps = METHODS["gradient"](model, images, targets)
        return maps if what is None else maps * what


# ---------------------------------------------------------------- refusals


def test_a_method_that_refuses_is_a_row_and_the_others_are_as_alone(x, y):
    frame = check(gelu(), x, y, methods=["gradient", "guided_backprop", "sobel"], seeds=[0, 4])
    rows = refused(frame)
    assert rows.method.tolist() == ["guided_backprop"] * 2 and rows.seed.tolist() == [0, 4]
    assert rows.note.str.contains("GELU|Gelu|gelu").all() and rows.similarity.isna().all()
    assert set(rows.metric) == {""} and set(rows.image) == {-1} and set(rows.stage) == {0} and set(rows.layer) == {""}
    alone = check(gelu(), x, y, methods=["gradient", "sobel"], seeds=[0, 4])
    others = frame[frame.method != "guided_backprop"].reset_index(drop=True)
    pd.testing.assert_frame_equal(others, alone, check_exact=True)
    assert others.note.eq("").all()


def test_where_every_method_refuses_the_reason_is_raised(x, y):
    with pytest.raises(ValueError) as alone:
        check(gelu(), x, y, methods=["guided_backprop"])
    with pytest.raises(ValueError) as directly:
        METHODS["guided_backprop"](gelu(), x, y)
    assert str(alone.value) == str(directly.value)
    with pytest.raises(ValueError, match="no method can explain this model. guided_backprop: .*; deconvnet: "):
        check(gelu(), x, y, methods=["guided_backprop", "deconvnet"])


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
def test_a_stage_that_is_refused_is_a_row_and_the_other_stages_stay(scheme, x, y):
    method = Stops(_2=ValueError("too deep"))
    frame = check(cnn(), x, y, methods=[method, "gradient"], seeds=[0], scheme=scheme)
    [row] = refused(frame).itertuples()
    assert (row.method, row.stage, row.layer, row.note, row.scheme) == ("stops", 2, STAGES[2], "too deep", scheme)
    given = measured(frame)
    ours, plain = (given[given.method == name].drop(columns="method") for name in ("stops", "gradient"))
    kept = plain[(plain.stage != 2) & (plain.scheme == scheme)].reset_index(drop=True)
    pd.testing.assert_frame_equal(ours[ours.scheme == scheme].reset_index(drop=True), kept)
    assert set(ours.scheme) == {scheme, "noise", "other_image"}


@pytest.mark.parametrize("value", [torch.inf, torch.nan, 1e38 * 1e38])
def test_maps_that_are_no_numbers_are_the_methods_refusal(value, x, y):
    frame = check(cnn(), x, y, methods=[Stops(_3=value), "sobel"], seeds=[0])
    [row] = refused(frame).itertuples()
    assert row.stage == 3 and "NaN or infinite" in row.note
    trained = check(cnn(), x, y, methods=[Stops(_0=value), "sobel"], seeds=[0])
    assert refused(trained).stage.tolist() == [0] and set(measured(trained).method) == {"sobel"}


def test_a_part_of_the_images_that_is_refused_takes_its_stage_with_it():
    """A method of one pass, run from a tape, a few images at a time."""
    x, y = images(5), targets(5)

    def inspect(logits):
        seen.append(len(logits))
        if len(seen) in broken:
            raise ValueError("not this one")

    mine = OnePass(inspect=inspect)(lambda model, images, targets: None)
    for places, stages in (((), []), ((7, 8), [1])):  # two parts of five stages; a failed replay is run again plainly
        seen, broken = [], places
        frame = check(cnn(), x, y, methods={"mine": mine}, seeds=[0], batch_size=3)
        assert refused(frame).stage.tolist() == stages
        left = frame[(frame.role == "curve")]
        assert set(left.stage) == {0, 1, 2, 3, 4} - set(stages) and len(left) == 2 * 5 * (5 - len(stages))


def test_a_retest_or_a_twin_that_is_refused_leaves_the_rest(x, y):
    def noisy(model, images, targets, *, seed=0):
        calls.append(seed)
        if len(calls) == fails:
            raise ValueError("not again")
        return METHODS["noise"](model, images, targets, seed=seed)

    for place, scheme in ((2, "twin"), (8, "retest")):
        calls, fails = [], place
        frame = check(cnn(), x, y, methods=[noisy], seeds=[0], twins=[cnn(1)])
        [row] = refused(frame).itertuples()
        assert (row.scheme, row.stage, row.note) == (scheme, 0, "not again")
        assert {"cascading", "noise", "other_image"} <= set(measured(frame).scheme)


def test_errors_of_the_programme_are_heard(x, y):
    for error in (TypeError("no"), RuntimeError("no"), KeyError("no")):
        with pytest.raises(type(error)):
            check(cnn(), x, y, methods=["gradient", Stops(_1=error)], seeds=[0])


def test_an_option_without_a_default_is_named(x, y):
    frame = check(cnn(), x, y, methods=["gradient", "expected_gradients"], seeds=[0])
    assert refused(frame).note.str.contains("needs references=: give functools.partial").all()
    with pytest.raises(ValueError, match="expected_gradients needs references="):
        check(cnn(), x, y, methods=["expected_gradients"])


def test_a_stage_without_a_number_says_so(x, y):
    frame = check(cnn(), x, y, methods=[Stops(_2=0.0, _3=0.0), "gradient"], seeds=[0])
    empty = frame[frame.similarity.isna()]
    assert set(empty.stage) == {2, 3} and set(empty.role) == {"curve"} and set(empty.method) == {"stops"}
    assert all(f"stage {row.stage} ({row.layer}): {row.metric} is undefined" in row.note for row in empty.itertuples())
    assert frame[frame.similarity.notna()].note.eq("").all()


def test_a_method_that_gives_nothing_says_so(x, y):
    def flat(model, images, targets):
        return torch.ones_like(images)

    frame = check(cnn(), x, y, methods=[flat, "gradient"], seeds=[0, 1])
    rows = refused(frame)
    assert rows.method.tolist() == ["flat", "flat"] and rows.seed.tolist() == [0, 1]
    assert rows.note.str.contains("no similarity is defined at any stage").all()
    own = frame[(frame.method == "flat") & (frame.role == "curve")]
    assert len(own) == 2 * 5 * 2 * 3 and own.similarity.isna().all() and own.note.ne("").all()


def test_tables_shares_and_figures_take_no_notice(x, y):
    options = {"seeds": [0, 1], "metrics": ["pearson"]}
    frame = check(gelu(), x, y, methods=["gradient", "guided_backprop"], **options)
    alone = check(gelu(), x, y, methods=["gradient"], **options)
    asked = {"stage": 1, "method": "gradient"}
    np.testing.assert_array_equal(sanity.table(frame, **asked), sanity.table(alone, **asked))
    pd.testing.assert_frame_equal(sanity.retained_share(frame), sanity.retained_share(alone))
    assert [axis.get_title() for axis in plots.curves(frame, "pearson").axes[:2]] == ["Gradient", ""]


def test_labels_too(x, y):
    models = [gelu() for _ in range(4)]
    frame = sanity.data_randomization(
        models[:2], models[2:], x, y, methods=["sobel", "deconvnet"], metrics=["pearson"], show_progress=False
    )
    assert refused(frame).seed.tolist() == [0, 1] and set(refused(frame).scheme) == {"random_labels"}
    with pytest.raises(ValueError, match="no rule|replaced|ReLU"):
        sanity.data_randomization(models[:2], models[2:], x, y, methods=["deconvnet"], metrics=["pearson"])


def test_classes_and_complexity_too(x, y):
    frame = followups.random_logit(gelu(), x, y, methods=["sobel", "deconvnet"], metrics=["pearson"], seeds=2)
    assert refused(frame).seed.tolist() == [0, 1] and set(measured(frame).method) == {"sobel"}
    rise = followups.complexity_rise(gelu(), x, y, methods=["gradient", "deconvnet"], seeds=2)
    assert rise[rise.note != ""].method.tolist() == ["deconvnet"] * 2 and len(rise) == 2 * 3 + 2
    for run in (partial(followups.random_logit, metrics=["pearson"]), followups.complexity_rise):
        with pytest.raises(ValueError):
            run(gelu(), x, y, methods=["deconvnet"], seeds=2)


# ---------------------------------------------------------------- Ctrl-C


def test_ctrl_c_keeps_the_methods_and_seeds_that_are_done(x, y):
    options = {"seeds": [0, 1, 2], "twins": [cnn(1)]}
    whole = check(cnn(), x, y, methods={"plain": "gradient", "stops": Stops()}, **options)
    with pytest.warns(UserWarning, match="interrupted"):
        frame = check(cnn(), x, y, methods={"plain": "gradient", "stops": Stops(_9=KeyboardInterrupt())}, **options)
    done = (whole.scheme == "twin") | (whole.seed == 0) | ((whole.seed == 1) & (whole.method == "plain"))
    pd.testing.assert_frame_equal(frame, whole[done].reset_index(drop=True), check_exact=True)
    assert frame.attrs["complete"] is False and whole.attrs["complete"] is True


def test_ctrl_c_before_anything_is_done_is_ctrl_c(x, y):
    with pytest.raises(KeyboardInterrupt):
        check(cnn(), x, y, methods=[Stops(_1=KeyboardInterrupt())], seeds=[0, 1], twins=[cnn(1)])


# ---------------------------------------------------------------- said beforehand, and kept


def test_the_plan_is_said_and_kept(x, y, capsys):
    class Spare(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.spare = gelu(), nn.Linear(2, 2)

        def forward(self, x):
            return self.used(x)

    asked = {"methods": ["gradient", "deconvnet", "noise"], "metrics": ["pearson"], "seeds": 2}
    frame = sanity.parameter_randomization(Spare(), x, y, **asked)
    said = capsys.readouterr()
    assert said.out == ""
    for words in ("cascading: 2 stages, 2 seeds, 3 images, 60 maps", "stages: used.4, used.0", "spare.weight"):
        assert words in said.err
    assert said.err.count("deconvnet refuses: ") == 1
    plan = json.loads(json.dumps(frame.attrs["plan"]))
    assert plan["stages"] == ["used.4", "used.0"] and plan["unused"] == ["spare.weight", "spare.bias"]
    assert plan["maps"] == {"gradient": 6, "deconvnet": 6, "noise": 8} and plan["seeds"] == [0, 1]
    quiet = sanity.parameter_randomization(Spare(), x, y, **asked, show_progress=False)
    assert capsys.readouterr() == ("", "") and quiet.attrs == frame.attrs


def test_nothing_warns_where_nothing_is_wrong(x, y):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(cnn(), x, y, methods=["gradient", "gradcam"], seeds=[0])


# ---------------------------------------------------------------- what is asked


def test_a_number_of_seeds(x, y):
    pd.testing.assert_frame_equal(*(check(cnn(), x, y, methods=["gradient"], seeds=s) for s in (2, [0, 1])))
    for seeds, message in (
        (0, "at least one seed"),
        ("01", "a number of replicates"),
        (True, "a number"),
        (1.5, "a num"),
    ):
        with pytest.raises(ValueError, match=message):
            check(cnn(), x, y, methods=["gradient"], seeds=seeds)


def test_a_pass_takes_no_more_images_than_asked(x, y):
    class Watched(nn.Module):
        def __init__(self):
            super().__init__()
            self.network, self.sizes = cnn(), sizes

        def forward(self, x):
            sizes.append(len(x))
            return self.network(x)

    sizes: list[int] = []
    asked = {"methods": ["gradient", "integrated_gradients"], "seeds": 1, "batch_size": 2}
    runs = [
        partial(check, Watched(), lines=False),
        partial(followups.random_logit, Watched(), metrics=["pearson"]),
        partial(followups.complexity_rise, Watched()),
        partial(sanity.data_randomization, [Watched()] * 2, [Watched()] * 2, metrics=["pearson"], show_progress=False),
    ]
    for run in runs:
        given = {key: value for key, value in asked.items() if key != "seeds" or run.func != sanity.data_randomization}
        whole = run(images(5), targets(5), **given | {"batch_size": None})
        sizes.clear()
        parts = run(images(5), targets(5), **given)
        assert max(sizes[2:]) == 2
        column = "rise" if "rise" in whole else "similarity"
        np.testing.assert_allclose(parts[column], whole[column], atol=1e-4)
    smooth = followups.denoised("gradient", samples=3)
    sizes.clear()
    with checked():
        smooth(Watched(), images(5), targets(5), batch_size=2)
    assert max(sizes) == 2
    with pytest.raises(ValueError, match="batch_size must be a whole number"):
        check(cnn(), x, y, methods=["gradient"], batch_size=0)
