"""Figures are returned, complete, and shown by nobody but the caller."""

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch
from matplotlib.figure import Figure
from saliency_sanity import plots, sanity
from saliency_sanity.book import data, models
from scipy import stats


@pytest.fixture(scope="module")
def frame():
    images = data.load("clothes").images[:4]
    return sanity.parameter_randomization(
        models.cnn(),
        images,
        torch.zeros(4, dtype=torch.int64),
        methods=["gradient", "smoothgrad"],
        metrics=["spearman"],
        seeds=range(2),
        twins=[models.cnn(seed=1)],
        show_progress=False,
    )


def test_nothing_is_left_open_or_shown(frame):
    before = plt.get_fignums()
    figures = [
        plots.maps({"a": torch.randn(2, 8, 8)}, ["x", "y"], signed=True),
        plots.gallery({"a": torch.rand(8, 8)}, signed=False, image=torch.rand(3, 8, 8)),
        plots.curves(frame, "spearman"),
    ]
    assert all(isinstance(figure, Figure) for figure in figures) and plt.get_fignums() == before


def test_a_signed_map_is_centred_on_white_and_an_unsigned_one_starts_at_zero():
    values = torch.tensor([[[-1.0, 0.0], [2.0, 4.0]]])
    signed = plots.maps({"a": values}, ["x"], signed=True, clip=1.0).axes[0].images[0]
    unsigned = plots.maps({"a": values.abs()}, ["x"], signed=False, clip=1.0).axes[0].images[0]
    assert signed.get_clim() == (-4, 4) and unsigned.get_clim() == (0, 4)
    assert np.allclose(signed.cmap(0.5)[:3], 0.97, atol=0.03)


def test_methods_are_shown_by_their_titles_and_other_labels_without_underscores():
    maps = {"guided_backprop": torch.randn(1, 8, 8), "my_own method": torch.randn(1, 8, 8)}
    grid = plots.maps(maps, ["smoothgrad"], signed=True).axes
    assert [axis.get_ylabel() for axis in grid] == ["Guided\nBackprop", "my\nown\nmethod"]
    assert grid[0].get_title() == "SmoothGrad"
    narrow = plots.maps({"a": torch.randn(4, 8, 8)}, ["input_x_gradient", "b", "c", "d"], signed=True).axes
    assert narrow[0].get_title() == "Input ×\nGradient"
    shown = plots.gallery({name: values[0] for name, values in maps.items()}, signed=True).axes
    assert [axis.get_title() for axis in shown[:2]] == ["Guided Backprop", "my own method"]
    dots = plots.dots({"x": pd.DataFrame({"gradcam": [0.0]})}, xlabel="score").axes[0]
    assert [text.get_text() for text in dots.get_yticklabels()] == ["Grad-CAM"]


def test_a_row_can_share_its_scale():
    rows = {"a": torch.stack([torch.full((4, 4), 1.0), torch.full((4, 4), 5.0)])}
    limits = [axis.images[0].get_clim() for axis in plots.maps(rows, ["x", "y"], signed=True, scale="row").axes]
    assert limits == [(-5, 5), (-5, 5)]


def test_a_map_of_zeros_is_drawn():
    plots.maps({"a": torch.zeros(1, 4, 4)}, ["x"], signed=True).canvas.draw()


def test_the_curve_is_the_mean_over_images_and_seeds_with_all_its_lines(frame):
    figure = plots.curves(frame, "spearman")
    panel = figure.axes[0]
    assert panel.get_title() == "Gradient"
    curve = next(line for line in panel.lines if line.get_marker() == "o")
    rows = frame[(frame.method == "gradient") & (frame.role == "curve")]
    np.testing.assert_allclose(curve.get_ydata(), rows.groupby("stage").similarity.mean())
    assert panel.get_xticklabels()[0].get_text() == "trained"
    drawn = {round(line.get_ydata()[0], 6) for line in panel.lines if line is not curve}
    means = frame[(frame.method == "gradient") & (frame.role != "curve")].groupby("scheme").similarity.mean()
    assert drawn == set(means.round(6)) and set(means.index) == {"noise", "other_image", "twin"}
    labels = [text.get_text() for text in figure.legends[0].get_texts()]
    assert len(labels) == 5  # the curve, two floors, two ceilings (SmoothGrad's own among them)


def refused(frame, method, metric):
    """The frame of a run in which a method could not explain the model."""
    row = {**frame.iloc[0].to_dict(), "role": "refused", "method": method, "metric": metric, "similarity": np.nan}
    return pd.concat([frame.assign(note=""), pd.DataFrame([{**row, "note": "this model has no convolution."}])])


