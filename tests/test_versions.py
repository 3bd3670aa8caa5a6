"""One working copy holds what whole copies of the model hold, whoever keeps its tensors, and forgets every pass."""

from copy import deepcopy
from functools import partial

import pytest
import torch
from networks import CLASSES, cnn, images, lively
from saliency_sanity import randomization
from saliency_sanity.device import local_seed
from saliency_sanity.inference import evaluating
from saliency_sanity.saliency.passes import explaining
from saliency_sanity.versions import Versions
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations


class Recurrent(nn.Module):
    """A layer keeps a list of its weights beside them."""

    def __init__(self):
        super().__init__()
        self.conv, self.rnn = nn.Conv2d(3, 4, 3), nn.GRU(40, 6, batch_first=True)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(self.conv(x).transpose(1, 2).flatten(2))[0].mean(1))


class Held(nn.Module):
    """A parameter is the argument of a function, a member of a tuple, and of a layer that is not registered."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)
        self.last = partial(F.linear, weight=self.head.weight, bias=self.head.bias)
        self.pair, self.borrowed = (self.conv.weight, self.conv.bias), [self.conv]

    def forward(self, x):
        x = F.conv2d(x, *self.pair).relu() + self.borrowed[0](x)
        return self.last(x.mean((2, 3)))


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = (nn.Conv2d(4, 4, 3, padding=1) for _ in range(2))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.second(self.first(x))


def tied():
    """Two layers of a stage share their weight."""
    pair = Pair()
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), pair, nn.ReLU(), nn.Flatten(), nn.Linear(400, CLASSES))


class Remembers(nn.Module):
    """A cache of the weights, a count, a list, a dictionary and two buffers that passes write, or replace."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("last", torch.zeros(()))
        self.cache, self.count, self.sizes, self.by_size = None, 0, [], {}

    def forward(self, x):
        if self.cache is None:
            self.cache = self.conv.weight.detach() * 1
        if len(x) > 1 and len(x) not in self.by_size:  # a cache that one image does not fill
            self.by_size[len(x)] = self.head.weight.detach() * 1
        self.seen += 1
        self.last = self.last + 1
        self.count += 1
        self.sizes.append(len(x))
        x = F.conv2d(x, self.cache, self.conv.bias).relu().mean((2, 3))
        return self.head(x) + F.linear(x, self.by_size.get(len(x), self.head.weight))


def parallel():
    return nn.DataParallel(cnn())


def reparametrised():
    conv = parametrizations.weight_norm(nn.Conv2d(3, 6, 3))
    return nn.Sequential(conv, nn.ReLU(), nn.Conv2d(6, 4, 3), nn.Flatten(), nn.Linear(256, CLASSES))


NETWORKS = [cnn, Recurrent, Held, tied, Remembers, parallel, reparametrised]
OPTIONS = {"init": "truncated_normal", "std": 0.2}


def built(network):
    with local_seed(2):
        return lively(network(), 2)


def outputs(model, x):
    with evaluating(model), torch.no_grad():
        return model(x.clone())


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
@pytest.mark.parametrize("network", NETWORKS, ids=lambda network: network.__name__)
def test_it_holds_what_the_copies_hold(network, scheme):
    """In any order, again and again, and for another seed."""
    model, x = built(network), images(2)
    before = deepcopy(model.state_dict())
    versions = Versions(randomization.Redraws(model, scheme=scheme, seed=0, example=x[:1], **OPTIONS))
    for seed in (3, 4, 3):
        versions.begin(seed)
        copies = [
            model,
            *(copy for _, copy in randomization.SCHEMES[scheme](model, seed=seed, example=x[:1], **OPTIONS)),
        ]
        copies[0] = deepcopy(model)
        expected = [outputs(deepcopy(copy), x) for copy in copies]
        assert len(versions) == len(copies) and not torch.equal(expected[0], expected[-1])
        for number in (*range(len(copies)), 0, len(copies) - 1, 1, 1):
            now = versions.at(number)
            own = dict(now.named_parameters()) | {n: b for n, b in now.named_buffers() if n not in ("seen", "last")}
            for name, value in copies[number].state_dict().items():
                assert torch.equal(value, own.get(name, value)), name
            assert torch.equal(outputs(now, x), expected[number])
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_version_is_as_if_nothing_had_run():
    model, x = built(Remembers), images(3)
    versions = Versions(randomization.Redraws(model, scheme="cascading", seed=0, example=x[:1], **OPTIONS))
    versions.begin(0)
    for number in (0, 1, 2, 1):
        now = versions.at(number)
        count, sizes = now.count, list(now.sizes)
        now(x).sum().backward()
        now.extra, now.head.weight.kept = x, x
        now.register_forward_hook(lambda *_: None)
        again = versions.at(number)
        assert again is now and (again.count, again.sizes, again.by_size) == (count, sizes, {}) and again.cache is None
        assert again.head.weight.grad is None and not hasattr(again, "extra") and not again._forward_hooks
    assert versions.at(1).last == versions.at(0).last


def test_modes_are_left_to_who_explains():
    versions = Versions(randomization.Redraws(cnn(), scheme="cascading", seed=0, example=images(1)))
    versions.begin(0)
    with explaining(versions.working.model):
        now = versions.at(1)
        assert not any(module.training for module in now.modules())
        assert not any(parameter.requires_grad for parameter in now.parameters())
    assert now.training and all(parameter.requires_grad for parameter in now.parameters())


@pytest.mark.parametrize("options", [{}, {"init": "permute"}, {"batch_norm": "recalibrate", "calibration": images(4)}])
def test_weights_of_a_gpu_are_drawn_from_a_twin_on_the_cpu(options, monkeypatch):
    """The same weights, each when it is asked for. Here the twin is made where no GPU is."""
    model, x = cnn(), images(2)
    copies = [deepcopy(c.state_dict()) for _, c in randomization.cascading(model, seed=5, example=x[:1], **options)]
    monkeypatch.setattr(randomization, "_twin_on_cpu", deepcopy)
    versions = Versions(randomization.Redraws(model, scheme="cascading", seed=0, example=x[:1], **options))
    versions.begin(5)
    for number, expected in enumerate(copies, 1):
        assert len(versions.drawn) == number
        now = versions.at(number)
        assert all(torch.equal(value, expected[name]) for name, value in now.state_dict().items())
        now(x).sum().backward()
    versions.draw(99)
    assert len(versions.drawn) == len(versions)


def test_the_working_copy_is_made_once(monkeypatch):
    """Not for a stage, and not for a seed."""
    versions = Versions(randomization.Redraws(cnn(), scheme="cascading", seed=0, example=images(1)))
    made = []
    monkeypatch.setattr(nn.Sequential, "__deepcopy__", lambda self, memo: made.append(1), raising=False)
    for seed in range(3):
        versions.begin(seed)
        assert {id(versions.at(number)) for number in range(1, len(versions))} == {id(versions.working.model)}
    assert not made
