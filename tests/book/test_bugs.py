"""Planted bugs: exactly where the truth says, and nowhere else."""

import math

import numpy as np
import pytest
import torch
from saliency_sanity import randomization
from saliency_sanity.book import bugs, data, models, photographs
from saliency_sanity.book.training import permute_labels
from saliency_sanity.device import generator
from scipy import stats
from scipy.ndimage import gaussian_filter
from skimage.measure import euler_number

GARMENTS = data.load("clothes", "test")
LABELS = torch.arange(10).repeat_interleave(300)


@pytest.fixture(scope="module")
def backgrounds():
    return bugs.backgrounds()


@pytest.fixture(scope="module")
def garments():
    return GARMENTS.images[:60], bugs.silhouettes(GARMENTS.images[:60]), GARMENTS.labels[:60]


def test_silhouettes_hold_the_object_and_have_no_holes(garments):
    images, masks, _ = garments
    assert masks.shape == images.shape[:1] + images.shape[2:] and set(masks.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(masks[images[:, 0] > 0.04], torch.ones(int((images > 0.04).sum())))
    assert all(euler_number(mask.numpy() == 1, connectivity=1) >= 1 for mask in masks)  # pieces minus holes


def test_a_silhouette_by_hand():
    picture = torch.zeros(1, 2, 7, 7)
    picture[0, 1, 1:6, 1:6] = 0.5
    picture[0, :, 2:5, 2:5] = 0  # a dark patch, enclosed
    picture[0, 0, 6, 6] = 0.03  # dust
    expected = torch.zeros(1, 7, 7)
    expected[0, 1:6, 1:6] = 1
    assert torch.equal(bugs.silhouettes(picture), expected)


def test_backgrounds_are_ten_different_pictures(backgrounds):
    assert len(backgrounds) == 10
    for picture in backgrounds.values():
        assert picture.shape[0] == 1 and min(picture.shape[1:]) >= 40
        assert 0 <= picture.min() and picture.max() <= 1 and picture.std() > 0.05
    corners = torch.stack([picture[0, :40, :40].flatten() for picture in backgrounds.values()])
    same = corners.corrcoef() - torch.eye(10)
    assert same.max() < 0.5  # a negative has correlation -1 with its picture


def test_scenes_are_objects_over_backgrounds(garments, backgrounds, device):
    images, masks, labels = (tensor.to(device) for tensor in garments)
    scenes = bugs.scenes(images, masks, labels, backgrounds, size=40, seed=3)
    assert scenes.images.device == images.device and scenes.images.shape == (60, 1, 40, 40)
    off = scenes.masks == 0
    assert torch.equal(scenes.images[:, 0][off], scenes.backgrounds[:, 0][off])
    assert torch.equal(scenes.masks.sum((1, 2)), masks.sum((1, 2)))
    for image, mask, whole, cover in zip(images, masks, scenes.images, scenes.masks):
        assert torch.equal(whole[0][cover == 1], image[0][mask == 1])
    names = list(backgrounds)
    for piece, which in zip(scenes.backgrounds[:6], labels[:6]):
        pieces = backgrounds[names[which]][0].unfold(0, 40, 1).unfold(1, 40, 1).to(device)
        assert (pieces == piece[0]).all(-1).all(-1).any()  # cut from the background of its class


def test_a_soft_mask_lets_the_background_through(backgrounds):
    objects, masks = torch.ones(1, 1, 40, 40), torch.full((1, 40, 40), 0.25)
    scenes = bugs.scenes(objects, masks, torch.tensor([2]), backgrounds, seed=0)
    assert torch.allclose(scenes.images, 0.25 + 0.75 * scenes.backgrounds)


def test_places_do_not_depend_on_the_backgrounds(garments, backgrounds):
    images, masks, labels = garments
    one, two = (bugs.scenes(images, masks, which, backgrounds, seed=5) for which in (labels, (labels + 1) % 10))
    assert torch.equal(one.masks, two.masks) and not torch.equal(one.backgrounds, two.backgrounds)
    assert torch.equal(one.images, bugs.scenes(images, masks, labels, backgrounds, seed=5).images)
    assert not torch.equal(one.masks, bugs.scenes(images, masks, labels, backgrounds, seed=6).masks)
    full = torch.ones(200, 1, 38, 38), torch.ones(200, 38, 38)
    corners = {
        tuple(mask.nonzero().amin(0).tolist()) for mask in bugs.scenes(*full, LABELS[:200], backgrounds, seed=0).masks
    }
    assert len(corners) == 9  # every place that there is


def test_the_three_ways_to_choose_backgrounds():
    clean = permute_labels(LABELS, seed=0)
    assert (clean == LABELS).float().mean().item() == pytest.approx(0.1, abs=0.02)
    assert not ((LABELS + 1) % 10 == LABELS).any()


@pytest.mark.parametrize(
    ("size", "which", "message"),
    [(27, 0, "fit"), (73, 0, "fit"), (40, 10, "0..9"), (40, -1, "0..9")],
)
def test_what_does_not_fit_is_refused(garments, backgrounds, size, which, message):
    images, masks, _ = garments
    with pytest.raises(ValueError, match=message):
        bugs.scenes(images, masks, torch.full((60,), which), backgrounds, size=size, seed=0)


@pytest.mark.parametrize("sigma", [0.7, 1.0, 2.0])
def test_one_class_is_blurred_as_by_scipy(sigma):
    images = torch.rand(20, 1, 40, 40, generator=generator(2))
    before, labels = images.clone(), torch.arange(20) % 10
    blurred = bugs.blur_class(images, labels, label=4, sigma=sigma)
    assert torch.equal(images, before) and torch.equal(blurred[labels != 4], images[labels != 4])
    for image, ours in zip(images[labels == 4], blurred[labels == 4]):
        radius = math.ceil(3 * sigma)
        reference = gaussian_filter(image[0].double().numpy(), sigma, mode="mirror", radius=radius)
        assert np.abs(ours[0].numpy() - reference).max() < 1e-5


@pytest.mark.parametrize("fraction", [0, 0.1, 0.333, 1])
def test_flips_are_where_they_are_said_to_be(fraction, device):
    labels = LABELS.to(device)
    before = labels.clone()
    wrong, flipped = bugs.mislabel(labels, fraction=fraction, seed=7)
    assert torch.equal(labels, before) and wrong.device == flipped.device == labels.device
    assert torch.equal((wrong != labels).nonzero()[:, 0], flipped) and len(flipped) == round(fraction * 3000)
    assert wrong.dtype == torch.int64 and wrong.min() >= 0 and wrong.max() <= 9


def test_flips_are_spread_over_the_images_and_the_other_classes():
    wrong, flipped = bugs.mislabel(LABELS, fraction=0.9, seed=1)
    shift = (wrong[flipped] - LABELS[flipped]) % 10
    assert stats.chisquare(shift.bincount(minlength=10)[1:]).pvalue > 0.001
    assert stats.chisquare(LABELS[flipped].bincount()).pvalue > 0.001


def test_flips_follow_their_seed_and_leave_the_global_state():
    state = torch.get_rng_state()
    first, again, other = (bugs.mislabel(LABELS, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.labels, again.labels) and not torch.equal(first.flipped, other.flipped)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"fraction": 1.1}, "fraction"),
        ({"fraction": -0.1}, "fraction"),
        ({"classes": 1}, "two classes"),
        ({"classes": 9}, "0..8"),
    ],
)
def test_impossible_flips_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        bugs.mislabel(LABELS, seed=0, **options)


