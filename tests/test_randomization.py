"""Randomised copies: the right stages in order, the right new weights, and the caller's model untouched."""

from copy import deepcopy
from functools import partial

import pytest
import torch
import torchvision
from networks import CLASSES, SHAPE, cnn, images, lively, weekly_but
from saliency_sanity import randomization
from saliency_sanity.book import models
from saliency_sanity.device import generator, local_seed
from saliency_sanity.inference import evaluating
from saliency_sanity.randomization import SCHEMES, cascading, independent, plan
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations, weight_norm

scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)

INCEPTION = (
    "fc Mixed_7c Mixed_7b Mixed_7a Mixed_6e Mixed_6d Mixed_6c Mixed_6b Mixed_6a Mixed_5d Mixed_5c Mixed_5b "
    "Conv2d_4a_3x3 Conv2d_3b_1x1 Conv2d_2b_3x3 Conv2d_2a_3x3 Conv2d_1a_3x3"
)  # the list of the paper
RESNET = "fc layer4.1 layer4.0 layer3.1 layer3.0 layer2.1 layer2.0 layer1.1 layer1.0 conv1"
SQUEEZENET = "classifier.1 " + " ".join(f"features.{i}" for i in (12, 11, 10, 9, 7, 6, 4, 3, 0))
STAGES = {
    "inception_v3": (
        lambda: torchvision.models.inception_v3(weights=None, init_weights=False),
        75,
        INCEPTION,
    ),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 64, RESNET),
    "squeezenet": (models.squeezenet, 64, SQUEEZENET),
    "cnn": (models.cnn, 28, "logits fc1 conv2 conv1"),
    "cnn with batch-norm": (lambda: models.cnn(batch_norm=True), 28, "logits fc1 conv2 conv1"),
    "mlp": (models.mlp, 28, "logits fc3 fc2 fc1"),
}


def example(side):
    return torch.rand(1, 1 if side == 28 else 3, side, side, generator=generator(0))


def names(found):
    return " ".join(stage.name for stage in found.stages)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def changed(before, after):
    """Names of the tensors that differ."""
    return {name for name, tensor in tensors(after).items() if not torch.equal(tensor, before[name])}


def assert_untouched(model, before):
    assert not changed(before, model)


def small(seed=0):
    """Two layers of one shape, a batch-norm, and biases that are not zero."""
    with local_seed(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(54, 54),
            nn.ReLU(),
            nn.Linear(54, 54),
            nn.ReLU(),
            nn.Linear(54, CLASSES),
        )
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.bias)
    return lively(model, seed)


SMALL = ["9", "7", "5", "0"]


# ---------------------------------------------------------------- stages


@pytest.fixture(scope="module", params=weekly_but(*set(STAGES) - {"inception_v3"}, of=STAGES))
def known(request):
    build, side, expected = STAGES[request.param]
    return build(), example(side), expected


def test_stages_from_the_output_to_the_input(known):
    model, x, expected = known
    assert names(plan(model)) == expected  # by torch.fx
    assert names(plan(model, example=x)) == expected  # by running


def test_the_number_of_stages_of_the_papers_network():
    assert [len(STAGES[name][2].split()) for name in STAGES] == [17, 10, 10, 4, 4, 4]


def test_planning_leaves_model_and_random_state_as_they_were():
    model = cnn().train()
    model[1].eval()
    before, modes, random = snapshot(model), [m.training for m in model.modules()], torch.get_rng_state()
    for x in (None, images()):
        plan(model, example=x)
        plan(model, example=x, stages="layers")
    assert_untouched(model, before)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(random, torch.get_rng_state())


def test_parameters_that_never_run_are_left_alone_and_listed():
    build, side, _ = STAGES["inception_v3"]
    model = build()
    found = plan(model, example=example(side))
    assert found.unused and all(name.startswith("AuxLogits.") for name in found.unused)
    assert set(found.unused) == {n for n, _ in model.named_parameters() if n.startswith("AuxLogits.")}
    before = snapshot(model)
    *_, (_, last) = cascading(model, seed=0, init="truncated_normal", affine="init")
    same = {n for n, _ in model.named_parameters()} - changed(before, last)
    assert same == set(found.unused)


