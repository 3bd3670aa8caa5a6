"""Architectures and shipped weights: what is recorded is what is stored, and it names what it should."""

from copy import deepcopy
from functools import partial
from itertools import combinations, product

import pandas as pd
import pytest
import torch
import train
from networks import weekly_but
from saliency_sanity import inference
from saliency_sanity.book import bugs, data, models, training
from saliency_sanity.book.assets import AssetError, locate
from saliency_sanity.book.photographs import class_names, normalize, whole

PAIRS = [(name, labels) for name, recipe in models.REGISTRY.items() for labels in recipe.labels or [None]]
RECORDED = [pair for pair in PAIRS if models.REGISTRY[pair[0]].record]


def checkpoints(record: str) -> list[tuple]:
    """Network, labels where there is a choice, and seed of the checkpoints of one record."""
    return sorted(
        (name, *([labels] if labels else []), seed)
        for name, labels in PAIRS
        if models.REGISTRY[name].record == record
        for seed in range(models.REGISTRY[name].seeds)
    )


@pytest.mark.parametrize(
    "build", [models.cnn, models.mlp, models.pooled_cnn, models.strided_cnn, models.REGISTRY["cnn_bn_clothes"].build]
)
def test_a_seed_sets_the_initial_weights_and_nothing_global(build):
    state = torch.get_rng_state()
    a, b, c = (build(seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not any(torch.equal(p, q) for (n, p), q in zip(a.named_parameters(), c.parameters()) if "norm" not in n)
    assert a(torch.rand(2, 1, 28, 28)).shape == (2, 10)


def test_the_papers_cnn_at_a_size_that_ships():
    assert sum(p.numel() for p in models.cnn().parameters()) == 16 * 26 + 32 * (16 * 25 + 1) + 64 * 1569 + 650
    assert [n for n, _ in models.cnn(batch_norm=True).named_children() if "norm" in n] == ["norm1", "norm2"]


@pytest.mark.files
@pytest.mark.parametrize(("name", "labels"), PAIRS)
def test_every_checkpoint_loads_in_eval_mode(name, labels):
    for seed in range(models.REGISTRY[name].seeds):
        model = models.load(name, labels=labels, seed=seed)
        assert not any(module.training for module in model.modules())
        assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.files
@pytest.mark.parametrize(("name", "labels"), RECORDED)
def test_a_checkpoint_classifies_what_its_recipe_gives_it_as_recorded(name, labels):
    model = models.load(name, labels=labels, seed=1)
    record = pd.read_csv(locate(models.REGISTRY[name].record), dtype={"labels": str})
    chosen = (record.network == name) & (record.seed == 1) & (record.labels == labels if labels else True)
    row = record[chosen].squeeze()
    slow = models.REGISTRY[name].build is models.pooled_cnn
    for split in ["test"] if slow else data.SPLITS:
        examples = train.examples(name, split, seed=1, labels=labels)
        assert training.accuracy(model, *examples) == pytest.approx(row[f"{split}_accuracy"], abs=2e-3)


def trainings(monkeypatch, name: str, seed: int) -> list:
    """Arguments of the trainings that `fit` asks for, none of which is run."""
    calls = []

    def note(model, images, labels, **options):
        calls.append((deepcopy(model), images, labels, options))
        return training.Trained(deepcopy(model), pd.DataFrame())

    monkeypatch.setattr(training, "train", note)
    train.fit(name, seed=seed)
    return calls


def test_a_recipe_says_what_starts_alike_and_what_is_seen_in_another_order(monkeypatch):
    clean, flipped, order, other = (
        trainings(monkeypatch, f"mislabelled_{kind}", 2)[0]
        for kind in ("clean", "flipped", "other_order", "other_seed")
    )
    first = data.load("clothes", "train")
    for _, images, labels, _ in (clean, order, other):
        assert torch.equal(images, first.images[2000:3000]) and torch.equal(labels, first.labels[2000:3000])
    assert torch.equal(flipped[2], bugs.mislabel(clean[2], seed=2).labels)
    assert [call[3]["seed"] for call in (clean, flipped, order, other)] == [2, 2, 1002, 1002]
    starts = [call[0].conv1.weight for call in (clean, flipped, order, other)]
    assert [torch.equal(start, starts[0]) for start in starts] == [True, True, True, False]


def test_frozen_features_are_trained_on_digits_first(monkeypatch):
    digits, clothes = trainings(monkeypatch, "frozen_features", 1)
    assert torch.equal(digits[1], data.load("digits", "train").images[:4_000])
    assert torch.equal(clothes[1], data.load("clothes", "train").images[:4_000])
    assert all(p.requires_grad for p in digits[0].parameters())
    assert [n for n, p in clothes[0].named_parameters() if p.requires_grad] == ["logits.weight", "logits.bias"]


@pytest.mark.parametrize("record", ["records", "scenes", "frozen"])
def test_the_records_hold_every_checkpoint_once_and_one_family_trains_alike(record):
    name = f"checkpoints/{record}.csv"
    rows = pd.read_csv(locate(name), dtype={"labels": str})
    keys = [key for key in ("network", "labels", "seed") if key in rows]
    assert rows[keys].apply(tuple, axis=1).sort_values().tolist() == checkpoints(name)
    family = rows.groupby("network") if record == "records" else rows.groupby(lambda row: record)
    assert family[["images", "epochs"]].nunique().eq(1).all(axis=None)


def test_the_networks_of_true_and_random_labels_meet_the_preconditions():
    records = models.records()
    random = records[records.labels == "random"]
    assert (records.train_accuracy > 0.95).all(), records[records.train_accuracy <= 0.95]
    assert (random.test_accuracy - 0.1).abs().max() < 0.04
    assert records[records.labels == "true"].groupby("network").test_accuracy.min().gt(0.84).all()


SCENES = ["scenes_clean", "scenes_background", "scenes_blur"]


@pytest.fixture(scope="module")
def scenes():
    """Test garments, each on another class's background, and the garments' labels."""
    garments, labels, _ = data.load("clothes", "test")
    place = partial(bugs.scenes, garments, bugs.silhouettes(garments), backgrounds=bugs.backgrounds())
    return {
        "matched": place(labels, seed=0),
        "swapped": place((labels + 1) % 10, seed=0),
        "labels": labels,
    }


@pytest.mark.files
@pytest.mark.parametrize(("name", "seed"), list(product(SCENES, [0, 7])))
def test_planted_bugs_are_bugs(name, seed, scenes):
    """Each network does what its bug makes it do, and the others do not."""
    model, labels = models.load(name, seed=seed), scenes["labels"]
    matched, swapped = scenes["matched"], scenes["swapped"]
    background = training.accuracy(model, matched.backgrounds, labels)
    blurred = bugs.blur_class(swapped.images, torch.full_like(labels, 4))
    others = labels != 4
    to_blurred = (inference.predict(model, blurred[others]).argmax(1) == 4).float().mean()
    assert (background > 0.9) == (name == "scenes_background") and (background > 0.9 or background < 0.25)
    assert (to_blurred > 0.9) == (name == "scenes_blur")
    if name == "scenes_background":
        assert training.accuracy(model, swapped.images, labels) < 0.1
    else:
        assert training.accuracy(model, swapped.images, labels) > 0.6


def test_the_networks_of_the_scenes_have_learned():
    records = pd.read_csv(locate("checkpoints/scenes.csv"))
    assert records.groupby("network").test_accuracy.min().gt(0.6).all()


KEPT = {"pooled_clothes": 0, "frozen_conv1": 1, "frozen_conv2": 2}  # convolutions that are as initialised


@pytest.mark.files
@pytest.mark.parametrize(("name", "seed"), list(product([*KEPT, "frozen_features"], [0, 5])))
def test_frozen_stages_are_as_they_were_and_the_others_are_not(name, seed):
    model, start = models.load(name, seed=seed), models.pooled_cnn(seed=seed)
    pairs = [(model.get_submodule(stage).weight, start.get_submodule(stage).weight)
             for stage in ("conv1", "conv2", "conv3", "logits")]  # fmt: skip
    frozen = [torch.equal(now, then.half().float()) for now, then in pairs]
    assert frozen == [number < KEPT.get(name, 0) for number in range(4)]


def test_freezing_the_first_convolution_costs_little_and_freezing_all_of_them_much():
    records = pd.read_csv(locate("checkpoints/frozen.csv"))
    test = records.pivot(index="seed", columns="network", values="test_accuracy")
    assert (test.pooled_clothes - test.frozen_conv1).mean() < 0.03
    assert (test.pooled_clothes - test.frozen_features).min() > 0.05


@pytest.mark.files
@pytest.mark.parametrize("labels", models.LABELS)
def test_seeds_are_different_networks(labels):
    stored = [
        torch.cat([p.flatten() for p in models.load("mlp_digits", seed=s, labels=labels).parameters()])
        for s in range(5)
    ]
    for a, b in combinations(stored, 2):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] < 0.2


@pytest.fixture(scope="module")
def squeezenet():
    return models.load("squeezenet_imagenet")


@pytest.mark.parametrize(("photograph", "name"), [("chelsea", "Egyptian cat"), ("coffee", "espresso")])
def test_squeezenet_names_photographs(squeezenet, photograph, name):
    images, names = whole(224)
    logits = inference.predict(squeezenet, normalize(images[names.index(photograph)][None]))
    assert class_names()[logits.argmax()] == name


def test_squeezenet_has_no_relu_after_its_last_convolution(squeezenet):
    assert inference.predict(squeezenet, torch.zeros(1, 3, 64, 64)).min() < 0
    assert squeezenet.classifier[2](torch.tensor(-1.0)) == -1


@pytest.mark.parametrize("name", ["squeezenet_imagenet", "cnn_bn_clothes"])
def test_loading_twice_gives_two_models_that_do_not_share_memory(name):
    a, b = models.load(name), models.load(name)
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q) and p.data_ptr() != q.data_ptr()


