"""Controls that look like methods but never look at the model."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .. import edges
from ..checks import check_input
from ..device import generator, seed_of
from .passes import places


def sobel(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The Sobel edge map of the image, `(N, 1, H, W)` >= 0."""
    check_input(images, targets)
    return edges.sobel(images)[:, None]


def canny(model: nn.Module, images: Tensor, targets: Tensor, *, sigma: float = 1.0) -> Tensor:
    """The Canny edges of the image, 0 or 1, `(N, 1, H, W)`."""
    check_input(images, targets)
    return edges.canny(images, sigma=sigma)[:, None]


def input(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """The image itself, summed over its channels, `(N, 1, H, W)`."""
    check_input(images, targets)
    return images.detach().sum(1, keepdim=True)


def noise(
    model: nn.Module, images: Tensor, targets: Tensor, *, seed: int = 0, indices: Sequence[int] | None = None
) -> Tensor:
    """White Gaussian noise, `(N, 1, H, W)`, by `seed` and the image's place as in `smoothgrad`."""
    check_input(images, targets)
    shape = (1, *images.shape[2:])
    drawn = [torch.randn(shape, generator=generator(seed_of(seed, place))) for place in places(indices, images)]
    return torch.stack(drawn).to(images)
