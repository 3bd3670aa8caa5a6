"""Edge detectors against scikit-image, image by image."""

import numpy as np
import pytest
import torch
from saliency_sanity import edges
from saliency_sanity.book.photographs import normalize, whole
from saliency_sanity.device import generator
from skimage import feature, filters


def pictures(kind):
    draw = generator(0)
    if kind == "noise":
        return torch.randn(3, 2, 17, 23, generator=draw)
    if kind == "photographs":
        return normalize(whole(64)[0])
    if kind == "tiny":
        return torch.rand(2, 1, 3, 1, generator=draw)
    step = torch.zeros(2, 1, 12, 12)  # edges at the border too
    step[0, :, 4:], step[1, :, :, :1] = 1, -2
    return step


KINDS = ("noise", "photographs", "step", "tiny")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sobel_is_scikit_images(kind, dtype, device):
    images = pictures(kind).to(device, dtype)
    ours = edges.sobel(images)
    assert ours.dtype == dtype and ours.device == images.device
    for image, edge in zip(images.mean(1).cpu().numpy(), ours.cpu().numpy(), strict=True):
        np.testing.assert_allclose(edge, filters.sobel(image), atol=1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sigma", [0.8, 1.0, 2.5])
def test_canny_is_scikit_images(kind, sigma, device):
    images = pictures(kind).to(device)
    ours = edges.canny(images, sigma=sigma)
    assert ours.dtype == images.dtype and ours.device == images.device
    for image, edge in zip(images.mean(1).cpu().double().numpy(), ours.cpu().numpy(), strict=True):
        np.testing.assert_array_equal(edge, feature.canny(image, sigma=sigma))


def test_canny_finds_some_edges_and_smoothing_removes_some():
    images = pictures("photographs")
    fine, coarse = edges.canny(images), edges.canny(images, sigma=4.0)
    assert 0 < coarse.sum() < fine.sum() < fine.numel()


@pytest.mark.parametrize("detect", [edges.sobel, edges.canny])
def test_a_uniform_image_has_no_edges_and_an_image_is_left_as_it_was(detect):
    assert not detect(torch.full((1, 3, 9, 9), 0.3)).any()
    images = pictures("noise").requires_grad_()
    before = images.detach().clone()
    assert not detect(images).requires_grad
    assert torch.equal(images, before)


@pytest.mark.parametrize("detect", [edges.grey, edges.sobel, edges.canny])
@pytest.mark.parametrize(
    "images",
    [torch.rand(3, 8, 8), torch.rand(8, 8), torch.ones(1, 3, 8, 8).byte(), np.zeros((1, 3, 8, 8)), None],
)
def test_what_is_no_float_batch_raises(detect, images):
    with pytest.raises(ValueError, match=r"float tensor \(N, C, H, W\)"):
        detect(images)


@pytest.mark.parametrize("detect", [edges.grey, edges.sobel, edges.canny])
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x[:0],
        lambda x: x[..., :0],
        lambda x: x[:, :0],
        lambda x: x / 0,
        lambda x: x.to("meta"),
        lambda x: x.to_sparse(),
        lambda x: x.to(torch.float8_e4m3fn),
    ],
)
def test_what_has_no_values_raises(detect, change):
    with pytest.raises(ValueError, match="images"):
        detect(change(torch.ones(1, 3, 8, 8)))
