"""Conversations to batches: pictures are decoded here, in the data workers, and labels are what the template marks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers.trainer_pt_utils import LengthGroupedSampler
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from open_clip_ov2.data.decode import bounded, decode_image
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.errors import UserError


def load_picture(path: str) -> Image.Image:
    """The picture, upright and in RGB. Raises UserError."""
    try:
        return bounded(decode_image(Path(path).read_bytes()))
    except (OSError, SkipSample) as error:
        raise UserError(
            f"{path}: cannot be decoded ({error}); mend it, or remove it, and its rows are left out"
        ) from error


class ConversationCollator(DataCollatorForVisionLanguageModeling):
    """TRL's collator, which puts the pictures' tokens in and masks all but the answers.

    A conversation longer than `longest` tokens is cut on the right, as in LLaVA, but never within its pictures: that
    raises UserError.
    """

    def __init__(self, processor: Any, longest: int) -> None:
        super().__init__(processor=processor, max_length=None, assistant_only_loss=True)
        self.longest = longest

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        loaded = [{**row, "images": [load_picture(path) for path in row["images"]]} for row in examples]
        batch: dict[str, Any] = super().torch_call(loaded)
        cut = batch["input_ids"][:, self.longest :] == self.processor.image_token_id
        if bool(cut.any()):
            row = int(cut.any(dim=1).nonzero()[0])
            place = 1 + int((batch["input_ids"][row] == self.processor.image_token_id).nonzero()[-1])
            raise UserError(
                f"conversation with {', '.join(examples[row]['images'])}: its pictures end at token {place:,}, and "
                f"max-length is {self.longest:,}; raise max-length in the recipe, or leave the conversation out"
            )
        for name in ("input_ids", "attention_mask", "labels"):
            batch[name] = batch[name][:, : self.longest]
        return batch


class GroupedByLength(LengthGroupedSampler):
    """Conversations of similar length together, in an order that follows from seed and epoch, so that a resumed run has
    it too."""

    def __init__(self, lengths: list[int], batch: int, seed: int) -> None:
        super().__init__(batch, lengths=lengths, generator=torch.Generator())
        self._seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        self.generator.manual_seed(self._seed + epoch)
