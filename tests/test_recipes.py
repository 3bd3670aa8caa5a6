"""The new values of a stage: their distribution, statistics of norms, and what has no initialiser of its own."""

from functools import partial

import pytest
import torch
from networks import CLASSES, images, lively
from randomized import assert_untouched, changed, last, scheme, small, snapshot, tensors
from saliency_sanity.book import models
from saliency_sanity.device import generator, local_seed
from saliency_sanity.inference import evaluating
from saliency_sanity.randomization import Redraws, cascading, independent, plan
from saliency_sanity.recipes import SILENT, recalibrate
from torch import nn
from torch.nn.utils import parametrizations, weight_norm
from torchvision.ops import FrozenBatchNorm2d


def big():
    with local_seed(0):
        model = nn.Sequential(nn.Conv2d(3, 60, 12), nn.BatchNorm2d(60), nn.Flatten(), nn.Linear(60, 500))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5, 0.3)
    return lively(model)


def test_reset_is_the_layers_own_initialiser():
    copy = last(big())
    for layer in (
        copy[0],
        copy[3],
    ):  # PyTorch's default: uniform, of width 1/sqrt(fan in), weights and biases
        bound = layer.weight[0].numel() ** -0.5
        for parameter in layer.parameters():
            assert 0.9 * bound < parameter.abs().max() <= bound
        assert layer.weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.03)


@pytest.mark.parametrize("std", [0.01, 0.5])
def test_truncated_normal_is_cut_at_two_standard_deviations(std):
    copy = last(big(), init="truncated_normal", std=std)
    for weight in (copy[0].weight, copy[3].weight):
        assert 1.9 * std < weight.abs().max() <= 2 * std
        assert weight.mean().abs() < 0.05 * std
        assert weight.std().item() == pytest.approx(0.8796 * std, rel=0.02)  # of the cut distribution


@pytest.mark.parametrize("std", [0.01, 0.5])
def test_uniform_has_the_standard_deviation_asked_for(std):
    copy = last(big(), init="uniform", std=std)
    for weight in (copy[0].weight, copy[3].weight):
        assert weight.std().item() == pytest.approx(std, rel=0.02)
        assert weight.abs().max() <= 3**0.5 * std * (1 + 1e-6)


def test_the_trained_standard_deviation_is_each_tensors_own():
    model = big()
    with torch.no_grad():
        model[3].weight.mul_(7)
    copy = last(model, init="uniform", std="trained")
    for index in (0, 3):
        for new, old in zip(copy[index].parameters(), model[index].parameters(), strict=True):
            rel = 0.02 if new.ndim > 1 else 0.3
            assert new.std().item() == pytest.approx(old.std(correction=0).item(), rel=rel)


def test_a_constant_tensor_has_no_spread_to_draw_from():
    model = big()
    nn.init.constant_(model[3].bias, 2.0)
    assert not last(model, init="truncated_normal", std="trained")[3].bias.any()


def test_permute_deals_out_the_trained_weights_anew():
    model = big()
    copy = last(model, init="permute", affine="init")
    for new, old in zip(copy.parameters(), model.parameters(), strict=True):
        assert not torch.equal(new, old)
        assert torch.equal(new.flatten().sort().values, old.flatten().sort().values)


@pytest.mark.parametrize("init", ["reset", "truncated_normal", "uniform", "permute"])
@pytest.mark.parametrize("bias", ["init", "zero", "keep"])
def test_biases_follow_become_zero_or_stay(init, bias):
    model = big()
    copy = last(model, init=init, bias=bias)
    for index in (0, 3):
        new, old = copy[index].bias, model[index].bias
        assert torch.equal(new, old) == (bias == "keep") and bool(new.any()) == (bias != "zero")
        assert not torch.equal(copy[index].weight, model[index].weight)


def test_a_lone_bias_follows_the_rule_for_biases():
    model = nn.Linear(10, 5)
    *_, (_, copy) = cascading(model, seed=0, init="uniform", bias="keep", example=torch.rand(1, 10))
    assert torch.equal(copy.bias, model.bias) and not torch.equal(copy.weight, model.weight)


