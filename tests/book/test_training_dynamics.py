"""Training dynamics: hand-worked cases, independent implementations, and what the stored run must show."""

from itertools import permutations

import numpy as np
import pandas as pd
import pytest
import torch
from saliency_sanity import inference
from saliency_sanity.book import bugs, data, models, training, training_dynamics
from saliency_sanity.book.assets import locate
from saliency_sanity.device import generator
from torch.nn import functional as F

SEEDS = range(6)
NETWORKS = [name for name in models.REGISTRY if name.startswith("mislabelled_")]


def test_margins_by_hand(device):
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.0, 5.0, -1.0], [-4.0, -2.0, -3.0]], device=device)
    labels = torch.tensor([0, 2, 0], device=device)
    assert training_dynamics.margins(logits, labels).tolist() == [1.0, -6.0, -2.0]


def test_margins_of_many_epochs_are_those_of_each():
    logits, labels = torch.randn(4, 7, 5, generator=generator(0)), torch.tensor([0, 1, 2, 3, 4, 0, 1])
    expected = torch.stack([training_dynamics.margins(epoch, labels) for epoch in logits])
    assert torch.equal(training_dynamics.margins(logits, labels), expected)
    assert torch.equal(expected > 0, logits.argmax(2) == labels)


def test_aum_by_hand():
    logits = torch.tensor([[[2.0, 1.0], [0.0, 1.0]], [[4.0, 1.0], [3.0, 0.0]]])
    assert training_dynamics.aum(logits, torch.tensor([0, 1])).tolist() == [2.0, -1.0]


def test_aum_looks_at_gaps_not_at_sizes():
    logits, labels = torch.randn(3, 6, 4, generator=generator(0)), torch.tensor([0, 1, 2, 3, 0, 1])
    torch.testing.assert_close(training_dynamics.aum(logits + 7, labels), training_dynamics.aum(logits, labels))


def test_forgetting_by_hand():
    right = torch.tensor([[0, 1, 1, 0], [1, 1, 0, 0], [0, 1, 1, 0], [1, 1, 0, 0], [1, 1, 1, 0]], dtype=torch.bool)
    assert training_dynamics.forgetting_events(right).tolist() == [1.0, 0.0, 2.0, float("inf")]


def test_one_epoch_forgets_nothing():
    assert training_dynamics.forgetting_events(torch.tensor([[True, False]])).tolist() == [0.0, float("inf")]


@pytest.mark.parametrize(
    ("scores", "wanted", "expected"),
    [
        ([4, 3, 2, 1], [1, 0, 1, 0], (1 + 2 / 3) / 2),
        ([4, 3, 2, 1], [1, 1, 0, 0], 1.0),
        ([4, 3, 2, 1], [0, 0, 0, 1], 0.25),
        ([1, 1, 1, 1], [0, 1, 0, 0], 0.25),  # no ranking: the share of the wanted
        ([float("inf"), 2, 2, 1], [1, 1, 0, 0], (1 + 2 / 3) / 2),
    ],
)
def test_average_precision_by_hand(scores, wanted, expected, device):
    scores, wanted = torch.tensor(scores, device=device), torch.tensor(wanted, device=device).bool()
    assert training_dynamics.average_precision(scores.float(), wanted) == pytest.approx(expected)


def test_average_precision_without_ties_is_the_mean_precision_at_the_wanted():
    draw = np.random.default_rng(0)
    scores, wanted = draw.normal(size=200), draw.random(200) < 0.1
    order = np.argsort(-scores)
    precision = [wanted[order][: k + 1].mean() for k in range(200) if wanted[order][k]]
    found = training_dynamics.average_precision(torch.from_numpy(scores), torch.from_numpy(wanted))
    assert found == pytest.approx(np.mean(precision))


def test_average_precision_steps_over_ties_whatever_their_order():
    scores, wanted = torch.tensor([2.0, 2.0, 1.0, 1.0, 0.0]), torch.tensor([True, False, True, False, False])
    found = {
        training_dynamics.average_precision(scores[list(order)], wanted[list(order)])
        for order in permutations(range(5))
    }
    assert len(found) == 1 and found.pop() == pytest.approx((1 / 2 + 2 / 4) / 2)


