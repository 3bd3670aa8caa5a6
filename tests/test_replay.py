"""The tape: what lies below a change runs once, and the maps are those of a plain pass, whatever the network."""

from functools import partial, wraps

import pytest
import torch
import torchvision
from networks import lively
from saliency_sanity import randomization, saliency
from saliency_sanity.book import models
from saliency_sanity.device import generator, local_seed
from saliency_sanity.replay import Tape
from saliency_sanity.saliency.passes import OnePass, checked, explaining, one_pass_of
from saliency_sanity.versions import Versions
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

ONE_PASS = [method for method in saliency.METHODS.values() if one_pass_of(method)]
every_method = pytest.mark.parametrize("method", ONE_PASS, ids=lambda method: method.__name__)
SCHEMES = {
    "cascading": {"scheme": "cascading"},
    "bottom up": {"scheme": "cascading", "order": "bottom_up"},
    "independent": {"scheme": "independent"},
}
every_scheme = pytest.mark.parametrize("scheme", SCHEMES)


def versions_of(model, images, **options):
    """The trained model and its randomised versions, which take turns in one working copy."""
    versions = Versions(randomization.Redraws(model, seed=0, example=images[:1], **options))
    versions.begin(0)
    return versions


def taped(tape, versions, number, targets):
    model = versions.at(number)
    with explaining(model):
        return tape.maps(model, versions.changed(number), targets)


def outcome(call):
    """Maps, or the kind of error that a method raises for this network."""
    try:
        return call()
    except Exception as error:
        return type(error).__name__


def replayed(model, images, methods, *, scheme="cascading", **options):
    """The tapes, one a method, after all copies got the maps of a plain pass from them."""
    targets = torch.arange(len(images)) % 3
    versions, tapes = versions_of(model, images, **SCHEMES[scheme], **options), []
    for method in methods:
        versions.at(0)
        tapes.append(Tape(versions.own.model, images, one_pass_of(method), falling=scheme == "cascading"))
        for number, name in enumerate(versions.names):
            with checked():  # some networks are made to be refused
                plain = outcome(lambda: method(versions.at(number), images, targets))  # noqa: B023
            found = outcome(lambda: taped(tapes[-1], versions, number, targets))  # noqa: B023
            if isinstance(plain, str):
                assert found == plain
            else:
                torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-6)
                assert plain.any() or name
    return tapes


# ---------------------------------------------------------------- random graphs


class Graph(nn.Module):
    """A random graph of convolutions, norms, sums and ReLUs with skips, each in every way in which one writes it."""

    def __init__(self, seed, relu, norm):
        super().__init__()
        draw = generator(seed)
        self.stem, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4, 3)
        self.blocks = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(3))
        self.norms = nn.ModuleList(nn.BatchNorm2d(4) if norm else nn.Identity() for _ in range(3))
        self.relus = nn.ModuleList(nn.ReLU(inplace=relu == "in place") for _ in range(3))
        self.shared = nn.ReLU(inplace=relu == "in place")
        self.relu = relu
        kinds = ("block", "block", "again", "relu", "relu", "shared", "add", "add in place", "scale", "split")
        self.plan = [
            (kinds[i], *torch.randint(8, (2,), generator=draw).tolist())
            for i in torch.randint(len(kinds), (9,), generator=draw).tolist()
        ]

    def rectify(self, values, module):
        if self.relu == "module":
            return module(values)
        return module(values.clone()) if self.relu == "in place" else F.relu(values)

    def forward(self, x):
        made = [self.rectify(self.stem(x), self.shared)]
        for number, (kind, first, second) in enumerate(self.plan):
            a, b = made[-1 - first % min(3, len(made))], made[second % len(made)]
            block = number % 3
            if kind == "block":
                made.append(self.norms[block](self.blocks[block](a)))
            elif kind == "again":
                made.append(self.blocks[0](self.blocks[0](a)))
            elif kind == "relu":
                made.append(self.rectify(a, self.relus[block]))
            elif kind == "shared":
                made.append(self.rectify(a + b, self.shared))
            elif kind == "add":
                made.append(a + b)
            elif kind == "add in place":
                total = self.blocks[block](a)
                total += b
                made.append(F.relu_(total) if self.relu == "in place" else total)
            elif kind == "scale":
                made.append(a * self.head.weight.mean())
            else:
                halves = list(a.chunk(2, 1))
                made.append(torch.cat([halves.pop(), halves.pop()], 1))
        return self.head(self.rectify(made[-1] + made[0], self.shared).mean((2, 3)))


