"""What is asked of images, targets and models before anything is computed from them."""

from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .inference import check_module, explaining, logits_of, random_states, untouched, weights_unwritten
from .wrapper import Wrapped

TYPES = (torch.float32, torch.float64)
NO_GRADIENT = (
    "the logits follow the image, yet no gradient reaches it: part of the forward pass runs under torch.no_grad, is "
    "detached, leaves torch or moves in steps. Take that out, or explain the model by occlusion, lime or kernel_shap, "
    "which need no gradient."
)


# ---------------------------------------------------------------- images and targets


def check_dense(values: Tensor, what: str) -> None:
    """Raise unless a tensor has values, not stored sparsely and not of 8 bits, and is not empty."""
    if values.is_meta or values.layout != torch.strided:
        found = "are on the device 'meta' and have no values" if values.is_meta else f"are stored as {values.layout}"
        raise ValueError(f"{what} {found}: pass a dense tensor with values.")
    if 0 in values.shape:
        raise ValueError(f"{what} must not be empty, got shape {tuple(values.shape)}.")
    if values.is_floating_point() and values.element_size() < 2:
        raise ValueError(f"{what} are {values.dtype}, with which nothing can be computed: pass {what}.float().")


def check_float_images(images: Tensor) -> None:
    """Raise unless `images` is a dense, finite float `(N, C, H, W)`, of any precision, not empty."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        raise ValueError(f"images must be a float tensor (N, C, H, W), got {_described(images)}.{_to_images(images)}")
    check_dense(images, "images")
    if not torch.isfinite(images).all():
        raise ValueError("images have NaN or infinite values.")


def check_images(images: Tensor) -> None:
    """Raise unless `images` is a finite float32 or float64 `(N, C, H, W)`, not empty."""
    check_float_images(images)
    if images.dtype not in TYPES:
        raise ValueError(f"images are {images.dtype}, whose rounding maps would show: pass images.float().")
    if images.shape[1] == images.shape[2] > 4 and images.shape[3] in (1, 3):
        raise ValueError(
            f"images of shape {tuple(images.shape)} have their channels last: pass images.permute(0, 3, 1, 2), and a "
            "model that takes them so."
        )


def _described(values) -> str:
    if isinstance(values, Tensor):
        return f"{values.dtype} {tuple(values.shape)}"
    return type(values).__name__


def _to_images(images) -> str:
    """How to make images of what is none."""
    if isinstance(images, np.ndarray):
        return " torch.from_numpy(images) makes a tensor of an array."
    if isinstance(images, (list, tuple)) and images and all(isinstance(image, Tensor) for image in images):
        return " torch.stack(images) makes a batch of a list."
    if hasattr(images, "getdata"):  # of PIL
        return " torchvision.transforms.functional.to_tensor(image)[None] makes a batch of a picture."
    if not isinstance(images, Tensor):
        return ""
    if not images.is_floating_point() and not images.is_complex():
        return " Pass images.float(), scaled as when the model was trained: bytes are often divided by 255."
    return " image[None] makes a batch of one." if images.ndim == 3 else ""


def check_input(images: Tensor, targets: Tensor) -> None:
    """Raise unless images are as `check_images` wants them and `targets` an int64 `(N,)`, not negative."""
    check_images(images)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
        raise ValueError(
            f"targets must be int64 class indices of shape ({len(images)},), got {_described(targets)}."
            f"{_to_targets(targets, len(images))}"
        )
    if targets.is_meta:
        raise ValueError("targets are on the device 'meta' and have no values.")
    if (targets < 0).any():
        raise ValueError(f"targets must not be negative, got {targets.min().item()}.")


def _to_targets(targets, count: int) -> str:
    if not isinstance(targets, Tensor):
        return " torch.as_tensor(targets) makes a tensor of a list or an array."
    if targets.ndim == 2 and len(targets) == count and targets.shape[1] > 1:
        return " targets.argmax(1) makes them of one-hot rows."
    if targets.shape == (count,):
        return " targets.long() makes them of other numbers."
    return " One class is explained for each image." if targets.ndim < 2 else " targets.flatten() has one axis."


def check_maps(maps: Tensor, name: str = "maps") -> None:
    """Raise unless `maps` is a finite float `(N, H, W)` of any precision, not empty; what is wrong names the image."""
    if not isinstance(maps, Tensor) or not maps.is_floating_point():
        raise ValueError(
            f"{name} must be a tensor of floats, got {getattr(maps, 'dtype', type(maps))}: "
            "torch.as_tensor(values).float() makes one."
        )
    if maps.ndim != 3 or 0 in maps.shape:
        raise ValueError(
            f"{name} must be maps of shape (N, H, W), got {tuple(maps.shape)}; "
            "saliency.heatmap(maps, signed=...) adds up the channels."
        )
    check_dense(maps, name)
    if (place := _first_not_finite(maps)) is not None:
        raise ValueError(f"{name} has NaN or infinite pixels in image {place}.")


def _first_not_finite(maps: Tensor) -> int | None:
    bad = ~torch.isfinite(maps).flatten(1).all(1)
    return int(bad.nonzero()[0]) if bad.any() else None


# ---------------------------------------------------------------- models


def check_kind(model: nn.Module) -> None:
    """Raise unless `model` is a plain module of torch, with weights that can be differentiated and replaced."""
    check_module(model)
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if "_orig_mod" in module._modules:
            raise ValueError(f"{where} is compiled, and its steps cannot be seen: pass the module itself, ._orig_mod.")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{where} is compiled, and its steps cannot be seen: pass copy.deepcopy(model), which is not."
            )
        if "quantized" in type(module).__module__:
            raise ValueError(
                f"{where} is quantised ({type(module).__name__}) and has no gradient: pass the floating-point model "
                "it was made from."
            )
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name!r} has no shape yet: run the model once on a batch of images.")
        if tensor.is_meta:
            raise ValueError(
                f"{name!r} is on the device 'meta' and has no values: load the weights, "
                "model.load_state_dict(weights, assign=True)."
            )
        if tensor.is_floating_point() and tensor.dtype not in TYPES:
            raise ValueError(f"{name!r} is {tensor.dtype}, whose rounding maps would show: pass model.float().")
        if tensor.is_inference() and isinstance(tensor, nn.Parameter):
            raise ValueError(
                f"{name!r} was made under torch.inference_mode and takes part in no gradient: pass "
                "copy.deepcopy(model), made outside of it."
            )


def check_model(model: nn.Module, images: Tensor, *, differentiable: bool = True) -> None:
    """Raise unless `model` maps images like these to logits `(N, classes)` that can be explained.

    Two passes of one image and one of two, in eval mode; more only where something looks wrong. The model, what it
    keeps as attributes and the global random states are left as they were.

    Parameters
    ----------
    images : `(N, C, H, W)`, of which the first two are run; of one image a second is made.
    differentiable : whether a gradient has to reach the images; methods that only ask the model need none.

    Raises
    ------
    ValueError
        The model is compiled, scripted, quantised, in half precision or without values; it cannot run on such images;
        what it returns is no table of finite logits, but for example a tuple, a dictionary, a segmentation map or
        probabilities; two passes differ; an image's logits depend on the others of its batch; or no gradient comes
        back. The message says what to do, and where `Wrapped` does it.
    """
    check_kind(model)
    check_images(images)
    with untouched(model), torch.inference_mode(False), weights_unwritten(model):
        pair = _two(images.detach())
        run = partial(_run, model)
        with explaining(model):
            leaf = pair[:1].clone().requires_grad_()
            first = run(leaf.clone())
            if differentiable:
                _refuse_cut_graph(run, leaf, first)
            ends_in = _last_step(first, scaled=isinstance(model, Wrapped))
            # from here on without a graph, so that a model that stores what it computed can be copied
            with torch.no_grad():
                alone = torch.cat((first.detach(), run(pair[1:].clone())))
                logits = _refuse_noise_and_company(run, pair, alone)
                if not any(getattr(module, "keep_probabilities", False) for module in model.modules()):
                    _refuse_probabilities(run, pair, logits, ends_in)


def check_example(model: nn.Module, example: Tensor | None) -> None:
    """What can be said of a model that is to be randomised: `check_model` where the example is a batch of images."""
    check_kind(model)
    if example is None:
        return
    if not isinstance(example, Tensor) or not example.ndim or not len(example):
        raise ValueError(f"example must be a batch of what the model takes, as a tensor, got {_described(example)}.")
    if example.ndim == 4 and example.is_floating_point():
        return check_model(model, example, differentiable=False)
    with untouched(model), explaining(model), torch.no_grad():
        try:
            model(example.clone())
        except Exception as error:
            raise ValueError(
                f"the model cannot run on the example {_described(example)}; look at its shape and type: {error}"
            ) from error


def _two(images: Tensor) -> Tensor:
    """The first image and another one, at least by its values."""
    first = images[:1].clone()
    second = images[1:2].clone() if len(images) > 1 else first
    if torch.equal(first, second):
        second = first.flip(2, 3).lerp(-first, 0.25)
    if torch.equal(first, second):  # black
        second = first + 1
    return torch.cat((first, second))


def _run(model: nn.Module, images: Tensor) -> Tensor:
    """The model's logits, in full precision and finite."""
    logits = logits_of(model, images)
    if logits.dtype not in TYPES:
        raise ValueError(
            f"the logits are {logits.dtype}, whose rounding maps would show: leave torch.autocast, or end the model in "
            ".float()."
        )
    if not torch.isfinite(logits).all():
        raise ValueError(
            "the model's logits of these images have NaN or infinite values: look at its weights and at the images' "
            "range, or choose the finite classes with Wrapped(model, output=function)."
        )
    return logits


