"""What the rows of a frame are measured against: floors, twins, retests and controls, made again by plain calls.

A method of these tests notes by which seed it was asked for maps of which model, and adds noise of that seed: so each
row can be made again with the method, the model and scipy alone, and two maps that share their noise are found out.
"""

from functools import partial

import numpy as np
import pandas as pd
import pytest
import torch
from networks import CLASSES, cnn, images, small, targets
from saliency_sanity import followups, randomization, saliency, sanity, similarity
from saliency_sanity.device import generator, seed_of
from scipy import stats
from test_similarity import REFERENCE

PEARSON = {"metrics": ["pearson"]}
check = partial(sanity.parameter_randomization, show_progress=False)


def kind(model):
    """The same number for models with the same weights."""
    return round(sum(float(parameter.detach().abs().sum()) for parameter in model.parameters()), 6)


class Noted:
    """The gradient, and noise of each image's place; `asked` has the model, the classes and the seed of every call."""

    def __init__(self):
        self.asked, self.__name__ = [], "noted"

    def __call__(self, model, images, targets, *, seed=0, indices=None):
        self.asked.append((kind(model), tuple(targets.tolist()), seed))
        places = range(len(images)) if indices is None else indices
        noise = [torch.randn(images.shape[1:], generator=generator(seed_of(seed, place))) for place in places]
        return saliency.gradient(model, images, targets) + torch.stack(noise).to(images)

    def seeds(self, model, targets=None):
        """The seeds by which this model was explained, in order."""
        classes = None if targets is None else tuple(targets.tolist())
        return [seed for who, what, seed in self.asked if who == kind(model) and classes in (None, what)]


def heat(model, x, y, seed, indices=None):
    return Noted()(model, x, y, seed=seed, indices=indices).sum(1)


def correlations(a, b):
    return [stats.pearsonr(p.ravel(), q.ravel()).statistic for p, q in zip(a.numpy(), b.numpy(), strict=True)]


def values(frame, **chosen):
    for column, value in chosen.items():
        frame = frame[frame[column] == value]
    return frame.sort_values("image").similarity.to_numpy()


# ---------------------------------------------------------------- model parameters


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
def test_curves_and_retests_are_two_plain_calls_with_noise_of_their_own(scheme, x, y):
    method, model = Noted(), small()
    frame = check(model, x, y, methods=[method], scheme=scheme, seeds=[0, 6], **PEARSON)
    every = []
    for number, seed in enumerate((0, 6)):
        trained, again = method.seeds(model)[2 * number : 2 * number + 2]
        own = heat(model, x, y, trained)
        found = values(frame, scheme="retest", seed=seed)
        np.testing.assert_allclose(found, correlations(own, heat(model, x, y, again)), atol=1e-6)
        every += [trained, again]
        for stage, (layer, copy) in enumerate(randomization.SCHEMES[scheme](model, seed=seed, example=x[:1]), 1):
            [draw] = method.seeds(copy)
            found = values(frame, role="curve", seed=seed, stage=stage, layer=layer)
            np.testing.assert_allclose(found, correlations(own, heat(copy, x, y, draw)), atol=1e-6)
            every.append(draw)
    assert len(set(every)) == len(every) == 2 * (2 + 4)


def test_twins_are_explained_by_noise_of_their_own(x, y):
    method, model, twins = Noted(), small(), [small(1), small(2)]
    frame = check(model, x, y, methods=[method], seeds=[3], twins=twins, **PEARSON)
    own, every = method.seeds(model)[:2], []
    for number, twin in enumerate(twins):
        [draw] = method.seeds(twin)
        every += [own[number], draw]
        expected = correlations(heat(model, x, y, own[number]), heat(twin, x, y, draw))
        np.testing.assert_allclose(values(frame, scheme="twin", seed=number), expected, atol=1e-6)
    assert len(set(every)) == 4


def test_the_other_image_is_never_the_image_and_may_be_any_other():
    """Also where the images are a part of a set, and not its first."""
    x, y, places, seeds = images(4, dtype=torch.float64), targets(4), [7, 0, 30, 2], range(40)
    frame = check(
        small(), x, y, methods=["input"], seeds=seeds, stages=["11"], indices=places, metrics={"a": similarity.pearson}
    )
    maps = x.sum(1)
    table = torch.tensor([correlations(maps, maps[i].expand_as(maps)) for i in range(4)]).T  # [image, other]
    chosen = np.zeros((4, 4), dtype=int)
    for seed in seeds:
        found = frame[(frame.scheme == "other_image") & (frame.seed == seed)].set_index("image").similarity
        for i, place in enumerate(places):
            [other] = np.flatnonzero(np.isclose(table[i], found[place], atol=1e-6))
            chosen[i, other] += 1
    assert (np.diag(chosen) == 0).all()
    assert (chosen + 99 * np.eye(4) >= 4).all()  # of 40 draws 13 are expected, fewer than 4 in 1 of 2,000


