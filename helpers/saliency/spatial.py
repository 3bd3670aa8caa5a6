"""What a layer puts out, and where in the picture each number of it lies: found by trying, not by the layer's class."""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..device import generator

Reading = Callable[[Tensor], Tensor]  # the output of a layer, or its gradient, as (N, C, h, w)
MOST_EXTRA_TOKENS = 9  # a class token and eight registers; more than that only where they are seen to be no patches
_CHANNELS_FIRST = (0, 2, 1)
_ORDERS = ((0, 1, 2), _CHANNELS_FIRST, (1, 0, 2))  # of images, tokens and channels
_SPOILT = (
    math.nan,
    None,
)  # NaN goes every way, whatever the weights; where it goes everywhere, noise (None) shows more
CLEAR = 0.1  # a layer is taken as local where a change moves that far, as a fraction of the map's side


def watched(
    run: Callable[[Tensor], Tensor],
    images: Tensor,
    module: nn.Module,
    name: str,
    change: Callable[[Tensor], Tensor] = torch.clone,
) -> tuple[Tensor, Tensor]:
    """What `run` returns for the images, and the output of the module's last run: a leaf, passed on with a `change`.

    To be called inside `explaining(model)`. What is done in place after the layer does not reach the leaf. Runs on
    something else than the images, such as a second input that is held, count only where there are no others.

    Raises
    ------
    ValueError
        The layer does not run, or returns no float tensor.
    """
    kept: list[Tensor] = []
    follow = False  # the run that is kept follows the images

    def keep(_module, _inputs, output):
        nonlocal follow
        if not isinstance(output, Tensor) or not output.is_floating_point():
            got = output.dtype if isinstance(output, Tensor) else f"a {type(output).__name__}"
            raise ValueError(
                f"layer {name!r} returns {got}, not one float tensor: no map can be drawn from it; "
                "name a layer inside or after it with layer=."
            )
        if follow and not output.requires_grad:
            return output
        follow = output.requires_grad
        kept.append(output.detach().clone().requires_grad_())
        return change(kept[-1])

    hook = module.register_forward_hook(keep)
    try:
        result = run(images.detach().clone().requires_grad_().clone())
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


def reading(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, shape: Sequence[int], count: int
) -> Reading | None:
    """How to read outputs of this `shape`, of `count` images, as `(N, C, h, w)`, or None where that cannot be told.

    Height and width are the axes whose sizes have the ratio of the image's sides, channels first or last. Tokens
    `(N, T, C)`, `(T, N, C)` or `(N, C, T)` are patches, row by row, but for those that do not yet depend on the image
    where a module first reads T tokens: class and register tokens. Where sizes leave a choice, it falls on the reading
    under which a change in one half of the image stays in that half of the map; where the layer does not answer to the
    image at all, on channels first, or on the fewest tokens left out in front. A map that is seen to be turned or
    mirrored, and tokens that are seen not to lie row by row, cannot be read. To be called inside `explaining(model)`.
    """
    side = (images.shape[2], images.shape[3])
    if len(shape) == 3:
        return _token_reading(model, images, module, name, shape, count)
    if len(shape) != 4 or shape[0] != count or sorted(shape[1:])[1] == 1:
        return None
    grids: list[tuple[tuple[int, int], Reading]]
    grids = [((shape[2], shape[3]), _as_it_is), ((shape[1], shape[2]), _channels_last)]
    grids = [(grid, read) for grid, read in grids if max(grid) > 1]
    fitting = [read for grid, read in grids if _misfit(grid, side) < 1]
    inside = [read for grid, read in grids if grid[0] <= side[0] and grid[1] <= side[1] and read not in fitting]
    if len(fitting) == 1 and not inside:
        found: Reading | None = fitting[0]
    else:
        choices = [*fitting, *inside] or [read for _, read in grids]
        found = _most_local(model, images, module, name, choices)
        found = fitting[0] if found is None and len(fitting) == 1 else found
    return found if found and _is_upright(model, images, module, name, found) else None


def _token_reading(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, shape: Sequence[int], count: int
) -> Reading | None:
    """How to read tokens: in the order, and as the patches, of which the first module that reads them shows a map."""
    side = (images.shape[2], images.shape[3])
    orders = [order for order in _ORDERS if shape[order[0]] == count]
    fits = blurred = False
    for spoilt in _SPOILT:
        found: list[tuple[float, Reading]] = []
        for order in orders:
            changes = _first_changes(model, images, order, shape[order[1]], spoilt)
            patches = changes.any(0).nonzero()[:, 0].cpu()
            grid = _grid(len(patches), side)
            if grid:
                found.append((_moved(changes[:, None, patches].unflatten(2, grid)), _tokens(patches, grid, order)))
                blurred = blurred or bool((changes[:, patches] == changes[:1, patches]).all())  # as by attention
                fits = fits or order != _CHANNELS_FIRST
        if clear := _clearest(found, CLEAR / 2 if blurred else CLEAR):
            return clear
    if fits:
        return None
    choices = []
    for order in orders:
        if order != _CHANNELS_FIRST:
            tokens = shape[order[1]]
            extras = [(extra, _grid(tokens - extra, side)) for extra in range(MOST_EXTRA_TOKENS + 1)]
            choices += [_tokens(torch.arange(extra, tokens), grid, order) for extra, grid in extras if grid]
    return _most_local(model, images, module, name, choices) if choices else None


def _as_it_is(output: Tensor) -> Tensor:
    return output


def _channels_last(output: Tensor) -> Tensor:
    return output.permute(0, 3, 1, 2)


def _tokens(patches: Tensor, grid: tuple[int, int], order: tuple[int, int, int]) -> Reading:
    return lambda output: output.permute(order)[:, patches.to(output.device)].transpose(1, 2).unflatten(2, grid)