@every_scheme
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("relu", ["functional", "module", "in place"])
def test_random_graphs_are_replayed_as_they_run(relu, norm, scheme):
    images = torch.randn(2, 3, 6, 6, generator=generator(1), dtype=torch.float64)
    for seed in range(3):
        with local_seed(seed):
            model = lively(Graph(seed, relu, norm), seed).double().eval()
        assert all(tape.safe for tape in replayed(model, images, ONE_PASS, scheme=scheme))


# ---------------------------------------------------------------- networks that are easy to get wrong


class Base(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.third = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3, padding=1)
        self.mix, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

    def mixed(self, x):
        """A linear step that does not keep its input for the backward pass."""
        return self.mix(x.transpose(1, 3)).transpose(1, 3)

    def top(self, x):
        return self.head(x.mean((2, 3)))


class Skip(Base):
    """A functional ReLU before a skip connection."""

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.top(F.relu(self.third(x) + x))


class WritesLate(Base):
    """Overwrites the output of its first layer after its second has read it."""

    def forward(self, x):
        below = self.first(x)
        above = self.mixed(below)
        below.mul_(2)
        return self.top(self.third(F.relu(above + below)))


class WritesLater(Base):
    """Overwrites an early output behind the last layer, through a view of it."""

    def forward(self, x):
        below = F.relu(self.first(x)) + 1
        above = self.mixed(below)
        below.flatten(2).add_(self.head.weight.mean())
        return self.top(self.third(F.relu(above) + below))


class WritesData(Base):
    """Overwrites an early output where no version counts it."""

    def forward(self, x):
        below = F.relu(self.first(x))
        above = self.third(below)
        low = below.detach().clone()
        low.data.mul_(self.third.weight.mean())
        return self.top(F.relu(above) * low)


class WritesIntoItsInput(Base):
    def forward(self, x):
        x.mul_(2)
        x[:, 0] = x[:, 1]
        return self.top(F.relu(self.second(F.relu(self.first(x)))))


class Counts(Base):
    """Writes into its own buffer, and reads it."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.ones(()))

    def forward(self, x):
        x = F.relu(self.first(x))
        self.scale.copy_(x.detach().mean())
        return self.top(F.relu(self.third(x)) * self.scale)


class Branches(Base):
    """What runs depends on the weights, by a number that is no tensor."""

    def forward(self, x):
        large = float(self.third.weight.abs().mean()) > 0.15
        x = F.relu(self.first(x))
        return self.top(F.relu(self.second(x)) if large else F.relu(self.second(x) + 1))


class ScalesByANumber(Base):
    """A late layer's weight is an early number."""

    def forward(self, x):
        x = F.relu(self.first(x * self.head.weight.abs().sum().item()))
        return self.top(F.relu(self.third(x)))


class Nested(Base):
    """A layer is borrowed by another piece."""

    def __init__(self):
        super().__init__()
        self.borrowed = [self.third]

    def forward(self, x):
        x = F.relu(self.third(F.relu(self.first(x))))
        return self.top(F.relu(self.borrowed[0](self.second(x))))


@torch.jit.script
def scripted(values, weight):
    return F.conv2d(values, weight, padding=1).sigmoid()


class Scripted(Base):
    """A part that runs where no torch function is seen, with a weight that only it uses."""

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.top(F.relu(scripted(x, self.third.weight) + x))


class ScriptedEarly(Base):
    """The scripted part uses early, and without a gradient, what a seen call uses late."""

    def forward(self, x):
        x = self.first(x)
        return self.top(F.relu(self.third(F.relu(scripted(x.detach(), self.third.weight) + x))))


class Twice(torch.autograd.Function):
    """A backward step that is not linear."""

    @staticmethod
    def forward(ctx, values):
        return values * 2

    @staticmethod
    def backward(ctx, above):
        return above.clamp(min=0)


class OwnFunction(Base):
    def forward(self, x):
        x = Twice.apply(self.first(x))
        return self.top(self.third(x) + x)


class OwnFunctionInPlace(Base):
    """The function's result is an object that a seen call returned."""

    class Kept(torch.autograd.Function):
        @staticmethod
        def forward(ctx, values):
            ctx.mark_dirty(values)
            return values.mul_(2)

        @staticmethod
        def backward(ctx, above):
            return above.clamp(min=0)

    def forward(self, x):
        x = self.Kept.apply(self.first(x))
        return self.top(self.third(x) + x)


class BackwardHook(Base):
    """A hook that changes what comes back, in every copy by its own weights."""

    def __init__(self):
        super().__init__()
        self.third.register_full_backward_hook(self.clamped)

    @staticmethod
    def clamped(module, below, above):
        return (below[0].clamp(min=0) * module.weight.sum(),)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.top(F.relu(self.third(x) + x))