def test_the_maps_of_another_image_are_those_of_its_own_class(x):
    def of_the_class(model, images, targets):
        return images * (targets + 1.0).view(-1, 1, 1, 1) + targets.view(-1, 1, 1, 1) * images.flip(3)

    y = torch.tensor([0, 1, 2, 3])
    frame = check(small(), x, y, methods=[of_the_class], seeds=[0, 1], stages=["11"], **PEARSON)
    maps = of_the_class(None, x, y).sum(1)
    others = np.array([correlations(maps, maps.roll(shift, 0)) for shift in (1, 2, 3)])
    for seed in (0, 1):
        found = values(frame, scheme="other_image", seed=seed)
        assert np.isclose(others, found, atol=1e-6).any(0).all()


def test_noise_of_a_spectrum_has_phases_of_its_own_for_every_place_seed_and_method(x, y):
    same = torch.randn(1, 16, 16, generator=generator(0)).cumsum(1).expand(3, -1, -1)
    drawn = sanity.spectral_noise(same, seed=0).flatten(1)
    drawn = torch.cat([drawn, sanity.spectral_noise(same[:1], seed=1).flatten(1)])
    assert (torch.corrcoef(drawn) - torch.eye(4)).abs().max() < 0.9  # smooth maps are somewhat alike by chance
    at_5 = sanity.spectral_noise(same[:2], seed=0, indices=[5, 2])
    torch.testing.assert_close(at_5[1], drawn[2].view(16, 16))
    methods = {"a": "input", "b": "input"}
    frame = check(small(), x, y, methods=methods, seeds=[0, 1], stages=["11"], **PEARSON)
    lines = frame[frame.scheme == "noise"].groupby(["method", "seed"]).similarity.apply(tuple)
    assert len(set(lines)) == 4


def test_noise_is_as_like_the_map_as_chance_would_have_it():
    """Its mean correlation is zero: nothing of the map's phases is left."""
    maps = torch.randn(200, 12, 12, generator=generator(1)).cumsum(2)
    maps = maps - maps.mean((1, 2), keepdim=True)
    found = correlations(maps, sanity.spectral_noise(maps, seed=3))
    assert abs(np.mean(found)) < 3 * stats.sem(found)


@pytest.mark.parametrize("name", REFERENCE)
def test_every_metric_in_the_frame_is_that_of_scipy_or_scikit_image(name):
    x, y, model = images(2, (3, 24, 24)), targets(2), torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(1728, 5))
    with torch.no_grad():
        model[1].weight.copy_(torch.randn(5, 1728, generator=generator(2)))
    frame = check(model, x, y, methods=["input_x_gradient"], metrics=[name], seeds=[4], lines=False)
    [(_, copy)] = randomization.cascading(model, seed=4)
    a, b = (saliency.input_x_gradient(m, x, y).sum(1).double().numpy() for m in (model, copy))
    expected = [REFERENCE[name](p, q) for p, q in zip(a, b, strict=True)]
    np.testing.assert_allclose(values(frame, stage=1), expected, atol=1e-4)


def test_the_number_of_classes_is_no_class(x):
    with pytest.raises(ValueError, match=f"target {CLASSES} is not one of the model's {CLASSES} classes"):
        check(small(), x, torch.tensor([0, 1, 2, CLASSES]), methods=["gradient"], **PEARSON)
    frame = check(small(), x, torch.full((4,), CLASSES - 1), methods=["gradient"], seeds=[0], lines=False, **PEARSON)
    assert len(frame) == 5 * 4


# ---------------------------------------------------------------- labels, classes, complexity


