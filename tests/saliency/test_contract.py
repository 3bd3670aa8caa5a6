"""What holds for every method: the shape of its maps; model, images and random state left as they were."""

from copy import deepcopy
from functools import partial
from inspect import signature

import pytest
import torch
from networks import CLASSES, cnn, images, lively, targets
from saliency_sanity import saliency
from saliency_sanity.device import local_seed
from saliency_sanity.saliency import METHODS
from torch import nn

CONTROLS = ("sobel", "canny", "input", "noise")
ONE_CHANNEL = ("gradcam", *CONTROLS)
ASKING = [name for name in METHODS if name not in CONTROLS]  # they run the model
NOISY = [name for name in METHODS if "seed" in signature(METHODS[name]).parameters]
GRID = torch.arange(3)[:, None] * 2 + torch.arange(2)  # of six segments
SMALL = {
    "samples": 24,
    "steps": 6,
    "references": images(2, seed=9),
    "segments": GRID.repeat_interleave(4, 0).repeat_interleave(6, 1),
}

every = pytest.mark.parametrize("name", METHODS)
asking = pytest.mark.parametrize("name", ASKING)


def explain(name, model, x, y):
    """The method with few samples and steps, so that a test is quick."""
    method = METHODS[name]
    known = signature(method).parameters
    return method(model, x, y, **{option: value for option, value in SMALL.items() if option in known})


def assert_same(a, b):
    """But for rounding."""
    torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def mixed():
    """A network half in train mode, half frozen, with a gradient stored and a hook of its owner's."""
    model = cnn().train()
    model[1].eval()
    model[4].requires_grad_(False)
    model[9].weight.grad = torch.ones_like(model[9].weight)
    model[0].register_forward_hook(lambda module, inputs, output: None)
    return model


def state(model):
    """Everything about a model that an explanation must not change."""
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "modes": [module.training for module in model.modules()],
        "hooks": [len(getattr(module, kind)) for module in model.modules() for kind in hooks],
        "attributes": [set(vars(module)) for module in model.modules()],
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "grad": [None if p.grad is None else p.grad.tolist() for p in model.parameters()],
        "values": [tensor.tolist() for tensor in (*model.parameters(), *model.buffers())],
    }


# ---------------------------------------------------------------- maps


def test_the_methods_are_those_of_the_book():
    assert " ".join(METHODS) == (
        "gradient input_x_gradient integrated_gradients smoothgrad smoothgrad_squared vargrad "
        "smoothgrad_integrated_gradients expected_gradients guided_backprop deconvnet gradcam guided_gradcam "
        "deeplift lrp_epsilon lrp_alpha_beta lrp_composite occlusion lime kernel_shap sobel canny input noise"
    )


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_maps_have_the_images_shape_and_type(name, dtype, device):
    model, x, y = cnn().to(device, dtype), images(dtype=dtype).to(device), targets().to(device)
    maps = explain(name, model, x, y)
    assert maps.shape == (3, 1 if name in ONE_CHANNEL else 3, 12, 12)
    assert maps.dtype == dtype and maps.device == x.device
    assert not maps.requires_grad and maps.isfinite().all()
    assert (maps.flatten(1).std(1) > 0).all()


@every
def test_float32_is_close_to_float64(name):
    model, x, y = cnn(), images(), targets()
    single = explain(name, model, x, y)
    double = explain(name, model.double(), x.double(), y)
    assert_same(single.double(), double)


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NOISY])
def test_one_image_has_the_map_it_has_in_a_batch(name):
    model, x, y = cnn(), images(4), targets(4)
    maps = explain(name, model, x, y)
    for i in range(4):
        assert_same(explain(name, model, x[i : i + 1], y[i : i + 1]), maps[i : i + 1])
    backwards = explain(name, model, x.flip(0), y.flip(0))
    assert_same(backwards, maps.flip(0))


