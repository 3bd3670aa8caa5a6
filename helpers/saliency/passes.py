"""What all methods share: checks, a model held still while it is explained, and the gradient of a logit."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from functools import partial, wraps
from inspect import Parameter, signature
from numbers import Integral, Real
from operator import index
from typing import TypeVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ..checks import check_input, check_model
from ..device import batches, seed_of
from ..inference import explaining, untouched
from .backward_graph import gradient_or_zeros

VALUES_A_PASS = 8 * 3 * 227 * 227  # 8 photographs or 1577 digits: what one pass may hold in memory
IMAGES_KEPT = 400  # a guess on the safe side: what a deep network keeps of an image for the way back, in images

Result = TypeVar("Result")


class _Room:
    """How many images a pass may take: at most what was asked for, and fewer once a device had no room for them."""

    def __init__(self, at_most: int | None):
        self.at_most, self.last = at_most, 0
        self.guesses: dict[tuple[torch.device, int], int] = {}

    def on_device(self, image: Tensor) -> int:
        """A guess from the memory that was free when images of this size were first asked about."""
        key = image.device, image.numel() * image.element_size()
        if key not in self.guesses:
            free, _ = torch.cuda.mem_get_info(image.device)
            idle = torch.cuda.memory_reserved(image.device) - torch.cuda.memory_allocated(image.device)
            self.guesses[key] = max(1, (free + idle) * 4 // 5 // (IMAGES_KEPT * key[1]))
        return self.guesses[key]


_ROOM: ContextVar[_Room | None] = ContextVar("the room that passes have", default=None)
_CHECKED: ContextVar[bool] = ContextVar("the models at hand were checked", default=False)
_FOUND_GOOD: WeakKeyDictionary[nn.Module, tuple] = WeakKeyDictionary()  # models, and what was checked of each


@contextmanager
def at_most(batch_size: int | None) -> Iterator[None]:
    """Inside the block a pass of a model takes at most so many images; None leaves it as it is."""
    if batch_size is not None and (
        isinstance(batch_size, bool) or not isinstance(batch_size, Integral) or batch_size < 1
    ):
        raise ValueError(f"batch_size must be a whole number of images, at least 1, or None; got {batch_size!r}.")
    room = _ROOM.get()
    token = _ROOM.set(_Room(batch_size) if room is None or batch_size is not None else room)
    try:
        yield
    finally:
        _ROOM.reset(token)


@contextmanager
def checked() -> Iterator[None]:
    """Inside the block methods take models as checked: whoever runs many copies of one has checked that one."""
    token = _CHECKED.set(True)
    try:
        yield
    finally:
        _CHECKED.reset(token)


def images_a_pass(images: Tensor) -> int:
    """How many images like these a pass may take: a fixed number on the CPU, a guess from the free memory on a GPU."""
    room = _ROOM.get() or _Room(None)
    size = room.on_device(images[0]) if images.is_cuda else max(1, VALUES_A_PASS // images[0].numel())
    return min(size, room.at_most or size)


def chunks(count: int, images: Tensor, each: int = 1) -> Iterator[slice]:
    """Slices of `range(count)`, each small enough for one pass where one takes `each` images like `images[0]`."""
    size = max(1, images_a_pass(images) // each)
    if room := _ROOM.get():
        room.last = min(size, count)
    return batches(count, size)


def with_room(call: Callable[[], Result]) -> Result:
    """What `call()` returns; it is called again, with half as many images a pass, where the device had no room.

    Inside `at_most`, which remembers the smaller number.
    """
    room = _ROOM.get()
    while True:
        if room:
            room.last = 0
        try:
            return call()
        except torch.cuda.OutOfMemoryError:
            if room is None or room.last < 2:
                raise
        room.at_most = room.last // 2  # here, where the exception no longer holds the tensors of the pass
        torch.cuda.empty_cache()


def _check_once(model: nn.Module, images: Tensor, differentiates: bool) -> None:
    """`check_model`, left out where this very model, not written into since, was found good for such images."""
    held = [*model.parameters(), *model.buffers()] if isinstance(model, nn.Module) else []
    if not held or any(nn.parameter.is_lazy(tensor) or tensor.is_inference() for tensor in held):
        return check_model(model, images, differentiable=differentiates)
    tensors = [(id(tensor), tensor._version) for tensor in held]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in model.modules()]
    what = differentiates, images.shape[1:], images.dtype, images.device, tensors, hooks
    if _FOUND_GOOD.get(model) != what:
        check_model(model, images, differentiable=differentiates)
        _FOUND_GOOD[model] = what


def told(call: Callable[[], Tensor], name: str) -> Tensor:
    """What `call()` returns; what goes wrong in the middle of a model that was found good is told as a ValueError."""
    try:
        return call()
    except (ImportError, MemoryError, ValueError, torch.cuda.OutOfMemoryError):
        raise
    except Exception as error:
        raise ValueError(
            f"{name} cannot be computed ({type(error).__name__}: {error}). Look at the options; if they are right, "
            "explain the model by its gradient, or by occlusion, lime or kernel_shap, which need none."
        ) from error


def explains(
    function: Callable[..., Tensor] | None = None,
    *,
    differentiates: bool = True,
    unless: str | None = None,
):
    """Make a method of `function(model, images, targets, **options)`.

    Its input and its model are checked, and it takes `batch_size`, the images of one pass at most; on a GPU it starts
    again with smaller passes where memory runs out. What the model draws and counts while it is explained is put
    back. A method that never `differentiates`, or not where the option `unless` is given, takes models without a
    gradient.
    """
    if function is None:
        return partial(explains, differentiates=differentiates, unless=unless)

    @wraps(function)
    def method(model: nn.Module, images: Tensor, targets: Tensor, *, batch_size: int | None = None, **options):
        if not (_CHECKED.get() and getattr(images, "is_cuda", False)):  # every look at values makes a GPU wait
            check_input(images, targets)
        seed_of(options.get("seed", 0))
        call = partial(told, partial(function, model, images, targets, **options), function.__name__)
        if _CHECKED.get():
            with at_most(batch_size):
                return with_room(call)
        _check_once(model, images, differentiates and options.get(unless or "") is None)
        with at_most(batch_size), checked(), untouched(model):
            return with_room(call)

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
    try:
        found = list(range(len(images)) if indices is None else map(index, indices))
    except TypeError:
        raise ValueError(f"indices must be whole numbers, the places of the images, got {indices!r}.") from None
    if len(found) != len(images):
        raise ValueError(f"indices must be the places of the {len(images)} images, got {len(found)} of them.")
    return found


def at_least_one(what: str, count: int) -> None:
    """Raise unless `count` is a whole number from 1 on, of samples or of steps."""
    if isinstance(count, bool) or not isinstance(count, Integral) or count < 1:
        raise ValueError(f"at least one {what} is needed, got {count!r}; {what}s= takes a whole number.")


def is_number(value: object) -> bool:
    """Whether an option is a real number, NaN and infinity among them."""
    return isinstance(value, Real) and not isinstance(value, bool)


def starting_point(baseline: float | Tensor, images: Tensor) -> Tensor:
    """The baseline, a number or a tensor that broadcasts, in the shape of the images; raises where it does not fit."""
    try:
        if isinstance(baseline, Tensor) and baseline.is_complex():
            raise TypeError
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


def chosen_logits(model: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, *, known: bool = False) -> Tensor:
    """The logit of each image's target class, `(N,)`; targets that are `known` to be classes are not looked at.

    Raises
    ------
    ValueError
        The model's output is not `(N, classes)`, or a target is not one of its classes.
    """
    logits = model(images)
    if not isinstance(logits, Tensor) or logits.ndim != 2 or len(logits) != len(images):
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise ValueError(f"the model must return logits of shape ({len(images)}, classes), got {got}.")
    if not known and targets.max() >= logits.shape[1]:
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
        known: bool = False,
    ) -> Tensor:
        """The maps of a few images, inside `explaining`.

        With a `leaf`, which has the images' values, the gradient is taken there and the graph is kept. `known` says
        that the targets are classes of the model.
        """
        at = images.detach().clone().requires_grad_() if leaf is None else leaf
        with self.rule():
            logits = chosen_logits(run, at.clone() if leaf is None else at, targets, known=known)
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
