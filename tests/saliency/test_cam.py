"""Grad-CAM against captum and hooks by hand, and against the class activation map where that is exact."""

import captum.attr
import pytest
import torch
import torchvision
from networks import CLASSES, cnn, images, lively, targets
from saliency_sanity.book import models
from saliency_sanity.book.photographs import normalize, whole
from saliency_sanity.device import local_seed
from saliency_sanity.inference import evaluating
from saliency_sanity.saliency import passes
from saliency_sanity.saliency.backprop_rules import guided_backprop
from saliency_sanity.saliency.cam import gradcam, gradcam_layer, guided_gradcam
from torch import nn
from torch.nn import functional as F
from torchvision.models import convnext, swin_transformer
from torchvision.ops import SqueezeExcitation


def captums(model, layer, x, y):
    with evaluating(model):
        small = captum.attr.LayerGradCam(model, layer).attribute(x, y, relu_attributions=True)
    return F.interpolate(small.detach(), size=x.shape[2:], mode="bilinear", align_corners=False)


@pytest.mark.parametrize("index", [0, 1, 2, 3, 4, 5])
def test_gradcam_is_captums_at_every_layer(index):
    model, x, y = cnn(), images(4, (3, 12, 12)), targets(4)
    theirs = captums(model, model[index], x, y)
    assert theirs.amax((1, 2, 3)).count_nonzero() >= 2
    for layer in (str(index), model[index]):
        torch.testing.assert_close(gradcam(model, x, y, layer=layer), theirs)


@pytest.mark.filterwarnings("ignore:Setting backward hooks", "ignore:Input Tensor 0 did not")
def test_guided_gradcam_is_the_product_and_captums():
    model, x, y = cnn().eval(), images(), targets()
    ours = guided_gradcam(model, x, y)
    theirs = captum.attr.GuidedGradCam(model, model[4]).attribute(x.clone(), y, interpolate_mode="bilinear")
    torch.testing.assert_close(ours, theirs.detach())
    for layer in (None, "0"):
        product = guided_backprop(model, x, y) * gradcam(model, x, y, layer=layer)
        torch.testing.assert_close(guided_gradcam(model, x, y, layer=layer), product)


@pytest.mark.parametrize("layer", [None, "classifier.1"])
def test_on_squeezenet_it_is_the_class_activation_map(layer):
    """conv10 has one channel a class and the logit is its mean: every other weight is zero."""
    model = models.load("squeezenet_imagenet")
    x = normalize(whole(128)[0][:3])
    with torch.no_grad():
        activations = model.classifier[:2](model.features(x))
    y = activations.mean((2, 3)).argmax(1)
    height, width = activations.shape[2:]
    own = activations[range(3), y][:, None].relu() / (height * width)
    exact = F.interpolate(own, size=x.shape[2:], mode="bilinear", align_corners=False)
    torch.testing.assert_close(gradcam(model, x, y, layer=layer), exact)
    assert exact.amax((1, 2, 3)).min() > 0


def test_maps_are_rectified_and_at_image_size():
    maps = gradcam(models.squeezenet(), images(2, (3, 64, 80)), targets(2))
    assert maps.shape == (2, 1, 64, 80) and (maps >= 0).all()


class InPlace(nn.Module):
    """What is done in place after the layer, or to the tensor the layer passes on, must not reach its map."""

    def __init__(self, after):
        super().__init__()
        with local_seed(1):
            self.conv, self.same, self.fc = nn.Conv2d(3, 6, 3), nn.Dropout(), nn.Linear(600, CLASSES)
        self.after = after
        lively(self, 1)

    def forward(self, x):
        x = self.conv(x)
        before = x
        x = self.same(x)  # in eval mode the very tensor it was given
        return self.fc(self.after(x, before).flatten(1))


