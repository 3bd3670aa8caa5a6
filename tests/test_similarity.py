"""Every metric against scipy or scikit-image, image by image."""

from itertools import permutations

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
    """By the book: all pixels above the last place, and of those tied there a random choice in each map."""
    size = max(1, round(k * a.size))
    sides = []
    for m in (abs(a), abs(b)):
        last = np.sort(m, axis=None)[-size]
        sides.append((m > last, m == last, (size - (m > last).sum()) / (m == last).sum()))
    (sure, tied, p), (other_sure, other_tied, q) = sides
    shared = (sure & other_sure).sum() + p * (tied & other_sure).sum() + q * (sure & other_tied).sum()
    return (shared + p * q * (tied & other_tied).sum()) / size


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


@pytest.mark.parametrize("k", [0.1, 1 / 3, 0.5, 0.8, 1.0])
def test_topk_is_the_mean_over_all_orders_of_the_ties(k, device):
    a = torch.tensor([[3, 0, 1, 1, 0, 0.0], [2, -2, 2, 1, 2, 1.0], [5, 4, 3, 2, 1, 0.0], [1, 0, 0, 0, 0, 0.0]])
    b = torch.tensor([[0, 1, 1, 0, 1, 3.0], [1, 1, 2, 2, 0, -2.0], [0, 4, 0, 0, 0, 0.0], [0, 0, 0, 0, 0, 1.0]])
    size = max(1, round(k * 6))
    orders = np.array(list(permutations(range(6))))

    def chosen(values):  # in each order of the pixels, which are among the largest
        first = np.argsort(-abs(values)[orders], axis=1, kind="stable")[:, :size]
        return np.eye(6)[np.take_along_axis(orders, first, 1)].sum(1)

    wanted = [(chosen(x) @ chosen(y).T).mean() / size for x, y in zip(a.numpy(), b.numpy())]
    found = similarity.topk_intersection(a.view(4, 2, 3).to(device), b.view(4, 2, 3).to(device), k=k)
    np.testing.assert_allclose(found.cpu(), wanted, rtol=1e-6)


def test_maps_of_a_few_pixels_are_as_alike_as_chance_makes_them():
    a, b = torch.zeros(2, 28, 28), torch.zeros(2, 28, 28)
    a[:, 20, :10] = torch.arange(1.0, 11)
    b[0, 24, 10:20], b[1] = torch.arange(1.0, 11), a[1]
    rng, drawn = np.random.default_rng(0), []
    for _ in range(400):
        order = rng.permutation(784), rng.permutation(784)
        tops = [
            np.stack([p[np.argsort(-m[p], kind="stable")[:78]] for m in maps.flatten(1).numpy()])
            for maps, p in zip((a, b), order)
        ]
        drawn.append([len(np.intersect1d(x, y)) / 78 for x, y in zip(*tops)])
    found = similarity.topk_intersection(a, b)
    np.testing.assert_allclose(found, np.mean(drawn, 0), atol=0.01)
    assert found[0] < 0.11 and found[1] < 0.22  # neither is near 1, where the earlier zeros would be the larger


def test_without_ties_topk_is_a_plain_count_to_the_last_bit(device):
    a, b = maps("dense", (4, 33, 47))
    tops = [torch.sort(m.abs().flatten(1), dim=1, descending=True, stable=True).indices[:, :155] for m in (a, b)]
    shared = torch.tensor([len(set(x.tolist()) & set(y.tolist())) for x, y in zip(*tops)])
    assert torch.equal(similarity.topk_intersection(a.to(device), b.to(device)).cpu(), shared / 155)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", METRICS)
def test_maps_of_the_smallest_and_of_large_numbers(name, dtype):
    """A power of two, which changes no digit, down to numbers that are not normal."""
    a, b = (m.to(dtype) for m in maps("dense", (2, 28, 28)))
    a = (a * 32).round()  # digits to spare
    wanted = METRICS[name](a, b)
    for power in (-140, 60) if dtype == torch.float32 else (-500, 400):
        torch.testing.assert_close(METRICS[name](a * 2.0**power, b), wanted, atol=1e-6, rtol=0)


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


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.to("meta"), "no values"),
        (lambda a: a.to_sparse(), "dense"),
        (lambda a: a.to(torch.float8_e4m3fn), r"\.float\(\)"),
    ],
)
def test_maps_without_numbers_to_compute_with_are_refused(name, change, message):
    a = torch.rand(2, 12, 12)
    for pair in ((change(a), a), (a, change(a))):
        with pytest.raises(ValueError, match=message):
            METRICS[name](*pair)


