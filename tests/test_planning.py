"""What is said before a run is what the run does, and costs next to nothing."""

import json
from functools import partial

import pytest
import torch
from networks import cnn, images, targets
from saliency_sanity import saliency, sanity
from saliency_sanity.device import local_seed
from torch import nn

PASSES = {
    "gradient": ("gradient", 1),
    "IG": (partial(saliency.integrated_gradients, steps=7), 7),
    "SmoothGrad": (partial(saliency.smoothgrad, samples=5), 5),
    "SmoothGrad-IG": (partial(saliency.smoothgrad_integrated_gradients, samples=10, steps=20), 200),
    "LIME": ("lime", 256),
    "sobel": ("sobel", 0),
    "noise": ("noise", 0),
}


class Counts(nn.Module):
    def __init__(self):
        super().__init__()
        self.network, self.seen = cnn(), seen

    def forward(self, x):
        seen.append(len(x))
        return self.network(x)


seen: list[int] = []


def preflight(model, methods, **options):
    asked = {"methods": methods, "metrics": ["pearson"], "seeds": 3, **options}
    return sanity.preflight(model, images(4), targets(4), **asked)


def test_passes_are_those_that_the_method_makes():
    found = preflight(Counts(), {label: method for label, (method, _) in PASSES.items()})
    for label, (method, count) in PASSES.items():
        model = Counts()
        with saliency.passes.checked():
            seen.clear()
            sanity.heat_of(saliency.get(method), model, images(1), targets(1), 0)
        assert found.trials[label].passes == sum(seen) == count, label
    maps = 3 * (4 + 1)
    assert found.passes("IG") == 7 * maps * 4 and found.passes("sobel") == 0
    assert found.passes("SmoothGrad") == 5 * (maps + 3) * 4  # and three retests


def test_methods_of_many_passes_are_counted_and_not_tried():
    preflight(Counts(), {"none": "sobel"})
    base = len(seen)
    seen.clear()
    found = preflight(Counts(), {"LIME": "lime", "SmoothGrad-IG": PASSES["SmoothGrad-IG"][0], "gradient": "gradient"})
    assert sum(seen) < base + 20
    assert torch.tensor(found.trials["LIME"].seconds).isnan() and found.seconds("LIME") > found.seconds("gradient") > 0


def test_refusals_are_found_and_the_plan_is_that_of_the_run():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.GELU(), nn.Flatten(), nn.Linear(400, 5))
    asked = {"methods": ["gradient", "guided_backprop", "expected_gradients"], "metrics": ["pearson"], "twins": [model]}
    found = preflight(model, **asked)
    assert "references=" in found.trials["expected_gradients"].refusal and found.trials["guided_backprop"].refusal
    assert not found.trials["gradient"].refusal
    frame = sanity.parameter_randomization(model, images(4), targets(4), seeds=3, **asked, show_progress=False)
    assert json.loads(json.dumps(found.plan)) == frame.attrs["plan"]
    assert found.plan["maps"]["gradient"] == 3 * 3 + 2


def test_it_reads_well():
    text = str(preflight(cnn(), {"gradient": "gradient", "LIME": "lime", "expected_gradients": "expected_gradients"}))
    lines = text.splitlines()
    assert lines[:2] == ["cascading: 4 stages, 3 seeds, 4 images, 204 maps", "stages: 11, 9, 4, 0"]
    assert "1 a map, 60 image passes" in text and "(not tried)" in text and "refuses: " in text
    assert max(map(len, lines)) <= 140


def test_bad_input_is_refused_as_in_the_run():
    for change, message in (
        ({"methods": ["gradients"]}, "unknown method"),
        ({"metrics": ["psnr"]}, "unknown metric"),
        ({"scheme": "random"}, "unknown scheme"),
        ({"init": "he"}, "unknown init"),
        ({"seeds": 0}, "at least one seed"),
        ({"stages": ["nonsense"]}, "unknown stage"),
    ):
        with pytest.raises(ValueError, match=message):
            preflight(cnn(), **{"methods": ["gradient"], **change})


def test_nothing_is_changed():
    model, state = cnn(), torch.get_rng_state()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with local_seed(3):
        preflight(model, ["gradient", "smoothgrad", "gradcam"])
    assert torch.equal(state, torch.get_rng_state()) and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_the_layer_of_grad_cam_is_one_for_all_copies(monkeypatch):
    layers = []

    def watched(model, images, targets, *, layer=None):
        layers.append(layer)
        return saliency.gradient(model, images, targets)

    monkeypatch.setattr(saliency.cam, "gradcam_layer", lambda model, images: "4", raising=False)
    monkeypatch.setattr(saliency, "gradcam", watched)
    asked = {"metrics": ["pearson"], "seeds": 1, "show_progress": False}
    methods = {"open": watched, "named": partial(watched, layer="0"), "mine": lambda m, x, t, layer=7: x * layer}
    frame = sanity.parameter_randomization(cnn(), images(2), targets(2), methods=methods, **asked)
    assert layers == ["4"] * 5 + ["0"] * 5 and frame.attrs["plan"]["gradcam_layer"] == "4"
    assert "Grad-CAM looks at: 4" in str(preflight(cnn(), methods))
    layers.clear()
    frame = sanity.parameter_randomization(cnn(), images(2), targets(2), methods=["gradient"], **asked)
    assert frame.attrs["plan"]["gradcam_layer"] is None