class TensorHook(Base):
    """A hook on an early output that uses a late weight."""

    def forward(self, x):
        x = F.relu(self.first(x))
        if x.requires_grad:
            x.register_hook(lambda above: above.clamp(min=0) * self.head.weight.abs().sum())
        return self.top(F.relu(self.third(x) + x))


class Checkpointed(Base):
    """Runs part of itself again in the backward pass."""

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.top(checkpoint(lambda x: F.relu(self.third(F.relu(self.second(x)))), x, use_reentrant=False))


class Mapped(Base):
    def forward(self, x):
        x = F.relu(self.first(x))
        return self.top(torch.vmap(lambda one: F.relu(self.third(one[None])[0] + one))(x))


class WithoutGradient(Base):
    """A gate that is not differentiated."""

    def forward(self, x):
        x = F.relu(self.first(x))
        with torch.no_grad():
            gate = self.third(x).sigmoid()
        return self.top(F.relu(x * gate))


class ThroughNumpy(Base):
    """A late weight acts early, by a way that torch does not see."""

    def forward(self, x):
        scale = torch.from_numpy(self.head.weight.detach().numpy().mean(1))[:, None, None]
        return self.top(F.relu(self.third(F.relu(self.first(x * scale)))))


class DrawsNoise(Base):
    """Seeded noise: what it draws late depends on what it drew early."""

    def forward(self, x):
        with local_seed(0):
            x = F.relu(self.first(x * torch.rand_like(x)))
            return self.top(F.relu(self.third(x) * torch.rand_like(x)))


class Constant(Base):
    """Multiplies by a tensor that is neither parameter nor buffer, with a plain one by its side."""

    def __init__(self):
        super().__init__()
        self.mask, self._tape = torch.rand(3, 1, 1, generator=generator(0), dtype=torch.float64), "mine"

    def forward(self, x):
        x = F.relu(self.first(x * self.mask))
        return self.top(F.relu(self.third(x) + x))