@pytest.mark.parametrize("init", ["reset", "uniform"])
def test_the_affine_parameters_of_a_norm(init):
    model = big()
    reset, drawn, kept = (last(model, init=init, affine=affine)[1] for affine in ("reset", "init", "keep"))
    assert (reset.weight == 1).all() and not reset.bias.any()
    assert torch.equal(kept.weight, model[1].weight) and torch.equal(kept.bias, model[1].bias)
    if init == "uniform":
        assert 0 < drawn.weight.abs().max() < 0.02 and 0 < drawn.bias.abs().max() < 0.02
    else:
        assert (drawn.weight == 1).all() and not drawn.bias.any()


def test_the_statistics_of_a_norm_are_reset_or_kept():
    model = big()
    reset, kept = (last(model, batch_norm=choice)[1] for choice in ("reset", "keep"))
    assert not reset.running_mean.any() and (reset.running_var == 1).all()
    assert torch.equal(kept.running_mean, model[1].running_mean)
    assert torch.equal(kept.running_var, model[1].running_var)
    (_, first), _ = cascading(model, seed=0)  # not randomised yet
    assert torch.equal(first[1].running_mean, model[1].running_mean)


class Deep(nn.Module):
    """Norms inside blocks and beside layers."""

    def __init__(self):
        super().__init__()
        with local_seed(0):
            self.stem, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
            self.block = nn.Sequential(nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
            self.head = nn.Sequential(nn.Flatten(), nn.Linear(256, CLASSES))
        lively(self)

    def forward(self, x):
        return self.head(self.block(self.norm(self.stem(x)).relu()))


def statistics(model, norm, x):
    """Mean and unbiased variance of what `norm` reads in eval mode."""
    seen = []
    hook = norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    with evaluating(model), torch.no_grad():
        model(x)
    hook.remove()
    values = seen[0].transpose(0, 1).flatten(1)
    return values.mean(1), values.var(1)


@pytest.mark.parametrize("count", [40, 64, 65, 150])
def test_recalibrated_statistics_are_those_of_the_layers_input(count):
    model, x = Deep().train(), images(count) * 2 + 1
    before = snapshot(model)
    tolerance = {"rtol": 0.01 if count <= 64 else 0.05, "atol": 0.01 if count <= 64 else 0.05}
    for (name, copy), randomised in zip(
        cascading(model, seed=0, batch_norm="recalibrate", calibration=x),
        ((), ("block.1",), ("block.1", "norm")),
        strict=True,
    ):
        assert [m.training for m in copy.modules()] == [m.training for m in model.modules()]
        for norm in randomised:
            module = copy.get_submodule(norm)
            mean, variance = statistics(copy, module, x)
            torch.testing.assert_close(module.running_mean, mean, **tolerance)
            torch.testing.assert_close(module.running_var, variance, **tolerance)
            assert module.momentum == 0.1
        left = {"block.1", "norm"} - set(randomised)
        assert not {n for n in changed(before, copy) for other in left if n.startswith(other)}, name
    assert_untouched(model, before)
    assert torch.equal(x, images(count) * 2 + 1)


def test_independent_copies_are_recalibrated_where_they_were_randomised():
    model, x = Deep(), images(30)
    copies = dict(independent(model, seed=0, batch_norm="recalibrate", calibration=x))
    stem = copies["stem"]
    mean, variance = statistics(stem, stem.norm, x)
    torch.testing.assert_close(stem.norm.running_mean, mean)
    torch.testing.assert_close(stem.norm.running_var, variance)
    assert torch.equal(stem.block[1].running_mean, model.block[1].running_mean)


class Root(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 3).view(3, 1, 1))
        self.conv, self.fc = nn.Conv2d(3, 2, 12), nn.Linear(2, CLASSES)

    def forward(self, x):
        return self.fc(self.conv(x * self.scale).flatten(1))


@scheme
def test_a_lone_parameter_falls_back_on_the_trained_width(scheme):
    model = Root()
    for x in (None, images(1)):
        *_, (name, copy) = scheme(model, seed=0, example=x)
        assert name == "scale" and not torch.equal(copy.scale, model.scale)
        *_, (name, copy) = scheme(model, seed=0, example=x, init="truncated_normal")
        assert name == "scale" and 0 < copy.scale.abs().max() <= 0.02
        assert plan(model, example=x).fallback == ["scale"]
    assert [name for name, _ in scheme(model, seed=0, stages=["fc", "conv"])] == ["fc", "conv"]


class Wide(nn.Module):
    """One parameter, of a size that shows how it is drawn."""

    def __init__(self, values):
        super().__init__()
        self.table, self.head = nn.Parameter(values), nn.Linear(10, CLASSES)

    def forward(self, x):
        return self.head(x.flatten(1)[:, :10] + self.table.mean(0))


