"""What an evaluation needs of a model, whatever its architecture.

Shapes: B batch, C candidates, N image tokens, L caption tokens, D width (evaluate/__init__.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from open_clip_ov2.core.native import Images

Ability = Literal["features", "caption", "contrast", "dropping", "resizing"]
# What a model lacks that does not have an ability, for error messages.
LACKS: dict[Ability, str] = {
    "features": "image features",
    "caption": "caption decoder",
    "contrast": "text tower to compare images with",
    "dropping": "token dropping",
    "resizing": "other resolution while it is in training",
}


class EvalModel(Protocol):
    """A model under evaluation, in evaluation mode. What it cannot do is not in `abilities`, and is not called.

    `keys` are the samples' keys: which tokens of an image are kept is a function of its key, so that neither batch size
    nor number of processes changes a result.
    """

    @property
    def name(self) -> str: ...

    @property
    def abilities(self) -> frozenset[Ability]: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def preprocess(self) -> Callable[[Any], Tensor]:
        """PIL image -> `(3, H, W)`. One that keeps the shape of images gives NativeImages (core/native.py)."""

    @property
    def tokenizer(self) -> Any:
        """Of captions, as the data loader takes it; None without "caption" and "contrast"."""

    @property
    def checkpoint(self) -> Path | None:
        """The file or folder with its weights; None for a model in training."""

    def pooled(self, images_BCHW: Images) -> Tensor:
        """For "features": one vector an image, `(B, D)` float32, not normalized."""

    def tokens(self, images_BCHW: Images, layer: int = -1) -> Tensor:
        """For "features": all patch tokens after a block, counted from the end, `(B, N, D)` float32. Raises UserError
        if the encoder has none."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """For "caption" and "contrast": ids `(C, L)` int64 on the CPU, as the model was trained with."""

    def loss_sums(self, images_BCHW: Images, texts_BL: Tensor, keys: Sequence[str]) -> tuple[float, float]:
        """For "caption": (nll of all real targets in nats, number of targets), of each image's own caption."""

    def prefix(self, images_BCHW: Images, keys: Sequence[str]) -> Any:
        """For "caption": what the decoder needs of the images, computed once for any number of candidates."""

    def nll(self, prefix: Any, texts_CL: Tensor) -> Tensor:
        """For "caption": sum of the nll of each candidate's real targets given each image, `(B, C)` float32, nats."""

    def num_targets(self, texts_CL: Tensor) -> Tensor:
        """For "caption": real target tokens of each candidate, `(C,)` int64."""

    def generate(
        self, images_BCHW: Images, keys: Sequence[str], prompts: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """For "caption": generated captions, or the text after each prompt; options as for CaptionModel.generate. With
        `num_captions`, as many for each image, side by side."""

    def contrast_images(self, images_BCHW: Images) -> Tensor:
        """For "contrast": normalized, `(B, D)` float32."""

    def contrast_texts(self, texts_CL: Tensor) -> Tensor:
        """For "contrast": normalized, `(C, D)` float32."""

    def with_keep_ratio(self, keep_ratio: float) -> EvalModel:
        """For "dropping": the same model, which keeps this share of its image tokens. Raises UserError if that leaves
        none."""

    def kept(self, keys: Sequence[str], grid: tuple[int, int] | None = None) -> Tensor:
        """For "dropping": which patches the decoder sees, `(B, rows, columns)` bool on the CPU; of images that keep
        their shapes, at this grid."""

    def with_image_size(self, image_size: int) -> EvalModel:
        """For "resizing": the model opened anew at this resolution in px."""


def lacking(name: str, abilities: frozenset[Ability], needed: Iterable[Ability]) -> str | None:
    """What a model lacks of what is needed, as the end of an error message; None if nothing."""
    missing = [LACKS[ability] for ability in needed if ability not in abilities]
    return f"{name} has no {' and no '.join(missing)}" if missing else None
