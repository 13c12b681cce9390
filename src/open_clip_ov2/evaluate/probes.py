"""Linear probe: multinomial logistic regression on frozen features.

Protocol: CLIP (arXiv 2103.00020, section 3.2 and appendix A.3), on features that are standardized, as MAE's batch norm
without affine does it (arXiv 2111.06377, appendix A.1), because models differ in their scale (docs/evaluation.md).

Shapes: M samples, D width, C classes (evaluate/__init__.py).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.evaluate.classes import Split, hold_out, match_labels, ranks
from open_clip_ov2.evaluate.extraction import Features

# CLIP, appendix A.3: from 1e-6 to 1e6 every two decades, then halved around the best down to 8 steps a decade.
FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINEST_STEP = 1 / 8
MAX_ITERATIONS = 1000
HELD_OUT = 0.2  # ours: CLIP does not say which part of a training set without a validation set it holds out
SEARCH_ITERATIONS = 60  # ours: the search needs the order of the candidates, not their minima (dev/LOG.md)
TOLERANCE = 1e-9  # ours: largest entry of the gradient of the mean loss, in the coordinates of `_stretched_axes`
LEAST_CHANGE = 1e-11  # ours: an iteration that lowers the mean loss by less (nats) is the last one
LOSS_DIGITS = 3  # ours: a difference of less than 0.001 nats between two candidates may be rounding of the features
CURVATURE = 0.02  # ours, measured: 1/C, 1/4C, 1/20C, 1/100C, 1/500C; the middle is fast for few and for many classes
BLOCK_ROWS = 1 << 15  # ours: logits of 1000 classes in float64 take 0.26 GB


@dataclass(frozen=True)
class LinearModel:
    """Logits are `standardized(x) @ weight.T + bias`; float64."""

    weight_CD: Tensor
    bias_C: Tensor
    mean_D: Tensor
    std_D: Tensor
    iterations: int
    converged: bool

    def logits(self, x_MD: Tensor) -> Tensor:
        """`(M, C)` float64 on the CPU."""
        blocks = [(block.to(self.mean_D) - self.mean_D) / self.std_D for block in x_MD.split(BLOCK_ROWS)]
        return torch.cat([F.linear(block, self.weight_CD, self.bias_C).cpu() for block in blocks])


def fit(
    x_MD: Tensor,
    classes_M: Tensor,
    num_classes: int,
    regulariser: float,
    *,
    device: torch.device | str = "cpu",
    least_change: float = LEAST_CHANGE,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearModel:
    """Minimize sum of cross-entropies + regulariser / 2 * |weight|^2, with a free bias, from zero and in float64. It
    ends when an iteration lowers the mean loss by less than `least_change`, or after `max_iterations`."""
    x_MD, classes_M = x_MD.to(device, torch.float64), classes_M.to(device)
    std_D, mean_D = torch.std_mean(x_MD, dim=0, correction=0)
    std_D = torch.where(std_D > 0, std_D, 1.0)  # a feature that never changes
    x_MD = (x_MD - mean_D) / std_D
    axes_DD = _stretched_axes(x_MD, num_classes, regulariser)
    weight_CD1 = x_MD.new_zeros(num_classes, x_MD.shape[1] + 1).requires_grad_()
    optimizer = torch.optim.LBFGS(
        [weight_CD1],
        max_iter=max_iterations,
        max_eval=25 * max_iterations,  # torch's longest line search: it is never this that ends the fit
        tolerance_grad=TOLERANCE,
        tolerance_change=least_change,
        line_search_fn="strong_wolfe",
    )
    x_MD = x_MD @ axes_DD

    def loss() -> Tensor:
        optimizer.zero_grad()
        return _mean_loss(weight_CD1, x_MD, classes_M, regulariser, axes_DD)

    optimizer.step(loss)
    iterations = optimizer.state[weight_CD1]["n_iter"]
    weight_CD, bias_C = weight_CD1.detach()[:, :-1] @ axes_DD.T, weight_CD1.detach()[:, -1]
    return LinearModel(weight_CD, bias_C, mean_D, std_D, iterations, iterations < max_iterations)


def _mean_loss(weight_CD1: Tensor, x_MD: Tensor, classes_M: Tensor, regulariser: float, axes_DD: Tensor) -> Tensor:
    """The loss, whose gradient is added to that of the weight: in blocks, because the logits of all samples together
    might not fit into memory."""
    parts = [regulariser / 2 * (weight_CD1[:, :-1] @ axes_DD.T).square().sum() / len(x_MD)]
    parts[0].backward()
    for x_BD, classes_B in zip(x_MD.split(BLOCK_ROWS), classes_M.split(BLOCK_ROWS), strict=True):
        logits_BC = F.linear(x_BD, weight_CD1[:, :-1], weight_CD1[:, -1])
        parts.append(F.cross_entropy(logits_BC, classes_B, reduction="sum") / len(x_MD))
        parts[-1].backward()
    return torch.stack([part.detach() for part in parts]).sum()


def _stretched_axes(x_MD: Tensor, num_classes: int, regulariser: float) -> Tensor:
    """Principal axes as columns `(D, D)`, each stretched so that the loss is about as steep along each of them.

    The loss's Hessian is X^T S X + regulariser with S somewhere below 1/2 (Böhning 1992), taken as CURVATURE / classes.
    The minimum is the same in any coordinates."""
    variance_D, axes_DD = torch.linalg.eigh(x_MD.T @ x_MD)
    variance_D = variance_D.clamp(min=torch.finfo(variance_D.dtype).eps * max(variance_D.max().item(), 1.0))
    return axes_DD * (CURVATURE / num_classes * variance_D + regulariser).rsqrt()


def search(score: Callable[[float], tuple[float, float]]) -> tuple[float, dict[float, tuple[float, float]]]:
    """(best exponent, scores by exponent): CLIP's search over powers of ten, the higher score the better."""
    scores = {exponent: score(exponent) for exponent in FIRST_EXPONENTS}
    step = FIRST_EXPONENTS[1] - FIRST_EXPONENTS[0]
    while True:
        best = max(scores, key=lambda exponent: (scores[exponent], exponent))
        step /= 2
        if step < FINEST_STEP:
            return best, dict(sorted(scores.items()))
        for exponent in (best - step, best + step):
            if FIRST_EXPONENTS[0] <= exponent <= FIRST_EXPONENTS[-1] and exponent not in scores:
                scores[exponent] = score(exponent)


