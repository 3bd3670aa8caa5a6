"""Class activation maps: one weight a channel, drawn at the resolution of a convolution."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .backprop_rules import guided_backprop
from .backward_graph import gradient_or_zeros
from .passes import chosen_logits, chunks, explaining, explains


def last_convolution(model: nn.Module, images: Tensor) -> nn.Module:
    """The `nn.Conv2d` that runs last in eval mode on `images`.

    Raises
    ------
    ValueError
        No convolution runs.
    """
    ran, hooks = [], []
    try:
        for module in model.modules():
            if isinstance(module, nn.Conv2d):
                hooks.append(module.register_forward_hook(lambda module, *_: ran.append(module)))
        with explaining(model), torch.no_grad():
            model(images[:1].clone())
    finally:
        for hook in hooks:
            hook.remove()
    if not ran:
        raise ValueError("this model runs no nn.Conv2d; name the layer to look at with layer=.")
    return ran[-1]


def _layer(model: nn.Module, images: Tensor, layer: str | nn.Module | None) -> nn.Module:
    modules = dict(model.named_modules())
    if layer is None:
        return last_convolution(model, images)
    if isinstance(layer, str) and layer in modules:
        return modules[layer]
    if isinstance(layer, nn.Module) and any(layer is module for module in modules.values()):
        return layer
    known = ", ".join(name for name in modules if name)
    raise ValueError(f"layer {layer!r} is not part of this model; its layers: {known}.")


@explains
def gradcam(model: nn.Module, images: Tensor, targets: Tensor, *, layer: str | nn.Module | None = None) -> Tensor:
    """Grad-CAM: activations of a layer weighted by their mean gradient, rectified, stretched to image size.

    Maps `(N, 1, H, W)` >= 0, bilinear. `layer` is a name or module of the model whose output is
    `(N, C, h, w)`; None takes the convolution that runs last. Selvaraju et al. (2017).

    Raises
    ------
    ValueError
        The model has no convolution, or the layer is unknown, does not run, or has no spatial output.
    """
    module = _layer(model, images, layer)
    kept = []

    def keep(module, inputs, output):
        if not isinstance(output, Tensor) or output.ndim != 4:
            raise ValueError(f"the output of layer {layer!r} is not (N, C, h, w): no map can be drawn from it.")
        kept.append(output.detach().clone().requires_grad_())
        return kept[-1].clone()

    maps = []
    hook = module.register_forward_hook(keep)
    try:
        with explaining(model):
            for part in chunks(len(images), images):
                kept.clear()
                logits = chosen_logits(model, images[part].detach().clone(), targets[part])
                if not kept:
                    raise ValueError(f"layer {layer!r} does not run in this model.")
                weights = gradient_or_zeros(logits, kept[-1]).mean((2, 3), keepdim=True)
                small = (weights * kept[-1].detach()).sum(1, keepdim=True).relu()
                maps.append(F.interpolate(small, size=images.shape[2:], mode="bilinear", align_corners=False))
    finally:
        hook.remove()
    return torch.cat(maps)


@explains
def guided_gradcam(
    model: nn.Module, images: Tensor, targets: Tensor, *, layer: str | nn.Module | None = None
) -> Tensor:
    """Guided Backprop times Grad-CAM, pixel by pixel; Selvaraju et al. (2017). Signed maps `(N, C, H, W)`."""
    return guided_backprop(model, images, targets) * gradcam(model, images, targets, layer=layer)
