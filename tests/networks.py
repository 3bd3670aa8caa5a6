"""Small networks, images and rewritings that several tests share."""

from copy import deepcopy

import pytest
import torch
from saliency_sanity.device import generator, local_seed
from torch import nn
from torch.nn import functional as F

SHAPE, CLASSES = (3, 12, 12), 5


def weekly_but(*daily, of):
    """Parameters of a test: `daily` are tried on every run, the others `of` a kind once a week."""
    assert set(daily) <= set(of), f"not all of {daily} are there"
    return [value if value in daily else pytest.param(value, marks=pytest.mark.weekly) for value in of]


def images(count=3, shape=SHAPE, seed=0, dtype=torch.float32):
    return torch.randn(count, *shape, generator=generator(seed), dtype=dtype)


def targets(count=3, classes=CLASSES, seed=0):
    return torch.randint(classes, (count,), generator=generator(seed + 1))


def lively(model, seed=0):
    """The model with logits of order one and batch-norm statistics as if it had been trained."""
    with local_seed(seed), torch.no_grad():
        for module in model.modules():
            if isinstance(module, (nn.Conv2d, nn.Linear)):
                nn.init.kaiming_normal_(module.weight)
            elif isinstance(module, nn.modules.batchnorm._BatchNorm):
                module.running_mean.normal_(0, 0.3)
                module.running_var.uniform_(0.5, 2)
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(0, 0.3)
    return model


def cnn(seed=0):
    """Convolutions, batch-norm, ReLU modules, pooling and dropout; in train mode, as it is built."""
    with local_seed(seed):
        model = nn.Sequential(
            nn.Conv2d(3, 6, 3, padding=1),
            nn.BatchNorm2d(6),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(6, 8, 3, padding=1),
            nn.ReLU(),
            nn.AvgPool2d(2),
            nn.Flatten(),
            nn.Dropout(0.5),
            nn.Linear(72, 10),
            nn.ReLU(),
            nn.Linear(10, CLASSES),
        )
    return lively(model, seed)


def small(seed=0):
    """The same in double precision, with four stages: 11 9 4 0."""
    return cnn(seed).double()


def linear(seed=0, shape=SHAPE):
    with local_seed(seed):
        return nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), CLASSES))


class CappedReLU(nn.ReLU):
    """ReLU6 in the one class that captum knows."""

    def forward(self, x):
        return x.clamp(0, 6)


def with_relu_modules(model):
    """The same network with every ReLU and ReLU6 call as a module of its own: what captum's hooks need."""
    traced = torch.fx.symbolic_trace(deepcopy(model).eval())
    modules = dict(traced.named_modules())
    kinds = {
        **dict.fromkeys((F.relu, torch.relu, torch.relu_, "relu", "relu_", nn.ReLU), nn.ReLU),
        **dict.fromkeys((F.relu6, nn.ReLU6), CappedReLU),
    }
    for number, node in enumerate(list(traced.graph.nodes)):
        called = type(modules[node.target]) if node.op == "call_module" else node.target
        if called in kinds:
            name = f"relu_number_{number}"
            traced.add_submodule(name, kinds[called]())
            with traced.graph.inserting_after(node):
                new = traced.graph.call_module(name, node.args[:1])
            node.replace_all_uses_with(new)
            traced.graph.erase_node(node)
    traced.recompile()
    return traced
