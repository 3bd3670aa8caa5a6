"""The gradient family against finite differences, captum, and what is known in closed form."""

from functools import partial

import captum.attr
import pytest
import torch
from networks import CLASSES, SHAPE, cnn, images, linear, targets
from saliency_sanity.device import generator, seed_of
from saliency_sanity.inference import evaluating
from saliency_sanity.saliency import passes
from saliency_sanity.saliency.gradients import (
    _Noise,
    expected_gradients,
    gradient,
    input_x_gradient,
    integrated_gradients,
    smoothgrad,
    smoothgrad_integrated_gradients,
    smoothgrad_squared,
    vargrad,
)
from torch import nn

NOISY = (smoothgrad, smoothgrad_squared, vargrad, partial(smoothgrad_integrated_gradients, steps=3))
FAMILY = (*NOISY, gradient, input_x_gradient, integrated_gradients)


def logit(model, x, y):
    with evaluating(model), torch.no_grad():
        return model(x).gather(1, y[:, None])[:, 0]


def smooth_network():
    """Twice differentiable, so that sums over paths and finite differences converge fast."""
    model = cnn(1).double()
    for index in (2, 5, 10):
        model[index] = nn.Softplus()
    model[3] = nn.AvgPool2d(2)
    return model


@pytest.fixture
def x():
    return images()


@pytest.fixture
def y():
    return targets()


# ---------------------------------------------------------------- gradient


@pytest.mark.parametrize("build", [cnn, smooth_network])
def test_gradient_is_the_slope_of_the_logit(build, y):
    model, x, step = build().double(), images(dtype=torch.float64), 1e-6
    slopes = gradient(model, x, y)
    for place in torch.randint(x[0].numel(), (25,), generator=generator(3)).tolist():
        away = torch.zeros_like(x[0]).view(-1).index_fill(0, torch.tensor([place]), step).view_as(x[0])
        difference = (logit(model, x + away, y) - logit(model, x - away, y)) / (2 * step)
        torch.testing.assert_close(slopes.flatten(1)[:, place], difference, atol=1e-7, rtol=1e-5)


def test_gradient_and_input_x_gradient_are_captums(x, y):
    model = cnn().eval()
    torch.testing.assert_close(gradient(model, x, y), captum.attr.Saliency(model).attribute(x, y, abs=False))
    theirs = captum.attr.InputXGradient(model).attribute(x.clone().requires_grad_(), y).detach()
    torch.testing.assert_close(input_x_gradient(model, x, y), theirs)


def test_gradient_is_of_each_images_own_class(x):
    model = cnn()
    by_class = [gradient(model, x, torch.full((3,), c)) for c in range(CLASSES)]
    y = torch.tensor([4, 0, 2])
    torch.testing.assert_close(gradient(model, x, y), torch.stack([by_class[c][i] for i, c in enumerate(y)]))
    assert not torch.allclose(by_class[0], by_class[1])


# ---------------------------------------------------------------- Integrated Gradients


@pytest.mark.parametrize(
    "baseline",
    [0.0, -1.5, torch.tensor(0.3), images(1, seed=8), images(3, seed=8), images(1, seed=8)[0, :, :1, :1], 2],
    ids=["zero", "number", "scalar tensor", "one image", "an image each", "colour", "int"],
)
def test_integrated_gradients_are_captums(x, y, baseline):
    model = cnn().eval()
    full = torch.as_tensor(baseline, dtype=x.dtype).expand_as(x)
    theirs = captum.attr.IntegratedGradients(model).attribute(x, full, y, n_steps=50, method="gausslegendre")
    ours = integrated_gradients(model, x, y, steps=50, baseline=baseline)
    assert ours.dtype == x.dtype and not ours.requires_grad
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_fifty_steps_from_zero_are_the_default(x, y):
    model = cnn()
    torch.testing.assert_close(
        integrated_gradients(model, x, y),
        integrated_gradients(model, x, y, steps=50, baseline=torch.zeros(())),
    )


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_integrated_gradients_add_up_to_the_difference_of_the_logits(y, baseline):
    model, x = smooth_network(), images(dtype=torch.float64)
    found = integrated_gradients(model, x, y, baseline=baseline).sum((1, 2, 3))
    expected = logit(model, x, y) - logit(model, torch.full_like(x, baseline), y)
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-7)


def test_on_a_piecewise_linear_network_they_nearly_add_up(x, y):
    model = cnn()
    found = integrated_gradients(model, x, y, steps=400).sum((1, 2, 3))
    torch.testing.assert_close(found, logit(model, x, y) - logit(model, torch.zeros_like(x), y), atol=0.01, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 50])
