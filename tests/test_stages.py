"""Which pieces are stages, in which order, and what is listed as not randomised."""

import pytest
import torch
from networks import CLASSES, cnn, images, weekly_but
from randomized import RESNET, STAGES, assert_untouched, changed, example, names, scheme, small, snapshot
from saliency_sanity.book import models
from saliency_sanity.device import local_seed
from saliency_sanity.randomization import Redraws, cascading, plan
from torch import nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d


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
def test_a_shared_weight_is_randomised_with_the_stage_nearest_to_the_output(scheme, bias, by_running):
    model, x = Tied(bias), images(1) if by_running else None
    found = plan(model, example=x)
    assert found.stages == [("c", ("c",)), ("b", ("b",)), *([("a", ("a.bias",))] if bias else [])]
    assert found.shared == ["a.weight"] and not found.unused
    copies = dict(scheme(model, seed=0, example=x))
    assert copies["b"].a.weight is copies["b"].b.weight
    assert "a.weight" in changed(snapshot(model), copies["b"])


@scheme
def test_named_stages_that_share_a_weight_raise(scheme):
    with pytest.raises(ValueError, match="stages 'b' and 'a' share the weight 'a.weight'.*Name one of them"):
        scheme(Tied(True), seed=0, stages=["b", "a"])


class InAndOut(nn.Module):
    """The layer at the end has the weight of the one at the beginning and nothing else; or it is that layer."""

    def __init__(self, same):
        super().__init__()
        self.embed, self.hidden = nn.Linear(432, 432, bias=False), nn.Linear(432, 432)
        self.head = self.embed if same else nn.Linear(432, 432, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x):
        return self.head(self.hidden(self.embed(x.flatten(1)).relu()).relu())


@pytest.mark.parametrize("stages", [None, "layers"])
@pytest.mark.parametrize("by_running", [True, False])
def test_a_layer_that_shares_all_it_has_stands_where_it_is_called(by_running, stages):
    found = plan(InAndOut(False), example=images(1) if by_running else None, stages=stages)
    assert names(found) == "head hidden" and found.shared == ["embed.weight"]


class Encoded(nn.Module):
    def __init__(self, positions):
        super().__init__()
        self.mix, self.positions = nn.Conv2d(3, 3, 1), positions

    def forward(self, x):
        return (self.mix(x) + self.positions(x)).relu()


class Coat(nn.Module):
    """Blocks that have one encoding of positions for all."""

    def __init__(self):
        super().__init__()
        self.positions = nn.Conv2d(3, 3, 3, padding=1)
        self.blocks = nn.ModuleList(Encoded(self.positions) for _ in range(3))
        self.head = nn.Linear(432, 5)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x.flatten(1))


def test_a_module_in_several_blocks_is_randomised_with_the_last_of_them():
    model = Coat()
    found = plan(model, example=images(1))
    assert found.stages == [
        ("head", ("head",)),
        ("blocks.2", ("blocks.2",)),
        ("blocks.1", ("blocks.1.mix",)),
        ("blocks.0", ("blocks.0.mix",)),
    ]
    assert "positions.weight" in found.shared
    before, copies = snapshot(model), cascading(model, seed=0, example=images(1))
    moved = [{name.rpartition(".")[0] for name in changed(before, copy)} for _, copy in copies]
    one = {f"blocks.{number}.positions" for number in range(3)} | {"positions"}
    assert moved[0] == {"head"} and moved[1] - one == {"head", "blocks.2.mix"} and moved[1] & one
    assert moved[3] - one == {"head", *(f"blocks.{number}.mix" for number in range(3))}


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


# ---------------------------------------------------------------- networks inside networks


class Block(nn.Module):
    """A skip round two convolutions."""

    def __init__(self, width, norm=nn.Identity):
        super().__init__()
        self.first, self.second, self.norm = nn.Conv2d(width, width, 1), nn.Conv2d(width, width, 1), norm(width)

    def forward(self, x):
        return self.norm(x + self.second(self.first(x).relu())).relu()


class Chain(nn.Module):
    """Parts in a row, held as attributes."""

    def __init__(self, *parts):
        super().__init__()
        for number, part in enumerate(parts):
            setattr(self, f"part{number}", part)

    def forward(self, x):
        for part in self.children():
            x = part(x).relu()
        return x


class Crown(nn.Module):
    """A backbone, which may answer with a dictionary, and a head."""

    def __init__(self, backbone, *, wrapped=False):
        super().__init__()
        self.body, self.head, self.wrapped = backbone, nn.Linear(4, CLASSES), wrapped

    def forward(self, x):
        found = {"features": self.body(x)} if self.wrapped else [self.body(x)]
        return self.head((found["features"] if self.wrapped else found[0]).mean((2, 3)))


def row(*kinds):
    parts = {"conv": lambda: nn.Conv2d(4, 4, 1), "block": lambda: Block(4), "norm": lambda: nn.BatchNorm2d(4)}
    return Chain(nn.Conv2d(3, 4, 1), *(parts[kind]() for kind in kinds))