def linear_probe(
    train: Features, test: Features, *, regulariser: float | None = None, device: torch.device | str = "cpu"
) -> dict[str, Any]:
    """Accuracy of a linear classifier on pooled features, JSON-ready. `regulariser` spares the search for one, which
    takes the most held-out samples right; of equals, the least held-out loss to LOSS_DIGITS; of equals in that too, the
    strongest. Nothing is drawn at random. Raises UserError, see `match_labels` and `hold_out`."""
    labels = match_labels(train, test)

    def fitted(split: Split, regulariser: float, max_iterations: int) -> LinearModel:
        x_MD, classes = train.values[split.rows], len(labels.names)
        return fit(x_MD, split.classes_M, classes, regulariser, device=device, max_iterations=max_iterations)

    sweep: dict[float, tuple[float, float]] = {}
    if regulariser is None:
        to_fit, held = hold_out(labels.train, HELD_OUT)

        def score(exponent: float) -> tuple[float, float]:
            logits_MC = fitted(to_fit, 10**exponent, SEARCH_ITERATIONS).logits(train.values[held.rows])
            top1 = (ranks(logits_MC, held.classes_M) == 0).double().mean().item()
            return top1, -round(F.cross_entropy(logits_MC, held.classes_M).item(), LOSS_DIGITS)

        best, sweep = search(score)
        regulariser = 10**best
    model = fitted(labels.train, regulariser, MAX_ITERATIONS)
    places_M = ranks(model.logits(test.values[labels.test.rows]), labels.test.classes_M)
    return {
        **labels.result(places_M),
        "regulariser": regulariser,
        "standardised": True,
        "converged": model.converged,
        "sweep": [{"regulariser": 10**exponent, "held_out_top1": top1} for exponent, (top1, _) in sweep.items()],
    }