def test_a_norm_joins_the_layer_before_it():
    stages = plan(models.cnn(batch_norm=True)).stages
    assert [stage.members for stage in stages] == [
        ("logits",),
        ("fc1",),
        ("conv2", "norm2"),
        ("conv1", "norm1"),
    ]


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(4),
        nn.GroupNorm(2, 4),
        nn.LayerNorm([4, 12, 12]),
        nn.RMSNorm([4, 12, 12]),
        nn.InstanceNorm2d(4, affine=True),
    ],
)
def test_every_kind_of_norm_joins(norm):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), norm, nn.Conv2d(4, 2, 1), nn.Flatten(), nn.Linear(288, 5))
    assert [s.members for s in plan(model).stages] == [("4",), ("2",), ("0", "1")]


def test_a_norm_without_weights_joins_too_and_forgets_its_statistics():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(576, 5))
    model[1].running_mean.fill_(3.0)
    for x in (None, images(1)):
        (_, _), (_, copy) = cascading(model, seed=0, example=x)
        assert not copy[1].running_mean.any()
        (_, copy), (_, _) = cascading(model, seed=0, example=x)
        assert (copy[1].running_mean == 3).all()


def test_single_layers():
    build, side, _ = STAGES["resnet18"]
    for x in (None, example(side)):
        found = plan(build(), stages="layers", example=x)
        first = "fc layer4.1.conv2 layer4.1.conv1 layer4.0.downsample.0 layer4.0.conv2 layer4.0.conv1 "
        assert names(found).startswith(first)
        assert len(found.stages) == 21 and found.stages[1].members == ("layer4.1.conv2", "layer4.1.bn2")
    assert names(plan(cnn(), stages="layers")) == names(plan(cnn()))


def test_a_list_of_names_is_taken_as_given():
    found = plan(cnn(), stages=["4", "11", "1"])
    assert [(s.name, s.members) for s in found.stages] == [("4", ("4",)), ("11", ("11",)), ("1", ("1",))]
    assert [name for name, _ in cascading(cnn(), seed=0, stages=["4", "11"])] == ["4", "11"]
    whole = plan(STAGES["resnet18"][0](), stages=["layer4", "layer1"])
    assert names(whole) == "layer4 layer1"


class Shuffled(nn.Module):
    """Registered in an order that is not the order of execution, used as modules and as functions."""

    def __init__(self, peek=False):
        super().__init__()
        with local_seed(0):
            self.head = nn.Linear(8, CLASSES)
            self.middle = nn.ModuleList([nn.Linear(10, 8), nn.Linear(20, 10)])
            self.first = nn.Conv2d(3, 20, 12)
        self.peek = peek

    def forward(self, x):
        if self.peek:  # which is no use of the weights
            x = x.to(self.head.weight.device, self.head.weight.dtype)
            assert self.head.weight.shape[0] == CLASSES and self.middle[0].bias.numel() == 8
        x = F.conv2d(x, self.first.weight, self.first.bias).flatten(1).relu()
        x = self.middle[1](x).relu()
        x = x @ self.middle[0].weight.T + self.middle[0].bias
        return F.linear(x.relu(), **dict(weight=self.head.weight, bias=self.head.bias))


@pytest.mark.parametrize("peek", [False, True])
def test_the_order_is_that_of_execution_also_where_weights_are_used_as_functions(peek):
    assert names(plan(Shuffled(peek), example=images(1))) == "head middle.0 middle.1 first"


def test_torch_fx_sees_the_same_order():
    assert names(plan(Shuffled())) == "head middle.0 middle.1 first"


