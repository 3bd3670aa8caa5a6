"""Sanity checks for saliency maps: does an explanation of a neural network depend on the network at all?

`sanity` runs the tests, `saliency` has the methods, `similarity` the metrics, `randomization` the ruined copies.
`check_model` says whether a model can be explained, and `Wrapped` makes one of it that can. All load when first used.
"""

from importlib import import_module

__version__ = "0.2.0.dev0"

_FROM = {"Wrapped": "wrapper", "check_model": "checks"}

__all__ = [
    "Wrapped",
    "check_model",
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


def __getattr__(name: str):
    if name in _FROM:
        return getattr(import_module(f"{__name__}.{_FROM[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
