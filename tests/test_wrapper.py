"""Models that answer with something else, made to answer with logits: against the logits themselves."""

import io
from collections import namedtuple
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from networks import images, targets
from saliency_sanity import Wrapped, check_model, randomization, sanity
from saliency_sanity.device import local_seed
from saliency_sanity.saliency import METHODS
from torch import nn
from torch.nn import functional as F

SHAPE, CLASSES = (3, 6, 6), 4
METHODS_TRIED = {
    "gradient": METHODS["gradient"],
    "guided_backprop": METHODS["guided_backprop"],
    "gradcam": METHODS["gradcam"],
    "deeplift": METHODS["deeplift"],
    "lrp_composite": METHODS["lrp_composite"],
    "occlusion": partial(METHODS["occlusion"], window=3),
}


def pictures(count=3):
    return images(count, SHAPE)


def classes(count=3):
    return targets(count, CLASSES)


class Net(nn.Module):
    """A small network; `end` makes something else of its logits."""

    def __init__(self, end=None):
        super().__init__()
        with local_seed(0):
            self.conv, self.fc = nn.Conv2d(3, 4, 3), nn.Linear(4, CLASSES)
        with torch.no_grad():
            self.fc.weight.mul_(4)
        self.end = end

    def forward(self, x):
        logits = self.fc(self.conv(x).relu().mean((2, 3)))
        return logits if self.end is None else self.end(logits)


class Dense(nn.Module):
    """A map of logits for each class, at the images' size or smaller."""

    def __init__(self, stride=1, end=None):
        super().__init__()
        with local_seed(0):
            self.conv, self.head = nn.Conv2d(3, 4, 3, stride, 1), nn.Conv2d(4, CLASSES, 1)
        self.end = end

    def forward(self, x):
        scores = self.head(self.conv(x).relu())
        return scores if self.end is None else self.end(scores)


class Several(nn.Module):
    """Takes more than images."""

    def __init__(self):
        super().__init__()
        self.net = Net()

    def forward(self, x, bias, *, scale=1.0, name="plain"):
        assert name in ("plain", "fancy")
        if isinstance(bias, torch.Tensor):
            assert len(bias) == len(x)
        return self.net(x) * scale + bias


@dataclass
class Answer:
    logits: torch.Tensor


Pair = namedtuple("Pair", "aux logits")
OUTPUTS = {
    "place in a tuple": (lambda z: (0 * z, z), 1),
    "last in a list": (lambda z: [0 * z, z], -1),
    "key": (lambda z: {"logits": z, "aux": 0 * z}, "logits"),
    "number as a key": (lambda z: {7: z}, 7),
    "attribute": (Answer, "logits"),
    "field": (lambda z: Pair(0 * z, z), "logits"),
    "place of a field": (lambda z: Pair(0 * z, z), 1),
    "function": (lambda z: {"all": [0 * z, z]}, lambda answer: answer["all"][1]),
    "function of a tensor": (lambda z: z[..., None], lambda answer: answer.squeeze(2)),
}


@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_is_chosen(name, method):
    end, output = OUTPUTS[name]
    model, x, y = Wrapped(Net(end), output=output), pictures(), classes()
    torch.testing.assert_close(METHODS_TRIED[method](model, x, y), METHODS_TRIED[method](Net(), x, y))


def test_a_vector_becomes_a_column():
    """One number an image, as in a regression: target 0."""
    x, zeros = pictures(), torch.zeros(3, dtype=torch.int64)
    for model in (Wrapped(Net(lambda z: z[:, 2])), Wrapped(Net(), output=lambda z: z[:, 2])):
        assert model(x).shape == (3, 1)
        torch.testing.assert_close(METHODS["gradient"](model, x, zeros), METHODS["gradient"](Net(), x, zeros + 2))


def test_a_function_makes_a_sum_of_labels():
    x, y = pictures(), torch.zeros(3, dtype=torch.int64)
    found = METHODS["gradient"](Wrapped(Net(), output=lambda z: z[:, [1, 3]].sum(1)), x, y)
    torch.testing.assert_close(found, METHODS["gradient"](Net(), x, y + 1) + METHODS["gradient"](Net(), x, y + 3))