@pytest.mark.parametrize(
    ("build", "expected"),
    [
        (lambda: Crown(row("conv", "conv", "norm", "conv")), "head body.part4 body.part2 body.part1 body.part0"),
        (lambda: Crown(row("block", "block")), "head body.part2 body.part1 body.part0"),
        (lambda: Crown(row("block", "block"), wrapped=True), "head body.part2 body.part1 body.part0"),
        (lambda: Crown(nn.Sequential(nn.Conv2d(3, 4, 1), Block(4))), "head body.1 body.0"),
        (lambda: Crown(Chain(nn.Conv2d(3, 4, 1), Block(4, nn.BatchNorm2d))), "head body.part1 body.part0"),
        (lambda: Crown(Chain(Chain(nn.Conv2d(3, 4, 1), Block(4)), Chain(Block(4), Block(4)))),
         "head body.part1.part1 body.part1.part0 body.part0.part1 body.part0.part0"),
        (lambda: nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in "12345"), row("block", "block"), Crown(Block(4))),
         "6 5.part2 5.part1 5.part0 4 3 2 1 0"),
        (lambda: nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in "12345"), row(*["conv"] * 5), nn.Flatten()),
         "5.part5 5.part4 5.part3 5.part2 5.part1 5.part0 4 3 2 1 0"),
        (lambda: nn.Sequential(*(nn.Conv2d(3, 3, 1) for _ in "12345"), row("conv", "conv"), nn.Flatten()),
         "5 4 3 2 1 0"),
    ],
)  # fmt: skip
def test_networks_inside_are_opened_and_what_a_skip_bridges_stays_whole(build, expected):
    with local_seed(0):
        model = build()
    assert names(plan(model, example=images(1))) == expected
    assert names(plan(model)) == expected


def test_a_backbone_of_torchvision_has_the_stages_it_has_alone():
    backbone = STAGES["resnet18"][0]()
    backbone.fc = nn.Identity()
    expected = " ".join(["head", *(f"backbone.{name}" for name in RESNET.split()[1:])])
    for x in (None, example(64)):
        assert names(plan(Mine(backbone), example=x)) == expected


class Mine(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone, self.head = backbone, nn.Linear(512, 5)

    def forward(self, x):
        return self.head(self.backbone(x))


class Encoder(nn.Module):
    def __init__(self):
        super().__init__()
        self.place = nn.Parameter(torch.randn(1, 10, 8))
        self.layer = nn.ModuleList([nn.TransformerEncoderLayer(8, 2, 16, batch_first=True) for _ in range(3)])

    def forward(self, x):
        x = x + self.place
        for layer in self.layer:
            x = layer(x)
        return x


class Vision(nn.Module):
    def __init__(self):
        super().__init__()
        with local_seed(0):
            self.head, self.token = nn.Linear(8, CLASSES), nn.Parameter(torch.randn(1, 1, 8))
            self.encoder, self.embed = Encoder(), nn.Conv2d(3, 8, 4, 4)

    def forward(self, x):
        x = self.embed(x).flatten(2).transpose(1, 2)
        return self.head(self.encoder(torch.cat([self.token.expand(len(x), -1, -1), x], 1))[:, 0])


def test_tokens_and_position_tables_are_stages_in_the_order_of_use():
    model = Vision().eval()
    stages = "head encoder.layer.2 encoder.layer.1 encoder.layer.0 encoder.place token embed"
    found = plan(model, example=images(1))
    assert names(found) == stages and not found.unused
    assert found.fallback == ["encoder.place", "token"]
    assert names(plan(model, stages=["token", "encoder.place"], example=images(1))) == "token encoder.place"


# ---------------------------------------------------------------- what is listed


class Listed(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 4, 3), FrozenBatchNorm2d(4), nn.Linear(4, CLASSES)
        self.register_buffer("mean", torch.full((1, 3, 1, 1), 0.5))
        self.register_buffer("never", torch.ones(3))
        self.factor = torch.full((4, 1, 1), 2.0)

    def forward(self, x):
        return self.head((self.norm(self.conv(x - self.mean)) * self.factor).relu().mean((2, 3)))


def test_constants_are_listed_and_a_frozen_norm_is_none():
    found = plan(Listed().eval(), example=images(1))
    assert [stage.members for stage in found.stages] == [("head",), ("conv", "norm")]
    assert found.constant == ["mean", "factor"]
    assert set(found.kept) == {f"norm.{name}" for name in ("weight", "bias", "running_mean", "running_var")}


def test_what_stays_by_an_option_is_listed():
    draws = Redraws(small(), scheme="cascading", seed=0, bias="keep", affine="keep", batch_norm="keep")
    moments = ("weight", "bias", "running_mean", "running_var")
    assert set(draws.plan.kept) == {"9.bias", "7.bias", "5.bias", "0.bias", *(f"1.{name}" for name in moments)}
    assert draws.plan.batch_norm == "keep"
