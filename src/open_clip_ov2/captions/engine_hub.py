"""Captions by models of the hub (`image-text-to-text`), in transformers or by vLLM on a GPU.

transformers: CPU, Apple's GPUs, one NVIDIA GPU; plain batches with padding on the left, since its continuous batching
takes no pictures. vLLM's weak place is the host, which prepares pictures one by one: they come at the size that the
model sees, one to a prompt, without a cache that nothing would be found in, and about a thousand requests at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image

from open_clip_ov2.captions.engines import Request
from open_clip_ov2.core.generate import RowSampler
from open_clip_ov2.errors import UserError, first_line, from_extra, naming
from open_clip_ov2.training import default_device

INSTRUCTION = "Describe the image in one paragraph."
WITH_TEXT = f"{INSTRUCTION} Its alt-text, which may be wrong or incomplete, is: {{text}}"
MAX_TOKENS = 128  # as ReCap-DataComp-1B (arXiv 2406.08478)
# Of vllm.LLM (0.32 and newer).
LLM_OPTIONS = {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0, "trust_remote_code": False}


class TransformersEngine:
    """`image_size`: short side in px to which pictures are reduced before the model's own processor sees them."""

    batch_size, with_text, without = 16, WITH_TEXT, INSTRUCTION

    def __init__(self, model: str, device: str | None, max_tokens: int | None, image_size: int | None) -> None:
        self.model, self._image_size = model, image_size
        with naming("--device"):
            self._device = default_device(device)
        self._max_tokens = max_tokens or MAX_TOKENS
        self._processor = open_processor(model)
        opened = _opened(model, "AutoModelForImageTextToText", torch_dtype="auto")
        self._model = opened.to(self._device).eval()
        self.special = special_texts(self._processor)

    @torch.no_grad()
    def captions(self, requests: Sequence[Request]) -> list[str]:
        batch = self._processor(
            images=[_small(request.image, self._image_size) for request in requests],
            text=[_conversation(self._processor, request.prompt) for request in requests],
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


class VllmEngine:
    """`image_size`: short side in px (default: that of the model's processor, if it is fixed)."""

    batch_size, with_text, without = 1000, WITH_TEXT, INSTRUCTION

    def __init__(self, model: str, device: str | None, max_tokens: int | None, image_size: int | None) -> None:
        with from_extra("vllm", "--engine vllm"):
            import vllm
        self.model = model
        self._processor = open_processor(model)
        self.special = special_texts(self._processor)
        self._image_size, self._max_tokens = image_size or _seen_size(self._processor), max_tokens or MAX_TOKENS
        self._sampling_params, self._llm = vllm.SamplingParams, vllm.LLM(model=model, **LLM_OPTIONS)

    def captions(self, requests: Sequence[Request]) -> list[str]:
        prompts = [text_prompt(self._processor, request, self._image_size) for request in requests]
        sampling = [self._sampling_params(**sampling_options(request, self._max_tokens)) for request in requests]
        return [done.outputs[0].text.strip() for done in self._llm.generate(prompts, sampling, use_tqdm=False)]


def text_prompt(processor: Any, request: Request, image_size: int | None) -> dict[str, Any]:
    """A vllm.inputs.TextPrompt."""
    image = _small(request.image, image_size)
    return {"prompt": _conversation(processor, request.prompt), "multi_modal_data": {"image": image}}


def sampling_options(request: Request, max_tokens: int) -> dict[str, Any]:
    """Arguments of vllm.SamplingParams; a temperature of 0 is greedy there."""
    row = request.sampling
    if row.top_k == 1:
        return {"temperature": 0.0, "max_tokens": max_tokens}
    return {"temperature": row.temperature, "top_k": row.top_k, "seed": row.seed, "max_tokens": max_tokens}


def _opened(model: str, kind: str, **options: Any) -> Any:
    """What a class of transformers makes of a model of the hub. Raises UserError."""
    try:
        import transformers

        return getattr(transformers, kind).from_pretrained(model, trust_remote_code=False, **options)
    except Exception as error:  # OSError, ValueError, safetensors' and the hub's own
        raise UserError(f"--model {model}: transformers' {kind} cannot open it ({first_line(error)})") from error


def open_processor(model: str) -> Any:
    """The processor of a model of the hub, which pads on the left. Raises UserError."""
    processor = _opened(model, "AutoProcessor")
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


def _conversation(processor: Any, prompt: str) -> str:
    """The prompt as the model's chat template has it, after the image; without a template, after its placeholder."""
    if getattr(processor, "chat_template", None):
        content = [{"type": "image"}, {"type": "text", "text": prompt}]
        text: str = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        bos = processor.tokenizer.bos_token
        adds_it = processor.tokenizer("a").input_ids[:1] == [processor.tokenizer.bos_token_id]
        return text.removeprefix(bos) if bos and adds_it else text
    return f"{getattr(processor, 'image_token', '')}\n{prompt}".strip()


def _small(image: Image.Image, short_side: int | None) -> Image.Image:
    """The image with at most this short side in px, its proportions kept."""
    side = min(image.size)
    if short_side is None or side <= short_side:
        return image
    width, height = (max(1, round(length * short_side / side)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _seen_size(processor: Any) -> int | None:
    """The short side in px to which a processor of transformers resizes pictures; None if it is not fixed."""
    size = dict(getattr(processor.image_processor, "size", None) or {})
    sides = [size[name] for name in ("shortest_edge", "height", "width") if size.get(name)]
    return int(max(sides)) if sides and not size.get("longest_edge") else None
