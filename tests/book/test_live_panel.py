"""The panel, driven as a reader would: choices are made, buttons are pressed, and the widgets tell what came of it."""

import io
import re
import threading
from copy import deepcopy
from datetime import UTC, datetime

import ipywidgets
import matplotlib.figure
import numpy as np
import pytest
import torch
from PIL import Image
from saliency_sanity import randomization, saliency, similarity
from saliency_sanity.book import live_panel, models

SIDE = 28
PATIENCE = 300  # seconds, for what takes a moment


def grey(pictures):
    """The network of these tests reads one channel."""
    return pictures.mean(1, keepdim=True)


begun, over = threading.Event(), threading.Event()


def endless(model, images, targets):
    """A method that passes again and again, until it is stopped from outside or its test is over."""
    begun.set()
    while not over.is_set():
        model(images)
    return torch.zeros_like(images)


def refusing(model, images, targets):
    raise ValueError("no <layer> of this kind")


METHODS = saliency.METHODS | {"endless": endless, "refusing": refusing}


@pytest.fixture
def model():
    return models.load("cnn_clothes")


@pytest.fixture
def panel(model, monkeypatch):
    monkeypatch.delenv("SANITY_STATIC", raising=False)
    pictures = {"one": torch.rand(3, SIDE, SIDE), "two": torch.rand(3, SIDE, SIDE)}
    return live_panel.panel(model, pictures, prepare=grey, classes=[f"class {k}" for k in range(10)], methods=METHODS)


def press(panel):
    panel.run.click()
    panel.worker.join(PATIENCE)
    assert not panel.worker.is_alive()