@pytest.mark.parametrize("metric", ["spearman", "ssim", ""])
def test_methods_that_were_refused_are_left_out(frame, metric):
    plain, with_refusal = plots.curves(frame, "spearman"), plots.curves(refused(frame, "gradcam", metric), "spearman")
    assert [axis.get_title() for axis in with_refusal.axes] == ["Gradient", "SmoothGrad"]
    for a, b in zip(plain.axes, with_refusal.axes, strict=True):
        assert len(a.lines) == len(b.lines)
        for one, other in zip(a.lines, b.lines, strict=True):
            np.testing.assert_array_equal(one.get_xydata(), other.get_xydata())


def test_a_refused_row_of_a_method_that_ran_does_not_change_its_curve(frame):
    a, b = plots.curves(frame, "spearman"), plots.curves(refused(frame, "gradient", "spearman"), "spearman")
    np.testing.assert_array_equal(a.axes[0].lines[0].get_xydata(), b.axes[0].lines[0].get_xydata())
    assert len(a.axes[0].get_xticklabels()) == len(b.axes[0].get_xticklabels())


def test_what_the_frame_does_not_hold_raises_and_names_what_it_does(frame):
    with pytest.raises(ValueError, match="no row of metric 'ssim'; it has: spearman"):
        plots.curves(frame, "ssim")
    for methods in (["gradient", "lime"], ["lime"]):
        with pytest.raises(ValueError, match="to draw for 'lime'; there are: gradient, smoothgrad"):
            plots.curves(frame, "spearman", methods=methods)
    with pytest.raises(ValueError, match="to draw for 'gradcam'.*their column note"):
        plots.curves(refused(frame, "gradcam", "spearman"), "spearman", methods=["gradcam"])


def test_dots_are_the_means_of_the_columns_first_on_top():
    groups = {name: pd.DataFrame({"a": [0.0, 1.0], "b": [shift, 3.0]}) for name, shift in (("x", 2.0), ("y", 4.0))}
    axis = plots.dots(groups, xlabel="score", reference=0.5).axes[0]
    means = {line.get_label(): list(line.get_xdata()) for line in axis.lines if line.get_marker() == "o"}
    assert means == {"x": [2.5, 0.5], "y": [3.5, 0.5]}
    assert [text.get_text() for text in axis.get_yticklabels()] == ["b", "a"]
    assert sum(line.get_marker() == "|" for line in axis.lines) == 4
    assert not plt.get_fignums()


GOOD_MAPS = torch.rand(2, 8, 8)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda: plots.maps({}, [], signed=True), "rows must be a dictionary"),
        (lambda: plots.maps({"a": GOOD_MAPS}, ["x"], signed=True), "2 maps for 1 columns"),
        (lambda: plots.maps({"a": GOOD_MAPS.numpy()}, ["x", "y"], signed=True), "got ndarray"),
        (lambda: plots.maps({"a": GOOD_MAPS[:, None]}, ["x", "y"], signed=True), r"tensor \(N, H, W\), got"),
        (lambda: plots.maps({"a": GOOD_MAPS}, ["x", "y"], signed=True, scale="all"), "scale must be"),
        (lambda: plots.maps({"a": GOOD_MAPS}, ["x", "y"], signed=True, clip=2), "clip is a quantile"),
        (lambda: plots.maps({"a": GOOD_MAPS}, ["x", "y"], signed=True, images=torch.rand(2, 1, 8, 8)), "one image a"),
        (lambda: plots.picture(torch.rand(8, 8)), r"tensor \(C, H, W\), got \(8, 8\)"),
        (lambda: plots.picture(torch.rand(2, 8, 8)), "1 or 3 channels"),
        (lambda: plots.picture(None), "got NoneType"),
        (lambda: plots.gallery({}, signed=True), "pictures must be a dictionary"),
        (lambda: plots.gallery({"a": GOOD_MAPS}, signed=True), r"tensor \(H, W\), got \(2, 8, 8\)"),
        (lambda: plots.gallery({"a": GOOD_MAPS[0]}, signed=True, across=0), "across must be"),
        (lambda: plots.colours(GOOD_MAPS.numpy(), signed=True), "got ndarray"),
        (lambda: plots.colours(GOOD_MAPS[:0], signed=True), "got"),
        (lambda: plots.colours(GOOD_MAPS, signed=True, levels=0), "levels must be"),
        (lambda: plots.curves(3, "spearman"), "must be a tidy frame"),
        (lambda: plots.curves(pd.DataFrame({"a": [1]}), "spearman"), "no column 'scheme'"),
        (lambda: plots.dots({}, xlabel="x"), "groups must be a dictionary"),
        (lambda: plots.dots({"a": pd.DataFrame({"u": [1]}), "b": pd.DataFrame({"v": [1]})}, xlabel=""), "column 'u'"),
        (lambda: sanity.table(pd.DataFrame({"seed": [0], "image": [0], "similarity": [0]}), stage=1), "no column 'st"),
        (lambda: sanity.retained_share(None), "must be a tidy frame"),
    ],
)
def test_what_cannot_be_drawn_is_said(draw, says):
    with pytest.raises(ValueError, match=says):
        draw()


