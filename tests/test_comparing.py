"""Work that is cut into parts: the same rows, and no more memory for more images or stages."""

import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from networks import cnn, images, targets
from saliency_sanity import comparing, followups, sanity
from saliency_sanity.saliency import METHODS

METHODS_OF_ALL_KINDS = {
    "gradient": "gradient",
    "gradcam": "gradcam",
    "smoothgrad": partial(METHODS["smoothgrad"], samples=3),
    "lime": partial(METHODS["lime"], samples=64),
    "noise": "noise",
    "denoised": followups.denoised("gradient", samples=2),
}
KEYS = ["scheme", "role", "seed", "stage", "layer", "method", "metric", "image"]


def in_order(frame):
    return frame.sort_values(KEYS).reset_index(drop=True)


@pytest.mark.parametrize("scheme", ["cascading", "independent"])
def test_parts_by_their_indices_give_the_rows_of_the_whole(scheme):
    x, y, twins = images(7, dtype=torch.float64), targets(7), [cnn(1).double()]
    run = partial(
        sanity.parameter_randomization,
        cnn().double(),
        methods=METHODS_OF_ALL_KINDS,
        metrics=["pearson", "ssim"],
        scheme=scheme,
        seeds=2,
        twins=twins,
        show_progress=False,
    )
    whole = run(x, y)
    pieces = [[5, 0], [1, 2, 6], [3, 4]]
    parts = pd.concat([run(x[piece], y[piece], indices=piece) for piece in pieces])
    ours, theirs = in_order(parts), in_order(whole)
    assert ours[KEYS].equals(theirs[KEYS])
    same = ours.scheme != "other_image"
    np.testing.assert_allclose(ours.similarity[same], theirs.similarity[same], atol=1e-6)
    assert not np.allclose(ours.similarity[~same], theirs.similarity[~same], equal_nan=True)


def test_parts_of_the_other_tests_too():
    x, y, model = images(5), targets(5), cnn()
    logit = partial(followups.random_logit, methods=["gradient", "noise"], metrics=["pearson"], seeds=2)
    rise = partial(followups.complexity_rise, methods=["gradient", "noise"], seeds=2)
    for run, column in ((logit, "similarity"), (rise, "rise")):
        whole, keys = run(model, x, y), ["seed", "method", "image"]
        parts = pd.concat([run(model, x[i:j], y[i:j], indices=range(i, j)) for i, j in ((0, 2), (2, 5))])
        ours, theirs = (frame.sort_values(keys).reset_index(drop=True) for frame in (parts, whole))
        assert ours[keys].equals(theirs[keys])
        np.testing.assert_allclose(ours[column], theirs[column], atol=1e-4)
    networks = [cnn(seed) for seed in range(4)]
    labels = partial(
        sanity.data_randomization,
        networks[:2],
        networks[2:],
        methods=["noise"],
        metrics=["pearson"],
        lines=False,
        show_progress=False,
    )
    part = labels(x[3:], y[3:], indices=[3, 4]).set_index(KEYS).similarity
    np.testing.assert_allclose(part, labels(x, y).set_index(KEYS).similarity[part.index])


@pytest.mark.parametrize("indices", [[0, 1], [0, 1, 1], [0, 1, 2, 3]])
def test_places_are_checked(indices):
    with pytest.raises(ValueError, match="indices must be"):
        sanity.parameter_randomization(
            cnn(), images(3), targets(3), methods=["gradient"], metrics=["ssim"], indices=indices
        )


@pytest.mark.parametrize("at_once", [1, 3])
def test_the_size_of_a_block_does_not_matter(at_once, monkeypatch):
    """Nor for the partner of an image, whose map is made again if it is in another block."""

    def noisy(model, images, targets, *, seed=0):
        """A method that knows no places."""
        return METHODS["noise"](model, images, targets, seed=seed)

    x, y = images(7, dtype=torch.float64), targets(7)
    methods = METHODS_OF_ALL_KINDS | {"noisy": noisy, "guided": "guided_backprop"}
    model, options = cnn().double(), {"metrics": ["pearson"], "twins": [cnn(1).double()], "show_progress": False}
    run = partial(sanity.parameter_randomization, model, x, y, **options)
    whole = run(methods=methods, seeds=[3])
    monkeypatch.setattr(comparing, "PIXELS_AT_ONCE", at_once * x[0, 0].numel())
    parts = run(methods=methods, seeds=[3], batch_size=1)
    assert parts[KEYS].equals(whole[KEYS])
    np.testing.assert_allclose(parts.similarity, whole.similarity, atol=1e-6)


CODE = """
import sys, torch
from torch import nn
from saliency_sanity import comparing, sanity
torch.set_num_threads(1)
comparing.PIXELS_AT_ONCE = 4 * 224 * 224
sanity.check_input = lambda images, targets: None  # which looks at all pixels at once

def own(model, images, targets):
    return images * 1

def run(count, stages):
    layers = [layer for _ in range(stages - 2) for layer in (nn.Conv2d(2, 2, 1), nn.ReLU())]
    model = nn.Sequential(nn.Conv2d(1, 2, 9, stride=16), *layers, nn.Flatten(), nn.Linear(2 * 14 * 14, 4))
    images, targets = torch.rand(1, 1, 224, 224).expand(count, -1, -1, -1), torch.zeros(count).long()
    options = {"methods": ["gradient", own], "metrics": ["pearson"], "seeds": 1, "batch_size": 4}
    sanity.parameter_randomization(model, images, targets, **options, show_progress=False)
    with open("/proc/self/status") as status:  # the most that this process has ever held
        return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) / 1024

before = run(8, 3)
print(run(64, 9) - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="only Linux tells the peak of a process")
def test_memory_grows_with_neither_images_nor_stages():
    """The maps of all images at all stages are 128 MB; the images themselves are one in memory."""
    ran = subprocess.run([sys.executable, "-W", "ignore", "-c", CODE], capture_output=True, text=True)
    assert float(ran.stdout) < 50, ran.stderr