@pytest.mark.parametrize("name", NOISY)
def test_a_seed_sets_the_noise(name):
    model, x, y = cnn(), images(), targets()
    torch.manual_seed(1)
    first = explain(name, model, x, y)
    torch.manual_seed(2)
    assert torch.equal(explain(name, model, x, y), first)
    options = {k: v for k, v in SMALL.items() if k in signature(METHODS[name]).parameters}
    assert torch.equal(METHODS[name](model, x, y, **options, seed=0), first)
    assert not torch.equal(METHODS[name](model, x, y, **options, seed=1), first)


@asking
def test_the_class_explained_is_the_target(name):
    model, x = cnn(), images()
    a, b = (explain(name, model, x, torch.full((3,), c)) for c in (0, 1))
    assert not torch.allclose(a, b)


@asking
def test_a_model_in_train_mode_is_explained_in_eval_mode(name):
    model, x, y = mixed(), images(), targets()
    assert_same(explain(name, model, x, y), explain(name, deepcopy(model).eval(), x, y))


@every
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x.contiguous(memory_format=torch.channels_last),
        lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
        lambda x: x.repeat_interleave(2, 3)[..., ::2],
        lambda x: x.clone().requires_grad_(),
        lambda x: x.clone().requires_grad_() * 1,
    ],
    ids=["channels_last", "transposed", "strided", "requires_grad", "not a leaf"],
)
def test_neither_layout_nor_graph_of_the_images_matters(name, change):
    model, x, y = cnn(), images(), targets()
    changed = change(x)
    assert_same(explain(name, model, changed, y), explain(name, model, x, y))
    assert torch.equal(changed.detach(), x) and (not changed.is_leaf or changed.grad is None)


@asking
def test_a_model_in_channels_last_has_the_same_maps(name):
    model, x, y = cnn(), images(), targets()
    plain = explain(name, model, x, y)
    assert_same(explain(name, model.to(memory_format=torch.channels_last), x, y), plain)


@asking
def test_an_output_that_does_not_depend_on_the_image_has_a_map_of_zeros(name):
    model = cnn()
    nn.init.zeros_(model[11].weight)
    assert explain(name, model, images(), targets()).abs().max() < 1e-5


@asking
def test_a_model_without_any_graph_has_a_map_of_zeros_or_is_refused(name):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 2, 3)

        def forward(self, x):
            self.conv(x)
            return torch.arange(5.0).expand(len(x), 5)

    try:
        maps = explain(name, Constant(), images(), targets())
    except ValueError:
        return
    assert maps.abs().max() < 1e-5


# ---------------------------------------------------------------- nothing is changed


@every
@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_model_images_and_random_state_are_left_as_they_were(name, context):
    model, x, y = mixed(), images(), targets()
    before, random = state(model), torch.get_rng_state()
    expected = explain(name, deepcopy(model), x, y)
    with context():
        graph = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
        maps = explain(name, model, x, y)
        assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == graph
    assert torch.equal(maps, expected)
    assert state(model) == before
    assert torch.equal(random, torch.get_rng_state())
    assert torch.equal(x, images()) and torch.equal(y, targets())


@every
def test_images_and_targets_made_in_inference_mode(name):
    model = cnn()
    with torch.inference_mode():
        x, y = images() * 1, targets() * 1
        inside = explain(name, model, x, y)
    expected = explain(name, model, images(), targets())
    assert torch.equal(inside, expected) and torch.equal(explain(name, model, x, y), expected)


@asking
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("runs", [0, 1])
def test_after_an_error_in_the_middle_the_model_is_as_it_was(name, error, runs):
    """The model raises in its first run, or in its second, where a method runs it twice."""
    ran = []

    class Breaks(nn.Module):
        def forward(self, x):
            ran.append(len(x))
            if len(ran) > runs:
                raise error("stopped in the middle")
            return x * 1

    model, x, y = mixed(), images(), targets()
    model.insert(6, Breaks())
    before, random = state(model), torch.get_rng_state()
    graph = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    try:
        explain(name, model, x, y)
    except (error, ValueError):
        pass
    else:
        assert len(ran) == runs == 1
    assert state(model) == before and torch.equal(x, images())
    assert torch.equal(random, torch.get_rng_state())
    assert (torch.is_grad_enabled(), torch.is_inference_mode_enabled()) == graph


