"""Asking methods by name for signed heatmaps, and hearing why they refuse."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from inspect import Parameter, signature
from operator import index

import torch
from torch import Tensor, nn

from . import saliency
from .device import generator, seed_of, whole
from .saliency.passes import places

Function = Callable[..., Tensor]
ASKED = ("model", "images", "targets")


class Refusal(ValueError):
    """A method cannot explain a model, or gives maps that cannot be compared; the message says why."""


@contextmanager
def refusing() -> Iterator[None]:
    """A `ValueError` of the block is the refusal of the method that runs in it."""
    try:
        yield
    except ValueError as error:
        raise Refusal(str(error)) from error


def named(chosen, get: Callable, kind: str) -> dict[str, Function]:
    """Methods or metrics by label, from a mapping or a sequence of keys and callables."""
    if isinstance(chosen, str) or callable(chosen):
        chosen = [chosen]
    if not isinstance(chosen, Iterable):
        raise ValueError(f"{kind} must be names or functions, in a list or a dict, got {type(chosen).__name__}.")
    if isinstance(chosen, Mapping):
        named = {label: get(function) for label, function in chosen.items()}
    else:
        labels = [_label(item) for item in chosen]
        if len(set(labels)) < len(labels):
            raise ValueError(f"two {kind} have the same name in {labels}; pass a dict to name them.")
        named = {label: get(item) for label, item in zip(labels, chosen)}
    if not named:
        raise ValueError(f"no {kind} given.")
    return named


def _label(item) -> str:
    """A key, a function's name, or that of a partial with its options: the same in every run."""
    if isinstance(item, str):
        return item
    if isinstance(item, partial):
        options = [*map(_shown, item.args), *(f"{key}={_shown(value)}" for key, value in item.keywords.items())]
        return f"{_label(item.func)}({', '.join(options)})" if options else _label(item.func)
    return getattr(item, "__name__", type(item).__name__)


def _shown(value) -> str:
    if isinstance(value, Tensor):
        return f"tensor {tuple(value.shape)}"
    return _label(value) if callable(value) else repr(value)


def replicates(seeds: int | Iterable[int]) -> list[int]:
    """The seeds; a number n stands for 0, 1, ..., n - 1."""
    if isinstance(seeds, (str, bytes, bool)) or not (isinstance(seeds, Iterable) or hasattr(seeds, "__index__")):
        raise ValueError(f"seeds must be a number of replicates or a list of seeds, got {seeds!r}.")
    found = [whole(seed) for seed in seeds] if isinstance(seeds, Iterable) else list(range(index(seeds)))
    if not found:
        raise ValueError("at least one seed is needed.")
    if len(set(found)) < len(found):
        raise ValueError(f"seeds must be replicates, each once, got {found}.")
    return found


def different_places(indices: Sequence[int] | None, images: Tensor) -> list[int]:
    """The images' places in the whole set; raises where two have the same."""
    found = places(indices, images)
    if len(set(found)) < len(found):
        raise ValueError("indices must be the images' places in the whole set, each once.")
    return found


def takes(method: Function, option: str) -> bool:
    """Whether the method has this option and the caller has not fixed it."""
    fixed = method.keywords if isinstance(method, partial) else {}
    return option in signature(method).parameters and option not in fixed


def draws_noise(method: Function) -> bool:
    """Whether the method takes a `seed` that the caller has not fixed."""
    return takes(method, "seed")


def heat_of(
    method: Function,
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    seed: int,
    indices: Sequence[int] | None = None,
) -> Tensor:
    """Signed heatmaps `(N, H, W)` of a method, which draws its noise, if any, from `seed` and the images' places.

    `indices` are the places in the whole set, None counts from 0.

    Raises
    ------
    ValueError
        The method needs an option that has no default, or refuses the model or the images.
    """
    given = {"seed": seed, "indices": list(range(len(images)) if indices is None else indices)}
    options = {option: value for option, value in given.items() if takes(method, option)}
    if missing := _missing(method, options):
        name, first = _label(method), missing[0]
        raise ValueError(
            f"{name} needs {', '.join(f'{option}=' for option in missing)}: "
            f"give functools.partial(saliency.{name}, {first}=...) as the method."
        )
    return saliency.heatmap(saliency.made_by(method, method(model, images, targets, **options), images), signed=True)


def _missing(method: Function, given: Iterable[str]) -> list[str]:
    """Options without a default that nobody has given."""
    return [
        name
        for name, parameter in signature(method).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and parameter.default is Parameter.empty and name not in given
    ]


def spectral_noise(maps: Tensor, *, seed: int, indices: Sequence[int] | None = None) -> Tensor:
    """Noise `(N, H, W)` with the power spectrum of each map: its Fourier phases are those of white noise.

    As smooth or as coarse as the maps themselves, and about nothing. A map's phases follow from `seed` and its place
    in the whole set, by `indices`; None counts from 0.
    """
    if not isinstance(maps, Tensor) or maps.ndim != 3 or not len(maps) or not maps.is_floating_point():
        got = tuple(maps.shape) if isinstance(maps, Tensor) else type(maps).__name__
        raise ValueError(f"maps must be a float tensor (N, H, W), got {got}.")
    numbers = range(len(maps)) if indices is None else indices
    maps = maps if maps.dtype == torch.float64 else maps.float()  # there is no transform of half precision
    drawn = [torch.randn(maps.shape[1:], generator=generator(seed_of(seed, place))) for place in numbers]
    white = torch.fft.rfft2(torch.stack(drawn).to(maps))
    return torch.fft.irfft2(torch.fft.rfft2(maps).abs() * torch.sgn(white), s=maps.shape[-2:])
