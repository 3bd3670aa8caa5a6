"""What is asked of images, targets and models before anything is computed from them."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from .inference import explaining, random_states, refuse_other_outputs, untouched

TYPES = (torch.float32, torch.float64)
NO_GRADIENT = (
    "the logits follow the image, yet no gradient reaches it: part of the forward pass runs under torch.no_grad, is "
    "detached, leaves torch or moves in steps. Take that out, or explain the model by occlusion, lime or kernel_shap, "
    "which need no gradient."
)


# ---------------------------------------------------------------- images and targets


def check_images(images: Tensor) -> None:
    """Raise unless `images` is a finite float32 or float64 `(N, C, H, W)`, not empty."""
    if not isinstance(images, Tensor) or not images.is_floating_point() or images.ndim != 4:
        got = tuple(images.shape) if isinstance(images, Tensor) else type(images).__name__
        raise ValueError(
            f"images must be a float tensor (N, C, H, W), got {getattr(images, 'dtype', '')} {got}; "
            "image[None] makes a batch of one."
        )
    if images.is_meta or images.layout != torch.strided:
        what = "are on the device 'meta' and have no values" if images.is_meta else f"are stored as {images.layout}"
        raise ValueError(f"images {what}: pass a dense tensor with values.")
    if 0 in images.shape:
        raise ValueError(f"images must not be empty, got shape {tuple(images.shape)}.")
    if images.dtype not in TYPES:
        raise ValueError(f"images are {images.dtype}, whose rounding maps would show: pass images.float().")
    if not torch.isfinite(images).all():
        raise ValueError("images have NaN or infinite values.")


def check_input(images: Tensor, targets: Tensor) -> None:
    """Raise unless images are as `check_images` wants them and `targets` an int64 `(N,)`, not negative."""
    check_images(images)
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.shape != images.shape[:1]:
        found = f"{targets.dtype} {tuple(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
        raise ValueError(f"targets must be int64 class indices of shape ({len(images)},), got {found}.")
    if targets.is_meta:
        raise ValueError("targets are on the device 'meta' and have no values.")
    if (targets < 0).any():
        raise ValueError(f"targets must not be negative, got {targets.min().item()}.")


# ---------------------------------------------------------------- models


def check_kind(model: nn.Module) -> None:
    """Raise unless `model` is a plain module of torch, with weights that can be differentiated and replaced."""
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}: make its call the forward() of one."
        )
    for name, module in model.named_modules():
        where = f"its part {name!r}" if name else "the model"
        if "_orig_mod" in module._modules:
            raise ValueError(f"{where} is compiled, and its steps cannot be seen: pass the module itself, ._orig_mod.")
        if getattr(module, "_compiled_call_impl", None) is not None:
            raise ValueError(
                f"{where} is compiled, and its steps cannot be seen: pass copy.deepcopy(model), which is not."
            )
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(f"{where} is TorchScript, whose steps cannot be seen: pass the module it was made from.")
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

    Four passes of two images at most, in eval mode, as a rule three. The model, what it keeps as attributes and the
    global random states are left as they were.

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
    with untouched(model), torch.inference_mode(False):
        pair = _two(images.detach())
        run = partial(_run, model)
        with explaining(model):
            leaf = pair.clone().requires_grad_()
            logits = run(leaf.clone())
            if differentiable:
                _refuse_cut_graph(run, leaf, logits)
            ends_in = _last_step(logits)
            logits = logits.detach()
            # without a graph, so that a model that stores what it computed can be copied
            with torch.no_grad():
                _refuse_noise(run, pair, logits)
                _refuse_company(run, pair, logits)
                if not any(getattr(module, "keep_probabilities", False) for module in model.modules()):
                    _refuse_probabilities(run, pair, logits, ends_in)


def check_example(model: nn.Module, example: Tensor | None) -> None:
    """What can be said of a model that is to be randomised: `check_model` where the example is a batch of images."""
    check_kind(model)
    if isinstance(example, Tensor) and example.ndim == 4 and example.is_floating_point():
        check_model(model, example, differentiable=False)


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
    """The model's logits; whatever goes wrong in it comes back as a ValueError that says where."""
    shape = tuple(images.shape)
    try:
        logits = model(images)
    except Exception as error:
        raise ValueError(
            _why_not(model, images) or f"the model cannot run on images of shape {shape}: {error}"
        ) from error
    refuse_other_outputs(logits, len(images))
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


