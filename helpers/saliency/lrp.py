"""Layer-wise relevance propagation (LRP) by zennit's rules; zennit comes with the extra `lrp`."""

from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from torch import Tensor, nn

from .passes import explains, is_number

if TYPE_CHECKING:
    from zennit.core import Hook


def _zennit() -> tuple[ModuleType, ModuleType]:
    """zennit's rules, and our engine that puts them on a model; imported when LRP is first asked for."""
    try:
        rules = import_module("zennit.rules")
    except ModuleNotFoundError as error:
        if error.name != "zennit":
            raise
        raise ImportError(
            "LRP needs zennit, which is not installed: pip install zennit, or this package with its extra [lrp]."
        ) from None
    return rules, import_module(".lrp_rules", __package__)


@explains
def lrp_epsilon(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    *,
    epsilon: float = 1e-6,
    zero_params: str | None = "bias",
) -> Tensor:
    """LRP with the epsilon rule: relevance is shared out in proportion to contributions; Bach et al. (2015).

    `epsilon` counts in root mean squares of a layer's outputs for the image at hand, so that neither the scale of the
    weights nor that of the images matters; zennit has the same as `Stabilizer(norm_scale=True)`.

    Signed maps `(N, C, H, W)`, in logits. With biases left out (`zero_params="bias"`) a map adds up to the
    logit, but for what `epsilon` absorbs and what reaches units that see only zeros, as on a black ground;
    where contributions cancel, relevance of both signs grows without bound: take a larger `epsilon`.
    `zero_params=None` counts biases in the denominator: on networks of ReLU and max-pooling that tends to
    input x gradient as `epsilon` goes to 0, and does not add up to the logit.

    Raises
    ------
    ValueError
        LRP has no rule for a step of the model (see `lrp_composite`), an option is out of range, or in half of the
        images or more relevance grows so far that rounding hides its sum (sizes of 1e6 logits in single precision).
    """
    if not is_number(epsilon) or not 0 < epsilon < float("inf"):
        raise ValueError(f"epsilon must be positive, got {epsilon!r}.")
    if zero_params not in ("bias", None):
        raise ValueError(f"zero_params must be 'bias' or None, got {zero_params!r}.")
    rules, engine = _zennit()
    stabiliser = engine.relative(epsilon)
    return engine.propagate(
        model,
        images,
        targets,
        lambda layer, first: rules.Epsilon(stabiliser, zero_params),
        stabiliser=stabiliser,
        with_biases=zero_params is None,
    )


@explains
def lrp_alpha_beta(
    model: nn.Module, images: Tensor, targets: Tensor, *, alpha: float = 2.0, beta: float = 1.0
) -> Tensor:
    """LRP with the alpha-beta rule in every layer, `alpha` - `beta` = 1; Bach et al. (2015), equation 60.

    Positive contributions share `alpha` times the relevance, negative ones give back `beta` times; biases are
    left out. Signed maps `(N, C, H, W)`, in logits; they add up to the logit where all units have
    contributions of both signs. Errors as `lrp_epsilon`.
    """
    if not is_number(alpha) or not is_number(beta) or beta < 0 or alpha - beta != 1:
        raise ValueError(f"alpha - beta must be 1 and beta not negative, got alpha={alpha!r}, beta={beta!r}.")
    rules, engine = _zennit()
    stabiliser = engine.relative()
    rule = rules.AlphaBeta(alpha, beta, stabiliser, zero_params="bias")
    return engine.propagate(model, images, targets, lambda layer, first: rule, stabiliser=stabiliser)


@explains
def lrp_composite(model: nn.Module, images: Tensor, targets: Tensor) -> Tensor:
    """LRP by zennit's composite EpsilonAlpha2Beta1Flat; Kohlbrenner et al. (2020).

    Flat in the layer that runs first, alpha 2 beta 1 in other convolutions, epsilon in linear layers; biases
    are left out. Signed maps `(N, C, H, W)`, in logits. Denominators are stabilised as in `lrp_epsilon`.

    Raises
    ------
    ValueError
        A step of the model is none of: convolution, linear layer, batch-norm right after one, ReLU, pooling,
        sum, mean, concatenation and other moves of values; or a layer runs twice.
    """
    rules, engine = _zennit()
    stabiliser = engine.relative()

    def rule(layer: nn.Module, first: bool) -> "Hook":
        if first:
            return rules.Flat(stabiliser)
        if isinstance(layer, nn.Linear):
            return rules.Epsilon(stabiliser, "bias")
        return rules.AlphaBeta(stabilizer=stabiliser, zero_params="bias")

    return engine.propagate(model, images, targets, rule, stabiliser=stabiliser)
