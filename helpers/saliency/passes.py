"""What all methods share: checks, a model held still while it is explained, and the gradient of a logit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from inspect import Parameter, signature
from numbers import Integral

import torch
from torch import Tensor, nn

from ..checks import check_input, check_model
from ..device import batches
from ..inference import buffers_kept, explaining, random_state_kept
from .backward_graph import gradient_or_zeros

VALUES_A_PASS = 8 * 3 * 227 * 227  # 8 photographs or 1577 digits: what one pass may hold in memory


_AT_MOST: ContextVar[int | None] = ContextVar("images a pass at most", default=None)
_CHECKED: ContextVar[bool] = ContextVar("the models at hand were checked", default=False)


@contextmanager
def at_most(batch_size: int | None) -> Iterator[None]:
    """Inside the block a pass of a model takes at most so many images; None leaves it as it is."""
    if batch_size is not None and (isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1):
        raise ValueError(f"batch_size must be a whole number of images, at least 1, or None; got {batch_size!r}.")
    token = _AT_MOST.set(_AT_MOST.get() if batch_size is None else batch_size)
    try:
        yield
    finally:
        _AT_MOST.reset(token)


@contextmanager
def checked() -> Iterator[None]:
    """Inside the block methods take models as checked: whoever runs many copies of one has checked that one."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def chunks(count: int, images: Tensor, each: int = 1) -> Iterator[slice]:
    """Slices of `range(count)`, each small enough for one pass where one takes `each` images like `images[0]`."""
    size = VALUES_A_PASS // images[0].numel()
    return batches(count, max(1, min(size, _AT_MOST.get() or size) // each))


def explains(function: Callable[..., Tensor] | None = None, *, differentiates: bool = True):
    """Make a method of `function(model, images, targets, **options)`.

    Its input and its model are checked, and it takes `batch_size`, the images of one pass at most. What the model draws
    and counts while it is explained is put back. A method that never `differentiates` takes models without a gradient.
    """
    if function is None:
        return partial(explains, differentiates=differentiates)

    @wraps(function)
    def method(model: nn.Module, images: Tensor, targets: Tensor, *, batch_size: int | None = None, **options):
        check_input(images, targets)
        if _CHECKED.get():
            with at_most(batch_size):
                return function(model, images, targets, **options)
        check_model(model, images, differentiable=differentiates)
        with at_most(batch_size), checked(), buffers_kept(model), random_state_kept():
            return function(model, images, targets, **options)

    own = signature(function)
    knob = Parameter("batch_size", Parameter.KEYWORD_ONLY, default=None, annotation=int | None)
    vars(method)["__signature__"] = own.replace(parameters=[*own.parameters.values(), knob])
    vars(method)["differentiates"] = differentiates
    return method


def differentiates(method: Callable[..., Tensor]) -> bool:
    """Whether the method is one of ours, or options of one, that needs the gradient of the model."""
    while isinstance(method, partial):
        method = method.func
    return getattr(method, "differentiates", False)


def places(indices: Sequence[int] | None, images: Tensor) -> list[int]:
    """The images' places in the whole set, from which they draw: `indices`, or 0, 1, ... where there are none."""
    found = list(range(len(images)) if indices is None else map(int, indices))
    if len(found) != len(images):
        raise ValueError(f"indices must be the places of the {len(images)} images, got {len(found)} of them.")
    return found


def at_least_one(what: str, count: int) -> None:
    """Raise unless `count` is a whole number from 1 on, of samples or of steps."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"at least one {what} is needed, got {count!r}; {what}s= takes a whole number.")


def starting_point(baseline: float | Tensor, images: Tensor) -> Tensor:
    """The baseline, a number or a tensor that broadcasts, in the shape of the images; raises where it does not fit."""
    try:
        baseline = torch.as_tensor(baseline, dtype=images.dtype, device=images.device).detach()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"the baseline must be a number or a tensor, got {type(baseline).__name__}.") from None
    if not torch.isfinite(baseline).all():
        raise ValueError("the baseline has NaN or infinite values.")
    try:
        return baseline.broadcast_to(images.shape)
    except RuntimeError:
        raise ValueError(
            f"the baseline of shape {tuple(baseline.shape)} does not fit images {tuple(images.shape)}."
        ) from None


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
    logits = chosen_logits(model, leaf.clone(), targets)
    return gradient_or_zeros(logits, leaf, run=lambda other, places: chosen_logits(model, other, targets[places]))


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

        @explains
        @wraps(function)
        def method(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
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
        at = images.detach().clone().requires_grad_() if leaf is None else leaf
        with self.rule():
            logits = chosen_logits(run, at.clone() if leaf is None else at, targets)
            self.inspect(logits)
            # A rule may rightly send nothing back. A pass from a tape runs once: what fails there is run again in full.
            plain = self.rule is nullcontext and leaf is None
            again = (lambda other, places: chosen_logits(run, other, targets[places])) if plain else None
            gradient = gradient_or_zeros(logits, at, retain_graph=leaf is not None, run=again)
        return self.finish(images.detach(), gradient)


def one_pass_of(method: Callable[..., Tensor]) -> OnePass | None:
    """What a method carries, or a partial of it without options; None if it carries nothing that is its own."""
    while isinstance(method, partial) and not (method.args or method.keywords):
        method = method.func
    found = getattr(method, "one_pass", None)  # functools.wraps copies it to functions that do something else
    return found if isinstance(found, OnePass) and found.method is method else None
