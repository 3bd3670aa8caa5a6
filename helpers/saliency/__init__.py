"""Saliency methods: `method(model, images, targets, **options) -> maps`, signed as each method defines it.

Images are float `(N, C, H, W)`, targets int64 `(N,)`, the class whose *logit* is explained. Maps have the
images' shape; those of the CAM family and the controls are `(N, 1, H, W)`. The model is explained in eval mode
and left as it was: mode, weights, gradients and hooks.
"""

import re
from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature

import torch
from torch import Tensor, nn

from ..checks import check_input
from ..device import batches
from . import controls
from .backprop_rules import deconvnet, guided_backprop
from .cam import gradcam, guided_gradcam
from .gradients import (
    expected_gradients,
    gradient,
    input_x_gradient,
    integrated_gradients,
    smoothgrad,
    smoothgrad_integrated_gradients,
    smoothgrad_squared,
    vargrad,
)
from .lrp import lrp_alpha_beta, lrp_composite, lrp_epsilon
from .passes import at_most, places
from .perturbation import kernel_shap, lime, occlusion
from .rescale import deeplift

__all__ = [
    "METHODS",
    "TITLES",
    "controls",
    "deconvnet",
    "deeplift",
    "expected_gradients",
    "explain",
    "get",
    "gradcam",
    "gradient",
    "guided_backprop",
    "guided_gradcam",
    "heatmap",
    "input_x_gradient",
    "integrated_gradients",
    "kernel_shap",
    "lime",
    "lrp_alpha_beta",
    "lrp_composite",
    "lrp_epsilon",
    "occlusion",
    "smoothgrad",
    "smoothgrad_integrated_gradients",
    "smoothgrad_squared",
    "title",
    "vargrad",
]

METHODS: dict[str, Callable[..., Tensor]] = {
    method.__name__: method
    for method in (
        gradient,
        input_x_gradient,
        integrated_gradients,
        smoothgrad,
        smoothgrad_squared,
        vargrad,
        smoothgrad_integrated_gradients,
        expected_gradients,
        guided_backprop,
        deconvnet,
        gradcam,
        guided_gradcam,
        deeplift,
        lrp_epsilon,
        lrp_alpha_beta,
        lrp_composite,
        occlusion,
        lime,
        kernel_shap,
        controls.sobel,
        controls.canny,
        controls.input,
        controls.noise,
    )
}

TITLES: dict[str, str] = {
    "gradient": "Gradient",
    "input_x_gradient": "Input × Gradient",
    "integrated_gradients": "Integrated Gradients",
    "smoothgrad": "SmoothGrad",
    "smoothgrad_squared": "SmoothGrad²",
    "vargrad": "VarGrad",
    "smoothgrad_integrated_gradients": "SmoothGrad-IG",
    "expected_gradients": "Expected Gradients",
    "guided_backprop": "Guided Backprop",
    "deconvnet": "DeconvNet",
    "gradcam": "Grad-CAM",
    "guided_gradcam": "Guided Grad-CAM",
    "deeplift": "DeepLIFT",
    "lrp_epsilon": "LRP-ε",
    "lrp_alpha_beta": "LRP-α2β1",
    "lrp_composite": "LRP composite",
    "occlusion": "Occlusion",
    "lime": "LIME",
    "kernel_shap": "KernelSHAP",
    "sobel": "Sobel edges",
    "canny": "Canny edges",
    "input": "The input",
    "noise": "Noise",
}


def get(method: str | Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The method of that name, or the callable itself; an unknown name raises with the list of the known."""
    if callable(method):
        return method
    if not isinstance(method, str) or method not in METHODS:
        raise ValueError(f"unknown method {method!r}; known: {', '.join(METHODS)}.")
    return METHODS[method]


def _letters(name: str) -> str:
    return re.sub(r"[\W_]", "", name.lower())


def title(method: str | Callable[..., Tensor]) -> str:
    """What people call a method: a key of `METHODS`, however spelled ("guided backprop"), or a callable.

    An unknown name is spelled without underscores.
    """
    while isinstance(method, partial):
        method = method.func
    name = method if isinstance(method, str) else getattr(method, "__name__", type(method).__name__)
    known = {_letters(key): title for key, title in TITLES.items()}
    return known.get(_letters(name)) or name.replace("_", " ")


def heatmap(maps: Tensor, *, signed: bool) -> Tensor:
    """Maps `(N, C, H, W)` as one picture each, `(N, H, W)`: the sum over channels, or its absolute value."""
    if not isinstance(maps, Tensor) or maps.ndim != 4:
        raise ValueError(f"maps must be (N, C, H, W), got {_shape(maps)}.")
    total = maps.sum(1)
    return total if signed else total.abs()


def made_by(method: str | Callable[..., Tensor], maps: Tensor, images: Tensor) -> Tensor:
    """What a method has returned, if it is maps of these images; raises where it is not."""
    if not isinstance(maps, Tensor) or maps.ndim != 4 or len(maps) != len(images):
        raise ValueError(f"{title(method)} must return maps ({len(images)}, C, H, W), got {_shape(maps)}.")
    if not maps.is_floating_point():
        raise ValueError(f"{title(method)} must return maps of floats, got {maps.dtype}.")
    return maps.detach()


def _shape(values) -> str:
    return str(tuple(values.shape)) if isinstance(values, Tensor) else type(values).__name__


def explain(
    method: str | Callable[..., Tensor],
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    signed: bool,
    batch_size: int | None = None,
    **options,
) -> Tensor:
    """Heatmaps `(N, H, W)` in one call: a method's maps, their channels added up by `heatmap`.

    Parameters
    ----------
    method : a key of `METHODS`, or a function `(model, images, targets, **options)` that returns `(N, C, H, W)`.
    signed : keep the sign of the sum over channels, or take its absolute value.
    batch_size : images of one pass at most. A function that has no such option is given that many at a time, with
        their places where it takes `indices`.
    options : the method's own, for example `steps=`.

    Raises
    ------
    ValueError
        The method or an option is unknown; images, targets or model are not what the method takes; what it returns
        is no maps.
    """
    function = get(method)
    known = signature(function).parameters
    unknown = options.keys() - known
    if unknown and Parameter.VAR_KEYWORD not in {parameter.kind for parameter in known.values()}:
        own = ", ".join(name for name, parameter in known.items() if parameter.kind is Parameter.KEYWORD_ONLY)
        raise ValueError(f"{title(method)} has no option {', '.join(sorted(unknown))}; it has: {own or 'none'}.")
    check_input(images, targets)
    if batch_size is None:
        maps = function(model, images, targets, **options)
    elif "batch_size" in known:
        maps = function(model, images, targets, batch_size=batch_size, **options)
    else:
        maps = _part_by_part(function, model, images, targets, batch_size, options)
    return heatmap(made_by(method, maps, images), signed=signed)


def _part_by_part(
    function: Callable[..., Tensor], model: nn.Module, images: Tensor, targets: Tensor, size: int, options: dict
) -> Tensor:
    """The maps of a function that takes no `batch_size`, `size` images at a time."""
    where = places(options.pop("indices", None), images) if "indices" in signature(function).parameters else None
    maps = []
    with at_most(size):  # also for the methods that it calls itself
        for part in batches(len(images), size):
            own = options if where is None else {**options, "indices": where[part]}
            maps.append(function(model, images[part], targets[part], **own))
    return torch.cat(maps)