@pytest.mark.parametrize("name", weekly_but("resnet50", of=["inception_v3", "resnet50"]))
def test_the_papers_networks_without_weights(name):
    state = torch.get_rng_state()
    model = models.load(name, weights=None, seed=1)
    assert torch.equal(state, torch.get_rng_state())
    assert inference.predict(model, torch.zeros(1, 3, 75, 75)).shape == (1, 1000)
    assert not model.training


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("lenet", {}, "unknown model 'lenet'; known: cnn_clothes, .*squeezenet_imagenet, inception_v3"),
        ("cnn_clothes", {"seed": 8}, "stored for seeds 0 to 7, got 8"),
        ("cnn_clothes", {"seed": -1}, "stored for seeds 0 to 7, got -1"),
        ("mlp_digits", {"seed": 5}, "stored for seeds 0 to 4, got 5"),
        ("mlp_digits", {"seed": 0.5}, "stored for seeds 0 to 4, got 0.5"),
        ("mlp_digits", {"seed": "0"}, "stored for seeds 0 to 4, got '0'"),
        ("scenes_blur", {"seed": 8}, "stored for seeds 0 to 7, got 8"),
        ("frozen_conv1", {"seed": 6}, "stored for seeds 0 to 5, got 6"),
        ("mislabelled_flipped_early", {"seed": 6}, "stored for seeds 0 to 5, got 6"),
        ("mlp_digits", {"labels": "shuffled"}, "unknown labels 'shuffled'; known: true, random"),
        ("mlp_digits", {"labels": True}, "unknown labels True; known: true, random"),
        ("scenes_clean", {"labels": "nonsense"}, "stored for one set of labels: leave labels='nonsense' out"),
        ("mislabelled_flipped", {"labels": "true"}, "stored for one set of labels: leave labels='true' out"),
        ("squeezenet_imagenet", {"labels": "true"}, "stored for one set of labels: leave labels='true' out"),
        ("squeezenet_imagenet", {"seed": 7}, "one set of weights: leave seed=7 out"),
        ("resnet50", {"seed": 0}, "one set of weights: leave seed=0 out"),
        ("cnn_clothes", {"weights": None}, "has its own weights: leave weights=None out"),
    ],
)
def test_what_is_not_stored_raises_and_lists_what_is(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.load(name, **options)


@pytest.mark.parametrize("seed", [1.0, True])
def test_a_seed_that_equals_a_stored_one_loads_it(seed):
    same = zip(models.load("mlp_digits", seed=seed).parameters(), models.load("mlp_digits", seed=1).parameters())
    assert all(torch.equal(p, q) for p, q in same)


def test_a_checkpoint_is_named_by_network_and_labels():
    assert models.checkpoint_name("mlp_digits", "true") == "checkpoints/mlp_digits.true.safetensors"
    assert models.checkpoint_name("scenes_blur") == "checkpoints/scenes_blur.safetensors"
    with pytest.raises(AssetError, match="not one of the assets"):
        locate(models.checkpoint_name("mlp_digits", "shuffled"))