# ---------------------------------------------------------------- regions


def half():
    region = torch.zeros(6, 6, dtype=torch.bool)
    region[:4, 2:] = True
    return region


@pytest.mark.parametrize("method", METHODS_TRIED)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("region", [None, half()], ids=["everywhere", "half"])
def test_a_map_of_logits_is_added_up_over_a_region(method, reduce, region):
    inside = torch.ones(6, 6, dtype=torch.bool) if region is None else region

    def over_the_region(scores):
        total = (scores * inside.float()).sum((2, 3))
        return total / (inside.sum().item() if reduce == "mean" else 1)

    x, y = pictures(), classes()
    model = Wrapped(Dense(), region=region, reduce=reduce)
    torch.testing.assert_close(model(x), over_the_region(Dense()(x)))
    if not method.startswith("lrp"):  # relevance goes by sums, whose parts the two write in another order
        expected = METHODS_TRIED[method](Dense(end=over_the_region), x, y)
        torch.testing.assert_close(METHODS_TRIED[method](model, x, y), expected)


def test_a_mask_of_the_images_size_counts_what_it_covers():
    """As if the scores had been copied up to the images' size."""
    x = pictures()
    scores, region = Dense(stride=2)(x), half()
    up = scores.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(Wrapped(Dense(2), region=region)(x), up[:, :, region].sum(2) / 4)
    torch.testing.assert_close(Wrapped(Dense(2), region=region, reduce="mean")(x), up[:, :, region].mean(2))
    small = region[::2, ::2]
    torch.testing.assert_close(Wrapped(Dense(2), region=small)(x), scores[:, :, small].sum(2))


def test_a_map_of_one_class_may_have_no_axis_for_it():
    x = pictures()
    model = Wrapped(Dense(end=lambda z: z[:, 1]), region=half())
    torch.testing.assert_close(model(x)[:, 0], Dense()(x)[:, 1, half()].sum(1))


# ---------------------------------------------------------------- further inputs


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.arange(4.0)[None],),
        (torch.arange(4.0),),
        {"bias": torch.arange(4.0), "scale": 1.0, "name": "fancy"},
        {"scale": torch.ones(1, 1), "bias": torch.arange(4.0)[None]},
    ],
)
@pytest.mark.parametrize("count", [1, 3])
def test_further_inputs_are_held_fixed(inputs, count):
    model, x, y = Wrapped(Several(), inputs=inputs), pictures(count), classes(count)
    torch.testing.assert_close(model(x), Net()(x) + torch.arange(4.0))
    torch.testing.assert_close(METHODS["gradient"](model, x, y), METHODS["gradient"](Net(), x, y))


def test_a_number_for_each_image_is_repeated():
    model = Wrapped(Several(), inputs={"bias": torch.zeros(1, 1), "scale": torch.tensor(2.0)})
    model.model.forward = lambda x, bias, scale: Net()(x) * scale[:, None] + bias
    torch.testing.assert_close(model(pictures()), 2 * Net()(pictures()))


def test_inputs_and_region_move_with_the_wrapper(device):
    x = pictures().to(device).double()
    model = Wrapped(Several(), inputs=(torch.arange(4.0),)).to(device).double()
    assert model(x).dtype == torch.float64 and model(x).device == x.device
    assert Wrapped(Dense(), region=half()).to(device).double()(x).device == x.device


# ---------------------------------------------------------------- signs


@pytest.mark.parametrize(
    ("negate", "turned"), [(1, [1]), ([0, 3], [0, 3]), (True, [0, 1, 2, 3]), ((), []), (False, [])]
)
def test_signs_are_turned(negate, turned):
    x, model = pictures(), Wrapped(Net(), negate=negate)
    signs = torch.tensor([-1.0 if place in turned else 1.0 for place in range(CLASSES)])
    torch.testing.assert_close(model(x), Net()(x) * signs)
    for target in range(CLASSES):
        y = torch.full((3,), target)
        for method in ("gradient", "deeplift", "occlusion"):
            maps = (METHODS_TRIED[method](network, x, y) for network in (model, Net()))
            torch.testing.assert_close(next(maps), signs[target] * next(maps))


