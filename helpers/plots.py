"""Figures from arrays and frames. Every function returns a `Figure` and shows nothing by itself.

Labels that are names of methods are shown as their titles, `saliency.title`.
"""

import textwrap
from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import TYPE_CHECKING, Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from scipy import stats
from torch import Tensor

from .rows import check_frame
from .saliency import title

if TYPE_CHECKING:
    from matplotlib.typing import RcKeyType

STYLE: "dict[RcKeyType, Any]" = {
    "font.size": 11,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "figure.dpi": 150,
}
SIGNED, UNSIGNED = "PuOr_r", "cividis"  # both safe for colour-blind readers
LINES: dict[str, tuple[str, str, Any]] = {
    "other_image": ("floor: another image", "0.45", ":"),
    "noise": ("floor: noise of the same spectrum", "0.65", "-."),
    "retest": ("ceiling: the same method again", "0.25", (0, (5, 2))),
    "twin": ("ceiling: a twin network", "tab:orange", "--"),
    "mirror": ("ceiling: the mirrored picture", "tab:green", "--"),
}


def picture(image: Tensor) -> np.ndarray:
    """An image `(C, H, W)` in [0, 1] as an array that matplotlib shows, `(H, W)` or `(H, W, 3)`."""
    pixels = _array(image, "an image", "CHW")
    if len(pixels) not in (1, 3):
        raise ValueError(f"an image must have 1 or 3 channels to be shown, got {len(pixels)}.")
    return pixels[0].clip(0, 1) if len(pixels) == 1 else pixels.clip(0, 1).transpose(1, 2, 0)


def _array(values: Tensor, what: str, axes: str) -> np.ndarray:
    """The values as an array that can be drawn; raises where these are not their axes."""
    if not isinstance(values, Tensor) or values.ndim != len(axes) or 0 in values.shape or values.is_complex():
        got = tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"{what} must be a tensor ({', '.join(axes)}), got {got}.")
    values = values.detach().cpu()
    return (values.float() if values.is_floating_point() and values.element_size() < 4 else values).numpy()


def _several(what: str, given: Mapping) -> None:
    if not isinstance(given, Mapping) or not given:
        raise ValueError(f"{what} must be a dictionary, from labels to what is shown, with one entry or more.")


def _check_across(across: int) -> None:
    if isinstance(across, bool) or not isinstance(across, Integral) or across < 1:
        raise ValueError(f"across must be a whole number of panels, at least 1, got {across!r}.")


def _check_scale(clip: float, scale: str = "map") -> None:
    if scale not in ("map", "row"):
        raise ValueError(f"scale must be 'map' or 'row', got {scale!r}.")
    if not 0 <= clip <= 1:
        raise ValueError(f"clip is a quantile, in [0, 1], got {clip!r}.")


def maps(
    rows: Mapping[str, Tensor],
    columns: Sequence[str],
    *,
    signed: bool,
    images: Tensor | None = None,
    scale: str = "map",
    clip: float = 0.99,
) -> Figure:
    """A grid of heatmaps: one row a label, one column a name.

    Parameters
    ----------
    rows : label -> maps `(len(columns), H, W)`.
    signed : orange and purple around white for signed maps, else dark to bright.
    images : `(rows, C, H, W)` in [0, 1] shown in a first column of their own.
    scale, clip : full colour is reached at this quantile of |values|, of each `"map"` or of the whole `"row"`.

    Raises
    ------
    ValueError
        Nothing to show, or what is to be shown has other axes, or another number of columns or images.
    """
    _several("rows", rows)
    _check_scale(clip, scale)
    arrays = [_array(row, f"the maps {label!r}", "NHW") for label, row in rows.items()]
    for label, row in zip(rows, arrays):
        if len(row) != len(columns):
            raise ValueError(f"the row {label!r} has {len(row)} maps for {len(columns)} columns.")
    if images is not None and len(images) != len(rows):
        raise ValueError(f"one image a row is needed: {len(rows)} rows and {len(images)} images.")
    extra = 0 if images is None else 1
    wide = len(columns) + extra
    side = min(1.6, 5.0 / wide)
    names = [title(label).replace(" ", "\n") for label in rows]
    labels = 0.09 * max(len(line) for name in names for line in name.split("\n"))  # inches
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            len(rows),
            wide,
            figsize=(side * wide + labels, side * len(rows) + 0.3),
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat:
            axis.set(xticks=[], yticks=[])
            axis.spines[:].set_visible(False)
        for r, (label, row) in enumerate(zip(names, arrays)):
            axes[r, 0].set_ylabel(label, rotation=0, ha="right", va="center")
            if images is not None:
                axes[r, 0].imshow(picture(images[r]), cmap="gray", vmin=0, vmax=1)
            for c, values in enumerate(row):
                _show(axes[r, c + extra], values, signed, row if scale == "row" else values, clip)
        for axis, name in zip(axes[0], [*(["image"] * extra), *columns]):
            axis.set_title(_heading(name, side), fontsize=11)
    plt.close(figure)
    return figure