def test_maps_of_any_precision_are_drawn(frame):
    for maps in (GOOD_MAPS.bfloat16(), GOOD_MAPS.half(), GOOD_MAPS.clone().requires_grad_()):
        plots.maps({"a": maps}, ["x", "y"], signed=True, scale="row", images=GOOD_MAPS[None, :1].half())
    assert plots.curves(frame, "spearman", methods="gradient").axes[0].get_title() == "Gradient"


# ---------------------------------------------------------------- what is drawn, made again from the frame


def a_frame(seeds, images=3, stages=("", "top", "middle", "low"), method="mine", metric="m"):
    """Similarities drawn anew, all different; one image of the first seed is undefined from the first stage on."""
    rng, rows = np.random.default_rng(len(seeds)), []
    for seed in seeds:
        for stage, layer in enumerate(stages):
            about = ("cascading", "curve", seed, stage, layer, method, metric)
            rows += [
                (*about, i, np.nan if stage and (seed, i) == (seeds[0], 0) else rng.random()) for i in range(images)
            ]
        for scheme in ("other_image", "noise", "retest", "twin"):
            rows += [(scheme, "line", seed, 0, "", method, metric, i, rng.random()) for i in range(images)]
    return pd.DataFrame(rows, columns=sanity.COLUMNS)


def band(axis):
    """The lower and the upper end of what is filled, by its place on the axis."""
    [path] = axis.collections[0].get_paths()
    places = sorted(set(path.vertices[:, 0]))
    ends = [path.vertices[path.vertices[:, 0] == place, 1] for place in places]
    return places, [min(end) for end in ends], [max(end) for end in ends]


@pytest.mark.parametrize("seeds", [[4, 1], [3, 0, 9, 2, 7]])
def test_the_band_is_the_95_percent_t_interval_over_the_means_of_seeds(seeds):
    frame = a_frame(seeds)
    axis = plots.curves(frame, "m").axes[0]
    places, low, high = band(axis)
    means = frame[frame.role == "curve"].groupby(["stage", "seed"]).similarity.mean().unstack().to_numpy()
    expected = [stats.ttest_1samp(row, 0).confidence_interval(0.95) for row in means]
    assert places == [0, 1, 2, 3]
    np.testing.assert_allclose(low, [interval.low for interval in expected])
    np.testing.assert_allclose(high, [interval.high for interval in expected])
    np.testing.assert_allclose(axis.lines[0].get_ydata(), means.mean(1))
    assert not np.allclose(means.mean(1), frame[frame.role == "curve"].groupby("stage").similarity.mean())


def test_one_seed_has_no_band():
    _, low, high = band(plots.curves(a_frame([5]), "m").axes[0])
    assert low == high
    assert np.isnan(plots.interval(pd.Series([0.3])))


def test_stages_stand_in_the_order_of_the_cascade():
    stages = ("", *(f"layer{n}" for n in range(11, 0, -1)))
    frame = a_frame([0, 1], stages=stages)
    axis = plots.curves(frame, "m").axes[0]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["trained", *stages[1:]]
    means = frame[frame.role == "curve"].groupby(["stage", "seed"]).similarity.mean().groupby("stage").mean()
    np.testing.assert_allclose(axis.lines[0].get_ydata(), means)


def test_each_panel_shows_its_own_method_and_only_the_metric_asked_for():
    frames = [a_frame([0, 1], method=method, metric=metric) for method in "ab" for metric in "mn"]
    frame = pd.concat([part.assign(similarity=part.similarity + 2 * k) for k, part in enumerate(frames)])
    figure = plots.curves(frame, "n", methods=["b", "a"])
    assert [axis.get_title() for axis in figure.axes] == ["b", "a"] and figure.axes[0].get_ylabel() == "n"
    for axis, part in zip(figure.axes, (frames[3], frames[1])):
        shift = {3: 6, 1: 2}[next(k for k, one in enumerate(frames) if one is part)]
        drawn = {line.get_ydata()[0] for line in axis.lines[1:]}
        lines = part[part.role == "line"].groupby("scheme").similarity.mean() + shift
        np.testing.assert_allclose(sorted(drawn), sorted(lines))
    single = plots.curves(frame, "m", methods=["a"], across=1)
    assert len(single.axes) == 1


