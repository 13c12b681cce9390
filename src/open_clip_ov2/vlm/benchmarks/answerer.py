"""A folder of a multimodal model as what answers the questions of `evaluate.answering`: greedy, in batches."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.quiet import quiet


class VlmAnswerer:
    """Answers batches of pictures and questions by the processor's own chat template.

    Opens any image-text-to-text model of transformers; code that comes with a folder is never run. Raises UserError.
    """

    def __init__(self, folder: Path, device: str = "cpu", dtype: str = "auto", max_new_tokens: int = 64) -> None:
        import transformers

        options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
        try:
            with quiet():
                model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options)
                self.processor: Any = transformers.AutoProcessor.from_pretrained(folder, **options)
        except Exception as error:  # OSError, ValueError, safetensors' own
            raise UserError(f"{folder}: cannot be opened as a multimodal model ({first_line(error)})") from error
        if getattr(self.processor, "chat_template", None) is None:
            raise UserError(f"{folder}: its processor has no chat template; `ov2 vlm train` writes one")
        self.model: Any = model.to(device).eval()
        self.processor.tokenizer.padding_side = "left"  # answers begin at the same place
        self.max_new_tokens = max_new_tokens
        self.answers: dict[str, str] = {}  # by the question's key

    def prompt(self, question: str) -> str:
        """The text of a conversation that asks about one picture, up to the answer."""
        content = [{"type": "image"}, {"type": "text", "text": question}]
        turns = [{"role": "user", "content": content}]
        return str(self.processor.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def __call__(self, images: Sequence[Any], keys: Sequence[str], prompts: Sequence[str]) -> list[str]:
        """`images`: PIL images in RGB."""
        batch = self.processor(
            images=list(images), text=[self.prompt(text) for text in prompts], padding=True, return_tensors="pt",
            add_special_tokens=False,  # the template has them
        )  # fmt: skip
        batch = batch.to(self.model.device, self.model.dtype)
        with quiet():
            ids = self.model.generate(**batch, do_sample=False, max_new_tokens=self.max_new_tokens)
        new = ids[:, batch["input_ids"].shape[1] :]
        texts = [text.strip() for text in self.processor.tokenizer.batch_decode(new, skip_special_tokens=True)]
        self.answers.update(zip(keys, texts, strict=True))
        return texts