class Statistics(Base):
    """A norm of whose tensors only the statistics change."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm2d(4)

    def forward(self, x):
        x = F.relu(self.first(x))
        return self.top(F.relu(self.norm(self.third(x)) + x))


class Unpacks(Base):
    """Lists that torch returns are changed by who gets them."""

    def forward(self, x):
        parts = torch.split(F.relu(self.first(x)), 2, 1)
        sizes = self.third.weight.tolist()
        sizes.pop()
        low, high = parts
        x = torch.cat([high, low], 1) * len(sizes)
        return self.top(F.relu(self.third(x) + x))


REPLAYED = (Skip, WritesLate, WritesLater, WritesIntoItsInput, Branches, Nested, Constant)
REPLAYED = (*REPLAYED, Statistics, Unpacks, WritesData, ScalesByANumber)
PLAIN = (Counts, Scripted, ScriptedEarly, OwnFunction, OwnFunctionInPlace, BackwardHook, TensorHook, Mapped)
PLAIN = (*PLAIN, ThroughNumpy, DrawsNoise)
EITHER = (Checkpointed, WithoutGradient)  # some methods refuse them


def built(network):
    with local_seed(3):
        return lively(network().double().eval(), 3)


@every_scheme
@pytest.mark.parametrize("network", [*REPLAYED, *PLAIN, *EITHER])
def test_no_network_gets_other_maps_than_in_a_plain_pass(network, scheme):
    images = torch.randn(2, 3, 7, 7, generator=generator(1), dtype=torch.float64)
    options = {"affine": "keep", "stages": ["norm"]} if network is Statistics else {}
    tapes = replayed(built(network), images, ONE_PASS, scheme=scheme, **options)
    if network in REPLAYED:
        assert all(tape.safe and tape.calls for tape in tapes)
    if network in PLAIN:
        assert not any(tape.safe for tape in tapes)


def test_an_attribute_of_the_models_own_stays():
    assert built(Constant)._tape == "mine"


@every_scheme
@every_method
@pytest.mark.parametrize("batch_norm", [False, True])
def test_maps_are_those_of_a_plain_pass(method, scheme, batch_norm, device):
    model = models.cnn(batch_norm=batch_norm).eval().to(device)
    images = torch.rand(3, 1, 28, 28, generator=generator(0)).to(device)
    targets = torch.arange(3, device=device)
    versions = versions_of(model, images, **SCHEMES[scheme])
    tape = Tape(versions.own.model, images, one_pass_of(method))
    for number in range(len(versions)):
        found, plain = taped(tape, versions, number, targets), method(versions.at(number), images, targets)
        torch.testing.assert_close(found, plain, atol=1e-6, rtol=1e-5)
    assert tape.safe


def test_what_lies_below_a_change_runs_once():
    model = models.cnn().eval()
    images = torch.rand(2, 1, 28, 28)
    versions = versions_of(model, images, scheme="cascading")
    tape, runs = Tape(versions.own.model, images, saliency.gradient.one_pass, falling=True), {}
    for number, name in enumerate(versions.names):
        with torch.profiler.profile() as profile:
            taped(tape, versions, number, torch.tensor([0, 1]))
        counts = {event.key: event.count for event in profile.key_averages()}
        runs[name] = counts.get("aten::conv2d", 0), counts.get("aten::linear", 0)
    layers = {"": (2, 2), "logits": (0, 1), "fc1": (0, 2), "conv2": (1, 2), "conv1": (2, 2)}
    assert runs == layers and tape.safe


def test_a_falling_tape_lets_go_of_what_is_out_of_reach():
    model, images = models.cnn().eval(), torch.rand(2, 1, 28, 28)
    versions = versions_of(model, images, scheme="cascading")
    tape = Tape(versions.own.model, images, saliency.gradient.one_pass, falling=True)
    kept = []
    for number in range(len(versions)):
        taped(tape, versions, number, torch.tensor([0, 1]))
        kept.append(sum(call.output is not None for call in tape.calls))
    assert kept == sorted(kept, reverse=True) and kept[0] > kept[1] > kept[2] > kept[3] > kept[4]


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
@pytest.mark.parametrize("name", ["squeezenet1_1", "resnet18"])
def test_networks_that_write_in_place_are_replayed(name, scheme):
    with local_seed(0):
        model = torchvision.models.get_model(name, weights=None).eval()
    images = torch.randn(2, 3, 64, 64, generator=generator(0))
    stages = [stage.name for stage in randomization.plan(model).stages[::6]]
    (tape,) = replayed(model, images, [saliency.guided_backprop], scheme=scheme, stages=stages)
    assert tape.safe and len(tape.calls) > 30


@every_method
def test_other_networks_than_the_recorded_come_second(method):
    """A tape that has recorded nothing runs a copy from the start."""
    model, images, targets = models.cnn().eval(), torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    versions = versions_of(model, images, scheme="cascading")
    tape = Tape(versions.own.model, images, one_pass_of(method))
    assert torch.equal(taped(tape, versions, 1, targets), method(versions.at(1), images, targets))


# ---------------------------------------------------------------- methods that say what they are


@OnePass(finish=lambda images, gradient: gradient.abs() * images)
def mine(model, images, targets):
    """A reader's own."""


@wraps(saliency.gradient)
def negative(model, images, targets):
    return -saliency.gradient(model, images, targets)


def test_methods_carry_their_step():
    assert [method.__name__ for method in ONE_PASS] == ["gradient", "input_x_gradient", "guided_backprop", "deconvnet"]
    assert one_pass_of(mine) is mine.one_pass is one_pass_of(partial(partial(mine)))
    assert one_pass_of(saliency.smoothgrad) is None and one_pass_of(partial(mine, targets=torch.zeros(2))) is None


def test_a_function_that_only_looks_like_a_method_is_called():
    """`functools.wraps` copies attributes, and with them what another function carries."""
    assert negative.one_pass is saliency.gradient.one_pass
    assert one_pass_of(negative) is None


def test_a_method_of_ones_own_is_the_function_of_its_step():
    model, images, targets = models.cnn().eval(), torch.rand(3, 1, 28, 28), torch.arange(3)
    torch.testing.assert_close(mine(model, images, targets), saliency.gradient(model, images, targets).abs() * images)
    assert mine.__name__ == "mine" and mine.__doc__ == "A reader's own."
    assert all(tape.safe for tape in replayed(model, images, [mine]))


def test_a_tape_knows_its_copies_apart():
    """Two copies of a model in turn: each by its own tensors."""
    model, images, targets = models.cnn().eval(), torch.rand(2, 1, 28, 28), torch.tensor([0, 1])
    versions, others = (versions_of(model, images, scheme="cascading") for _ in range(2))
    tape = Tape(versions.own.model, images, saliency.gradient.one_pass)
    taped(tape, versions, 0, targets)
    for number in (1, 2):
        for working in (versions.working, others.working):
            copy, changed = working.hold(versions.drawn[number].values), versions.changed(number)
            with explaining(copy):
                found = tape.maps(copy, changed, targets)
            torch.testing.assert_close(found, saliency.gradient(copy, images, targets))
    assert tape.safe
