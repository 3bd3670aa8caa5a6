"""What is asked of images, targets and models before anything is computed from them."""

import torch
from torch import Tensor, nn

from .inference import evaluating


def check_input(images: Tensor, targets: Tensor) -> None:
    """Raise unless `images` is a finite float `(N, C, H, W)` and `targets` an int64 `(N,)`, not empty."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images must be a float tensor (N, C, H, W), got {getattr(images, 'dtype', '')} {got}; "
            "image[None] makes a batch of one."
        )
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}.")
    if not torch.isfinite(images).all():
        raise ValueError("images have NaN or infinite values.")
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
        found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be int64 class indices of shape ({len(images)},), got {found}.")
    if (targets < 0).any():
        raise ValueError(f"targets must not be negative, got {targets.min().item()}.")


@torch.no_grad()
def check_model(model: nn.Module, images: Tensor) -> None:
    """Raise unless `model` maps images like these to logits `(N, classes)`.

    Raises
    ------
    ValueError
        What the model is or returns cannot be explained; the message says what to do.
    """
    with evaluating(model), torch.inference_mode(False):
        logits = model(images[:1].clone())
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != 1:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape (1, classes), got {got}.")
