"""DeepLIFT and LRP: by hand from their equations, captum and zennit where they are right, and refusals."""

import gc
import weakref
from copy import deepcopy
from functools import partial

import captum.attr
import pytest
import torch
import torchvision
from captum.attr._utils.lrp_rules import EpsilonRule
from networks import CLASSES, cnn, images, linear, lively, targets, weekly_but, with_relu_modules
from saliency_sanity import randomization
from saliency_sanity.book import models, photographs
from saliency_sanity.device import local_seed
from saliency_sanity.saliency import lrp_rules, passes
from saliency_sanity.saliency.gradients import input_x_gradient
from saliency_sanity.saliency.lrp import lrp_alpha_beta, lrp_composite, lrp_epsilon
from saliency_sanity.saliency.rescale import deeplift
from torch import nn
from torch.nn import functional as F
from zennit.canonizers import SequentialMergeBatchNorm
from zennit.composites import EpsilonAlpha2Beta1Flat
from zennit.core import Composite, Stabilizer
from zennit.rules import Epsilon, Pass
from zennit.torchvision import ResNetCanonizer

LRP = (lrp_epsilon, lrp_alpha_beta, lrp_composite)
METHODS = (deeplift, *LRP)
method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.__name__)
lrp = pytest.mark.parametrize("lrp", LRP, ids=lambda method: method.__name__)
pytestmark = pytest.mark.filterwarnings("ignore:Setting forward, backward hooks", "ignore:Input Tensor 0")


def assert_same(ours, theirs, tolerance=1e-9):
    """Equal up to `tolerance` of the largest value of each map."""
    scale = theirs.abs().amax((1, 2, 3), keepdim=True)
    assert scale.min() > 0
    torch.testing.assert_close(ours / scale, theirs / scale, atol=tolerance, rtol=0)


def logits(model, x, y):
    with torch.no_grad():
        return model.eval()(x).gather(1, y[:, None])[:, 0]


def without_biases(model):
    for module in model.modules():
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
    return model


CONV, LAST = partial(nn.Conv2d, 2, 3, 3, padding=1), partial(nn.LazyLinear, CLASSES)
SMALL = {
    "mlp": (nn.Flatten, partial(nn.Linear, 72, 9), nn.ReLU, partial(nn.Linear, 9, 7), nn.ReLU, LAST),
    "max-pooling": (CONV, nn.ReLU, partial(nn.MaxPool2d, 2), nn.Flatten, LAST),
    "overlapping": (CONV, nn.ReLU, partial(nn.MaxPool2d, 3, 2, 1), partial(nn.Conv2d, 3, 4, 2), nn.ReLU)
    + (nn.Flatten, LAST),
    "average": (
        CONV,
        nn.ReLU,
        partial(nn.AvgPool2d, 2),
        nn.Flatten,
        partial(nn.Linear, 27, 6),
        nn.ReLU,
        LAST,
    ),
    "norm": (CONV, partial(nn.BatchNorm2d, 3), nn.ReLU, partial(nn.MaxPool2d, 2), nn.Flatten, LAST),
}
by_hand = pytest.mark.parametrize("name", SMALL)


def built(name):
    """The network with biases that matter, images and targets."""
    with local_seed(0):
        model = nn.Sequential(*[layer() for layer in SMALL[name]]).double()
        model(images(1, (2, 6, 6), dtype=torch.float64))
    model = lively(model).eval()
    with local_seed(1), torch.no_grad():
        for module in model:
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                module.bias.normal_(0, 0.3)
    return model, images(3, (2, 6, 6), seed=3, dtype=torch.float64), targets()


# ---------------------------------------------------------------- every layer as a matrix


def matrix(layer, shape):
    """The Jacobian of an affine layer at inputs of a shape, `(outputs, inputs)`."""
    zero = torch.zeros(1, *shape, dtype=torch.float64)
    found = torch.autograd.functional.jacobian(layer, zero)
    return found.reshape(-1, zero.numel()).detach()


def windows(pool, shape):
    """For each output of a max-pooling its inputs, as flat indices."""
    places = torch.arange(torch.Size(shape).numel(), dtype=torch.float64).view(1, *shape)
    size, stride, pad = pool.kernel_size, pool.stride, pool.padding
    columns = F.unfold(
        F.pad(places, [pad] * 4, value=-1).view(shape[0], 1, *[s + 2 * pad for s in shape[1:]]),
        size,
        stride=stride,
    )
    return [[int(p) for p in window if p >= 0] for channel in columns for window in channel.T]


def steps(model, x):
    """The layers with their inputs; a batch-norm belongs to the convolution before it."""
    layers = list(model)
    while layers:
        layer = layers.pop(0)
        if layers and isinstance(layers[0], nn.BatchNorm2d):
            layer = nn.Sequential(layer, layers.pop(0))
        yield layer, x
        x = layer(x)


def start(model, x, target):
    relevance = torch.zeros(CLASSES, dtype=torch.float64)
    relevance[target] = 1
    return relevance