def changed(model, broken) -> dict[str, torch.Tensor]:
    """Of each weight and statistic that is not as it was, which of its channels are not."""
    pairs = ((name, w, broken.state_dict()[name]) for name, w in model.state_dict().items() if w.dim())
    return {name: (old != new).flatten(1).any(1) if old.dim() > 1 else old != new for name, old, new in pairs
            if not torch.equal(old, new)}  # fmt: skip


@pytest.mark.parametrize("stage", ["logits", "conv3", "conv1"])
def test_lost_weights_are_those_of_the_stage_as_initialised(stage):
    model = models.load("scenes_clean")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    broken = bugs.lost_weights(model, stage, seed=1)
    fresh = dict(randomization.independent(model, seed=1))[stage].state_dict()
    assert {name.split(".")[0] for name in changed(model, broken)} == {stage, stage.replace("conv", "norm")}
    assert all(torch.equal(w, fresh[name]) for name, w in broken.state_dict().items() if w.dim())
    assert all(torch.equal(w, before[name]) for name, w in model.state_dict().items())


def test_a_share_of_the_channels_is_lost_whole_and_the_norm_loses_the_same():
    model = models.load("scenes_clean")
    lost = changed(model, bugs.lost_weights(model, "conv2", fraction=0.25, seed=3))
    assert set(lost) == {f"conv2.{k}" for k in ("weight", "bias")} | {
        f"norm2.{k}" for k in ("weight", "bias", "running_mean", "running_var")
    }
    assert lost["conv2.weight"].sum() == 8 and all(torch.equal(v, lost["conv2.weight"]) for v in lost.values())
    assert not changed(model, bugs.lost_weights(model, "conv2", fraction=0.0, seed=3))


