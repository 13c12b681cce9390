"""Captions by vLLM on a GPU.

Its weak place is the host, which prepares pictures one by one: they come at the size that the model sees, one to a
prompt, without a cache that nothing would be found in, and about a thousand requests at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from open_clip_ov2.captions.engine_transformers import MAX_TOKENS, conversation, open_processor, special_texts
from open_clip_ov2.captions.engines import INSTRUCTION, WITH_TEXT, Defaults, needs, seen_size, small
from open_clip_ov2.captions.requests import Request

DEFAULTS = Defaults(batch_size=1000, with_text=WITH_TEXT, without=INSTRUCTION)
# Of vllm.LLM (0.32 and newer).
LLM_OPTIONS = {"limit_mm_per_prompt": {"image": 1}, "mm_processor_cache_gb": 0, "trust_remote_code": False}


class VllmEngine:
    """`image_size`: short side in px (default: that of the model's processor, if it is fixed)."""

    def __init__(self, model: str, max_tokens: int | None, image_size: int | None) -> None:
        try:
            import vllm
        except ModuleNotFoundError as error:
            raise needs("vllm", error) from None
        self.model = model
        self._processor = open_processor(model)
        self.special = special_texts(self._processor)
        self._image_size, self._max_tokens = image_size or seen_size(self._processor), max_tokens or MAX_TOKENS
        self._sampling_params, self._llm = vllm.SamplingParams, vllm.LLM(model=model, **LLM_OPTIONS)

    def captions(self, requests: Sequence[Request]) -> list[str]:
        prompts = [text_prompt(self._processor, request, self._image_size) for request in requests]
        sampling = [self._sampling_params(**sampling_options(request, self._max_tokens)) for request in requests]
        return [done.outputs[0].text.strip() for done in self._llm.generate(prompts, sampling, use_tqdm=False)]


def text_prompt(processor: Any, request: Request, image_size: int | None) -> dict[str, Any]:
    """A vllm.inputs.TextPrompt."""
    image = small(request.image, image_size)
    return {"prompt": conversation(processor, request.prompt), "multi_modal_data": {"image": image}}


def sampling_options(request: Request, max_tokens: int) -> dict[str, Any]:
    """Arguments of vllm.SamplingParams; a temperature of 0 is greedy there."""
    chosen = request.sampling
    if chosen.top_k == 1:
        return {"temperature": 0.0, "max_tokens": max_tokens}
    return {
        "temperature": chosen.temperature, "top_k": chosen.top_k, "seed": chosen.seed, "max_tokens": max_tokens,
    }  # fmt: skip
