"""Which way the image takes through the modules of a model."""

import pytest
import torch
from networks import images
from saliency_sanity.dataflow import Flow
from torch import nn


class Net(nn.Module):
    """A row of two, a skip, a branch that the image never reaches, and a piece that is called as a method."""

    def __init__(self):
        super().__init__()
        self.row = nn.Sequential(nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1))
        self.skip = Skip()
        self.table = nn.Linear(2, 3)

    def forward(self, x):
        bias = self.table(torch.ones(1, 2))[:, :, None, None]
        return (self.skip(self.row(x)) + bias).flatten(1)


class Skip(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)

    def forward(self, x):
        return torch.relu_(x + self.inner(x)) + self.outer(x)


@pytest.mark.parametrize("example", [None, images(1)])
@pytest.mark.parametrize(
    ("piece", "part", "expected"),
    [
        ("row", "row.0", True),
        ("row", "row.1", True),
        ("skip", "skip.inner", False),
        ("skip", "skip.outer", False),
        ("row", "nothing", False),
        ("nothing", "row", False),
    ],
)
def test_what_lies_on_every_way(example, piece, part, expected):
    assert Flow(Net(), example).passes_all(piece, part) == expected


@pytest.mark.parametrize(("part", "expected"), [("row", True), ("skip", True), ("table", False)])
def test_what_lies_on_every_way_through_the_whole(part, expected):
    assert Flow(Net(), images(1)).passes_all("", part) == expected


def test_a_model_without_a_graph_has_no_chains():
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                return super().forward(x)

    model = Frozen()
    assert not Flow(model, images(1)).passes_all("row", "row.0")
    assert not any(module._forward_hooks for module in model.modules())
