"""The parameter test against the loop one would write by hand, on networks that are easy to get wrong."""

import random
from copy import deepcopy
from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
import torchvision
from networks import CLASSES, cnn, images, lively, small, targets
from saliency_sanity import followups, randomization, saliency, sanity, similarity
from saliency_sanity.book import data, models
from saliency_sanity.device import local_seed
from saliency_sanity.inference import evaluating, random_states
from saliency_sanity.saliency import METHODS
from saliency_sanity.wrapper import Wrapped
from scipy import stats
from skimage.metrics import structural_similarity
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations

COLUMNS = [*sanity.COLUMNS, "note"]
check = partial(sanity.parameter_randomization, show_progress=False)


SMALL = ["11", "9", "4", "0"]


FEW = {"gradient": METHODS["gradient"], "IG": partial(METHODS["integrated_gradients"], steps=3)}


def heat(method, model, x, y, **options):
    return saliency.heatmap(saliency.get(method)(model, x, y, **options), signed=True)


def by_hand(model, x, y, methods, metrics, scheme="cascading", seeds=(0, 1), explain="targets", **options):
    """One map at a time, one metric at a time, on whole copies of the model."""
    rows = []
    for seed in seeds:
        copies = randomization.SCHEMES[scheme](model, seed=seed, **{"example": x[:1], **options})
        for stage, (layer, copy) in enumerate([("", model), *copies]):
            with evaluating(copy), torch.no_grad():
                classes = copy(x.clone()).argmax(1) if explain == "argmax" and stage else y
            for method, function in methods.items():
                reference, maps = heat(function, model, x, y), heat(function, copy, x, classes)
                for metric in metrics:
                    values = similarity.METRICS[metric](reference, maps).tolist()
                    rows += [
                        (scheme, "curve", seed, stage, layer, method, metric, i, v, "") for i, v in enumerate(values)
                    ]
    return pd.DataFrame(rows, columns=COLUMNS)


def assert_same_frame(ours, theirs, tolerance=1e-6):
    keys = COLUMNS[:-2]
    ours, theirs = (frame.sort_values(keys).reset_index(drop=True) for frame in (ours, theirs))
    assert ours[keys].to_dict("list") == theirs[keys].to_dict("list")
    np.testing.assert_allclose(ours.similarity, theirs.similarity, atol=tolerance)


def curves(frame):
    return frame[frame.role == "curve"]


def lines(frame, scheme):
    return frame[frame.scheme == scheme]


# ---------------------------------------------------------------- the frame


def test_the_frame_is_tidy_and_complete(x, y):
    methods, metrics = ["gradient", "smoothgrad"], ["spearman", "ssim", "hog"]
    frame = check(small(), x, y, methods=methods, metrics=metrics, seeds=[3, 5], twins=[small(1), small(2)])
    assert frame.columns.tolist() == COLUMNS
    assert frame.index.tolist() == list(range(len(frame)))
    cell = len(metrics) * len(x)
    counts = frame.groupby(["scheme", "method"]).size().to_dict()
    assert counts == {
        **{("cascading", method): 2 * 5 * cell for method in methods},
        **{(line, method): 2 * cell for line in ("noise", "other_image", "twin") for method in methods},
        ("retest", "smoothgrad"): 2 * cell,
    }
    assert not frame.duplicated(COLUMNS[:-2]).any()
    assert set(frame.seed[frame.scheme != "twin"]) == {3, 5} and set(lines(frame, "twin").seed) == {0, 1}
    own = curves(frame)
    assert own.drop_duplicates("stage").layer.tolist() == ["", *SMALL]
    assert own.groupby("stage").layer.nunique().eq(1).all()
    roles = {"noise": "floor", "other_image": "floor", "twin": "ceiling", "retest": "ceiling", "cascading": "curve"}
    assert frame.scheme.map(roles).equals(frame.role)
    reference = frame[frame.role != "curve"]
    assert reference.stage.eq(0).all() and reference.layer.eq("").all()
    assert frame.similarity.between(-1 - 1e-6, 1 + 1e-6).all()


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
def test_the_trained_model_is_like_itself(scheme, x, y):
    frame = check(
        small(),
        x,
        y,
        methods=["gradient", "gradcam", "smoothgrad"],
        metrics=[metric for metric in similarity.METRICS if metric != "topk_intersection"],  # ties are broken twice
        scheme=scheme,
        seeds=[0],
    )
    np.testing.assert_allclose(frame[(frame.stage == 0) & (frame.role == "curve")].similarity, 1, atol=1e-6)
    assert frame[frame.stage == 1].similarity.mean() < 0.95


