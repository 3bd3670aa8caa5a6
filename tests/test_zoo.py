"""The zoo: every cell of some networks on every run, of all weekly; that its checks can fail; and the stored table."""

import copy
import math
import re
from functools import partial
from itertools import product
from pathlib import Path

import build_book
import pytest
import torch
import zoo
import zoo_page
import zoo_references as references
from bs4 import BeautifulSoup
from saliency_sanity import saliency
from torch import nn
from zennit.composites import EpsilonAlpha2Beta1Flat
from zennit.core import Stabilizer
from zoo_networks import NETWORKS, network

ROOT = Path(__file__).parent.parent
# Small ones of different kinds: residual, concatenating, gated, token mixing, windowed, with a cache, not wrapped.
ALWAYS = [
    "DenseNet",
    "EfficientNet v2",
    "ViT",
    "Swin v2",
    "ConvMixer",
    "CaiT",
    "ResNet (transformers)",
    "ViT (transformers), not wrapped",
]
SMALL = "ResNet (transformers)"  # of ReLU, with skips and batch norms
each_network = pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in ALWAYS else pytest.mark.weekly) for name in NETWORKS]
)
STORED = zoo_page.read(ROOT)


@pytest.fixture
def small() -> zoo.Subject:
    return zoo.subject(SMALL)


@each_network
def test_every_cell_is_right_or_refused_and_as_stored(name):
    rows = [zoo_page.Row(*line) for line in zoo.rows(name, zoo.cells(name))]
    assert not [row for row in rows if row.outcome not in (zoo.RIGHT, zoo.REFUSED)]
    stored = {row.check: (row.outcome, row.says) for row in STORED if row.network == name}
    assert {row.check: (row.outcome, row.says) for row in rows} == stored, "run: python scripts/zoo.py and its name"


# The checks can fail


def spoilt(subject: zoo.Subject, monkeypatch, method: str, call) -> zoo.Cell:
    """The cell of a method that does something else."""
    monkeypatch.setitem(zoo.METHODS, method, (call, zoo.METHODS[method][1]))
    return zoo.explained(subject, method)


@pytest.mark.parametrize(
    ("method", "call"),
    [
        ("gradient", saliency.input_x_gradient),
        ("integrated_gradients", partial(saliency.integrated_gradients, steps=2)),
        ("smoothgrad", saliency.gradient),
        ("guided_backprop", saliency.gradient),
        ("guided_backprop", saliency.deconvnet),
        ("deeplift", saliency.input_x_gradient),
        ("deeplift", partial(saliency.integrated_gradients, steps=500)),  # it adds up, too
        ("lrp_composite", saliency.input_x_gradient),
        ("lrp_composite", saliency.lrp_epsilon),
        ("lrp_composite", saliency.lrp_alpha_beta),  # in the first layer and the last
        ("occlusion", partial(saliency.occlusion, window=23, stride=20)),
        ("gradient", lambda *given: saliency.gradient(*given) * torch.nan),
    ],
)
def test_a_map_that_is_another_method_s_is_wrong(small, monkeypatch, method, call):
    assert spoilt(small, monkeypatch, method, call).outcome == zoo.WRONG


def test_the_second_lrp_is_that_of_zennit():
    """On a network that zennit reads as it is, with biases left out and a stabiliser that follows the layer's size."""
    subject = zoo.subject("SqueezeNet 1.1")
    ours = {"epsilon": Stabilizer(1e-6, norm_scale=True), "stabilizer": Stabilizer(1e-6, norm_scale=True)}
    with EpsilonAlpha2Beta1Flat(zero_params="bias", **ours).context(subject.model) as prepared:
        at = subject.images.clone().requires_grad_()
        logits = references.logits_of(prepared, at, subject.targets)
        (expected,) = torch.autograd.grad(logits, at, logits.detach())
    found = references.lrp(subject.model, subject.images, subject.targets)
    assert references.deviation(found, expected) < 1e-9


def test_smoothgrad_with_other_noise_is_wrong(small, monkeypatch):
    real = saliency.smoothgrad
    monkeypatch.setattr(saliency, "smoothgrad", partial(real, sigma=0.2))
    cell = spoilt(small, monkeypatch, "smoothgrad", partial(real, sigma=0.2, samples=2))
    assert cell.outcome == zoo.WRONG and "noise" in cell.says