@pytest.mark.parametrize(
    ("values", "width"),
    [
        (3 + 0.2 * torch.randn(4000, 10, generator=generator(0)), 0.2),  # the deviation, not the size
        (torch.full((4000, 10), 0.3), 0.3),  # no deviation: the root mean square
        (torch.full((4000, 10), -0.1), 0.1),
        (torch.zeros(4000, 10), 0),
    ],
)
def test_what_has_no_initialiser_is_drawn_from_a_normal_of_the_trained_width(values, width):
    model = Wide(values)
    drawn = last(model, example=images(1)).table
    assert drawn.std().item() == pytest.approx(width, rel=0.02) and abs(drawn.mean()) <= 0.02 * width
    assert drawn.abs().max() > 3 * width or not width  # not cut at two deviations
    assert drawn.abs().gt(width).float().mean().item() == pytest.approx(0.317 if width else 0, abs=0.02)
    found = plan(model, example=images(1))
    assert found.fallback == ["table"] and found.kept == ([] if width else ["table"])


class Own(nn.Module):
    """A layer with weights and no `reset_parameters`."""

    def __init__(self):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(432, 5, generator=generator(0)))

    def forward(self, x):
        return x.flatten(1) @ self.kernel


@scheme
def test_a_layer_without_an_initialiser_falls_back(scheme):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Own())
    for init in ("reset", "truncated_normal", "uniform", "permute"):
        before = snapshot(model)
        copy = dict(scheme(model, seed=0, init=init))["1"]
        assert "1.kernel" in changed(before, copy)
    assert plan(model).fallback == ["1.kernel"]
    assert not Redraws(model, scheme="cascading", seed=0, init="uniform").plan.fallback


class Reassigns(nn.Linear):
    """An initialiser may put new parameters in the place of the old."""

    def reset_parameters(self):
        self.weight = nn.Parameter(torch.randn(5, 432))
        nn.init.zeros_(self.bias)


@scheme
def test_an_initialiser_may_make_new_parameters(scheme):
    model = nn.Sequential(nn.Flatten(), Reassigns(432, 5))
    nn.init.ones_(model[1].bias)
    before = snapshot(model)
    ((_, copy),) = scheme(model, seed=0)
    assert changed(before, copy) == {"1.weight", "1.bias"} and not copy[1].bias.any()
    assert_untouched(model, before)


def half(module):
    """An initialiser that reaches a part of the weights."""
    nn.init.ones_(module.kernel[:200])


@scheme
@pytest.mark.parametrize("initialise", [lambda module: None, half])
def test_what_an_initialiser_leaves_is_drawn(scheme, initialise):
    kind = type("Left", (Own,), {"reset_parameters": initialise})
    model = nn.Sequential(nn.Conv2d(3, 3, 1), kind())
    copy = dict(scheme(model, seed=0))["1"]
    reached = 200 if initialise is half else 0
    assert (copy[1].kernel[:reached] == 1).all() and torch.isfinite(copy[1].kernel).all()
    assert not (copy[1].kernel[reached:] == model[1].kernel[reached:]).any()
    assert copy[1].kernel[reached:].std().item() == pytest.approx(1, rel=0.1)
    assert plan(model).fallback == ["1.kernel"]


class PutsBack(nn.Linear):
    """An initialiser that loads what was learned elsewhere."""

    def reset_parameters(self):
        if not hasattr(self, "learned"):
            self.learned = torch.randn(5, 432, generator=generator(0))
        with torch.no_grad():
            self.weight.copy_(self.learned)
            self.bias.zero_()


@scheme
def test_a_stage_that_is_after_all_as_it_was_is_refused(scheme):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Flatten(), PutsBack(432, 5))
    with pytest.raises(ValueError, match="stage '2' cannot be randomised: '2.weight' has its trained values.*choose"):
        list(scheme(model, seed=0))
    assert len(list(scheme(model, seed=0, init="uniform"))) == 2


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 12)), nn.Flatten(), nn.Linear(4, 5))


def spectral():
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 12)), nn.Flatten(), nn.Linear(4, 5))


