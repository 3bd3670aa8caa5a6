"""What all methods share: checks, a model held still while it is explained, and the gradient of a logit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial, wraps

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


def places(indices: Sequence[int] | None, images: Tensor) -> list[int]:
    """The images' places in the whole set, from which they draw: `indices`, or 0, 1, ... where there are none."""
    found = list(range(len(images)) if indices is None else map(int, indices))
    if len(found) != len(images):
        raise ValueError(f"indices must be the places of the {len(images)} images, got {len(found)} of them.")
    return found


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


def chosen_logits(model: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor) -> Tensor:
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


def gradient_of_logits(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """Gradient of each image's target logit with respect to that image, in one pass, `(N, C, H, W)`.

    To be called inside `explaining(model)`. An input that the logit does not depend on has gradient zero.
    """
    leaf = images.detach().clone().requires_grad_()
    # the copy lets a model write into its input
    return gradient_or_zeros(chosen_logits(model, leaf.clone(), targets), leaf)


class OnePass:
    """What a method does that differentiates the logits once, at the images themselves.

    Put on a function of `(model, images, targets)` as a decorator it makes the method, and the method carries it as
    its attribute `one_pass`, so that `saliency_sanity.sanity` can run what copies of a model have in common once.

    Parameters
    ----------
    rule : makes the context that is in force during the pass, for example one that replaces calls of ReLU.
    inspect : sees the logits with their graph before the backward pass; it may raise.
    finish : makes maps of the images and their gradients.
    """

    def __init__(
        self,
        *,
        rule: Callable[[], AbstractContextManager] = nullcontext,
        inspect: Callable[[Tensor], None] = lambda logits: None,
        finish: Callable[[Tensor, Tensor], Tensor] = lambda images, gradient: gradient,
    ):
        self.rule, self.inspect, self.finish = rule, inspect, finish
        self.method: Callable[..., Tensor] | None = None

    def __call__(self, function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """The method, with the name and the documentation of `function`."""

        @wraps(function)
        def method(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
            check_input(images, targets)
            with explaining(model):
                return torch.cat(
                    [self.maps(model, images[part], targets[part]) for part in chunks(len(images), images)]
                )

        vars(method)["one_pass"] = self
        self.method = method
        return method

    def maps(
        self,
        run: Callable[[Tensor], Tensor],
        images: Tensor,
        targets: Tensor,
        *,
        leaf: Tensor | None = None,
    ) -> Tensor:
        """The maps of a few images, inside `explaining`.

        With a `leaf`, which has the images' values, the gradient is taken there and the graph is kept.
        """
        shared = leaf is not None
        leaf = leaf if shared else images.detach().clone().requires_grad_()
        with self.rule():
            logits = chosen_logits(run, leaf if shared else leaf.clone(), targets)
            self.inspect(logits)
            gradient = gradient_or_zeros(logits, leaf, retain_graph=shared)
        return self.finish(images.detach(), gradient)


def one_pass_of(method: Callable[..., Tensor]) -> OnePass | None:
    """What a method carries, or a partial of it without options; None if it carries nothing that is its own."""
    while isinstance(method, partial) and not (method.args or method.keywords):
        method = method.func
    found = getattr(method, "one_pass", None)  # functools.wraps copies it to functions that do something else
    return found if isinstance(found, OnePass) and found.method is method else None
