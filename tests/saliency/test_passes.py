"""Passes as large as there is room for, and smaller where a device had less than was thought."""

from functools import partial

import pytest
import torch
from networks import cnn, images, targets
from saliency_sanity import saliency
from saliency_sanity.saliency import passes
from torch import nn


class Small(nn.Module):
    """A model on a device that has room for a few images; it notes the sizes of the passes that were tried."""

    def __init__(self, room):
        super().__init__()
        self.network, self.room, self.sizes = cnn().eval(), room, []

    def forward(self, x):
        self.sizes.append(len(x))
        if len(x) > self.room:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory.")
        return self.network(x)


METHODS = {
    "gradient": saliency.gradient,
    "integrated_gradients": partial(saliency.integrated_gradients, steps=7),
    "smoothgrad": partial(saliency.smoothgrad, samples=5),
    "occlusion": saliency.occlusion,
}


@pytest.mark.parametrize("room", [1, 2, 3])
@pytest.mark.parametrize("name", METHODS)
def test_a_device_that_has_less_room_gets_smaller_passes(name, room):
    x, y, method = images(9), targets(9), METHODS[name]
    model = Small(room)
    with passes.checked():  # which takes passes of its own
        torch.testing.assert_close(method(model, x, y), method(model.network, x, y))
    tried = [size for size in model.sizes if size > room]
    assert tried and all(later <= max(1, size // 2) for size, later in zip(tried, tried[1:]))


def test_where_one_image_is_too_much_the_error_is_heard():
    with pytest.raises(torch.cuda.OutOfMemoryError), passes.checked():
        saliency.gradient(Small(0), images(4), targets(4))


def test_the_smaller_size_is_remembered_as_long_as_the_room():
    x, y, model = images(9), targets(9), Small(4)
    with passes.at_most(None), passes.checked():
        saliency.gradient(model, x, y)
        tried = len(model.sizes)
        saliency.gradient(model, x, y)
    assert 9 in model.sizes[:tried] and max(model.sizes[tried:]) <= 4
    model.sizes.clear()
    with passes.checked():
        saliency.gradient(model, x, y)
    assert 9 in model.sizes


def test_what_runs_out_is_called_again_until_it_fits():
    asked = []

    def work():
        asked.append(passes.images_a_pass(images(1)))
        for part in passes.chunks(50, images(1)):
            if part.stop - part.start > 10:
                raise torch.cuda.OutOfMemoryError
        return "done"

    with passes.at_most(None):
        assert passes.with_room(work) == "done"
        assert passes.images_a_pass(images(1)) == 6
    assert asked[1:] == [25, 12, 6]


def test_outside_a_room_the_error_is_heard():
    def work():
        raise torch.cuda.OutOfMemoryError

    with pytest.raises(torch.cuda.OutOfMemoryError):
        passes.with_room(work)


def test_on_a_gpu_the_free_memory_decides(monkeypatch):
    """What is free, and what torch holds without use, on the safe side, and asked once."""
    asked = []

    def memory(device):
        asked.append(device)
        return 10 * 2**30, 80 * 2**30

    monkeypatch.setattr(torch.cuda, "mem_get_info", memory)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 3 * 2**30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 2**30)
    room, image = passes._Room(None), torch.zeros(3, 224, 224)
    expected = 12 * 2**30 * 0.8 / (passes.IMAGES_KEPT * image.numel() * 4)
    assert room.on_device(image) == int(expected) == room.on_device(image) and len(asked) == 1
    assert room.on_device(torch.zeros(3, 9000, 9000)) == 1
