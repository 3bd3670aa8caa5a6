"""The small data sets: shapes, ranges, balance, and no image in both parts."""

import pytest
import torch
from saliency_sanity.book import data

SIZES = {
    ("digits", "train"): 4000,
    ("digits", "test"): 1000,
    ("clothes", "train"): 12000,
    ("clothes", "test"): 2000,
}


@pytest.fixture(scope="module", params=data.CLASSES)
def parts(request):
    return request.param, {split: data.load(request.param, split) for split in data.SPLITS}


def test_shapes_types_ranges_and_balance(parts):
    name, loaded = parts
    for split, (images, labels, classes) in loaded.items():
        count = SIZES[name, split]
        assert images.shape == (count, 1, 28, 28) and images.dtype == torch.float32
        assert labels.shape == (count,) and labels.dtype == torch.int64
        assert images.min() == 0 and images.max() == 1
        assert len(classes) == 10 and classes == data.CLASSES[name]
        assert labels.bincount().tolist() == [count // 10] * 10


def test_the_order_is_mixed_and_fixed(parts):
    name, loaded = parts
    for split, (images, labels, _) in loaded.items():
        assert len(labels[:50].unique()) == 10
        assert torch.equal(images, data.load(name, split).images)


@pytest.mark.files
def test_no_image_is_in_both_parts(parts):
    train, test = ({image.numpy().tobytes() for image in (part.images * 255).byte()} for part in parts[1].values())
    assert not train & test


@pytest.mark.files
def test_a_class_looks_alike():
    """Each class mean is nearer to its own images than to those of others, in most cases."""
    images, labels, _ = data.load("digits")
    means = torch.stack([images[labels == c].mean(0) for c in range(10)])
    nearest = torch.cdist(images.flatten(1), means.flatten(1)).argmin(1)
    assert (nearest == labels).float().mean() > 0.7


def test_test_is_the_default_part():
    assert len(data.load("digits").images) == 1000


@pytest.mark.parametrize(
    ("name", "split", "message"),
    [
        ("mnist", "test", "unknown data set 'mnist'; known: digits, clothes"),
        ("", "test", "unknown data set ''; known: digits, clothes"),
        ("digits", "validation", "unknown split 'validation'; known: train, test"),
        ("digits", None, "unknown split None; known: train, test"),
    ],
)
def test_unknown_names_raise_and_list_the_known(name, split, message):
    with pytest.raises(ValueError, match=message):
        data.load(name, split)