def _rounding(logits: Tensor) -> Tensor:
    """By how much the same logits may differ: float32 on a GPU may be TF32, whose steps are of 1e-3."""
    relative = 1e-10 if logits.dtype == torch.float64 else 2e-3 if logits.is_cuda else 1e-4
    return relative * logits.abs().max()


def _refuse_noise_and_company(run: Callable[[Tensor], Tensor], pair: Tensor, alone: Tensor) -> Tensor:
    """The logits of both images in one pass, if they are those of each `alone`."""
    before = random_states()
    logits = run(pair.clone())
    drew = before != random_states()
    gap, spread = (alone - logits).abs().max(), logits.max() - logits.min()
    together = gap > (1e-2 if logits.is_cuda else 1e-4) * spread + _rounding(logits)
    if drew or together:
        # a rare drop does not show in two passes of a model that draws
        others = torch.stack([run(pair.clone()) for _ in range(16 if drew else 1)])
        noise = (others - logits).abs().max()
        if noise > _rounding(logits) * (0.01 if drew else 1):
            raise ValueError(
                f"two passes of the same images differ, by up to {noise.item():.3g}: the model draws random numbers in "
                "eval mode, or remembers earlier passes. Switch that off, for example dropout with "
                "training=self.training; what differs from pass to pass has no one map."
            )
    if together and gap > 32 * _shaken(run, pair, logits):
        raise ValueError(
            f"the logits of an image change by {gap.item():.3g} when another image is beside it: the model treats the "
            "images of a batch together, for example by a batch norm without running statistics. Explain a model "
            "that treats each image by itself."
        )
    return logits