def file(image: Image.Image, kind="PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def upload(panel, content: bytes, name="mine.png"):
    """What the browser sends: in ipywidgets 8 a tuple of files, in 7 (Colab) a dictionary by name."""
    if int(ipywidgets.__version__.split(".")[0]) < 8:
        panel.upload.value = {name: {"metadata": {}, "content": content}}
    else:
        about = {"name": name, "type": "image/png", "size": len(content), "last_modified": datetime.now(UTC)}
        panel.upload.value = [{**about, "content": content}]


def test_panel_computes_what_the_package_computes(model, panel):
    panel.method.value, panel.stage.value, panel.image.value = "guided_backprop", "fc1", "two"
    before = deepcopy(model.state_dict())
    press(panel)
    assert bytes(panel.result.value).startswith(b"\x89PNG") and panel.result.layout.display is None
    assert panel.progress.value == panel.progress.max == 3  # trained, logits, fc1
    assert "guided_backprop of the class “class" in panel.message.value
    assert not panel.run.disabled and panel.cancel.disabled
    assert all(torch.equal(weights, before[name]) for name, weights in model.state_dict().items())
    assert not model._forward_pre_hooks


def test_cascade_is_the_one_of_the_package(model):
    image = torch.rand(1, 1, SIDE, SIDE)
    target = live_panel.predicted(model, image)
    names = []
    maps = live_panel.cascade(model, image, target, method=saliency.gradient, last="conv1", seed=3, step=names.append)
    networks = {"trained": model, **dict(randomization.cascading(model, seed=3))}
    assert names == list(maps) == list(networks)
    for name, network in networks.items():
        expected = saliency.heatmap(saliency.gradient(network, image, target), signed=True)[0]
        torch.testing.assert_close(maps[name], expected)


def test_figure_names_the_similarity(model):
    maps = {"trained": torch.randn(SIDE, SIDE), "fc1": torch.randn(SIDE, SIDE)}
    drawn = live_panel.figure(torch.rand(3, SIDE, SIDE), maps, signed=True)
    alike = similarity.spearman(maps["trained"][None], maps["fc1"][None]).item()
    assert f"fc1\nalike {alike:.2f}" in [axis.get_title() for axis in drawn.axes]


@pytest.mark.parametrize("method", saliency.METHODS)
def test_every_method_ends_with_a_map_or_a_reason(panel, method):
    panel.method.value, panel.stage.value = method, "logits"
    press(panel)
    assert panel.progress.value == 2, panel.message.value


def test_cancel_stops_within_a_map(panel):
    panel.method.value = "endless"
    panel.run.click()
    assert panel.run.disabled and not panel.cancel.disabled
    assert begun.wait(PATIENCE)
    panel.cancel.click()
    panel.worker.join(PATIENCE)
    stopped = not panel.worker.is_alive()
    over.set()
    assert stopped
    assert "Cancelled." in panel.message.value and panel.result.value == b""
    assert not panel.run.disabled and panel.cancel.disabled
    panel.method.value = "gradient"
    press(panel)
    assert panel.result.value


def test_cancel_is_an_error_of_its_own(model):
    stopped = threading.Event()
    stopped.set()
    image = torch.rand(1, 1, SIDE, SIDE)
    with pytest.raises(live_panel.Cancelled):
        live_panel.cascade(
            model, image, torch.tensor([0]), method=saliency.gradient, last="fc1", seed=0, stopped=stopped
        )


def test_a_method_that_refuses_says_why(panel):
    panel.method.value = "refusing"
    press(panel)
    assert "refusing gives no map here: no &lt;layer> of this kind" in panel.message.value
    assert not panel.run.disabled


def test_own_image_becomes_a_choice(panel):
    upload(panel, file(Image.new("RGB", (300, 200), "red")), "cat & dog.png")
    assert panel.image.value == "cat & dog.png"
    red = torch.tensor([1.0, 0, 0])[:, None, None].expand(3, SIDE, SIDE)
    torch.testing.assert_close(panel.pictures["cat & dog.png"], red)
    press(panel)
    assert panel.result.value


@pytest.mark.parametrize(
    ("content", "message"),
    [
        pytest.param(b"a letter, not an image", "not an image", id="text"),
        pytest.param(b"", "not an image", id="empty"),
        pytest.param(file(Image.effect_noise((200, 200), 50))[:2000], "damaged", id="cut off"),
        pytest.param(file(Image.new("L", (8, 200))), "8 × 200 pixels; 32", id="tiny"),
        pytest.param(file(Image.new("1", (10_000, 5_000))), "10000 × 5000 pixels; 40 million", id="huge"),
        pytest.param(file(Image.new("1", (20_000, 10_000))), "not an image|pixels", id="a bomb"),
    ],
)  # fmt: skip
def test_bad_images_are_refused_in_the_panel(panel, content, message):
    with pytest.raises(ValueError, match=message):
        live_panel.read_image(content, SIDE)
    before = panel.image.options
    upload(panel, content)
    assert panel.image.options == before and re.search(message, panel.message.value)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16"])
def test_images_of_every_kind_are_read(mode):
    picture = Image.new("L", (64, 48), 255).convert(mode) if mode != "I;16" else Image.new("I;16", (64, 48), 2**16 - 1)
    read = live_panel.read_image(file(picture, "TIFF"), SIDE)
    assert read.shape == (3, SIDE, SIDE) and read.dtype == torch.float32
    torch.testing.assert_close(read, torch.ones_like(read))


def test_transparent_is_white_and_photos_stand_upright():
    clear = live_panel.read_image(file(Image.new("RGBA", (40, 40), (0, 0, 0, 0))), SIDE)
    torch.testing.assert_close(clear, torch.ones_like(clear))
    pixels = np.zeros((64, 64, 3), np.uint8)
    pixels[:32] = 255  # the upper half is white; turned by a quarter, a side is
    turned = Image.fromarray(pixels)
    exif = turned.getexif()
    exif[274] = 6  # stored a quarter turn to the left of upright
    read = live_panel.read_image(file(turned, exif=exif), SIDE)
    assert read[:, :, -4:].mean() > 0.9 and read[:, :, :4].mean() < 0.1


def test_static_panel_is_a_figure(model, monkeypatch):
    monkeypatch.setenv("SANITY_STATIC", "1")
    monkeypatch.setattr(live_panel, "Panel", None)  # no widget is made
    pictures = {"one": torch.rand(3, SIDE, SIDE)}
    drawn = live_panel.panel(model, pictures, prepare=grey, classes=["a"] * 10)
    assert isinstance(drawn, matplotlib.figure.Figure)
    assert [axis.get_title().split("\n")[0] for axis in drawn.axes] == ["image", "trained", "logits", "fc1"]
