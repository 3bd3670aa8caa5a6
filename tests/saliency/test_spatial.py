"""Outputs of layers in every order of axes: read as a map, or refused where the map would lie wrong on the image."""

import pytest
import torch
from networks import CLASSES, images, lively, targets
from saliency_sanity.device import local_seed
from saliency_sanity.saliency.cam import gradcam, gradcam_layer
from saliency_sanity.wrapper import Wrapped
from torch import nn
from torch.nn import functional as F

WIDE, SQUARE = (3, 32, 48), (3, 32, 32)


def by_hand(model, module, x, y, read=lambda output: output, run=-1):
    """Grad-CAM from the outputs of one hook, of which the run counts, and one gradient."""
    seen = []
    hook = module.register_forward_hook(lambda module, inputs, output: seen.append(output) or output.clone())
    logits = model(x.clone().requires_grad_())
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.gather(1, y[:, None]).sum(), seen[run])
    activations, gradient = read(seen[run].detach()), read(gradient)
    small = (activations * gradient.mean((2, 3), keepdim=True)).sum(1, keepdim=True).relu()
    return F.interpolate(small, size=x.shape[2:], mode="bilinear", align_corners=False)


class Arranged(nn.Module):
    """Patches in some arrangement, looked at by `mix` and averaged over their places."""

    def __init__(self, arrange, mix, places):
        super().__init__()
        self.embed, self.mix, self.head = nn.Conv2d(3, 8, 8, 8), mix, nn.Linear(8, CLASSES)
        self.arrange, self.places = arrange, places

    def forward(self, x):
        return self.head(self.mix(self.arrange(self.embed(x))).relu().mean(self.places))


def arranged(name):
    arrange, mix, places, *_ = {**READ, **REFUSED}[name]
    with local_seed(2):
        return lively(Arranged(arrange, mix(), places), 2).eval()


def in_rows(maps):
    return maps.flatten(2).transpose(1, 2)


def best(maps, count=6):
    """The patches with the largest norms, largest first."""
    tokens = in_rows(maps)
    chosen = tokens.norm(dim=2).topk(count, 1).indices
    return tokens.gather(1, chosen[..., None].expand(-1, -1, tokens.shape[2]))


def tokenwise():
    return nn.Linear(8, 8)


def spatial():
    return nn.Conv2d(8, 8, 1)


READ = {  # an arrangement of (N, C, h, w), what reads it, the axes of the places, and the way back
    "images, tokens, channels": (
        in_rows,
        tokenwise,
        1,
        lambda output: output.transpose(1, 2).unflatten(2, (4, 6)),
    ),
    "tokens, images, channels": (
        lambda maps: maps.flatten(2).permute(2, 0, 1),
        tokenwise,
        0,
        lambda output: output.permute(1, 2, 0).unflatten(2, (4, 6)),
    ),
    "images, channels, tokens": (
        lambda maps: maps.flatten(2),
        lambda: nn.Conv1d(8, 8, 1),
        2,
        lambda output: output.unflatten(2, (4, 6)),
    ),
    "channels last": (
        lambda maps: maps.movedim(1, 3),
        tokenwise,
        (1, 2),
        lambda output: output.movedim(3, 1),
    ),
}
REFUSED = {
    "columns before rows": (lambda maps: in_rows(maps.mT), tokenwise, 1),
    "patches in another order": (lambda maps: in_rows(maps)[:, torch.arange(16) * 5 % 16], tokenwise, 1),
    "only the best patches": (lambda maps: best(maps, 4), tokenwise, 1),
    "turned": (lambda maps: maps.mT, spatial, (2, 3)),
    "mirrored": (lambda maps: maps.flip(3), spatial, (2, 3)),
    "upside down": (lambda maps: maps.flip(2), spatial, (2, 3)),
}


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("name", READ)
def test_any_order_of_axes_is_read(name, count, device):
    model, x, y = arranged(name).to(device), images(count, WIDE).to(device), targets(count).to(device)
    read = READ[name][3]
    maps = by_hand(model, model.mix, x, y, read)
    assert gradcam_layer(model, x) == "mix" and maps.any()
    torch.testing.assert_close(gradcam(model, x, y), maps)
    torch.testing.assert_close(gradcam(model, x, y, layer="mix", reshape=read), maps)


@pytest.mark.parametrize("name", READ)
def test_a_layer_that_is_switched_off_is_read_in_the_same_order(name):
    model = arranged(name)
    nn.init.zeros_(model.embed.weight), nn.init.zeros_(model.mix.weight)
    assert gradcam_layer(model, images(2, WIDE)) == "mix"