@pytest.mark.parametrize("name", METRICS)
@pytest.mark.parametrize("scale", [2.0**-900, 2.0**900])
def test_the_size_of_a_map_does_not_count(name, scale):
    """Where the squares of its pixels would overflow, or vanish."""
    a, b = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert torch.equal(METRICS[name](a * scale, b), METRICS[name](a, b))


@pytest.mark.parametrize("call", ["ssim", "ssim_abs", "hog", "topk_intersection"])
@pytest.mark.parametrize("value", [-1, True, 2.5, "5"])
def test_options_are_numbers_that_fit(call, value):
    option = {"hog": "cell", "topk_intersection": "k"}.get(call, "win_size")
    with pytest.raises(ValueError, match=f"{option} (must|is)"):
        METRICS[call](torch.rand(1, 28, 28), torch.rand(1, 28, 28), **{option: value})
    with pytest.raises(ValueError, match="cell"):
        similarity.hog(torch.rand(1, 28, 28), torch.rand(1, 28, 28), cell=0)


@pytest.mark.parametrize("answer", [None, 0.5, [0.0] * 3, np.zeros(3), torch.zeros(1), torch.zeros(3, 1)])
def test_a_metric_of_the_users_must_give_a_number_a_map(answer):
    with pytest.raises(ValueError, match="must return a tensor of 3 numbers"):
        similarity.against(lambda a, b: answer, torch.rand(3, 4, 4))(torch.rand(3, 4, 4))


def test_a_metric_is_fixed_by_its_name():
    a, b = torch.rand(2, 3, 12, 12)
    assert torch.equal(similarity.against("spearman", a)(b), similarity.spearman(a, b))
    with pytest.raises(ValueError, match="unknown metric"):
        similarity.get(["spearman"])


@pytest.mark.parametrize("name", METRICS)
def test_a_metric_with_its_first_map_fixed_is_the_metric(name):
    """Of which the tests of `sanity` make all their numbers."""
    a, b = maps("dense", (3, 28, 28))
    compared = similarity.against(METRICS[name], a)
    for other in (b, b.flip(0), a):
        torch.testing.assert_close(compared(other), METRICS[name](a, other), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["spearman", "ssim", "hog", "topk_intersection"])
def test_many_maps_are_compared_part_by_part(name, monkeypatch):
    a, b = maps("ties", (7, 28, 28))
    whole = METRICS[name](a, b)
    monkeypatch.setattr(similarity, "PIXELS_A_PART", 3 * 784)
    torch.testing.assert_close(METRICS[name](a, b), whole, rtol=0, atol=1e-6)


def test_windows_of_ssim_are_as_asked():
    a, b = maps("dense", (2, 12, 15))
    for size in (3, 7, 11):
        expected = [
            structural_similarity(x / abs(x).max(), y / abs(y).max(), win_size=size, data_range=2)
            for x, y in zip(a.double().numpy(), b.double().numpy())
        ]
        np.testing.assert_allclose(similarity.ssim(a, b, win_size=size), expected, atol=1e-5)
    for size in (1, 2, 4, 13):
        with pytest.raises(ValueError, match="odd and from 3 to the maps' smaller side"):
            similarity.ssim_abs(a, b, win_size=size)


def test_cells_of_hog_are_as_asked():
    a, _ = maps("dense", (2, 20, 26))
    for cell in (3, 5, 6):
        expected = [
            skimage_hog(m / abs(m).max(), orientations=9, pixels_per_cell=(cell, cell), cells_per_block=(3, 3))
            for m in a.double().numpy()
        ]
        np.testing.assert_allclose(similarity.hog_features(a, cell=cell), expected, atol=1e-5)
    with pytest.raises(ValueError, match="3 x 3 cells of 7 pixels"):
        similarity.hog_features(a, cell=7)


def test_mixed_precision_gives_the_finer_of_the_two():
    a, b = maps("dense", (2, 28, 28))
    for name, metric in METRICS.items():
        assert metric(a.double(), b).dtype == metric(a, b.double()).dtype == torch.float64, name
