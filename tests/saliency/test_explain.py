"""One call from a method to heatmaps, and the size of a pass."""

from functools import partial
from inspect import signature

import pytest
import torch
from networks import cnn, images, targets
from saliency_sanity import saliency
from saliency_sanity.device import generator, seed_of
from saliency_sanity.saliency import METHODS, explain, heatmap, passes
from torch import nn

GRID = (torch.arange(12) // 4)[:, None] * 2 + torch.arange(12) // 6
SMALL = {"samples": 24, "steps": 6, "references": images(2, seed=9), "segments": GRID}

every = pytest.mark.parametrize("name", METHODS)


def options_of(name, **more):
    """The method's own options among those of a quick test."""
    return {
        option: value for option, value in {**SMALL, **more}.items() if option in signature(METHODS[name]).parameters
    }


class Counting(nn.Module):
    """Notes how many images it is shown at once."""

    def __init__(self):
        super().__init__()
        self.network, self.seen = cnn().double(), []

    def forward(self, x):
        self.seen.append(len(x))
        return self.network(x)


@every
@pytest.mark.parametrize("signed", [True, False])
def test_it_is_the_method_and_its_heatmap(name, signed):
    model, x, y, options = cnn(), images(), targets(), options_of(name)
    found = explain(name, model, x, y, signed=signed, **options)
    assert torch.equal(found, heatmap(METHODS[name](model, x, y, **options), signed=signed))
    assert found.shape == (3, 12, 12) and not found.requires_grad


@every
@pytest.mark.parametrize("size", [1, 3, 5])
def test_no_pass_is_larger_than_batch_size_and_the_maps_stay_the_same(name, size, device):
    x, y = images(7, dtype=torch.float64).to(device), targets(7).to(device)
    model, options = Counting().to(device), options_of(name)
    if name == "smoothgrad_integrated_gradients":
        options |= {"samples": 3}
    whole = METHODS[name](model, x, y, **options)
    model.seen.clear()
    cut = METHODS[name](model, x, y, batch_size=size, **options)
    torch.testing.assert_close(cut, whole, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(explain(name, model, x, y, signed=True, batch_size=size, **options), whole.sum(1))
    # an image and its baseline are the least for DeepLIFT, and Grad-CAM finds its layer by five variants of an image
    least = {"deeplift": 2, "gradcam": 5, "guided_gradcam": 5}.get(name, 1)
    assert max(model.seen, default=0) <= max(size, least)


@every
@pytest.mark.parametrize("size", [0, -1, 2.0, True, "8"])
def test_a_batch_size_that_is_none_raises(name, size):
    for call in (METHODS[name], partial(explain, name, signed=True)):
        with pytest.raises(ValueError, match="batch_size must be a whole number of images"):
            call(cnn(), images(), targets(), batch_size=size, **options_of(name))


def test_a_function_without_batch_size_is_given_that_many_images():
    shown = []

    def mine(model, images, targets, *, seed=0, indices=None):
        shown.append(list(range(len(images)) if indices is None else indices))
        noise = [torch.randn(images.shape[1:], generator=generator(seed_of(seed, place))) for place in shown[-1]]
        return torch.stack(noise) + saliency.gradient(model, images, targets)

    model, x, y = Counting().float(), images(5), targets(5)
    whole = explain(mine, model, x, y, signed=True, seed=4)
    model.seen.clear()
    with passes.checked():  # which leaves what the model keeps
        torch.testing.assert_close(explain(mine, model, x, y, signed=True, batch_size=2, seed=4), whole)
    assert shown == [[0, 1, 2, 3, 4], [0, 1], [2, 3], [4]] and max(model.seen) == 2
    placed = explain(mine, model, x, y, signed=True, batch_size=3, seed=4, indices=[9, 8, 7, 6, 5])
    assert shown[-2:] == [[9, 8, 7], [6, 5]] and not torch.allclose(placed, whole)


def test_a_functions_own_calls_of_methods_keep_to_batch_size():
    def mine(model, images, targets):
        return saliency.smoothgrad(model, images, targets, samples=9)

    model = Counting()
    with passes.checked():
        explain(mine, model, images(4).double(), targets(4), signed=True, batch_size=2)
    assert max(model.seen) == 2


def test_a_partial_keeps_its_options():
    model, x, y = cnn(), images(), targets()
    expected = heatmap(saliency.integrated_gradients(model, x, y, steps=3), signed=False)
    few = partial(saliency.integrated_gradients, steps=3, batch_size=1)
    torch.testing.assert_close(explain(few, model, x, y, signed=False, batch_size=2), expected)


@pytest.mark.parametrize(
    ("method", "options", "message"),
    [
        ("gradients", {}, "unknown method 'gradients'; known: gradient"),
        ("gradient", {"samples": 3}, "Gradient has no option samples; it has: batch_size"),
        ("smoothgrad", {"steps": 3, "sample": 3}, "SmoothGrad has no option sample, steps; it has: samples, sigma"),
        (lambda model, images, targets: images.sum(1), {}, r"must return maps \(3, C, H, W\), got \(3, 12, 12\)"),
        (lambda model, images, targets: images[:1], {}, r"must return maps \(3, C, H, W\), got \(1, 3, 12, 12\)"),
        (lambda model, images, targets: None, {}, "must return maps .* got NoneType"),
    ],
)
def test_what_cannot_be_explained_raises(method, options, message):
    with pytest.raises(ValueError, match=message):
        explain(method, cnn(), images(), targets(), signed=True, **options)


def test_a_function_that_takes_any_option_gets_it():
    def mine(model, images, targets, **options):
        return images * options["factor"]

    assert torch.equal(explain(mine, cnn(), images(), targets(), signed=True, factor=2), images().sum(1) * 2)


def test_bad_input_is_found_whatever_the_method():
    with pytest.raises(ValueError, match="makes a batch of one"):
        explain(lambda model, images, targets: images, cnn(), images()[0], targets(), signed=True)


# ---------------------------------------------------------------- options of every method

COUNTED = [(name, option) for name in METHODS for option in ("samples", "steps") if option in options_of(name)]


@pytest.mark.parametrize(("name", "option"), COUNTED)
@pytest.mark.parametrize("value", [0, -2, 2.0, 2.5, True, "3", None, float("nan")])
def test_samples_and_steps_are_whole_numbers(name, option, value):
    with pytest.raises(ValueError, match=f"at least one {option[:-1]} is needed, got {value!r}"):
        METHODS[name](cnn(), images(), targets(), **options_of(name, **{option: value}))


@pytest.mark.parametrize("name", [name for name in METHODS if "sigma" in signature(METHODS[name]).parameters])
@pytest.mark.parametrize("sigma", [-0.1, float("nan"), float("inf"), "wide", None, True])
def test_sigma_is_finite_and_not_negative(name, sigma):
    with pytest.raises(ValueError, match=r"sigma must not be negative, .* finite number"):
        METHODS[name](cnn(), images(), targets(), **options_of(name), sigma=sigma)


@pytest.mark.parametrize("name", [name for name in METHODS if "baseline" in signature(METHODS[name]).parameters])
@pytest.mark.parametrize(
    ("baseline", "message"),
    [
        (torch.zeros(2, 3, 12, 12), r"baseline of shape \(2, 3, 12, 12\) does not fit images \(3, 3, 12, 12\)"),
        (torch.zeros(3, 3, 12, 13), "does not fit images"),
        (torch.zeros(1, 3, 3, 12, 12), "does not fit images"),
        (float("inf"), "baseline has NaN or infinite values"),
        ("black", "baseline must be a number or a tensor, got str"),
        (1j, "baseline must be a number or a tensor, got complex"),
        (torch.zeros(12, 12) * 1j, "baseline must be a number or a tensor, got Tensor"),
        (None, "baseline must be a number or a tensor, got NoneType"),
    ],
)
def test_a_baseline_fits_the_images(name, baseline, message):
    with pytest.raises(ValueError, match=message):
        METHODS[name](cnn(), images(), targets(), **options_of(name), baseline=baseline)


@pytest.mark.parametrize("name", [name for name in METHODS if "indices" in signature(METHODS[name]).parameters])
@pytest.mark.parametrize("indices", [3, [0, 0.5, 1], ["a", "b", "c"], torch.tensor([0.0, 1.0, 2.0])])
def test_places_are_whole_numbers(name, indices):
    with pytest.raises(ValueError, match="indices must be whole numbers"):
        METHODS[name](cnn(), images(), targets(), **options_of(name), indices=indices)


class Single(nn.Module):
    def forward(self, logits):
        return logits.float()


@every
def test_inside_autocast_a_map_has_full_precision(name):
    """Though the model ends in full precision, and so would not be refused."""
    model, x, y = nn.Sequential(cnn().eval(), Single()), images(), targets()
    plain = METHODS[name](model, x, y, **options_of(name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(METHODS[name](model, x, y, **options_of(name)), plain)
        assert torch.is_autocast_enabled("cpu")


@pytest.mark.parametrize("name", ["gradient", "guided_backprop", "gradcam", "deeplift", "occlusion"])
def test_what_goes_wrong_in_the_middle_says_what_to_do(name):
    class Tired(nn.Module):
        runs = 0

        def forward(self, x):
            self.runs += 1
            if self.runs > 1:
                raise IndexError("dimension out of range")
            return x

    with passes.checked(), pytest.raises(ValueError, match=rf"{name} cannot be computed \(IndexError: dimension out"):
        model = nn.Sequential(cnn(), Tired())
        for _ in range(2):
            METHODS[name](model, images(), targets())