@pytest.mark.parametrize("name", REFUSED)
def test_a_map_that_would_lie_wrong_on_the_image_is_refused(name):
    model, x, y = arranged(name), images(2, SQUARE), targets(2)
    with pytest.raises(ValueError, match=r"layer 'mix' is .*, and not known to be .*reshape="):
        gradcam(model, x, y, layer="mix")
    assert gradcam_layer(model, x) == "embed"


# ---------------------------------------------------------------- which run of a layer


class Pair(nn.Module):
    """One trunk for the image and a second picture, which comes `first` or last."""

    def __init__(self, first):
        super().__init__()
        self.trunk, self.head, self.first = nn.Conv2d(3, 6, 4, 4), nn.Linear(12, CLASSES), first

    def forward(self, x, other):
        runs = [self.trunk(one).relu().mean((2, 3)) for one in ((other, x) if self.first else (x, other))]
        return self.head(torch.cat(runs, 1))


@pytest.mark.parametrize("first", [False, True])
def test_a_layer_that_also_runs_on_a_held_input_is_seen_where_it_runs_on_the_image(first):
    with local_seed(1):
        model = Wrapped(lively(Pair(first)), inputs=(images(1, WIDE, seed=5),)).eval()
    x, y = images(2, WIDE), targets(2)
    maps = by_hand(model, model.model.trunk, x, y, run=int(first))
    assert maps.any()
    for layer in (None, "model.trunk"):
        torch.testing.assert_close(gradcam(model, x, y, layer=layer), maps)


class Crops(nn.Module):
    """Sees two crops of each image as images of their own."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 6, 4, 4), nn.Linear(6, CLASSES)

    def forward(self, x):
        crops = torch.stack([x[..., :32], x[..., -32:]], 1).flatten(0, 1)
        return self.head(self.conv(crops).relu().mean((2, 3))).unflatten(0, (len(x), 2)).mean(1)


class OneByOne(Crops):
    def forward(self, x):
        return torch.cat([self.head(self.conv(image[None]).relu().mean((2, 3))) for image in x])


@pytest.mark.parametrize(("build", "rows"), [(Crops, 4), (OneByOne, 1)])
def test_a_layer_with_more_or_fewer_maps_than_images_is_refused(build, rows):
    with local_seed(1):
        model = lively(build())
    with pytest.raises(ValueError, match=f"'conv' puts out {rows} maps for 2 images.*layer="):
        gradcam(model, images(2, WIDE), targets(2), layer="conv")


def test_image_by_image_is_had_one_image_a_pass():
    with local_seed(1):
        model = lively(OneByOne())
    x, y = images(2, WIDE), targets(2)
    maps = torch.cat([by_hand(model, model.conv, x[i : i + 1], y[i : i + 1]) for i in range(2)])
    torch.testing.assert_close(gradcam(model, x, y, layer="conv", batch_size=1), maps)


# ---------------------------------------------------------------- the way to the logits


class Behind(nn.Module):
    """A convolution with something `behind` it, and another that nothing reads."""

    def __init__(self, behind):
        super().__init__()
        self.conv, self.aside, self.head = nn.Conv2d(3, 6, 4, 4), nn.Conv2d(3, 6, 4, 4), nn.Linear(6, CLASSES)
        self.behind = behind

    def forward(self, x):
        self.aside(x)
        return self.head(self.behind(self.conv(x)).mean((2, 3)))


class Spectrum(nn.Module):
    def forward(self, x):
        return torch.fft.fft2(x)


@pytest.mark.parametrize(
    ("behind", "layer", "message"),
    [
        (nn.ReLU(), "aside", "logits do not depend on layer 'aside', and its map would be zero"),
        (lambda x: x.relu_().mul_(2), "conv", "cannot be differentiated behind layer 'conv'"),
    ],
)
def test_a_layer_without_a_gradient_is_refused(behind, layer, message):
    with local_seed(1):
        model = lively(Behind(behind))
    with pytest.raises(ValueError, match=message):
        gradcam(model, images(2, WIDE), targets(2), layer=layer)


def test_a_layer_of_complex_numbers_is_passed_over():
    with local_seed(1):
        model = lively(Behind(nn.Sequential(Spectrum())))
    model.behind.register_forward_hook(lambda module, inputs, output: output.abs())
    assert gradcam_layer(model, images(2, WIDE)) == "conv"