AFTER = {  # in place, and the same without
    "a ReLU": (lambda x, before: torch.relu_(x), lambda x, before: torch.relu(x)),
    "a sum": (lambda x, before: x.add_(1.0).tanh(), lambda x, before: (x + 1.0).tanh()),
    "a module": (lambda x, before: nn.ReLU(inplace=True)(x), lambda x, before: torch.relu(x)),
    "the layer's input is cleared": (lambda x, before: (x * 2, before.zero_())[0], lambda x, before: x * 2),
}


@pytest.mark.parametrize("layer", ["conv", "same"])
@pytest.mark.parametrize("name", AFTER)
def test_what_is_done_in_place_after_the_layer_does_not_reach_the_map(name, layer):
    in_place, plain = (InPlace(after) for after in AFTER[name])
    x, y = images(), targets()
    maps = gradcam(in_place, x, y, layer=layer)
    torch.testing.assert_close(maps, captums(plain, plain.conv, x, y))
    assert maps.any()


def test_a_layer_used_twice_is_seen_where_it_runs_last():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.fc = nn.Conv2d(3, 3, 3, padding=1), nn.Linear(3 * 144, CLASSES)

        def first(self, x):
            return torch.relu(self.conv(x))

        def forward(self, x):
            return self.fc(self.conv(self.first(x)).flatten(1))

    model, x, y = lively(Twice()), images(), targets()
    rest = nn.Sequential(model.conv, nn.Flatten(), model.fc)
    torch.testing.assert_close(gradcam(model, x, y), captums(rest, model.conv, model.first(x).detach(), y))


# ---------------------------------------------------------------- which layer

WIDE = (3, 32, 48)


class Block(nn.Module):
    """Two convolutions after one another, and a way past the second that meets it as `join` says."""

    def __init__(self, join, width=6):
        super().__init__()
        self.join, self.first, self.second = join, nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 1)

    def forward(self, x):
        between = torch.relu(self.first(x))
        return self.join(x, between, self.second(between))


def blocks(join, width):
    """A stem, a block and a head behind global pooling."""
    stem = nn.Conv2d(3, 6, 4, 4), nn.ReLU()
    return nn.Sequential(*stem, Block(join), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, CLASSES))


class Squeezed(nn.Module):
    """Squeeze and excitation at the end: its convolutions see no places."""

    def __init__(self):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1))
        self.gate = SqueezeExcitation(6, 4)
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x):
        return self.head(torch.relu(self.gate(self.features(x))).mean((2, 3)))


class ChannelsLast(nn.Module):
    """Works on (N, h, w, C)."""

    def __init__(self, stride=4, width=5):
        super().__init__()
        self.embed, self.mix = nn.Conv2d(3, width, stride, stride), nn.Linear(width, width)
        self.head = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.head(F.gelu(self.mix(self.embed(x).permute(0, 2, 3, 1))).mean((1, 2)))


class TransformerBlock(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width))

    def forward(self, x):
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed)[0]
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """A vision transformer; `extra` tokens besides the patches, in front or behind, of which the head reads one.

    Where they are `mixed` they hold the mean of all patches from the start.
    """

    def __init__(self, extra=1, behind=False, pooled=False, mixed=False, shape=WIDE, width=12, depth=3):
        super().__init__()
        patches = shape[1] * shape[2] // 64
        with local_seed(3):
            self.embed = nn.Conv2d(3, width, 8, 8)
            self.extra = nn.Parameter(torch.randn(1, extra, width))
            self.position = nn.Parameter(torch.randn(1, patches + extra, width) / 4)
            self.blocks = nn.Sequential(*(TransformerBlock(width) for _ in range(depth)))
            self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)
        self.behind, self.pooled, self.mixed = behind, pooled, mixed
        self.patches = slice(0, patches) if behind else slice(extra, None)

    def forward(self, x):
        tokens, extra = self.embed(x).flatten(2).transpose(1, 2), self.extra.expand(len(x), -1, -1)
        extra = extra + tokens.mean(1, keepdim=True) if self.mixed else extra
        tokens = torch.cat([tokens, extra] if self.behind else [extra, tokens], 1) + self.position
        tokens = self.norm(self.blocks(tokens))
        at = tokens[:, self.patches].mean(1) if self.pooled else tokens[:, -1 if self.behind else 0]
        return self.head(at)

    def read(self, tokens):
        """The grid of 4 rows and 6 columns."""
        return tokens[:, self.patches].transpose(1, 2).reshape(len(tokens), -1, 4, 6)


