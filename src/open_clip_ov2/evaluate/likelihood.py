"""Classes and retrieval by likelihood: the text that a caption model would most probably write of a picture.

    score(text | picture) = sum over the text's tokens, end of text included, of log p(token | tokens before, picture)

Source: CapPa (Tschannen et al. 2023, arXiv 2306.07915; big_vision, trainers/proj/cappa/predict_fns.py): the sum, not
divided by the length.

Shapes: B batch, C candidate texts, P templates, U different texts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.data.loader import Batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.classes import TEMPLATES, Classes, classify
from open_clip_ov2.evaluate.eval_model import Subject
from open_clip_ov2.evaluate.retrieval import Captions, both_ways, log_mean, places_of_texts, recall, scored

# Ours. Of a score in nats; a few times what float32 resolves in a sum of hundreds, so that equals are equal.
DECIMALS = 4


def zero_shot_likelihood(
    subject: Subject,
    loader: EvalLoader,
    classes: Classes | None = None,
    templates: Sequence[str] = TEMPLATES,
    *,
    length_normalise: bool = False,
    world_size: int = 1,
) -> dict[str, Any]:
    """Accuracy of the class whose texts are the most likely, mean of the log likelihoods over templates; JSON-ready.

    `classes`: by default the data's own labels, which then are the words. `length_normalise`: nats a token instead of
    a text. Raises UserError: a subject that cannot caption; see `classify`, `Classes`.
    """
    _check(subject)
    classes = Classes.in_data(loader) if classes is None else classes
    texts_CL = subject.tokenize(classes.texts(templates))
    targets_C = subject.num_targets(texts_CL)

    def scores(batch: Batch) -> Tensor:
        log_p_BC = -_nll(subject, batch, texts_CL).double()
        if length_normalise:
            log_p_BC = log_p_BC / targets_C.to(log_p_BC.device)
        return log_p_BC.unflatten(1, (len(classes.names), len(templates))).mean(dim=-1)

    found = classify(loader, classes, scores, world_size, DECIMALS)
    return {**found, "templates": list(templates), "length_normalise": length_normalise}


def likelihood_retrieval(
    subject: Subject,
    loader: EvalLoader,
    *,
    length_normalise: bool = False,
    world_size: int = 1,
) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from log p(text | picture) of all pairs; JSON-ready.

    A text that is likely of any picture wins by that alone, so beside picture to text there is the same with
    log p(text) taken off, the log of the mean of p(text | picture) over the set's own pictures (Lin et al. 2023,
    arXiv 2306.01879, with alpha = 1). From text to picture that changes nothing. Every caption of a picture counts.
    Raises UserError: a subject that cannot caption, fewer than two pictures or texts.
    """
    _check(subject)
    captions = Captions.of(loader)
    texts_UL = subject.tokenize(captions.texts)
    scores, chosen_U, counts = scored(
        loader, captions, lambda batch: -_nll(subject, batch, texts_UL), world_size, DECIMALS
    )
    corrected_mU = scores.values_mU - log_mean(scores)
    plain_mU = scores.values_mU
    if length_normalise:
        targets_U = subject.num_targets(texts_UL).cpu()[chosen_U]
        plain_mU, corrected_mU = plain_mU / targets_U, corrected_mU / targets_U
    places = places_of_texts(scores.changed(corrected_mU))
    return {
        **both_ways(scores.changed(plain_mU)),
        **recall("image_to_text_prior_corrected", torch.tensor(list(places.values())), len(chosen_U)),
        **counts,
        "length_normalise": length_normalise,
    }


def _nll(subject: Subject, batch: Batch, texts_CL: Tensor) -> Tensor:
    return subject.nll(subject.prefix(batch.images_BCHW, batch.keys), texts_CL)


def _check(subject: Subject) -> None:
    if "caption" not in subject.abilities:
        raise UserError(f"{subject.name} cannot caption, so it has no likelihood of a text")