@asking
def test_a_model_that_writes_into_its_input(name):
    """Neither the caller's images nor the map show it."""

    def build(inplace):
        with local_seed(2):
            layers = (
                nn.ReLU(inplace),
                nn.Conv2d(3, 4, 3),
                nn.ReLU(inplace),
                nn.Flatten(),
                nn.Linear(400, CLASSES),
            )
        return lively(nn.Sequential(*layers))

    x, y = images(), targets()
    maps = explain(name, build(True), x, y)
    assert_same(maps, explain(name, build(False), x, y))
    assert torch.equal(x, images())


# ---------------------------------------------------------------- errors


def with_pixel(value):
    x = images()
    x[1, 2, 3, 4] = value
    return x


BAD_INPUT = {
    "one image without a batch": (images()[0], targets(), "image\\[None\\] makes a batch of one"),
    "no channels": (images()[:, 0], targets(), r"float tensor \(N, C, H, W\)"),
    "five axes": (images()[None], targets(), r"float tensor \(N, C, H, W\)"),
    "bytes": (images().byte(), targets(), "float tensor"),
    "a NumPy array": (images().numpy(), targets(), "float tensor"),
    "a list": ([[0.0]], targets(), "float tensor"),
    "no images": (images()[:0], targets()[:0], "must not be empty"),
    "no pixels": (images()[..., :0], targets(), "must not be empty"),
    "NaN": (with_pixel(float("nan")), targets(), "NaN or infinite"),
    "infinity": (with_pixel(-float("inf")), targets(), "NaN or infinite"),
    "too few targets": (images(), targets(2), r"targets must be int64 class indices of shape \(3,\)"),
    "targets of two axes": (images(), targets()[:, None], r"shape \(3,\)"),
    "one-hot targets": (images(), torch.eye(5)[:3], r"shape \(3,\)"),
    "int32 targets": (images(), targets().int(), "int64"),
    "float targets": (images(), targets().float(), "int64"),
    "an int as target": (images(), 3, "got int"),
    "a list of targets": (images(), [0, 1, 2], "got list"),
    "no targets": (images(), None, "got NoneType"),
    "a negative target": (images(), torch.tensor([0, -1, 2]), "must not be negative, got -1"),
}


@every
@pytest.mark.parametrize("bad", BAD_INPUT)
def test_bad_input_raises_and_says_what_is_wanted(name, bad):
    x, y, message = BAD_INPUT[bad]
    model = mixed()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        explain(name, model, x, y)
    assert state(model) == before


class Returns(nn.Module):
    def __init__(self, change):
        super().__init__()
        self.network, self.change = cnn(), change

    def forward(self, x):
        return self.change(self.network(x))


BAD_OUTPUT = {
    "a tuple": (lambda logits: (logits, logits), "got tuple"),
    "a dict": (lambda logits: {"logits": logits}, "got dict"),
    "three axes": (lambda logits: logits[..., None], r"got \(\d+, 5, 1\)"),
    "one number an image": (lambda logits: logits[:, 0], r"got \(\d+,\)"),
    "images summed up": (lambda logits: logits.sum(0, keepdim=True), r"got \(1, 5\)"),
    "too few classes": (lambda logits: logits[:, :2], "is not one of the model's 2 classes"),
}


@asking
@pytest.mark.parametrize("bad", BAD_OUTPUT)
def test_a_model_whose_output_is_no_logits_raises(name, bad):
    change, message = BAD_OUTPUT[bad]
    with pytest.raises(ValueError, match=message):
        explain(name, Returns(change), images(), torch.full((3,), 3))