@pytest.mark.parametrize(
    ("layer", "why"),
    [
        ("model.resnet.encoder.stages.0", "comes early"),
        ("model.resnet.encoder.stages.3.layers.0.layer", "know more of the image"),
    ],
)
def test_a_layer_that_is_no_place_for_grad_cam_is_wrong(small, monkeypatch, layer, why):
    cell = spoilt(small, monkeypatch, "gradcam", partial(saliency.gradcam, layer=layer))
    assert cell.outcome == zoo.WRONG and why in cell.says


def test_a_grad_cam_of_no_layer_is_wrong(small, monkeypatch):
    other = spoilt(small, monkeypatch, "gradcam", lambda *given: saliency.gradcam(*given).sqrt())
    assert other.outcome == zoo.WRONG and "no output" in other.says


def test_guided_backprop_of_other_activations_is_wrong(monkeypatch):
    assert spoilt(zoo.subject("ConvMixer"), monkeypatch, "guided_backprop", saliency.gradient).outcome == zoo.WRONG


def fail(error: Exception):
    raise error


@pytest.mark.parametrize(
    ("call", "outcome"),
    [
        (lambda *given: saliency.occlusion(*given, window=0), zoo.REFUSED),  # the package says what is wrong
        (lambda *given: fail(ValueError("of somebody else")), zoo.UNCLEAR),
        (lambda *given: torch.zeros(2) @ torch.zeros(3), zoo.UNCLEAR),
    ],
)
def test_only_an_error_of_the_package_s_own_is_a_refusal(small, monkeypatch, call, outcome):
    assert spoilt(small, monkeypatch, "gradient", call).outcome == outcome


@pytest.mark.parametrize(
    ("text", "first"),
    [
        ("no rule for a step (Gelu): there is none. Do that.", "no rule for a step (Gelu)"),
        ("needs a layer; name it", "needs a layer; name it"),
        ("in 1.5 s\n it ends", "in 1.5 s it ends"),
    ],
)
def test_the_first_sentence(text, first):
    assert zoo.first_sentence(text) == first


def test_a_cascade_that_leaves_something_is_wrong(monkeypatch):
    small = zoo.subject(SMALL, torch.float32)
    whole = zoo.randomization.plan(small.model, example=small.images[:1])
    some = [stage.name for stage in whole.stages][1:]
    monkeypatch.setattr(zoo.randomization, "cascading", partial(zoo.randomization.cascading, stages=some))
    assert zoo.cascade(small).outcome == zoo.WRONG


class Keeping(nn.Module):
    """Keeps what it computed from a weight in its first pass, as some networks keep their attention biases."""

    def __init__(self):
        super().__init__()
        self.head, self.bias, self.kept = nn.Linear(3, 4), nn.Parameter(torch.arange(4.0)), None

    def forward(self, images):
        self.kept = (self.bias * 2).detach() if self.kept is None else self.kept
        return self.head(images.mean((2, 3))) + self.kept


def test_what_a_copy_keeps_of_the_trained_weights_is_seen(small, monkeypatch):
    monkeypatch.setattr(zoo, "network", lambda name: Keeping())
    with torch.random.fork_rng():
        subject = small._replace(model=Keeping(), images=small.images.float())
    references.outputs(subject.model, subject.images)

    def forgetful(model, **options):  # randomises all parameters, and lets the copy keep what the model kept
        copied = copy.deepcopy(model)
        for weight in copied.parameters():
            weight.detach().fill_(0.5)
        yield "all", copied

    monkeypatch.setattr(zoo.randomization, "cascading", forgetful)
    cell = zoo.cascade(subject)
    assert cell.outcome == zoo.WRONG and "still show" in cell.says


# The networks


@each_network
def test_no_weight_is_as_it_starts(name):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = NETWORKS[name].build()
    before = torch.get_rng_state()
    moved = network(name)
    assert torch.equal(torch.get_rng_state(), before)
    for (key, old), new in zip(first.state_dict().items(), moved.state_dict().values(), strict=True):
        if old.is_floating_point() and key in dict(first.named_parameters()):
            assert (old != new).float().mean() > 0.99 and new.unique().numel() > 0.9 * new.numel() ** 0.5, key
    assert torch.isfinite(zoo.subject(name).images).all()