def _heading(name: str, inches: float) -> str:
    """The title of a picture, on as many lines as its width asks for."""
    return "\n".join(textwrap.fill(line, int(inches / 0.085)) for line in title(name).split("\n"))


def _limit(scale: np.ndarray, clip: float) -> float:
    return np.quantile(np.abs(scale), clip) or np.abs(scale).max() or 1.0


def _show(axis: Axes, values: np.ndarray, signed: bool, scale: np.ndarray, clip: float) -> None:
    limit = _limit(scale, clip)
    axis.imshow(values, cmap=SIGNED if signed else UNSIGNED, vmin=-limit if signed else 0, vmax=limit)


def colours(maps: Tensor, *, signed: bool, clip: float = 0.99, levels: int = 32) -> np.ndarray:
    """Maps `(..., H, W)` in the colours of `maps`, each at its own scale: bytes `(..., H, W, 3)`.

    Parameters
    ----------
    levels : different colours at most; few make a small picture.

    Raises
    ------
    ValueError
        NaN or infinite values, or no maps.
    """
    _check_scale(clip)
    if not isinstance(levels, Integral) or levels < 2:
        raise ValueError(f"levels must be a whole number of colours, at least 2, got {levels!r}.")
    axes = "N" * (maps.ndim - 2) + "HW" if isinstance(maps, Tensor) else "NHW"
    array = _array(maps, "maps", axes)
    if not np.isfinite(array).all():
        raise ValueError("the maps hold NaN or infinite values.")
    table = (plt.get_cmap(SIGNED if signed else UNSIGNED, levels)(range(levels))[:, :3] * 255).round().astype(np.uint8)
    flat = array.reshape(-1, *array.shape[-2:])
    scaled = np.stack([values / _limit(values, clip) for values in flat]).reshape(array.shape)
    place = (scaled + 1) / 2 if signed else np.abs(scaled)
    return table[(place * levels).astype(int).clip(0, levels - 1)]


def gallery(
    pictures: Mapping[str, Tensor],
    *,
    signed: bool,
    image: Tensor | None = None,
    across: int = 3,
    clip: float = 0.99,
) -> Figure:
    """Named heatmaps `(H, W)`, each at its own scale, `across` to a line; `image` `(C, H, W)` comes first."""
    _several("pictures", pictures)
    _check_across(across)
    _check_scale(clip)
    arrays = {name: _array(values, f"the map {name!r}", "HW") for name, values in pictures.items()}
    count = len(pictures) + (image is not None)
    down = -(-count // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            down, across, figsize=(5.4, (5.4 / across + 0.3) * down), squeeze=False, layout="constrained"
        )
        for axis in axes.flat:
            axis.set_axis_off()
        free = iter(axes.flat)
        if image is not None:
            axis = next(free)
            axis.imshow(picture(image), cmap="gray", vmin=0, vmax=1)
            axis.set_title("image", fontsize=11)
        for axis, (name, array) in zip(free, arrays.items()):
            _show(axis, array, signed, array, clip)
            axis.set_title(_heading(name, 5.4 / across), fontsize=11)
    plt.close(figure)
    return figure


def interval(values: pd.Series) -> float:
    """Half-width of the 95 % t interval of a mean; NaN for fewer than two values."""
    return stats.t.ppf(0.975, len(values) - 1) * stats.sem(values) if len(values) > 1 else np.nan