def as_it_is(output):
    return output


def channels_last(output):
    return output.movedim(3, 1)


def chain():
    return nn.Sequential(
        nn.Conv2d(3, 6, 4, 4), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(144, 5)
    )


def headed():
    """A convolution as the head, behind global pooling."""
    return nn.Sequential(nn.Conv2d(3, 6, 4, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(6, 5, 1), nn.Flatten())


FAMILIES = {  # a network, the layer that is to be taken, and how its output is read
    "a chain": (chain, "0", as_it_is),
    "a convolution behind the pooling": (headed, "0", as_it_is),
    "squeeze and excitation": (Squeezed, "gate", as_it_is),
    "residual": (lambda: blocks(lambda x, a, b: torch.relu(x + b), 6), "2", as_it_is),
    "branches": (lambda: blocks(lambda x, a, b: torch.cat([b, a], 1), 12), "2", as_it_is),
    "dense": (lambda: blocks(lambda x, a, b: torch.cat([x, a, b], 1), 18), "2", as_it_is),
    "no way past": (lambda: blocks(lambda x, a, b: b, 6), "2.second", as_it_is),
    "channels last": (ChannelsLast, "mix", channels_last),
    "class token": (Transformer, "blocks.1", None),
    "distilled": (lambda: Transformer(2), "blocks.1", None),
    "registers": (lambda: Transformer(5), "blocks.1", None),
    "class token behind": (lambda: Transformer(1, behind=True), "blocks.1", None),
    "class token of all patches": (lambda: Transformer(1, mixed=True), "blocks.1", None),
    "mean of patches": (lambda: Transformer(0, pooled=True), "norm", None),
    "mean of patches beside a class token": (lambda: Transformer(1, pooled=True), "norm", None),
}


def family(name):
    build, layer, read = FAMILIES[name]
    with local_seed(4):
        model = lively(build(), 2).eval()
    return model, layer, read or model.read


def hooks_of(model):
    return [hook for module in model.modules() for hook in (*module._forward_hooks, *module._forward_pre_hooks)]


def by_hand(model, layer, x, y, read=as_it_is):
    """Grad-CAM from one hook and one gradient."""
    seen = []
    hook = model.get_submodule(layer).register_forward_hook(
        lambda module, inputs, output: seen.append(output) or output.clone()
    )
    logits = model(x.clone().requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), seen[-1])
    activations, gradient = read(seen[-1].detach()), read(gradient)
    small = torch.einsum("nchw,nc->nhw", activations, gradient.mean((2, 3))).clamp(min=0)[:, None]
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)