def test_one_seed_one_frame_whatever_the_global_random_state(x, y):
    frames = []
    for state, seed in ((1, 0), (2, 0), (1, 7)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        frames.append(
            check(small(), x, y, methods=["gradient", "smoothgrad", "noise"], metrics=["spearman"], seeds=[seed])
        )
        assert torch.equal(before, torch.get_rng_state())
    pd.testing.assert_frame_equal(frames[0], frames[1], check_exact=True)
    assert not np.allclose(frames[0].similarity, frames[2].similarity)


def test_a_seed_gives_the_same_rows_in_whatever_company(x, y):
    options = {"metrics": ["spearman"], "methods": ["gradient", "smoothgrad"]}
    both = check(small(), x, y, seeds=[0, 1], **options)
    alone = check(small(), x, y, seeds=[1], **options)
    assert_same_frame(both[both.seed == 1], alone, 1e-12)
    one = check(small(), x, y, seeds=[1], metrics=["ssim", "spearman"], methods=["smoothgrad"])
    mine = one[one.metric == "spearman"]
    assert_same_frame(alone[alone.method == "smoothgrad"], mine, 1e-12)


# ---------------------------------------------------------------- against the loop by hand


class Residual(nn.Module):
    """Sums and ReLUs in place, around its blocks and inside them."""

    def __init__(self):
        super().__init__()
        self.stem, self.relu = nn.Conv2d(3, 6, 3, padding=1), nn.ReLU(inplace=True)
        self.blocks = nn.ModuleList([nn.Conv2d(6, 6, 3, padding=1) for _ in range(3)])
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.relu(self.stem(x))
        for block in self.blocks:
            new = block(x)
            new += x
            x = F.relu_(new)
        return self.head(x.mean((2, 3)))


class Statements(Residual):
    """Tensors are written into after they were handed on, as statements whose results nobody takes."""

    def forward(self, x):
        x = self.stem(x)
        self.relu(x)
        y = self.blocks[0](x)
        total = y + x
        y.mul_(2)
        z = self.blocks[1](total)
        z.add_(y)
        torch.relu_(z)
        return self.head((self.blocks[2](z) + y).mean((2, 3)))


class Concatenated(Residual):
    """Early outputs, and the image itself, are used again at the top."""

    def forward(self, x):
        a = self.stem(x)
        b = self.blocks[0](a.relu())
        c = self.blocks[1](b.relu() + a)
        d = self.blocks[2](0.5 * c + b)
        return self.head((d * a + c).mean((2, 3)) + x.mean((2, 3)).repeat(1, 2))


class Twice(Residual):
    """One block runs twice, and once more within another."""

    def forward(self, x):
        x = self.stem(x)
        x = self.blocks[0](self.blocks[1](self.blocks[0](x).relu()).relu())
        return self.head(self.blocks[2](x).relu().mean((2, 3)))


class Nested(nn.Module):
    """The whole runs a piece of its block by itself as well."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.block = torchvision.models.resnet.BasicBlock(6, 6)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        x = self.stem(x)
        x = self.block(x) + self.block.conv1(x)
        return self.head(self.block.bn2(x).mean((2, 3)))


class Functional(Residual):
    """Weights are used without their layers' forward."""

    def forward(self, x):
        x = F.conv2d(x, self.stem.weight, self.stem.bias, padding=1).relu()
        x = self.blocks[2](x).relu()
        x = F.conv2d(x, self.blocks[0].weight, padding=1) + self.blocks[1](x)
        return x.mean((2, 3)) @ self.head.weight.T


class UsedBefore(Residual):
    """A block's weights are also used, as a function, before the block below it runs."""

    def forward(self, x):
        x = self.stem(x * self.head.weight.mean()).relu()
        x = F.conv2d(x, self.blocks[1].weight, padding=1).relu()
        x = self.blocks[1](self.blocks[0](x).relu()).relu()
        return self.head(x.mean((2, 3)))


class Branching(Residual):
    """Which blocks run, and in which order, depends on the weights."""

    def forward(self, x):
        x = self.stem(x).relu()
        order = (0, 1, 2) if float(self.blocks[1].weight.detach().abs().mean()) > 0.2 else (2, 1)
        for index in order:
            x = self.blocks[index](x).relu()
        return self.head(x.mean((2, 3)))


class Recurrent(nn.Module):
    """Pieces that return tuples."""

    def __init__(self):
        super().__init__()
        self.conv, self.rnn, self.head = (
            nn.Conv2d(3, 4, 3),
            nn.GRU(40, 6, batch_first=True),
            nn.Linear(6, CLASSES),
        )

    def forward(self, x):
        states, last = self.rnn(self.conv(x).transpose(1, 2).flatten(2))
        return self.head(states.mean(1) + last[0])


class Scaled(Residual):
    """A parameter at the root."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(6, 1, 1) + 0.5)

    def forward(self, x):
        return self.head(self.blocks[0](self.stem(x).relu() * self.scale).relu().mean((2, 3)))


def writes_into_its_input():
    layers = (
        nn.ReLU(inplace=True),
        nn.Conv2d(3, 6, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(6, 6, 3),
        nn.Flatten(),
    )
    return nn.Sequential(*layers, nn.Linear(384, CLASSES))


def reparametrised():
    conv = parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(256, CLASSES))


def nothing_runs_below():
    return nn.Sequential(nn.Flatten(), nn.Linear(432, CLASSES))


DRAWN = {"init": "truncated_normal", "std": 0.2}
ZOO = {
    "sequential, batch-norm, dropout, in train mode": (cnn, {}),
    "residual sums in place": (Residual, {}),
    "statements in place": (Statements, {}),
    "early outputs used late": (Concatenated, {}),
    "a block used twice": (Twice, {}),
    "a piece used alone too": (Nested, {}),
    "functions of weights": (Functional, {}),
    "weights used before their block runs": (UsedBefore, {}),
    "order by weights": (Branching, DRAWN),
    "recurrent": (Recurrent, {}),
    "a parameter at the root": (Scaled, DRAWN),
    "writes into its input": (writes_into_its_input, {}),
    "reparametrised": (reparametrised, DRAWN),
    "linear": (nothing_runs_below, {}),
    "permuted": (cnn, {"init": "permute"}),
    "statistics kept": (cnn, {"batch_norm": "keep"}),
    "bottom up": (Residual, {"order": "bottom_up"}),
    "stages out of order": (Residual, {"stages": ["stem", "head", "blocks.1"]}),
    "single layers": (Nested, {"stages": "layers"}),
}


def made(name):
    build, options = ZOO[name]
    with local_seed(4):
        return lively(build().double(), 4), options


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
@pytest.mark.parametrize("name", ZOO)
def test_it_is_the_loop_by_hand(name, scheme, x, y):
    model, options = made(name)
    before = deepcopy(model.state_dict())
    metrics = ["spearman", "pearson"]
    expected = by_hand(model, x, y, FEW, metrics, scheme, **options)
    frame = check(model, x, y, methods=FEW, metrics=metrics, scheme=scheme, seeds=[0, 1], **options)
    assert_same_frame(curves(frame), expected)
    assert expected[expected.stage > 0].similarity.lt(0.99).any()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    "method",
    [
        "input_x_gradient",
        "guided_backprop",
        "deconvnet",
        "gradcam",
        "guided_gradcam",
        "sobel",
        "input",
        "occlusion",
        "lrp_epsilon",
        "deeplift",
    ],
)
@pytest.mark.parametrize("name", ["sequential, batch-norm, dropout, in train mode", "residual sums in place"])
def test_every_kind_of_method_is_the_loop_by_hand(method, name, x, y):
    model, options = made(name)
    try:
        expected = by_hand(model, x, y, {method: METHODS[method]}, ["pearson"], seeds=[0])
    except ValueError as error:  # the method says that it cannot be right for this network
        with pytest.raises(ValueError) as ours:
            check(model, x, y, methods=[method], metrics=["pearson"], seeds=[0])
        assert str(ours.value) == str(error)
    else:
        assert_same_frame(curves(check(model, x, y, methods=[method], metrics=["pearson"], seeds=[0])), expected)


def of_the_transposed(model, images, targets):
    """The same memory and shape, another image."""
    maps = METHODS["gradient"](model, images.transpose(2, 3), targets).transpose(2, 3)
    return maps + METHODS["gradient"](model, images, targets)


def guided_then_plain(model, images, targets):
    guided = METHODS["guided_backprop"](model, images, targets)
    return guided + METHODS["gradient"](model, images, targets)


def plain_then_guided(model, images, targets):
    plain = METHODS["gradient"](model, images, targets)
    return plain * METHODS["guided_backprop"](model, images, targets)


def of_another_class(model, images, targets):
    return METHODS["gradient"](model, images, targets) - METHODS["gradient"](model, images, (targets + 1) % CLASSES)


def of_a_copy_without_biases(model, images, targets):
    model = deepcopy(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bias" in name:
                parameter.zero_()
    return METHODS["gradient"](model, images, targets)


def of_the_probability(model, images, targets):
    model = Wrapped(nn.Sequential(model, nn.Softmax(1)), keep_probabilities=True)
    return METHODS["gradient"](model, images, targets)


def of_a_part(model, images, targets):
    first = METHODS["gradient"](model, images[:1], targets[:1])
    return torch.cat([first, METHODS["gradient"](model, images[1:], targets[1:])])


def times_a_hidden_layer(model, images, targets):
    """A method with a hook of its own."""
    seen = []
    layer = next(module for module in model.modules() if isinstance(module, nn.Conv2d))
    hook = layer.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    try:
        maps = METHODS["gradient"](model, images, targets)
    finally:
        hook.remove()
    return maps * seen[-1].mean(1, keepdim=True)


OWN = (
    of_the_transposed,
    guided_then_plain,
    plain_then_guided,
    of_another_class,
    of_a_copy_without_biases,
    of_the_probability,
    of_a_part,
    times_a_hidden_layer,
)


@pytest.mark.parametrize("method", OWN)
@pytest.mark.parametrize("build", [lambda: cnn().double(), lambda: made("early outputs used late")[0]])
def test_a_method_of_ones_own_is_the_loop_by_hand(method, build, x, y):
    model = build()
    expected = by_hand(model, x, y, {"own": method}, ["pearson"], seeds=[0])
    frame = check(model, x, y, methods={"own": method}, metrics=["pearson"], seeds=[0])
    assert_same_frame(curves(frame), expected)


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1"])
def test_networks_of_torchvision_are_the_loop_by_hand(name):
    with local_seed(0):
        model = lively(torchvision.models.get_model(name, weights=None, num_classes=CLASSES)).double()
    x, y = images(2, (3, 32, 32), dtype=torch.float64), targets(2)
    stages = [stage.name for stage in randomization.plan(model).stages[::4]]
    methods, metrics = {name: METHODS[name] for name in ("gradient", "guided_backprop", "gradcam")}, ["ssim"]
    expected = by_hand(model, x, y, methods, metrics, seeds=[0], stages=stages)
    frame = check(model, x, y, methods=methods, metrics=metrics, seeds=[0], stages=stages)
    assert_same_frame(curves(frame), expected, 1e-5)


def test_the_numbers_are_scipys_and_scikit_images():
    model, x, y = models.cnn(seed=1), torch.rand(3, 1, 28, 28), torch.tensor([1, 5, 9])
    frame = check(model, x, y, methods=["gradient"], metrics=["spearman", "spearman_abs", "ssim"], seeds=[4])
    reference = METHODS["gradient"](model, x, y).sum(1).double().numpy()
    copies = randomization.cascading(model, seed=4)
    for stage, (layer, copy) in enumerate(copies, start=1):
        maps = METHODS["gradient"](copy, x, y).sum(1).double().numpy()
        found = frame[(frame.stage == stage) & (frame.layer == layer)].set_index(["metric", "image"]).similarity
        for i, (a, b) in enumerate(zip(reference, maps)):
            signed = stats.spearmanr(a.ravel(), b.ravel()).statistic
            absolute = stats.spearmanr(abs(a).ravel(), abs(b).ravel()).statistic
            ssim = structural_similarity(a / abs(a).max(), b / abs(b).max(), win_size=5, data_range=2)
            assert found["spearman", i] == pytest.approx(signed, abs=2e-4)
            assert found["spearman_abs", i] == pytest.approx(absolute, abs=2e-4)
            assert found["ssim", i] == pytest.approx(ssim, abs=1e-4)


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
def test_argmax_explains_the_class_each_copy_predicts(scheme, x, y):
    model = small()
    expected = by_hand(
        model, x, y, {"gradient": METHODS["gradient"]}, ["pearson"], scheme, seeds=[0, 1, 2], explain="argmax"
    )
    frame = check(
        model,
        x,
        y,
        methods=["gradient"],
        metrics=["pearson"],
        scheme=scheme,
        seeds=range(3),
        explain="argmax",
    )
    assert_same_frame(curves(frame), expected)
    fixed = check(model, x, y, methods=["gradient"], metrics=["pearson"], scheme=scheme, seeds=range(3))
    assert not np.allclose(curves(frame).similarity, curves(fixed).similarity)


def test_the_size_of_a_pass_does_not_matter(x, y, monkeypatch):
    options = {"methods": ["gradient", "gradcam", "guided_backprop"], "metrics": ["pearson"], "seeds": [0]}
    whole = check(small(), x, y, **options)
    monkeypatch.setattr(saliency.passes, "VALUES_A_PASS", 3 * x[0].numel())
    assert_same_frame(check(small(), x, y, **options), whole)


# ---------------------------------------------------------------- names


def last_pixel(model, images, targets):
    maps = METHODS["gradient"](model, images, targets)
    return maps * torch.linspace(0, 1, 12, dtype=maps.dtype)


def cosine(a, b):
    return F.cosine_similarity(a.flatten(1), b.flatten(1))


def test_methods_and_metrics_by_key_callable_or_label(x, y):
    model = small()
    frame = check(
        model,
        x,
        y,
        methods={
            "mine": last_pixel,
            "IG 3": partial(METHODS["integrated_gradients"], steps=3),
            "plain": "gradient",
        },
        metrics=["pearson", cosine],
        seeds=[0],
    )
    own = curves(frame)
    assert set(own.method) == {"mine", "IG 3", "plain"} and set(own.metric) == {"pearson", "cosine"}
    *_, (_, copy) = randomization.cascading(model, seed=0)
    chosen = own[(own.stage == 4) & (own.metric == "cosine")].set_index(["method", "image"]).similarity
    maps = [saliency.heatmap(last_pixel(m, x, y), signed=True) for m in (model, copy)]
    np.testing.assert_allclose(chosen["mine"], cosine(*maps), atol=1e-6)
    maps = [heat("integrated_gradients", m, x, y, steps=3) for m in (model, copy)]
    np.testing.assert_allclose(chosen["IG 3"], cosine(*maps), atol=1e-6)


def test_one_name_needs_no_list(x, y):
    frame = check(small(), x, y, methods="gradient", metrics="ssim", seeds=[0])
    assert set(frame.method) == {"gradient"} and set(frame.metric) == {"ssim"}
    assert set(check(small(), x, y, methods=last_pixel, metrics=cosine, seeds=[0]).method) == {"last_pixel"}


def test_a_partial_is_called_by_its_function_and_its_options(x, y):
    methods = [partial(METHODS["smoothgrad"], samples=count) for count in (2, 3)] + [partial(last_pixel)]
    metrics = [partial(similarity.ssim, win_size=3)]
    frame = check(small(), x, y, methods=methods, metrics=metrics, seeds=[0])
    assert list(frame.method.unique()) == ["smoothgrad(samples=2)", "smoothgrad(samples=3)", "last_pixel"]
    assert set(frame.metric) == {"ssim(win_size=3)"}


# ---------------------------------------------------------------- noise, floors, ceilings


def test_stochastic_methods_draw_fresh_noise_for_every_map(x, y):
    seeds = []

    def noisy(model, images, targets, *, seed=0):
        seeds.append(seed)
        return METHODS["noise"](model, images, targets, seed=seed)

    frame = check(small(), x, y, methods=[noisy, "noise"], metrics=["pearson"], seeds=[0, 1])
    assert len(set(seeds)) >= 2 * (5 + 1)  # five maps and a retest for each seed
    own = frame[(frame.stage > 0) | (frame.scheme == "retest")]
    assert own.similarity.abs().max() < 0.5
    assert curves(frame).query("stage == 0").similarity.min() > 1 - 1e-6


def test_a_seed_that_the_caller_fixed_stays_fixed(x, y):
    fixed = partial(METHODS["smoothgrad"], seed=5, samples=3)
    frame = check(small(), x, y, methods={"fixed": fixed}, metrics=["pearson"], seeds=[0])
    assert "retest" not in set(frame.scheme)
    *_, (_, copy) = randomization.cascading(small(), seed=0)
    maps = [heat("smoothgrad", model, x, y, seed=5, samples=3) for model in (small(), copy)]
    found = frame[frame.stage == 4].similarity
    np.testing.assert_allclose(found, similarity.pearson(*maps), atol=1e-6)


def test_the_floor_of_another_image(x, y):
    frame = check(small(), x, y, methods=["gradient"], metrics=["pearson"], seeds=[0, 1, 2])
    maps = heat("gradient", small(), x, y)
    each = torch.stack([similarity.pearson(maps, maps.roll(shift, 0)) for shift in (1, 2, 3)]).numpy()
    found = lines(frame, "other_image").pivot(index="seed", columns="image", values="similarity").to_numpy()
    partners = np.abs(found[:, None] - each).argmin(1)
    np.testing.assert_allclose(found, np.take_along_axis(each, partners, 0), atol=1e-6)
    assert len(set(map(tuple, partners))) > 1


def test_one_image_has_no_other(x, y):
    frame = check(small(), x[:1], y[:1], methods=["gradient"], metrics=["pearson"], seeds=[0])
    assert set(frame.scheme) == {"cascading", "noise"}


@pytest.mark.parametrize("shape", [(3, 28, 28), (2, 17, 12), (2, 12, 17)])
def test_noise_has_the_maps_spectrum_and_nothing_else_of_them(shape):
    maps = torch.randn(shape, dtype=torch.float64).cumsum(1).cumsum(2)
    noise, other = (sanity.spectral_noise(maps, seed=seed) for seed in (0, 1))
    for found in (noise, other):
        torch.testing.assert_close(torch.fft.fft2(found).abs(), torch.fft.fft2(maps).abs())
        assert not torch.allclose(found, maps)
    assert not torch.allclose(noise, other)
    assert torch.equal(noise, sanity.spectral_noise(maps, seed=0))


def test_the_noise_line_is_of_each_map_and_seed(x, y):
    seen = []

    def keeps(a, b):
        seen.append((a, b))
        return similarity.pearson(a, b)

    frame = check(small(), x, y, methods=["gradient"], metrics=[keeps], seeds=[0, 1])
    maps = heat("gradient", small(), x, y)
    spectrum = torch.fft.fft2(maps).abs()
    noises = [b for _, b in seen if torch.allclose(torch.fft.fft2(b).abs(), spectrum) and not torch.allclose(b, maps)]
    assert len(noises) == 2 and not torch.allclose(*noises)
    expected = torch.cat([similarity.pearson(maps, noise) for noise in noises])
    np.testing.assert_allclose(lines(frame, "noise").similarity, expected, atol=1e-6)


def test_twins_are_compared_with_the_model(x, y):
    model, twins = small(), [small(1), small(2)]
    frame = check(model, x, y, methods=["gradient"], metrics=["pearson"], seeds=[0], twins=twins)
    for (_, rows), twin in zip(lines(frame, "twin").groupby("seed"), twins, strict=True):
        found = rows.similarity
        expected = similarity.pearson(heat("gradient", model, x, y), heat("gradient", twin, x, y))
        np.testing.assert_allclose(found, expected, atol=1e-6)


def test_the_retest_is_the_method_with_other_noise(x, y):
    """More samples, less noise: the ceiling rises towards one."""
    methods = {str(n): partial(METHODS["smoothgrad"], samples=n) for n in (2, 100)}
    frame = check(small(), x, y, methods=methods, metrics=["pearson"], seeds=range(3))
    few, many = (lines(frame, "retest").query("method == @n").similarity.mean() for n in ("2", "100"))
    assert few < many < 0.9999


def test_undefined_similarities_stay_in_the_frame(x, y):
    def mostly_flat(model, images, targets):
        maps = METHODS["gradient"](model, images, targets)
        maps[1] = 0
        return maps

    frame = check(small(), x, y, methods=[mostly_flat], metrics=["spearman", "ssim"], seeds=[0])
    assert frame[frame.image == 1].similarity.isna().all()
    own = curves(frame)
    assert own[own.image != 1].similarity.notna().all() and len(own) == 5 * 4 * 2
    share = sanity.retained_share(frame)
    assert share.undefined.eq(1).all()
    expected = own[own.image != 1].groupby(["stage", "metric"]).similarity.mean()
    np.testing.assert_allclose(share.set_index(["stage", "metric"]).similarity.sort_index(), expected.sort_index())


def test_floors_of_an_image_do_not_depend_on_the_others(x, y):
    """But for the size of the set, of which the partner is one."""
    maps = torch.randn(5, 12, 12, generator=torch.Generator().manual_seed(0))
    few, all_of_them = (sanity.spectral_noise(maps[:n], seed=4) for n in (2, 5))
    torch.testing.assert_close(few, all_of_them[:2])
    others = torch.stack([x[0], *x[1:].flip(0)])
    frames = [check(small(), batch, y, methods=["sobel"], metrics=["pearson"], seeds=[0]) for batch in (x, others)]
    noise = [lines(frame, "noise").set_index("image").similarity[0] for frame in frames]
    assert noise[0] == pytest.approx(noise[1], abs=1e-9)


def test_noise_belongs_to_a_method_and_a_stage(x, y):
    seeds = {}

    def noisy(model, images, targets, *, seed=0):
        seeds.setdefault(current[0], []).append(seed)
        return METHODS["noise"](model, images, targets, seed=seed)

    current = ["two stages"]
    check(small(), x, y, methods={"a": noisy}, metrics=["pearson"], seeds=[0], stages=["11", "4"])
    current = ["all stages, in other company"]
    check(small(), x, y, methods={"b": "noise", "a": noisy}, metrics=["pearson"], seeds=[0], lines=False)
    current = ["another label"]
    check(small(), x, y, methods={"c": noisy}, metrics=["pearson"], seeds=[0])
    trained, top, third, _ = seeds["two stages"]
    assert [trained, top, third] == [seeds["all stages, in other company"][place] for place in (0, 1, 3)]
    assert not set(seeds["another label"]) & set(seeds["two stages"])


# ---------------------------------------------------------------- images that take different ways


class Routed(nn.Module):
    """Experts, of which each image asks one."""

    def __init__(self, push=0.0):
        super().__init__()
        with local_seed(0):
            self.first, self.router = nn.Linear(432, 8), nn.Linear(8, 3)
            self.experts = nn.ModuleList(nn.Linear(8, CLASSES) for _ in range(3))
        with torch.no_grad():
            self.router.bias += torch.tensor([push, 0, 0])

    def forward(self, x):
        x = self.first(x.flatten(1)).relu()
        choice = self.router(x).argmax(1)
        return torch.stack([self.experts[int(expert)](one) for one, expert in zip(x, choice)])


def test_what_only_other_images_use_is_randomised_too():
    x = images(12)
    with torch.no_grad():
        model = Routed()
        asked = set(model.router(model.first(x.flatten(1)).relu()).argmax(1).tolist())
    assert len(asked) > 1
    found = sanity.preflight(model, x, targets(12), methods=["gradient"], metrics=["pearson"], seeds=[0])
    assert {name for name in found.plan["stages"] if name.startswith("experts")} == {
        f"experts.{expert}" for expert in asked
    }


def test_what_only_a_randomised_copy_uses_is_refused():
    x, y, model = images(12), targets(12), Routed(push=100)
    options = {"methods": ["gradient"], "metrics": ["pearson"], "seeds": [0], "lines": False}
    with pytest.raises(ValueError, match=r"'experts\.[12]\.weight'.*name stages"):
        check(model, x, y, **options)
    frame = check(model, x, y, stages=["experts", "router", "first"], **options)
    assert frame.attrs["plan"]["unused"]


# ---------------------------------------------------------------- nothing is changed


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("name", ["sequential, batch-norm, dropout, in train mode", "statements in place"])
def test_model_images_and_random_state_are_left_as_they_were(error, name, x, y):
    model, _ = made(name)
    next(model.children()).eval()
    twin, calls = made(name)[0], []

    def stops(model, images, targets):
        calls.append(1)
        if error and len(calls) == 3:
            raise error("stopped")
        return METHODS["gradient"](model, images, targets)

    kept = [deepcopy(m.state_dict()) for m in (model, twin)]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    attributes = [set(vars(module)) for module in model.modules()]
    try:
        check(model, x, y, methods=[stops], metrics=["pearson"], seeds=[0, 1], twins=[twin])
    except (KeyboardInterrupt, RuntimeError) as raised:
        assert type(raised) is error
    assert error is None or len(calls) == 3
    for m, before in zip((model, twin), kept):
        assert all(torch.equal(value, before[key]) for key, value in m.state_dict().items())
        assert all(p.grad is None and p.requires_grad for p in m.parameters())
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in m.modules())
    assert [m.training for m in model.modules()] == modes
    assert [set(vars(module)) for module in model.modules()] == attributes
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(x, images(4, dtype=torch.float64)) and torch.equal(y, targets(4))


class Draws(nn.Sequential):
    """A network that draws random numbers in eval mode, to no effect."""

    def forward(self, x):
        drawn = torch.rand(1) + np.random.rand() + random.random()  # noqa: NPY002
        return super().forward(x) + 0 * drawn


def two(check, model, x, y, **options):
    return check([model, model], [model, model], x, y, **options)


DOORS = {
    "parameter_randomization": sanity.parameter_randomization,
    "preflight": sanity.preflight,
    "data_randomization": partial(two, sanity.data_randomization),
    "random_logit": followups.random_logit,
    "complexity_rise": lambda *given, metrics, **options: followups.complexity_rise(*given, **options),
    "cascading": lambda model, x, y, **options: [*randomization.cascading(model, seed=0, example=x)],
    "plan": lambda model, x, y, **options: randomization.plan(model, example=x),
}


@pytest.mark.parametrize("refuses", [False, True])
@pytest.mark.parametrize("door", DOORS)
def test_random_states_are_kept_where_the_model_draws(door, refuses, x, y):
    def stops(model, images, targets):
        raise ValueError("no map")

    model = Draws(*small().eval())
    torch.manual_seed(1)
    before = random_states()
    try:
        DOORS[door](model, x, y, methods=[stops if refuses else "gradient"], metrics=["pearson"])
    except ValueError as error:
        assert refuses and "no map" in str(error)
    assert random_states() == before


class Views(nn.Module):
    """A network that cannot run where its activations have their channels last."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(576, CLASSES)

    def forward(self, x):
        return self.head(self.first(x).relu().view(len(x), -1))


@pytest.mark.parametrize("build, layout", [(Views, None), (small, torch.channels_last)])
def test_models_that_view_their_activations_keep_the_usual_layout(build, layout, x, y):
    model = build().double()
    private = deepcopy(model)
    assert sanity._lay_out(private, x) == layout
    wide = [p for p in private.parameters() if p.ndim == 4]
    assert all(p.is_contiguous(memory_format=layout or torch.contiguous_format) for p in wide)
    ours = check(model, x, y, methods={"gradient": METHODS["gradient"]}, metrics=["pearson"], seeds=[0], lines=False)
    theirs = by_hand(model, x, y, {"gradient": METHODS["gradient"]}, ["pearson"], seeds=[0])
    assert_same_frame(ours, theirs)


def test_a_seed_is_drawn_once(x, y, monkeypatch):
    """What describes the plan is what the first seed begins with."""
    drawn, calls = randomization.drawn, []
    monkeypatch.setattr(randomization, "drawn", lambda *given: calls.append(given[3]) or drawn(*given))
    check(small(), x, y, methods=["input"], metrics=["pearson"], seeds=[0, 1], batch_norm="reset")
    assert len(calls) == len(set(calls)) == 2 * len(SMALL)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_it_works_where_gradients_are_switched_off(context, x, y):
    options = {"methods": ["gradient", "gradcam"], "metrics": ["pearson"], "seeds": [0]}
    expected = check(small(), x, y, **options)
    model = small()
    with context():
        assert_same_frame(check(model, x, y, **options), expected)


def test_progress_is_shown_where_wanted(x, y, capsys):
    for show in (False, True):
        sanity.parameter_randomization(
            small(), x, y, methods=["gradient"], metrics=["pearson"], seeds=[0], show_progress=show
        )
        assert ("gradient" in capsys.readouterr().err) == show


# ---------------------------------------------------------------- the retained share


def a_frame():
    """Two stages of two seeds and two images, with lines; values chosen so that shares are round."""
    rows = []
    for seed in (0, 1):
        for stage, layer, values in ((0, "", (1, 1)), (1, "top", (0.7, 0.5)), (2, "low", (0.1, 0.3))):
            rows += [("cascading", "curve", seed, stage, layer, "g", "m", i, v) for i, v in enumerate(values)]
        rows += [("other_image", "floor", seed, 0, "", "g", "m", i, v) for i, v in enumerate((0.3, 0.1))]
        rows += [("noise", "floor", seed, 0, "", "g", "m", i, 0.0) for i in (0, 1)]
        rows += [("retest", "ceiling", seed, 0, "", "g", "m", i, 0.6 + 0.2 * seed) for i in (0, 1)]
    rows += [("twin", "ceiling", 0, 0, "", "g", "m", i, 0.35) for i in (0, 1)]
    return pd.DataFrame(rows, columns=COLUMNS[:-1])


@pytest.mark.parametrize(
    ("floor", "ceiling", "low", "high"),
    [
        ("other_image", None, 0.2, 1.0),
        ("noise", None, 0.0, 1.0),
        ("other_image", "retest", 0.2, 0.7),
        ("noise", "twin", 0.0, 0.35),
    ],
)
def test_retained_share_is_the_place_between_floor_and_ceiling(floor, ceiling, low, high):
    found = sanity.retained_share(a_frame(), floor=floor, ceiling=ceiling)
    assert found.columns.tolist() == [
        *(column for column in COLUMNS[:7] if column != "role"),
        "similarity",
        "undefined",
        "floor",
        "ceiling",
        "retained_share",
    ]
    assert found[["seed", "stage"]].to_numpy().tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2]]
    np.testing.assert_allclose(found.similarity, [1, 0.6, 0.2] * 2)
    np.testing.assert_allclose(found.floor, low, atol=1e-12)
    np.testing.assert_allclose(found.ceiling, high)
    np.testing.assert_allclose(found.retained_share, (found.similarity - low) / (high - low), atol=1e-9)
    assert found.undefined.eq(0).all()