def test_evidence_against_a_class_is_what_gradcam_then_shows():
    x, y = pictures(), classes()
    against = METHODS["gradcam"](Wrapped(Net(), negate=True), x, y)
    torch.testing.assert_close(against, METHODS["gradcam"](Net(lambda z: -z), x, y))


# ---------------------------------------------------------------- softmax off

SQUASHES = {
    "module": nn.Softmax(1),
    "function": lambda z: F.softmax(z, dim=1),
    "of torch": lambda z: torch.softmax(z, 1),
    "of the tensor": lambda z: z.softmax(-1),
    "special": lambda z: torch.special.softmax(z, 1),
    "log-softmax": nn.LogSoftmax(1),
    "log-softmax of the tensor": lambda z: z.log_softmax(1),
    "sigmoid": nn.Sigmoid(),
    "sigmoid of torch": torch.sigmoid,
    "expit": torch.special.expit,
    "in place": lambda z: z.sigmoid_(),
    "log-sigmoid": nn.LogSigmoid(),
    "after another": lambda z: (z + 0 * z.softmax(1).sum()).softmax(1),
    "before another": lambda z: (z.softmax(1), z.softmax(0))[0],
    "reshaped": lambda z: z.softmax(1)[..., None, None].flatten(1),
    "copied": lambda z: (z.softmax(1)[..., None] * 1).squeeze(2),
    "a channel each": lambda z: z[..., None, None].softmax(1).flatten(1),
    "by keyword": lambda z: torch.softmax(input=z, dim=1),
}


@pytest.mark.parametrize("name", SQUASHES)
@pytest.mark.parametrize("method", ["gradient", "deeplift", "lrp_composite", "guided_backprop"])
def test_without_its_softmax_a_model_is_its_logits(name, method):
    x, y = pictures(), classes()
    model = Wrapped(Net(SQUASHES[name]), drop_softmax=True)
    torch.testing.assert_close(model(x), Net()(x))
    twice = name in ("reshaped", "copied", "a channel each")  # LRP wants layers that run once
    if name != "after another" and not (twice and method == "lrp_composite"):
        torch.testing.assert_close(METHODS_TRIED[method](model, x, y), METHODS_TRIED[method](Net(), x, y))


def test_softmax_is_taken_off_what_is_chosen_and_before_a_region():
    x, y = pictures(), classes()
    model = Wrapped(Net(lambda z: {"logits": z, "p": z.softmax(1), "aux": z.sigmoid()}), output="p", drop_softmax=True)
    torch.testing.assert_close(METHODS["gradient"](model, x, y), METHODS["gradient"](Net(), x, y))
    model = Wrapped(Dense(end=nn.Softmax(1)), region=half(), drop_softmax=True, negate=2)
    scores = Dense()(x)[:, :, half()].sum(2)
    torch.testing.assert_close(model(x), scores * torch.tensor([1, 1, -1, 1]))


class Attends(nn.Module):
    """A softmax inside, which is not to be dropped."""

    def __init__(self, end):
        super().__init__()
        self.net, self.end = Net(), end

    def forward(self, x):
        return self.end(self.net(x * x.flatten(2).softmax(2).view_as(x) * 30))


def test_a_softmax_inside_stays():
    x = pictures()
    torch.testing.assert_close(Wrapped(Attends(nn.Softmax(1)), drop_softmax=True)(x), Attends(nn.Identity())(x))
    with pytest.raises(ValueError, match="drop_softmax=True finds no call of softmax"):
        check_model(Wrapped(Attends(nn.Identity()), drop_softmax=True), x)


@pytest.mark.parametrize(
    "end",
    [
        None,
        lambda z: z.exp() / z.exp().sum(1, keepdim=True),
        lambda z: z.softmax(1).log(),
        lambda z: z.softmax(1)[:, :2],
        lambda z: z.softmax(1)[:, 1],
        lambda z: (z.softmax(1) + (2 * z).softmax(1)) / 2,
        lambda z: 1 - z.softmax(1),
    ],
    ids=["logits", "by hand", "log", "a part", "one", "a mean", "the rest"],
)
def test_what_is_no_softmax_is_not_taken_off(end):
    with pytest.raises(ValueError, match="drop_softmax=True finds no call"):
        METHODS["gradient"](Wrapped(Net(end), drop_softmax=True), pictures(), classes())


