"""Grad-CAM against captum, and against the class activation map where that is exact."""

import captum.attr
import pytest
import torch
from networks import CLASSES, cnn, images, lively, targets
from saliency_sanity.book import models
from saliency_sanity.book.photographs import normalize, whole
from saliency_sanity.device import local_seed
from saliency_sanity.inference import evaluating
from saliency_sanity.saliency import passes
from saliency_sanity.saliency.backprop_rules import guided_backprop
from saliency_sanity.saliency.cam import gradcam, guided_gradcam, last_convolution
from torch import nn
from torch.nn import functional as F


def captums(model, layer, x, y):
    with evaluating(model):
        small = captum.attr.LayerGradCam(model, layer).attribute(x, y, relu_attributions=True)
    return F.interpolate(small.detach(), size=x.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 5])
def test_gradcam_is_captums_at_every_layer(index):
    model, x, y = cnn(), images(4, (3, 12, 12)), targets(4)
    theirs = captums(model, model[index], x, y)
    assert theirs.amax((1, 2, 3)).count_nonzero() >= 2
    for layer in (str(index), model[index]):
        torch.testing.assert_close(gradcam(model, x, y, layer=layer), theirs)


@pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor 0 did not")
def test_guided_gradcam_is_the_product_and_captums():
    model, x, y = cnn().eval(), images(), targets()
    ours = guided_gradcam(model, x, y)
    theirs = captum.attr.GuidedGradCam(model, model[4]).attribute(x.clone(), y, interpolate_mode="bilinear")
    torch.testing.assert_close(ours, theirs.detach())
    for layer in (None, "0"):
        product = guided_backprop(model, x, y) * gradcam(model, x, y, layer=layer)
        torch.testing.assert_close(guided_gradcam(model, x, y, layer=layer), product)


@pytest.mark.parametrize("layer", [None, "classifier.1"])
def test_on_squeezenet_it_is_the_class_activation_map(layer):
    """conv10 has one channel a class and the logit is its mean: every other weight is zero."""
    model = models.load("squeezenet_imagenet")
    x = normalize(whole(128)[0][:3])
    with torch.no_grad():
        activations = model.classifier[:2](model.features(x))
    y = activations.mean((2, 3)).argmax(1)
    height, width = activations.shape[2:]
    own = activations[range(3), y][:, None].relu() / (height * width)
    exact = F.interpolate(own, size=x.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(gradcam(model, x, y, layer=layer), exact)
    assert exact.amax((1, 2, 3)).min() > 0


def test_maps_are_rectified_and_at_image_size():
    maps = gradcam(models.squeezenet(), images(2, (3, 64, 80)), targets(2))
    assert maps.shape == (2, 1, 64, 80) and (maps >= 0).all()


class InPlace(nn.Module):
    """What is done in place after the layer, or to the tensor the layer passes on, must not reach its map."""

    def __init__(self, after):
        super().__init__()
        with local_seed(1):
            self.conv, self.same, self.fc = nn.Conv2d(3, 6, 3), nn.Dropout(), nn.Linear(600, CLASSES)
        self.after = after
        lively(self, 1)

    def forward(self, x):
        x = self.conv(x)
        before = x
        x = self.same(x)  # in eval mode the very tensor it was given
        return self.fc(self.after(x, before).flatten(1))


AFTER = {  # in place, and the same without
    "a ReLU": (lambda x, before: torch.relu_(x), lambda x, before: torch.relu(x)),
    "a sum": (lambda x, before: x.add_(1.0).tanh(), lambda x, before: (x + 1.0).tanh()),
    "a module": (lambda x, before: nn.ReLU(inplace=True)(x), lambda x, before: torch.relu(x)),
    "the layer's input is cleared": (lambda x, before: (x * 2, before.zero_())[0], lambda x, before: x * 2),
}


@pytest.mark.parametrize("layer", ["conv", "same"])
@pytest.mark.parametrize("name", AFTER)
def test_what_is_done_in_place_after_the_layer_does_not_reach_the_map(name, layer):
    in_place, plain = (InPlace(after) for after in AFTER[name])
    x, y = images(), targets()
    maps = gradcam(in_place, x, y, layer=layer)
    torch.testing.assert_close(maps, captums(plain, plain.conv, x, y))
    assert maps.any()


def test_a_layer_used_twice_is_seen_where_it_runs_last():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3 * 144, CLASSES)

        def first(self, x):
            return torch.relu(self.conv(x))

        def forward(self, x):
            return self.fc(self.conv(self.first(x)).flatten(1))

    model, x, y = lively(Twice()), images(), targets()
    rest = nn.Sequential(model.conv, nn.Flatten(), model.fc)
    torch.testing.assert_close(gradcam(model, x, y), captums(rest, model.conv, model.first(x).detach(), y))


# ---------------------------------------------------------------- which layer


def test_the_last_convolution_is_the_one_that_runs_last():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.top, self.unused, self.base = (
                nn.Linear(72, CLASSES),
                nn.Conv2d(4, 2, 3, padding=1),
                nn.Conv2d(1, 1, 1),
                nn.Conv2d(3, 4, 3, padding=1, stride=2),
            )

        def forward(self, x):
            return self.fc(self.top(self.base(x)).flatten(1))

    model, x, y = lively(Shuffled()), images(), targets()
    assert last_convolution(model, x) is model.top
    torch.testing.assert_close(gradcam(model, x, y), captums(model, model.top, x, y))


def test_the_last_convolution_of_squeezenet_is_conv10():
    model = models.squeezenet()
    assert last_convolution(model, images(1, (3, 64, 64))) is model.classifier[1]


def test_the_size_of_a_pass_does_not_matter(monkeypatch):
    model, x, y = cnn(), images(5), targets(5)
    whole = gradcam(model, x, y)
    monkeypatch.setattr(passes, "VALUES_A_PASS", 2 * x[0].numel())
    torch.testing.assert_close(gradcam(model, x, y), whole)


@pytest.mark.parametrize("method", [gradcam, guided_gradcam])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv9", "layer 'conv9' is not part of this model; its layers: 0, 1, 2"),
        (nn.Conv2d(3, 6, 3), "is not part of this model"),
        (3, "layer 3 is not part of this model"),
        ("9", r"output of layer '9' is not \(N, C, h, w\)"),
        ("7", r"output of layer '7' is not \(N, C, h, w\)"),
    ],
)
def test_a_layer_that_cannot_be_drawn_raises(method, layer, message):
    with pytest.raises(ValueError, match=message):
        method(cnn(), images(), targets(), layer=layer)


def test_a_layer_that_does_not_run_raises():
    model = cnn()
    model[9].spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="'9.spare' does not run"):
        gradcam(model, images(), targets(), layer="9.spare")


@pytest.mark.parametrize("method", [gradcam, guided_gradcam])
def test_a_model_without_a_convolution_raises(method):
    x = images(2, (1, 28, 28))
    with pytest.raises(ValueError, match="runs no nn.Conv2d; name the layer"):
        method(models.mlp(), x, targets(2))


def test_no_hook_stays_after_an_error():
    model = cnn()
    with pytest.raises(ValueError):
        gradcam(model, images(), targets(), layer="9")
    assert not any(module._forward_hooks for module in model.modules())