@torch.no_grad()
def everything_flows_through(model, layer, x):
    """Whether a second image has the logits of the first when this output is the first's."""
    module, seen = model.get_submodule(layer), []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output))
    first = model(x[:1])
    hook.remove()
    hook = module.register_forward_hook(lambda module, inputs, output: seen[-1])
    patched = model(x[1:2])
    hook.remove()
    assert not torch.allclose(model(x[1:2]), first, rtol=1e-3)
    return torch.allclose(patched, first, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_layer_is_the_last_with_places_through_which_everything_flows(name, device):
    model, layer, read = family(name)
    model, x, y = model.to(device), images(3, WIDE).to(device), targets(3).to(device)
    assert gradcam_layer(model, x) == layer
    assert everything_flows_through(model, layer, x)
    maps = by_hand(model, layer, x, y, read)
    assert (maps.amax((1, 2, 3)) > maps.amin((1, 2, 3))).sum() >= 2
    torch.testing.assert_close(gradcam(model, x, y), maps)
    torch.testing.assert_close(gradcam(model, x, y, layer=layer), maps)


@pytest.mark.parametrize("name", ["residual", "branches", "dense"])
def test_a_convolution_with_a_way_past_it_is_not_everything(name):
    model, _, _ = family(name)
    assert not everything_flows_through(model, "2.second", images(2, WIDE))
    assert gradcam(model, images(2, WIDE), targets(2), layer="2.second").shape == (2, 1, 32, 48)  # for who asks for it


@pytest.mark.parametrize("zero", ["first", "last"])
@pytest.mark.parametrize("name", FAMILIES)
def test_a_dead_copy_has_the_layer_of_the_model(name, zero):
    model, layer, _ = family(name)
    weighted = [module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))]
    for parameter in weighted[0 if zero == "first" else -1].parameters():
        nn.init.zeros_(parameter)
    x, y = images(2, WIDE), targets(2)
    assert gradcam_layer(model, x) == layer
    maps = gradcam(model, x, y)
    assert maps.isfinite().all() and (zero == "first" or not maps.any())
    assert torch.equal(maps, gradcam(model, x, y, layer=layer))


def test_the_last_layer_is_the_one_that_runs_last():
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.top, self.unused, self.base = (
                nn.Linear(72, CLASSES),
                nn.Conv2d(4, 2, 3, padding=1),
                nn.Conv2d(4, 1, 1),
                nn.Conv2d(3, 4, 3, padding=1, stride=2),
            )

        def forward(self, x):
            x = self.base(x)
            top = self.top(x)
            self.unused(x)  # runs last, and the logits are not made of it
            return self.fc(top.flatten(1))

    model, x, y = lively(Shuffled()), images(), targets()
    assert gradcam_layer(model, x) == "top"
    torch.testing.assert_close(gradcam(model, x, y), captums(model, model.top, x, y))


@pytest.mark.parametrize(
    ("build", "shape", "layer"),
    [
        (models.cnn, (1, 28, 28), "conv2"),
        (lambda: models.cnn(batch_norm=True), (1, 28, 28), "conv2"),
        (models.pooled_cnn, (1, 28, 28), "conv3"),
        (models.strided_cnn, (1, 28, 28), "conv2"),
        (models.squeezenet, (3, 64, 80), "classifier.1"),
    ],
    ids=["cnn", "cnn with norm", "pooled", "strided", "squeezenet"],
)
def test_the_layers_of_the_networks_of_the_book(build, shape, layer):
    assert gradcam_layer(build(), images(1, shape)) == layer


def test_one_piece_of_a_tensor_is_not_everything():
    """Two pieces share the step of the graph that cut them."""

    class Pieces(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.base = nn.Conv2d(3, 6, 4, 4), Block(lambda x, a, b: torch.relu(x + b))
            self.cut, self.head = Cut(), nn.Linear(6, CLASSES)

        def forward(self, x):
            first = self.cut(self.base(self.stem(x)))
            return self.head(torch.cat([first.relu(), self.cut.rest.tanh()], 1).mean((2, 3)))

    class Cut(nn.Module):
        def forward(self, x):
            first, self.rest = x.split(3, 1)
            return first

    assert gradcam_layer(lively(Pieces()), images(1, WIDE)) == "base"


@pytest.mark.parametrize("norm", [nn.utils.parametrizations.weight_norm, nn.utils.parametrizations.spectral_norm])
def test_a_convolution_with_parametrized_weights_is_one(norm):
    model = chain()
    norm(model[0])
    assert gradcam_layer(model.eval(), images(1, WIDE)) == "0"


def test_the_model_is_left_as_it_was_and_random_numbers_too():
    model, x = family("class token")[0].train(), images(2, WIDE)
    random = torch.get_rng_state()
    with torch.no_grad():
        gradcam_layer(model, x)
    assert all(
        module.training and not module._forward_hooks and not module._forward_pre_hooks for module in model.modules()
    )
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())
    assert torch.equal(random, torch.get_rng_state()) and torch.equal(x, images(2, WIDE))


