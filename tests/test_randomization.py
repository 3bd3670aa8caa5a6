"""Randomised copies: the schemes, their options, and the caller's model untouched."""

from copy import deepcopy

import pytest
import torch
from networks import CLASSES, SHAPE, cnn, images
from randomized import (
    SMALL,
    STAGES,
    assert_untouched,
    changed,
    members,
    scheme,
    small,
    snapshot,
    tensors,
)
from saliency_sanity.randomization import cascading, independent, plan
from torch import nn


@scheme
@pytest.mark.parametrize("use", ["all", "half", "error inside", "error in the loop"])
def test_the_callers_model_is_unchanged_after_any_use(scheme, use):
    model = small().train()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    model[9].weight.grad = torch.ones_like(model[9].weight)
    before, modes, random = snapshot(model), [m.training for m in model.modules()], torch.get_rng_state()
    identities = {name: id(tensor) for name, tensor in tensors(model).items()}
    copies = scheme(model, seed=0, example=images(1))
    if use == "all":
        assert [name for name, _ in copies] == SMALL
    elif use == "half":
        next(copies)
        copies.close()
    elif use == "error inside":
        with pytest.raises(ValueError, match="unknown stage"):
            scheme(model, seed=0, stages=["9", "nonsense"])
    else:
        with pytest.raises(KeyboardInterrupt):
            for _ in copies:
                raise KeyboardInterrupt
    assert_untouched(model, before)
    assert {name: id(tensor) for name, tensor in tensors(model).items()} == identities
    assert [m.training for m in model.modules()] == modes and not model[5].weight.requires_grad
    assert torch.equal(model[9].weight.grad, torch.ones_like(model[9].weight))
    assert torch.equal(random, torch.get_rng_state())


@scheme
def test_modes_and_flags_are_the_models_own(scheme):
    model = small().train()
    model[1].eval()
    model[5].weight.requires_grad_(False)
    for _, copy in scheme(model, seed=0):
        assert [m.training for m in copy.modules()] == [m.training for m in model.modules()]
        assert [p.requires_grad for p in copy.parameters()] == [p.requires_grad for p in model.parameters()]
        assert all(p.is_leaf and isinstance(p, nn.Parameter) for p in copy.parameters())


def test_cascading_keeps_what_was_randomised_before():
    model, done = small(), set()
    before = snapshot(model)
    for stage, (name, copy) in zip(plan(model).stages, cascading(model, seed=0), strict=True):
        done |= members(model, stage)
        assert name == stage.name and changed(before, copy) == done


def test_independent_randomises_one_stage_at_a_time():
    model = small()
    before = snapshot(model)
    for stage, (name, copy) in zip(plan(model).stages, independent(model, seed=0), strict=True):
        assert name == stage.name and changed(before, copy) == members(model, stage)


def test_both_schemes_and_both_orders_give_a_stage_the_same_weights():
    model = small()
    alone = {name: copy for name, copy in independent(model, seed=3)}
    *_, (_, all_of_them) = cascading(model, seed=3)
    *_, (_, upwards) = cascading(model, seed=3, order="bottom_up")
    for stage in plan(model).stages:
        for name in members(model, stage):
            value = tensors(alone[stage.name])[name]
            assert torch.equal(value, tensors(all_of_them)[name])
            assert torch.equal(value, tensors(upwards)[name])


@scheme
def test_bottom_up_starts_at_the_input(scheme):
    model = small()
    before = snapshot(model)
    copies = list(scheme(model, seed=0, order="bottom_up"))
    assert [name for name, _ in copies] == SMALL[::-1]
    assert changed(before, copies[0][1]) == members(model, plan(model).stages[-1])


@scheme
def test_a_seed_sets_the_weights_whatever_the_global_random_state(scheme):
    torch.manual_seed(1)
    a = [snapshot(copy) for _, copy in scheme(small(), seed=0)]
    torch.manual_seed(2)
    random = torch.get_rng_state()
    b = [snapshot(copy) for _, copy in scheme(small(), seed=0)]
    c = [snapshot(copy) for _, copy in scheme(small(), seed=1)]
    assert torch.equal(random, torch.get_rng_state())
    for one, same, other in zip(a, b, c, strict=True):
        assert all(torch.equal(one[name], same[name]) for name in one)
        assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("init", ["reset", "truncated_normal", "uniform"])
def test_layers_of_one_shape_get_different_weights(init):
    *_, (_, copy) = cascading(small(), seed=0, init=init)
    both = torch.stack([copy[5].weight.flatten(), copy[7].weight.flatten()])
    assert abs(torch.corrcoef(both)[0, 1]) < 0.1
    assert not torch.equal(copy[5].bias, copy[7].bias)


@scheme
def test_a_copy_is_safe_to_keep(scheme):
    """What is done with a copy reaches neither the caller's model nor what was randomised in another."""
    model = small()
    before = snapshot(model)
    kept = []
    for _, copy in scheme(model, seed=0):
        kept.append((copy, snapshot(copy)))
    for copy, then in kept:
        assert_untouched(copy, then)
    kept[1][0].double()
    assert_untouched(kept[0][0], kept[0][1])
    assert_untouched(kept[2][0], kept[2][1])
    adam = torch.optim.SGD(kept[-1][0].train().parameters(), lr=1.0)
    kept[-1][0](images()).sum().backward()
    adam.step()
    assert_untouched(model, before)
    assert all(p.grad is None for p in model.parameters())
    for p, q in zip(kept[0][0][9].parameters(), kept[-1][0][9].parameters()):
        assert p.data_ptr() != q.data_ptr()