def test_where_floor_and_ceiling_are_close_the_share_is_undefined():
    found = sanity.retained_share(a_frame(), floor="other_image", ceiling="twin")
    assert found.retained_share.isna().all() and found.similarity.notna().all()
    apart = a_frame()
    apart.loc[apart.scheme == "twin", "similarity"] = 0.45
    assert sanity.retained_share(apart, ceiling="twin").retained_share.notna().all()


def test_a_method_without_that_line_has_no_share(x, y):
    frame = check(small(), x, y, methods=["gradient", "smoothgrad"], metrics=["pearson"], seeds=[0])
    share = sanity.retained_share(frame, ceiling="retest")
    assert share[share.method == "gradient"].retained_share.isna().all()
    assert share[share.method == "smoothgrad"].retained_share.notna().all()


def test_the_trained_model_retains_all(x, y):
    frame = check(small(), x, y, methods=["gradient"], metrics=["pearson"], seeds=[0, 1])
    share = sanity.retained_share(frame)
    np.testing.assert_allclose(share[share.stage == 0].retained_share, 1)


@pytest.mark.parametrize(("option", "line"), [("floor", "edges"), ("ceiling", "best"), ("floor", "cascading")])
def test_an_unknown_line_raises_and_lists_the_known(option, line):
    with pytest.raises(ValueError, match=f"no reference line '{line}'; it has: other_image, noise, retest, twin"):
        sanity.retained_share(a_frame(), **{option: line})


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"methods": ["gradients"]}, "unknown method 'gradients'; known: gradient"),
        ({"methods": []}, "no methods given"),
        ({"methods": ["gradient", "gradient"]}, "two methods have the same name"),
        ({"methods": {"a": "nonsense"}}, "unknown method 'nonsense'"),
        ({"metrics": ["psnr"]}, "unknown metric 'psnr'; known: spearman"),
        ({"metrics": {}}, "no metrics given"),
        ({"metrics": ["ssim", "ssim"]}, "two metrics have the same name"),
        ({"scheme": "random"}, "unknown scheme 'random'; known: cascading, independent"),
        ({"explain": "label"}, "explain must be 'targets' or 'argmax', got 'label'"),
        ({"seeds": []}, "at least one seed is needed"),
        ({"stages": ["nonsense"]}, "unknown stage 'nonsense'"),
        ({"init": "he"}, "unknown init 'he'"),
        ({"batch_norm": "recalibrate"}, "needs calibration="),
        ({"colour": "red"}, "unknown option 'colour'; known: seeds, .*stages, init.*calibration"),
        ({"seed": 1}, "unknown option 'seed'; known: seeds"),
        ({"batch_norm": "keep", "calibration": torch.zeros(1)}, "calibration= is used with batch_norm='recalibrate'"),
        ({"images": torch.rand(3, 12, 12)}, r"float tensor \(N, C, H, W\)"),
        ({"images": torch.full((4, 3, 12, 12), torch.nan)}, "NaN"),
        ({"images": torch.zeros(0, 3, 12, 12), "targets": torch.zeros(0).long()}, "must not be empty"),
        ({"targets": torch.zeros(3).long()}, "targets must be int64"),
        ({"targets": torch.full((4,), 7)}, "target 7 is not one of the model's 5 classes"),
        ({"model": nn.Sequential(nn.Flatten())}, "nothing to randomise"),
    ],
)
def test_bad_input_raises(change, message):
    good = {
        "model": cnn(),
        "images": images(4),
        "targets": targets(4),
        "methods": ["gradient"],
        "metrics": ["ssim"],
    }
    with pytest.raises(ValueError, match=message):
        check(**{**good, "seeds": [0], **change})


