"""What a picture is worth for its caption: (log p(caption | picture) - log p(caption)) / tokens, in nats per token.

p(caption) is the mean of p(caption | other picture) over the other pictures of its group, GROUP in all. A caption that
fits any picture has a gap of about 0, one that tells of another picture a gap below that.

Shapes: B pictures of a group, as many captions.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2 import training
from open_clip_ov2.core.native import Images
from open_clip_ov2.data.crop import as_batch
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.evaluate.eval_model import EvalModel

GROUP = 8  # ours: the decoder's work grows with it, and log p(caption) is an average over 7 pictures


class Gaps:
    """Collects captions with their samples and writes the score of each into its line."""

    def __init__(self, model: str, device: str | None) -> None:
        self._model = training.open_captioner(model, device, "--score")
        self._decoder = Decoder(self._model.preprocess, ())
        self._rows: list[tuple[dict[str, Any], Tensor, str]] = []
        self._scored: list[tuple[dict[str, Any], float]] = []

    def add(self, line: dict[str, Any], sample: Mapping[str, Any], text: str) -> None:
        """A sample whose picture cannot be used gets no score."""
        try:
            self._rows.append((line, self._decoder.pixels(sample), text))
        except SkipSample:
            return
        if len(self._rows) == 2 * GROUP:  # so that the last group has at least two
            self._score(GROUP)

    def finish(self, name: str) -> None:
        """Score what is left and write all scores under this name. A caption that is alone gets none."""
        while len(self._rows) > 1:
            self._score(len(self._rows) if len(self._rows) <= GROUP + 1 else GROUP)
        for line, gap in self._scored:
            line[name] = round(gap, 4)
        self._rows, self._scored = [], []

    def _score(self, count: int) -> None:
        rows, self._rows = self._rows[:count], self._rows[count:]
        images_BCHW = as_batch([pixels for _, pixels, _ in rows], self._model.preprocess)
        found = gaps(self._model, images_BCHW, [line["key"] for line, _, _ in rows], [text for _, _, text in rows])
        self._scored += zip((line for line, _, _ in rows), found.tolist(), strict=True)


def gaps(model: EvalModel, images_BCHW: Images, keys: list[str], texts: list[str]) -> Tensor:
    """`(B,)` float64: the gap of each picture's caption, in nats per token, the end of the text among them."""
    ids_BL = model.tokenize(texts)
    log_p_BB = -model.nll(model.prefix(images_BCHW, keys), ids_BL).double().cpu()  # picture, caption
    own_B = log_p_BB.diagonal()
    others_BB = log_p_BB.masked_fill(torch.eye(len(texts), dtype=torch.bool), -math.inf)
    of_text_B = others_BB.logsumexp(dim=0) - math.log(len(texts) - 1)
    return (own_B - of_text_B) / model.num_targets(ids_BL).double()