def test_networks_of_permuted_labels_are_explained_by_noise_of_their_own(x, y):
    method, true, permuted = Noted(), [small(k) for k in range(3)], [small(10 + k) for k in range(3)]
    frame = sanity.data_randomization(true, permuted, x, y, methods=[method], show_progress=False, **PEARSON)
    assert len({seed for *_, seed in method.asked}) == len(method.asked) == 3 * 4
    for k in range(3):
        calls = method.asked[4 * k : 4 * k + 4]
        networks = true[k], permuted[k], permuted[(k + 1) % 3], true[(k + 1) % 3]
        assert [who for who, *_ in calls] == [kind(network) for network in networks]
        own, *others = (heat(network, x, y, seed) for network, (*_, seed) in zip(networks, calls))
        for scheme, maps in zip(("random_labels", "random_labels_crossed", "second_seed"), others):
            np.testing.assert_allclose(values(frame, scheme=scheme, seed=k), correlations(own, maps), atol=1e-6)


def test_two_classes_are_explained_by_noise_of_their_own(x, y):
    method, model = Noted(), small()
    frame = followups.random_logit(model, x, y, methods=[method], seeds=[0, 5], **PEARSON)
    assert len({seed for *_, seed in method.asked}) == len(method.asked) == 4
    for number, seed in enumerate((0, 5)):
        (_, classes, first), (_, others, second) = method.asked[2 * number : 2 * number + 2]
        assert classes == tuple(y.tolist()) and all(a != b for a, b in zip(classes, others))
        maps = heat(model, x, y, first), heat(model, x, torch.tensor(others), second)
        np.testing.assert_allclose(values(frame, seed=seed), correlations(*maps), atol=1e-6)


def test_the_other_class_is_drawn_for_each_image_and_seed():
    x, y, method = images(12), torch.full((12,), 2), Noted()
    followups.random_logit(cnn(), x, y, methods=[method], seeds=6, **PEARSON)
    drawn = np.array([classes for _, classes, _ in method.asked[1::2]])
    assert set(drawn.ravel()) == {0, 1, 3, 4}
    assert all(len(set(row)) > 1 for row in drawn) and all(len(set(column)) > 1 for column in drawn.T)


def test_the_rise_is_from_the_trained_model_to_the_end_of_the_cascade(x, y):
    method, model = Noted(), small()
    frame = followups.complexity_rise(model, x, y, methods=[method], seeds=[2], bins=30)
    *_, (_, last) = randomization.cascading(model, seed=2, example=x[:1])
    assert [who for who, *_ in method.asked] == [kind(model), kind(last)]
    seeds = [seed for *_, seed in method.asked]
    assert len(set(seeds)) == 2
    before, after = (
        np.array([stats.entropy(np.histogram(one, bins=30)[0]) for one in heat(network, x, y, seed).numpy()])
        for network, seed in zip((model, last), seeds)
    )
    np.testing.assert_allclose(frame.rise, (after - before) / before, atol=1e-6)


def test_denoising_adds_noise_of_a_share_of_each_images_range():
    """Of images far from zero, too; other noise for each copy, image and channel."""
    x = torch.rand(2, 3, 12, 12, generator=generator(0), dtype=torch.float64) * torch.tensor([1.0, 4.0]).view(
        2, 1, 1, 1
    )
    x, seen = x + 50, []

    def keeps(model, images, targets):
        seen.append(images.clone())
        return images

    followups.denoised(keeps, samples=96, sigma=0.2)(cnn().double(), x, targets(2))
    noise = torch.cat(seen).unflatten(0, (-1, 2)) - x  # [copy, image, ...]
    assert noise.shape[0] == 96
    width = 0.2 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))
    torch.testing.assert_close(noise.std((0, 2, 3, 4)), width, rtol=0.02, atol=0)
    assert (noise.mean((0, 2, 3, 4)) / width).abs().max() < 0.03
    alike = torch.corrcoef(noise.permute(0, 1, 2, 3, 4).flatten(0, 1).flatten(1))
    assert (alike - torch.eye(len(alike))).abs().max() < 0.5


# ---------------------------------------------------------------- tables


def test_a_table_has_a_row_a_seed_and_a_column_an_image():
    rows = [(role, seed, i, 10.0 * seed + i) for role in ("curve", "floor") for seed in (5, 2) for i in (1, 0)]
    frame = pd.DataFrame([*rows, ("refused", 2, -1, np.nan)], columns=["role", "seed", "image", "similarity"])
    assert sanity.table(frame, role="curve").tolist() == [[20, 21], [50, 51]]
    for wrong in ({}, {"role": "twin"}, {"role": "refused"}):
        with pytest.raises(ValueError, match="one for each seed and image"):
            sanity.table(frame, **wrong)
