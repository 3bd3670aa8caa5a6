"""The maps of one method under several conditions, compared with those under the first, a few images at a time."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

from . import saliency, similarity
from .device import batches, seed_of
from .heatmaps import Function, Refusal, draws_noise, heat_of, refusing, spectral_noise, takes
from .replay import Tape
from .rows import Entry
from .saliency.passes import OnePass, chunks, explaining, images_a_pass, one_pass_of, with_room
from .versions import Versions

PIXELS_AT_ONCE = 64 * 224 * 224  # 64 photographs' maps or 4096 digits': what is held and compared at once


@dataclass(frozen=True)
class Side:
    """A condition under which maps are made, and the rows that they are for: none without a `role`."""

    model: Callable[[], nn.Module]
    targets: Tensor
    seed: int
    scheme: str = ""
    role: str = ""
    stage: int = 0
    layer: str = ""


@dataclass(frozen=True)
class Pictures:
    """The images of a call, their places in the whole set, and how their pixels shall lie in memory."""

    images: Tensor
    places: Sequence[int]
    layout: torch.memory_format | None = None

    def at(self, which: slice | list[int]) -> Tensor:
        chosen = self.images[which]
        return chosen if self.layout is None else chosen.contiguous(memory_format=self.layout)

    def blocks(self, method: Function) -> Iterator[slice]:
        """Parts that are worked on one after the other, so that memory does not grow with the number of images.

        A method that draws noise and knows no places draws it for all images at once.
        """
        count = len(self.images)
        if draws_noise(method) and not takes(method, "indices"):
            return batches(count, count)
        a_pass = images_a_pass(self.images)
        return batches(count, max(a_pass, PIXELS_AT_ONCE // self.images[0, 0].numel() // a_pass * a_pass))


@contextmanager
def _reporting(maps: Tensor) -> Iterator[None]:
    """Where a metric raises because of NaN or infinite pixels it is the method that refuses."""
    try:
        yield
    except ValueError as error:
        if torch.isfinite(maps).all():
            raise  # the metric's own, for example of a window that does not fit
        raise Refusal("the method gives maps with NaN or infinite pixels") from error


@dataclass(frozen=True)
class Comparison:
    """A method whose maps on all `sides` are compared with those on the first; `lines` adds the floors.

    With `versions` the first sides are these, in order, and a method of one pass is run from a tape.
    """

    method: Function
    label: str
    seed: int
    pictures: Pictures
    metrics: Mapping[str, Function]
    sides: Sequence[Side]
    lines: bool = False
    versions: Versions | None = None
    tick: Callable[[], object] = lambda: None  # called when a curve has another point

    def entries(self) -> list[Entry]:
        """The rows of the sides in order, of the floors, and of what was refused.

        Raises
        ------
        Refusal
            There is nothing to compare with: the method refuses the first side.
        """
        values: dict[Entry, Tensor] = {}
        refused: dict[Entry, Refusal] = {}
        for block in self.pictures.blocks(self.method):
            found = with_room(lambda: _Block(self, block, refused).run())  # noqa: B023
            refused |= found.refused
            for rows, parts in found.values.items():
                if rows._replace(metric="") in refused:
                    continue
                if rows not in values:  # for all blocks: small tensors among large ones would tear the memory to pieces
                    values[rows] = parts[0].new_empty(len(self.pictures.images))
                values[rows][block] = torch.cat(parts)
        measured = [
            rows._replace(values=similarities)
            for rows, similarities in values.items()
            if rows._replace(metric="") not in refused
        ]
        lost = sorted(refused, key=lambda rows: rows.stage)
        return [*measured, *(rows.refused(str(refused[rows])) for rows in lost)]

    def rows(self, side: Side, metric: str = "") -> Entry:
        return Entry(side.scheme, side.role, self.seed, side.stage, side.layer, self.label, metric, None)


class _Block:
    """Some of the images: similarities, and refusals, by the rows that they are for."""

    def __init__(self, comparison: Comparison, block: slice, refused: Mapping[Entry, Refusal]):
        self.of, self.block, self.refused = comparison, block, dict(refused)
        self.images, self.places = comparison.pictures.at(block), comparison.pictures.places[block]
        self.last = block.stop == len(comparison.pictures.images)
        self.values: dict[Entry, list[Tensor]] = {}
        self.references: list[tuple[Tensor, dict[str, Function]]] = []  # maps on the first side, metrics against them

    def run(self) -> "_Block":
        step = one_pass_of(self.of.method)
        if self.of.versions is None or step is None:
            self._one_by_one()
        else:
            self._from_tapes(self.of.versions, step)
        if self.of.lines:
            self._add_floors()
        return self

    def _one_by_one(self) -> None:
        for number, side in enumerate(self.of.sides):
            given = self.images, side.targets[self.block], side.seed, self.places
            self._take(number, 0, lambda model: heat_of(self.of.method, model, *given))  # noqa: B023
            if self.last and side.role == "curve":
                self.of.tick()

    def _from_tapes(self, versions: Versions, step: OnePass) -> None:
        """A few images at a time: what lies below the changed weights runs once for them."""
        falling = versions.draws.cumulative and versions.draws.order == "top_down"
        for place, part in enumerate(chunks(len(self.images), self.images)):
            versions.at(0)
            with explaining(versions.own.model), explaining(versions.working.model):
                tape = Tape(versions.own.model, self.images[part], step, falling=falling)
                for number, side in enumerate(self.of.sides):
                    targets = side.targets[self.block][part]
                    self._take(
                        number,
                        place,
                        lambda model: saliency.heatmap(
                            tape.maps(model, versions.changed(number), targets),  # noqa: B023
                            signed=True,
                        ),
                    )
                    if self.last and part.stop == len(self.images):
                        self.of.tick()

    def _take(self, number: int, place: int, make: Callable[[nn.Module], Tensor]) -> None:
        """Make the maps of a side for the part of the images at this place, and compare them."""
        side = self.of.sides[number]
        if self.of.rows(side) in self.refused:
            return
        model = side.model()
        with self._noted(side):
            with refusing():
                maps = make(model)
            if self.of.versions is not None:
                self.of.versions.draw(number + 1)  # while a GPU works on the maps
            if number == 0:
                with _reporting(maps):
                    fixed = {label: similarity.against(metric, maps) for label, metric in self.of.metrics.items()}
                self.references.append((maps, fixed))
            if side.role:
                self._compare(side, place, maps)

    @contextmanager
    def _noted(self, side: Side) -> Iterator[None]:
        """A side that is refused is left out; the first is what all others are compared with."""
        try:
            yield
        except Refusal as refusal:
            if side is self.of.sides[0]:
                raise
            self.refused[self.of.rows(side)] = refusal

    def _compare(self, side: Side, place: int, maps: Tensor) -> None:
        with _reporting(maps):
            found = {label: metric(maps).detach() for label, metric in self.references[place][1].items()}
        for label, values in found.items():
            self.values.setdefault(self.of.rows(side, label), []).append(values)

    def _add_floors(self) -> None:
        first, seed, label = self.of.sides[0], self.of.seed, self.of.label
        own = torch.cat([maps for maps, _ in self.references])
        floors = {"noise": spectral_noise(own, seed=seed_of(seed, label, "noise"), indices=self.places)}
        if len(self.of.pictures.images) > 1:
            floors["other_image"] = self._maps_of_others(own)
        for scheme, maps in floors.items():
            side = replace(first, scheme=scheme, role="floor", stage=0, layer="")
            with self._noted(side):
                for place, part in enumerate(maps.split([len(maps) for maps, _ in self.references])):
                    self._compare(side, place, part)

    def _maps_of_others(self, own: Tensor) -> Tensor:
        """For each image the map of another of the call, drawn by its place."""
        first, pictures, draw = self.of.sides[0], self.of.pictures, partial(seed_of, self.of.seed, self.of.label)
        count = len(pictures.images)
        numbers = range(self.block.start, self.block.stop)
        others = [_other(i, count, draw("other_image", place)) for i, place in zip(numbers, self.places)]
        if len(own) == count:
            return own[others]
        places = [pictures.places[other] for other in others]
        return heat_of(self.of.method, first.model(), pictures.at(others), first.targets[others], first.seed, places)


def _other(image: int, count: int, draw: int) -> int:
    """Any image of the set but this one."""
    other = draw % (count - 1)
    return other + (other >= image)


def fixed(model: nn.Module) -> Callable[[], nn.Module]:
    """The model of a side whose weights stay as they are."""
    return lambda: model