def test_no_layer_at_all_raises():
    x = images(2, (1, 28, 28))
    for method in (gradcam, guided_gradcam):
        with pytest.raises(ValueError, match="no layer of this model is known .* layer=.* no output of a module has"):
            method(models.mlp(), x, targets(2))
    with pytest.raises(ValueError, match="no layer of this model is known"):
        gradcam_layer(models.mlp(), x)


@pytest.mark.parametrize("bad", [images()[0], None, images().numpy()])
def test_what_are_no_images_have_no_layer(bad):
    with pytest.raises(ValueError, match=r"images must be a float tensor \(N, C, H, W\)"):
        gradcam_layer(cnn(), bad)


def test_two_networks_side_by_side_are_refused_with_the_layers_to_choose_from():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.left, self.right = nn.Conv2d(3, 4, 4, 4), nn.Conv2d(3, 4, 8, 8)
            self.head = nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(torch.cat([self.left(x).relu().mean((2, 3)), self.right(x).relu().mean((2, 3))], 1))

    with pytest.raises(ValueError, match="layer=.*reshape=; to choose from: left, right"):
        gradcam(lively(Two()), images(2, WIDE), targets(2))


class Frozen(nn.Module):
    """A trunk that its owner runs without gradients, and a head that needs them."""

    def __init__(self):
        super().__init__()
        self.trunk, self.top = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(6, 4, 3, padding=1)
        self.head = nn.Linear(4, CLASSES)

    def forward(self, x):
        with torch.no_grad():
            x = self.trunk(x)
        return self.head(self.top(x).relu().mean((2, 3)))


def test_a_part_without_gradients_is_no_map_of_zeros():
    model, x, y = lively(Frozen()).eval(), images(2, WIDE), targets(2)
    with pytest.raises(ValueError, match="no gradient reaches it.*no_grad"):
        gradcam(model, x, y)
    with pytest.raises(ValueError, match="no gradient reaches layer 'trunk', although the logits depend on it"):
        gradcam(model, x, y, layer="trunk")
    rest = nn.Sequential(model.top, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), model.head)
    small = by_hand(rest, "0", model.trunk(x).detach(), y)
    assert gradcam(model, x, y, layer="top").shape == (2, 1, 32, 48) and small.any()


# ---------------------------------------------------------------- where the places are


def test_a_layer_whose_axes_are_all_of_one_size_is_read_by_what_a_change_does_to_it():
    x, y = images(), targets()
    last = lively(ChannelsLast(2, 6), 1)
    assert last.embed(x).shape == (3, 6, 6, 6)
    assert gradcam_layer(last, x) == "mix"
    torch.testing.assert_close(gradcam(last, x, y), by_hand(last, "mix", x, y, channels_last))
    torch.testing.assert_close(gradcam(last, x, y, layer="embed"), by_hand(last, "embed", x, y))


