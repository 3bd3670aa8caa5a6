"""What a layer puts out, and where in the picture each number of it lies: found by trying, not by the layer's class."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..device import generator

Reading = Callable[[Tensor], Tensor]  # the output of a layer, or its gradient, as (N, C, h, w)
MOST_EXTRA_TOKENS = 9  # a class token and eight registers; more than that only where they are seen to be no patches
CLEAR = 0.1  # a layer is taken as local where a change moves that far, as a fraction of the map's side


def watched(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    module: nn.Module,
    name: str,
    change: Callable[[Tensor], Tensor] = torch.clone,
) -> tuple[Tensor, Tensor]:
    """What `run` returns for the images, and the output of the module's last run: a leaf, passed on with a `change`.

    To be called inside `explaining(model)`. What is done in place after the layer does not reach the leaf.

    Raises
    ------
    ValueError
        The layer does not run, or returns no float tensor.
    """
    kept: list[Tensor] = []

    def keep(_module, _inputs, output):
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"layer {name!r} returns {got}, not one float tensor: no map can be drawn from it; "
                "name a layer inside or after it with layer=."
            )
        kept.append(output.detach().clone().requires_grad_())
        return change(kept[-1])

    hook = module.register_forward_hook(keep)
    try:
        result = run(images.detach().clone())
    finally:
        hook.remove()
    if not kept:
        raise ValueError(f"layer {name!r} does not run in this model.")
    return result, kept[-1]


def with_noise(images: Tensor) -> Tensor:
    """The first image and one of noise in its range, `(2, C, H, W)`: two that have nothing in common."""
    image = images[:1].detach().clone()
    low, high = image.aminmax()
    noise = torch.rand(image.shape, generator=generator(0), dtype=torch.float64).to(image)
    return torch.cat([image, low + noise * (high - low if high > low else 1)])


def reading(model: nn.Module, images: Tensor, module: nn.Module, name: str, shape: Sequence[int]) -> Reading | None:
    """How to read outputs of this `shape` as `(N, C, h, w)`, or None where that cannot be told.

    Height and width are the axes whose sizes have the ratio of the image's sides, channels first or last. Tokens
    `(N, T, C)` are patches, row by row, but for those that do not yet depend on the image where T tokens are first
    read by a module: class and register tokens. Where sizes leave a choice, it falls on the reading under which a
    change in one half of the image stays in that half of the map; where the layer does not answer to the image at
    all, on channels first, or on the fewest tokens left out in front. To be called inside `explaining(model)`.
    """
    side = (images.shape[2], images.shape[3])
    if len(shape) == 4 and sorted(shape[1:])[1] > 1:
        grids: list[tuple[tuple[int, int], Reading]]
        grids = [((shape[2], shape[3]), _as_it_is), ((shape[1], shape[2]), _channels_last)]
        grids = [(grid, read) for grid, read in grids if max(grid) > 1]
        fitting = [read for grid, read in grids if _misfit(grid, side) < 1]
        inside = [read for grid, read in grids if grid[0] <= side[0] and grid[1] <= side[1] and read not in fitting]
        if len(fitting) == 1 and not inside:
            return fitting[0]
        choices = [*fitting, *inside] or [read for _, read in grids]
        found = _most_local(model, images, module, name, choices)
        return fitting[0] if found is None and len(fitting) == 1 else found
    if len(shape) != 3:
        return None
    patches = _patches(model, images, shape[1])
    grid = _grid(len(patches), side)
    if grid:
        return _tokens(patches, grid)
    extras = [(extra, _grid(shape[1] - extra, side)) for extra in range(MOST_EXTRA_TOKENS + 1)]
    choices = [_tokens(torch.arange(extra, shape[1]), grid) for extra, grid in extras if grid]
    return _most_local(model, images, module, name, choices) if choices else None


def _as_it_is(output: Tensor) -> Tensor:
    return output


def _channels_last(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


def _tokens(patches: Tensor, grid: tuple[int, int]) -> Reading:
    return lambda output: output[:, patches.to(output.device)].transpose(1, 2).unflatten(2, grid)


def _misfit(grid: tuple[int, int], side: tuple[int, int]) -> float:
    """By how many places a grid misses the ratio of the image's sides."""
    return abs(grid[0] * side[1] - grid[1] * side[0]) / max(side)


def _grid(places: int, side: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many places in the ratio of the image's sides; None if there are none, or one place."""
    grids = [(rows, places // rows) for rows in range(1, places + 1) if places % rows == 0]
    best = min(grids, key=lambda grid: _misfit(grid, side), default=(1, 1))
    return best if places > 1 and _misfit(best, side) < 1 else None


def _patches(model: nn.Module, images: Tensor, tokens: int) -> Tensor:
    """Places of the tokens that depend on the image where a module first reads so many of them."""
    pair = with_noise(images)
    for other in (pair[1:], torch.full_like(pair[1:], torch.nan)):  # NaN gets through where weights are zero
        first: list[Tensor] = []

        def look(_module, args, kwargs, first=first):
            for value in (*args, *kwargs.values()):
                if not first and isinstance(value, Tensor) and value.ndim == 3 and value.shape[:2] == (2, tokens):
                    first.append(value.detach().clone())

        hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in model.modules()]
        try:
            with torch.no_grad():
                model(torch.cat([pair[:1], other]))
        finally:
            for hook in hooks:
                hook.remove()
        if not first:
            break
        same = (first[0][0] - first[0][1]).abs().amax(1) <= rounding(first[0][0])
        if not same.all():
            return (~same).nonzero()[:, 0].cpu()
    return torch.arange(0)


def rounding(values: Tensor) -> Tensor:
    """Differences up to this size are rounding."""
    return 16 * torch.finfo(values.dtype).eps * values.abs().amax()


def _most_local(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, choices: list[Reading]
) -> Reading | None:
    """The reading under which a change in one half of the image stays most clearly in that half of the map."""
    image, other = with_noise(images)
    halves = torch.zeros(4, 1, *image.shape[1:], dtype=torch.bool, device=image.device)
    rows, columns = (size // 2 for size in image.shape[1:])
    halves[0, :, :rows], halves[1, :, rows:] = True, True
    halves[2, ..., :columns], halves[3, ..., columns:] = True, True
    with torch.no_grad():
        output = watched(model, torch.cat([torch.where(halves, other, image), image[None]]), module, name)[1].detach()
    changes = (output[:4] - output[4]).abs()
    if not (changes.flatten(1).amax(1) > rounding(output)).any():
        return choices[0]
    moved = [_moved(read(changes)) for read in choices]
    best = max(moved)
    rivals = [value for value in moved if value > best / 2]
    return choices[moved.index(best)] if best > CLEAR and len(rivals) == 1 else None


def _moved(changes: Tensor) -> float:
    """How far the centre of the changes moves from the map of the upper half to that of the lower, and left to right.

    The lesser of the two, as a fraction of the map's side: about a half where a layer is local, 0 for channels.
    """
    moves = []
    for first, axis in ((0, 2), (2, 3)):
        if changes.shape[axis] > 1:
            profile = changes[first : first + 2].sum([other for other in (1, 2, 3) if other != axis]).double()
            centre = (profile * torch.linspace(0, 1, changes.shape[axis]).to(profile)).sum(1) / profile.sum(1)
            moves.append((centre[1] - centre[0]).nan_to_num(0.0).item())
    return min(moves)
