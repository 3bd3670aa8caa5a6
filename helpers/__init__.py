"""Sanity checks for saliency maps: does an explanation of a neural network depend on the network at all?

`sanity` runs the tests, `saliency` has the methods, `similarity` the metrics, `randomization` the ruined copies.
The modules load when they are first used.
"""

from importlib import import_module
from types import ModuleType

__version__ = "0.2.0.dev0"

__all__ = [
    "device",
    "edges",
    "followups",
    "inference",
    "localization",
    "plots",
    "randomization",
    "saliency",
    "sanity",
    "similarity",
]


def __getattr__(name: str) -> ModuleType:
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