def _misfit(grid: tuple[int, int], side: tuple[int, int]) -> float:
    """By how many places a grid misses the ratio of the image's sides."""
    return abs(grid[0] * side[1] - grid[1] * side[0]) / max(side)


def _grid(places: int, side: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many places in the ratio of the image's sides; None if there are none, or one place."""
    grids = [(rows, places // rows) for rows in range(1, places + 1) if places % rows == 0]
    best = min(grids, key=lambda grid: _misfit(grid, side), default=(1, 1))
    return best if places > 1 and _misfit(best, side) < 1 else None


def _first_changes(
    model: nn.Module, images: Tensor, order: tuple[int, int, int], tokens: int, spoilt: float | None
) -> Tensor:
    """How far each token changes with each half of the image, `(4, tokens)`, where a module first reads so many."""
    first: list[Tensor] = []

    def look(_module, args, kwargs):
        for value in (*args, *kwargs.values()):
            if not first and isinstance(value, Tensor) and value.ndim == 3 and value.is_floating_point():
                if (value.shape[order[0]], value.shape[order[1]]) == (5, tokens):
                    first.append(value.detach().permute(order).clone())

    hooks = [module.register_forward_pre_hook(look, with_kwargs=True) for module in model.modules()]
    try:
        with torch.no_grad():
            model(_spoilt_by_half(images, spoilt))
    except Exception:
        if spoilt is None:  # a model need not run on NaN
            raise
    finally:
        for hook in hooks:
            hook.remove()
    return _changes(first[0]).amax(2) if first else torch.zeros(4, tokens)


def _spoilt_by_half(images: Tensor, value: float | None) -> Tensor:
    """The first image with the upper, lower, left and right half replaced by `value`, None for noise; and the image."""
    image, other = with_noise(images)
    halves = torch.zeros(4, 1, *image.shape[1:], dtype=torch.bool, device=image.device)
    rows, columns = (size // 2 for size in image.shape[1:])
    halves[0, :, :rows], halves[1, :, rows:] = True, True
    halves[2, ..., :columns], halves[3, ..., columns:] = True, True
    other = other if value is None else torch.full_like(other, value)
    return torch.cat([torch.where(halves, other, image), image[None]])


def _changes(seen: Tensor) -> Tensor:
    """What became of the fifth row in the four before it: 1 where it is NaN, and 0 for a difference of rounding."""
    changes = (seen[:4] - seen[4]).abs()
    changes = torch.where(changes <= rounding(seen[4:]), 0, changes)
    return torch.where(changes.isnan(), 1.0, changes)


def rounding(values: Tensor) -> Tensor:
    """Differences up to this size are rounding."""
    return 16 * torch.finfo(values.dtype).eps * values.abs().amax()


def _seen_by_half(model: nn.Module, images: Tensor, module: nn.Module, name: str, spoilt: float | None) -> list[Tensor]:
    """The layer's outputs of five images, in one piece or, where the model takes them one by one, in five."""
    batch = _spoilt_by_half(images, spoilt)
    output = watched(model, batch, module, name)[1].detach()
    if 5 in output.shape[:2]:
        return [output]
    return [watched(model, one[None], module, name)[1].detach() for one in batch]


def _most_local(
    model: nn.Module, images: Tensor, module: nn.Module, name: str, choices: list[Reading]
) -> Reading | None:
    """The reading under which a change in one half of the image stays most clearly in that half of the map."""
    answers = False
    for spoilt in _SPOILT:
        try:
            outputs = _seen_by_half(model, images, module, name, spoilt)
        except Exception:
            if spoilt is None:
                raise
            continue  # a model need not run on NaN
        changes = [_changes(torch.cat([read(output) for output in outputs])) for read in choices]
        if clear := _clearest([(_moved(change), read) for change, read in zip(changes, choices)]):
            return clear
        answers = any(bool(change.any()) for change in changes)
    return None if answers else choices[0]


def _clearest(found: list[tuple[float, Reading]], enough: float = CLEAR) -> Reading | None:
    """The reading under which changes move at least so far, if they do so under one alone."""
    best = max((moved for moved, _ in found), default=0.0)
    clear = [read for moved, read in found if moved > max(enough, best / 2)]
    return clear[0] if len(clear) == 1 else None


def _is_upright(model: nn.Module, images: Tensor, module: nn.Module, name: str, read: Reading) -> bool:
    """Whether no half of the map is seen to show another half of the image than its own."""
    try:
        outputs = _seen_by_half(model, images, module, name, math.nan)
    except Exception:  # a model need not run on NaN
        return True
    changes = _changes(torch.cat([read(output) for output in outputs]))
    straight = _moves(changes)
    across = [abs(move) for move in _moves(changes[[2, 3, 0, 1]])]
    return min(straight) > -CLEAR and (min(straight) > CLEAR or max(across) < CLEAR)


def _moved(changes: Tensor) -> float:
    """How far the centre of the changes moves from the map of the upper half to that of the lower, and left to right.

    The lesser of the two, as a fraction of the map's side: about a half where a layer is local, 0 for channels.
    """
    return min(_moves(changes))


def _moves(changes: Tensor) -> list[float]:
    """The move along the rows from the first to the second of four, and along the columns from the third to the last.

    An axis of one place has none.
    """
    moves = []
    for first, axis in ((0, 2), (2, 3)):
        if changes.shape[axis] > 1:
            profile = changes[first : first + 2].sum([other for other in (1, 2, 3) if other != axis]).double()
            centre = (profile * torch.linspace(0, 1, changes.shape[axis]).to(profile)).sum(1) / profile.sum(1)
            moves.append((centre[1] - centre[0]).nan_to_num(0.0).item())
    return moves
