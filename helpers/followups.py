"""Variants of the randomisation test from the literature that followed it."""

from collections.abc import Callable, Iterable, Mapping, Sequence

import pandas as pd
import torch
from torch import Tensor, nn

from . import randomization, saliency, similarity
from .checks import check_input, check_model
from .device import generator, seed_of
from .saliency.passes import class_count, differentiates, places
from .sanity import Rows, draws_noise, heat_of, named, takes

PER_CALL = 64  # noisy copies that a method is given at a time: small networks are slow on few images


def random_logit(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    metrics: Sequence | Mapping,
    seeds: Iterable[int] = range(5),
) -> pd.DataFrame:
    """Compare the maps of the target class with those of another class of the same model; Sixt et al. (2020).

    Every seed draws another class for each image. A map that stays the same does not explain the class. Returns the
    tidy frame of `sanity.parameter_randomization`, scheme `random_logit`, stage 0.
    """
    methods = named(methods, saliency.get, "methods")
    rows = Rows(named(metrics, similarity.get, "metrics"))
    check_input(images, targets)
    check_model(model, images, differentiable=any(map(differentiates, methods.values())))
    classes = class_count(model, images[:1])
    if classes < 2:
        raise ValueError("the model has one class only: there is no other logit to explain.")
    for seed in seeds:
        shift = [1 + seed_of(seed, "random_logit", image) % (classes - 1) for image in range(len(targets))]
        others = (targets + torch.tensor(shift).to(targets)) % classes
        for label, method in methods.items():
            metric = rows.against(heat_of(method, model, images, targets, seed_of(seed, label)))
            other = heat_of(method, model, images, others, seed_of(seed, label, "random_logit"))
            rows.add("curve", "random_logit", seed, 0, "", label, metric, other)
    return rows.frame()


def denoised(method: str | Callable, *, samples: int = 50, sigma: float = 0.15) -> Callable[..., Tensor]:
    """A method whose maps are means over noisy copies of the input: the maps that sMPRT compares.

    `sigma` is a share of max - min of each image. The result takes a `seed`, so that the tests of `sanity` give it
    fresh noise at every stage, and `indices` as `smoothgrad` does; a method that itself draws noise and knows no
    `indices` draws over the whole batch. Hedström et al. (2024).
    """
    base = saliency.get(method)
    if samples < 1 or sigma < 0:
        raise ValueError(f"samples must be at least 1 and sigma not negative, got {samples} and {sigma}.")

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
    if bins < 2:
        raise ValueError(f"at least two bins are needed, got {bins}.")
    flat = maps.flatten(1).double()
    low, high = flat.amin(1, keepdim=True), flat.amax(1, keepdim=True)
    place = ((flat - low) / (high - low) * bins).nan_to_num(0).long().clamp(max=bins - 1)
    counts = torch.zeros(len(flat), bins, dtype=torch.float64, device=flat.device)
    counts.scatter_add_(1, place, torch.ones_like(flat))
    return torch.special.entr(counts / flat.shape[1]).sum(1)


def complexity_rise(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    methods: Sequence | Mapping,
    seeds: Iterable[int] = range(5),
    bins: int = 100,
    **options,
) -> pd.DataFrame:
    """eMPRT: by how much maps become more complex when all weights are random, (H(random) - H(trained)) / H(trained).

    Entropy H as in `complexity`; `options` are those of `randomization.cascading`. Returns a frame with the columns
    `seed method image rise`; the rise is NaN where the trained map is constant. Hedström et al. (2024).
    """
    methods = named(methods, saliency.get, "methods")
    randomization.check_options(options, besides=["seeds", "bins"])
    check_input(images, targets)
    check_model(model, images, differentiable=any(map(differentiates, methods.values())))
    frames = []
    for seed in seeds:
        draws = randomization.Redraws(model, scheme="cascading", seed=seed, **{"example": images[:1], **options})
        *_, last = draws.shared_copies()
        for label, method in methods.items():
            before, after = (
                complexity(heat_of(method, m, images, targets, seed_of(seed, label, stage)), bins=bins)
                for stage, m in (("", model), (last.name, last.model))
            )
            rise = ((after - before) / before.masked_fill(before == 0, torch.nan)).cpu().numpy()
            frames.append(pd.DataFrame({"seed": seed, "method": label, "image": range(len(rise)), "rise": rise}))
    return pd.concat(frames, ignore_index=True)