def test_probabilities_are_explained_on_purpose():
    x, y = pictures(), classes()
    leaf = x.clone().requires_grad_()
    chosen = Net()(leaf).softmax(1).gather(1, y[:, None])
    (expected,) = torch.autograd.grad(chosen.sum(), leaf)
    model = Wrapped(Net(nn.Softmax(1)), keep_probabilities=True)
    torch.testing.assert_close(METHODS["gradient"](model, x, y), expected)


# ---------------------------------------------------------------- a model like others


def probabilities(answer):
    return answer["p"]


def wrapped():
    net = Net(None)
    net.end = AsDict()
    return Wrapped(net, output=probabilities, drop_softmax=True, negate=[0])


class AsDict(nn.Module):
    def forward(self, z):
        return {"p": z.softmax(1)}


@pytest.mark.parametrize("with_example", [False, True])
def test_its_stages_are_those_of_the_wrapped_model(with_example):
    x = pictures(1) if with_example else None
    found = randomization.plan(Wrapped(Net()), example=x)
    assert [stage.name for stage in found.stages] == ["model.fc", "model.conv"] and not found.unused
    deep = Wrapped(nn.Sequential(nn.Conv2d(3, 2, 6), nn.Flatten(), nn.Linear(2, 2)))
    assert [stage.name for stage in randomization.plan(deep, example=x).stages] == ["model.2", "model.0"]
    segmenting = Wrapped(Dense(), region=half())
    assert [stage.name for stage in randomization.plan(segmenting, example=x).stages] == ["model.head", "model.conv"]


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
@pytest.mark.parametrize("method", ["gradient", "guided_backprop", "gradcam", "occlusion"])
def test_it_is_randomised_as_the_model_with_the_option_built_in(scheme, method):
    """The same stages and draws, the same maps."""

    class BuiltIn(Net):
        def forward(self, x):
            return super().forward(x) * torch.tensor([-1.0, 1, 1, 1])

    x, y = pictures(), classes()
    frames = [
        sanity.parameter_randomization(
            model,
            x,
            y,
            methods={"m": METHODS_TRIED[method]},
            metrics=["spearman"],
            seeds=[0],
            scheme=scheme,
            show_progress=False,
        )
        for model in (wrapped(), BuiltIn())
    ]
    assert [name.removeprefix("model.") for name in frames[0].layer] == list(frames[1].layer)
    torch.testing.assert_close(
        torch.tensor(frames[0].similarity.to_numpy()), torch.tensor(frames[1].similarity.to_numpy()), equal_nan=True
    )


def test_it_is_copied_saved_and_loaded():
    x, model = pictures(), wrapped()
    expected = model(x)
    assert torch.equal(deepcopy(model)(x), expected)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=False)(x), expected)
    other = Wrapped(Several(), inputs=(torch.zeros(4),))
    other.load_state_dict(Wrapped(Several(), inputs=(torch.arange(4.0),)).state_dict())
    torch.testing.assert_close(other(x), Net()(x) + torch.arange(4.0))


@pytest.mark.parametrize("training", [True, False])
def test_the_wrapped_model_is_the_very_one_and_left_alone(training):
    net = Net(lambda z: z.softmax(1)).train(training)
    before = {name: (id(value), value._version) for name, value in net.state_dict(keep_vars=True).items()}
    model = Wrapped(net, drop_softmax=True)
    assert model.model is net and model.training is training
    check_model(model, pictures()), METHODS["gradcam"](model, pictures(), classes())
    assert {name: (id(value), value._version) for name, value in net.state_dict(keep_vars=True).items()} == before
    assert net.training is training and not net._forward_hooks and net.conv.weight.grad is None


def test_it_says_what_it_does():
    text = repr(Wrapped(Net(), output="logits", negate=[1], drop_softmax=True))
    assert "output='logits', negate=(1,), drop_softmax=True" in text and "keep" not in text


