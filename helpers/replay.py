"""Forward passes that start where the weights changed, for comparing many versions of one model."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

from torch import Tensor, nn

from .randomization import Uses


def units(model: nn.Module) -> Iterator[nn.Module]:
    """The pieces a model is made of: its children, containers and wrappers opened."""
    children = list(model.children())
    for child in children:
        opened = isinstance(child, nn.Sequential) or type(child) in (nn.ModuleList, nn.ModuleDict)
        if opened or (len(children) == 1 and any(True for _ in child.children())):
            yield from units(child)
        else:
            yield child


@dataclass
class Call:
    """What a piece returned, and which later call last wrote into it (its own, if none did)."""

    piece: int
    output: object
    version: int
    written_by: int

    def rewritten(self) -> bool:
        """Whether somebody wrote into the output since this was last asked."""
        before, self.version = self.version, getattr(self.output, "_version", 0)
        return self.version != before


class Tape:
    """One forward pass of `model` on `images`, from which its randomised copies take what they leave unchanged.

    The first pass inside `playing` records what every piece of the model returns, with its graph. In a later one a
    copy replays the pieces that ran before the first tensor that it changed, and computes the rest. Only for
    methods that differentiate the logits once, at exactly these images, all in the same way. Where pieces call each
    other or something writes into what was recorded, passes run from the start.

    With `falling`, no copy is changed above the one before; what is out of reach is then let go.
    """

    def __init__(self, model: nn.Module, images: Tensor, *, falling: bool = False):
        self.images, self.falling = images, falling
        self.leaf = images.detach().clone().requires_grad_()
        self.tensors = [*model.parameters(), *model.buffers()]
        self.first_use: dict[int, int] = {}
        self.calls: list[Call] = []
        self.recorded = self.inside = False
        self.safe = True
        self.cut = self.position = 0

    @contextmanager
    def playing(self, model: nn.Module, changed: Collection[int]) -> Iterator[None]:
        """Explain `model` from the tape: the recorded model itself, or a copy of it.

        `changed` holds the identities, in the recorded model, of the tensors that are others in the copy.
        """
        self.model = model
        uses = [self.first_use[tensor] for tensor in changed if tensor in self.first_use]
        self.cut = min(uses, default=len(self.calls)) if self.safe else 0
        while late := [place for place, call in enumerate(self.calls[: self.cut]) if call.written_by >= self.cut]:
            self.cut = late[0]
        for call in self.calls[self.cut :] if self.falling else []:
            call.output = None
        pieces = list(dict.fromkeys(units(model)))
        own = [piece.__dict__.get("forward") for piece in pieces]
        for number, piece in enumerate(pieces):
            piece.forward = self._replaying(number, piece.forward)
        model._tape = self
        try:
            yield
        finally:
            del model._tape
            for piece, forward in zip(pieces, own):
                del piece.forward
                if forward is not None:
                    piece.forward = forward

    def holds(self, images: Tensor) -> bool:
        """Whether these are the recorded images, and not others like them."""
        mine, other = ((t.data_ptr(), t.shape, t.stride(), t.dtype, t.device) for t in (self.images, images))
        return mine == other

    def __call__(self, images: Tensor) -> Tensor:
        """The model's output for a copy of the leaf."""
        self.position = 0
        noting = nullcontext() if self.recorded else Uses(self.tensors, self._note)
        with noting:
            output = self.model(images.clone())
        rewritten = any(call.rewritten() for call in self.calls[: self.cut if self.recorded else None])
        self.recorded = True
        if self.safe and not rewritten:
            return output
        self.safe, self.cut, self.calls = False, 0, []
        return self.model(images)

    def _note(self, tensor: int) -> None:
        self.first_use.setdefault(tensor, self.position - self.inside)

    def _replaying(self, number: int, run):
        def forward(*args, **kwargs):
            place, self.position = self.position, self.position + 1
            self.safe = self.safe and not self.inside
            if place < self.cut:
                call = self.calls[place]
                self.safe = self.safe and call.piece == number
                last = place == self.cut - 1 and isinstance(call.output, Tensor)
                return call.output.clone() if last else call.output  # what comes next may write into its input
            if self.recorded:
                return run(*args, **kwargs)
            self.safe = self.safe and not any(call.rewritten() for call in self.calls)
            self.inside = True
            output = run(*args, **kwargs)
            self.inside = False
            for call in self.calls:
                call.written_by = place if call.rewritten() else call.written_by
            self.calls.append(Call(number, output, getattr(output, "_version", 0), place))
            return output

        return forward