@scheme
@pytest.mark.parametrize("build", [parametrized, spectral])
@pytest.mark.parametrize("stages", [None, "layers"])
@pytest.mark.parametrize("options", [{}, {"init": "uniform", "std": 0.3}])
def test_reparametrised_layers_are_drawn_right(scheme, build, stages, options):
    model, x = build(), images()
    before = snapshot(model)
    *_, (name, copy) = scheme(model, seed=0, stages=stages, example=x, **options)
    expected = {n for n, _ in model.named_parameters() if n.startswith("0.")}
    assert name.startswith("0") and expected <= changed(before, copy)
    with evaluating(copy), evaluating(model):
        assert not torch.allclose(copy[0](x), model[0](x))
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@scheme
def test_the_old_weight_norm_is_drawn_right(scheme):
    """It keeps a product of its two parameters as an attribute, which belongs to the graph of a pass."""

    def build():
        return nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(432, 5)))

    model, x = build(), images()
    before = snapshot(model)
    ((_, copy),) = scheme(model, seed=0)
    assert changed(before, copy) == {"1.weight_g", "1.weight_v", "1.bias"}
    rebuilt = build()
    rebuilt.load_state_dict(copy.state_dict())
    assert torch.equal(copy(x), rebuilt(x))


# ---------------------------------------------------------------- frozen norms


class OwnFrozen(nn.Module):
    """Four buffers, as many libraries write it."""

    def __init__(self, width):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(width, generator=generator(1)) + 0.5)

    def forward(self, x):
        scale = self.weight * (self.running_var + 1e-5).rsqrt()
        return x * scale[:, None, None] + (self.bias - self.running_mean * scale)[:, None, None]


def torchvisions(width):
    norm = FrozenBatchNorm2d(width)
    norm.load_state_dict(OwnFrozen(width).state_dict())
    return norm


def frozen(norm):
    with local_seed(0):
        return nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.ReLU(), nn.Flatten(), nn.Linear(400, CLASSES)).eval()


FROZEN = pytest.mark.parametrize("norm", [torchvisions, OwnFrozen])


@FROZEN
def test_a_frozen_norm_joins_its_layer_and_is_reset(norm):
    model = frozen(norm)
    before = snapshot(model)
    (_, first), (_, copy) = cascading(model, seed=0, example=images(1))
    assert changed(before, first) == {"4.weight", "4.bias"} and changed(before, copy) == set(before)
    assert not copy[1].running_mean.any() and not copy[1].bias.any()
    assert (copy[1].running_var == 1).all() and (copy[1].weight == 1).all()
    assert_untouched(model, before)


@FROZEN
def test_a_frozen_norm_keeps_what_options_say(norm):
    model = frozen(norm)
    kept = last(model, affine="keep", batch_norm="keep", example=images(1))[1]
    assert all(torch.equal(old, new) for old, new in zip(model[1].buffers(), kept.buffers(), strict=True))
    drawn = last(model, affine="init", init="uniform", std=0.3, example=images(1))[1]
    assert 0 < drawn.weight.std() < 0.5 and not drawn.running_mean.any()


@FROZEN
@pytest.mark.parametrize("count", [20, 100])
def test_a_frozen_norm_is_recalibrated(norm, count):
    """Beyond 64 images in passes of one size, whose statistics are averaged."""
    model, x = frozen(norm), images(count) * torch.linspace(1, 3, count)[:, None, None, None] + 1
    copy = last(model, batch_norm="recalibrate", calibration=x, example=x[:1])
    passes = [statistics(copy, copy[1], part) for part in x.chunk(1 + (count > 64))]
    mean, variance = (torch.stack(moments).mean(0) for moments in zip(*passes))
    torch.testing.assert_close(copy[1].running_mean, mean)
    torch.testing.assert_close(copy[1].running_var, variance)
    assert not copy[1]._forward_pre_hooks


def test_an_initialiser_that_resets_statistics_leaves_those_that_are_kept():
    model = big()
    kept = last(model, affine="init", batch_norm="keep")[1]
    assert torch.equal(kept.running_mean, model[1].running_mean)
    assert torch.equal(kept.running_var, model[1].running_var)


# ---------------------------------------------------------------- which treatment of batch norm


def depthwise(seed=0):
    """Many depthwise convolutions, batch norms and ReLU6, with statistics as after training."""
    layers = [nn.Conv2d(3, 8, 1)]
    with local_seed(seed):
        for _ in range(7):
            pair = (nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1))
            layers += [part for conv in pair for part in (conv, nn.BatchNorm2d(8), nn.ReLU6())]
        model = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, CLASSES)).eval()
    recalibrate(model, [str(place) for place in range(len(model))], images(20))
    return model


