"""Classes and retrieval without training, by one of two scores of a text and an image.

    cosine       similarity of the embeddings of models with a text tower (CLIP, arXiv 2103.00020, section 3.1)
    likelihood   log p(text | image): the sum over the text's tokens, end of text included, of log p(token | tokens
                 before, image), not divided by the length (CapPa, arXiv 2306.07915; big_vision,
                 trainers/proj/cappa/predict_fns.py)

Shapes: B batch, C classes or candidate texts, P templates, U different texts, D width of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.classes import TEMPLATES, Classes, classify
from open_clip_ov2.evaluate.eval_model import Ability, EvalModel, lacking
from open_clip_ov2.evaluate.retrieval import Captions, both_ways, log_mean, places_of_texts, recall, scored

# Ours: scores are rounded to a few times what float32 resolves, so that equal ones are equal.
COSINE_DECIMALS = 6
LIKELIHOOD_DECIMALS = 4  # in nats, of sums of hundreds of tokens
TEXTS_AT_ONCE = 256  # ours: through the text tower


def zero_shot_likelihood(
    model: EvalModel,
    loader: EvalLoader,
    classes: Classes | None = None,
    templates: Sequence[str] = TEMPLATES,
    *,
    length_normalise: bool = False,
    world_size: int = 1,
) -> dict[str, Any]:
    """Accuracy of the class whose texts are the most likely, mean of the log likelihoods over templates; JSON-ready.

    `classes`: by default the data's own labels are the names. `length_normalise`: nats per token instead of per text.
    Raises UserError: a model that cannot caption; see `classify`, `Classes`.
    """
    _check(model, "caption")
    classes = Classes.in_data(loader) if classes is None else classes
    texts_CL = model.tokenize(classes.texts(templates))
    targets_C = model.num_targets(texts_CL)

    def scores(batch: Batch) -> Tensor:
        log_p_BC = _log_likelihood(model, batch, texts_CL).double()
        if length_normalise:
            log_p_BC = log_p_BC / targets_C.to(log_p_BC.device)
        return log_p_BC.unflatten(1, (len(classes.names), len(templates))).mean(dim=-1)

    found = classify(loader, classes, scores, world_size, LIKELIHOOD_DECIMALS)
    return {**found, "templates": list(templates), "length_normalise": length_normalise}


def zero_shot_contrastive(
    model: EvalModel,
    loader: EvalLoader,
    classes: Classes | None = None,
    templates: Sequence[str] = TEMPLATES,
    *,
    world_size: int = 1,
) -> dict[str, Any]:
    """Accuracy of the nearest class, the normalized mean of its texts over templates (CLIP, section 3.1.4); JSON-ready.

    `classes` as for `zero_shot_likelihood`. Raises UserError: a model without a text tower; see `classify`.
    """
    _check(model, "contrast")
    classes = Classes.in_data(loader) if classes is None else classes
    texts_PD = _embedded(model, classes.texts(templates))
    classes_CD = F.normalize(texts_PD.unflatten(0, (len(classes.names), len(templates))).mean(dim=1), dim=-1)

    def scores(batch: Batch) -> Tensor:
        return model.contrast_images(batch.images_BCHW) @ classes_CD.T

    return {**classify(loader, classes, scores, world_size, COSINE_DECIMALS), "templates": list(templates)}


def likelihood_retrieval(
    model: EvalModel, loader: EvalLoader, *, length_normalise: bool = False, world_size: int = 1
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from log p(text | image) of all pairs; JSON-ready.

    A text that is likely for any image wins by that alone. Therefore image to text is also given with log p(text)
    subtracted, the log of the mean of p(text | image) over the set's own images (Lin et al. 2023, arXiv 2306.01879,
    alpha = 1); text to image does not change by that. Every caption of an image counts.
    Raises UserError: a model that cannot caption, fewer than two images or texts.
    """
    _check(model, "caption")
    captions = Captions.of(loader)
    texts_UL = model.tokenize(captions.texts)
    scores, chosen_U, counts = scored(
        loader, captions, lambda batch: _log_likelihood(model, batch, texts_UL), world_size, LIKELIHOOD_DECIMALS
    )
    corrected_mU = scores.values_mU - log_mean(scores)
    plain_mU = scores.values_mU
    if length_normalise:
        targets_U = model.num_targets(texts_UL).cpu()[chosen_U]
        plain_mU, corrected_mU = plain_mU / targets_U, corrected_mU / targets_U
    places = places_of_texts(scores.changed(corrected_mU))
    return {
        **both_ways(scores.changed(plain_mU)),
        **recall("image_to_text_prior_corrected", torch.tensor(list(places.values())), len(chosen_U)),
        **counts,
        "length_normalise": length_normalise,
    }


def contrastive_retrieval(model: EvalModel, loader: EvalLoader, *, world_size: int = 1) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from cosine similarities; JSON-ready. Every caption of an image counts.

    Raises UserError: a model without a text tower, fewer than two images or texts.
    """
    _check(model, "contrast")
    captions = Captions.of(loader)
    texts_UD = _embedded(model, captions.texts)
    scores, _, counts = scored(
        loader, captions, lambda batch: model.contrast_images(batch.images_BCHW) @ texts_UD.T, world_size,
        COSINE_DECIMALS,
    )  # fmt: skip
    return {**both_ways(scores), **counts}


def _log_likelihood(model: EvalModel, batch: Batch, texts_CL: Tensor) -> Tensor:
    return -model.nll(model.prefix(batch.images_BCHW, batch.keys), texts_CL)


def _embedded(model: EvalModel, texts: Sequence[str]) -> Tensor:
    parts = model.tokenize(texts).split(TEXTS_AT_ONCE)
    return torch.cat([model.contrast_texts(ids_CL) for ids_CL in parts])


def _check(model: EvalModel, needed: Ability) -> None:
    lacks = lacking(model.name, model.abilities, [needed])
    if lacks:
        raise UserError(lacks)
