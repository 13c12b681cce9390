"""Captions by a model of the hub in transformers (`image-text-to-text`): CPU, Apple's GPUs, one NVIDIA GPU.

Plain batches with padding on the left. transformers' continuous batching takes no pictures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from open_clip_ov2.captions.engines import INSTRUCTION, WITH_TEXT, Defaults, small
from open_clip_ov2.captions.requests import Request
from open_clip_ov2.core.generate import RowSampler
from open_clip_ov2.errors import UserError, first_line

DEFAULTS = Defaults(batch_size=16, with_text=WITH_TEXT, without=INSTRUCTION)
MAX_TOKENS = 128  # as ReCap-DataComp-1B (arXiv 2406.08478)


class TransformersEngine:
    """`image_size`: short side in px to which pictures are reduced before the model's own processor sees them."""

    def __init__(self, model: str, device: str | None, max_tokens: int | None, image_size: int | None) -> None:
        self.model, self._image_size = model, image_size
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._max_tokens = max_tokens or MAX_TOKENS
        self._processor = open_processor(model)
        self._model = _open(model).to(self._device).eval()
        self.special = special_texts(self._processor)

    @torch.no_grad()
    def captions(self, requests: Sequence[Request]) -> list[str]:
        batch = self._processor(
            images=[small(request.image, self._image_size) for request in requests],
            text=[conversation(self._processor, request.prompt) for request in requests],
            return_tensors="pt",
            padding=True,
        ).to(self._device)
        if "pixel_values" in batch:
            batch["pixel_values"] = batch["pixel_values"].to(self._model.dtype)
        ids_BT = self._model.generate(
            **batch,
            do_sample=False,
            num_beams=1,
            max_new_tokens=self._max_tokens,
            logits_processor=[RowSampler([request.sampling for request in requests])],
        )
        if not self._model.config.is_encoder_decoder:
            ids_BT = ids_BT[:, batch["input_ids"].shape[1] :]
        return [text.strip() for text in self._processor.batch_decode(ids_BT, skip_special_tokens=True)]


def _open(model: str) -> Any:
    try:
        from transformers import AutoModelForImageTextToText

        return AutoModelForImageTextToText.from_pretrained(model, torch_dtype="auto", trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, safetensors' and the hub's own
        raise UserError(f"--model {model}: transformers cannot open it ({first_line(error)})") from error


def open_processor(model: str) -> Any:
    """The processor of a model of the hub, which pads on the left. Raises UserError."""
    from transformers import AutoProcessor

    try:
        processor = AutoProcessor.from_pretrained(model, trust_remote_code=False)
    except Exception as error:
        raise UserError(f"--model {model}: transformers cannot open its processor ({first_line(error)})") from error
    tokenizer = getattr(processor, "tokenizer", None)
    if tokenizer is None or getattr(processor, "image_processor", None) is None:
        raise UserError(f"--model {model}: a {type(processor).__name__} takes no pair of picture and text")
    tokenizer.padding_side = "left"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return processor


def special_texts(processor: Any) -> tuple[str, ...]:
    """What a tokenizer would not read as text, the image's placeholder among it; longest first."""
    tokenizer = processor.tokenizer
    found = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab(), str(getattr(processor, "image_token", ""))}
    return tuple(sorted((text for text in found if text.strip()), key=lambda text: (-len(text), text)))


def conversation(processor: Any, prompt: str) -> str:
    """The prompt as the model's chat template has it, after the image; without a template, after its placeholder."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        return text
    return f"{getattr(processor, 'image_token', '')}\n{prompt}".strip()