def spread(model, x):
    """How far logits differ between images, in their own size."""
    with torch.no_grad():
        logits = model(x).double()
    return (logits - logits.mean(0)).abs().max() / logits.abs().max()


def test_statistics_are_recalibrated_where_resetting_them_silences_the_network(device):
    model, x = depthwise().to(device), images(4).to(device)
    silent = last(model, batch_norm="reset", example=x[:1])
    alive = last(model, example=x[:1])
    assert spread(silent, x) < SILENT < 0.01 < spread(alive, x)
    draws = Redraws(model, scheme="cascading", seed=0, example=x[:1])
    assert draws.recipe.batch_norm == draws.plan.batch_norm == "recalibrate"
    both = torch.cat([x[:1], x[:1].flip(-1)])
    expected = last(model, batch_norm="recalibrate", calibration=both, example=x[:1])
    assert_untouched(expected, snapshot(alive))
    measured = last(model, calibration=x, example=x[:1])
    assert_untouched(last(model, batch_norm="recalibrate", calibration=x), snapshot(measured))


def test_the_choice_does_not_depend_on_the_seed_and_draws_nothing():
    model, x, random = depthwise(), images(1), torch.get_rng_state()
    before = snapshot(model)
    assert {Redraws(model, scheme="independent", seed=s, example=x).recipe.batch_norm for s in range(3)} == {
        "recalibrate"
    }
    assert_untouched(model, before)
    assert torch.equal(random, torch.get_rng_state())


@pytest.mark.parametrize(
    "build", [small, partial(models.load, "cnn_bn_clothes"), partial(models.load, "pooled_clothes")]
)
def test_statistics_are_reset_where_that_works(build):
    model = build()
    x = images(2) if model[0].in_channels == 3 else images(2, (1, 28, 28)).abs()
    chosen = Redraws(model, scheme="cascading", seed=1, example=x)
    assert chosen.recipe.batch_norm == chosen.plan.batch_norm == "reset"
    for (_, one), (_, other) in zip(
        chosen.copies(), cascading(model, seed=1, batch_norm="reset", example=x), strict=True
    ):
        assert_untouched(one, snapshot(other))


@pytest.mark.parametrize("x", [None, torch.full((1, 3, 12, 12), 0.5)])
def test_without_an_image_that_tells_statistics_are_reset(x):
    assert Redraws(depthwise(), scheme="cascading", seed=0, example=x).recipe.batch_norm == "reset"


def test_a_norm_that_sees_one_number_a_channel_asks_for_more_images():
    model = nn.Sequential(nn.Conv2d(3, 4, 12), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, CLASSES)).eval()
    with pytest.raises(ValueError, match="one number a channel: give more images as calibration="):
        last(model, batch_norm="recalibrate", calibration=images(1))


# ---------------------------------------------------------------- networks of many kinds


class Scaled(nn.Module):
    """A block with a skip, a layer scale and a norm written by hand."""

    def __init__(self, width):
        super().__init__()
        self.conv, self.gamma = nn.Conv2d(width, width, 1), nn.Parameter(torch.rand(width, 1, 1))
        self.weight, self.eps = nn.Parameter(torch.rand(width)), 1e-6

    def forward(self, x):
        normed = x * (x.square().mean(1, keepdim=True) + self.eps).rsqrt() * self.weight[:, None, None]
        return x + self.gamma * self.conv(normed)


PARTS = [
    lambda w: nn.Conv2d(w, w, 3, padding=1),
    nn.BatchNorm2d,
    OwnFrozen,
    lambda w: nn.GroupNorm(2, w),
    lambda w: nn.ReLU(),
    lambda w: nn.PReLU(w),
    Scaled,
    lambda w: nn.Sequential(nn.Conv2d(w, w, 1, bias=False), nn.BatchNorm2d(w), nn.SiLU()),
    lambda w: parametrizations.weight_norm(nn.Conv2d(w, w, 1)),
]


