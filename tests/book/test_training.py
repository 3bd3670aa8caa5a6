"""The training loop: it learns, it is reproducible, and what it is given stays as it was."""

from copy import deepcopy

import pytest
import torch
from saliency_sanity import inference
from saliency_sanity.book import training
from saliency_sanity.device import batches, generator, local_seed
from saliency_sanity.inference import evaluating
from torch import nn
from torch.nn import functional as F


def network(*, dropout=False, seed=0):
    with local_seed(seed):
        extra = [nn.Dropout(0.3)] if dropout else []
        return nn.Sequential(
            nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), *extra, nn.Linear(4 * 36, 3)
        )


def task(count=90):
    """Three classes of noisy images that differ in their brightest third."""
    draw = generator(0)
    labels = torch.randint(3, (count,), generator=draw)
    images = torch.rand(count, 1, 8, 8, generator=draw)
    rows = torch.arange(8).view(1, 1, 8, 1) // 3
    return images + (rows == labels.view(-1, 1, 1, 1)), labels


def same(a, b):
    return all(torch.equal(p, q) for p, q in zip(a.state_dict().values(), b.state_dict().values(), strict=True))


def test_training_learns_and_records_every_epoch():
    images, labels = task()
    model, history = training.train(network(), images, labels, epochs=8, batch_size=20, lr=3e-3)
    assert history.columns.tolist() == ["epoch", "loss", "accuracy"] and history.epoch.tolist() == list(range(8))
    assert history.loss.iloc[-1] < 0.3 * history.loss.iloc[0]
    assert training.accuracy(model, images, labels) > 0.95
    assert not any(module.training for module in model.modules())


def test_it_is_adam_on_the_cross_entropy_with_a_rate_that_falls_in_the_last_quarter():
    images, labels = task(50)
    model, seed, epochs, size = network(), 4, 4, 20
    trained = training.train(model, images, labels, epochs=epochs, batch_size=size, lr=2e-3, seed=seed).model
    ours, draw = deepcopy(model).train(), generator(seed)
    adam, step, steps = torch.optim.Adam(ours.parameters()), 0, epochs * 3
    for _ in range(epochs):
        order = torch.randperm(50, generator=draw)
        for part in batches(50, size):
            adam.param_groups[0]["lr"] = 2e-3 * min(1, (steps - step) / (steps / 4))
            adam.zero_grad()
            F.cross_entropy(ours(images[order[part]]), labels[order[part]]).backward()
            adam.step()
            step += 1
    for p, q in zip(trained.parameters(), ours.parameters(), strict=True):
        torch.testing.assert_close(p, q)


def test_the_first_epochs_loss_is_the_mean_over_images():
    """With a rate of zero nothing is learned, so that the recorded loss is the model's own."""
    images, labels = task(50)  # the last batch is a short one
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
    history = training.train(model, images, labels, epochs=1, batch_size=20, lr=0.0).history
    assert history.loss[0] == pytest.approx(F.cross_entropy(model(images), labels).item(), rel=1e-5)
    assert history.accuracy[0] == pytest.approx(training.accuracy(model, images, labels))


@pytest.mark.parametrize("dropout", [False, True])
def test_one_seed_one_result_whatever_the_global_random_state(dropout):
    images, labels = task()
    results = []
    for seed, state in ((0, 1), (0, 2), (5, 1)):
        torch.manual_seed(state)
        before = torch.get_rng_state()
        results.append(training.train(network(dropout=dropout), images, labels, epochs=2, seed=seed).model)
        assert torch.equal(before, torch.get_rng_state())
    assert same(results[0], results[1]) and not same(results[0], results[2])


@pytest.mark.parametrize("train_mode", [True, False])
def test_model_images_and_labels_are_left_as_they_were(train_mode):
    (images, labels), model = task(), network().train(train_mode)
    model[1].train(not train_mode)
    before, modes = deepcopy((model, images, labels)), [m.training for m in model.modules()]
    training.train(model, images, labels, epochs=1)
    training.accuracy(model, images, labels)
    assert same(model, before[0]) and torch.equal(images, before[1]) and torch.equal(labels, before[2])
    assert [m.training for m in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())


def test_a_model_that_writes_into_its_input_does_not_write_into_the_callers_images():
    images, labels = task(10)
    images -= 0.7
    before = images.clone()
    model = nn.Sequential(nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(64, 3))
    inference.predict(model, images)
    training.train(model, images, labels, epochs=1)
    assert torch.equal(images, before)


