"""The one training loop of the book, and the labels and scores that go with it."""

from collections.abc import Callable
from copy import deepcopy
from typing import NamedTuple

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..device import batches, generator, local_seed, progress
from ..inference import predict


class Trained(NamedTuple):
    """A trained copy of a model and its history, one row an epoch: `epoch`, `loss`, `accuracy`."""

    model: nn.Module
    history: pd.DataFrame


def check_labels(images: Tensor, labels: Tensor, classes: int | None = None) -> None:
    """Raise unless `labels` is an int64 `(N,)` tensor for the `N` images, within `range(classes)`."""
    if labels.dtype != torch.int64 or labels.shape != images.shape[:1]:
        raise ValueError(
            f"labels must be int64 of shape ({len(images)},), one an image; "
            f"got {labels.dtype} of shape {tuple(labels.shape)}."
        )
    if not len(images):
        raise ValueError("there are no images.")
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        raise ValueError(f"labels must lie in 0..{'' if classes is None else classes - 1}, got {low}..{high}.")


def permute_labels(labels: Tensor, *, seed: int) -> Tensor:
    """The same labels dealt out anew: class counts stay, the tie to the images is cut."""
    order = torch.randperm(len(labels), generator=generator(seed))
    return labels[order.to(labels.device)]


def accuracy(model: nn.Module, images: Tensor, labels: Tensor, *, batch_size: int = 256) -> float:
    """Accuracy: the fraction of the images whose largest logit is at their label, in [0, 1]."""
    check_labels(images, labels)
    return (predict(model, images, batch_size=batch_size).argmax(1) == labels).double().mean().item()


def train(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    epochs: int,
    batch_size: int = 50,
    lr: float = 1e-3,
    seed: int = 0,
    watch: Callable[[int, nn.Module], object] | None = None,
    show_progress: bool = False,
) -> Trained:
    """Train a copy of `model` with Adam on the cross-entropy; the caller's model is left as it was.

    Parameters
    ----------
    images, labels : float `(N, C, H, W)` and int64 `(N,)`, on the model's device.
    epochs, batch_size : passes over the data and images a step; the last short batch is used too.
    lr : Adam's learning rate; it is constant, and falls to zero over the last quarter of the steps.
    seed : of the order of the batches, and of dropout. The initial weights are the model's own.
    watch : called after each epoch with its number, from 0, and the model in training, to look at and not to change.

    Raises
    ------
    ValueError
        Labels of a wrong shape, type or range, no images, no epochs or an empty batch.
    """
    if epochs < 1:
        raise ValueError(f"at least one epoch is needed, got {epochs}.")
    check_labels(images, labels, predict(model, images[:1]).shape[1] if len(images) else None)
    model = deepcopy(model).train()
    draw = generator(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    steps = epochs * len(list(batches(len(images), batch_size)))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, 4 * (1 - step / steps)))
    rows = []
    with progress(epochs, show=show_progress) as bar, local_seed(seed):
        for epoch in range(epochs):
            order = torch.randperm(len(images), generator=draw).to(images.device)
            total, right = torch.zeros((), device=images.device), torch.zeros((), device=images.device)
            for part in batches(len(images), batch_size):
                x, y = images[order[part]], labels[order[part]]
                logits = model(x)
                loss = F.cross_entropy(logits, y)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                schedule.step()
                total += loss.detach() * len(x)
                right += (logits.argmax(1) == y).sum()
            rows.append((epoch, total.item() / len(images), right.item() / len(images)))
            bar.set_postfix_str(f"loss {rows[-1][1]:.3f}")
            bar.update()
            if watch is not None:
                watch(epoch, model)
    return Trained(model.eval(), pd.DataFrame(rows, columns=["epoch", "loss", "accuracy"]))
