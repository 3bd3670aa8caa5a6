"""Every metric against scipy or scikit-image, image by image."""

import numpy as np
import pytest
import torch
from saliency_sanity import similarity
from saliency_sanity.similarity import METRICS
from scipy import stats
from skimage.feature import hog as skimage_hog
from skimage.metrics import structural_similarity


def nonzero(a, b):
    keep = (a != 0) & (b != 0)
    return stats.spearmanr(a[keep], b[keep]).statistic


def ssim(a, b):
    return structural_similarity(a / abs(a).max(), b / abs(b).max(), win_size=5, data_range=2)


def ssim_abs(a, b):
    a, b = abs(a), abs(b)
    a, b = (a - a.min()) / (a.max() - a.min()), (b - b.min()) / (b.max() - b.min())
    return structural_similarity(a, b, win_size=5, data_range=1)


def hog(a, b):
    side = min(a.shape)
    cell = 16 if side >= 112 else max(2, side // 7)
    features = [
        skimage_hog(m / abs(m).max(), orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(3, 3))
        for m in (a, b)
    ]
    return stats.pearsonr(*features).statistic


def topk(a, b, k=0.1):
    size = round(k * a.size)
    top = [set(np.argsort(-abs(m).ravel(), kind="stable")[:size]) for m in (a, b)]
    return len(top[0] & top[1]) / size


REFERENCE = {
    "spearman": lambda a, b: stats.spearmanr(a.ravel(), b.ravel()).statistic,
    "spearman_abs": lambda a, b: stats.spearmanr(abs(a).ravel(), abs(b).ravel()).statistic,
    "spearman_nonzero": nonzero,
    "ssim": ssim,
    "ssim_abs": ssim_abs,
    "hog": hog,
    "pearson": lambda a, b: stats.pearsonr(a.ravel(), b.ravel()).statistic,
    "topk_intersection": topk,
}


def maps(kind: str, shape: tuple[int, ...]) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    a = torch.randn(shape, generator=draw)
    b = 0.6 * a + torch.randn(shape, generator=draw)
    if kind == "sparse":  # most pixels tie at zero, of either sign
        mask = (torch.rand(shape, generator=draw) < 0.2).float()
        a, b = a * mask, -b * mask
    if kind == "ties":
        a, b = (a * 2).round(), (b * 2).round()
    if kind == "positive":
        a, b = a.abs() + 3, b.abs() + 3
    if kind == "tiny values":
        a, b = a * 1e-20, b * 1e-12
    return a, b


def test_every_metric_has_a_reference():
    assert set(REFERENCE) == set(METRICS)


@pytest.mark.parametrize("kind", ["dense", "sparse", "ties", "positive", "tiny values"])
@pytest.mark.parametrize("shape", [(4, 28, 28), (3, 33, 47), (2, 120, 113), (2, 7, 6)])
@pytest.mark.parametrize("name", METRICS)
def test_equals_the_reference_image_by_image(name, shape, kind, device):
    a, b = maps(kind, shape)
    ours = METRICS[name](a.to(device), b.to(device)).cpu()
    theirs = [REFERENCE[name](x, y) for x, y in zip(a.double().numpy(), b.double().numpy())]
    assert ours.dtype == torch.float32
    np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", METRICS)
def test_other_float_types(name, dtype, device):
    a, b = (m.to(dtype) for m in maps("dense", (3, 28, 28)))
    ours = METRICS[name](a.to(device), b.to(device))
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    theirs = [REFERENCE[name](x, y) for x, y in zip(a.double().numpy(), b.double().numpy())]
    np.testing.assert_allclose(ours.cpu(), theirs, atol=1e-5)


@pytest.mark.parametrize("name", METRICS)
def test_a_map_is_like_itself_and_order_does_not_matter(name):
    a, b = maps("dense", (3, 28, 28))
    torch.testing.assert_close(METRICS[name](a, a), torch.ones(3))
    torch.testing.assert_close(METRICS[name](a, b), METRICS[name](b, a))
    torch.testing.assert_close(METRICS[name](a[1:2], b[1:2]), METRICS[name](a, b)[1:2])


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("factor", [1e-3, 40.0])
def test_scale_does_not_matter(name, factor):
    a, b = maps("dense", (3, 28, 28))
    torch.testing.assert_close(METRICS[name](a * factor, b), METRICS[name](a, b), atol=1e-5, rtol=0)


@pytest.mark.parametrize("value", [0.0, 0.1, -7.0])
@pytest.mark.parametrize("name", METRICS)
def test_a_constant_map_is_undefined(name, value):
    a, _ = maps("dense", (2, 28, 28))
    a[1] = value
    b = torch.randn(2, 28, 28, generator=torch.Generator().manual_seed(1))
    for x, y in ((a, b), (b, a), (a, a)):
        result = METRICS[name](x, y)
        assert result[0].isfinite() and result[1].isnan()


@pytest.mark.parametrize("name", ["spearman_abs", "ssim_abs", "topk_intersection"])
def test_a_map_of_constant_size_is_undefined_where_signs_are_dropped(name):
    a = torch.randn(1, 28, 28, generator=torch.Generator().manual_seed(0)).sign()
    assert METRICS[name](a, torch.randn(1, 28, 28)).isnan().all()


def test_nonzero_is_undefined_without_two_different_shared_pixels():
    a, b = torch.zeros(3, 8, 8), torch.zeros(3, 8, 8)
    a[0, 0, 0], b[0, 1, 1] = 1, 1  # no pixel in common
    a[1, 0, 0], b[1, 0, 0] = 1, 2  # one
    a[2, :2], b[2, :2] = 1, torch.arange(16.0).reshape(2, 8) + 1  # many, but one map is constant there
    assert similarity.spearman_nonzero(a, b).isnan().all()


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_no_numbers_raise_and_name_the_image(name, bad):
    a, b = maps("dense", (3, 28, 28))
    b[2, 5, 5] = bad
    with pytest.raises(ValueError, match=r"b has NaN or infinite pixels in image 2"):
        METRICS[name](a, b)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("a", "b", "message"),
    [
        (torch.rand(2, 1, 28, 28), torch.rand(2, 1, 28, 28), "heatmap"),
        (torch.rand(28, 28), torch.rand(28, 28), "shape"),
        (torch.rand(2, 28, 28), torch.rand(3, 28, 28), "differ in shape"),
        (torch.rand(0, 28, 28), torch.rand(0, 28, 28), "shape"),
        (torch.ones(2, 28, 28, dtype=torch.int64), torch.rand(2, 28, 28), "floats"),
        (np.zeros((2, 28, 28)), torch.rand(2, 28, 28), "floats"),
    ],
)
def test_bad_input(name, a, b, message):
    with pytest.raises(ValueError, match=message):
        METRICS[name](a, b)