@pytest.mark.parametrize("seeds", [[0.5], ["0"], [None]])
def test_a_seed_that_is_no_int_raises(seeds, x, y):
    with pytest.raises(TypeError, match="seed must be an int"):
        check(small(), x, y, methods=["gradient"], metrics=["ssim"], seeds=seeds)


def test_batch_norm_is_recalibrated_where_the_frame_is_made(x, y):
    """On images that the caller names, as in `randomization.cascading`."""
    options = {"batch_norm": "recalibrate", "calibration": images(8, seed=3, dtype=torch.float64)}
    model, asked = made("sequential, batch-norm, dropout, in train mode")[0], {"metrics": ["pearson"], "seeds": [0]}
    frame = check(model, x, y, methods=FEW, **asked, **options)
    assert_same_frame(curves(frame), by_hand(model, x, y, FEW, **asked, **options))
    other = check(model, x, y, methods=FEW, **asked, **options | {"calibration": x})
    assert not np.allclose(curves(frame).similarity, curves(other).similarity)


def test_a_metric_that_refuses_the_maps_is_heard(x, y):
    with pytest.raises(ValueError, match="win_size"):
        check(
            small(),
            x,
            y,
            methods=["gradient"],
            metrics={"wide": partial(similarity.ssim, win_size=31)},
            seeds=[0],
        )