@torch.no_grad()
def deeplift_by_hand(model, x, target, baseline):
    """Multipliers of one image, layer by layer: Shrikumar et al. (2017), equations 3 and 11 (Rescale)."""
    multipliers = start(model, x, target)
    pairs = list(zip(steps(model, x), steps(model, baseline)))
    for (layer, at), (_, before) in reversed(pairs):
        run, shape = (at - before).flatten(), at.shape[1:]
        if isinstance(layer, nn.ReLU):
            rise = (layer(at) - layer(before)).flatten()
            multipliers = multipliers * torch.where(run == 0, (at > 0).double().flatten(), rise / run)
        elif isinstance(layer, nn.MaxPool2d):
            below = torch.zeros(at.numel(), dtype=torch.float64)
            for multiplier, window in zip(multipliers, windows(layer, shape)):
                a, b = at.flatten()[window], before.flatten()[window]
                i, j, top = window[a.argmax()], window[b.argmax()], max(a.max(), b.max())
                below[i] += multiplier * ((top - b.max()) / run[i] if run[i] else 1)
                below[j] += multiplier * ((a.max() - top) / run[j] if run[j] else 0)
            multipliers = below
        elif not isinstance(layer, nn.Flatten):
            multipliers = multipliers @ matrix(layer, shape)
    return (multipliers * (x - baseline).flatten()).view_as(x)[0]


def shared_out(contributions, relevance, epsilon=1e-6):
    """Relevance of the inputs, in proportion to `contributions` `(outputs, inputs)`.

    `epsilon` counts in root mean squares of the outputs."""
    total = contributions.sum(1)
    shift = epsilon * total.square().mean().sqrt() * torch.where(total < 0, -1.0, 1.0)
    return (contributions * torch.where(total + shift == 0, 0, relevance / (total + shift))[:, None]).sum(0)


def epsilon_rule(weights, x, relevance):
    return shared_out(weights * x, relevance)


def alpha_beta_rule(weights, x, relevance, alpha=2.0, beta=1.0):
    positive, negative = (weights * x).clamp(min=0), (weights * x).clamp(max=0)
    with_sign = shared_out(positive, relevance), -shared_out(-negative, -relevance)
    return alpha * with_sign[0] - beta * with_sign[1]


def flat_rule(weights, x, relevance):
    return shared_out((weights != 0).double(), relevance)


@torch.no_grad()
def lrp_by_hand(model, x, target, rule):
    """`rule(layer, first)` gives the rule of a layer with parameters; Bach et al. (2015), eq. 58 and 60."""
    relevance = start(model, x, target) * model(x)[0, target]
    passed = list(steps(model, x))
    first = next(layer for layer, _ in passed if list(layer.parameters()))
    for layer, at in reversed(passed):
        if isinstance(layer, nn.MaxPool2d):
            below = torch.zeros(at.numel(), dtype=torch.float64)
            for share, window in zip(relevance, windows(layer, at.shape[1:])):
                below[window[at.flatten()[window].argmax()]] += share
            relevance = below
        elif isinstance(layer, nn.AvgPool2d):
            relevance = epsilon_rule(matrix(layer, at.shape[1:]), at.flatten(), relevance)
        elif list(layer.parameters()):
            chosen = rule(layer, layer is first)
            relevance = chosen(matrix(layer, at.shape[1:]), at.flatten(), relevance)
    return relevance.view_as(x)[0]


RULES = {
    lrp_epsilon: lambda layer, first: epsilon_rule,
    lrp_alpha_beta: lambda layer, first: alpha_beta_rule,
    lrp_composite: lambda layer, first: (
        flat_rule if first else epsilon_rule if isinstance(layer, nn.Linear) else alpha_beta_rule
    ),
}


@by_hand
@pytest.mark.parametrize("baseline", [0.0, 0.4, "tensor"])
def test_deeplift_is_the_rescale_rule_by_hand(name, baseline, device):
    model, x, y = built(name)
    if baseline == "tensor":
        baseline = images(3, (2, 6, 6), seed=5, dtype=torch.float64)
        baseline[:, :, 2:4] = x[:, :, 2:4]  # where nothing changes, the gradient counts
    before = torch.as_tensor(baseline, dtype=x.dtype).broadcast_to(x.shape)
    wanted = [deeplift_by_hand(model, x[i : i + 1], y[i], before[i : i + 1]) for i in range(3)]
    if isinstance(baseline, torch.Tensor):
        baseline = baseline.to(device)
    found = deeplift(model.to(device), x.to(device), y.to(device), baseline=baseline)
    assert_same(found.cpu(), torch.stack(wanted))


@by_hand
@lrp
def test_lrp_is_its_rules_by_hand(name, lrp, device):
    model, x, y = built(name)
    wanted = [lrp_by_hand(model, x[i : i + 1], y[i], RULES[lrp]) for i in range(3)]
    assert_same(lrp(model.to(device), x.to(device), y.to(device)).cpu(), torch.stack(wanted))


@pytest.mark.parametrize("beta", [0.0, 0.5, 3.0])
def test_alpha_and_beta_by_hand(beta):
    model, x, y = built("average")
    y = model(x).argmax(1)
    rule = partial(alpha_beta_rule, alpha=1 + beta, beta=beta)
    wanted = [lrp_by_hand(model, x[i : i + 1], y[i], lambda layer, first: rule) for i in range(3)]
    assert_same(lrp_alpha_beta(model, x, y, alpha=1 + beta, beta=beta), torch.stack(wanted))


# ---------------------------------------------------------------- other libraries, where they are right


def pooled_apart(activation=nn.ReLU):
    """Where a max-pooling touches an activation, captum's hook on one of them does not count: not so here."""
    with local_seed(0):
        return nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3),
            activation(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Linear(32, CLASSES),
        )


ACTIVATIONS = (nn.ReLU, nn.LeakyReLU, nn.ELU, nn.Sigmoid, nn.Tanh, nn.Softplus)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("baseline", [0.0, -0.3])
def test_deeplift_is_captums(activation, baseline):
    model, x, y = lively(pooled_apart(activation)).eval(), images(), targets()
    theirs = [
        captum.attr.DeepLift(model).attribute(one[None], torch.full_like(one[None], baseline), target=t)
        for one, t in zip(x, y)
    ]
    assert_same(deeplift(model, x, y, baseline=baseline), torch.cat(theirs).detach(), 1e-5)


