"""Class activation maps: one weight a channel, drawn at the resolution of a layer that has places."""

from collections.abc import Callable
from functools import partial
from warnings import warn

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_input, check_model
from .backprop_rules import guided_backprop
from .layers import default_layer, numbers, uses_places
from .passes import chosen_logits, chunks, explaining, explains
from .spatial import Reading, reading, rounding, watched, with_noise


def gradcam_layer(model: nn.Module, images: Tensor) -> str:
    """The name of the layer at which `gradcam` draws its map where none is named.

    It is the last output in a pass that has places (height and width above 1) and through which everything flows:
    no way from the image to the logits leads past it, and the logits depend on its places. Where the last layer with
    weights up to there is such an output too, it is that layer: by custom the map is drawn before norm and activation.

    So a plain chain of convolutions has its last `nn.Conv2d`; a network of residual, dense or inception blocks the
    output of the last block; a vision transformer with a class token the output of the last block but one, for
    behind the last attention nothing depends on the patches. Weights play no part in it, but for layers that are
    switched off: randomised copies of a model have the layer that the model has.

    Raises
    ------
    ValueError
        No output is known to be of this kind; the message names the layers that have places.
    """
    check_input(images, torch.zeros(images.shape[:1] if isinstance(images, Tensor) else 0, dtype=torch.int64))
    check_model(model, images)
    return default_layer(model, images)


def last_convolution(model: nn.Module, images: Tensor) -> nn.Module:
    """The module that `gradcam_layer` names; an older name, to be dropped after 0.2."""
    warn("last_convolution is now gradcam_layer, which gives a name.", DeprecationWarning, stacklevel=2)
    return model.get_submodule(gradcam_layer(model, images))


def _named(model: nn.Module, images: Tensor, layer: str | nn.Module | None) -> str:
    """The name of the layer."""
    if layer is None:
        return default_layer(model, images)
    for name, module in model.named_modules():
        if layer is module or (isinstance(layer, str) and layer == name):
            return name
    known = ", ".join(name for name, _ in model.named_modules() if name)
    raise ValueError(f"layer {layer!r} is not part of this model; its layers: {known}.")


def _known_reading(
    model: nn.Module,
    images: Tensor,
    module: nn.Module,
    name: str,
    output: Tensor,
    reshape: str | Reading | None,
    count: int,
) -> Reading:
    """How to read the layer's output for `count` images; raises where that cannot be told or the layer has no place."""
    shape = tuple(output.shape)
    if callable(reshape):
        made = reshape(output.detach())
        if not isinstance(made, Tensor) or made.ndim != 4 or len(made) != count or made[0, 0].numel() < 2:
            got = tuple(made.shape) if isinstance(made, Tensor) else type(made).__name__
            raise ValueError(
                f"reshape must make (N, C, h, w) with h * w > 1, for N = {count} images, of {shape}, the output of "
                f"layer {name!r}; got {got}."
            )
        return reshape
    if reshape not in (None, "tokens"):
        raise ValueError(f"reshape must be 'tokens', a function or None, got {reshape!r}.")
    if len(shape) > 3 and shape[0] != count:
        raise ValueError(
            f"layer {name!r} puts out {shape[0]} maps for {count} images: the model cuts images into pieces, or runs "
            "them one by one. Name another layer with layer=, or take one image a pass with batch_size=1."
        )
    if len(shape) == 4 and reshape is None and sorted(shape[1:])[1] == 1:
        raise ValueError(
            f"layer {name!r} has no place: its output is {shape}. Name a layer before the pooling with layer=."
        )
    fits = len(shape) == 3 or (len(shape) == 4 and reshape is None)
    read = reading(model, images, module, name, shape, count) if fits else None
    if read is None:
        raise ValueError(
            f"the output of layer {name!r} is {shape}, and not known to be (N, C, h, w), (N, h, w, C) or tokens "
            "(N, T, C) of a grid, row by row: name another layer with layer=, or bring it to (N, C, h, w) with "
            "reshape=, for example reshape=lambda output: output.permute(0, 3, 1, 2)."
        )
    return read