def test_average_precision_of_a_random_ranking_is_near_the_share():
    wanted = torch.arange(1000) < 100
    found = [training_dynamics.average_precision(torch.rand(1000, generator=generator(s)), wanted) for s in range(50)]
    assert np.mean(found) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: training_dynamics.margins(torch.zeros(3, 1), torch.zeros(3, dtype=torch.int64)),
            "at least two classes",
        ),
        (lambda: training_dynamics.margins(torch.zeros(3, 2), torch.tensor([0, 1, 2])), r"labels must lie in 0..1"),
        (lambda: training_dynamics.margins(torch.zeros(3, 2), torch.tensor([0, 1])), r"int64 of shape \(3,\)"),
        (lambda: training_dynamics.aum(torch.zeros(3, 2), torch.tensor([0, 1, 0])), r"\(epochs, N, classes\)"),
        (lambda: training_dynamics.forgetting_events(torch.zeros(3, 2)), "right must be bool"),
        (lambda: training_dynamics.forgetting_events(torch.zeros(0, 2).bool()), "an epoch at least"),
        (lambda: training_dynamics.average_precision(torch.zeros(3), torch.zeros(3).bool()), "nothing is wanted"),
        (lambda: training_dynamics.average_precision(torch.zeros(3), torch.ones(4).bool()), r"must be \(N,\)"),
        (lambda: training_dynamics.average_precision(torch.zeros(3), torch.ones(3)), "bool wanted"),
        (lambda: training_dynamics.average_precision(torch.full((3,), torch.nan), torch.ones(3).bool()), "NaN"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def garments(seed):
    """Images, true labels and labels with one in ten wrong, as the stored networks saw them."""
    train, part = data.load("clothes", "train"), slice(1000 * seed, 1000 * (seed + 1))
    return train.images[part], train.labels[part], bugs.mislabel(train.labels[part], seed=seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_the_stored_networks_learn_wrong_labels_late_and_not_early(seed):
    images, true, wrong = garments(seed)
    named = {
        m: inference.predict(models.load(f"mislabelled_flipped{m}", seed=seed), images).argmax(1)
        for m in ("", "_early")
    }
    as_given = {m: (n == wrong.labels)[wrong.flipped].float().mean() for m, n in named.items()}
    assert as_given["_early"] < 0.15 and as_given[""] > 0.9
    assert (named["_early"] == true)[wrong.flipped].float().mean() > 0.6
    for kind in ("clean", "other_order", "other_seed"):
        assert training.accuracy(models.load(f"mislabelled_{kind}", seed=seed), images, true) > 0.97


def test_the_stored_frames_hold_each_replicate_and_agree_with_the_networks():
    epochs, scores = (pd.read_csv(locate(f"mislabelled/{name}.csv.gz")) for name in ("epochs", "images"))
    assert epochs.groupby("seed").epoch.apply(list).tolist() == [list(range(1, 41))] * len(SEEDS)
    assert scores.groupby(["seed", "epoch"]).size().to_dict() == {(s, e): 1000 for s in SEEDS for e in (5, 40)}
    images, true, wrong = garments(3)
    rows = scores.query("seed == 3 and epoch == 5")
    assert rows.true.tolist() == true.tolist() and rows.given.tolist() == wrong.labels.tolist()
    logits = inference.predict(models.load("mislabelled_flipped_early", seed=3), images)
    loss = F.cross_entropy(logits, wrong.labels, reduction="none")
    np.testing.assert_allclose(rows.loss, loss, atol=0.05)
    stored = epochs.query("seed == 3 and epoch == 5").squeeze()
    flipped = true != wrong.labels
    assert training_dynamics.average_precision(loss, flipped) == pytest.approx(stored.ap_loss, abs=0.01)
    aum = -torch.tensor(rows.aum.tolist())
    assert training_dynamics.average_precision(aum, flipped) == pytest.approx(stored.ap_aum, abs=0.01)


def test_the_record_of_the_networks_is_complete():
    record = pd.read_csv(locate("mislabelled/networks.csv"))
    assert record.groupby("network").seed.apply(list).to_dict() == {name: list(SEEDS) for name in NETWORKS}