def test_a_wrapper_around_one_network_is_opened():
    class Wrapper(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network((x - 0.5) / 0.25)

    model = Wrapper(STAGES["resnet18"][0]())
    assert names(plan(model)) == " ".join(f"network.{name}" for name in RESNET.split())
    assert names(plan(Wrapper(Wrapper(model)))) == names(plan(model)).replace("network.", "network." * 3)
    assert names(plan(Wrapper(cnn()))) == "network.11 network.9 network.4 network.0"


@scheme
@pytest.mark.parametrize(
    "wrap",
    [lambda m: nn.Sequential(nn.Flatten(), m), lambda m: nn.Sequential(nn.Sequential(nn.Flatten(), m))],
)
def test_a_linear_model_is_one_stage(scheme, wrap):
    model = wrap(nn.Linear(432, 5))
    before = snapshot(model)
    ((name, copy),) = scheme(model, seed=0)
    assert name.endswith("1") and changed(before, copy) == set(before)


def test_a_layer_alone_is_randomised_parameter_by_parameter():
    model = nn.Linear(10, 5)
    assert [name for name, _ in cascading(model, seed=0, init="truncated_normal", example=torch.rand(1, 10))] == [
        "bias",
        "weight",
    ]


# ---------------------------------------------------------------- the copies


@scheme
@pytest.mark.parametrize("use", ["all", "half", "error inside", "error in the loop"])
def test_the_callers_model_is_unchanged_after_any_use(scheme, use):
    model = small().train()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    model[9].weight.grad = torch.ones_like(model[9].weight)
    before, modes, random = snapshot(model), [m.training for m in model.modules()], torch.get_rng_state()
    identities = {name: id(tensor) for name, tensor in tensors(model).items()}
    copies = scheme(model, seed=0, example=images(1))
    if use == "all":
        assert [name for name, _ in copies] == SMALL
    elif use == "half":
        next(copies)
        copies.close()
    elif use == "error inside":
        with pytest.raises(ValueError, match="unknown stage"):
            scheme(model, seed=0, stages=["9", "nonsense"])
    else:
        with pytest.raises(KeyboardInterrupt):
            for _ in copies:
                raise KeyboardInterrupt
    assert_untouched(model, before)
    assert {name: id(tensor) for name, tensor in tensors(model).items()} == identities
    assert [m.training for m in model.modules()] == modes and not model[5].weight.requires_grad
    assert torch.equal(model[9].weight.grad, torch.ones_like(model[9].weight))
    assert torch.equal(random, torch.get_rng_state())


@scheme
def test_modes_and_flags_are_the_models_own(scheme):
    model = small().train()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    for _, copy in scheme(model, seed=0):
        assert [m.training for m in copy.modules()] == [m.training for m in model.modules()]
        assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in model.parameters()]
        assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in copy.parameters())


def members(model, stage):
    """Names of the tensors of a stage that change: all but the step counter of a norm that never stepped."""
    return {n for n in tensors(model) for m in stage.members if n.startswith(f"{m}.") and "num_batches" not in n}


def test_cascading_keeps_what_was_randomised_before():
    model, done = small(), set()
    before = snapshot(model)
    for stage, (name, copy) in zip(plan(model).stages, cascading(model, seed=0), strict=True):
        done |= members(model, stage)
        assert name == stage.name and changed(before, copy) == done


def test_independent_randomises_one_stage_at_a_time():
    model = small()
    before = snapshot(model)
    for stage, (name, copy) in zip(plan(model).stages, independent(model, seed=0), strict=True):
        assert name == stage.name and changed(before, copy) == members(model, stage)


def test_both_schemes_and_both_orders_give_a_stage_the_same_weights():
    model = small()
    alone = {name: copy for name, copy in independent(model, seed=3)}
    *_, (_, all_of_them) = cascading(model, seed=3)
    *_, (_, upwards) = cascading(model, seed=3, order="bottom_up")
    for stage in plan(model).stages:
        for name in members(model, stage):
            value = tensors(alone[stage.name])[name]
            assert torch.equal(value, tensors(all_of_them)[name])
            assert torch.equal(value, tensors(upwards)[name])


@scheme
def test_bottom_up_starts_at_the_input(scheme):
    model = small()
    before = snapshot(model)
    copies = list(scheme(model, seed=0, order="bottom_up"))
    assert [name for name, _ in copies] == SMALL[::-1]
    assert changed(before, copies[0][1]) == members(model, plan(model).stages[-1])