def test_what_is_lost_follows_the_seed_and_leaves_the_global_state():
    model, state = models.load("scenes_clean"), torch.get_rng_state()
    first, again, other = (bugs.lost_weights(model, "conv1", fraction=0.5, seed=s) for s in (0, 0, 1))
    assert not changed(first, again) and changed(first, other)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    ("stage", "fraction", "message"),
    [("fc9", 1.0, "known: logits, conv3"), ("conv1", 1.5, "fraction"), ("conv1", -1, "fraction")],
)
def test_impossible_losses_are_refused(stage, fraction, message):
    with pytest.raises(ValueError, match=message):
        bugs.lost_weights(models.load("scenes_clean"), stage, fraction=fraction, seed=0)


def test_wrong_preprocessing_keeps_the_shape_and_changes_the_image():
    images = torch.rand(3, 1, 8, 8, generator=generator(0))
    before = images.clone()
    fed = {name: wrong(images) for name, wrong in bugs.PREPROCESSING.items()}
    assert torch.equal(images, before)
    assert all(wrong.shape == images.shape and not torch.allclose(wrong, images) for wrong in fed.values())
    assert fed["not scaled"].max() > 200 and fed["scaled to [-1, 1]"].min() < -0.9
    assert torch.equal(fed["negative"] + images, torch.ones_like(images))
    assert torch.equal(fed["rows and columns exchanged"][0, 0, 2], images[0, 0, :, 2])


def test_the_right_imagenet_input_by_hand():
    images = torch.rand(2, 3, 448, 448, generator=generator(1))
    mean, std = (torch.tensor(c).view(3, 1, 1) for c in (photographs.IMAGENET_MEAN, photographs.IMAGENET_STD))
    flat = torch.ones(1, 3, 448, 448) * torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1)
    expected = (torch.tensor([0.2, 0.5, 0.9]).view(3, 1, 1) - mean) / std
    assert torch.allclose(bugs.imagenet_input(flat), expected.expand(1, 3, 224, 224), atol=1e-5)
    small = torch.rand(2, 3, 224, 224, generator=generator(2))
    assert torch.allclose(bugs.imagenet_input(small), (small - mean) / std, atol=1e-5)
    assert bugs.imagenet_input(images).shape == (2, 3, 224, 224)
    with pytest.raises(ValueError, match="3"):
        bugs.imagenet_input(images[:, :1])


def test_wrong_imagenet_input_is_wrong_as_it_says():
    images = torch.rand(2, 3, 300, 300, generator=generator(3))
    before, right = images.clone(), bugs.imagenet_input(images)
    fed = {name: wrong(images) for name, wrong in bugs.IMAGENET_PREPROCESSING.items()}
    assert torch.equal(images, before)
    assert torch.equal(fed.pop("not resized"), photographs.normalize(images))
    assert all(wrong.shape == right.shape and not torch.allclose(wrong, right, atol=0.1) for wrong in fed.values())
    plain = photographs.denormalize(right)
    assert torch.allclose(photographs.denormalize(fed["red and blue exchanged"]), plain.flip(1), atol=1e-5)
    assert torch.allclose(fed["not normalised"], plain, atol=1e-5)
    assert torch.allclose(fed["scaled to [-1, 1]"], 2 * plain - 1, atol=1e-5)
    assert torch.allclose(fed["neither scaled nor normalised"], 255 * plain, atol=1e-3)
