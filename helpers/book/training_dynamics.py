"""What a training run tells about its examples: margins, forgetting, and how well a score finds the wrong ones."""

import torch
from torch import Tensor

from .training import check_labels


def margins(logits: Tensor, labels: Tensor) -> Tensor:
    """The logit of each image's label less the largest of the others, `(..., N)`; negative where it is misclassified.

    Parameters
    ----------
    logits : `(..., N, classes)`, for example one `(N, classes)` an epoch.
    labels : int64 `(N,)`, the labels that the network was trained on.

    Raises
    ------
    ValueError
        Labels that do not fit the logits, or fewer than two classes.
    """
    check_labels(logits.movedim(-2, 0), labels, logits.shape[-1])
    if logits.shape[-1] < 2:
        raise ValueError("a margin needs at least two classes.")
    own = torch.nn.functional.one_hot(labels, logits.shape[-1]).bool()
    others = logits.masked_fill(own, -torch.inf).amax(-1)
    return logits.masked_fill(~own, 0).sum(-1) - others


def aum(logits: Tensor, labels: Tensor) -> Tensor:
    """Area under the margin: the mean over the epochs of each image's margin, `(N,)`; Pleiss et al. (2020), section 3.

    Parameters
    ----------
    logits : `(epochs, N, classes)`, measured once an epoch.
    labels : int64 `(N,)`, the labels that the network was trained on.

    Raises
    ------
    ValueError
        No epoch, or what `margins` refuses.
    """
    if logits.ndim != 3 or not len(logits):
        raise ValueError(f"logits must be (epochs, N, classes) with an epoch at least, got {tuple(logits.shape)}.")
    return margins(logits, labels).mean(0)


def forgetting_events(right: Tensor) -> Tensor:
    """How often each image was classified correctly in one epoch and not in the next, `(N,)`; Toneva et al. (2019).

    `right` is bool `(epochs, N)`. An image that was never right was never learned: infinity, as in the paper's
    ranking. The paper looks at an image whenever it is in a batch; one look an epoch, at its end, is as many looks.
    """
    if right.dtype != torch.bool or right.ndim != 2 or not len(right):
        raise ValueError(
            f"right must be bool (epochs, N) with an epoch at least, got {right.dtype} {tuple(right.shape)}."
        )
    events = (right[:-1] & ~right[1:]).sum(0).float()
    return events.masked_fill(~right.any(0), torch.inf)


def average_precision(scores: Tensor, wanted: Tensor) -> float:
    """Mean precision at the wanted items when all are ranked by falling score, in [0, 1]; chance is their fraction.

    Parameters
    ----------
    scores : `(N,)`, large where an item is thought to be wanted. Ties are taken as one step, as in scikit-learn;
        infinity is allowed, NaN is not.
    wanted : bool `(N,)`, at least one of them True.

    Raises
    ------
    ValueError
        Shapes or types that do not fit, nothing wanted, or NaN.
    """
    if wanted.dtype != torch.bool or scores.ndim != 1 or scores.shape != wanted.shape:
        raise ValueError(f"scores and bool wanted must be (N,), got {tuple(scores.shape)}, {tuple(wanted.shape)}.")
    if not wanted.any() or scores.isnan().any():
        raise ValueError("nothing is wanted." if not wanted.any() else "a score is NaN.")
    values, place = scores.unique(return_inverse=True)  # in rising order
    found = torch.zeros(len(values), dtype=torch.float64, device=scores.device).index_add(0, place, wanted.double())
    all_here = place.bincount(minlength=len(values)).double()
    found, looked_at = found.flip(0), all_here.flip(0).cumsum(0)
    return (found.cumsum(0) / looked_at * found).sum().item() / found.sum().item()