@scheme
def test_a_seed_sets_the_weights_whatever_the_global_random_state(scheme):
    torch.manual_seed(1)
    a = [snapshot(copy) for _, copy in scheme(small(), seed=0)]
    torch.manual_seed(2)
    random = torch.get_rng_state()
    b = [snapshot(copy) for _, copy in scheme(small(), seed=0)]
    c = [snapshot(copy) for _, copy in scheme(small(), seed=1)]
    assert torch.equal(random, torch.get_rng_state())
    for one, same, other in zip(a, b, c, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("init", ["reset", "truncated_normal", "uniform"])
def test_layers_of_one_shape_get_different_weights(init):
    *_, (_, copy) = cascading(small(), seed=0, init=init)
    both = torch.stack([copy[5].weight.flatten(), copy[7].weight.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.1
    assert not torch.equal(copy[5].bias, copy[7].bias)


@scheme
def test_a_copy_is_safe_to_keep(scheme):
    """What is done with a copy reaches neither the caller's model nor what was randomised in another."""
    model = small()
    before = snapshot(model)
    kept = []
    for _, copy in scheme(model, seed=0):
        kept.append((copy, snapshot(copy)))
    for copy, then in kept:
        assert_untouched(copy, then)
    kept[1][0].double()
    assert_untouched(kept[0][0], kept[0][1])
    assert_untouched(kept[2][0], kept[2][1])
    adam = torch.optim.SGD(kept[-1][0].train().parameters(), lr=1.0)
    kept[-1][0](images()).sum().backward()
    adam.step()
    assert_untouched(model, before)
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(kept[0][0][9].parameters(), kept[-1][0][9].parameters()):
        assert p.data_ptr() != q.data_ptr()


def test_buffers_are_never_shared():
    model = small()
    copies = [copy for _, copy in independent(model, seed=0)]
    for copy in copies:
        copy.train()(images())
    assert model[1].num_batches_tracked == 0
    assert [copy[1].num_batches_tracked.item() for copy in copies] == [1] * 4


@scheme
def test_a_copy_works_as_the_model_with_those_weights(scheme):
    """Its output is that of a new model which loads its state."""
    model, x = small(), images()
    for _, copy in scheme(model, seed=0):
        rebuilt = small(5)
        rebuilt.load_state_dict(copy.state_dict())
        assert torch.equal(copy.eval()(x), rebuilt.eval()(x))


@scheme
def test_types_and_devices_are_kept(scheme, device):
    model = small().double().to(device)
    for (_, copy), (_, single) in zip(scheme(model, seed=0), scheme(small(), seed=0), strict=True):
        for tensor, other in zip(tensors(copy).values(), tensors(single).values(), strict=True):
            assert tensor.device.type == device.type
            assert tensor.dtype == (torch.float64 if other.is_floating_point() else other.dtype)
        assert copy(images(dtype=torch.float64).to(device)).dtype == torch.float64


# ---------------------------------------------------------------- the new weights


def big():
    with local_seed(0):
        model = nn.Sequential(nn.Conv2d(3, 60, 12), nn.BatchNorm2d(60), nn.Flatten(), nn.Linear(60, 500))
        for parameter in model.parameters():
            nn.init.normal_(parameter, 0.5, 0.3)
    return lively(model)


def last(model, **options):
    *_, (_, copy) = cascading(model, seed=0, **options)
    return copy


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


# ---------------------------------------------------------------- unusual models


class Tied(nn.Module):
    def __init__(self, bias):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(432, 432, bias=bias) for _ in range(3))
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(x.flatten(1)).relu()).relu())


@scheme
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("by_running", [True, False])
def test_a_weight_shared_by_two_stages_raises(scheme, bias, by_running):
    with pytest.raises(ValueError, match="stages 'b' and 'a' share the weight 'a.weight'|share the weight"):
        scheme(Tied(bias), seed=0, example=images(1) if by_running else None)


def test_a_weight_shared_within_a_stage_stays_shared():
    model = nn.Sequential(nn.Sequential(), Tied(True), nn.Linear(432, 5))
    for _, copy in cascading(model, seed=0, stages=["2", "1"]):
        assert copy[1].a.weight is copy[1].b.weight
    assert not torch.equal(copy[1].a.weight, model[1].a.weight)
    assert not torch.equal(copy[1].a.weight, copy[1].c.weight)


def test_a_module_used_twice_is_one_stage():
    layer = nn.Conv2d(3, 3, 1)
    model = nn.Sequential(layer, nn.ReLU(), layer, nn.Flatten(), nn.Linear(432, 5))
    for x in (None, images(1)):
        *_, (name, copy) = cascading(model, seed=0, example=x)
        assert name == "0" and copy[0] is copy[2]


