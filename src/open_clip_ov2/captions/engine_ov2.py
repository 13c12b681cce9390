"""Captions by a model of ours, or any captioner that `ov2 eval` can open: anywhere, without a network."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2 import training
from open_clip_ov2.captions.engines import Request
from open_clip_ov2.data.captions import PROMPT_TEMPLATE
from open_clip_ov2.data.crop import as_batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.text.normalise import detokenized


class Ov2Engine:
    """The prompt is what the decoder has read before its first token, cut to half of the context."""

    batch_size, with_text, without = 32, PROMPT_TEMPLATE, ""

    def __init__(
        self, model: str | None, device: str | None, max_tokens: int | None, image_size: int | None = None
    ) -> None:
        if image_size is not None:
            raise UserError("--image-size is for models of the hub; ours see pictures at their own size")
        source = model or training.shipped_model()
        self._model, self._max_tokens = training.open_captioner(source, device, "--model"), max_tokens
        # Of a run its newest checkpoint, which will not be the newest for ever.
        self.model = str(self._model.checkpoint) if Path(source).exists() else source
        self.special = _special_texts(self._model.tokenizer)

    def captions(self, requests: Sequence[Request]) -> list[str]:
        preprocess = self._model.preprocess
        images_BCHW = as_batch([preprocess(request.image) for request in requests], preprocess)
        texts = self._model.generate(
            images_BCHW,
            [request.key for request in requests],
            [request.prompt for request in requests],
            sampling=[request.sampling for request in requests],
            short_prompts=True,
            max_new_tokens=self._max_tokens,
        )
        return [detokenized(text) for text in texts]


def _special_texts(tokenizer: object) -> tuple[str, ...]:
    """Of OpenCLIP's own tokenizer, and of transformers' inside its HFTokenizer; our word pieces parse none."""
    inner = getattr(tokenizer, "tokenizer", None)
    if inner is not None:
        return tuple(inner.all_special_tokens)
    texts = getattr(tokenizer, "decoder", {})
    return tuple(texts[token] for token in getattr(tokenizer, "all_special_ids", ()) if token in texts)