def _shaken(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor) -> Tensor:
    """By how much logits change with the last bits of the images: where they cancel out, that is all they are."""
    draw = torch.Generator().manual_seed(0)
    step = 8 * torch.finfo(pair.dtype).eps * torch.randn(pair.shape, generator=draw, device="cpu").to(pair)
    return (run(pair * (1 + step)) - logits).abs().max()


def _refuse_cut_graph(run: Callable[[Tensor], Tensor], leaf: Tensor, logits: Tensor) -> None:
    # weights of their own for the classes: probabilities, or logits less their mean, have a constant sum
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape[1], generator=draw, device="cpu").to(logits)
    found = None
    if logits.requires_grad:
        try:
            (found,) = torch.autograd.grad(logits @ weights, leaf, torch.ones_like(logits[:, 0]), allow_unused=True)
        except Exception as error:
            raise ValueError(
                f"the model cannot be differentiated: {error} Explain it by occlusion, lime or kernel_shap, which "
                "need no gradient."
            ) from error
    refuse_false_zeros(lambda images, places: run(images) @ weights, leaf, found)


# ---------------------------------------------------------------- probabilities

# Steps through which probabilities stay probabilities, or sums of them; and their names in the graph.
_PASSED_ON = frozenset(
    "Add Alias AsStrided Cat Clone Expand Flip Gather Index IndexSelect Mean Neg Permute ReshapeAlias Rsub Select "
    "Slice Split Squeeze Stack Sub Sum T ToCopy Transpose Unbind Unsqueeze UnsafeView View".split()
)
_SQUASHES = {
    "Softmax": "a softmax",
    "LogSoftmax": "a log-softmax",
    "Sigmoid": "a sigmoid",
    "LogSigmoid": "a log-sigmoid",
}


def _last_step(logits: Tensor, *, scaled: bool) -> str:
    """By which of `_SQUASHES` all logits came to be, "" if there is another way; where they may be `scaled` since."""
    waiting, found, seen = [logits.grad_fn], set(), set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name().split("Backward")[0]
        below = [lower for lower, _ in node.next_functions if lower is not None]
        if name in _PASSED_ON or (scaled and name in ("Mul", "Div") and len(below) == 1):
            waiting += below
        else:
            found.add(_SQUASHES.get(name, ""))
    return "" if "" in found or not found else sorted(found)[0]


def _refuse_probabilities(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor, ends_in: str) -> None:
    what = ends_in or _probabilities(run, pair, logits)
    if what:
        raise ValueError(
            f"the model ends in {what}: it returns probabilities, whose gradient vanishes where the model is sure. "
            "Explain the logits: take that step off, or wrap the model, Wrapped(model, drop_softmax=True). "
            "Wrapped(model, keep_probabilities=True) explains the probabilities on purpose."
        )