@asking
@pytest.mark.parametrize("target", [CLASSES, 1000])
def test_a_target_out_of_range_raises(name, target):
    with pytest.raises(ValueError, match=f"target {target} is not one of the model's 5 classes"):
        explain(name, cnn(), images(), torch.tensor([0, target, 1]))


@asking
def test_images_that_the_model_cannot_read_raise_the_models_own_error(name):
    model = mixed()
    before = state(model)
    with pytest.raises((RuntimeError, ValueError)):
        explain(name, model, images(3, (4, 12, 12)), targets())
    assert state(model) == before


@pytest.mark.parametrize("name", ["gradients", "Gradient", "", None, 3])
def test_an_unknown_method_raises_and_lists_the_known(name):
    with pytest.raises(ValueError, match=f"unknown method {name!r}; known: gradient, input_x_gradient"):
        saliency.get(name)


def test_a_method_is_had_by_name_or_given():
    assert saliency.get("gradient") is METHODS["gradient"]
    assert saliency.get(len) is len


# ---------------------------------------------------------------- heatmaps


def test_a_heatmap_adds_the_channels_then_drops_the_sign():
    maps = images(4)
    assert torch.equal(saliency.heatmap(maps, signed=True), maps.sum(1))
    assert torch.equal(saliency.heatmap(maps, signed=False), maps.sum(1).abs())
    opposite = torch.stack([torch.ones(2, 2), -torch.ones(2, 2), torch.zeros(2, 2)])[None]
    assert not saliency.heatmap(opposite, signed=False).any()


@pytest.mark.parametrize("maps", [images()[0], images()[:, 0], images()[None]])
def test_a_heatmap_of_other_shapes_raises(maps):
    with pytest.raises(ValueError, match=r"maps must be \(N, C, H, W\)"):
        saliency.heatmap(maps, signed=True)


def test_every_method_has_a_title_of_its_own():
    assert saliency.TITLES.keys() == METHODS.keys()
    assert len(set(saliency.TITLES.values())) == len(METHODS)
    assert all(saliency.title(name) == saliency.title(method) for name, method in METHODS.items())
    assert saliency.title(partial(METHODS["smoothgrad"], samples=3)) == "SmoothGrad"


def test_a_function_without_a_title_is_called_by_its_name():
    def one_of_mine(model, images, targets): ...

    assert saliency.title(one_of_mine) == saliency.title("one_of_mine") == "one of mine"


@pytest.mark.parametrize("name", NOISY)
def test_what_an_image_draws_does_not_depend_on_the_batch(name):
    method = METHODS[name]
    known = signature(method).parameters
    options = {option: value for option, value in SMALL.items() if option in known}
    model, x, y = cnn().double(), images(4, dtype=torch.float64), targets(4)
    whole = method(model, x, y, seed=3, **options)
    fitted = name in ("lime", "kernel_shap")  # linear algebra rounds as it likes
    exactly = {"rtol": 1e-9, "atol": 1e-12} if fitted else {"rtol": 0, "atol": 0}
    torch.testing.assert_close(method(model, x, y, seed=3, indices=range(4), **options), whole, **exactly)
    turned = method(model, x.flip(0), y.flip(0), seed=3, indices=[3, 2, 1, 0], **options).flip(0)
    torch.testing.assert_close(turned, whole)
    for k in range(4):
        alone = method(model, x[k : k + 1], y[k : k + 1], seed=3, indices=[k], **options)
        torch.testing.assert_close(alone[0], whole[k])
    same = method(model, x[:1].repeat(2, 1, 1, 1), y[:1].repeat(2), seed=3, **options)
    assert not torch.allclose(same[0], same[1])  # two places, two draws
    with pytest.raises(ValueError, match="places of the 4 images, got 3"):
        method(model, x, y, indices=[0, 1, 2], **options)