SAME = {  # two ways to write an activation
    "clamp": (lambda x: x.clamp(min=0), F.relu),
    "clamp in place": (lambda x: x.clone().clamp_(min=0), F.relu),
    "clamp_min": (lambda x: torch.clamp_min(x, 0), F.relu),
    "clamp at a tensor": (lambda x: x.clamp(min=torch.zeros(())), F.relu),
    "clip": (lambda x: x.clip(0, 0.5), lambda x: F.hardtanh(x, 0, 0.5)),
    "PReLU": (lambda x: F.prelu(x, torch.full((x.shape[1],), 0.2)), lambda x: F.leaky_relu(x, 0.2)),
    "logsigmoid": (F.logsigmoid, lambda x: -F.softplus(-x)),
    "hardsigmoid": (F.hardsigmoid, lambda x: F.relu6(x + 3) / 6),
    "softsign": (F.softsign, None),
    "tanhshrink": (F.tanhshrink, lambda x: x - torch.tanh(x)),
    "softshrink": (F.softshrink, lambda x: F.relu(x - 0.5) - F.relu(-x - 0.5)),
    "hardshrink": (F.hardshrink, None),
}


@pytest.mark.parametrize("name", SAME)
def test_deeplift_of_an_activation_does_not_depend_on_how_it_is_written(name):
    x, y = images(), targets()
    written, other = (Then(call) for call in SAME[name])
    model, same = (lively(pooled_apart(lambda step=step: step)).eval() for step in (written, other))
    maps, change = deeplift(model, x, y), logits(model, x, y) - logits(model, torch.zeros_like(x), y)
    torch.testing.assert_close(maps.sum((1, 2, 3)), change, atol=1e-4, rtol=1e-4)
    if SAME[name][1]:
        torch.testing.assert_close(maps, deeplift(same, x, y), atol=1e-4, rtol=1e-3)


def test_deeplift_of_a_network_that_reuses_its_relus_is_captums_of_one_that_does_not():
    with local_seed(0):
        model = lively(torchvision.models.resnet18(num_classes=CLASSES)).eval()
    model.maxpool = nn.AvgPool2d(3, 2, 1)
    x, y = images(2, (3, 64, 64)), targets(2)
    theirs = captum.attr.DeepLift(with_relu_modules(model)).attribute(x, torch.zeros_like(x), target=y)
    assert_same(deeplift(model, x, y), theirs.detach(), 1e-4)


def test_lrp_epsilon_of_a_network_without_biases_is_captums():
    model = without_biases(lively(pooled_apart()))
    del model[1]
    model, x, y = model.double().eval(), images(dtype=torch.float64), targets()
    for module in model:
        module.rule = EpsilonRule(1e-6)
    theirs = captum.attr.LRP(model).attribute(x, target=y)
    assert_same(lrp_epsilon(model, x, y), theirs.detach(), 1e-4)


def by_zennit(model, x, y, canonizer):
    composite = EpsilonAlpha2Beta1Flat(zero_params="bias", canonizers=[canonizer])
    leaf = x.clone().requires_grad_()
    with composite.context(model.eval()) as changed:
        out = changed(leaf).gather(1, y[:, None])
        return torch.autograd.grad(out, leaf, out.detach())[0]


def vgg11_bn():
    features = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["A"], batch_norm=True)
    return nn.Sequential(features, nn.Flatten(), nn.Linear(512, CLASSES))


def resnet(name):
    return partial(torchvision.models.get_model, name, weights=None, num_classes=CLASSES)


@pytest.mark.parametrize(
    "build, canonizer, side",
    [
        pytest.param(vgg11_bn, SequentialMergeBatchNorm, 32, id="vgg11_bn", marks=pytest.mark.weekly),
        pytest.param(resnet("resnet18"), ResNetCanonizer, 64, id="resnet18"),
        pytest.param(resnet("resnet50"), ResNetCanonizer, 64, id="resnet50", marks=pytest.mark.weekly),
    ],
)
def test_lrp_composite_is_zennits(build, canonizer, side):
    with local_seed(0):
        model = lively(build()).eval()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 1e-12  # zennit leaves it in a merged norm
    x, y = images(2, (3, side, side)), targets(2)
    assert_same(lrp_composite(model, x, y), by_zennit(model, x, y, canonizer()), 1e-3)


# ---------------------------------------------------------------- no size is absolute


def homogeneous(name):
    """The network without biases, images and classes whose logit is not 0."""
    model, x, y = built(name)
    if name == "norm":
        model[1].running_mean.zero_()
    return without_biases(model), x, y


def rescaled(model, factors):
    """The layers with parameters multiplied by a factor each."""
    layers = [module for module in model if isinstance(module, (nn.Conv2d, nn.Linear))]
    with torch.no_grad():
        for layer, factor in zip(layers, factors):
            layer.weight.mul_(factor)
    return model


FACTORS = {
    "small": (1e-4, 1e-4, 1e-4),
    "tiny": (1e-9, 1e-9, 1e-9),
    "large": (1e5, 1e5, 1e5),
    "up and down": (1e-8, 1e5, 3e-2),
    "the first": (255.0,),
}