def test_maps_too_small_and_options_out_of_range():
    small = torch.rand(1, 4, 4)
    with pytest.raises(ValueError, match="win_size"):
        similarity.ssim(small, small)
    with pytest.raises(ValueError, match="3 x 3 cells"):
        similarity.hog(small, small)
    with pytest.raises(ValueError, match="fraction of the pixels"):
        similarity.topk_intersection(small, small, k=0)
    with pytest.raises(ValueError, match="odd"):
        similarity.ssim(torch.rand(1, 9, 9), torch.rand(1, 9, 9), win_size=4)


def test_get_lists_the_known_metrics():
    assert similarity.get("ssim") is similarity.ssim
    assert similarity.get(max) is max
    with pytest.raises(ValueError, match="spearman_abs"):
        similarity.get("spearmen")


def test_ranks_equal_scipys():
    values = torch.tensor([[0.0, -0.0, 1.0, -3.0, 1.0, 1.0, -3.0, 2.5]])
    np.testing.assert_array_equal(similarity.ranks(values), stats.rankdata(values.numpy(), axis=1))
    np.testing.assert_array_equal(similarity.ranks(values.double()), stats.rankdata(values.numpy(), axis=1))


@pytest.mark.parametrize("name", similarity.METRICS)
def test_maps_that_require_gradients_are_compared(name):
    a, b = torch.rand(2, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    found = similarity.METRICS[name](a.requires_grad_(), b.requires_grad_())
    assert not found.requires_grad
    torch.testing.assert_close(found, similarity.METRICS[name](a.detach(), b.detach()))