def test_a_line_looks_as_the_legend_says():
    figure = plots.curves(a_frame([0, 1]), "m")
    legend = figure.legends[0]
    looks = {text.get_text(): handle for text, handle in zip(legend.get_texts(), legend.get_lines())}
    means = a_frame([0, 1]).query("role == 'line'").groupby("scheme").similarity.mean()
    words = {"other_image": "another image", "noise": "noise", "retest": "the same method again", "twin": "twin"}
    for scheme, word in words.items():
        [handle] = [handle for label, handle in looks.items() if word in label]
        [line] = [line for line in figure.axes[0].lines[1:] if np.isclose(line.get_ydata()[0], means[scheme])]
        assert (line.get_color(), line.get_linestyle()) == (handle.get_color(), handle.get_linestyle())
        assert label_kind(word, looks) == ("ceiling" if scheme in ("retest", "twin") else "floor")
    assert len({(handle.get_color(), str(handle.get_linestyle())) for handle in looks.values()}) == 5


def label_kind(word, looks):
    return next(label.split(":")[0] for label in looks if word in label)


def test_full_colour_is_reached_at_the_99th_percentile():
    values = torch.zeros(1, 20, 20)
    values.view(-1)[:] = torch.arange(400.0) - 100
    limit = float(np.quantile(np.abs(values.numpy()), 0.99))
    figure = plots.maps({"a": values}, ["x"], signed=True)
    assert figure.axes[0].images[0].get_clim() == pytest.approx((-limit, limit))
    shown = plots.gallery({"a": values[0]}, signed=False).axes[0].images[0]
    assert shown.get_clim() == pytest.approx((0, limit)) and shown.cmap.name == "cividis"
    lonely = torch.zeros(1, 20, 20)
    lonely[0, 3, 3] = 7  # its 99th percentile is 0
    assert plots.maps({"a": lonely}, ["x"], signed=True).axes[0].images[0].get_clim() == (-7, 7)


@pytest.mark.parametrize("signed", [True, False])
def test_colours_are_those_of_the_figure(signed):
    values = torch.linspace(-1, 1, 64).view(1, 8, 8)
    drawn = plots.maps({"a": values.abs() if not signed else values}, ["x"], signed=signed, clip=1.0).axes[0].images[0]
    found = plots.colours(values, signed=signed, clip=1.0, levels=256)
    assert found.dtype == np.uint8 and found.shape == (1, 8, 8, 3)
    expected = 255 * drawn.cmap(drawn.norm(values[0].abs().numpy() if not signed else values[0].numpy()))[..., :3]
    assert np.abs(found[0] - expected).max() < 6  # one step of 256
    few = plots.colours(values, signed=signed, levels=4).reshape(-1, 3)
    assert len(np.unique(few, axis=0)) == 4
    with pytest.raises(ValueError, match="NaN or infinite"):
        plots.colours(values / 0, signed=signed)


def test_pictures_are_shown_as_they_are_beside_their_maps():
    grey, colour = torch.rand(2, 1, 5, 4), torch.rand(2, 3, 5, 4)
    assert plots.picture(grey[0]).shape == (5, 4) and plots.picture(colour[0] * 3 - 1).min() == 0
    np.testing.assert_array_equal(plots.picture(colour[0])[..., 2], colour[0, 2].numpy())
    rows = {name: torch.rand(3, 5, 4) for name in ("a", "b")}
    axes = plots.maps(rows, ["x", "y", "z"], signed=False, images=colour).axes
    assert [axis.get_title() for axis in axes[:4]] == ["image", "x", "y", "z"] and len(axes) == 8
    assert axes[4].get_ylabel() == "b"
    for r, maps in enumerate(rows.values()):
        np.testing.assert_array_equal(axes[4 * r].images[0].get_array(), plots.picture(colour[r]))
        for c in range(3):
            np.testing.assert_array_equal(axes[4 * r + 1 + c].images[0].get_array(), maps[c].numpy())
    gallery = plots.gallery(dict(zip("abcd", torch.rand(4, 5, 4))), signed=False, image=grey[0], across=2).axes
    assert [axis.get_title() for axis in gallery] == ["image", "a", "b", "c", "d", ""]
    assert gallery[0].images[0].get_clim() == (0, 1)


def test_the_last_group_of_dots_is_filled_and_chance_is_a_line():
    groups = {name: pd.DataFrame({"a": [0.1, 0.2]}) for name in "xyz"}
    axis = plots.dots(groups, xlabel="score", reference=0.5).axes[0]
    dots = [line for line in axis.lines if line.get_marker() == "o"]
    assert [line.get_fillstyle() for line in dots] == ["none", "none", "full"]
    assert len({str(line.get_color()) for line in dots}) == 3 and axis.get_xlabel() == "score"
    assert [list(line.get_xdata()) for line in axis.lines if line.get_linestyle() == ":"] == [[0.5, 0.5]]
