"""Classes and retrieval without training, by cosine similarity (CLIP, arXiv 2103.00020, section 3.1) or by log p(text |
image), summed over the text's tokens (CapPa, arXiv 2306.07915; big_vision, trainers/proj/cappa/predict_fns.py).

Candidates of retrieval are the different texts of the set: a text that equals one of an image's own captions is right,
whichever image it was written for. Where no two captions are equal, this is the usual recall (Karpathy and Fei-Fei
2015, arXiv 1412.2306, section 4.2). All results are JSON-ready.

Shapes: B batch, M images, C classes or candidate texts, P templates, U different texts, D width of the joint space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.data.loader import Batch, EvalLoader
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.classes import NOT_FINITE, Classes, classify, ranks
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.gathering import gathered
from open_clip_ov2.evaluate.options import EvalOptions

# Ours: scores are rounded to a few times what float32 resolves, so that equal ones are equal.
COSINE_DECIMALS = 6
LIKELIHOOD_DECIMALS = 4  # in nats, of sums of hundreds of tokens
TEXTS_AT_ONCE = 256  # ours: through the text tower
RECALL_AT = (1, 5, 10)


def zero_shot_likelihood(model: EvalModel, loader: EvalLoader, options: EvalOptions) -> dict[str, Any]:
    """Accuracy of the class whose texts are the most likely, mean of the log likelihoods over templates; by default the
    data's own labels are the names. Raises UserError, see `classify` and `Classes`."""
    classes, templates = options.classes or Classes.in_data(loader), options.templates
    texts_CL = model.tokenize(classes.texts(templates))
    log_likelihood, targets_C = _log_likelihood(model, texts_CL), model.num_targets(texts_CL)

    def scores(batch: Batch) -> Tensor:
        log_p_BC = log_likelihood(batch).double()
        if options.length_normalise:
            log_p_BC = log_p_BC / targets_C.to(log_p_BC.device)
        return log_p_BC.unflatten(1, (len(classes.names), len(templates))).mean(dim=-1)

    found = classify(loader, classes, scores, LIKELIHOOD_DECIMALS)
    return {**found, "templates": list(templates), "length_normalise": options.length_normalise}


def zero_shot_contrastive(model: EvalModel, loader: EvalLoader, options: EvalOptions) -> dict[str, Any]:
    """Accuracy of the nearest class, the normalized mean of its texts over templates (CLIP, section 3.1.4)."""
    classes, templates = options.classes or Classes.in_data(loader), options.templates
    texts_PD = _embedded(model, classes.texts(templates))
    classes_CD = F.normalize(texts_PD.unflatten(0, (len(classes.names), len(templates))).mean(dim=1), dim=-1)
    return {**classify(loader, classes, _cosine(model, classes_CD), COSINE_DECIMALS), "templates": list(templates)}


@dataclass(frozen=True)
class Captions:
    """`texts`: all different ones, by first appearance. `own`: those of each sample, by its place in the file order."""

    texts: tuple[str, ...]
    own: dict[int, set[int]]

    @classmethod
    def of(cls, loader: EvalLoader) -> Captions:
        """Every caption of the whole set. Raises UserError if it has none."""
        number: dict[str, int] = {}
        own: dict[int, set[int]] = {}
        for sample in loader.described():
            own[sample.place] = {number.setdefault(text, len(number)) for text in sample.captions}
        if not number:
            raise UserError("retrieval: the data have no captions; check --caption-keys")
        return cls(tuple(number), own)


@dataclass(frozen=True)
class Pairs:
    """All usable images of all processes in file order, with all texts of theirs: their scores `values_MU` float64,
    and which texts are right, `own_MU` bool. `texts_U`: the columns as places in `Captions.texts`, int64."""

    values_MU: Tensor
    own_MU: Tensor
    texts_U: Tensor
    not_finite: list[str]

    def counts(self) -> dict[str, Any]:
        images, texts = self.own_MU.shape
        return {"n_images": images, "n_texts": texts, "skipped": {NOT_FINITE: self.not_finite}}


