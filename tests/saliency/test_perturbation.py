"""Occlusion, LIME and KernelSHAP: captum, enumeration and closed forms; segments; and bad options."""

from functools import partial
from itertools import combinations
from math import comb

import captum.attr
import numpy as np
import pytest
import torch
from networks import SHAPE, cnn, images, linear, targets
from saliency_sanity.book import photographs
from saliency_sanity.device import generator, seed_of
from saliency_sanity.saliency import passes
from saliency_sanity.saliency.perturbation import kernel_shap, lime, occlusion, superpixels
from skimage.segmentation import slic
from torch.nn import functional as F

METHODS = {
    "occlusion": occlusion,
    "lime": partial(lime, samples=40),
    "kernel_shap": partial(kernel_shap, samples=40),
}
every = pytest.mark.parametrize("name", METHODS)
fits = pytest.mark.parametrize("method", (lime, kernel_shap), ids=lambda method: method.__name__)
DOUBLE = torch.float64


def segments(rows=3, columns=2, size=12):
    """A grid of segments `(size, size)`, numbered from 0."""
    row, column = (torch.arange(size) * count // size for count in (rows, columns))
    return row[:, None] * columns + column


def value(model, x, target, shown, parts, baseline):
    """The logit of one image `(C, H, W)` with some segments shown."""
    mask = torch.isin(parts, torch.tensor(sorted(shown), dtype=parts.dtype))
    with torch.no_grad():
        return model.eval()(torch.where(mask, x, baseline)[None])[0, target].item()


def of_segments(maps, parts):
    """The value of each segment, `(N, segments)`; all its pixels and channels must have it."""
    values = []
    for one, part in zip(maps, parts.expand(len(maps), *maps.shape[2:])):
        here = [one[:, part == name] for name in part.unique()]
        assert all((pixels == pixels.flatten()[0]).all() for pixels in here)
        values.append(torch.stack([pixels.flatten()[0] for pixels in here]))
    return torch.stack(values)


# ---------------------------------------------------------------- occlusion


@pytest.mark.parametrize("shape", [SHAPE, (1, 13, 9)])
@pytest.mark.parametrize("window, stride", [(4, 2), (4, 4), (5, 3), (1, 1), (3, 1), (9, 2), (9, 9)])
def test_occlusion_is_captums(shape, window, stride, device):
    model, x, y = linear(shape=shape).double(), images(3, shape, dtype=DOUBLE), targets()
    model.append(torch.nn.Tanh())
    baseline = images(3, shape, seed=4, dtype=DOUBLE)
    theirs = captum.attr.Occlusion(model).attribute(
        x, (shape[0], window, window), strides=(shape[0], stride, stride), baselines=baseline, target=y
    )
    options = {"window": window, "stride": stride, "baseline": baseline.to(device)}
    ours = occlusion(model.to(device), x.to(device), y.to(device), **options)
    torch.testing.assert_close(ours.cpu().float(), theirs)  # captum's are in single precision


def test_occlusion_of_a_linear_model_is_a_mean_of_sums():
    model, x, y = linear().double(), images(dtype=DOUBLE), targets()
    products = (model[1].weight[y].view_as(x) * (x - 0.5)).sum(1, keepdim=True).detach()
    one = occlusion(model, x, y, window=1, baseline=0.5)
    torch.testing.assert_close(one, products.expand_as(x))
    tiles = torch.nn.functional.avg_pool2d(products, 3, divisor_override=1)
    wanted = tiles.repeat_interleave(3, 2).repeat_interleave(3, 3).expand_as(x)
    torch.testing.assert_close(occlusion(model, x, y, window=3, stride=3, baseline=0.5), wanted)


@pytest.mark.parametrize("size, window", [(12, 1), (28, 4), (64, 9)])
def test_the_default_window_is_a_seventh_of_the_image(size, window):
    x, y = images(1, (1, size, size)), targets(1)
    model = linear(shape=(1, size, size))
    wanted = occlusion(model, x, y, window=window, stride=max(1, window // 2))
    assert torch.equal(occlusion(model, x, y), wanted)


# ---------------------------------------------------------------- KernelSHAP and LIME


def shapley(model, x, target, parts, baseline):
    """Shapley values by their definition, a mean over all coalitions."""
    names = parts.unique().tolist()
    n = len(names)
    values = []
    for name in names:
        others = [other for other in names if other != name]
        total = 0.0
        for size in range(n):
            for shown in combinations(others, size):
                gain = value(model, x, target, {*shown, name}, parts, baseline)
                gain -= value(model, x, target, shown, parts, baseline)
                total += gain / (n * comb(n - 1, size))
        values.append(total)
    return torch.tensor(values, dtype=DOUBLE)


@pytest.mark.parametrize("rows, columns", [(1, 1), (1, 2), (3, 2), (2, 4)])
def test_kernel_shap_of_few_segments_is_exact(rows, columns, device):
    model, x, y, parts = cnn().double().eval(), images(2, dtype=DOUBLE), targets(2), segments(rows, columns)
    baseline = images(2, seed=3, dtype=DOUBLE)
    wanted = torch.stack([shapley(model, x[i], y[i], parts, baseline[i]) for i in range(2)])
    options = {"segments": parts.to(device), "baseline": baseline.to(device)}
    maps = kernel_shap(model.to(device), x.to(device), y.to(device), **options)
    torch.testing.assert_close(of_segments(maps.cpu(), parts), wanted)


@pytest.mark.parametrize("samples", [60, 61, 400])
def test_kernel_shap_adds_up_to_the_change_of_the_logit(samples):
    model, x, y, parts = cnn().double().eval(), images(dtype=DOUBLE), targets(), segments(6, 4)
    maps = kernel_shap(model, x, y, segments=parts, samples=samples, baseline=0.2)
    with torch.no_grad():
        change = (model(x) - model(torch.full_like(x, 0.2))).gather(1, y[:, None])[:, 0]
    torch.testing.assert_close(of_segments(maps, parts).sum(1), change)


def test_kernel_shap_comes_closer_to_shapley_values_with_more_samples():
    model, x, y, parts = cnn().double().eval(), images(dtype=DOUBLE), targets(), segments(2, 5)
    exact = kernel_shap(model, x, y, segments=parts, samples=2**10 - 2)
    gaps = []
    for samples in (40, 200, 1000):
        maps = [kernel_shap(model, x, y, segments=parts, samples=samples, seed=seed) for seed in range(5)]
        gaps.append((torch.stack(maps) - exact).square().mean())
    assert gaps[0] > 2 * gaps[1] > 4 * gaps[2]
    assert gaps[2] < 0.01 * exact.square().mean()


@fits
@pytest.mark.parametrize("rows, columns", [(1, 1), (3, 2), (4, 6)])
def test_of_a_linear_model_each_segment_has_its_contribution(method, rows, columns):
    model, x, y, parts = linear().double(), images(dtype=DOUBLE), targets(), segments(rows, columns)
    products = (model[1].weight[y].view_as(x) * (x + 0.3)).sum(1).detach()
    wanted = torch.stack([products[:, parts == name].sum(1) for name in parts.unique()], 1)
    found = method(model, x, y, segments=parts, samples=60, baseline=-0.3)
    torch.testing.assert_close(of_segments(found, parts), wanted)


@fits
def test_a_segment_that_the_model_ignores_has_nothing_and_equals_have_the_same(method):
    def model(x):
        half = x[..., 0:4].sum((1, 2, 3)) * x[..., 4:8].sum((1, 2, 3))
        return torch.stack((half, -half), 1)

    parts = segments(1, 3)
    x = torch.rand(1, 1, 12, 4, generator=generator(0), dtype=DOUBLE).repeat(1, 1, 1, 3)
    found = of_segments(method(Function(model), x, torch.tensor([0]), segments=parts, samples=4000), parts)[0]
    tolerance = 1e-9 if method is kernel_shap else 0.1 * found[0].item()
    assert found[0].item() == pytest.approx(found[1].item(), abs=tolerance) and found[0] > 0
    assert found[2].item() == pytest.approx(0, abs=tolerance)


class Function(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_lime_by_hand():
    """Weights and design as the paper's code has them; the fit by NumPy."""
    model, x, y, parts = cnn().double().eval(), images(1, dtype=DOUBLE), targets(1), segments()
    shown = torch.rand(50, 6, generator=generator(seed_of(7, 0))) < 0.5
    shown[0] = True
    baseline = torch.tensor(0.1, dtype=DOUBLE)
    rows = [row.nonzero()[:, 0].tolist() for row in shown]
    outputs = [value(model, x[0], y[0], row, parts, baseline) for row in rows]
    z = shown.double().numpy()
    cosine = z.sum(1) / np.maximum(np.linalg.norm(z, axis=1), 1e-12) / np.sqrt(6)
    weights = np.sqrt(np.exp(-((1 - cosine) ** 2) / 0.4**2))
    design = np.c_[z, np.ones(50)]
    gram = design.T @ (weights[:, None] * design)
    wanted = np.linalg.solve(gram, design.T @ (weights * np.array(outputs)))[:6]
    found = lime(model, x, y, segments=parts, samples=50, seed=7, baseline=0.1, width=0.4)
    np.testing.assert_allclose(of_segments(found, parts)[0], wanted, rtol=1e-9)


# ---------------------------------------------------------------- segments


@fits
def test_segments_have_any_names_and_may_differ_from_image_to_image(method):
    model, x, y = cnn().double(), images(2, dtype=DOUBLE), targets(2)
    parts = torch.stack((segments(3, 2), segments(2, 4)))
    found = method(model, x, y, segments=parts, samples=60)
    for i in range(2):
        one = method(model, x[i : i + 1], y[i : i + 1], segments=parts[i], samples=60, indices=[i])
        torch.testing.assert_close(found[i : i + 1], one)
    for other in (parts * 10 - 25, parts.int(), parts.to(torch.uint8)):
        torch.testing.assert_close(method(model, x, y, segments=other, samples=60), found)


@fits
def test_one_image_has_the_map_it_has_in_a_batch(method):
    model, x, y = cnn().double(), images(4, dtype=DOUBLE), targets(4)
    maps = method(model, x, y, segments=segments(6, 4), samples=80)
    for i in range(4):
        one = method(model, x[i : i + 1], y[i : i + 1], segments=segments(6, 4), samples=80, indices=[i])
        torch.testing.assert_close(one, maps[i : i + 1])


@fits
def test_without_segments_those_of_superpixels_are_taken(method):
    model, x, y = cnn(), images(), targets()
    assert torch.equal(method(model, x, y), method(model, x, y, segments=superpixels(x)))


@pytest.mark.parametrize("shape, count", [((1, 28, 28), 49), ((3, 12, 12), 49), ((1, 100, 70), 49), ((3, 5, 3), 15)])
def test_grey_and_small_images_are_cut_by_a_grid(shape, count):
    parts = superpixels(images(2, shape))
    assert parts.shape == (2, *shape[1:]) and parts.dtype == torch.int64
    names, sizes = parts[0].unique(return_counts=True)
    assert names.tolist() == list(range(count)) and torch.equal(parts[0], parts[1])
    rows, columns = min(7, shape[1]), min(7, shape[2])
    wide = -(-shape[1] // rows) * -(-shape[2] // columns)
    assert wide / 4 <= sizes.min() and sizes.max() <= wide


def test_photographs_are_cut_into_superpixels(device):
    x = photographs.whole(96)[0][:3].to(device)
    parts = superpixels(x)
    assert parts.shape == (3, 96, 96) and parts.dtype == torch.int64 and parts.device == x.device
    for part in parts:
        names = part.unique()
        assert names.tolist() == list(range(len(names))) and 20 <= len(names) <= 60
    assert (superpixels(x, 200).amax((1, 2)) > parts.amax((1, 2))).all()
    lighter, flat = superpixels(x * 3 - 1), superpixels(torch.ones_like(x))
    assert (lighter == parts).float().mean() > 0.99 and flat.shape == parts.shape


def pictures(kind):
    """One picture `(3, H, W)` of a kind that SLIC at its usual compactness runs together, or a plain one."""
    draw = partial(torch.rand, generator=generator(0))
    lines = (torch.arange(96) // 4 % 2).float()
    made = {
        "noise": lambda: draw(3, 64, 64),
        "grey noise": lambda: draw(1, 70, 70).expand(3, -1, -1),
        "noise, wide": lambda: draw(3, 64, 200),
        "noise, tall": lambda: draw(3, 150, 64) * 255,
        "half noise": lambda: torch.cat((draw(3, 64, 32), torch.zeros(3, 64, 32)), 2),
        "stripes": lambda: lines.expand(3, 96, 96),
        "checks": lambda: (lines != lines[:, None]).float().expand(3, 96, 96) * 1e-15,
        "constant": lambda: torch.full((3, 64, 64), 0.7),
        "one point": lambda: F.pad(torch.ones(3, 1, 1), (10, 80, 30, 40)),
    }
    return made[kind]() if kind in made else photographs.textures(224)[kind]


@pytest.mark.parametrize("count", [49, 12, 90])
@pytest.mark.parametrize(
    "kind",
    ["noise", "grey noise", "noise, wide", "noise, tall", "half noise", "stripes", "checks", "constant", "one point"]
    + ["brick", "grass", "gravel"],
)
def test_whatever_the_picture_there_are_about_as_many_segments_as_asked_for(kind, count):
    parts = superpixels(pictures(kind)[None], count)[0]
    names = parts.unique()
    assert names.tolist() == list(range(len(names))) and count / 2 <= len(names) <= 2 * count


@pytest.mark.parametrize("count", [*range(1, 20), 48, 50, 144])
@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 20, 45), (3, 63, 13)])
def test_a_grid_has_about_as_many_segments_as_asked_for(shape, count):
    names, sizes = superpixels(images(1, shape), count)[0].unique(return_counts=True)
    assert names.tolist() == list(range(len(names))) and count / 2 <= len(names) <= count
    assert sizes.max() <= 4 * sizes.min()


def test_where_slic_finds_enough_segments_they_are_its_own():
    for x in photographs.whole(96)[0][:3]:
        scaled = ((x - x.min()) / (x.max() - x.min())).double().permute(1, 2, 0).numpy()
        plain = slic(scaled, n_segments=49, compactness=10, start_label=0)
        assert len(np.unique(plain)) >= 25
        for same in (x, x * 256 - 3 * 2**10, x / 4096):  # exact, or all but
            assert (superpixels(same[None])[0] == torch.from_numpy(plain)).float().mean() > 0.99
        assert torch.equal(superpixels(x[None])[0], torch.from_numpy(plain))


@pytest.mark.parametrize("count", [0, -3, 2.5, None, True])
def test_no_number_of_segments(count):
    with pytest.raises(ValueError, match="count must be a whole number of segments"):
        superpixels(images(), count)


@fits
def test_a_noisy_picture_has_more_than_one_value(method):
    model, x = linear(shape=(3, 64, 64)), pictures("noise")[None]
    assert len(method(model, x, targets(1)).unique()) >= 25


def test_superpixels_follow_the_edges():
    x = torch.zeros(1, 3, 64, 64)
    x[..., 27:] = torch.tensor([1.0, 0.5, 0.2]).view(3, 1, 1)
    parts = superpixels(x)[0]
    assert not set(parts[:, :27].unique().tolist()) & set(parts[:, 27:].unique().tolist())


# ---------------------------------------------------------------- passes, and errors


@every
def test_passes_are_of_bounded_size(name, monkeypatch):
    seen = []
    model, x, y = cnn().double(), images(dtype=DOUBLE), targets()
    model.register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    options = {} if name == "occlusion" else {"segments": segments()}
    whole = METHODS[name](model, x, y, **options)
    seen.clear()
    monkeypatch.setattr(passes, "VALUES_A_PASS", 7 * x[0].numel())
    torch.testing.assert_close(METHODS[name](model, x, y, **options), whole)
    assert max(seen) == 7


def test_the_random_numbers_are_those_of_the_seed():
    model, x, y = cnn(), images(), targets()
    for method in (METHODS["lime"], METHODS["kernel_shap"]):
        maps = [method(model, x, y, segments=segments(), seed=seed) for seed in (0, 0, 1)]
        assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


PARTS = segments()
BAD_OPTIONS = {
    "window of 0": (occlusion, {"window": 0}, "window must be a whole number from 1 to 12, got 0"),
    "negative window": (occlusion, {"window": -3}, "window must be a whole number"),
    "window past the image": (occlusion, {"window": 13}, "from 1 to 12, got 13"),
    "half a pixel": (occlusion, {"window": 2.5}, "window must be a whole number"),
    "window of two numbers": (occlusion, {"window": (2, 3)}, "window must be a whole number"),
    "stride of 0": (occlusion, {"stride": 0, "window": 3}, "stride must be a whole number from 1"),
    "pixels left out": (occlusion, {"stride": 4, "window": 3}, "from 1 to the window's 3, got 4"),
    "baseline of another size": (occlusion, {"baseline": torch.zeros(3, 5, 5)}, "does not fit images"),
    "baseline NaN": (lime, {"baseline": float("nan")}, "baseline has NaN"),
    "infinite baseline": (kernel_shap, {"baseline": float("inf")}, "baseline has NaN or infinite"),
    "segments of another size": (
        lime,
        {"segments": PARTS[:11]},
        r"of shape \(12, 12\) or \(3, 12, 12\), got",
    ),
    "segments of another batch": (kernel_shap, {"segments": PARTS.expand(2, 12, 12)}, r"\(2, 12, 12\)"),
    "segments with a channel": (lime, {"segments": PARTS.expand(3, 1, 12, 12)}, r"got torch.int64 \(3, 1"),
    "float segments": (kernel_shap, {"segments": PARTS.float()}, "integer tensor of shape .* torch.float32"),
    "bool segments": (lime, {"segments": PARTS > 2}, "integer tensor of shape .* torch.bool"),
    "segments in NumPy": (kernel_shap, {"segments": PARTS.numpy()}, "got ndarray"),
    "a number of segments": (lime, {"segments": 49}, "got int"),
    "no samples": (lime, {"samples": 0}, "at least one sample is needed"),
    "negative samples": (kernel_shap, {"samples": -1}, "at least one sample is needed"),
    "few samples for lime": (lime, {"samples": 6, "segments": PARTS}, "raise samples="),
    "few samples for kernel_shap": (kernel_shap, {"samples": 4, "segments": PARTS}, "raise samples="),
    "width of 0": (lime, {"width": 0.0}, "width must be positive"),
    "window yes": (occlusion, {"window": True}, "window must be a whole number .* got True"),
    "width in words": (lime, {"width": "wide"}, "width must be positive, got 'wide'"),
    "width NaN": (lime, {"width": float("nan")}, "width must be positive"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_out_of_range_raises(name):
    method, options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        method(cnn(), images(), targets(), **options)


@every
def test_logits_that_are_not_finite_raise(name):
    model = Function(lambda x: torch.stack((x.sum((1, 2, 3)).log(), x.sum((1, 2, 3))), 1))
    with passes.checked(), pytest.raises(ValueError, match="logits have NaN or infinite values"):
        METHODS[name](model, -torch.ones(1, 1, 4, 4), torch.tensor([0]))
