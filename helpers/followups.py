"""Variants of the randomisation test from the literature that followed it."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Integral, Real

import pandas as pd
import torch
from torch import Tensor, nn

from . import randomization, saliency, similarity
from .checks import check_example, check_input, check_maps, check_model
from .comparing import Comparison, Pictures, Side, fixed
from .device import generator, seed_of
from .heatmaps import Refusal, different_places, draws_noise, heat_of, named, refusing, replicates, takes
from .inference import random_state_kept
from .rows import NOWHERE
from .runs import Run
from .saliency.passes import at_most, checked, class_count, differentiates, explains, places
from .versions import Versions

PER_CALL = 64  # noisy copies that a method is given at a time: small networks are slow on few images


@random_state_kept()
def random_logit(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    seeds: int | Iterable[int] = range(5),
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
) -> pd.DataFrame:
    """Compare the maps of the target class with those of another class of the same model; Sixt et al. (2020).

    Every seed draws another class for each image. A map that stays the same does not explain the class. Returns the
    tidy frame of `sanity.parameter_randomization`, scheme `random_logit`, stage 0; `seeds`, `batch_size`, `indices`
    and what becomes of refusals are as there.

    Raises
    ------
    ValueError
        The model has one class only, or every method refuses it.
    """
    methods = named(methods, saliency.get, "methods")
    metrics = named(metrics, similarity.get, "metrics")
    seeds = replicates(seeds)
    check_input(images, targets)
    check_model(model, images, differentiable=any(map(differentiates, methods.values())))
    pictures = Pictures(images, different_places(indices, images))
    classes = class_count(model, images[:1])
    if classes < 2:
        raise ValueError("the model has one class only: there is no other logit to explain.")
    with at_most(batch_size), checked(), Run(len(seeds) * len(methods), pictures.places, show=False) as run:
        for seed in seeds:
            shift = [1 + seed_of(seed, "random_logit", place) % (classes - 1) for place in pictures.places]
            others = (targets + torch.tensor(shift).to(targets)) % classes
            for label, method in methods.items():
                own = Side(fixed(model), targets, seed_of(seed, label))
                draw = seed_of(seed, label, "random_logit")
                other = Side(fixed(model), others, draw, "random_logit", "curve")
                run.add(Comparison(method, label, seed, pictures, metrics, [own, other]), other, steps=1)
            run.check()
    return run.frame()


def denoised(method: str | Callable, *, samples: int = 50, sigma: float = 0.15) -> Callable[..., Tensor]:
    """A method whose maps are means over noisy copies of the input: the maps that sMPRT compares.

    `sigma` is a share of max - min of each image. The result takes a `seed`, so that the tests of `sanity` give it
    fresh noise at every stage, and `indices` and `batch_size` as `smoothgrad` does; a method that itself draws noise
    and knows no `indices` draws over the whole batch. Hedström et al. (2024).
    """
    base = saliency.get(method)
    if isinstance(samples, bool) or not isinstance(samples, Integral) or samples < 1:
        raise ValueError(f"samples must be at least 1 and sigma not negative, got {samples!r} samples.")
    if isinstance(sigma, bool) or not isinstance(sigma, Real) or not 0 <= sigma < math.inf:
        raise ValueError(f"samples must be at least 1 and sigma not negative, got sigma={sigma!r}.")

    @explains
    def mean_map(
        model: nn.Module, images: Tensor, targets: Tensor, *, seed: int = 0, indices: Sequence[int] | None = None
    ) -> Tensor:
        whole = places(indices, images)
        options: dict[str, int | list[int]] = {}

        def noise(copy: int) -> Tensor:
            drawn = [torch.randn(images.shape[1:], generator=generator(seed_of(seed, at, copy))) for at in whole]
            return torch.stack(drawn).to(images)

        width = sigma * (images.amax((1, 2, 3), keepdim=True) - images.amin((1, 2, 3), keepdim=True))
        total, together = torch.zeros((), device=images.device), max(1, PER_CALL // len(images))
        for done in range(0, samples, together):
            count = min(together, samples - done)
            copies = range(done, done + count)
            if draws_noise(base):
                options["seed"] = seed_of(seed, "base", *([] if takes(base, "indices") else [done]))
            if takes(base, "indices"):
                options["indices"] = [at * samples + copy for copy in copies for at in whole]
            noisy = torch.cat([images + width * noise(copy) for copy in copies])
            maps = base(model, noisy, targets.repeat(count), **options)
            total = total + maps.unflatten(0, (count, -1)).sum(0)
        return total / samples

    mean_map.__name__ = f"denoised_{getattr(base, '__name__', 'method')}"
    return mean_map


def complexity(maps: Tensor, *, bins: int = 100) -> Tensor:
    """Entropy in nats of the histogram of each map's pixels, `(N, H, W)` -> `(N,)`; 0 for a constant map.

    `bins` equal bins from the smallest to the largest pixel of the map. Hedström et al. (2024).
    """
    if isinstance(bins, bool) or not isinstance(bins, Integral) or bins < 2:
        raise ValueError(f"at least two bins are needed, got {bins!r}.")
    check_maps(maps)
    flat = maps.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    place = ((flat - low) / (high - low) * bins).nan_to_num(0).long().clamp(max=bins - 1)
    counts = torch.zeros(len(flat), bins, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(1, place, torch.ones_like(flat))
    return torch.special.entr(counts / flat.shape[1]).sum(1)


@random_state_kept()
def complexity_rise(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    seeds: int | Iterable[int] = range(5),
    bins: int = 100,
    batch_size: int | None = None,
    indices: Sequence[int] | None = None,
    **options,
) -> pd.DataFrame:
    """eMPRT: by how much maps become more complex when all weights are random, (H(random) - H(trained)) / H(trained).

    Entropy H as in `complexity`; `options` are those of `randomization.cascading`, `seeds`, `batch_size` and `indices`
    those of `sanity.parameter_randomization`. Returns a frame with the columns `seed method image rise note`; the rise
    is NaN where the trained map is constant. A method that refuses has one row, image -1, whose note says why.
    Hedström et al. (2024).

    Raises
    ------
    ValueError
        An unknown name, an option that does not fit, or a model that every method refuses.
    """
    methods = named(methods, saliency.get, "methods")
    seeds = replicates(seeds)
    check_input(images, targets)
    check_model(model, images, differentiable=any(map(differentiates, methods.values())))
    randomization.check_options(options, besides=["seeds", "bins", "batch_size", "indices"])
    check_example(model, options.get("example"))
    whole, frames = different_places(indices, images), []
    draws = randomization.Redraws(model, scheme="cascading", seed=seeds[0], **{"example": images[:1], **options})
    versions = Versions(draws)
    with at_most(batch_size), checked():
        for seed in seeds:
            versions.begin(seed)
            last = len(versions) - 1
            networks = ("", model), (versions.names[last], versions.at(last))
            for label, method in methods.items():
                try:
                    with refusing():
                        maps = [
                            heat_of(method, m, images, targets, seed_of(seed, label, s), whole) for s, m in networks
                        ]
                        before, after = (complexity(heat, bins=bins) for heat in maps)
                except Refusal as refusal:
                    about = {"image": [NOWHERE], "rise": math.nan, "note": str(refusal)}
                else:
                    rise = (after - before) / before.masked_fill(before == 0, torch.nan)
                    about = {"image": whole, "rise": rise.cpu().numpy(), "note": ""}
                frames.append(pd.DataFrame({"seed": seed, "method": label, **about}))
    frame = pd.concat(frames, ignore_index=True)
    if (frame.note != "").all():
        raise ValueError(f"no method can explain this model. {'; '.join(frame.method + ': ' + frame.note)}")
    return frame
