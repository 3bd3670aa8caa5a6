"""Controls that look like methods but never look at the model.

`batch_size` is, as in every method, how many images are worked on at once.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from .. import edges
from ..checks import check_input
from ..device import generator, seed_of
from .passes import at_most, chunks, places


def _by_parts(edges_of: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, batch_size: int | None) -> Tensor:
    check_input(images, targets)
    with at_most(batch_size), torch.autocast(images.device.type, enabled=False):
        return torch.cat([edges_of(images[part]) for part in chunks(len(images), images)])[:, None]


def sobel(model: nn.Module, images: Tensor, targets: Tensor, *, batch_size: int | None = None) -> Tensor:
    """The Sobel edge map of the image, `(N, 1, H, W)` >= 0."""
    return _by_parts(edges.sobel, images, targets, batch_size)


def canny(
    model: nn.Module, images: Tensor, targets: Tensor, *, sigma: float = 1.0, batch_size: int | None = None
) -> Tensor:
    """The Canny edges of the image, 0 or 1, `(N, 1, H, W)`; `sigma`, in pixels, is how far it is smoothed first."""
    return _by_parts(partial(edges.canny, sigma=sigma), images, targets, batch_size)


def input(model: nn.Module, images: Tensor, targets: Tensor, *, batch_size: int | None = None) -> Tensor:
    """The image itself, summed over its channels, `(N, 1, H, W)`."""
    return _by_parts(lambda part: part.detach().sum(1), images, targets, batch_size)


def noise(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    seed: int = 0,
    indices: Sequence[int] | None = None,
    batch_size: int | None = None,
) -> Tensor:
    """White Gaussian noise, `(N, 1, H, W)`, by `seed` and the image's place, the same on every device."""
    check_input(images, targets)
    shape = (1, *images.shape[2:])
    with at_most(batch_size):  # for the sake of its check: every image is drawn by itself
        drawn = [torch.randn(shape, generator=generator(seed_of(seed, place))) for place in places(indices, images)]
    return torch.stack(drawn).to(images)
