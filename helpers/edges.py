"""Edge detectors, batched: what a picture shows of itself, without any network."""

import math
from numbers import Real

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_float_images


def grey(images: Tensor) -> Tensor:
    """Mean over the channels of `(N, C, H, W)`, `(N, H, W)`.

    Raises
    ------
    ValueError
        Not a finite float tensor of four axes, or empty.
    """
    check_float_images(images)
    return images.detach().mean(1)


def sobel(images: Tensor) -> Tensor:
    """Size of the Sobel gradient of the grey images, `(N, H, W)` >= 0 (scikit-image's `filters.sobel`)."""
    picture = grey(images)[:, None]
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=picture.dtype, device=picture.device) / 4
    kernels = torch.stack([across, across.T])[:, None]
    slopes = F.conv2d(F.pad(picture, (1, 1, 1, 1), mode="replicate"), kernels)
    return (slopes.square().sum(1) / 2).sqrt()


def canny(images: Tensor, *, sigma: float = 1.0) -> Tensor:
    """Canny edges of the grey images as 0 and 1, `(N, H, W)`; scikit-image's `feature.canny`, one by one.

    `sigma`, in pixels, is the width of the Gaussian by which they are smoothed first.

    Raises
    ------
    ValueError
        Not a finite float tensor of four axes, or empty; `sigma` is negative or no finite number.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 <= sigma < math.inf:
        raise ValueError(f"sigma must not be negative, and it must be a finite number, got {sigma!r}.")
    from skimage import feature  # here, because it takes a while and only Canny needs it

    pictures = grey(images).double().cpu().numpy()
    found = np.stack([feature.canny(picture, sigma=sigma) for picture in pictures])
    return torch.from_numpy(found).to(images)
