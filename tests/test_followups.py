"""The follow-up tests, each on a case that can be worked out by hand."""

import math

import numpy as np
import pytest
import torch
from saliency_sanity import followups, randomization, saliency, similarity
from saliency_sanity.book import models
from scipy import stats
from torch import nn


@pytest.fixture
def linear():
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 3))


@pytest.fixture
def images():
    return torch.rand(4, 1, 6, 6, generator=torch.Generator().manual_seed(0))


TARGETS = torch.tensor([0, 1, 2, 0])


def test_random_logit_compares_the_rows_of_a_linear_model(linear, images):
    frame = followups.random_logit(linear, images, TARGETS, methods=["gradient", "sobel"], metrics=["pearson"])
    correlations = np.corrcoef(linear[1].weight.detach().numpy())
    rows = frame[frame.method == "gradient"]
    for image, target in enumerate(TARGETS.tolist()):
        others = [correlations[target, other] for other in range(3) if other != target]
        found = rows[rows.image == image].similarity.to_numpy()
        assert all(np.isclose(others, value, atol=1e-5).any() for value in found)
    assert np.allclose(frame[frame.method == "sobel"].similarity, 1) and set(frame.seed) == set(range(5))


def test_random_logit_needs_another_class(images):
    with pytest.raises(ValueError, match="one class only"):
        model = nn.Sequential(nn.Flatten(), nn.Linear(36, 1))
        followups.random_logit(model, images, torch.zeros(4, dtype=torch.int64), methods=["gradient"], metrics=["ssim"])


def test_a_denoised_gradient_is_smoothgrad():
    model, x = models.cnn().eval(), torch.rand(2, 1, 28, 28, generator=torch.Generator().manual_seed(0))
    targets = torch.tensor([3, 4])
    ours = followups.denoised("gradient", samples=400, sigma=0.1)(model, x, targets, seed=1)
    theirs = saliency.smoothgrad(model, x, targets, samples=400, sigma=0.1, seed=2)
    assert similarity.pearson(ours[:, 0], theirs[:, 0]).min() > 0.97


def test_denoising_averages_noise_away_and_repeats_with_its_seed(linear, images):
    quiet = followups.denoised("noise", samples=100)
    maps = quiet(linear, images, TARGETS, seed=3)
    assert 0.05 < maps.std() < 0.2  # 1 / sqrt(100)
    assert torch.equal(maps, quiet(linear, images, TARGETS, seed=3))
    assert quiet.__name__ == "denoised_noise"


def test_denoising_counts_every_copy_once(linear, images):
    calls = []

    def counted(model, pictures, targets):
        calls.append(len(pictures))
        return saliency.gradient(model, pictures, targets)

    maps = followups.denoised(counted, samples=37)(linear, images, TARGETS)
    assert sum(calls) == 37 * len(images) and max(calls) <= followups.PER_CALL
    torch.testing.assert_close(maps, saliency.gradient(linear, images, TARGETS))  # the same at every input


@pytest.mark.parametrize("options", [{"samples": 0}, {"samples": 2.5}, {"sigma": -1.0}, {"sigma": math.nan}])
def test_denoising_refuses(options):
    with pytest.raises(ValueError, match="samples must be at least 1"):
        followups.denoised("gradient", **options)


def test_complexity_is_the_entropy_of_the_histogram(device):
    maps = torch.randn(3, 20, 20, generator=torch.Generator().manual_seed(0))
    expected = [stats.entropy(np.histogram(m, bins=100)[0]) for m in maps.double().numpy()]
    np.testing.assert_allclose(followups.complexity(maps.to(device)).cpu(), expected, atol=1e-6)


def test_complexity_by_hand():
    halves = torch.tensor([[[0.0, 0.0], [1.0, 1.0]]])
    assert followups.complexity(halves).item() == pytest.approx(np.log(2))
    assert followups.complexity(torch.full((1, 4, 4), 3.0)).item() == 0
    with pytest.raises(ValueError, match="two bins"):
        followups.complexity(halves, bins=1)


def test_complexity_rise_compares_with_the_last_copy_of_the_cascade(linear, images):
    frame = followups.complexity_rise(linear, images, TARGETS, methods=["gradient", "input"], seeds=[7])
    (_, random), *_ = randomization.cascading(linear, seed=7)
    before, after = (
        followups.complexity(saliency.heatmap(saliency.gradient(m, images, TARGETS), signed=True))
        for m in (linear, random)
    )
    found = frame[frame.method == "gradient"].rise
    np.testing.assert_allclose(found, ((after - before) / before).numpy(), atol=1e-6)
    assert (frame[frame.method == "input"].rise == 0).all()


def test_complexity_rise_of_a_constant_map_is_undefined(linear, images):
    def flat(model, images, targets):
        return torch.ones_like(images)

    assert followups.complexity_rise(linear, images, TARGETS, methods=[flat], seeds=[0]).rise.isna().all()


@pytest.mark.parametrize("maps", [None, torch.ones(3, 4), torch.ones(2, 3, 4) / 0, torch.ones(0, 3, 4)])
def test_complexity_refuses_what_is_no_map(maps):
    with pytest.raises(ValueError, match="maps"):
        followups.complexity(maps)
    with pytest.raises(ValueError, match="two bins"):
        followups.complexity(torch.ones(1, 2, 2), bins=2.5)


@pytest.mark.parametrize(
    ("made", "says"),
    [
        (lambda x: None, "must return maps"),
        (lambda x: x[:1], "must return maps"),
        (lambda x: x.long(), "maps of floats"),
        (lambda x: x / 0, "NaN or infinite pixels"),
    ],
)
def test_complexity_rise_says_what_a_method_gives_instead_of_maps(linear, images, made, says):
    with pytest.raises(ValueError, match=says):
        followups.complexity_rise(linear, images, TARGETS, methods={"own": lambda m, x, y: made(x)}, seeds=[0])