@explains(unless="layer")  # whose output the gradient has to reach then, and not the image
def gradcam(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    layer: str | nn.Module | None = None,
    reshape: str | Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Grad-CAM: activations of a layer weighted by their mean gradient, rectified, stretched to image size.

    Maps `(N, 1, H, W)` >= 0, bilinear. Selvaraju et al. (2017). A map of zeros says that the weighted sum is nowhere
    positive.

    Parameters
    ----------
    layer : name or module of the model; None takes `gradcam_layer(model, images)`. A layer that runs several times
        is seen where it runs last.
    reshape : how the layer's output becomes `(N, C, h, w)`: a function that moves values and drops some, used on the
        gradient too; `"tokens"` for patches in rows, `(N, T, C)`, `(T, N, C)` or `(N, C, T)`, with class and register
        tokens left out; or None, which finds out whether it is `(N, C, h, w)`, `(N, h, w, C)` or tokens.

    Raises
    ------
    ValueError
        The layer is unknown, does not run, has no place, or its places cannot be told or are not used; no layer can
        be chosen; or no gradient reaches the layer.
    """
    name = _named(model, images, layer)
    module = model.get_submodule(name)
    read: Reading | None = None
    small, is_used = [], False
    with explaining(model):
        for part in chunks(len(images), images):
            run = partial(chosen_logits, model, targets=targets[part])
            logits, output = watched(run, images[part], module, name)
            read = read or _known_reading(model, images, module, name, output, reshape, len(logits))
            gradient = read(_gradient(run, images[part], module, name, logits, output))
            weights = gradient.mean((2, 3), keepdim=True)
            small.append((weights * read(output.detach())).sum(1, keepdim=True).relu())
            is_used = is_used or bool(gradient.any())
        maps = torch.cat(small)
        is_flat = (maps.amax((1, 2, 3)) - maps.amin((1, 2, 3)) <= rounding(maps)).all()
        if read and layer is None and is_flat and maps.any():
            _refuse_a_layer_without_a_place(model, images, module, name, read)
        if read and not is_used:
            _refuse_a_layer_whose_places_nothing_reads(model, images, module, name, read)
    return F.interpolate(maps, size=images.shape[2:], mode="bilinear", align_corners=False)


def _refuse_a_layer_without_a_place(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, read: Reading
) -> None:
    """Raise if the layer has one number a channel, the same everywhere, that differs from image to image."""
    values = read(watched(model, with_noise(images), module, name)[1].detach())
    spread = (values.amax((2, 3)) - values.amin((2, 3))).amax()
    if spread <= rounding(values) < (values[0] - values[1]).abs().amax():
        raise ValueError(
            f"the map at layer {name!r}, which was chosen because none was named, is the same everywhere: what it puts "
            "out does not depend on the place. Name an earlier layer with layer=."
        )


def _refuse_a_layer_whose_places_nothing_reads(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, read: Reading
) -> None:
    """Raise if the map is zero for the wiring of the model, not for its weights."""
    pair = with_noise(images)
    if not uses_places(model, pair, module, name, watched(model, pair, module, name)[1].shape, read):
        raise ValueError(
            f"the logits do not depend on the places of layer {name!r}, only on a class token there, and its map "
            "would be zero: name an earlier layer with layer=, or none."
        )


def _gradient(
    run: Callable[[Tensor], Tensor], images: Tensor, module: nn.Module, name: str, logits: Tensor, output: Tensor
) -> Tensor:
    """The gradient at the layer's output; raises where no way leads there."""
    found = None
    if logits.requires_grad:
        try:
            (found,) = torch.autograd.grad(logits.sum(), output, allow_unused=True)
        except RuntimeError as error:
            if isinstance(error, torch.cuda.OutOfMemoryError):
                raise
            raise ValueError(f"the model cannot be differentiated behind layer {name!r}: {error}") from error
    if found is not None:
        return found
    moved = watched(run, images, module, name, lambda kept: kept + numbers(kept))[0]
    if (moved - logits).abs().amax() > rounding(logits):
        raise ValueError(
            f"no gradient reaches layer {name!r}, although the logits depend on it: a part of the model behind it "
            "runs under torch.no_grad() or is detached. Let it run with gradients, or name a later layer."
        )
    raise ValueError(
        f"the logits do not depend on layer {name!r}, and its map would be zero: name one on the way from the image to "
        "the logits with layer=, or none."
    )


@explains
def guided_gradcam(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    layer: str | nn.Module | None = None,
    reshape: str | Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Guided Backprop times Grad-CAM, pixel by pixel; Selvaraju et al. (2017). Signed maps `(N, C, H, W)`."""
    return guided_backprop(model, images, targets) * gradcam(model, images, targets, layer=layer, reshape=reshape)