@by_hand
@method
@pytest.mark.parametrize("factors", FACTORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_any_size_give_the_same_map(name, method, factors, dtype, device):
    model, x, y = homogeneous(name)
    model, x, y = model.to(device, dtype), x.to(device, dtype), y.to(device)
    wanted, value = method(model, x, y), logits(model, x, y)
    grown = logits(rescaled(model, FACTORS[factors]), x, y) / value
    tolerance = 1e-9 if dtype == torch.float64 else 1e-3
    assert_same(method(model, x, y) / grown[:, None, None, None], wanted, tolerance)


@by_hand
@method
@pytest.mark.parametrize("factor", [255.0, 1e-6])
def test_images_of_any_size_give_the_same_map(name, method, factor):
    """The first layer, biases and all, undoes what was done to the images."""
    model, x, y = built(name)
    wanted = method(model, x, y)
    next(m for m in model if isinstance(m, (nn.Conv2d, nn.Linear))).weight.data.div_(factor)
    assert_same(method(model, x * factor, y), wanted, 1e-9)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_deeplift_of_weak_and_strong_signals_adds_up(activation, scale):
    """Where activations bend at a size of their own and signals are far from it."""
    model, x, y = lively(pooled_apart(activation)).eval(), images(), targets()
    rescaled(model, (scale, scale, 1.0))
    single = deeplift(model, x, y)
    model, x = model.double(), x.double()
    maps, change = deeplift(model, x, y), logits(model, x, y) - logits(model, torch.zeros_like(x), y)
    assert ((maps.sum((1, 2, 3)) - change).abs() < 1e-12 * maps.abs().sum((1, 2, 3)) + 1e-15).all()
    assert_same(single.double(), maps, 1e-3)


def test_a_large_bias_does_not_hide_that_deeplift_misses_the_change():
    model = ready(REFUSED_BY_DEEPLIFT["relu by a mask"])
    nn.init.constant_(model[-1].bias, 1e3)
    with pytest.raises(ValueError, match="misses f"):
        deeplift(model, images(), targets(), baseline=images(seed=5))


def test_lrp_epsilon_is_zennits_with_its_scale_of_a_layer():
    model, x, y = built("overlapping")
    stabiliser = Stabilizer(0.25, norm_scale=True)

    def rule(context, name, module):
        return Epsilon(stabiliser, "bias") if isinstance(module, (nn.Conv2d, nn.Linear)) else None

    leaf = x.clone().requires_grad_()
    relu = {module: Pass() for module in model if isinstance(module, nn.ReLU)}
    with Composite(lambda context, name, module: relu.get(module) or rule(context, name, module)).context(model) as m:
        out = m(leaf).gather(1, y[:, None])
        (theirs,) = torch.autograd.grad(out, leaf, out.detach())
    assert_same(lrp_epsilon(model, x, y, epsilon=0.25), theirs)


def deep(gain=0.2, layers=14):
    """A network whose activations fade from layer to layer, to 1e-12 of what they were."""
    with local_seed(0):
        convs = [nn.Conv2d(3 if i == 0 else 8, 8, 3, padding=1, bias=False) for i in range(layers)]
        for conv in convs:
            nn.init.kaiming_normal_(conv.weight).data.mul_(gain)
        head = nn.Linear(8, CLASSES, bias=False)
    steps = [step for conv in convs for step in (conv, nn.ReLU())]
    return nn.Sequential(*steps, nn.AdaptiveAvgPool2d(1), nn.Flatten(), head)


@method
def test_relevance_arrives_however_weak_the_activations(method):
    model, x, y = deep(), images(), targets()
    value = logits(model, x, y)
    assert value.abs().max() < 1e-8
    share = method(model, x, y).sum((1, 2, 3)) / value
    assert ((share - 1).abs() < (0.3 if method is lrp_alpha_beta or method is lrp_composite else 1e-2)).all()


@lrp
@pytest.mark.weekly
def test_relevance_arrives_in_a_deep_network_with_new_weights(lrp):
    with local_seed(0):
        model = without_biases(torchvision.models.inception_v3(weights=None, num_classes=CLASSES, init_weights=False))
    x, y = images(1, (3, 80, 80)), targets(1)
    value = logits(model, x, y)
    assert value.abs().max() < 1e-6 and lrp(model, x, y).sum().item() == pytest.approx(value.item(), rel=0.1)


def exploding():
    """Where biases open the units, layer after layer, and signals all but cancel."""
    model = deep(1.0, 8)
    for number, layer in enumerate(model):
        if isinstance(layer, nn.Conv2d) and number:
            layer.weight.data.sub_(layer.weight.data.mean((1, 2, 3), keepdim=True)).mul_(1e-3)
            layer.bias = nn.Parameter(torch.ones(8))
    return model


def test_relevance_that_grows_without_bound_is_refused_and_the_images_are_named():
    model, x, y = exploding(), images(8), targets(8)
    with pytest.raises(ValueError, match=r"overflows in 8 of 8 images \(0, 1, 2, 3, 4, \.\.\.\).*Take lrp_composite"):
        lrp_epsilon(model, x, y)
    for way in (lrp_composite, partial(lrp_epsilon, zero_params=None)):
        assert way(model, x, y).isfinite().all()


def test_one_image_whose_relevance_grows_does_not_stop_the_others():
    """A unit of the trained network is all but at zero: what it hands down is many times the logit."""
    model = nn.Sequential(nn.Flatten(), nn.Linear(2, 1), nn.ReLU(), nn.Linear(1, 1))
    with torch.no_grad():
        for layer, weight, bias in ((model[1], [[1.0, -1.0]], 1.0), (model[3], [[1.0]], 0.0)):
            layer.weight.copy_(torch.tensor(weight)), layer.bias.fill_(bias)
    x = torch.tensor([[1.0, 1.0 - 6e-8], [2.0, 1.0], [3.0, 1.0]]).view(3, 1, 1, 2)
    y = torch.zeros(3, dtype=torch.int64)
    maps = lrp_epsilon(model, x, y, epsilon=1e-9)
    assert maps[0].abs().sum() > 1e6 and torch.equal(maps[1:], lrp_epsilon(model, x[1:], y[1:], epsilon=1e-9))
    with pytest.raises(ValueError, match=r"in 1 of 1 images \(0\)"):
        lrp_epsilon(model, x[:1], y[:1], epsilon=1e-9)


@pytest.mark.weekly
def test_on_squeezenet_in_the_default_cascade_the_sum_is_the_logit_or_lrp_says_no():
    model = models.load("squeezenet_imagenet")
    x = photographs.normalize(photographs.whole(96)[0][:2])
    y, refused = model(x).argmax(1), 0
    for _, copied in randomization.cascading(model, seed=0):
        try:
            total = lrp_epsilon(copied, x, y).sum((1, 2, 3))
            torch.testing.assert_close(total, logits(copied, x, y), rtol=0.2, atol=0)
        except ValueError as error:
            assert "overflows in 2 of 2 images" in str(error)
            refused += 1
    assert 3 <= refused <= 6


@pytest.mark.parametrize("batch_size, seen", [(None, [6]), (1, [2, 2, 2]), (4, [4, 2]), (5, [4, 2]), (6, [6])])
def test_a_pass_of_deeplift_counts_images_and_baselines(batch_size, seen):
    model, x, y = cnn().double(), images(dtype=torch.float64), targets()
    whole, sizes = deeplift(model, x, y), []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    assert_same(deeplift(model, x, y, batch_size=batch_size), whole)
    assert sizes[-len(seen) :] == seen


# ---------------------------------------------------------------- what they add up to


def of_torchvision(name, side, **options):
    return lambda: (torchvision.models.get_model(name, weights=None, num_classes=CLASSES, **options), side)


WIDE = {
    "squeezenet1_1": of_torchvision("squeezenet1_1", 64),
    "resnet18": of_torchvision("resnet18", 64),
    "densenet121": of_torchvision("densenet121", 64),
    "mobilenet_v2": of_torchvision("mobilenet_v2", 64),
    "googlenet": of_torchvision("googlenet", 64, init_weights=False),
    "inception_v3": of_torchvision("inception_v3", 75, init_weights=False, transform_input=True),
    "the book's cnn": lambda: (models.cnn(), None),
    "the book's cnn with batch-norm": lambda: (models.cnn(batch_norm=True), None),
    "the book's mlp": lambda: (models.mlp(), None),
}


BOOKS = [name for name in WIDE if name.startswith("the book's")]


def wide(name):
    with local_seed(0):
        model, side = WIDE[name]()
    shape = (1, 28, 28) if side is None else (3, side, side)
    x = images(2, shape, seed=3)  # other numbers than the weights
    model = lively(model).eval()
    return model, x, model(x).argmax(1)


@pytest.mark.parametrize("name", weekly_but("resnet18", *BOOKS, of=WIDE))
@pytest.mark.parametrize("baseline", [0.0, 0.5])
def test_deeplift_adds_up_to_the_change_of_the_logit(name, baseline):
    model, x, y = wide(name)
    maps = deeplift(model, x, y, baseline=baseline)
    change = logits(model, x, y) - logits(model, torch.full_like(x, baseline), y)
    assert ((maps.sum((1, 2, 3)) - change).abs() < 1e-5 * maps.abs().sum((1, 2, 3))).all()


LRP_NETWORKS = sorted(set(WIDE) - {"densenet121", "mobilenet_v2"})


@pytest.mark.parametrize("name", weekly_but("resnet18", *BOOKS, of=LRP_NETWORKS))
@pytest.mark.parametrize("lrp", (lrp_alpha_beta, lrp_composite), ids=lambda method: method.__name__)
def test_lrp_adds_up_to_the_logit(name, lrp):
    model, x, y = wide(name)
    torch.testing.assert_close(lrp(model, x, y).sum((1, 2, 3)), logits(model, x, y), rtol=2e-2, atol=1e-3)


@pytest.mark.parametrize("name", BOOKS)
def test_lrp_epsilon_adds_up_to_the_logit_on_the_books_networks(name):
    model, x, y = wide(name)
    model, x = model.double(), x.double()
    total = lrp_epsilon(model, x, y, epsilon=1e-9).sum((1, 2, 3))
    torch.testing.assert_close(total, logits(model, x, y), rtol=1e-3, atol=1e-3)


def test_lrp_epsilon_adds_up_to_the_logit_on_the_trained_squeezenet():
    model = models.load("squeezenet_imagenet")
    x = photographs.normalize(photographs.whole(96)[0][:3])
    y = model(x).argmax(1)
    torch.testing.assert_close(lrp_epsilon(model, x, y).sum((1, 2, 3)), logits(model, x, y), rtol=1e-3, atol=0)
    lost = lrp_epsilon(model, x, y, zero_params=None).sum((1, 2, 3)) / logits(model, x, y)
    assert ((lost - 1).abs() > 0.01).any()


def test_on_black_lrp_epsilon_loses_what_reaches_units_that_see_only_zeros():
    """Their bias alone made them active, and it has no share."""
    model = nn.Sequential(nn.Conv2d(1, 1, 2, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(2, 1)).double()
    with torch.no_grad():
        for module, weight, bias in ((model[0], 1.0, 0.5), (model[3], 1.0, 0.0)):
            module.weight.fill_(weight), module.bias.fill_(bias)
    x = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
    x[..., 2:] = 0.25
    total = lrp_epsilon(model, x, torch.tensor([0]), epsilon=1e-12).sum()
    assert model(x).item() == 2 and total.item() == pytest.approx(1.5)


# ---------------------------------------------------------------- limits and symmetries


@pytest.mark.parametrize("name", ["mlp", "max-pooling", "overlapping", "norm"])
def test_lrp_epsilon_with_biases_tends_to_input_x_gradient(name):
    model, x, y = built(name)
    limit = input_x_gradient(model, x, y)
    gaps = [
        (lrp_epsilon(model, x, y, epsilon=epsilon, zero_params=None) - limit).abs().max()
        for epsilon in (1e-2, 1e-4, 1e-9)
    ]
    assert gaps[0] > gaps[1] > gaps[2] and gaps[2] < 1e-6 * limit.abs().max()


@pytest.mark.parametrize("name", ["mlp", "max-pooling", "overlapping"])
def test_without_biases_lrp_epsilon_and_deeplift_are_input_x_gradient(name):
    model, x, y = built(name)
    assert (deeplift(model, x, y) - input_x_gradient(model, x, y)).abs().max() > 0.01
    assert (lrp_epsilon(model, x, y) - input_x_gradient(model, x, y)).abs().max() > 0.01
    without_biases(model)
    wanted = input_x_gradient(model, x, y)
    assert_same(deeplift(model, x, y), wanted)
    assert_same(lrp_epsilon(model, x, y, epsilon=1e-12), wanted, 1e-6)
    assert (deeplift(model, x, y, baseline=0.3) - wanted).abs().max() > 0.01


def test_of_a_linear_model_deeplift_and_lrp_are_known():
    model, x, y = linear().double(), images(dtype=torch.float64), targets()
    weights = model[1].weight[y].view_as(x).detach()
    assert_same(deeplift(model, x, y, baseline=0.2), (x - 0.2) * weights)
    shares = x * weights / (x * weights).sum((1, 2, 3), keepdim=True)
    value = logits(model, x, y)[:, None, None, None]
    assert_same(lrp_epsilon(model, x, y, epsilon=1e-12), shares * value)
    assert_same(lrp_composite(model, x, y), (value / x[0].numel()).expand_as(x), 1e-6)


def test_deeplift_from_the_image_itself_is_zero():
    x = images()
    assert not deeplift(cnn(), x, targets(), baseline=x).any()


class Functional(nn.Module):
    """The network of `modules()` with every step but its layers as a function."""

    def __init__(self, layers, in_place):
        super().__init__()
        self.layers, self.in_place = layers, in_place

    def relu(self, x):
        return F.relu(x, inplace=True) if self.in_place else torch.relu(x)

    def forward(self, x):
        conv1, norm, conv2, conv3, last = self.layers
        x = F.max_pool2d(self.relu(norm(conv1(x))), 2)
        left, right = self.relu(conv2(x)), conv3(x)
        if self.in_place:
            right += left
        else:
            right = right + left
        x = torch.cat((self.relu(right), left), 1)
        return last(torch.flatten(F.avg_pool2d(x, 2), 1))


class Modules(Functional):
    def __init__(self, layers, reuse):
        super().__init__(layers, False)
        relu = nn.ReLU(inplace=True)
        self.relus = nn.ModuleList([relu if reuse else nn.ReLU() for _ in range(3)])
        self.max_pool, self.avg_pool = nn.MaxPool2d(2), nn.AvgPool2d(2)

    def forward(self, x):
        conv1, norm, conv2, conv3, last = self.layers
        x = self.max_pool(self.relus[0](norm(conv1(x))))
        left = self.relus[1](conv2(x))
        x = torch.cat((self.relus[2](left + conv3(x)), left), 1)
        return last(self.avg_pool(x).flatten(1))


@method
def test_a_step_may_be_a_module_or_a_function_in_place_or_reused(method):
    with local_seed(0):
        layers = nn.ModuleList(
            [
                nn.Conv2d(3, 4, 3),
                nn.BatchNorm2d(4),
                nn.Conv2d(4, 4, 2),
                nn.Conv2d(4, 4, 2),
                nn.Linear(32, CLASSES),
            ]
        )
    lively(layers).double()
    x, y = images(dtype=torch.float64), targets()
    plain = method(Modules(layers, reuse=False), x, y)
    for other in (Modules(layers, reuse=True), Functional(layers, False), Functional(layers, True)):
        assert_same(method(other, x, y), plain)


@method
def test_images_are_cut_into_passes(method, monkeypatch):
    model, x, y = cnn().double(), images(7, dtype=torch.float64), targets(7)
    whole = method(model, x, y)
    monkeypatch.setattr(passes, "VALUES_A_PASS", 3 * x[0].numel())
    assert_same(method(model, x, y), whole)


class Then(nn.Module):
    """`change(network(x))`, or anything that a test does with a network."""

    def __init__(self, change, *layers):
        super().__init__()
        self.change, self.layers = change, nn.ModuleList(layers)

    def forward(self, x):
        return self.change(x, *self.layers)


@lrp
def test_lrp_lets_go_of_its_passes(lrp, monkeypatch):
    made = weakref.WeakSet()

    class Watched(lrp_rules._Call):
        def __init__(self, call):
            super().__init__(call)
            made.add(self)

    monkeypatch.setattr(lrp_rules, "_Call", Watched)
    lrp(models.load("cnn_digits"), images(shape=(1, 28, 28)), targets())
    gc.collect()
    assert len(made) == 0


@lrp
def test_constants_multiplied_or_added_to_the_input_take_no_relevance(lrp):
    network, x, y = cnn().double(), images(dtype=torch.float64), targets()
    mean, std = torch.tensor([0.4, 0.5, 0.3]).view(3, 1, 1).double(), 0.3
    for change in (
        lambda x, network: network((x - mean) / std),
        lambda x, network: network((-mean + x).mul_(1 / std)),
        lambda x, network: network(1 / std * x.sub(mean)),
    ):
        assert_same(lrp(Then(change, network), x, y), lrp(network, (x - mean) / std, y))


@lrp
def test_a_norm_is_merged_into_the_layer_that_it_follows_when_run(lrp):
    """Whatever comes first in the list of modules."""

    def run(x, norm, last, first):
        return last(F.relu(norm(first(x))).flatten(1))

    with local_seed(0):
        first, norm, last = nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(400, CLASSES)
    model = Then(run, norm, last, first)
    lively(model).double().eval()
    fused = nn.utils.fusion.fuse_conv_bn_eval(first, norm)
    by_hand = nn.Sequential(fused, nn.ReLU(), nn.Flatten(), last)
    x, y = images(dtype=torch.float64), targets()
    assert_same(lrp(model, x, y), lrp(by_hand, x, y))


# ---------------------------------------------------------------- what is refused


NORMS_OF_WEIGHTS = {
    "weight norm": nn.utils.parametrizations.weight_norm,
    "weight norm by a hook": nn.utils.weight_norm,
    "spectral norm": nn.utils.parametrizations.spectral_norm,
    "spectral norm by a hook": nn.utils.spectral_norm,
}


@pytest.mark.parametrize("lrp", LRP, ids=lambda method: method.__name__)
@pytest.mark.parametrize("name", NORMS_OF_WEIGHTS)
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lrp_of_a_layer_whose_weights_are_computed_is_that_of_its_weights(lrp, name):
    with local_seed(0), torch.no_grad():  # a weight that a hook has left with its graph cannot be copied
        model = headed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
        model(images(2))
        lively(model)
        NORMS_OF_WEIGHTS[name](model[0]), NORMS_OF_WEIGHTS[name](model[3])
        model.train()(images(2)), model.eval()
        model(images(2))
    plain = headed(nn.Conv2d(3, 4, 3), deepcopy(model[1]), nn.ReLU(), nn.Conv2d(4, 4, 3)).eval()
    plain(images(2))
    with torch.no_grad():
        for at in (0, 3, 5):
            plain[at].weight.copy_(model[at].weight), plain[at].bias.copy_(model[at].bias)
    x, y = images(), targets()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    torch.testing.assert_close(lrp(model, x, y), lrp(plain, x, y), atol=1e-4, rtol=1e-4)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    torch.testing.assert_close(model(x), plain(x))


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


class Scripted(nn.Module):
    def forward(self, x):
        return torch.relu(x)


def with_own_forward():
    layer = nn.Conv2d(3, 4, 3)
    layer.forward = lambda x: F.conv2d(x, layer.weight).square()
    return layer


def with_hook():
    layer = nn.Conv2d(3, 4, 3)
    layer.register_forward_hook(lambda module, inputs, output: output.square())
    return layer


def normed_twice():
    conv, norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def run(x, conv, norm):
        x = conv(x)
        return norm(x) + x

    return lively(Then(run, conv, norm))


def headed(*layers):
    return nn.Sequential(*layers, nn.Flatten(), nn.LazyLinear(CLASSES))


def attention():
    return nn.TransformerEncoderLayer(12, 2, 16, batch_first=True)


REFUSED_BY_ALL = {
    "layer norm": lambda: headed(nn.LayerNorm(12)),
    "group norm": lambda: headed(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4)),
    "instance norm": lambda: headed(nn.InstanceNorm2d(3)),
    "norm by the batch": lambda: headed(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False)),
    "attention": lambda: headed(Then(lambda x, layer: layer(x[:, 0]), attention())),
    "softmax": lambda: nn.Sequential(headed(), nn.Softmax(1)),
    "log softmax": lambda: nn.Sequential(headed(), nn.LogSoftmax(1)),
    "product": lambda: headed(Then(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid())),
    "square": lambda: headed(Then(lambda x: x**2)),
    "reciprocal": lambda: headed(Then(lambda x: 1 / (x + 9))),
    "constant over signal": lambda: headed(Then(lambda x: torch.ones(3, 1, 1).div(x + 9))),
    "where": lambda: headed(nn.Conv2d(3, 4, 3), Then(lambda x: torch.where(x > 0, x, 0))),
    "largest of two": lambda: headed(Then(lambda x: torch.maximum(x, x.flip(3)))),
    "largest of all": lambda: headed(nn.Conv2d(3, 4, 3), Then(lambda x: x.amax((2, 3)))),
    "absolute": lambda: headed(OwnConv(3, 4, 3)),
    "norm of a vector": lambda: headed(Then(lambda x: F.normalize(x.flatten(1)))),
    "weights from the image": lambda: headed(Then(lambda x: x @ x.mT)),
    "written into a part": lambda: headed(nn.Conv2d(3, 4, 3), Then(lambda x: (x[:, 0].exp_(), x)[1])),
    "own forward": lambda: headed(with_own_forward()),
    "hook that changes": lambda: headed(with_hook()),
}
REFUSED_BY_LRP = {
    "clamp": lambda: headed(nn.Conv2d(3, 4, 3), Then(lambda x: x.clamp(min=0))),
    "gelu": lambda: headed(nn.Conv2d(3, 4, 3), nn.GELU()),
    "sigmoid": lambda: headed(nn.Conv2d(3, 4, 3), nn.Sigmoid()),
    "norm after nothing": lambda: headed(nn.BatchNorm2d(3)),
    "norm after relu": lambda: headed(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=True), nn.BatchNorm2d(4)),
    "norm after concatenation": lambda: headed(Then(lambda x: torch.cat((x, x), 1)), nn.BatchNorm2d(6)),
    "norm of one of two uses": lambda: headed(normed_twice()),
    "difference": lambda: headed(Then(lambda x, conv: x[..., 1:, 1:] - conv(x), nn.Conv2d(3, 3, 2))),
    "weighed sum": lambda: headed(Then(lambda x: torch.add(x, x.flip(3), alpha=2))),
    "layer run twice": lambda: headed(Then(lambda x, conv: conv(conv(x)), nn.Conv2d(3, 3, 3))),
    "layer as a function": lambda: headed(Then(lambda x: F.conv2d(x, torch.ones(1, 3, 3, 3)))),
    "matrix product": lambda: headed(Then(lambda x: x @ torch.ones(12, 12))),
    "layer of another kind": lambda: headed(nn.ConvTranspose2d(3, 4, 3)),
    "rounded": lambda: headed(Then(lambda x: torch.div(x, 0.1, rounding_mode="trunc") + x * 1)),
    "scripted": lambda: headed(nn.Conv2d(3, 4, 3), torch.jit.script(Scripted())),
}
REFUSED_BY_DEEPLIFT = {
    "clamp at a signal": lambda: headed(Then(lambda x: x.clamp(max=x.mean((2, 3), keepdim=True)))),
    "relu by a mask": lambda: headed(nn.Conv2d(3, 4, 3), Then(lambda x: x * (x > 0))),
    "chosen by value": lambda: headed(Then(lambda x: x.flatten(1).gather(1, x.flatten(1).argsort(1)))),
    "noise": lambda: headed(Then(lambda x: F.dropout(x))),
    "batch in another place": lambda: headed(Then(lambda x: torch.relu(x.transpose(0, 1)).transpose(0, 1))),
    "cut off": lambda: headed(Then(lambda x, conv: conv(x) + x.detach().square(), nn.Conv2d(3, 3, 1))),
}


