"""Linear probe: multinomial logistic regression on frozen features.

Protocol: CLIP (arXiv 2103.00020, section 3.2 and appendix A.3): L-BFGS, at most 1000 iterations, L2 strength searched
on a held-out part, then fitted to everything. Features are standardised, as MAE's batch norm without affine does it
before its linear probe (arXiv 2111.06377, appendix A.1): models differ in the scale of their features. `standardise`
off is CLIP's own way.

Shapes: M samples, D width, C classes (evaluate/__init__.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.evaluate.extraction import Features
from open_clip_ov2.evaluate.labels import Labels, Split, accuracy, hold_out, match_labels, per_class, ranks

# CLIP, appendix A.3: from 1e-6 to 1e6 every two decades, then halved around the best down to 8 steps a decade.
FIRST_EXPONENTS = (-6.0, -4.0, -2.0, 0.0, 2.0, 4.0, 6.0)
FINEST_STEP = 1 / 8
MAX_ITERATIONS = 1000
HELD_OUT = 0.2  # ours: CLIP does not say which part of a training set without a validation set it holds out
TOLERANCE = 1e-5  # ours: largest entry of the gradient of the mean loss, over a loss below 1; scikit-learn has 1e-4
SEARCH_TOLERANCE = 1e-4  # ours, and scikit-learn's default: in the search, which needs an order and not a minimum
SEARCH_ITERATIONS = 200  # ours: weak regularisers are far from the minimum then, and about as good as they get
# Ours: rounding of a loss in float64. Larger steps are no end: weak regularisers have many before the minimum.
LEAST_CHANGE = 1e-15
LEAST_LOSS = 1e-2  # ours: nats a sample; below it, the number of iterations would hang on the features' last bits
LOSS_DIGITS = 3  # ours: in nats. Less tells two regularisers apart by the rounding of the features
# Ours: so often in a row L-BFGS ends by itself because the loss falls by less than it can resolve. A loss that is flat
# to 1e-15 has a gradient of 1e-8 still, which a limit may lie below.
STALLS = 3
LINE_SEARCH = 25  # evaluations of one at most, in torch
CHECKED_EVERY = 20  # ours: iterations between two looks at the gradient
# Ours, measured: of 1/C, 1/4C, 1/20C, 1/100C and 1/500C the middle ones are fast for few classes and for many.
CURVATURE = 0.02
BLOCK_ROWS = 1 << 15  # ours: logits of 1000 classes in float64 take 0.26 GB


@dataclass(frozen=True)
class LinearModel:
    """Logits are `standardised(x) @ weight.T + bias`; float64."""

    weight_CD: Tensor
    bias_C: Tensor
    mean_D: Tensor
    std_D: Tensor
    iterations: int
    converged: bool

    def logits(self, x_MD: Tensor) -> Tensor:
        """`(M, C)` float64 on the CPU."""
        blocks = [
            F.linear((block.to(self.mean_D) - self.mean_D) / self.std_D, self.weight_CD, self.bias_C).cpu()
            for block in x_MD.split(BLOCK_ROWS)
        ]
        return torch.cat(blocks)


def fit(
    x_MD: Tensor,
    classes_M: Tensor,
    num_classes: int,
    regulariser: float,
    *,
    standardise: bool = True,
    device: torch.device | str = "cpu",
    tolerance: float = TOLERANCE,
    max_iterations: int = MAX_ITERATIONS,
) -> LinearModel:
    """Minimises sum of cross-entropies + regulariser / 2 * |weight|^2; the bias is free. scikit-learn's C is
    1 / regulariser. From zero, in float64: the same every time.
    """
    x_MD, classes_M = x_MD.to(device, torch.float64), classes_M.to(device)
    mean_D, std_D = torch.zeros_like(x_MD[0]), torch.ones_like(x_MD[0])
    if standardise:
        std_D, mean_D = torch.std_mean(x_MD, dim=0, correction=0)
        std_D = torch.where(std_D > 0, std_D, 1.0)  # a feature that never changes
        x_MD = (x_MD - mean_D) / std_D
    samples = len(x_MD)
    axes_DD, scale_D = _coordinates(x_MD, num_classes, regulariser)
    problem = _Problem(x_MD @ (axes_DD * scale_D), classes_M, num_classes, regulariser * scale_D.square())
    del x_MD
    optimizer = torch.optim.LBFGS(
        [problem.weight_CD1],
        max_iter=CHECKED_EVERY,
        max_eval=LINE_SEARCH * CHECKED_EVERY,  # so that it is never this that ends it
        tolerance_grad=0,
        tolerance_change=LEAST_CHANGE,
        line_search_fn="strong_wolfe",
    )
    iterations, stalls, gradient, limit = 0, 0, math.inf, 0.0
    while gradient > limit and stalls < STALLS and iterations < max_iterations:
        optimizer.step(problem.loss)
        loss = problem.loss().item()
        # Of a steep loss, float64 holds no smaller gradient. Where all can be right, loss and gradient fall together,
        # and the minimum is not near because both are small.
        limit = tolerance * max(1.0, regulariser / samples) * min(1.0, max(loss, LEAST_LOSS))
        gradient_CD1 = problem.gradient_CD1
        by_feature_CD = gradient_CD1[:, :-1] / scale_D @ axes_DD.T
        gradient = max(by_feature_CD.abs().max().item(), gradient_CD1[:, -1].abs().max().item())
        before, iterations = iterations, optimizer.state[problem.weight_CD1]["n_iter"]
        stalls = stalls + 1 if iterations - before < CHECKED_EVERY else 0
    weight_CD1 = problem.weight_CD1
    weight_CD = weight_CD1[:, :-1] * scale_D @ axes_DD.T
    return LinearModel(weight_CD, weight_CD1[:, -1], mean_D, std_D, iterations, gradient <= limit or stalls == STALLS)


def _coordinates(x_MD: Tensor, num_classes: int, regulariser: float) -> tuple[Tensor, Tensor]:
    """Principal axes as columns `(D, D)`, and by how much each is stretched `(D,)`, so that the loss is about as steep
    along each of them: its Hessian is X^T S X + lambda with S somewhere below 1/2 (Böhning 1992), taken as CURVATURE /
    classes. The minimum is the same in any coordinates; features that are much alike take a tenth of the iterations.
    """
    variance_D, axes_DD = torch.linalg.eigh(x_MD.T @ x_MD)
    variance_D = variance_D.clamp(min=torch.finfo(variance_D.dtype).eps * max(variance_D.max().item(), 1.0))
    return axes_DD, (CURVATURE / num_classes * variance_D + regulariser).rsqrt()


class _Problem:
    """Mean cross-entropy + sum(penalty_D / 2 * weight^2) / samples, and its gradient by hand and in blocks: logits of
    all samples at once would not fit. From zero."""

    def __init__(self, x_MD: Tensor, classes_M: Tensor, num_classes: int, penalty_D: Tensor) -> None:
        self.x_MD, self.classes_M, self.penalty_D = x_MD, classes_M, penalty_D
        self.weight_CD1 = torch.zeros(num_classes, x_MD.shape[1] + 1, dtype=x_MD.dtype, device=x_MD.device)

    @property
    def gradient_CD1(self) -> Tensor:
        assert self.weight_CD1.grad is not None
        return self.weight_CD1.grad

    def loss(self) -> Tensor:
        """With the gradient as a side effect, which is what torch's optimizers want of a closure."""
        samples, classes = len(self.x_MD), len(self.weight_CD1)
        weight_CD = self.weight_CD1[:, :-1]
        loss = (self.penalty_D * weight_CD.square()).sum() / 2
        gradient = torch.zeros_like(self.weight_CD1)
        gradient[:, :-1] = self.penalty_D * weight_CD
        for x_BD, classes_B in zip(self.x_MD.split(BLOCK_ROWS), self.classes_M.split(BLOCK_ROWS), strict=True):
            log_p_BC = F.log_softmax(F.linear(x_BD, weight_CD, self.weight_CD1[:, -1]), dim=1)
            loss = loss + F.nll_loss(log_p_BC, classes_B, reduction="sum")
            error_BC = log_p_BC.exp() - F.one_hot(classes_B, classes)
            gradient[:, :-1] += error_BC.T @ x_BD
            gradient[:, -1] += error_BC.sum(dim=0)
        self.weight_CD1.grad = gradient / samples
        return loss / samples


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
    train: Features,
    test: Features,
    *,
    regulariser: float | None = None,
    standardise: bool = True,
    held_out: float = HELD_OUT,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Accuracy of a linear classifier on pooled features, JSON-ready. `regulariser` spares the search for one.

    The best of the search has the most held-out samples right; of equals, the least held-out loss, to LOSS_DIGITS; of
    equals in that too it is the strongest. Draws nothing.
    Raises UserError, see `match_labels` and `hold_out`.
    """
    if train.kind != "pooled":
        raise ValueError(f"a linear probe takes pooled features, not {train.kind}")
    labels = match_labels(train, test)
    options: dict[str, Any] = {"standardise": standardise, "device": device}
    sweep: dict[float, tuple[float, float]] = {}
    if regulariser is None:
        parts = hold_out(labels.train, held_out)
        best, sweep = search(lambda exponent: _held_out_score(train, labels, parts, 10**exponent, options))
        regulariser = 10**best
    model = _fit_split(train, labels.train, labels, regulariser, options)
    places_M = ranks(model.logits(test.values[labels.test.rows]), labels.test.classes_M)
    return {
        **accuracy(places_M, len(labels.names)),
        **per_class(places_M, labels.test.classes_M, labels.names),
        **labels.summary(),
        "regulariser": regulariser,
        "standardised": standardise,
        "converged": model.converged,
        "sweep": [{"regulariser": 10**exponent, "held_out_top1": top1} for exponent, (top1, _) in sweep.items()],
    }


def _fit_split(
    features: Features, split: Split, labels: Labels, regulariser: float, options: dict[str, Any]
) -> LinearModel:
    return fit(features.values[split.rows], split.classes_M, len(labels.names), regulariser, **options)


def _held_out_score(
    features: Features, labels: Labels, parts: tuple[Split, Split], regulariser: float, options: dict[str, Any]
) -> tuple[float, float]:
    """(share right, minus mean cross-entropy)."""
    to_fit, held = parts
    searching = {**options, "tolerance": SEARCH_TOLERANCE, "max_iterations": SEARCH_ITERATIONS}
    model = _fit_split(features, to_fit, labels, regulariser, searching)
    logits_MC = model.logits(features.values[held.rows])
    top1 = (ranks(logits_MC, held.classes_M) == 0).double().mean().item()
    return top1, -round(F.cross_entropy(logits_MC, held.classes_M).item(), LOSS_DIGITS)