def test_a_map_that_is_stretched_is_not_read_by_its_sides_alone():
    """Eight channels, eight rows and sixteen columns of a square image: channels and rows are no places."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, (2, 1), 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 5)
    )
    model, x, y = lively(model), images(3, (3, 16, 16)), targets()
    torch.testing.assert_close(gradcam(model, x, y), by_hand(model, "0", x, y))


@pytest.mark.parametrize("name", ["registers", "class token behind"])
def test_tokens_are_had_by_name_or_by_a_function(name):
    model, layer, read = family(name)
    x, y = images(3, WIDE), targets()
    for other in (layer, "blocks.0", "blocks.2.norm1"):
        maps = by_hand(model, other, x, y, read)
        torch.testing.assert_close(gradcam(model, x, y, layer=other, reshape="tokens"), maps)
        torch.testing.assert_close(gradcam(model, x, y, layer=other, reshape=read), maps)


def test_rows_of_an_image_are_no_tokens_of_a_grid():
    """28 rows could be 5 x 5 patches and three more tokens; a change at the left would not stay at the left."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.row, self.head = nn.Linear(28, 8), nn.Linear(8, CLASSES)

        def forward(self, x):
            return self.head(self.row(x[:, 0]).relu().mean(1))

    model, x, y = lively(Rows()), images(2, (1, 28, 28)), targets(2)
    with pytest.raises(ValueError, match=r"'row' is \(2, 28, 8\), and not known to be .*reshape="):
        gradcam(model, x, y, layer="row")
    with pytest.raises(ValueError, match="to choose from: row"):
        gradcam(model, x, y)
    maps = gradcam(model, x, y, layer="row", reshape=lambda rows: rows.transpose(1, 2)[..., None])
    assert maps.shape == (2, 1, 28, 28) and maps.any()
    torch.testing.assert_close(maps, maps[..., :1].expand_as(maps))


@pytest.mark.parametrize(
    ("reshape", "message"),
    [
        ("grid", "reshape must be 'tokens', a function or None, got 'grid'"),
        ("tokens", r"'0' is \(3, 6, 12, 12\), and not known to be"),
        (lambda output: output.flatten(2), r"reshape must make \(N, C, h, w\) .*'0'; got \(3, 6, 144\)"),
        (lambda output: output.mean((2, 3), keepdim=True), r"got \(3, 6, 1, 1\)"),
        (lambda output: None, "got NoneType"),
    ],
)
def test_a_reshape_that_makes_no_map_raises(reshape, message):
    with pytest.raises(ValueError, match=message):
        gradcam(cnn(), images(), targets(), layer="0", reshape=reshape)


def test_guided_gradcam_follows():
    model, layer, read = family("residual")
    x, y = images(2, WIDE), targets(2)
    expected = guided_backprop(model, x, y) * by_hand(model, "0", x, y)
    torch.testing.assert_close(guided_gradcam(model, x, y, layer="0", reshape=as_it_is), expected)
    torch.testing.assert_close(guided_gradcam(model, x, y), guided_backprop(model, x, y) * gradcam(model, x, y))


# ---------------------------------------------------------------- maps that say nothing


class Spread(nn.Module):
    """The pooled channels, spread out again: height and width, and no places."""

    def forward(self, x):
        return x.mean((2, 3), keepdim=True).expand(-1, -1, 8, 12)


def test_a_map_of_a_default_layer_that_is_the_same_everywhere_is_refused():
    model = nn.Sequential(nn.Flatten(2), nn.Unflatten(2, WIDE[1:]), Spread(), nn.Flatten(), nn.Linear(288, CLASSES))
    model, x, y = lively(model), images(3, WIDE), targets()
    with pytest.raises(ValueError, match="layer '2', which was chosen .*the same everywhere.*layer="):
        gradcam(model, x, y)
    maps = gradcam(model, x, y, layer="2")  # who names it has it
    assert maps.any() and torch.equal(maps.amax((2, 3)), maps.amin((2, 3)))


def test_a_map_that_is_nowhere_positive_is_a_map_of_zeros():
    model = chain().eval()
    with torch.no_grad():
        model[0].weight.abs_(), model[0].bias.fill_(1.0), model[5].weight.abs_().neg_()
    x = images(2, WIDE).abs()
    maps = gradcam(model, x, targets(2))
    assert torch.equal(maps, torch.zeros(2, 1, 32, 48))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("layer", ["norm", "blocks", "blocks.2"])