def test_the_same_name_gives_the_same_network():
    one, two = (network("ViT").state_dict() for _ in range(2))
    assert all(torch.equal(one[key], two[key]) for key in one)


# The stored table and its page


def test_the_table_holds_every_cell_once_in_order():
    assert [(row.network, row.check) for row in STORED] == list(product(NETWORKS, zoo.CHECKS))
    assert list(zoo_page.METHODS | zoo_page.RANDOMISATION) == zoo.CHECKS
    assert list(zoo_page.Row._fields) == zoo.COLUMNS
    assert len(NETWORKS) >= 40


def test_no_stored_cell_is_wrong_or_unclear():
    assert {row.outcome for row in STORED} == {zoo.RIGHT, zoo.REFUSED}


def test_the_table_is_in_the_form_in_which_it_is_written():
    for row in STORED:
        of = NETWORKS[row.network]
        assert row.library.split()[0] == of.library and row.pixels == str(of.pixels)
        assert row.deviation in {"", *map(zoo.magnitude, (10.0**power for power in range(-16, 1)))}
        if row.outcome == zoo.REFUSED:
            assert row.deviation == "" and len(row.says) > 20 and row.says == zoo.first_sentence(row.says)
        elif row.check in zoo.METHODS:
            assert float(row.deviation) <= zoo.ALMOST.get(row.check, zoo.EXACT)


def test_gradients_and_occlusion_are_right_wherever_there_are_logits():
    plain = ("gradient", "integrated_gradients", "smoothgrad", "occlusion")
    refused = {row.network for row in STORED if row.check in plain and row.outcome != zoo.RIGHT}
    assert refused == {name for name in NETWORKS if name.endswith("not wrapped")}


BOUNDS = [(None, ""), (0.0, "1e-16"), (3e-15, "1e-14"), (1e-6, "1e-6"), (1e9, "more")]


@pytest.mark.parametrize(("value", "text"), BOUNDS)
def test_a_deviation_is_stored_as_a_bound(value, text):
    assert zoo.magnitude(value) == text and (
        not text or text == "more" or float(text) >= value or math.isclose(value, 0)
    )


def test_networks_that_are_named_take_the_place_of_their_old_rows(tmp_path):
    file = tmp_path / "zoo.csv"
    cell = {check: zoo.Cell(zoo.RIGHT, 1e-9, "") for check in zoo.CHECKS}
    for name, outcome in (("ViT", zoo.RIGHT), ("AlexNet", zoo.RIGHT), ("ViT", zoo.WRONG)):
        zoo.store({name: cell | {"gradient": zoo.Cell(outcome, None, "")}}, file)
    head, *lines = file.read_text(encoding="utf-8").splitlines()
    assert head == ",".join(zoo.COLUMNS) and len(lines) == 2 * len(zoo.CHECKS)
    assert "AlexNet" in lines[0] and lines[len(zoo.CHECKS)].split(",")[1:5] == ["ViT", "64", "gradient", zoo.WRONG]


def test_the_page_has_tables_that_can_be_read_aloud():
    parts = zoo_page.parts(ROOT)
    page = build_book.fill((ROOT / "book/zoo.md").read_text(encoding="utf-8"), parts)
    assert "\n% " not in page
    shown = []
    for part in ("zoo: methods", "zoo: randomisation"):
        table = BeautifulSoup(parts[part], "html.parser")
        region = table.select_one("[role=region][tabindex='0']")
        assert table.select_one(f"#{region['aria-labelledby']}").name == "caption"
        shown += [one.get_text() for one in table.select("thead th[scope=col]")][1:]
        assert [one.get_text() for one in table.select("th[scope=row]")] == list(NETWORKS)
        assert len(table.select("tbody")) == len(table.select("th[scope=rowgroup]")) == 3
        for sign in table.select("td [aria-hidden]"):
            sign.extract()
        words = {cell.get_text() for cell in table.select("td")}
        assert all(re.fullmatch(r"right|refused|yes|\d+( undefined)?", word) for word in words)
        assert "<p>" not in str(table) and "\n\n" not in parts[part]
    assert shown == [*zoo_page.METHODS.values(), *zoo_page.RANDOMISATION.values()]
