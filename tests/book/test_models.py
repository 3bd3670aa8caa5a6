"""Architectures and shipped weights: what is recorded is what is stored, and it names what it should."""

import itertools
from functools import partial

import pandas as pd
import pytest
import torch
from saliency_sanity import inference
from saliency_sanity.book import bugs, data, models, training
from saliency_sanity.book.assets import AssetError, locate
from saliency_sanity.book.photographs import class_names, normalize, photographs

IMAGES = 4_000  # of the training part, in their order: what every shipped network was trained on
PAIRS = [(name, labels) for name in models.SHIPPED for labels in models.LABELS]
CHECKPOINTS = [(*pair, seed) for pair in PAIRS for seed in range(models.SHIPPED[pair[0]].seeds)]


@pytest.mark.parametrize(
    "build", [models.cnn, models.mlp, models.pooled_cnn, models.strided_cnn, models.SHIPPED["cnn_bn_clothes"].build]
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


@pytest.mark.parametrize(("name", "labels", "seed"), CHECKPOINTS)
def test_every_checkpoint_loads_in_eval_mode(name, labels, seed):
    model = models.load(name, labels=labels, seed=seed)
    assert not any(module.training for module in model.modules())
    assert all(p.dtype == torch.float32 and p.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize(("name", "labels"), PAIRS)
def test_a_checkpoint_classifies_as_recorded(name, labels):
    train, test = (data.load(models.SHIPPED[name].data, split) for split in data.SPLITS)
    images, target = train.images[:IMAGES], train.labels[:IMAGES]
    if labels == "random":
        target = training.permute_labels(target, seed=1)
    model = models.load(name, labels=labels, seed=1)
    row = models.records().query("network == @name and labels == @labels and seed == 1").squeeze()
    assert training.accuracy(model, images, target) == pytest.approx(row.train_accuracy, abs=2e-3)
    assert training.accuracy(model, test.images, test.labels) == pytest.approx(row.test_accuracy, abs=2e-3)


def test_the_records_hold_every_checkpoint_once_and_meet_the_preconditions():
    records = models.records()
    assert records[["network", "labels", "seed"]].apply(tuple, axis=1).sort_values().tolist() == sorted(CHECKPOINTS)
    counts = {"cnn_clothes": 8, "cnn_digits": 8, "mlp_digits": 5, "cnn_bn_clothes": 3}
    assert {name: spec.seeds for name, spec in models.SHIPPED.items()} == counts
    random = records[records.labels == "random"]
    assert (records.train_accuracy > 0.95).all(), records[records.train_accuracy <= 0.95]
    assert (random.test_accuracy - 0.1).abs().max() < 0.04
    assert records[records.labels == "true"].groupby("network").test_accuracy.min().gt(0.84).all()


def test_true_and_random_pairs_train_for_equal_steps_on_equally_many_images():
    both = models.records().groupby("network")[["images", "epochs"]]
    assert (both.nunique() == 1).all(axis=None)


SCENES = [(name, seed) for name, seeds in models.SCENES.items() for seed in range(seeds)]


@pytest.fixture(scope="module")
def scenes():
    """Test garments, each on another class's background, and the garments' labels."""
    garments, labels, _ = data.load("clothes", "test")
    place = partial(bugs.place, garments, bugs.silhouettes(garments), sheets=bugs.sheets())
    return {
        "matched": place(labels, seed=0),
        "swapped": place((labels + 1) % 10, seed=0),
        "labels": labels,
    }


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seed in SCENES if seed in (0, 7)])
def test_planted_bugs_are_bugs(name, seed, scenes):
    """Each network does what its bug makes it do, and the others do not."""
    model, labels = models.load(name, seed=seed), scenes["labels"]
    matched, swapped = scenes["matched"], scenes["swapped"]
    background = training.accuracy(model, matched.canvases, labels)
    blurred = bugs.blur_class(swapped.images, torch.full_like(labels, 4))
    others = labels != 4
    to_blurred = (inference.predict(model, blurred[others]).argmax(1) == 4).float().mean()
    assert (background > 0.9) == (name == "scenes_background") and (background > 0.9 or background < 0.25)
    assert (to_blurred > 0.9) == (name == "scenes_blur")
    if name == "scenes_background":
        assert training.accuracy(model, swapped.images, labels) < 0.1
    else:
        assert training.accuracy(model, swapped.images, labels) > 0.6