def test_patches_that_nothing_reads_raise(layer, zero):
    """Behind the last attention the logits hang on the class token: all weights of the map would be zero."""
    model, default, _ = family("class token")
    if zero:
        nn.init.zeros_(model.head.weight)
    with pytest.raises(ValueError, match=f"depend on the places of layer '{layer}', only on a class token.*layer="):
        gradcam(model, images(2, WIDE), targets(2), layer=layer)
    assert gradcam(model, images(2, WIDE), targets(2), layer=default).any() != zero


def test_patches_that_weights_silence_have_a_map_of_zeros():
    model, layer, _ = family("class token")
    for block in model.blocks:
        nn.init.zeros_(block.attention.out_proj.weight)
    assert gradcam_layer(model, images(2, WIDE)) == layer
    assert not gradcam(model, images(2, WIDE), targets(2)).any()


def test_a_strip_has_places_in_a_row():
    end = nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, CLASSES)
    model, x, y = lively(nn.Sequential(nn.Conv2d(3, 6, (1, 5), (1, 2)), *end)), images(2, (3, 1, 40)), targets(2)
    assert gradcam_layer(model, x) == "0"
    torch.testing.assert_close(gradcam(model, x, y), by_hand(model, "0", x, y))


@pytest.mark.parametrize("layer", ["2", "3"])
def test_a_layer_without_a_place_raises(layer):
    with pytest.raises(ValueError, match=f"layer '{layer}' has no place: its output is .*1, 1.*layer="):
        gradcam(headed(), images(2, WIDE), targets(2), layer=layer)


@pytest.mark.parametrize("method", [gradcam, guided_gradcam])
@pytest.mark.parametrize(
    ("layer", "message"),
    [
        ("conv9", "layer 'conv9' is not part of this model; its layers: 0, 1, 2"),
        (nn.Conv2d(3, 6, 3), "is not part of this model"),
        (3, "layer 3 is not part of this model"),
        ("9", r"output of layer '9' is \(3, 10\), and not known to be \(N, C, h, w\)"),
        ("7", r"output of layer '7' is \(3, 72\), and not known to be \(N, C, h, w\)"),
    ],
)
def test_a_layer_that_cannot_be_drawn_raises(method, layer, message):
    with pytest.raises(ValueError, match=message):
        method(cnn(), images(), targets(), layer=layer)


def test_a_layer_that_returns_several_tensors_raises():
    model = family("class token")[0]
    with pytest.raises(ValueError, match="'blocks.1.attention' returns a tuple, not one float tensor.*layer="):
        gradcam(model, images(2, WIDE), targets(2), layer="blocks.1.attention")


def test_a_layer_that_does_not_run_raises():
    model = cnn()
    model[9].spare = nn.Conv2d(1, 1, 1)
    with pytest.raises(ValueError, match="'9.spare' does not run"):
        gradcam(model, images(), targets(), layer="9.spare")


@pytest.mark.parametrize("layer", [None, "9"])
def test_no_hook_stays_after_an_error(layer):
    model = cnn() if layer else models.mlp()
    with pytest.raises(ValueError):
        gradcam(model, images() if layer else images(3, (1, 28, 28)), targets(), layer=layer)
    assert not hooks_of(model)


def test_the_size_of_a_pass_does_not_matter(monkeypatch):
    model, x, y = cnn(), images(5), targets(5)
    whole = gradcam(model, x, y)
    monkeypatch.setattr(passes, "VALUES_A_PASS", 2 * x[0].numel())
    torch.testing.assert_close(gradcam(model, x, y), whole)


# ---------------------------------------------------------------- networks of other libraries


def swin():
    return swin_transformer.SwinTransformer([4, 4], 8, [1, 1], [2, 2], [4, 4], num_classes=CLASSES)


def vit():
    return torchvision.models.VisionTransformer(64, 16, 3, 2, 16, 32, num_classes=CLASSES)


