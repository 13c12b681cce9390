"""OpenCLIP's CoCa at work: generation without a cache, and the likelihood of candidate captions.

Shapes: B batch, R rows of image and candidate, C candidates, c those of a chunk, N image tokens, L caption tokens,
D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from open_clip_ov2.core import IGNORE_INDEX, caption_targets
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.core.generate import CaptionStream

HEAD_BYTES = 1 << 28  # ours: logits held at once, float32


class CocaImages(NamedTuple):
    """What CoCa's forward takes in the place of images: `(B, D)`, `(B, N, D)`."""

    latent_BD: Tensor
    tokens_BND: Tensor

    def rows(self, rows: Tensor) -> CocaImages:
        return CocaImages(self.latent_BD.index_select(0, rows), self.tokens_BND.index_select(0, rows))


class CocaStream(CaptionStream):
    """OpenCLIP's CoCa generating one batch: it has no cache, so each token takes a whole forward pass."""

    def __init__(self, model: Any, images: CocaImages, ids_BT: Tensor) -> None:
        self._model, self._images, self._ids_BT = model, images, ids_BT[:, :0]
        self.advance(ids_BT)

    def advance(self, ids_BT: Tensor) -> None:
        self._ids_BT = torch.cat([self._ids_BT, ids_BT], dim=1)
        latent, tokens = self._images
        out = self._model(None, self._ids_BT, image_latent=latent, image_embs=tokens, output_labels=False)
        self.logits_BV = out["logits"][:, -1].float()

    def select(self, rows: Tensor) -> None:
        self._images, self._ids_BT = self._images.rows(rows), self._ids_BT.index_select(0, rows)
        self.logits_BV = self.logits_BV.index_select(0, rows)


def coca_nll(model: Any, compute: Compute, images: CocaImages, texts_CL: Tensor) -> Tensor:
    """Sum of the nll of each candidate given each image, `(B, C)` float32. CoCa's text tower sees no image, so each
    candidate goes through it once; candidates come in chunks whose logits for all images fit into HEAD_BYTES."""
    batch, vocab = len(images.latent_BD), model.text_decoder.text_projection.shape[1]
    # Without the padding that all candidates have.
    longest = 1 + int((caption_targets(texts_CL, compute.eos_id) != IGNORE_INDEX).sum(dim=1).max())
    found = []
    for ids_cL in texts_CL[:, :longest].split(max(1, HEAD_BYTES // (4 * batch * longest * vocab))):
        ids_cL = ids_cL.to(compute.device)
        images_RND = images.tokens_BND.repeat_interleave(len(ids_cL), dim=0)
        with compute.attention(), compute.autocast():
            words_cLD = model.text(ids_cL)[1][:, :-1]
            logits_RLV = model.text_decoder(images_RND, words_cLD.repeat(batch, 1, 1))
        labels_RL = caption_targets(ids_cL, compute.eos_id).repeat(batch, 1)
        nll_RL = nn.functional.cross_entropy(
            logits_RLV.float().flatten(0, 1), labels_RL.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
        )
        found.append(nll_RL.view(batch, len(ids_cL), -1).sum(dim=2))
    return torch.cat(found, dim=1)
