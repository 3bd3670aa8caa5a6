"""A model held still, what is put back, and logits for any number of images."""

import random
from collections import defaultdict, deque

import numpy as np
import pytest
import torch
from networks import CLASSES, cnn, images
from saliency_sanity.inference import (
    buffers_kept,
    evaluating,
    explaining,
    predict,
    random_state_kept,
    random_states,
    untouched,
)
from torch import nn


class Keeps(nn.Module):
    """Keeps things wherever a module can."""

    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))
        self.register_buffer("again", self.count)
        self.register_buffer("nothing", None)
        self.weight = nn.Parameter(torch.ones(()))
        self.times, self.seen, self.cache = 0, [1], {"a": 1}
        self.last, self.some, self.by_name = deque([1], maxlen=2), {1}, defaultdict(list)

    def forward(self, x):
        self.count += 1
        self.again = self.again + 1
        self.times += 1
        self.seen.append(x)
        self.cache["b"] = x
        self.cache.pop("a", None)
        self.last.append(x)
        self.some.add(2)
        self.by_name["b"].append(x)
        self.new = x
        self.register_buffer("late", x)
        self.part = nn.Linear(1, 1)
        return x.flatten(1) * self.weight


def kept(model):
    return {
        "buffers": {name: (id(buffer), buffer._version, buffer.tolist()) for name, buffer in model.named_buffers()},
        "attributes": sorted(vars(model)),
        "values": (model.times, model.seen, model.cache, list(model.last), model.some, dict(model.by_name)),
        "parts": [name for name, _ in model.named_modules()],
    }


@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_that_a_module_keeps_is_touched(error):
    model = Keeps()
    before, states = repr(kept(model)), random_states()
    held, weight = model.seen, model.weight
    try:
        with untouched(model):
            model(images(1)), model.eval(), torch.rand(1), np.random.random(), random.random()
            if error is not None:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        assert error is not None
    assert repr(kept(model)) == before and random_states() == states
    assert model.seen is held and model.weight is weight and model.count is not None
    assert model.last.maxlen == 2 and model.by_name["c"] == []


def test_inside_a_shared_buffer_is_still_shared():
    model = Keeps()
    with buffers_kept(model):
        assert model.count is model.again
        model.count += 1
        assert model.again == 1
    assert model.count is model.again and model.again == 0


@pytest.mark.parametrize("draw", [lambda: torch.rand(1), np.random.random, random.random])
def test_random_states_are_put_back_and_tell_who_drew(draw):
    before = random_states()
    first = draw()
    with random_state_kept():
        between = random_states()
        draw()
        assert between != random_states()
    assert before != between == random_states() and first != draw()


def test_explaining_freezes_and_puts_back():
    model = cnn().train()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    wanted, modes = [p.requires_grad for p in model.parameters()], [m.training for m in model.modules()]
    with torch.inference_mode(), pytest.raises(RuntimeError), explaining(model):
        assert torch.is_grad_enabled() and not torch.is_inference_mode_enabled()
        assert not any(p.requires_grad for p in model.parameters()) and not any(m.training for m in model.modules())
        raise RuntimeError
    assert [p.requires_grad for p in model.parameters()] == wanted
    assert [m.training for m in model.modules()] == modes


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("batch_size", [1, 2, 256])
def test_predictions_are_the_models_in_eval_mode(context, batch_size, device):
    model, x = cnn().to(device).train(), images(5).to(device)
    with context():
        found = predict(model, x, batch_size=batch_size)
    assert all(module.training for module in model.modules()) and not found.requires_grad
    with evaluating(model), torch.no_grad():
        torch.testing.assert_close(found, model(x))


def test_predicting_leaves_images_and_buffers_alone():
    model = nn.Sequential(nn.ReLU(inplace=True), Keeps())
    x = images()
    predict(model, x, batch_size=1)
    assert torch.equal(x, images()) and model[1].count == model[1].again == 0 and "late" not in model[1]._buffers


def test_any_input_is_predicted_that_the_model_takes():
    """Features and token numbers have no four axes."""
    assert predict(nn.Linear(4, 2), torch.ones(3, 4)).shape == (3, 2)
    tokens = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(10, 2))
    assert predict(tokens, torch.ones(3, 5, dtype=torch.int64), batch_size=2).shape == (3, 2)


def test_an_error_of_the_model_is_the_cause():
    class Breaks(nn.Module):
        def forward(self, x):
            raise ZeroDivisionError("nought")

    with pytest.raises(ValueError, match=r"cannot run on images of shape \(3, 3, 12, 12\).*nought") as refused:
        predict(Breaks(), images())
    assert isinstance(refused.value.__cause__, ZeroDivisionError)


def test_a_lack_of_memory_stays_one():
    """Who sees it takes fewer images at a time."""

    class Full(nn.Module):
        def forward(self, x):
            raise torch.cuda.OutOfMemoryError("full")

    with pytest.raises(torch.cuda.OutOfMemoryError):
        predict(Full(), images())


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda z: (z,), r"logits of shape \(2, classes\), got tuple of 1"),
        (lambda z: {"logits": z}, "got dict with 'logits'"),
        (lambda z: z[:, 0], r"got \(2,\), one number an image"),
        (lambda z: z[:1], r"got \(1, 5\)"),
    ],
)
def test_the_last_batch_is_looked_at_too(call, says):
    class Changes(nn.Module):
        def forward(self, x):
            z = x.flatten(1)[:, :5]
            return call(z) if len(x) == 2 else z

    with pytest.raises(ValueError, match=says):
        predict(Changes(), images(5), batch_size=3)


class Mapped(nn.Module):
    """Writes in place inside `torch.vmap`, where tensors do not say where they lie."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(3, CLASSES)

    def forward(self, x):
        return self.head(torch.vmap(lambda one: one.mean((1, 2)).mul_(2))(x))


def test_what_is_written_inside_vmap_is_no_parameter():
    model, x = Mapped(), images()
    torch.testing.assert_close(predict(model, x), model.head(2 * x.mean((2, 3))).detach())