# ---------------------------------------------------------------- data randomisation


def small_networks(seed):
    return [models.mlp(seed=10 * seed + k).eval() for k in range(3)]


def test_data_randomization_pairs_networks_as_it_says():
    x, y = data.load("digits").images[:5], data.load("digits").labels[:5]
    true, permuted = small_networks(1), small_networks(2)
    frame = sanity.data_randomization(
        true, permuted, x, y, methods=["gradient"], metrics=["spearman"], show_progress=False
    )
    maps = [[METHODS["gradient"](m, x, y).sum(1) for m in group] for group in (true, permuted)]
    for k in range(3):
        after = (k + 1) % 3
        pairs = {"random_labels": (1, k), "random_labels_crossed": (1, after), "second_seed": (0, after)}
        for scheme, (group, other) in pairs.items():
            found = frame[(frame.scheme == scheme) & (frame.seed == k)].similarity
            expected = similarity.spearman(maps[0][k], maps[group][other])
            np.testing.assert_allclose(found, expected, atol=1e-6)
    roles = {"random_labels": "curve", "random_labels_crossed": "curve", "second_seed": "control"}
    roles |= {"other_image": "floor", "noise": "floor"}
    assert frame.scheme.map(roles).equals(frame.role)
    assert set(frame.scheme) == {*pairs, "other_image", "noise"} and list(frame.columns) == [*sanity.COLUMNS, "note"]


@pytest.mark.parametrize(("true", "permuted"), [(1, 1), (3, 2), (0, 0)])
def test_data_randomization_needs_pairs(true, permuted):
    x, y = torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="in pairs"):
        sanity.data_randomization(
            small_networks(0)[:true], small_networks(1)[:permuted], x, y, methods=["gradient"], metrics=["ssim"]
        )