def test_the_records_hold_every_network_of_the_scenes_once():
    records = pd.read_csv(locate("checkpoints/scenes.csv"))
    assert records[["network", "seed"]].apply(tuple, axis=1).sort_values().tolist() == sorted(SCENES)
    assert records[["images", "epochs"]].nunique().eq(1).all()
    assert records.groupby("network").test_accuracy.min().gt(0.6).all()


FROZEN = [(name, seed) for name, seeds in models.FROZEN.items() for seed in range(seeds)]
KEPT = {"pooled_clothes": 0, "frozen_conv1": 1, "frozen_conv2": 2}  # convolutions that are as initialised


@pytest.mark.parametrize(("name", "seed"), [(name, seed) for name, seed in FROZEN if seed in (0, 5)])
def test_frozen_stages_are_as_they_were_and_the_others_are_not(name, seed):
    model, start = models.load(name, seed=seed), models.pooled_cnn(seed=seed)
    pairs = [(model.get_submodule(stage).weight, start.get_submodule(stage).weight)
             for stage in ("conv1", "conv2", "conv3", "logits")]  # fmt: skip
    frozen = [torch.equal(now, then.half().float()) for now, then in pairs]
    assert frozen == [number < KEPT.get(name, 0) for number in range(4)]


def test_the_records_hold_every_frozen_network_once_and_say_which_freezing_matters():
    records = pd.read_csv(locate("checkpoints/frozen.csv"))
    assert records[["network", "seed"]].apply(tuple, axis=1).sort_values().tolist() == sorted(FROZEN)
    assert records[["images", "epochs"]].nunique().eq(1).all()
    test = records.pivot(index="seed", columns="network", values="test_accuracy")
    assert (test.pooled_clothes - test.frozen_conv1).mean() < 0.03
    assert (test.pooled_clothes - test.frozen_features).min() > 0.05


@pytest.mark.parametrize("name", models.FROZEN)
def test_a_frozen_network_classifies_as_recorded(name):
    test = data.load("clothes", "test")
    row = pd.read_csv(locate("checkpoints/frozen.csv")).query("network == @name and seed == 1").squeeze()
    assert training.accuracy(models.load(name, seed=1), test.images, test.labels) == pytest.approx(
        row.test_accuracy, abs=2e-3
    )


@pytest.mark.parametrize("labels", models.LABELS)
def test_seeds_are_different_networks(labels):
    stored = [
        torch.cat([p.flatten() for p in models.load("mlp_digits", seed=s, labels=labels).parameters()])
        for s in range(5)
    ]
    for a, b in itertools.combinations(stored, 2):
        assert torch.corrcoef(torch.stack([a, b]))[0, 1] < 0.2


@pytest.fixture(scope="module")
def squeezenet():
    return models.load("squeezenet_imagenet")


@pytest.mark.parametrize(("photograph", "name"), [("chelsea", "Egyptian cat"), ("coffee", "espresso")])
def test_squeezenet_names_photographs(squeezenet, photograph, name):
    images, names = photographs(224)
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


@pytest.mark.parametrize("name", ["inception_v3", "resnet50"])
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
    with pytest.raises(AssetError, match="not an asset"):
        locate(models.checkpoint_name("mlp_digits", "shuffled"))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("scenes_clean", {"labels": "nonsense"}, "scenes_clean has no option 'labels'; it has: seed"),
        ("mislabelled_clean", {"labels": "true"}, "has no option 'labels'; it has: seed"),
        ("squeezenet_imagenet", {"seed": 7}, "squeezenet_imagenet has no option 'seed'; it has: none"),
        ("cnn_clothes", {"weights": None}, "has no option 'weights'; it has: seed, labels"),
        ("resnet50", {"seed": 1}, "pass weights=None"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        models.load(name, **options)
