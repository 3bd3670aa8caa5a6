"""A test as it runs: its rows, its bar, what is refused, and Ctrl-C."""

import sys
import warnings
from collections.abc import Mapping, Sequence

import pandas as pd

from .comparing import Comparison, Side
from .device import progress
from .heatmaps import Refusal
from .planning import in_words
from .rows import Entry, frame_of


class Run:
    """Collects the rows of comparisons, under a progress bar of so many `steps`.

    Ctrl-C ends the block with what is done, unless that is nothing.

    Parameters
    ----------
    places : of the images in the whole set.
    plan : said before the start, and kept with the frame.
    """

    def __init__(self, steps: int, places: Sequence[int], plan: Mapping | None = None, *, show: bool):
        self.places, self.plan, self.show = places, plan, show
        self.entries: list[Entry] = []
        self.done, self.complete = 0, False
        self.refusals: dict[str, str] = {}  # of the model that is explained, by method
        self.bar = progress(steps, show=show)
        if plan is not None:
            self._say(in_words(plan))

    def _say(self, text: str) -> None:
        if self.show:
            self.bar.write(text, file=sys.stderr)

    def tick(self) -> None:
        self.bar.update()

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, kind, error, trace) -> bool:
        self.bar.close()
        self.complete = kind is None
        stopped = kind is not None and issubclass(kind, KeyboardInterrupt) and self.done > 0
        if stopped:
            text = f"interrupted: the frame holds what {self.done} methods and replicates gave before"
            warnings.warn(text, stacklevel=4)
        return stopped

    def add(self, comparison: Comparison, side: Side, steps: int = 0) -> None:
        """The rows of a comparison, which takes so many `steps`, none if it is by the way.

        Where there is nothing to compare with, they are one: what was refused, in the place of `side`.
        """
        label, steps_before = comparison.label, self.bar.n
        try:
            self.entries += comparison.entries()
        except Refusal as refusal:
            self.entries.append(comparison.rows(side).refused(str(refusal)))
            if label not in self.refusals:
                self._say(f"{label} refuses: {refusal}")
            self.refusals.setdefault(label, str(refusal))
        if steps:
            self.done += 1
            self.bar.update(steps_before + steps - self.bar.n)

    def check(self) -> None:
        """Raise where all methods have refused and there is no curve at all."""
        if self.refusals and not any(entry.role == "curve" for entry in self.entries):
            said = [f"{label}: {refusal}" for label, refusal in self.refusals.items()]
            lone = next(iter(self.refusals.values()))
            raise ValueError(lone if len(said) == 1 else f"no method can explain this model. {'; '.join(said)}")

    def frame(self) -> pd.DataFrame:
        """The tidy frame; its `attrs` say whether it is `complete`, and what the `plan` was."""
        frame = frame_of(self.entries, self.places)
        frame.attrs["complete"] = self.complete
        if self.plan is not None:
            frame.attrs["plan"] = dict(self.plan)
        return frame
