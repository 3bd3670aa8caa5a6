"""The rows of a tidy frame: similarities as they come, and why there are none."""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import torch
from torch import Tensor

COLUMNS = ["scheme", "role", "seed", "stage", "layer", "method", "metric", "image", "similarity"]
NOWHERE = -1  # the image of a row that belongs to none
NOTHING = "no similarity is defined at any stage, as it is where every map is constant"


class Entry(NamedTuple):
    """Similarities of all images, one row each; or, without any, one row whose note says why."""

    scheme: str
    role: str
    seed: int
    stage: int
    layer: str
    method: str
    metric: str
    values: Tensor | None  # left on their device until the end, so that no stage waits for another
    note: str = ""

    def refused(self, note: str) -> "Entry":
        """The row that stands for what the method did not give."""
        return self._replace(role="refused", metric="", values=None, note=note)


def check_frame(frame: pd.DataFrame, columns: Sequence[str] = COLUMNS) -> None:
    """Raise unless `frame` is a frame with these columns, as the tests of `sanity` return it."""
    if not isinstance(frame, pd.DataFrame):
        raise ValueError(
            f"frame must be a tidy frame, as sanity.parameter_randomization returns it, got {type(frame)}."
        )
    if missing := [column for column in columns if column not in frame]:
        raise ValueError(f"the frame has no column {', '.join(map(repr, missing))}; it has: {', '.join(frame)}.")


def frame_of(entries: Sequence[Entry], places: Sequence[int]) -> pd.DataFrame:
    """The tidy frame of the entries; `places` number the images.

    Where every similarity of a stage is undefined a note says so, and so does a row where a method gave nothing else.
    """
    filled = [entry.values for entry in entries if entry.values is not None]
    known = torch.cat([values.cpu().double() for values in filled]).isnan() if filled else torch.zeros(0)
    undefined = iter([bool(part.all()) for part in known.split([len(values) for values in filled])])
    entries = list(_explained([(entry, entry.values is not None and next(undefined)) for entry in entries]))
    values = [np.array([np.nan]) if e.values is None else e.values.cpu().double().numpy() for e in entries]
    images = [[NOWHERE] if entry.values is None else places for entry in entries]
    sizes = [len(part) for part in values]
    columns = zip(*(entry[:7] for entry in entries))
    frame = {name: np.repeat(np.array(cells), sizes) for name, cells in zip(COLUMNS, columns)}
    frame["image"] = np.concatenate([np.array(part, dtype=np.int64) for part in images])
    frame["similarity"] = np.concatenate(values)
    frame["note"] = np.repeat(np.array([entry.note for entry in entries], dtype=object), sizes)
    return pd.DataFrame(frame)[[*COLUMNS, "note"]]


def _explained(entries: Sequence[tuple[Entry, bool]]) -> Iterator[Entry]:
    silent: dict[tuple, Entry | None] = {}
    for entry, undefined in entries:
        if entry.role == "curve":
            where = f"stage {entry.stage}" + f" ({entry.layer})" * bool(entry.layer)
            note = f"{where}: {entry.metric} is undefined for every image, as it is where a map is constant"
            yield entry._replace(note=note) if undefined else entry
            key = entry.scheme, entry.seed, entry.method
            silent[key] = silent.get(key, entry) if undefined else None
        else:
            yield entry
    yield from (entry._replace(stage=0, layer="").refused(NOTHING) for entry in silent.values() if entry)
