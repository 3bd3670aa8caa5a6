"""Inference: a model held in eval mode, and its logits for any number of images."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from .device import batches


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode inside the block; every module's own mode is put back on the way out."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        for module, _ in modes:
            module.training = False
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@torch.no_grad()
def predict(model: nn.Module, images: Tensor, *, batch_size: int = 256) -> Tensor:
    """Logits `(N, classes)` in eval mode; model and images are left as they were."""
    with evaluating(model):
        return torch.cat([model(images[part].clone()) for part in batches(len(images), batch_size)])
