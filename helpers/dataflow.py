"""Which way the image takes through the modules of a model."""

from collections.abc import Callable, Iterable
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from .inference import evaluating
from .model_state import copied, leaves

Nodes = dict[str, set]  # by the name of a module


class Flow:
    """The graph of one pass of `example`, or of a trace by `torch.fx`, made when it is first asked for."""

    def __init__(self, model: nn.Module, example: Tensor | None):
        self.model, self.example = model, example

    @cached_property
    def _graph(self) -> tuple[Nodes, Nodes, Callable[[Any], Iterable]]:
        try:
            return _traced(self.model) if self.example is None else _recorded(self.model, self.example)
        except Exception:  # no graph, so nothing is known to run one after the other
            return {}, {}, lambda node: ()

    def passes_all(self, piece: str, part: str) -> bool:
        """Whether all that the module `piece` hands on of its input goes through the output of `part` in it."""
        into, out, _ = self._graph
        return part in out and self._reaches(piece, set()) and not self._reaches(piece, out[part])

    def _reaches(self, piece: str, closed: set) -> bool:
        """Whether a way leads from the output of the piece back to its input, past the `closed` nodes."""
        into, out, before = self._graph
        seen, waiting = set(closed), list(out.get(piece, ()))
        while waiting:
            node = waiting.pop()
            if node not in seen:
                seen.add(node)
                if node in into.get(piece, ()):
                    return True
                waiting.extend(before(node))
        return False


def _nodes(values) -> set:
    return {item.grad_fn for item in leaves(values) if isinstance(item, Tensor) and item.grad_fn is not None}


@torch.inference_mode(False)
def _recorded(model: nn.Module, example: Tensor) -> tuple[Nodes, Nodes, Callable[[Any], Iterable]]:
    """Inputs and outputs of all modules as nodes of autograd's graph."""
    private = copied(model)
    into: Nodes = {}
    out: Nodes = {}
    for name, module in private.named_modules():
        module.register_forward_pre_hook(
            lambda module, args, kwargs, name=name: into.setdefault(name, set()).update(_nodes((args, kwargs))),
            with_kwargs=True,
        )
        module.register_forward_hook(
            lambda module, args, output, name=name: out.setdefault(name, set()).update(_nodes(output))
        )
    with evaluating(private), torch.enable_grad():
        private(example.detach().clone().requires_grad_().clone())
    return into, out, lambda node: [earlier for earlier, _ in node.next_functions if earlier is not None]


def _traced(model: nn.Module) -> tuple[Nodes, Nodes, Callable[[Any], Iterable]]:
    """Inputs and outputs of all modules as nodes of a symbolic trace."""
    inside: Nodes = {}
    for node in torch.fx.symbolic_trace(model).graph.nodes:
        for path, _ in node.meta.get("nn_module_stack", {}).values():
            inside.setdefault(path, set()).add(node)
    into, out = {}, {}
    for path, nodes in inside.items():
        into[path] = {given for node in nodes for given in node.all_input_nodes if given not in nodes}
        out[path] = {node for node in nodes if any(user not in nodes for user in node.users)}
    return into, out, lambda node: node.all_input_nodes
