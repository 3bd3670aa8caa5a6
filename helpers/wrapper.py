"""A model as the package wants it: images in, one row of logits an image out."""

from collections.abc import Callable, Mapping, Sequence
from numbers import Integral

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from .inference import ModelError


class Wrapped(nn.Module):
    """A model that answers with logits `(N, classes)`, made of one that does not.

    The wrapped model is the attribute `model`, the very one and no copy, and its stages are those of the wrapper. What
    is done comes in this order: further inputs, softmax off, output chosen, region added up, a vector made a column,
    signs turned.

    Parameters
    ----------
    model : takes images `(N, C, H, W)` first, and returns what it likes.
    output : where the scores are in that. A number for the place in a tuple or list, a string for a key or an
        attribute, or a function of the answer; None is the answer itself. Scores are `(N, classes)`; `(N,)`, one number
        an image as in a regression, becomes `(N, 1)` and is explained with target 0; `(N, classes, h, w)` needs a
        region. A function also says what no class index can: `lambda y: y[:, [2, 7]].sum(1)` is a sum of labels,
        `lambda y: y[:, 2] - y[:, 7]` a difference. A named function can be saved, a lambda cannot.
    region : bool `(h, w)`, of the size of the scores or of the images: scores are added up where it is True. A place
        of the scores counts by the part of it that a mask of the images' size covers.
    reduce : `"sum"` (the default with a region) or `"mean"` of the scores over the region; over all places where there
        is no region.
    inputs : what the model takes besides images, the same for every image: a tuple, after the images, or a dictionary,
        by name. A tensor whose first axis has one entry is a batch of one and is repeated; any other is the input of
        one image. Tensors move with the wrapper (`.to()`); what is no tensor is handed on as it is.
    negate : class index or indices, or True for all: the sign of these logits is turned, and their maps show what
        speaks against the class.
    drop_softmax : take off the softmax, log-softmax or sigmoid that the scores come from. Of the model's calls that one
        is left out whose result the scores are. Where they were moved since, the model runs a second time without the
        call, and the probabilities of what it answers then must be those of before.
    keep_probabilities : explain probabilities on purpose, which `check_model` otherwise refuses.

    Raises
    ------
    ValueError
        An option of the wrong kind, here; in a pass, an output that the model does not return, a region that does not
        fit, or no softmax to drop.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        output: int | str | Callable | None = None,
        region: Tensor | None = None,
        reduce: str | None = None,
        inputs: Sequence | Mapping = (),
        negate: int | Sequence[int] | bool = (),
        drop_softmax: bool = False,
        keep_probabilities: bool = False,
    ):
        super().__init__()
        if not isinstance(model, nn.Module):
            raise ValueError(f"the model must be a torch.nn.Module, got {type(model).__name__}.")
        if isinstance(output, bool) or not (output is None or isinstance(output, (Integral, str)) or callable(output)):
            raise ValueError(f"output must be a place, a key, an attribute or a function, got {output!r}.")
        if region is not None and not (isinstance(region, Tensor) and region.dtype == torch.bool and region.ndim == 2):
            got = f"{region.dtype} {tuple(region.shape)}" if isinstance(region, Tensor) else type(region).__name__
            raise ValueError(f"region must be a bool tensor (h, w), got {got}: mask > 0.5 makes one of numbers.")
        if region is not None and not region.any():
            raise ValueError("region is False everywhere: there is nothing to add up.")
        if reduce not in (None, "sum", "mean"):
            raise ValueError(f"reduce must be 'sum' or 'mean', got {reduce!r}.")
        if drop_softmax and keep_probabilities:
            raise ValueError("choose one of drop_softmax and keep_probabilities: the first leaves no probabilities.")
        _refuse_opposites(model, drop_softmax, keep_probabilities)
        self.model, self.output, self.training = model, output, model.training
        self.reduce = "sum" if reduce is None and region is not None else reduce
        self.negate = negate if isinstance(negate, bool) else _classes(negate)
        self.drop_softmax, self.keep_probabilities = drop_softmax, keep_probabilities
        self.region: Tensor | None
        self.register_buffer("region", region)
        self.plain_inputs: dict[int | str, object] = {}  # a tensor is a buffer instead, and None here
        if isinstance(inputs, (str, Tensor)) or not isinstance(inputs, (Sequence, Mapping)):
            raise ValueError(f"inputs must be a tuple or a dictionary, got {type(inputs).__name__}.")
        if isinstance(inputs, Mapping) and not all(isinstance(key, str) and key.isidentifier() for key in inputs):
            raise ValueError(f"inputs by name need names that are words, got {list(inputs)}.")
        for key, value in inputs.items() if isinstance(inputs, Mapping) else enumerate(inputs):
            self.plain_inputs[key] = None if isinstance(value, Tensor) else value
            if isinstance(value, Tensor):
                self.register_buffer(f"input_{key}", value)

    def extra_repr(self) -> str:
        options = ("output", "reduce", "negate", "drop_softmax", "keep_probabilities")
        shown = {name: getattr(self, name) for name in options}
        return ", ".join(f"{name}={value!r}" for name, value in shown.items() if value not in (None, False, ()))

    def forward(self, images: Tensor):
        scores = self._without_softmax(images) if self.drop_softmax else self._scores(images)
        if not isinstance(scores, Tensor):  # traced, or what the check of models has a word for
            return scores
        if self.reduce is not None:
            scores = self._reduced(scores, images)
        if scores.ndim == 1:
            scores = scores[:, None]
        return self._signed(scores)

    def _scores(self, images: Tensor):
        """What the model answers, at the place of the scores."""
        given: dict[int | str, object] = {}
        for key, value in self.plain_inputs.items():
            held = self._buffers.get(f"input_{key}")
            if held is not None:
                held = held if held.ndim and len(held) == 1 else held[None]
                value = held.expand(images.shape[0], *held.shape[1:])
            given[key] = value
        named = {key: value for key, value in given.items() if isinstance(key, str)}
        answer = self.model(images, *(value for key, value in given.items() if key not in named), **named)
        return answer if self.output is None else self._chosen(answer)

    def _chosen(self, answer):
        output = self.output
        if callable(output):
            return output(answer)
        if isinstance(output, Integral) and isinstance(answer, Tensor):
            raise ModelError(
                f"output={output} is a place in a tuple, and the model returns a tensor: leave output out."
            )
        try:
            if isinstance(output, str) and not isinstance(answer, Mapping):
                return getattr(answer, output)
            return answer[output]
        except (KeyError, IndexError, AttributeError, TypeError):
            names = answer.keys() if isinstance(answer, Mapping) else getattr(answer, "__dict__", {})
            held = f"the names {', '.join(map(repr, names))}" if names else f"{type(answer).__name__}"
            if isinstance(answer, (tuple, list)):
                held = f"{type(answer).__name__} of {len(answer)}"
            raise ModelError(f"output={output!r} is not in what the model returns: {held}.") from None

    def _without_softmax(self, images: Tensor):
        with _Squashes() as calls:
            scores = self._scores(images)
        if not isinstance(scores, Tensor):
            return scores
        for call in reversed(calls.made):
            if call.result is scores:
                return call.argument
        places = [place for place, call in enumerate(calls.made) if _same_memory(call.result, scores)]
        place = places[-1] if places else len(calls.made) - 1
        if place >= 0:
            with _Squashes(without=place):
                bare = self._scores(images)
            squash = _SQUASHES[calls.made[place].name]
            if bare.shape == scores.shape and bare.ndim > 1:
                if torch.allclose(squash(bare.detach()), scores.detach(), rtol=1e-4, atol=1e-5):
                    return bare
        raise ModelError(
            "drop_softmax=True finds no call of softmax, log_softmax or sigmoid whose result the scores are: leave it "
            "out if they are logits, or choose the logits with output=."
        )

    def _reduced(self, scores: Tensor, images: Tensor) -> Tensor:
        scores = scores[:, None] if scores.ndim == 3 else scores
        if scores.ndim != 4:
            raise ModelError(
                f"a region needs scores (N, classes, h, w), got {tuple(scores.shape)}: leave region and reduce out, or "
                "choose other scores with output=."
            )
        if self.region is None:
            return scores.sum((2, 3)) if self.reduce == "sum" else scores.mean((2, 3))
        weights, size = self.region.to(scores.dtype), scores.shape[2:]
        if weights.shape != size:
            if weights.shape != images.shape[2:]:
                raise ModelError(
                    f"the region {tuple(weights.shape)} has neither the size of the scores, {tuple(size)}, nor that of "
                    f"the images, {tuple(images.shape[2:])}."
                )
            weights = F.adaptive_avg_pool2d(weights[None, None], (size[0], size[1]))[0, 0]
        return (scores * (weights if self.reduce == "sum" else weights / weights.sum())).sum((2, 3))

    def _signed(self, scores: Tensor) -> Tensor:
        if isinstance(self.negate, bool):
            return -scores if self.negate else scores
        if not self.negate or scores.ndim != 2:
            return scores
        if max(self.negate) >= scores.shape[1]:
            raise ModelError(f"negate={max(self.negate)} is not one of the model's {scores.shape[1]} classes.")
        signs = [-1.0 if place in self.negate else 1.0 for place in range(scores.shape[1])]
        return scores * torch.tensor(signs, dtype=scores.dtype, device=scores.device)


def _refuse_opposites(model: nn.Module, drops: bool, keeps: bool) -> None:
    while isinstance(model, Wrapped):
        if (model.drop_softmax and keeps) or (model.keep_probabilities and drops):
            raise ValueError(
                "choose one of drop_softmax and keep_probabilities: the model is wrapped with the other already; "
                "its attribute .model is the one inside."
            )
        model = model.model


def _classes(negate: int | Sequence[int]) -> tuple[int, ...]:
    classes = (negate,) if isinstance(negate, Integral) else negate
    if isinstance(classes, (str, Mapping)) or not isinstance(classes, Sequence):
        raise ValueError(f"negate must be True, a class index or a list of them, got {negate!r}.")
    if any(isinstance(place, bool) or not isinstance(place, Integral) or place < 0 for place in classes):
        raise ValueError(f"negate must be True, a class index or a list of them, got {negate!r}.")
    return tuple(map(int, classes))


# ---------------------------------------------------------------- softmax off


_SQUASHES: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda scores: scores.softmax(1),
    "log_softmax": lambda scores: scores.log_softmax(1),
    "sigmoid": torch.sigmoid,
    "sigmoid_": torch.sigmoid,
    "special_softmax": lambda scores: scores.softmax(1),
    "special_log_softmax": lambda scores: scores.log_softmax(1),
    "special_expit": torch.sigmoid,
    "log_sigmoid": F.logsigmoid,
}


class _Call:
    def __init__(self, name: str, argument: Tensor, result: Tensor):
        self.name, self.argument, self.result = name, argument, result


class _Squashes(TorchFunctionMode):
    """Sees the calls of softmax and its kin; the call at place `without` hands on its argument."""

    def __init__(self, without: int | None = None):
        super().__init__()
        self.without, self.made = without, list[_Call]()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in _SQUASHES or "out" in kwargs:
            return func(*args, **kwargs)
        argument = args[0] if args else kwargs["input"]
        if len(self.made) == self.without:
            result = argument
        else:
            argument = argument.clone() if name.endswith("_") else argument  # which is written into
            result = func(*args, **kwargs)
        self.made.append(_Call(name, argument, result))
        return result


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
