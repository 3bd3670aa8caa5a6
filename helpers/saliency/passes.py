"""What all methods share: checks, a model held still while it is explained, and the gradient of a logit."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..device import batches
from ..inference import evaluating
from .backward_graph import gradient_or_zeros

VALUES_A_PASS = 8 * 3 * 227 * 227  # 8 photographs or 1577 digits: what one pass may hold in memory


def chunks(count: int, images: Tensor) -> Iterator[slice]:
    """Slices of `range(count)`, each small enough for one pass at the size of `images[0]`."""
    return batches(count, max(1, VALUES_A_PASS // images[0].numel()))


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


def starting_point(baseline: float | Tensor, images: Tensor) -> Tensor:
    """The baseline, a number or a tensor that broadcasts, in the shape of the images; raises where it does not fit."""
    baseline = torch.as_tensor(baseline, dtype=images.dtype, device=images.device).detach()
    if not torch.isfinite(baseline).all():
        raise ValueError("the baseline has NaN or infinite values.")
    try:
        return baseline.broadcast_to(images.shape)
    except RuntimeError:
        raise ValueError(
            f"the baseline of shape {tuple(baseline.shape)} does not fit images {tuple(images.shape)}."
        ) from None


@contextmanager
def explaining(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, parameters frozen and gradients switched on; all put back on the way out."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, _ in wanted:
            parameter.requires_grad_(False)
        with evaluating(model), torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for parameter, want in wanted:
            parameter.requires_grad_(want)


def class_count(model: nn.Module, images: Tensor) -> int:
    """The number of the model's classes."""
    with explaining(model), torch.no_grad():
        return model(images.clone()).shape[1]


def chosen_logits(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The logit of each image's target class, `(N,)`.

    Raises
    ------
    ValueError
        The model's output is not `(N, classes)`, or a target is not one of its classes.
    """
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape ({len(images)}, classes), got {got}.")
    if targets.max() >= logits.shape[1]:
        raise ValueError(f"target {targets.max().item()} is not one of the model's {logits.shape[1]} classes.")
    places = targets.to(logits.device, copy=True)  # a tensor of inference mode could not be kept for backward
    return logits.gather(1, places[:, None])[:, 0]


def gradient_of_logits(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    inspect: Callable[[Tensor], None] | None = None,
) -> Tensor:
    """Gradient of each image's target logit with respect to that image, in one pass, `(N, C, H, W)`.

    To be called inside `explaining(model)`. `inspect` sees the logits with their graph before the backward
    pass. An input that the logit does not depend on has gradient zero.
    """
    tape = getattr(model, "_tape", None)  # see saliency_sanity.replay
    replayed = tape is not None and tape.holds(images)
    leaf = tape.leaf if replayed else images.detach().clone().requires_grad_()
    # the copy lets a model write into its input
    logits = chosen_logits(tape if replayed else model, leaf.clone(), targets)
    if inspect is not None:
        inspect(logits)
    return gradient_or_zeros(logits, leaf, retain_graph=replayed)