def chance(seed):
    """A network of random parts, every float tensor of it moved away from its initial value."""
    with local_seed(seed):
        chosen = [PARTS[place](4) for place in torch.randint(len(PARTS), (6,)).tolist()]
        model = nn.Sequential(nn.Conv2d(3, 4, 1), *chosen, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, CLASSES))
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data += 0.1 + 0.3 * torch.rand_like(tensor)
    return model.eval()


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize(
    "options", [{}, {"init": "truncated_normal", "affine": "init"}, {"bias": "keep", "affine": "keep"}]
)
def test_nothing_that_runs_stays_as_trained_but_what_the_plan_says(seed, options):
    model, x = chance(seed), images(2)
    before = snapshot(model)
    draws = Redraws(model, scheme="cascading", seed=seed, example=x[:1], **options)
    *_, (_, copy) = draws.copies()
    stay = {n for n, t in tensors(copy).items() if t.is_floating_point() and torch.equal(t, before[n])}
    assert stay == {*draws.plan.kept, *draws.plan.unused, *draws.plan.constant}
    if not options:
        assert stay <= {name for name, value in before.items() if value.min() == value.max()}
    assert_untouched(model, before)


class Attends(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.attend = nn.MultiheadAttention(8, 2, batch_first=True)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x):
        x = self.layer(self.embed(x).flatten(2).transpose(1, 2))
        return self.head(self.attend(x, x, x, need_weights=False)[0].mean(1))


class Reads(nn.Module):
    def __init__(self):
        super().__init__()
        self.rnn, self.head = nn.LSTM(36, 7, num_layers=2, batch_first=True), nn.Linear(7, CLASSES)

    def forward(self, x):
        return self.head(self.rnn(x.transpose(1, 2).flatten(2))[0][:, -1])


@pytest.mark.parametrize(
    ("build", "stages", "expected"),
    [
        (Attends, None, "head attend layer embed"),
        (
            Attends,
            "layers",
            "head attend layer.linear2 layer.linear1 layer.self_attn embed",
        ),
        (Reads, None, "head rnn"),
        (Reads, "layers", "head rnn"),
    ],
)
@pytest.mark.parametrize("init", ["reset", "uniform"])
def test_attention_and_recurrent_networks(build, stages, expected, init):
    with local_seed(0):
        model = build().eval()
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.2, 0.5)
    before, x = snapshot(model), images()
    found = list(cascading(model, seed=0, stages=stages, init=init, affine="init", example=x[:1]))
    assert [name for name, _ in found] == expected.split()
    copy = found[-1][1]
    assert changed(before, copy) == set(before)
    rebuilt = build().eval()
    rebuilt.load_state_dict(copy.state_dict())
    torch.testing.assert_close(copy(x), rebuilt(x))
    torch.testing.assert_close(found[0][1](x), replaced(build, before, copy, "head", x))
    assert_untouched(model, before)


def replaced(build, trained, randomised, stage, x):
    """Output of the trained model with one stage from another."""
    model = build().eval()
    state = {n: randomised.state_dict()[n] if n.startswith(stage) else value for n, value in trained.items()}
    model.load_state_dict(state)
    return model(x)


class Waves(nn.Module):
    """A filter in the frequencies, with complex weights."""

    def __init__(self):
        super().__init__()
        self.filter = nn.Parameter(torch.randn(3, 12, 7, dtype=torch.complex64) + (1 - 2j))

    def forward(self, x):
        return torch.fft.irfft2(torch.fft.rfft2(x) * self.filter, s=(12, 12))


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("init", ["reset", "truncated_normal", "uniform", "permute"])
def test_complex_weights_are_drawn_too(init, inside):
    waves, std = Waves(), 0.1
    model = nn.Sequential(waves, nn.Flatten(), nn.Linear(432, CLASSES)) if inside else waves
    old = waves.filter.detach()
    *_, (_, copy) = cascading(model, seed=0, init=init, std=std, example=images(1) if inside else None)
    new = (copy[0] if inside else copy).filter.detach()
    assert new.dtype == old.dtype and not torch.equal(new, old)
    width = {"truncated_normal": 0.88 * std, "uniform": std}.get(init)
    for part in (torch.view_as_real(new)[..., 0], torch.view_as_real(new)[..., 1]):
        assert width is None or part.std().item() == pytest.approx(width, rel=0.1)
    if init == "permute":
        assert torch.equal(new.abs().flatten().sort()[0], old.abs().flatten().sort()[0])


class Rounded(nn.Module):
    def __init__(self):
        super().__init__()
        codes = torch.arange(-108, 108, dtype=torch.int8).view(2, 108)
        self.weight = nn.Parameter(codes, requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.float() / 100)


def test_weights_of_whole_numbers_are_refused():
    model = nn.Sequential(nn.Flatten(), nn.Linear(432, 108), Rounded())
    with pytest.raises(ValueError, match="'2.weight' holds weights of type torch.int8"):
        list(cascading(model, seed=0, example=images(1)))
