"""Classes and retrieval by cosine similarity, of models with a text tower (CLIP, arXiv 2103.00020, section 3.1).

Shapes: B batch, C classes, P templates, U different texts, D width of the joint space.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.classes import TEMPLATES, Classes, classify
from open_clip_ov2.evaluate.eval_model import Subject
from open_clip_ov2.evaluate.retrieval import Captions, both_ways, scored

DECIMALS = 6  # ours, of a cosine: some ten times what float32 resolves
TEXTS_AT_ONCE = 256  # ours: through the text tower


def zero_shot_contrastive(
    subject: Subject,
    loader: EvalLoader,
    classes: Classes | None = None,
    templates: Sequence[str] = TEMPLATES,
    *,
    world_size: int = 1,
) -> dict[str, Any]:
    """Accuracy of the nearest class, the normalised mean of its texts over templates (section 3.1.4); JSON-ready.

    `classes` as for `zero_shot_likelihood`. Raises UserError: a subject without a text tower; see `classify`.
    """
    _check(subject)
    classes = Classes.in_data(loader) if classes is None else classes
    texts_PD = _encoded(subject, classes.texts(templates))
    classes_CD = F.normalize(texts_PD.unflatten(0, (len(classes.names), len(templates))).mean(dim=1), dim=-1)
    found = classify(
        loader, classes, lambda batch: subject.contrast_images(batch.images_BCHW) @ classes_CD.T, world_size, DECIMALS
    )
    return {**found, "templates": list(templates)}


def contrastive_retrieval(subject: Subject, loader: EvalLoader, *, world_size: int = 1) -> dict[str, Any]:
    """Recall at 1, 5 and 10 both ways, from cosine similarities; JSON-ready. Every caption of a picture counts.

    Raises UserError: a subject without a text tower, fewer than two pictures or texts.
    """
    _check(subject)
    captions = Captions.of(loader)
    texts_UD = _encoded(subject, captions.texts)
    scores, _, counts = scored(
        loader, captions, lambda batch: subject.contrast_images(batch.images_BCHW) @ texts_UD.T, world_size, DECIMALS
    )
    return {**both_ways(scores), **counts}


def _encoded(subject: Subject, texts: Sequence[str]) -> Tensor:
    parts = subject.tokenize(texts).split(TEXTS_AT_ONCE)
    return torch.cat([subject.contrast_texts(ids_CL) for ids_CL in parts])


def _check(subject: Subject) -> None:
    if "contrast" not in subject.abilities:
        raise UserError(f"{subject.name} has no text tower to compare pictures with")
