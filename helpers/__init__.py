"""Sanity checks for saliency maps: does an explanation of a neural network depend on the network at all?

`sanity` runs the tests, `saliency` has the methods, `similarity` the metrics, `randomization` the ruined copies.
`check_model` says whether a model can be explained, and `Wrapped` makes one of it that can. All load when first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any
from warnings import warn

if TYPE_CHECKING:
    from .checks import check_model as check_model
    from .wrapper import Wrapped as Wrapped

__version__ = "0.2.0.dev0"

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

_HELD = {"Wrapped": "wrapper", "check_model": "checks"}  # name -> the module it is taken from

# Modules that only the book needs were at the top before they got a room of their own; to be dropped after 0.2.
_MOVED = {
    "assets": "assets",
    "bugs": "bugs",
    "claims": "claims",
    "data": "data",
    "dynamics": "training_dynamics",
    "explorer": "explorer",
    "live": "live_panel",
    "models": "models",
    "photographs": "photographs",
    "training": "training",
}


def __getattr__(name: str) -> Any:
    if name in _HELD:
        return getattr(import_module(f"{__name__}.{_HELD[name]}"), name)
    if name in __all__:
        return import_module(f"{__name__}.{name}")
    if name in _MOVED:
        place = f"{__name__}.book"
        advice = f"from {place} import {_MOVED[name]}"
        warn(f"{__name__}.{name} is now {place}.{_MOVED[name]}: {advice}.", DeprecationWarning, stacklevel=2)
        try:
            return import_module(f"{place}.{_MOVED[name]}")
        except ModuleNotFoundError as error:
            raise ImportError(
                f"{place}.{_MOVED[name]} needs {error.name}, which is not installed: "
                "install this package with its extra [book]."
            ) from error
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