def test_predict_is_the_models_output_in_eval_mode_whatever_the_batch(device):
    images, model = task(25)[0].to(device), network(dropout=True).to(device).train()
    with evaluating(model), torch.no_grad():
        expected = model(images)
    for size in (1, 7, 100):
        torch.testing.assert_close(inference.predict(model, images, batch_size=size), expected)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_predict_puts_the_modes_back_after_an_exception(error):
    class Breaks(nn.Module):
        def forward(self, x):
            raise error("broken")

    model = nn.Sequential(nn.Dropout(), Breaks()).train()
    model[0].eval()
    with pytest.raises(ValueError if error is RuntimeError else error):  # what a model cannot run on is named
        inference.predict(model, task(4)[0])
    assert [m.training for m in model.modules()] == [True, False, True]


def test_accuracy_counts_the_largest_logit():
    model = nn.Flatten()  # the pixels are the logits
    images = torch.eye(4)[[0, 1, 2, 3, 0]].view(5, 1, 2, 2)
    assert training.accuracy(model, images, torch.tensor([0, 1, 2, 0, 0])) == pytest.approx(0.8)


def test_permuted_labels_keep_their_counts_and_lose_the_tie_to_the_images(device):
    labels = torch.arange(10, device=device).repeat_interleave(100)
    state = torch.get_rng_state()
    a, b, c = (training.permute_labels(labels, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b) and not torch.equal(a, c) and a.device == labels.device
    assert torch.equal(a.bincount(), labels.bincount())
    assert (a == labels).double().mean() < 0.2
    assert torch.equal(labels, torch.arange(10, device=device).repeat_interleave(100))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": torch.full((90,), 3)}, r"labels must lie in 0..2, got 3..3"),
        ({"labels": torch.full((90,), -1)}, r"labels must lie in 0..2, got -1..-1"),
        ({"labels": torch.zeros(90)}, r"labels must be int64 of shape \(90,\)"),
        ({"labels": torch.zeros(90, dtype=torch.int32)}, r"labels must be int64 of shape \(90,\)"),
        ({"labels": torch.zeros(89, dtype=torch.int64)}, r"got torch.int64 of shape \(89,\)"),
        ({"labels": torch.zeros(90, 3, dtype=torch.int64)}, r"got torch.int64 of shape \(90, 3\)"),
        (
            {"images": torch.zeros(0, 1, 8, 8), "labels": torch.zeros(0, dtype=torch.int64)},
            "there are no images",
        ),
        ({"epochs": 0}, "at least one epoch is needed, got 0"),
        ({"batch_size": 0}, "batch size must be at least 1, got 0"),
        ({"batch_size": -5}, "batch size must be at least 1, got -5"),
        ({"lr": -1.0}, "learning rate"),
    ],
)
def test_bad_input_to_training_raises(change, message):
    images, labels = task()
    with pytest.raises(ValueError, match=message):
        training.train(network(), **{"images": images, "labels": labels, "epochs": 1} | change)


@pytest.mark.parametrize("seed", [None, "1", 1.5])
def test_a_seed_that_is_no_int_raises(seed):
    images, labels = task(10)
    with pytest.raises(TypeError, match="seed must be an int"):
        training.train(network(), images, labels, epochs=1, seed=seed)
    with pytest.raises(TypeError, match="seed must be an int"):
        training.permute_labels(labels, seed=seed)


@pytest.mark.parametrize("labels", [torch.zeros(9, dtype=torch.int64), torch.zeros(10), torch.full((10,), -1)])
def test_accuracy_refuses_bad_labels(labels):
    with pytest.raises(ValueError, match="labels must"):
        training.accuracy(network(), task(10)[0], labels)


def test_watch_sees_every_epoch_and_does_not_change_the_result():
    images, labels = task()
    seen, looks = [], []

    def watch(epoch, model):
        assert model.training
        seen.append(epoch)
        looks.append(training.accuracy(model, images, labels))

    options = {"epochs": 4, "batch_size": 20, "lr": 3e-3}
    watched = training.train(network(dropout=True), images, labels, watch=watch, **options)
    alone = training.train(network(dropout=True), images, labels, **options)
    assert seen == [0, 1, 2, 3] and same(watched.model, alone.model)
    assert looks[-1] == training.accuracy(watched.model, images, labels)
