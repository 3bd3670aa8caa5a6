"""A private copy uses nothing of the caller's, and forgets what a pass has left in it."""

import functools
from collections import deque
from copy import deepcopy
from functools import partial

import pytest
import torch
from networks import CLASSES, images
from randomized import assert_untouched, names, snapshot
from saliency_sanity import randomization
from saliency_sanity.device import local_seed
from saliency_sanity.versions import Versions
from torch import nn


class WithBias(nn.Module):
    """A layer whose learned bias is kept for the next pass, in a way that a test chooses."""

    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.bias = nn.Parameter(torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(0)))
        self.factor = torch.full((4, 1, 1), 2.0)  # a constant

    def forward(self, x):
        return self.head(((self.first(x) + self.cached()) * self.factor).relu().mean((2, 3)))


class InADictionary(WithBias):
    def __init__(self):
        super().__init__()
        self.cache = {}

    def cached(self):
        if "cpu" not in self.cache:
            self.cache["cpu"] = self.bias * 2
        return self.cache["cpu"]


class InAnAttribute(WithBias):
    kept = None

    def __init__(self):
        super().__init__()
        self.kept = None

    def cached(self):
        if self.kept is None:
            self.kept = self.bias * 2
        return self.kept


class IfMissing(WithBias):
    def cached(self):
        if not hasattr(self, "kept"):
            self.kept = self.bias * 2
        return self.kept


DRAWN = {"init": "truncated_normal", "std": 0.3}


@pytest.mark.parametrize("network", [InADictionary, InAnAttribute, IfMissing])
def test_what_an_earlier_prediction_left_does_not_stay_in_the_copies(network):
    torch.manual_seed(0)
    model, x = network().eval(), images(2)
    fresh = list(randomization.cascading(deepcopy(model), seed=0, example=x, **DRAWN))
    with torch.no_grad():
        trained = model(x)
    asked = list(randomization.cascading(model, seed=0, example=x, **DRAWN))
    assert [name for name, _ in asked] == [name for name, _ in fresh] and "bias" in dict(asked)
    assert randomization.plan(model, example=x).unused == []
    with torch.no_grad():
        for (_, ours), (_, theirs) in zip(asked, fresh):
            torch.testing.assert_close(ours(x), theirs(x))
        assert torch.equal(model(x), trained)
    measured = randomization.Redraws(model, scheme="cascading", seed=0, example=x, **DRAWN).private
    torch.testing.assert_close(measured(x).detach(), trained)


# ---------------------------------------------------------------- where models keep what they computed


class Keeps(nn.Module):
    """A layer's bias goes through `get`, which may keep what it computed."""

    def __init__(self):
        super().__init__()
        with local_seed(0):
            self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)
            self.bias = nn.Parameter(torch.randn(4, 1, 1))
        self.prepare()

    def prepare(self):
        pass

    def get(self):
        return self.bias

    def forward(self, x):
        return self.head((self.first(x) + self.get()).relu().mean((2, 3)))


class Store:
    pass


class Slots:
    __slots__ = ("value",)


class InAnObject(Keeps):
    kind = Store

    def prepare(self):
        self.store = self.kind()
        self.store.value = None

    def get(self):
        if self.store.value is None:
            self.store.value = self.bias * 2
        return self.store.value


class InSlots(InAnObject):
    kind = Slots


class InAnObjectsDictionary(Keeps):
    def prepare(self):
        self.store = Store()
        self.store.cache = {}

    def get(self):
        return self.store.cache.setdefault("bias", self.bias * 2)


class ByShape(Keeps):
    def prepare(self):
        self.cache = {}

    def get(self):
        if self.bias.shape not in self.cache:
            self.cache[self.bias.shape] = [self.bias * 2]
        return self.cache[self.bias.shape][0]


class InAList(Keeps):
    def prepare(self):
        self.kept = []

    def get(self):
        if not self.kept:
            self.kept.append(self.bias * 2)
        return self.kept[0]


class InABuffer(Keeps):
    def prepare(self):
        self.register_buffer("kept", None, persistent=False)

    def get(self):
        if self.kept is None:
            self.kept = self.bias.detach() * 2
        return self.kept


class Flagged(Keeps):
    def prepare(self):
        self.ready = False

    def get(self):
        if not self.ready:
            self.kept, self.ready = self.bias * 2, True
        return self.kept


class AsANumber(Keeps):
    def prepare(self):
        self.kept = None

    def get(self):
        if self.kept is None:
            self.kept = self.bias.detach().mean().item()
        return self.kept


class AsAnArray(AsANumber):
    def get(self):
        if self.kept is None:
            self.kept = self.bias.detach().numpy() * 2
        return torch.from_numpy(self.kept)


class OfAChild(Keeps):
    """The child does not even run once its table is there."""

    def prepare(self):
        self.table, self.ready = nn.Linear(1, 4), False

    def get(self):
        if not self.ready:
            self.kept, self.ready = self.table(torch.ones(1, 1)).detach().view(4, 1, 1) + self.bias, True
        return self.kept