def ready(build):
    with local_seed(0):
        model = build().eval()
        model(images(2))
    return model


@method
@pytest.mark.parametrize("name", REFUSED_BY_ALL)
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_step_without_a_rule_is_refused(method, name):
    with passes.checked(), pytest.raises(ValueError, match="has no rule for a step of this model"):
        method(ready(REFUSED_BY_ALL[name]), images(), targets())


@lrp
@pytest.mark.parametrize("name", REFUSED_BY_LRP)
@pytest.mark.filterwarnings("ignore")
def test_lrp_refuses(lrp, name):
    with (
        passes.checked(),
        pytest.raises(ValueError, match="no rule for a step|layers that run once|output changes by it"),
    ):
        lrp(ready(REFUSED_BY_LRP[name]), images(), targets())


@lrp
def test_lrp_refuses_what_cannot_be_copied(lrp):
    model = cnn()
    model.kept = torch.ones(2, requires_grad=True) * 2
    with pytest.raises(ValueError, match="this model cannot be copied"):
        lrp(model, images(), targets())


@pytest.mark.parametrize("name", REFUSED_BY_DEEPLIFT)
def test_deeplift_refuses(name):
    with (
        passes.checked(),
        pytest.raises(ValueError, match="misses f|keeps the images of a batch apart|no rule for a step"),
    ):
        deeplift(ready(REFUSED_BY_DEEPLIFT[name]), images(), targets(), baseline=images(seed=5))


