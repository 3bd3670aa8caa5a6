"""The tape: what lies below a change runs once, and the maps are those of a plain pass."""

import pytest
import torch
import torchvision
from saliency_sanity import randomization, saliency
from saliency_sanity.book import models
from saliency_sanity.device import local_seed
from saliency_sanity.replay import Tape
from torch import nn
from torch.nn import functional as F


class Writing(nn.Module):
    """Overwrites the output of its first piece after its second has read it."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 3)

    def forward(self, x):
        below = self.first(x.flatten(1))
        above = self.second(below)
        below.mul_(2)
        return self.third(above + below)


class InPlace(nn.Module):
    """A block with weights that writes into its input."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(x.mul_(3)) + x

    def __init__(self):
        super().__init__()
        self.first, self.block, self.last = nn.Linear(4, 4), self.Block(), nn.Linear(4, 3)

    def forward(self, x):
        return self.last(F.relu(self.block(self.first(x.flatten(1)))))


class Nested(nn.Module):
    """Its second piece calls the first once more."""

    class Second(nn.Module):
        def __init__(self, first):
            super().__init__()
            self.borrowed = [first]
            self.layer = nn.Linear(4, 4)

        def forward(self, x):
            return self.layer(self.borrowed[0](x))

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second, self.third = self.Second(self.first), nn.Linear(4, 3)

    def forward(self, x):
        return self.third(F.relu(self.second(self.first(x.flatten(1)))))


def redraws(model, scheme="cascading"):
    return randomization.Redraws(model, scheme=scheme, seed=0, example=torch.rand(1, 1, 2, 2))


def taped_and_plain(draws, images, targets, method):
    tape = Tape(draws.private, images)
    steps = [randomization.Step("trained", draws.private, frozenset()), *draws.shared_copies()]
    for step in steps:
        with tape.playing(step.model, step.changed):
            taped = method(step.model, images, targets)
        yield step.name, taped, method(step.model, images, targets)


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
@pytest.mark.parametrize("method", saliency.ONE_PASS)
@pytest.mark.parametrize("batch_norm", [False, True])
def test_maps_are_those_of_a_plain_pass(method, scheme, batch_norm, device):
    model = models.cnn(batch_norm=batch_norm).eval().to(device)
    images = torch.rand(3, 1, 28, 28, generator=torch.Generator().manual_seed(0)).to(device)
    targets = torch.arange(3, device=device)
    draws = randomization.Redraws(model, scheme=scheme, seed=0, example=images[:1])
    for _, taped, plain in taped_and_plain(draws, images, targets, method):
        torch.testing.assert_close(taped, plain, atol=1e-6, rtol=1e-5)


def test_what_lies_below_a_change_runs_once():
    model = models.cnn().eval()
    images = torch.rand(2, 1, 28, 28)
    draws = randomization.Redraws(model, scheme="cascading", seed=0)
    tape, ran = Tape(draws.private, images, falling=True), []
    steps = [randomization.Step("trained", draws.private, frozenset()), *draws.shared_copies()]
    for step in steps:
        for name in ("conv1", "conv2", "fc1", "logits"):
            layer, own = getattr(step.model, name), getattr(step.model, name).forward
            layer.forward = lambda x, own=own, at=(step.name, name): (ran.append(at), own(x))[1]
        with tape.playing(step.model, step.changed):
            saliency.gradient(step.model, images, torch.tensor([0, 1]))
    runs = {step.name: [layer for at, layer in ran if at == step.name] for step in steps}
    assert runs["trained"] == ["conv1", "conv2", "fc1", "logits"]
    assert runs["logits"] == ["logits"] and runs["fc1"] == ["fc1", "logits"]
    assert runs["conv1"] == runs["trained"]


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_networks_that_write_in_place_are_replayed(name, scheme):
    with local_seed(0):
        model = torchvision.models.get_model(name, weights=None).eval()
    images, targets = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 5])
    draws = randomization.Redraws(model, scheme=scheme, seed=0)
    for _, taped, plain in taped_and_plain(draws, images, targets, saliency.guided_backprop):
        torch.testing.assert_close(taped, plain)
    tape, step = Tape(draws.private, images), next(draws.shared_copies())
    for copy, changed in ((draws.private, ()), (step.model, step.changed)):
        with tape.playing(copy, changed):
            saliency.gradient(copy, images, targets)
    assert tape.safe and tape.cut > 5


@pytest.mark.parametrize("network", [Writing, Nested, InPlace])
def test_passes_that_cannot_be_replayed_run_from_the_start(network):
    torch.manual_seed(0)
    images, targets = torch.rand(2, 1, 2, 2), torch.tensor([0, 2])
    for _, taped, plain in taped_and_plain(redraws(network()), images, targets, saliency.gradient):
        torch.testing.assert_close(taped, plain)


def test_other_images_are_not_taken_for_the_recorded_ones():
    model, images, targets = models.cnn().eval(), torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    tape = Tape(model, images)
    turned = images.transpose(2, 3)
    with tape.playing(model, ()):
        assert tape.holds(images) and not tape.holds(turned) and not tape.holds(images[:1])
        maps = saliency.gradient(model, turned, targets)
    torch.testing.assert_close(maps, saliency.gradient(model, turned, targets))


def test_the_model_is_as_before_after_an_exception():
    model, images = models.cnn().eval(), torch.rand(2, 1, 28, 28)
    forwards = [module.forward for module in model]
    with pytest.raises(KeyboardInterrupt), Tape(model, images).playing(model, ()):
        raise KeyboardInterrupt
    assert [module.forward for module in model] == forwards
    assert not any("forward" in module.__dict__ for module in model) and not hasattr(model, "_tape")