CACHES = [
    InAnObject,
    InSlots,
    InAnObjectsDictionary,
    ByShape,
    InAList,
    InABuffer,
    Flagged,
    AsANumber,
    AsAnArray,
    OfAChild,
]


class Everywhere(Keeps):
    """Stores activations, which it never reads."""

    def prepare(self):
        self.seen, self.queue, self.store = [], deque(maxlen=2), Store()
        self.store.last = {}
        self.first.register_forward_hook(lambda module, inputs, output: self.seen_by_hook.append(output))

    seen_by_hook: list = []

    def get(self):
        kept = self.bias * 2
        self.seen.append(kept)
        self.queue.append((kept,))
        self.store.last["bias"] = {"kept": kept}
        return kept


class Hooked(Keeps):
    """A hook that stores what it sees in a dictionary that all copies share."""

    def prepare(self):
        seen = {}
        self.first.register_forward_hook(lambda module, inputs, output: seen.update(last=output))


class Mask(Keeps):
    """What is kept has the type of a weight and nothing of its values."""

    def prepare(self):
        self.mask = None

    def get(self):
        if self.mask is None:
            self.mask = self.bias.new_ones(4, 1, 1)
        return self.bias * self.mask


@functools.lru_cache
def table(length):
    return torch.linspace(0, 1, length).view(length, 1, 1)


class Table(Keeps):
    """A function that keeps a constant."""

    def get(self):
        return self.bias * table(4)


def as_built(network, state, x):
    """Output of a network that has never run, with this state."""
    model = network().eval()
    model.load_state_dict({name: state[name] for name in model.state_dict()})
    return model(x)


@pytest.mark.parametrize("has_run", [False, True])
@pytest.mark.parametrize("network", [*CACHES, Everywhere, Hooked, Mask, Table])
def test_copies_use_their_own_weights_wherever_the_model_keeps_what_it_computed(network, has_run):
    model, x = network().eval(), images(2)
    trained = as_built(network, model.state_dict(), x)
    if has_run:
        model(x)  # with a graph
    before = snapshot(model)
    draws = randomization.Redraws(model, scheme="cascading", seed=0, example=x[:1])
    assert {"head", "first", "bias"} <= set(names(draws.found).split()) and not draws.found.unused
    torch.testing.assert_close(draws.private(x), trained)
    versions = Versions(draws)
    versions.begin(0)
    for number in range(1, len(versions)):
        copy = versions.at(number)
        torch.testing.assert_close(copy(x), as_built(network, copy.state_dict(), x))
        draws.private(x)
    assert_untouched(model, before)
    torch.testing.assert_close(model(x), trained)


def test_a_private_copy_starts_as_a_model_that_has_never_run():
    model = InABuffer().eval()
    model(images(1))
    draws = randomization.Redraws(model, scheme="cascading", seed=0, example=images(1))
    assert draws.private.kept is None and model.kept is not None


class Method(Keeps):
    @functools.lru_cache  # noqa: B019
    def get(self):
        return self.bias * 2


class Global(Keeps):
    kept: dict = {}

    def get(self):
        if id(self) not in self.kept:
            self.kept[id(self)] = self.bias * 2
        return self.kept[id(self)]


class HookKeeps(Keeps):
    def prepare(self):
        kept = {}

        def hook(module, inputs):
            if "weight" not in kept:
                kept["weight"] = module.weight.mean() * 2
            return inputs[0] * kept["weight"]

        self.first.register_forward_pre_hook(hook)


class HookKeepsOne(Keeps):
    def prepare(self):
        kept = None

        def hook(module, inputs):
            nonlocal kept
            kept = module.weight.mean() * 2 if kept is None else kept
            return inputs[0] * kept

        self.first.register_forward_pre_hook(hook)


class Elsewhere(Keeps):
    """What a deep copy cannot reach; here the tensor is found but not how to empty it."""

    def prepare(self):
        self.queue = deque()

    def get(self):
        if not self.queue:
            self.queue.append(self.bias * 2)
        return self.queue[0]


@pytest.mark.parametrize(
    ("network", "has_run", "message"),
    [
        (Method, False, "keeps what it computes from 'bias' where it cannot be emptied, like functools.lru_cache"),
        (Method, True, "keeps what it computes from 'bias'"),
        (Global, False, "keeps what it computes from 'bias'"),
        (Global, True, "keeps what it computes from 'bias'"),
        (HookKeeps, False, "keeps what (it|a pass) computes at .*its kept.*weight"),
        (HookKeeps, True, r"at first._forward_pre_hooks\[\d+\] \(its kept\)\['weight'\], which all copies of it share"),
        (HookKeepsOne, False, "keeps what (it|a pass) computes at .*its kept"),
        (HookKeepsOne, True, r"\(its kept\), which all copies of it share"),
        (Elsewhere, True, r"'bias' takes no part in a pass, but the tensor at queue\[0\].*Empty it, or register"),
    ],
)
def test_what_cannot_be_emptied_is_refused(network, has_run, message):
    model, x = network().eval(), images(2)
    output = model(x) if has_run else as_built(network, model.state_dict(), x)
    before = snapshot(model)
    with pytest.raises(ValueError, match=message):
        randomization.plan(model, example=x[:1])
    assert_untouched(model, before)
    torch.testing.assert_close(model(x), output)


