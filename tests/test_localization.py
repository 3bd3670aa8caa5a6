"""Scores of maps on object masks, against closed forms and against counting pairs of pixels."""

import math

import pytest
import torch
from saliency_sanity.book.photographs import composites
from saliency_sanity.device import generator
from saliency_sanity.localization import auc, mass_inside
from scipy import stats

SCORES = (mass_inside, auc)


def half(height=4, width=6, count=1):
    """Masks whose left half is the object."""
    masks = torch.zeros(count, height, width)
    masks[:, :, : width // 2] = 1
    return masks


def test_share_of_the_mass_is_the_sum_on_the_object_over_the_whole():
    maps = torch.tensor([[[1.0, 2.0], [3.0, 4.0]], [[0.0, 5.0], [0.0, 0.0]]])
    masks = torch.tensor([[[1.0, 0.0], [0.0, 0.5]], [[1.0, 0.0], [0.0, 0.0]]])
    assert mass_inside(maps, masks).tolist() == pytest.approx([3 / 10, 0.0])


def test_auc_of_a_map_that_is_right_wrong_or_shifted():
    masks = half()
    assert auc(masks, masks).tolist() == [1.0]
    assert auc(-masks, masks).tolist() == [0.0]
    ramp = torch.arange(6.0).expand(1, 4, 6)  # each column off the object is above each on it
    assert auc(ramp, masks).tolist() == [0.0]
    assert auc((ramp - 2).abs(), masks).item() == pytest.approx(2 / 9)  # 2 1 0 on the object, 1 2 3 off it


def test_ties_count_half():
    masks = torch.tensor([[[1.0, 1.0, 0.0, 0.0]]])
    maps = torch.tensor([[[1.0, 0.0, 0.0, 0.0]]])  # of the four pairs two are won and two tied
    assert auc(maps, masks).tolist() == [0.75]


@pytest.mark.parametrize("levels", [3, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_auc_is_the_mann_whitney_statistic(levels, dtype, device):
    draw = generator(0)
    maps = torch.randint(-levels, levels, (5, 9, 7), generator=draw).to(device, dtype)
    masks = (torch.rand(5, 9, 7, generator=draw) < 0.3).to(device, dtype)
    ours = auc(maps, masks)
    assert ours.dtype == dtype and ours.device == maps.device
    for score, m, mask in zip(ours.tolist(), maps.cpu(), masks.cpu().bool()):
        pairs = mask.sum().item() * (~mask).sum().item()
        assert score == pytest.approx(stats.mannwhitneyu(m[mask], m[~mask]).statistic / pairs, abs=1e-6)


def test_auc_weighs_the_pixels_on_an_objects_edge():
    draw = generator(1)
    values, on = torch.randint(4, (12,), generator=draw).float(), torch.rand(12, generator=draw)
    wins = (values[:, None] > values).double() + 0.5 * (values[:, None] == values).double()
    pairs = on[:, None].double() * (1 - on).double()
    expected = (wins * pairs).sum() / pairs.sum()
    assert auc(values.view(1, 3, 4), on.view(1, 3, 4)).item() == pytest.approx(expected.item(), abs=1e-6)


def test_auc_sees_the_order_and_the_share_sees_the_size():
    draw = generator(2)
    maps, masks = torch.rand(3, 8, 8, generator=draw), half(8, 8, 3)
    assert torch.allclose(auc(maps, masks), auc(maps.exp() * 7, masks))
    assert torch.allclose(mass_inside(maps, masks), mass_inside(maps * 7, masks))
    assert not torch.allclose(mass_inside(maps, masks), mass_inside(maps.square(), masks), atol=1e-4)


def test_noise_scores_chance_and_the_share_of_the_area():
    masks = composites("grey", names=["zebra", "banana"], size=160).masks
    maps = torch.rand(*masks.shape, generator=generator(3))
    assert auc(maps, masks).tolist() == pytest.approx([0.5] * 2, abs=0.02)
    assert mass_inside(maps, masks).tolist() == pytest.approx(masks.mean((1, 2)).tolist(), abs=0.01)


@pytest.mark.parametrize("score", SCORES)
def test_images_are_scored_one_by_one_and_left_as_they_were(score):
    draw = generator(4)
    maps, masks = torch.rand(4, 6, 5, generator=draw), torch.rand(4, 6, 5, generator=draw)
    before = maps.clone(), masks.clone()
    alone = torch.cat([score(maps[i : i + 1], masks[i : i + 1]) for i in range(4)])
    assert torch.allclose(score(maps, masks), alone)
    assert torch.equal(maps, before[0]) and torch.equal(masks, before[1])


@pytest.mark.parametrize("score", SCORES)
def test_what_points_nowhere_is_undefined(score):
    maps = torch.rand(5, 4, 6, generator=generator(5))
    masks = half(count=5)
    maps[0], maps[1] = 0.0, 3.0
    masks[2], masks[3] = 0.0, 1.0
    assert [math.isnan(value) for value in score(maps, masks).tolist()] == [True] * 4 + [False]


@pytest.mark.parametrize("score", SCORES)
def test_errors_name_what_is_wrong(score):
    maps, masks = torch.rand(2, 4, 6), half(count=2)
    with pytest.raises(ValueError, match="differ in shape"):
        score(maps, masks[:1])
    with pytest.raises(ValueError, match="heatmap"):
        score(maps[:, None], masks[:, None])
    with pytest.raises(ValueError, match="masks must be a tensor of numbers"):
        score(maps, masks.numpy())
    with pytest.raises(ValueError, match="mask of image 1"):
        score(maps, torch.stack((masks[0], 255 * masks[1])))
    with pytest.raises(ValueError, match="maps has NaN or infinite pixels in image 1"):
        score(torch.stack((maps[0], maps[1] / 0)), masks)


def test_a_share_of_negative_values_is_refused():
    with pytest.raises(ValueError, match="image 1 has negative pixels"):
        mass_inside(torch.stack((torch.ones(2, 3), -torch.ones(2, 3))), half(2, 3, 2))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.uint8, torch.float16, torch.float64])
def test_a_mask_may_be_of_any_type(score, dtype):
    maps, masks = torch.rand(2, 4, 6, generator=generator(6)), half(count=2)
    assert torch.equal(score(maps, masks.to(dtype)), score(maps, masks))


@pytest.mark.parametrize("score", SCORES)
@pytest.mark.parametrize("value", [-0.001, 1.001, math.nan])
def test_a_mask_just_out_of_range_is_refused_and_its_ends_are_not(score, value):
    maps, masks = torch.rand(2, 4, 6, generator=generator(6)), half(count=2)
    assert score(maps, masks).isfinite().all()
    masks[1, 2, 2] = value
    with pytest.raises(ValueError, match=r"mask of image 1 is not in \[0, 1\]"):
        score(maps, masks)


@pytest.mark.parametrize("score", SCORES)
def test_one_pixel_makes_a_score(score):
    """A map of one pixel, an object of one pixel, and all but one pixel."""
    maps, masks = torch.zeros(3, 4, 6), torch.zeros(3, 4, 6)
    maps[0, 1, 1], maps[1:] = 1, torch.rand(2, 4, 6, generator=generator(7))
    masks[0, 1, 1], masks[1, 0, 0], masks[2] = 1, 1, 1
    masks[2, 3, 3] = 0
    assert score(maps, masks).isfinite().all() and score(maps, masks)[0] == 1
    assert score(maps[:, :1, 1:2].expand(-1, 1, 1), masks[:, :1, :1]).isnan().all()  # of one pixel: constant
    with pytest.raises(ValueError, match="shape"):
        score(maps[:0], masks[:0])
    with pytest.raises(ValueError, match="floats"):
        score(maps.long(), masks)


def test_scores_keep_precision_and_know_no_gradient():
    maps, masks = torch.rand(2, 8, 8, generator=generator(8)), half(8, 8, 2)
    for score in SCORES:
        found = score(maps.double().requires_grad_(), masks.double())
        assert found.dtype == torch.float64 and not found.requires_grad
        assert score(maps.half(), masks.half()).dtype == torch.float16
        torch.testing.assert_close(found.float(), score(maps, masks))