def test_integrated_gradients_of_a_polynomial_are_exact(steps):
    """f = sum of x^3: each pixel has x^3 - b^3, exact from two nodes on."""

    class Cubes(nn.Module):
        def forward(self, x):
            return x.pow(3).flatten(1)[:, :2].sum(1, keepdim=True)

    x, b = images(2, dtype=torch.float64), 0.5
    found = integrated_gradients(Cubes(), x, torch.zeros(2, dtype=torch.int64), steps=steps, baseline=b)
    exact = (x**3 - b**3).flatten(1)[:, :2]
    assert torch.allclose(found.flatten(1)[:, :2], exact) == (steps > 1)
    assert not found.flatten(1)[:, 2:].any()


# ---------------------------------------------------------------- a linear model


def test_on_a_linear_model_all_reduce_to_the_weights(x, y):
    model, b = linear(), images(1, seed=5)
    w = model[1].weight.detach()[y].view_as(x)
    torch.testing.assert_close(gradient(model, x, y), w)
    torch.testing.assert_close(smoothgrad(model, x, y, samples=3), w)
    torch.testing.assert_close(input_x_gradient(model, x, y), w * x)
    torch.testing.assert_close(integrated_gradients(model, x, y, steps=4, baseline=b), w * (x - b))
    torch.testing.assert_close(smoothgrad_squared(model, x, y, samples=3), w * w)
    torch.testing.assert_close(vargrad(model, x, y, samples=3), torch.zeros_like(w), atol=1e-12, rtol=0)
    torch.testing.assert_close(expected_gradients(model, x, y, references=b, samples=3), w * (x - b))


# ---------------------------------------------------------------- SmoothGrad and its kin


@pytest.mark.parametrize("samples", [1, 7])
@pytest.mark.parametrize("sigma", [0.15, 0.6])
def test_smoothgrad_squared_is_vargrad_plus_the_square_of_smoothgrad(x, y, samples, sigma):
    options = {"samples": samples, "sigma": sigma, "seed": 2}
    mean, square, variance = (method(cnn(), x, y, **options) for method in (smoothgrad, smoothgrad_squared, vargrad))
    torch.testing.assert_close(square, variance + mean * mean, atol=1e-7, rtol=1e-5)
    assert (square >= 0).all() and (variance >= 0).all()
    assert variance.max() > 1e-4 or samples == 1


def test_noise_of_no_size_leaves_the_plain_method(x, y):
    model, still = cnn(), {"sigma": 0.0, "samples": 3}
    plain = gradient(model, x, y)
    torch.testing.assert_close(smoothgrad(model, x, y, **still), plain)
    torch.testing.assert_close(smoothgrad_squared(model, x, y, **still), plain * plain)
    torch.testing.assert_close(vargrad(model, x, y, **still), torch.zeros_like(x), atol=1e-12, rtol=0)
    torch.testing.assert_close(
        smoothgrad_integrated_gradients(model, x, y, steps=9, baseline=0.2, **still),
        integrated_gradients(model, x, y, steps=9, baseline=0.2),
    )


class Recorder(nn.Module):
    """Keeps what it is differentiated at; the logit is half the sum of squares: its gradient is the input.

    A method puts back what a model keeps, but for those who have checked it themselves: `passes.checked`.
    """

    def __init__(self):
        super().__init__()
        self.seen = []

    def forward(self, x):
        if x.requires_grad:
            self.seen.append(x.detach().clone())
        return x.square().sum((1, 2, 3))[:, None] / 2


def test_the_noise_has_the_width_that_sigma_says_image_by_image():
    x = torch.stack([torch.linspace(0, 1, 432).view(SHAPE), torch.linspace(-3, 7, 432).view(SHAPE)])
    model, zeros = Recorder(), torch.zeros(2, dtype=torch.int64)
    with passes.checked():
        mean = smoothgrad(model, x, zeros, samples=400, sigma=0.2)
    seen = torch.cat(model.seen).view(2, 400, *SHAPE)
    torch.testing.assert_close(mean, seen.mean(1), atol=1e-5, rtol=1e-5)
    noise = seen - x[:, None]
    torch.testing.assert_close(noise.std((1, 2, 3, 4)), torch.tensor([0.2, 2.0]), rtol=0.01, atol=0)
    assert noise.mean((1, 2, 3, 4)).abs().max() < 0.02 and not torch.equal(noise[0], noise[1] / 10)