def _why_not(model: nn.Module, images: Tensor) -> str:
    """What would break any model: weights of another type than the images, or somewhere else."""
    weights = [p for p in (*model.parameters(), *model.buffers()) if p.is_floating_point()]
    for what, of in (("type", lambda t: t.dtype), ("device", lambda t: t.device)):
        found = {of(weight) for weight in weights}
        if found and of(images) not in found:
            here, there = (value if what == "type" else repr(str(value)) for value in (of(images), of(weights[0])))
            return (
                f"images are on {here} and the model's weights on {there}: bring them to one {what}, "
                f"images.to({there}) or model.to({here})."
            ).replace("on torch.", "torch.")
    return ""


def _rounding(logits: Tensor) -> Tensor:
    """By how much the same logits may differ: float32 on a GPU may be TF32, whose steps are of 1e-3."""
    relative = 1e-10 if logits.dtype == torch.float64 else 2e-3 if logits.is_cuda else 1e-4
    return relative * logits.abs().max()


def _refuse_noise(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor) -> None:
    before = random_states()
    again = run(pair.clone())
    drew = before != random_states()
    # a rare drop does not show in two passes of a model that draws
    others = [again, *(run(pair.clone()) for _ in range(16))] if drew and torch.equal(again, logits) else [again]
    gap = torch.stack([(other - logits).abs().max() for other in others]).max()
    if gap > (0 if drew else _rounding(logits)):
        raise ValueError(
            f"two passes of the same images differ, by up to {gap.item():.3g}: the model draws random numbers in eval "
            "mode, or remembers earlier passes. Switch that off, for example dropout with "
            "training=self.training; its logits have no one map."
        )


def _refuse_company(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor) -> None:
    alone = run(pair[:1].clone())[0]
    gap, spread = (alone - logits[0]).abs().max(), logits.max() - logits.min()
    if gap > 1e-2 * spread + _rounding(logits):
        raise ValueError(
            f"the logits of an image change by {gap.item():.3g} when another image is beside it: the model treats the "
            "images of a batch together, for example by a batch norm without running statistics. Explain a model "
            "that treats each image by itself."
        )


def _refuse_cut_graph(run: Callable[[Tensor], Tensor], leaf: Tensor, logits: Tensor) -> None:
    # weights of their own for the classes: probabilities, or logits less their mean, have a constant sum
    draw = torch.Generator().manual_seed(0)
    weights = torch.randn(logits.shape[1], generator=draw, device="cpu").to(logits)
    found = None
    if logits.requires_grad:
        try:
            (found,) = torch.autograd.grad(
                logits @ weights, leaf, torch.ones_like(logits[:, 0]), allow_unused=True, retain_graph=True
            )
        except Exception as error:
            raise ValueError(
                f"the model cannot be differentiated: {error} Explain it by occlusion, lime or kernel_shap, which "
                "need no gradient."
            ) from error
    refuse_false_zeros(lambda images, places: run(images) @ weights, leaf, found)


# ---------------------------------------------------------------- probabilities

_MOVES = frozenset(
    "Alias AsStrided Clone ReshapeAlias Select Slice Squeeze T ToCopy Transpose Unsqueeze UnsafeView View".split()
)
_SQUASHES = {
    "Softmax": "a softmax",
    "LogSoftmax": "a log-softmax",
    "Sigmoid": "a sigmoid",
    "LogSigmoid": "a log-sigmoid",
}


def _last_step(logits: Tensor) -> str:
    """The name of the last step that computed the logits, "" where there is none."""
    node = logits.grad_fn
    while node is not None:
        name = node.name().split("Backward")[0]
        if name not in _MOVES:
            return name
        node = next((below for below, _ in node.next_functions if below is not None), None)
    return ""