def test_wrappers_can_be_nested():
    inner = Wrapped(Net(lambda z: {"logits": z}), output="logits")
    torch.testing.assert_close(Wrapped(inner, negate=True)(pictures()), -Net()(pictures()))


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"output": 1.5}, "output must be a place, a key, an attribute or a function"),
        ({"output": True}, "output must be a place"),
        ({"region": torch.ones(6, 6)}, r"region must be a bool tensor \(h, w\), got torch.float32 \(6, 6\)"),
        ({"region": torch.ones(1, 6, 6, dtype=torch.bool)}, r"got torch.bool \(1, 6, 6\)"),
        ({"region": [[True]]}, "region must be a bool tensor.*got list"),
        ({"region": torch.zeros(6, 6, dtype=torch.bool)}, "False everywhere"),
        ({"reduce": "max"}, "reduce must be 'sum' or 'mean', got 'max'"),
        ({"inputs": torch.ones(3)}, "inputs must be a tuple or a dictionary, got Tensor"),
        ({"inputs": "bias"}, "inputs must be a tuple or a dictionary, got str"),
        ({"inputs": 3}, "inputs must be a tuple or a dictionary, got int"),
        ({"inputs": {0: 1}}, "inputs by name need names that are words"),
        ({"inputs": {"a.b": torch.ones(1)}}, "inputs by name need names that are words"),
        ({"negate": -1}, "negate must be True, a class index or a list of them"),
        ({"negate": "all"}, "negate must be True"),
        ({"negate": [0.5]}, "negate must be True"),
        ({"negate": None}, "negate must be True"),
        ({"drop_softmax": True, "keep_probabilities": True}, "choose one of drop_softmax and keep_probabilities"),
    ],
)
def test_options_of_the_wrong_kind_are_refused(options, says):
    with pytest.raises(ValueError, match=says):
        Wrapped(Net(), **options)


def test_opposite_options_one_in_the_other_are_refused():
    for inner, outer in (("drop_softmax", "keep_probabilities"), ("keep_probabilities", "drop_softmax")):
        within = Wrapped(Wrapped(Net(nn.Softmax(1)), **{inner: True}), negate=True)
        with pytest.raises(ValueError, match="wrapped with the other already"):
            Wrapped(within, **{outer: True})


def test_what_is_no_module_is_refused():
    with pytest.raises(ValueError, match="must be a torch.nn.Module, got function"):
        Wrapped(lambda x: x)


@pytest.mark.parametrize(
    ("build", "says"),
    [
        (lambda: Wrapped(Net(), output=0), "returns a tensor: leave output out"),
        (lambda: Wrapped(Net(), output="logits"), "output='logits' is not in what the model returns: Tensor"),
        (lambda: Wrapped(Net(lambda z: (z, z)), output=2), "output=2 is not in what the model returns: tuple of 2"),
        (lambda: Wrapped(Net(lambda z: (z, z)), output="a"), "output='a' is not in what the model returns: tuple of 2"),
        (lambda: Wrapped(Net(lambda z: {"a": z}), output="b"), "output='b' is not.*the names 'a'"),
        (lambda: Wrapped(Net(lambda z: {"a": z}), output=0), "output=0 is not.*the names 'a'"),
        (lambda: Wrapped(Net(Answer), output="b"), "output='b' is not.*the names 'logits'"),
        (lambda: Wrapped(Net(lambda z: (z, z))), "got tuple of 2"),
        (lambda: Wrapped(Net(), negate=4), "negate=4 is not one of the model's 4 classes"),
        (lambda: Wrapped(Net(), region=half()), r"a region needs scores \(N, classes, h, w\), got \([12], 4\)"),
        (lambda: Wrapped(Net(), reduce="mean"), r"a region needs scores \(N, classes, h, w\), got \([12], 4\)"),
        (lambda: Wrapped(Dense(2), region=half()[1:]), r"region \(5, 6\) has neither the size of the scores, \(3, 3\)"),
        (lambda: Wrapped(Dense()), r"got \([12], 4, 6, 6\).*region=mask"),
        (lambda: Wrapped(Net(nn.Softmax(1))), "ends in a softmax"),
        (lambda: Wrapped(Several()), "cannot run on images.*missing 1 required positional argument: 'bias'"),
    ],
)
def test_what_does_not_fit_the_model_is_said_at_the_door(build, says):
    with pytest.raises(ValueError, match=says):
        check_model(build(), pictures())