class Folds(Keeps):
    """Changes its weights in the first pass in eval mode."""

    folded = False

    def get(self):
        if not self.folded:
            self.bias.data *= 2
            self.folded = True
        return self.bias


def test_a_model_that_changes_its_parameters_as_it_runs_is_refused():
    model = Folds().eval()
    with pytest.raises(ValueError, match="writes into its parameter 'bias': run it once"):
        randomization.plan(model, example=images(1))
    model(images(1))
    assert names(randomization.plan(model, example=images(1))) == "head bias first"


class Features(nn.Module):
    """Keeps the features of its last pass."""

    def __init__(self):
        super().__init__()
        self.c, self.l = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)

    def forward(self, x):
        self.features = self.c(x).relu()
        return self.l(self.features.mean((2, 3)))


def test_a_model_that_keeps_features_can_be_copied_after_it_was_explained():
    model, x = Features().eval(), images(2)
    clean = [copy(x) for _, copy in randomization.cascading(deepcopy(model), seed=0, example=x)]
    model(x).sum().backward()
    kept = model.features
    draws = randomization.Redraws(model, scheme="cascading", seed=0, example=x)
    draws.private(x).sum().backward()  # stage 0 is explained before the copies are made
    for (_, copy), expected in zip(draws.copies(), clean, strict=True):
        torch.testing.assert_close(copy(x), expected)
    assert model.features is kept and kept.requires_grad


class Closure(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.head = nn.Conv2d(3, 4, 3), nn.Linear(4, 5)
        self.block = lambda x: self.first(x).relu()

    def forward(self, x):
        return self.head(self.block(x).mean((2, 3)))


class Number(Closure):
    """A weight of the original acts as a number."""

    def __init__(self):
        super().__init__()
        self.block = lambda x: x.mean(1, keepdim=True).repeat(1, 4, 1, 1) * float(self.first.weight.mean())


class Hidden(nn.Module):
    """Layers in a plain list are no part of the model."""

    def __init__(self):
        super().__init__()
        self.layers, self.head = [nn.Conv2d(3, 4, 3)], nn.Linear(4, 5)

    def forward(self, x):
        return self.head(self.layers[0](x).mean((2, 3)))


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (Closure, "still uses 'first.weight', 'first.bias' of the model itself.*Make it a method"),
        (Number, "still uses 'first.weight' of the model itself"),
        (Hidden, r"does not register.*layers\[0\].weight.*nn.ModuleList"),
    ],
)
def test_a_copy_that_uses_what_is_not_its_own_is_refused(network, message):
    for run in (randomization.plan, partial(randomization.Redraws, scheme="cascading", seed=0)):
        with pytest.raises(ValueError, match=message):
            run(network().eval(), example=images(1))


SOMEWHERE = torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(2))
LEARNED = nn.Parameter(SOMEWHERE.clone())


class FromAGlobal(Keeps):
    def get(self):
        return self.bias * SOMEWHERE


class FromAClass(Keeps):
    factor = SOMEWHERE

    def get(self):
        return self.bias * self.factor


class FromADefault(Keeps):
    def get(self, factor=SOMEWHERE):
        return self.bias * factor


class FromAnArray(Keeps):
    def prepare(self):
        self.array = SOMEWHERE.numpy().copy()

    def get(self):
        return self.bias * torch.from_numpy(self.array)


@pytest.mark.parametrize("network", [FromAGlobal, FromAClass, FromADefault, FromAnArray])
def test_tensors_that_no_module_holds_are_listed(network):
    found = randomization.plan(network().eval(), example=images(1))
    assert found.constant == ["a tensor of shape (4, 1, 1) from elsewhere"]


@pytest.mark.parametrize("network", [*CACHES, Everywhere, Mask])
def test_what_a_pass_makes_is_from_nowhere_else(network):
    assert not any("elsewhere" in name for name in randomization.plan(network().eval(), example=images(1)).constant)


class LearnedElsewhere(Keeps):
    def get(self, factor=LEARNED):
        return self.bias * factor


def test_parameters_that_no_module_holds_are_refused():
    with pytest.raises(ValueError, match=r"does not register.*a tensor of shape \(4, 1, 1\)"):
        randomization.plan(LearnedElsewhere().eval(), example=images(1))


class Buffers(Keeps):
    def prepare(self):
        self.register_buffer("mask", torch.tensor([True, False, True, True]).view(4, 1, 1))
        self.register_buffer("wave", torch.ones(4, 1, 1, dtype=torch.complex64))
        self.register_buffer("codes", torch.tensor([3, -7, 5, 2], dtype=torch.int8).view(4, 1, 1))
        self.register_buffer("places", torch.tensor([1, 0, 3, 2]))

    def get(self):
        return (self.bias * self.mask * self.codes.float() * self.wave.real)[self.places]


def test_buffers_of_every_type_are_listed_but_indices():
    found = randomization.plan(Buffers().eval(), example=images(1))
    assert set(found.constant) == {"mask", "wave", "codes"}