def _refuse_probabilities(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor, ends_in: str) -> None:
    what = _SQUASHES.get(ends_in) or _probabilities(run, pair, logits)
    if what:
        raise ValueError(
            f"the model ends in {what}: it returns probabilities, whose gradient vanishes where the model is sure. "
            "Explain the logits: take that step off, or wrap the model, Wrapped(model, drop_softmax=True). "
            "Wrapped(model, keep_probabilities=True) explains the probabilities on purpose."
        )


def _probabilities(run: Callable[[Tensor], Tensor], pair: Tensor, logits: Tensor) -> str:
    """Which probabilities these are by their values, "" if none."""
    close = 1e-4
    if logits.shape[1] > 1 and (logits >= -close).all() and ((logits.sum(1) - 1).abs() < close).all():
        return "a softmax"
    if logits.shape[1] > 1 and (logits <= close).all() and (logits.logsumexp(1).abs() < close).all():
        return "a log-softmax"
    if not ((logits >= 0) & (logits <= 1)).all():
        return ""
    # what is small by chance leaves [0, 1] for strong images; a sigmoid saturates there, and never passes 1
    try:
        extreme = run(torch.cat((pair * 1e4, pair * -1e4)))
    except ValueError:  # it overflows, or takes no such images
        return ""
    inside = extreme.min() >= 0 and 1 - close < extreme.max() <= 1
    moves = extreme.max() - torch.minimum(extreme.min(), logits.min()) > close
    return "a sigmoid" if inside and moves else ""


# ---------------------------------------------------------------- zero maps


@torch.no_grad()
def refuse_false_zeros(run: Callable[[Tensor, Tensor], Tensor], images: Tensor, gradient: Tensor | None) -> None:
    """Raise if a gradient is zero everywhere in an image whose output has a slope there.

    `run(images, places)` gives one output for each image, `places` being those in the batch `images`. A gradient of
    None means that no graph leads from the outputs to the images: then any move of the output is a slope. One of zeros
    was computed, and is right where units are dead or at a kink, and where the output moves in steps: only an output
    that moves in proportion to the step, to both sides and over a range of small steps, contradicts it.
    """
    places = torch.arange(len(images), device=images.device)
    if gradient is not None:
        places = places[~gradient.flatten(1).any(1)]
    if not len(places):
        return
    images = images.detach()[places]
    start = run(images.clone(), places)
    rounding = 32 * torch.finfo(images.dtype).eps * start.abs().max()
    wave = _signs(images[:1])
    moved = (run(_stepped(images, wave, 2**-4), places) - start).abs() > rounding
    if gradient is None:
        # a coarse wave too: networks that average do not see a fine one
        coarse = _signs(images[:1, :, ::8, ::8]).repeat_interleave(8, 2).repeat_interleave(8, 3)
        coarse = coarse[..., : images.shape[2], : images.shape[3]]
        moved |= (run(_stepped(images, coarse, 2**-4), places) - start).abs() > rounding
        if moved.any():
            raise ValueError(NO_GRADIENT)
        return
    for image, place, first in zip(images[moved], places[moved], start[moved]):
        steps = [side * 2.0**-power for side in (1, -1) for power in range(4, 11)]
        tried = torch.stack([_stepped(image, wave[0], step) for step in steps])
        up, down = (run(tried, place.expand(len(tried))) - first).view(2, -1)
        rise, bend = (up - down).abs(), (up + down).abs()  # a kink bends, and torch calls its slope zero
        ratios = rise[:-1] / rise[1:]
        if (rise > rounding).all() and (bend < rise / 2).all() and ((ratios > 1.5) & (ratios < 2.7)).all():
            raise ValueError(NO_GRADIENT)


def _signs(like: Tensor) -> Tensor:
    """+1 and -1 at random, the same every time."""
    draw = torch.Generator().manual_seed(0)
    return (torch.randint(2, like.shape, generator=draw, device="cpu") * 2 - 1).to(like)


def _stepped(images: Tensor, wave: Tensor, step: float) -> Tensor:
    """Images moved along the wave by a share of their largest value, or by `step` where they are black."""
    size = images.abs().flatten(-3).amax(-1)[..., None, None, None]
    return images + step * torch.where(size > 0, size, 1.0) * wave
