"""What a method, a metric or a test does when nothing is asked for: other defaults are other numbers."""

from collections.abc import Callable
from inspect import Parameter, signature

import pytest
from saliency_sanity import followups, plots, sanity
from saliency_sanity.saliency import METHODS
from saliency_sanity.similarity import METRICS

ASKED = Parameter.empty  # no default: the caller has to say
DRAWN = {"seed": 0, "indices": None}  # the same noise in every run, by the image's place in the batch
NOISY = {"samples": 50, "sigma": 0.15, **DRAWN}  # Adebayo et al. (2018), appendix: 50 samples, .15 x (max - min)
FROM_ZERO = {"baseline": 0.0}
SEGMENTS = {"segments": None, "samples": 256, **DRAWN, **FROM_ZERO}  # superpixels; 256 = all coalitions of 8 segments

OF_METHODS: dict[str, dict] = {
    "gradient": {},
    "input_x_gradient": {},
    "integrated_gradients": {"steps": 50, **FROM_ZERO},  # Adebayo et al. (2018), appendix: 50 steps from zero
    "smoothgrad": NOISY,
    "smoothgrad_squared": NOISY,
    "vargrad": NOISY,  # Adebayo et al. (2018), as SmoothGrad
    "smoothgrad_integrated_gradients": {**NOISY, "steps": 50, **FROM_ZERO},  # the two above together
    "expected_gradients": {"references": ASKED, "samples": 50, **DRAWN},  # as many passes as Integrated Gradients
    "guided_backprop": {},
    "deconvnet": {},
    "gradcam": {"layer": None, "reshape": None},  # the last with a place: Selvaraju et al. (2017)
    "guided_gradcam": {"layer": None, "reshape": None},
    "deeplift": FROM_ZERO,
    "lrp_epsilon": {"epsilon": 1e-6, "zero_params": "bias"},  # zennit's epsilon; without biases relevance is conserved
    "lrp_alpha_beta": {"alpha": 2.0, "beta": 1.0},  # zennit's, and the rule of Kohlbrenner et al. (2020)
    "lrp_composite": {},
    "occlusion": {"window": None, "stride": None, **FROM_ZERO},  # a seventh of the image, half a window
    "lime": {**SEGMENTS, "width": 0.25},  # the kernel's width in the authors' code for images
    "kernel_shap": SEGMENTS,
    "sobel": {},
    "canny": {"sigma": 1.0},  # scikit-image's
    "input": {},
    "noise": DRAWN,
}
OF_METRICS: dict[str, dict] = {
    "spearman": {},
    "spearman_abs": {},
    "spearman_nonzero": {},
    "ssim": {"win_size": 5},  # Adebayo et al. (2018): a window of 5
    "ssim_abs": {"win_size": 5},
    "hog": {"cell": None},  # 16 pixels on photographs, as Adebayo et al. (2018); a seventh of smaller maps
    "pearson": {},
    "topk_intersection": {"k": 0.1},  # our choice: Ghorbani et al. (2017) count the 1,000 largest of 227 x 227
}
CASCADE = {"methods": ASKED, "metrics": ASKED, "scheme": "cascading", "stages": None, "explain": "targets"}
LINES = {"lines": True, "batch_size": None}
FIVE = {"seeds": range(5)}  # the fewest replicates that a claim may rest on
OF_OTHERS: list[tuple[Callable, dict]] = [
    (sanity.parameter_randomization, {**CASCADE, **FIVE, "twins": (), **LINES, "indices": None, "show_progress": True}),
    (sanity.preflight, {**CASCADE, **FIVE, "twins": (), **LINES}),  # as the test that it looks ahead to
    (sanity.data_randomization, {"methods": ASKED, "metrics": ASKED, **LINES, "indices": None, "show_progress": True}),
    (sanity.retained_share, {"floor": "other_image", "ceiling": None}),
    (followups.random_logit, {"methods": ASKED, "metrics": ASKED, **FIVE, "batch_size": None, "indices": None}),
    (followups.denoised, {"samples": 50, "sigma": 0.15}),  # as SmoothGrad, which it is for the gradient
    (followups.complexity, {"bins": 100}),  # Hedstroem et al. (2024)
    (followups.complexity_rise, {"methods": ASKED, **FIVE, "bins": 100, "batch_size": None, "indices": None}),
    (plots.maps, {"signed": ASKED, "images": None, "scale": "map", "clip": 0.99}),  # the 2018 code's 99th percentile
    (plots.colours, {"signed": ASKED, "clip": 0.99, "levels": 32}),
    (plots.gallery, {"signed": ASKED, "image": None, "across": 3, "clip": 0.99}),
    (plots.curves, {"methods": None, "across": 2}),
    (plots.dots, {"xlabel": ASKED, "reference": None}),
]


def defaults(function) -> dict:
    """Of the options, those of decorators among them."""
    known = signature(function).parameters.items()
    return {name: parameter.default for name, parameter in known if parameter.kind is Parameter.KEYWORD_ONLY}


def same(found: dict, wanted: dict) -> bool:
    """Equal in value and in type: True is not 1, and 0 is not 0.0."""
    return found == wanted and all(type(found[name]) is type(value) for name, value in wanted.items())


def test_every_method_and_metric_has_a_line_here():
    assert set(OF_METHODS) == set(METHODS) and set(OF_METRICS) == set(METRICS)


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_defaults_are_those_of_its_paper(name):
    wanted = {**OF_METHODS[name], "batch_size": None}
    assert same(defaults(METHODS[name]), wanted), f"{name} has {defaults(METHODS[name])}, not {wanted}"


@pytest.mark.parametrize("name", METRICS)
def test_a_metrics_defaults(name):
    assert same(defaults(METRICS[name]), OF_METRICS[name])


@pytest.mark.parametrize(("function", "wanted"), OF_OTHERS, ids=[function.__name__ for function, _ in OF_OTHERS])
def test_defaults_of_what_computes_and_draws(function, wanted):
    assert same(defaults(function), wanted)