def test_smoothgrad_of_integrated_gradients_is_the_mean_over_noisy_images(x, y):
    model, recorder = cnn(), Recorder()
    options = {"samples": 4, "sigma": 0.3, "seed": 6}
    with passes.checked():
        smoothgrad(recorder, x, torch.zeros(3, dtype=torch.int64), **options)  # shows the same noise
    found = smoothgrad_integrated_gradients(model, x, y, steps=5, **options)
    for i, noisy in enumerate(torch.cat(recorder.seen).split(4)):
        parts = integrated_gradients(model, noisy, y[i].expand(4), steps=5)
        torch.testing.assert_close(found[i], parts.mean(0))


@pytest.mark.parametrize("method", NOISY)
def test_one_seed_one_map(method, x, y):
    model = cnn()
    a, b, c = (method(model, x, y, samples=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)


# ---------------------------------------------------------------- Expected Gradients


def test_expected_gradients_with_one_reference_tend_to_integrated_gradients(y):
    model, x, b = smooth_network(), images(dtype=torch.float64), images(1, seed=5, dtype=torch.float64)
    found = expected_gradients(model, x, y, references=b, samples=1500)
    exact = integrated_gradients(model, x, y, baseline=b)
    assert (found - exact).abs().max() < 0.05 * exact.abs().max()


def test_expected_gradients_add_up_in_the_mean(y):
    model, x = smooth_network(), images(dtype=torch.float64)
    references = images(4, seed=5, dtype=torch.float64)
    found = expected_gradients(model, x, y, references=references, samples=1500).sum((1, 2, 3))
    away = torch.stack([logit(model, references, c.expand(4)).mean() for c in y])
    torch.testing.assert_close(found, logit(model, x, y) - away, atol=0.02, rtol=0)


def test_expected_gradients_on_a_linear_model_use_all_references(x, y):
    model, references = linear(), images(5, seed=5)
    w = model[1].weight.detach()[y].view_as(x)
    found = expected_gradients(model, x, y, references=references, samples=5000)
    torch.testing.assert_close(found, w * (x - references.mean(0)), atol=0.01, rtol=0.1)
    a, b, c = (expected_gradients(model, x, y, references=references, samples=3, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(a, b) and not torch.allclose(a, c)


# ---------------------------------------------------------------- how the work is cut


@pytest.mark.parametrize("method", [*FAMILY, partial(expected_gradients, references=images(2, seed=5))])
@pytest.mark.parametrize("per_pass", [1, 3])
def test_the_size_of_a_pass_does_not_matter(method, per_pass, x, y, monkeypatch):
    model = cnn().double()
    whole = method(model, x.double(), y)
    monkeypatch.setattr(passes, "VALUES_A_PASS", per_pass * x[0].numel())
    torch.testing.assert_close(method(model, x.double(), y), whole)


def shown(count, shape, **options):
    """The noisy copies at which SmoothGrad takes gradients, `(count, samples, *shape)`, and the images."""
    model, x = Recorder(), images(count, shape)
    with passes.checked():
        smoothgrad(model, x, torch.zeros(count, dtype=torch.int64), **options)
    return torch.cat(model.seen).view(count, -1, *shape), x


@pytest.mark.parametrize("samples", [1, 2, 5, 23])
@pytest.mark.parametrize("shape", [(1, 1, 1), (1, 1, 5), (1, 3, 5), (1, 4, 4), (1, 1, 17), (3, 5, 7), SHAPE])
@pytest.mark.parametrize("block", [16, 64, 2**20])
@pytest.mark.parametrize("per_pass", [1, 3, 1000])
def test_the_noise_is_that_of_one_draw_however_it_is_cut(samples, shape, block, per_pass, monkeypatch):
    monkeypatch.setattr(_Noise, "BLOCK", block)
    monkeypatch.setattr(passes, "VALUES_A_PASS", per_pass * torch.Size(shape).numel())
    found, x = shown(2, shape, samples=samples, seed=5, indices=[4, 1])
    for i, place in enumerate((4, 1)):
        noise = torch.randn(samples, *shape, generator=generator(seed_of(5, place)))
        assert torch.equal(found[i], x[i] + 0.15 * (x[i].max() - x[i].min()) * noise)


@pytest.mark.parametrize("method", NOISY)
def test_on_any_device_the_noise_does_not_depend_on_passes_and_batch(method, device):
    model, x, y = cnn().double().to(device), images(dtype=torch.float64).to(device), targets().to(device)
    whole = method(model, x, y, samples=7, seed=2)
    torch.testing.assert_close(method(model, x, y, samples=7, seed=2, batch_size=2), whole)
    alone = method(model, x[2:], y[2:], samples=7, seed=2, indices=[2])
    torch.testing.assert_close(alone, whole[2:])


class Steep(nn.Module):
    """Its gradient is 1e8 + x: spread about a mean that is a billion times as large."""

    def forward(self, x):
        return (1e8 * x + x.square() / 2).sum((1, 2, 3))[:, None]


@pytest.mark.parametrize("per_pass", [1, 4, 1000])
def test_vargrad_is_right_where_the_mean_hides_the_spread(per_pass, monkeypatch):
    samples, x = 30, images(2, dtype=torch.float64)
    monkeypatch.setattr(passes, "VALUES_A_PASS", per_pass * x[0].numel())
    noise = torch.stack([torch.randn(samples, *SHAPE, generator=generator(seed_of(0, i))).double() for i in range(2)])
    width = 0.15 * (x.amax((1, 2, 3)) - x.amin((1, 2, 3)))
    expected = noise.var(1, correction=0) * width[:, None, None, None].square()
    found = vargrad(Steep(), x, torch.zeros(2, dtype=torch.int64), samples=samples)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("per_pass", [2, 1000])
def test_sums_are_kept_in_double_precision(per_pass, x, monkeypatch):
    """Gradients of 1e4 and of the noise: the mean over copies has all digits of a float32."""

    class Large(nn.Module):
        def forward(self, x):
            return (1e4 * x + x.square() / 2).sum((1, 2, 3))[:, None]

    monkeypatch.setattr(passes, "VALUES_A_PASS", per_pass * x[0].numel())
    zeros, recorder = torch.zeros(3, dtype=torch.int64), Recorder()
    with passes.checked():
        smoothgrad(recorder, x, zeros, samples=100)
    gradients = (1e4 + torch.cat(recorder.seen)).double().view(3, 100, *SHAPE)
    for method, expected in (
        (smoothgrad, gradients.mean(1)),
        (smoothgrad_squared, gradients.square().mean(1)),
        (vargrad, gradients.var(1, correction=0)),
    ):
        found = method(Large(), x, zeros, samples=100)
        torch.testing.assert_close(found, expected.float(), rtol=2e-7, atol=0)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        *((m, {"samples": 0}, "at least one sample") for m in NOISY),
        *((m, {"sigma": -0.1}, "sigma must not be negative") for m in NOISY),
        (integrated_gradients, {"steps": 0}, "at least one step is needed, got 0"),
        (integrated_gradients, {"steps": -3}, "at least one step is needed, got -3"),
        (smoothgrad_integrated_gradients, {"steps": 0}, "at least one step"),
        (integrated_gradients, {"baseline": torch.zeros(4, *SHAPE)}, "does not fit images"),
        (integrated_gradients, {"baseline": torch.zeros(5)}, r"baseline of shape \(5,\) does not fit"),
        (integrated_gradients, {"baseline": float("nan")}, "baseline has NaN or infinite values"),
        (smoothgrad_integrated_gradients, {"baseline": float("inf")}, "baseline has NaN or infinite values"),
        (expected_gradients, {"references": torch.zeros(SHAPE)}, "references must be images"),
        (
            expected_gradients,
            {"references": torch.zeros(2, 3, 5, 5)},
            r"\(R, 3, 12, 12\), got .*\(2, 3, 5, 5\)",
        ),
        (expected_gradients, {"references": torch.zeros(0, *SHAPE)}, "references must be images"),
        (expected_gradients, {"references": None}, "references must be images .* got .*NoneType"),
        (expected_gradients, {"references": [torch.zeros(SHAPE)]}, "references must be images .* got .*list"),
        (expected_gradients, {"references": torch.zeros(1, *SHAPE) * 1j}, "references must be images .*complex64"),
        (expected_gradients, {"references": torch.full((1, *SHAPE), torch.nan)}, "references have NaN"),
        (expected_gradients, {"references": torch.zeros(1, *SHAPE), "samples": 0}, "at least one sample"),
    ],
)
def test_options_out_of_range_raise(method, options, message, x, y):
    with pytest.raises(ValueError, match=message):
        method(cnn(), x, y, **options)


@pytest.mark.parametrize("method", NOISY)
@pytest.mark.parametrize("seed", [0.5, None, "seed"])
def test_a_seed_that_is_no_int_raises(method, seed, x, y):
    with pytest.raises(TypeError, match="seed must be an int"):
        method(cnn(), x, y, seed=seed)