def test_an_overflow_is_an_error():
    """The contributions of each unit cancel: relevance grows a millionfold from layer to layer."""
    layers = [nn.Linear(2, 2) for _ in range(9)]
    with torch.no_grad():
        for layer in layers:
            layer.weight.copy_(torch.tensor([[1.0, -1.0], [-1.0, 1.0]])), layer.bias.fill_(1.0)
    with pytest.raises(ValueError, match="relevance overflows in 1 of 1 images"):
        lrp_epsilon(nn.Sequential(nn.Flatten(), *layers), torch.ones(1, 1, 1, 2), torch.tensor([0]))


BAD_OPTIONS = {
    "epsilon of 0": (lrp_epsilon, {"epsilon": 0.0}, "epsilon must be positive"),
    "negative epsilon": (lrp_epsilon, {"epsilon": -1e-6}, "epsilon must be positive"),
    "epsilon NaN": (lrp_epsilon, {"epsilon": float("nan")}, "epsilon must be positive"),
    "infinite epsilon": (lrp_epsilon, {"epsilon": float("inf")}, "epsilon must be positive"),
    "epsilon in words": (lrp_epsilon, {"epsilon": "small"}, "epsilon must be positive, got 'small'"),
    "no alpha": (lrp_alpha_beta, {"alpha": None}, "alpha - beta must be 1"),
    "other parameters": (lrp_epsilon, {"zero_params": "weight"}, "must be 'bias' or None"),
    "alpha alone": (lrp_alpha_beta, {"alpha": 1.0}, "alpha - beta must be 1"),
    "beta alone": (lrp_alpha_beta, {"beta": 2.0}, "alpha - beta must be 1"),
    "negative beta": (lrp_alpha_beta, {"alpha": 0.5, "beta": -0.5}, "beta not negative"),
    "alpha NaN": (lrp_alpha_beta, {"alpha": float("nan")}, "alpha - beta must be 1"),
    "baseline of another size": (deeplift, {"baseline": torch.zeros(3, 5, 5)}, "does not fit images"),
    "baseline NaN": (deeplift, {"baseline": float("nan")}, "baseline has NaN"),
    "infinite baseline": (deeplift, {"baseline": torch.tensor(float("inf"))}, "baseline has NaN or infinite"),
}


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_an_option_out_of_range_raises(name):
    function, options, message = BAD_OPTIONS[name]
    with pytest.raises(ValueError, match=message):
        function(cnn(), images(), targets(), **options)