class Root(nn.Module):
    """A parameter that belongs to no layer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.linspace(1, 2, 3).view(3, 1, 1))
        self.conv, self.fc = nn.Conv2d(3, 2, 12), nn.Linear(2, CLASSES)

    def forward(self, x):
        return self.fc(self.conv(x * self.scale).flatten(1))


@scheme
def test_a_parameter_at_the_root_has_no_initialiser_but_can_be_drawn(scheme):
    model = Root()
    for x in (None, images(1)):
        assert names(plan(model, example=x)) == "fc conv scale"
        with pytest.raises(ValueError, match="'scale' belongs to no layer and has no initialiser"):
            list(scheme(model, seed=0, example=x))
        *_, (name, copy) = scheme(model, seed=0, example=x, init="truncated_normal")
        assert name == "scale" and 0 < copy.scale.abs().max() <= 0.02
    assert [name for name, _ in scheme(model, seed=0, stages=["fc", "conv"])] == ["fc", "conv"]


class Own(nn.Module):
    """A layer with weights and no `reset_parameters`."""

    def __init__(self, reset=None):
        super().__init__()
        self.kernel = nn.Parameter(torch.randn(432, 5, generator=generator(0)))
        if reset:
            self.reset_parameters = reset

    def forward(self, x):
        return x.flatten(1) @ self.kernel


@scheme
def test_a_layer_without_an_initialiser_raises_and_is_named(scheme):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Own())
    with pytest.raises(ValueError, match=r"'1' \(Own\) has no reset_parameters\(\)"):
        list(scheme(model, seed=0))
    for init in ("truncated_normal", "uniform", "permute"):
        before = snapshot(model)
        assert "1.kernel" in changed(before, dict(scheme(model, seed=0, init=init))["1"])


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


@scheme
def test_an_initialiser_that_does_nothing_raises_and_is_named(scheme):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Own(reset=lambda: None))
    with pytest.raises(ValueError, match=r"reset_parameters\(\) of '1' \(Own\) leaves its parameter 'kernel'"):
        list(scheme(model, seed=0))


def parametrized():
    return nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 12)), nn.Flatten(), nn.Linear(4, 5))


def spectral():
    return nn.Sequential(parametrizations.spectral_norm(nn.Conv2d(3, 4, 12)), nn.Flatten(), nn.Linear(4, 5))


@scheme
@pytest.mark.parametrize("build", [parametrized, spectral])
@pytest.mark.parametrize("stages", [None, "layers"])
def test_reparametrised_layers_are_drawn_right_or_refused(scheme, build, stages):
    model, x = build(), images()
    with pytest.raises(ValueError, match=r"'0.* \(Param.*\) has no reset_parameters|of '0' \(.*Conv2d\) leaves"):
        list(scheme(model, seed=0, stages=stages, example=x))
    before = snapshot(model)
    *_, (name, copy) = scheme(model, seed=0, stages=stages, example=x, init="uniform", std=0.3)
    expected = {n for n, _ in model.named_parameters() if n.startswith("0.")}
    assert name.startswith("0") and expected <= changed(before, copy)
    with evaluating(copy), evaluating(model):
        assert not torch.allclose(copy[0](x), model[0](x))
    assert_untouched(model, before)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm`")
@scheme
def test_the_old_weight_norm_is_refused(scheme):
    with pytest.raises(ValueError, match="cannot be copied with copy.deepcopy"):
        scheme(nn.Sequential(nn.Flatten(), weight_norm(nn.Linear(432, 5))), seed=0)


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


class Branches(nn.Module):
    """torch.fx cannot trace a decision that depends on the data."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(432, 8), nn.Linear(432, 8), nn.Linear(8, CLASSES)

    def forward(self, x):
        x = x.flatten(1)
        return self.c(self.a(x) if x.sum() > 1e9 else self.b(x))


@scheme
def test_a_model_that_cannot_be_traced_asks_for_an_example(scheme):
    with pytest.raises(ValueError, match=r"could not be traced \(TraceError\); pass a batch of inputs as example="):
        scheme(Branches(), seed=0)
    assert [name for name, _ in scheme(Branches(), seed=0, example=images(1))] == ["c", "b"]
    assert plan(Branches(), example=images(1)).unused == ["a.weight", "a.bias"]


def test_an_example_that_the_model_refuses_leaves_it_as_it_was():
    model = cnn().train()
    with pytest.raises(ValueError, match="cannot run on images of shape"):
        plan(model, example=images(1, (4, 12, 12)))
    assert all(module.training for module in model.modules())


def test_the_example_is_not_written_into():
    x = images(1)
    plan(nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(432, 5)), example=x)
    assert torch.equal(x, images(1))