def scored(loader: EvalLoader, captions: Captions, scores: Callable[[Batch], Tensor], decimals: int) -> Pairs:
    """`scores` gives `(B, all texts)` of a batch, which is rounded to `decimals`. Images whose scores are not finite
    are left out. Raises UserError if fewer than two images or texts are left."""
    rows: dict[int, tuple[str, Tensor | None]] = {}
    for batch in loader:
        for index, key, row_U in zip(batch.indices, batch.keys, scores(batch).cpu(), strict=True):
            rows[index] = key, row_U.clone() if row_U.isfinite().all() else None
    every = gathered(rows)
    used = {index: row_U for index, (_, row_U) in every.items() if row_U is not None}
    texts = sorted(set().union(*(captions.own[index] for index in used)))
    if len(used) < 2 or len(texts) < 2:
        raise UserError(f"retrieval needs two images and two different captions; found {len(used)} and {len(texts)}")
    own_MU = torch.zeros(len(used), len(captions.texts), dtype=torch.bool)
    for row, index in enumerate(used):
        own_MU[row, list(captions.own[index])] = True
    return Pairs(
        torch.stack([row_U[texts] for row_U in used.values()]).double().round(decimals=decimals),
        own_MU[:, texts],
        torch.tensor(texts),
        [key for key, row_U in every.values() if row_U is None],
    )


def places(values_MU: Tensor, own_MU: Tensor) -> Tensor:
    """The place from 0 of the first of its own texts, of each image `(M,)` int64; equal scores in the order of texts.
    Of each text with both transposed."""
    return ranks(values_MU, values_MU.masked_fill(~own_MU, -torch.inf).argmax(dim=1))


def recall(what: str, values_MU: Tensor, own_MU: Tensor) -> dict[str, float | None]:
    """`{what}_recall_at_1`, 5, 10: shares of rows with a right one among so many; None where there are no more."""
    places_M, candidates = places(values_MU, own_MU), values_MU.shape[1]
    shares = {k: (places_M < k).double().mean().item() for k in RECALL_AT if k < candidates}
    return {f"{what}_recall_at_{k}": shares.get(k) for k in RECALL_AT}


def both_ways(values_MU: Tensor, own_MU: Tensor) -> dict[str, Any]:
    return {**recall("image_to_text", values_MU, own_MU), **recall("text_to_image", values_MU.T, own_MU.T)}


def likelihood_retrieval(model: EvalModel, loader: EvalLoader, options: EvalOptions) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from log p(text | image) of all pairs. A text that is likely for any image wins
    by that alone, so image to text is also given with log p(text) subtracted, the log of the mean of p(text | image)
    over the set's own images (Lin et al. 2023, arXiv 2306.01879, alpha = 1). Raises UserError, see `scored`."""
    captions = Captions.of(loader)
    texts_UL = model.tokenize(captions.texts)
    pairs = scored(loader, captions, _log_likelihood(model, texts_UL), LIKELIHOOD_DECIMALS)
    plain_MU, corrected_MU = pairs.values_MU, pairs.values_MU - log_mean(pairs.values_MU)
    if options.length_normalise:
        targets_U = model.num_targets(texts_UL).cpu()[pairs.texts_U]
        plain_MU, corrected_MU = plain_MU / targets_U, corrected_MU / targets_U
    plain_MU, corrected_MU = (values.round(decimals=LIKELIHOOD_DECIMALS) for values in (plain_MU, corrected_MU))
    return {
        **both_ways(plain_MU, pairs.own_MU),
        **recall("image_to_text_prior_corrected", corrected_MU, pairs.own_MU),
        **pairs.counts(),
        "length_normalise": options.length_normalise,
    }


def contrastive_retrieval(model: EvalModel, loader: EvalLoader, options: EvalOptions) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from cosine similarities. Raises UserError, see `scored`."""
    captions = Captions.of(loader)
    pairs = scored(loader, captions, _cosine(model, _embedded(model, captions.texts)), COSINE_DECIMALS)
    return {**both_ways(pairs.values_MU, pairs.own_MU), **pairs.counts()}


def log_mean(scores_MU: Tensor) -> Tensor:
    """Log of the mean of the exponentials over images, `(U,)`: log p(text) where scores are log p(text | image)."""
    return scores_MU.logsumexp(dim=0) - math.log(len(scores_MU))


def _log_likelihood(model: EvalModel, texts_CL: Tensor) -> Callable[[Batch], Tensor]:
    return lambda batch: -model.nll(model.prefix(batch.images_BCHW, batch.keys), texts_CL)


def _cosine(model: EvalModel, texts_CD: Tensor) -> Callable[[Batch], Tensor]:
    return lambda batch: model.contrast_images(batch.images_BCHW) @ texts_CD.T


def _embedded(model: EvalModel, texts: Sequence[str]) -> Tensor:
    parts = model.tokenize(texts).split(TEXTS_AT_ONCE)
    return torch.cat([model.contrast_texts(ids_CL) for ids_CL in parts])