def curves(frame: pd.DataFrame, metric: str, *, methods: Sequence[str] | None = None, across: int = 2) -> Figure:
    """Similarity to the trained model's map, stage by stage, one panel a method.

    Mean over images, then over seeds, with the 95 % t interval over seeds. The reference lines of the frame
    are drawn where they are: floors and ceilings are those of the method in the panel. Rows of role `refused`,
    of methods that could not explain the model, are left out.

    Raises
    ------
    ValueError
        The frame has no row of the metric, or of one of the methods.
    """
    check_frame(frame)
    _check_across(across)
    methods = [methods] if isinstance(methods, str) else methods
    frame = frame[frame.role != "refused"]
    if metric not in set(frame.metric):
        raise ValueError(f"the frame has no row of metric {metric!r}; it has: {', '.join(frame.metric.unique())}.")
    frame = frame[frame.metric == metric]
    known = list(frame.method.unique())
    methods = list(known if methods is None else methods) or known
    missing = [method for method in methods if method not in known]
    if missing:
        raise ValueError(
            f"no rows of {metric} to draw for {', '.join(map(repr, missing))}; there are: {', '.join(known)}. "
            "The rows of a method that was refused say why in their column note."
        )
    down = -(-len(methods) // across)
    with plt.rc_context(STYLE):
        figure, axes = plt.subplots(
            down,
            across,
            figsize=(2.7 * across, 2.4 * down + 0.9),
            sharey=True,
            squeeze=False,
            layout="constrained",
        )
        for axis in axes.flat[len(methods) :]:
            axis.set_axis_off()
        for axis, method in zip(axes.flat, methods):
            rows = frame[frame.method == method]
            by_seed = rows[rows.role == "curve"].groupby(["stage", "layer", "seed"], sort=False).similarity.mean()
            mean = by_seed.groupby(["stage", "layer"], sort=False).mean()
            half = by_seed.groupby(["stage", "layer"], sort=False).apply(interval).fillna(0)
            at = range(len(mean))
            axis.fill_between(at, mean - half, mean + half, alpha=0.25, color="tab:blue", linewidth=0)
            axis.plot(at, mean, marker="o", color="tab:blue")
            for scheme, value in rows[rows.scheme.isin(LINES)].groupby("scheme").similarity.mean().items():
                axis.axhline(value, color=LINES[scheme][1], linestyle=LINES[scheme][2])
            axis.set_title(title(method), fontsize=11)
            names = [layer or "trained" for layer in mean.index.get_level_values("layer")]
            axis.set_xticks(at, names, rotation=45, ha="right")
            axis.grid(axis="y", alpha=0.3)
        for axis in axes[:, 0]:
            axis.set_ylabel(metric)
        shown = [s for s in LINES if s in set(frame.scheme)]
        handles = [Line2D([], [], color="tab:blue", marker="o", label="randomised up to here")]
        handles += [Line2D([], [], label=LINES[s][0], color=LINES[s][1], linestyle=LINES[s][2]) for s in shown]
        figure.legend(handles=handles, loc="outside lower center", ncols=1, fontsize=10, frameon=False)
    plt.close(figure)
    return figure


def dots(groups: Mapping[str, pd.DataFrame], *, xlabel: str, reference: float | None = None) -> Figure:
    """Means as dots and replicates as ticks: one line a column (a method), one colour a group.

    Parameters
    ----------
    groups : label -> frame with one row a replicate and the same columns, the first of them on top. The last
        group is drawn filled, those before it hollow.
    reference : drawn as a dotted line, for example chance.
    """
    _several("groups", groups)
    colours = ("tab:orange", "tab:blue", "0.35")
    lines = list(next(iter(groups.values())).columns)[::-1]
    for values in groups.values():
        check_frame(values, lines)
    with plt.rc_context(STYLE):
        figure, axis = plt.subplots(figsize=(5.4, 0.33 * len(lines) + 1.3), layout="constrained")
        for at, (label, values) in enumerate(groups.items()):
            colour, fill = colours[at % 3], "full" if at == len(groups) - 1 else "none"
            for place, line in enumerate(lines):
                axis.plot(values[line], [place] * len(values), "|", color=colour, alpha=0.6)
            axis.plot(values[lines].mean(), range(len(lines)), "o", color=colour, fillstyle=fill, label=label)
        if reference is not None:
            axis.axvline(reference, color="0.5", linestyle=":")
        axis.set(yticks=range(len(lines)), yticklabels=[title(line) for line in lines])
        axis.set(ylim=(-0.6, len(lines) - 0.4), xlabel=xlabel)
        axis.grid(axis="x", alpha=0.3)
        figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    plt.close(figure)
    return figure