def test_buffers_are_never_shared():
    model = small()
    copies = [copy for _, copy in independent(model, seed=0)]
    for copy in copies:
        copy.train()(images())
    assert model[1].num_batches_tracked == 0
    assert [copy[1].num_batches_tracked.item() for copy in copies] == [1] * 4


@scheme
def test_a_copy_works_as_the_model_with_those_weights(scheme):
    """Its output is that of a new model which loads its state."""
    model, x = small(), images()
    for _, copy in scheme(model, seed=0):
        rebuilt = small(5)
        rebuilt.load_state_dict(copy.state_dict())
        assert torch.equal(copy.eval()(x), rebuilt.eval()(x))


@scheme
def test_types_and_devices_are_kept(scheme, device):
    model = small().double().to(device)
    for (_, copy), (_, single) in zip(scheme(model, seed=0), scheme(small(), seed=0), strict=True):
        for tensor, other in zip(tensors(copy).values(), tensors(single).values(), strict=True):
            assert tensor.device.type == device.type
            assert tensor.dtype == (torch.float64 if other.is_floating_point() else other.dtype)
        assert copy(images(dtype=torch.float64).to(device)).dtype == torch.float64


class Uncopyable(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(432, CLASSES)

    def forward(self, x):
        return self.fc(x.flatten(1))

    def __deepcopy__(self, memo):
        raise TypeError("this module holds an open file")


# ---------------------------------------------------------------- errors


@scheme
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"init": "xavier"}, "unknown init 'xavier'; known: reset, truncated_normal, uniform, permute"),
        ({"bias": "none"}, "unknown bias 'none'; known: init, zero, keep"),
        ({"affine": "zero"}, "unknown affine 'zero'; known: reset, init, keep"),
        ({"batch_norm": "drop"}, "unknown batch_norm 'drop'; known: reset, keep, recalibrate"),
        ({"order": "random"}, "unknown order 'random'; known: top_down, bottom_up"),
        ({"std": 0}, "std must be a positive number or 'trained', got 0"),
        ({"std": -0.1}, "std must be a positive number"),
        ({"std": float("nan")}, "std must be a positive number"),
        ({"std": "fitted"}, "std must be a positive number or 'trained', got 'fitted'"),
        ({"std": None}, "std must be a positive number"),
        ({"batch_norm": "recalibrate"}, "needs calibration=, the images to measure"),
        ({"stages": ["9", "conv"]}, "unknown stage 'conv'; known: 0, 1, 5, 7, 9"),
        ({"stages": "blocks"}, "stages must be None, 'layers' or a list of module names, got 'blocks'"),
        ({"stages": [9]}, "stages must be None, 'layers' or a list of module names"),
        ({"stages": ["2"]}, "unknown stage '2'"),
        ({"stages": []}, "nothing to randomise"),
        ({"stages": ["9", "9"]}, "stage '9' is named twice"),
        ({"stages": ["5", "5.weight"]}, "unknown stage '5.weight'|share the weight"),
    ],
)
def test_options_that_do_not_fit_raise_at_once(scheme, options, message):
    with pytest.raises(ValueError, match=message):
        scheme(small(), seed=0, **options)


@scheme
@pytest.mark.parametrize("seed", [None, 0.5, "0", [0]])
def test_a_seed_that_is_no_int_raises(scheme, seed):
    with pytest.raises(TypeError, match="seed must be an int"):
        scheme(small(), seed=seed)


@scheme
@pytest.mark.parametrize("init", ["reset", "uniform", "permute"])
def test_weights_do_not_depend_on_the_layout_in_memory(scheme, init):
    plain, turned = cnn(), cnn().to(memory_format=torch.channels_last)
    pairs = zip(scheme(plain, seed=0, init=init), scheme(turned, seed=0, init=init), strict=True)
    for (name, one), (same, other) in pairs:
        assert name == same
        for key, value in one.state_dict().items():
            assert torch.equal(value, other.state_dict()[key]), key


@scheme
def test_an_option_that_does_not_exist_raises(scheme):
    with pytest.raises(ValueError, match="unknown option .colour.; known: stages"):
        scheme(small(), seed=0, colour="red")


@scheme
def test_overlapping_stages_raise(scheme):
    with pytest.raises(ValueError, match="stages 'layer4' and 'layer4.0' share the weight"):
        scheme(STAGES["resnet18"][0](), seed=0, stages=["layer4", "layer4.0"])


@scheme
def test_a_model_without_weights_raises(scheme):
    with pytest.raises(ValueError, match="nothing to randomise"):
        scheme(nn.Sequential(nn.Flatten()), seed=0)


@scheme
def test_a_model_that_cannot_be_copied_raises(scheme):
    with pytest.raises(ValueError, match="cannot be copied with copy.deepcopy: this module holds an open file"):
        scheme(Uncopyable(), seed=0)


@scheme
def test_copies_made_in_inference_mode_can_be_explained_and_trained(scheme):
    model, x = small(), images()
    with torch.inference_mode():
        copies = [copy for _, copy in scheme(model, seed=0, batch_norm="recalibrate", calibration=x)]
    for copy, (_, expected) in zip(copies, scheme(model, seed=0, batch_norm="recalibrate", calibration=x)):
        assert not any(tensor.is_inference() for tensor in tensors(copy).values())
        assert_untouched(expected, snapshot(copy))
        copy.train()(x).sum().backward()


def test_a_deep_copy_of_a_copy_works():
    ((_, copy), *_) = cascading(small(), seed=0)
    again = deepcopy(copy)
    assert torch.equal(again.eval()(images()), copy.eval()(images()))
    assert SHAPE == images().shape[1:]
