"""The controls: what the image shows of itself, and noise; the model is never asked."""

import numpy as np
import pytest
import torch
from networks import images, targets
from saliency_sanity.device import generator, seed_of
from saliency_sanity.saliency import controls
from skimage import feature, filters
from torch import nn

CONTROLS = (controls.sobel, controls.canny, controls.input, controls.noise)


class Untouched(nn.Module):
    def forward(self, x):
        raise AssertionError("a control asked the model")


def test_sobel_and_canny_are_scikit_images(device):
    x = images(3, (3, 20, 31)).to(device)
    found = [control(Untouched(), x, targets().to(device)) for control in (controls.sobel, controls.canny)]
    for grey, sobel, canny in zip(x.cpu().mean(1).double().numpy(), *(maps.cpu() for maps in found), strict=True):
        np.testing.assert_allclose(sobel[0], filters.sobel(grey), atol=1e-6)
        np.testing.assert_array_equal(canny[0], feature.canny(grey))


def test_cannys_width_can_be_chosen():
    x = images(1, (3, 40, 40))
    wide = controls.canny(Untouched(), x, targets(1), sigma=3.0)
    np.testing.assert_array_equal(wide[0, 0], feature.canny(x[0].mean(0).double().numpy(), sigma=3.0))


def test_input_is_the_sum_of_the_channels():
    x = images()
    assert torch.equal(controls.input(Untouched(), x, targets()), x.sum(1, keepdim=True))


def test_noise_is_white_gaussian_and_its_seed_is_its_own(device):
    x, state = images(20, (3, 40, 40)).to(device), torch.get_rng_state()
    a, b, c = (controls.noise(Untouched(), x, targets(20).to(device), seed=seed) for seed in (0, 0, 1))
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(a, b) and a.device == x.device
    assert torch.equal(a[7].cpu(), torch.randn(1, 40, 40, generator=generator(seed_of(0, 7))))
    assert abs(a.mean()) < 0.02 and abs(a.std() - 1) < 0.02
    values = torch.stack([a.flatten(), c.flatten(), a.roll(1, 0).flatten(), a.roll(1, 3).flatten()])
    assert (torch.corrcoef(values) - torch.eye(4, device=device)).abs().max() < 0.03


@pytest.mark.parametrize("control", CONTROLS)
def test_the_image_is_left_as_it_was_and_no_graph_hangs_on_the_map(control):
    x = images().requires_grad_()
    before = x.detach().clone()
    maps = control(Untouched(), x, targets())
    maps += 1
    assert torch.equal(x, before) and not maps.requires_grad
    assert maps.shape == (3, 1, 12, 12)


@pytest.mark.parametrize("seed", [1.5, None, "0"])
def test_a_seed_that_is_no_int_raises(seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        controls.noise(Untouched(), images(), targets(), seed=seed)
