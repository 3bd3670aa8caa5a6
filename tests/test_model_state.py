"""Copies of models that hold results of a pass, and where tensors are held."""

from collections import deque
from types import SimpleNamespace

import torch
from networks import cnn, images
from saliency_sanity.model_state import copied, order_of_use, plain_places
from torch import nn


def kept():
    """A tensor of a graph, in every kind of place."""
    tensor = (torch.ones(2, requires_grad=True) * 3).relu()
    model = nn.Linear(2, 2)
    model.one, model.many = tensor, [tensor, {"key": (tensor, deque([tensor]), {tensor})}]
    model.inside = SimpleNamespace(of=SimpleNamespace(it=tensor))
    return model, tensor


def test_results_of_a_pass_are_copied_without_their_graph_and_stay_one():
    model, tensor = kept()
    copy = copied(model)
    own = copy.one
    assert own is not tensor and torch.equal(own, tensor) and own.grad_fn is None
    assert copy.many[0] is own and copy.many[1]["key"][0] is own and copy.many[1]["key"][1][0] is own
    assert copy.inside.of.it is own and own in copy.many[1]["key"][2]
    assert model.one is tensor and tensor.grad_fn is not None
    assert own.untyped_storage().data_ptr() != tensor.untyped_storage().data_ptr()


def test_parameters_and_leaves_are_copied_as_ever():
    model = cnn()
    model.leaf = torch.ones(2, requires_grad=True)
    copy = copied(model)
    assert copy.leaf.requires_grad and copy.leaf.is_leaf
    for old, new in zip(model.parameters(), copy.parameters(), strict=True):
        assert new.requires_grad and new.is_leaf and torch.equal(old, new) and old is not new


def test_all_places_are_found():
    model, tensor = kept()
    assert {place.path for place, held in plain_places(model) if held is tensor} == {
        "one", "many[0]", "many[1]['key'][0]", "many[1]['key'][1][0]", "many[1]['key'][2][0]", "inside.of.it",
    }  # fmt: skip


def test_buffers_are_in_the_order_too():
    model = cnn()
    order = order_of_use(model, images(1))
    assert order.index(id(model[1].running_mean)) < order.index(id(model[4].weight))
    running = {id(t) for t in (*model.parameters(), *model.buffers()) if t.is_floating_point()}
    assert set(order) == running | set(map(id, model.modules()))
    assert running <= set(order_of_use(model, None))