def _probabilities(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor) -> str:
    """Which probabilities these are by their values, "" if none.

    What is small by chance, or adds up to 1 in one image, does not so in strong images, where probabilities saturate.
    """
    if not any(_shares(logits)) and not ((logits >= 0) & (logits <= 1)).all():
        return ""
    try:
        extreme = run(torch.cat((pair * 1e4, pair * -1e4)))
    except ValueError:  # it overflows, or takes no such images
        extreme = logits
    adds_up, is_log = _shares(torch.cat((logits, extreme)))
    if adds_up or is_log:
        return "a log-softmax" if is_log else "a softmax"
    close = 1e-4
    inside = extreme.min() >= 0 and 1 - close < extreme.max() <= 1 and (logits >= 0).all() and (logits <= 1).all()
    moves = extreme.max() - torch.minimum(extreme.min(), logits.min()) > close
    return "a sigmoid" if inside and moves else ""


def _shares(logits: Tensor) -> tuple[bool, bool]:
    """Whether the logits of several images are shares of 1 or of 100, or the logarithms of shares of 1.

    Logits that are the same for all images are neither; how exactly shares must add up depends on how they differ.
    """
    moves = (logits.amax(0) - logits.amin(0)).max()
    rounding = 16 * torch.finfo(logits.dtype).eps
    if logits.shape[1] == 1 or moves <= rounding * logits.abs().max():
        return False, False
    sums, close = logits.sum(1), 1e-3 * moves + rounding * logits.abs().sum(1)
    adds_up = any(bool(((sums - whole).abs() <= close).all()) for whole in (1, 100))
    return (
        adds_up and bool((logits >= -close[:, None]).all()),
        bool((logits <= rounding).all() and (logits.logsumexp(1).abs() <= close).all()),
    )


# ---------------------------------------------------------------- zero maps


class _Attached(TorchFunctionMode):
    """Inside, detach() and torch.no_grad() do nothing; `cuts` counts how often they were called."""

    def __init__(self) -> None:
        super().__init__()
        self.cuts = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        name = getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name
        switched_off = name == "_set_grad_enabled" and not args[0]
        if name in ("detach", "detach_", "data") or switched_off:
            self.cuts += 1
            return None if switched_off else args[0]
        return func(*args, **(kwargs or {}))


def refuse_false_zeros(run: Callable[[Tensor, Tensor], Tensor], images: Tensor, gradient: Tensor | None) -> None:
    """Raise if a gradient is zero everywhere in an image, or None, and the output follows that image all the same.

    `run(images, places)` gives one output for each image, `places` being those in the batch `images`; gradients are
    switched on. A zero is right where units are dead, at a kink, and where the output moves in steps; so it is not
    enough to move the image. The images in question are run again with detach() and torch.no_grad() out of force: a
    gradient that comes then was cut off before. What no graph reaches even so, as through numpy, is moved a little.
    """
    places = torch.arange(len(images), device=images.device)
    if gradient is not None:
        places = places[~gradient.flatten(1).any(1)]
    if not len(places):
        return
    leaf, uncut = images.detach()[places].requires_grad_(), None
    try:
        with _Attached() as attached:
            outputs = run(leaf.clone(), places)
        if attached.cuts and outputs.requires_grad:
            (uncut,) = torch.autograd.grad(outputs.sum(), leaf, allow_unused=True)
    except Exception:  # what needs the cut, as numpy does
        uncut = None
    follows = uncut is not None and bool(uncut.any())
    if uncut is None and gradient is None:
        with torch.no_grad():
            start = run(leaf.clone(), places)
            rounding = 32 * torch.finfo(leaf.dtype).eps * start.abs()
            follows = any(bool(((run(other, places) - start).abs() > rounding).any()) for other in _moved(leaf))
    if follows:
        raise ValueError(NO_GRADIENT)


def _moved(images: Tensor) -> list[Tensor]:
    """The images with a fine and a coarse pattern of signs added, a 16th of their largest value high."""
    draw = torch.Generator().manual_seed(0)
    fine = (torch.randint(2, images.shape[1:], generator=draw, device="cpu") * 2 - 1).to(images)
    coarse = fine[:, ::8, ::8].repeat_interleave(8, 1).repeat_interleave(8, 2)[:, : images.shape[2], : images.shape[3]]
    size = images.abs().amax((1, 2, 3), keepdim=True)
    return [images + torch.where(size > 0, size, 1.0) * pattern / 16 for pattern in (fine, coarse)]