def test_dropout_is_still_where_the_order_is_found():
    model = nn.Sequential(nn.Conv2d(3, 4, 12), nn.Dropout(), nn.Flatten(), nn.Linear(4, 5)).train()
    random = torch.get_rng_state()
    assert [name for name, _ in cascading(model, seed=0, example=images(1))] == ["3", "0"]
    assert torch.equal(random, torch.get_rng_state())


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(432, CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1))

    def __deepcopy__(self, memo):
        raise TypeError("this module holds an open file")


# ---------------------------------------------------------------- errors


@scheme
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "xavier"}, "unknown init 'xavier'; known: reset, truncated_normal, uniform, permute"),
        ({"bias": "none"}, "unknown bias 'none'; known: init, zero, keep"),
        ({"affine": "zero"}, "unknown affine 'zero'; known: reset, init, keep"),
        ({"batch_norm": "drop"}, "unknown batch_norm 'drop'; known: reset, keep, recalibrate"),
        ({"order": "random"}, "unknown order 'random'; known: top_down, bottom_up"),
        ({"std": 0}, "std must be a positive number or 'trained', got 0"),
        ({"std": -0.1}, "std must be a positive number"),
        ({"std": float("nan")}, "std must be a positive number"),
        ({"std": "fitted"}, "std must be a positive number or 'trained', got 'fitted'"),
        ({"std": None}, "std must be a positive number"),
        ({"batch_norm": "recalibrate"}, "needs calibration=, the images to measure"),
        ({"stages": ["9", "conv"]}, "unknown stage 'conv'; known: 0, 1, 5, 7, 9"),
        ({"stages": "blocks"}, "stages must be None, 'layers' or a list of module names, got 'blocks'"),
        ({"stages": [9]}, "stages must be None, 'layers' or a list of module names"),
        ({"stages": ["2"]}, "unknown stage '2'"),
        ({"stages": []}, "nothing to randomise"),
        ({"stages": ["9", "9"]}, "stage '9' is named twice"),
        ({"stages": ["5", "5.weight"]}, "unknown stage '5.weight'|share the weight"),
    ],
)
def test_options_that_do_not_fit_raise_at_once(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        scheme(small(), seed=0, **options)


@scheme
@pytest.mark.parametrize("seed", [None, 0.5, "0", [0]])
def test_a_seed_that_is_no_int_raises(scheme, seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        scheme(small(), seed=seed)


@scheme
@pytest.mark.parametrize("init", ["reset", "uniform", "permute"])
def test_weights_do_not_depend_on_the_layout_in_memory(scheme, init):
    plain, turned = cnn(), cnn().to(memory_format=torch.channels_last)
    pairs = zip(scheme(plain, seed=0, init=init), scheme(turned, seed=0, init=init), strict=True)
    for (name, one), (same, other) in pairs:
        assert name == same
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@scheme
def test_an_option_that_does_not_exist_raises(scheme):
    with pytest.raises(ValueError, match="unknown option .colour.; known: stages"):
        scheme(small(), seed=0, colour="red")


@scheme
def test_overlapping_stages_raise(scheme):
    with pytest.raises(ValueError, match="stages 'layer4' and 'layer4.0' share the weight"):
        scheme(STAGES["resnet18"][0](), seed=0, stages=["layer4", "layer4.0"])


@scheme
def test_a_model_without_weights_raises(scheme):
    with pytest.raises(ValueError, match="nothing to randomise"):
        scheme(nn.Sequential(nn.Flatten()), seed=0)


@scheme
def test_a_model_that_cannot_be_copied_raises(scheme):
    with pytest.raises(ValueError, match="cannot be copied with copy.deepcopy: this module holds an open file"):
        scheme(Uncopyable(), seed=0)


@scheme
def test_copies_made_in_inference_mode_can_be_explained_and_trained(scheme):
    model, x = small(), images()
    with torch.inference_mode():
        copies = [copy for _, copy in scheme(model, seed=0, batch_norm="recalibrate", calibration=x)]
    for copy, (_, expected) in zip(copies, scheme(model, seed=0, batch_norm="recalibrate", calibration=x)):
        assert not any(tensor.is_inference() for tensor in tensors(copy).values())
        assert_untouched(expected, snapshot(copy))
        copy.train()(x).sum().backward()


def test_a_deep_copy_of_a_copy_works():
    ((_, copy), *_) = cascading(small(), seed=0)
    again = deepcopy(copy)
    assert torch.equal(again.eval()(images()), copy.eval()(images()))
    assert SHAPE == images().shape[1:]


# ---------------------------------------------------------------- state outside parameters and buffers


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