def convnext_small():
    return convnext.ConvNeXt(
        [convnext.CNBlockConfig(8, 16, 1), convnext.CNBlockConfig(16, None, 1)], num_classes=CLASSES
    )


def dense():
    return torchvision.models.DenseNet(4, (2, 2), 8, num_classes=CLASSES)


def googlenet():
    return torchvision.models.googlenet(init_weights=False)


def patches(tokens):
    return tokens[:, 1:].transpose(1, 2).reshape(len(tokens), -1, 4, 4)


@pytest.mark.parametrize(
    ("build", "shape", "layer", "read"),
    [
        (swin, (64, 96), "permute", as_it_is),
        (swin, (64, 96), "features.3", channels_last),
        (vit, (64, 64), "encoder.layers.encoder_layer_1", patches),
        (convnext_small, (64, 96), "features.3.0", as_it_is),
        (dense, (64, 96), "features", as_it_is),
        (torchvision.models.resnet18, (64, 96), "layer4", as_it_is),
        pytest.param(torchvision.models.vgg11, (64, 96), "features.18", as_it_is, marks=pytest.mark.weekly),
        pytest.param(googlenet, (64, 96), "inception5b", as_it_is, marks=pytest.mark.weekly),
    ],
)
def test_networks_of_torchvision(build, shape, layer, read):
    with local_seed(5):
        model = lively(build()).eval()
    x, y = images(2, (3, *shape)), targets(2)
    if read is not channels_last:  # a block of Swin, which is not the last
        assert gradcam_layer(model, x) == layer
    torch.testing.assert_close(gradcam(model, x, y, layer=layer), by_hand(model, layer, x, y, read))
    assert everything_flows_through(model, layer, x)


@pytest.mark.weekly
@pytest.mark.parametrize(
    ("name", "options", "layer"),
    [
        ("vit_tiny_patch16_224", {"img_size": 64}, "blocks.10"),
        ("deit_tiny_distilled_patch16_224", {"img_size": 64}, "blocks.10"),
        ("vit_small_patch14_reg4_dinov2", {"img_size": 70, "depth": 3}, "blocks.1"),
        ("mixer_s32_224", {"img_size": 64}, "norm"),
        ("swin_tiny_patch4_window7_224", {"img_size": 112}, "norm"),
        ("seresnet50", {}, "layer4"),
        ("resnetv2_50", {}, "norm"),
        ("ghostnet_100", {}, "blocks.9.0.conv"),
        ("mobilenetv3_small_100", {}, "blocks.5.0.conv"),
        ("convnext_atto", {}, "norm_pre"),
        ("xcit_nano_12_p16_224", {"img_size": 64}, "cls_attn_blocks.0"),
    ],
)
def test_networks_of_timm(name, options, layer):
    timm = pytest.importorskip("timm")
    with local_seed(6):
        model = lively(timm.create_model(name, pretrained=False, num_classes=CLASSES, **options)).eval()
    side = options.get("img_size", 64)
    x = images(2, (3, side, side))
    assert gradcam_layer(model, x) == layer
    assert everything_flows_through(model, layer, x)
    assert gradcam(model, x, targets(2)).shape == (2, 1, side, side)


@pytest.mark.weekly
def test_a_network_of_transformers():
    transformers = pytest.importorskip("transformers")

    class Logits(nn.Module):
        def __init__(self):
            super().__init__()
            sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
            config = transformers.ViTConfig(image_size=64, patch_size=16, num_labels=CLASSES, **sizes)
            self.model = transformers.ViTForImageClassification(config)

        def forward(self, x):
            return self.model(x).logits

    model, x, y = lively(Logits()).eval(), images(2, (3, 64, 64)), targets(2)
    layer = gradcam_layer(model, x)
    assert layer.endswith(".1") and everything_flows_through(model, layer, x)
    torch.testing.assert_close(gradcam(model, x, y), by_hand(model, layer, x, y, patches))
