"""Networks, their expected stages, and what tests of randomised copies ask of them."""

import pytest
import torch
import torchvision
from networks import CLASSES, lively
from saliency_sanity.book import models
from saliency_sanity.device import generator, local_seed
from saliency_sanity.randomization import SCHEMES, cascading
from torch import nn

scheme = pytest.mark.parametrize("scheme", SCHEMES.values(), ids=SCHEMES)

INCEPTION = (
    "fc Mixed_7c Mixed_7b Mixed_7a Mixed_6e Mixed_6d Mixed_6c Mixed_6b Mixed_6a Mixed_5d Mixed_5c Mixed_5b "
    "Conv2d_4a_3x3 Conv2d_3b_1x1 Conv2d_2b_3x3 Conv2d_2a_3x3 Conv2d_1a_3x3"
)  # the list of the paper
RESNET = "fc layer4.1 layer4.0 layer3.1 layer3.0 layer2.1 layer2.0 layer1.1 layer1.0 conv1"
SQUEEZENET = "classifier.1 " + " ".join(f"features.{i}" for i in (12, 11, 10, 9, 7, 6, 4, 3, 0))
STAGES = {
    "inception_v3": (
        lambda: torchvision.models.inception_v3(weights=None, init_weights=False),
        75,
        INCEPTION,
    ),
    "resnet18": (lambda: torchvision.models.resnet18(weights=None), 64, RESNET),
    "squeezenet": (models.squeezenet, 64, SQUEEZENET),
    "cnn": (models.cnn, 28, "logits fc1 conv2 conv1"),
    "cnn with batch-norm": (lambda: models.cnn(batch_norm=True), 28, "logits fc1 conv2 conv1"),
    "mlp": (models.mlp, 28, "logits fc3 fc2 fc1"),
}


def example(side):
    return torch.rand(1, 1 if side == 28 else 3, side, side, generator=generator(0))


def names(found):
    return " ".join(stage.name for stage in found.stages)


def tensors(model):
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def snapshot(model):
    return {name: tensor.detach().clone() for name, tensor in tensors(model).items()}


def changed(before, after):
    """Names of the tensors that differ."""
    return {name for name, tensor in tensors(after).items() if not torch.equal(tensor, before[name])}


def assert_untouched(model, before):
    assert not changed(before, model)


def small(seed=0):
    """Two layers of one shape, a batch-norm, and biases that are not zero."""
    with local_seed(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.AvgPool2d(4),
            nn.Flatten(),
            nn.Linear(54, 54),
            nn.ReLU(),
            nn.Linear(54, 54),
            nn.ReLU(),
            nn.Linear(54, CLASSES),
        )
        for layer in model:
            if isinstance(layer, nn.Linear):
                nn.init.normal_(layer.bias)
    return lively(model, seed)


SMALL = ["9", "7", "5", "0"]


def members(model, stage):
    """Names of the tensors of a stage that change: all but the step counter of a norm that never stepped."""
    return {n for n in tensors(model) for m in stage.members if n.startswith(f"{m}.") and "num_batches" not in n}


def last(model, **options):
    *_, (_, copy) = cascading(model, seed=0, **options)
    return copy
