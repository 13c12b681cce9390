"""What an evaluation needs of a model, whichever family it is of, and of the processes it runs on.

Shapes: B batch, C candidates, N image tokens, L caption tokens, D width (evaluate/__init__.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor

Ability = Literal["features", "caption", "contrast"]
Value = TypeVar("Value")


class Subject(Protocol):
    """A model in evaluation mode. What it cannot do is not in `abilities`, and is not called.

    `keys` are the samples' keys: what is drawn for a sample (which tokens are kept) is a function of its key, so that
    neither batch size nor number of processes changes a result.
    """

    @property
    def name(self) -> str: ...

    @property
    def abilities(self) -> frozenset[Ability]: ...

    @property
    def device(self) -> torch.device: ...

    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """For "features": one vector an image, `(B, D)` float32, not normalised."""

    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """For "features": all patch tokens, `(B, N, D)` float32."""

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        """For "caption" and "contrast": ids `(C, L)` int64 on the CPU, as the model was trained with."""

    def prefix(self, images_BCHW: Tensor, keys: Sequence[str]) -> Any:
        """For "caption": what the decoder needs of the images, computed once for any number of candidates."""

    def nll(self, prefix: Any, texts_CL: Tensor) -> Tensor:
        """For "caption": sum of the nll of each candidate's real targets given each image, `(B, C)` float32, nats."""

    def num_targets(self, texts_CL: Tensor) -> Tensor:
        """For "caption": real target tokens of each candidate, `(C,)` int64."""

    def generate(
        self, images_BCHW: Tensor, keys: Sequence[str], prompts: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """For "caption": generated captions, or the text after each prompt; options as for CaptionModel.generate."""

    def contrast_images(self, images_BCHW: Tensor) -> Tensor:
        """For "contrast": normalised, `(B, D)` float32."""

    def contrast_texts(self, texts_CL: Tensor) -> Tensor:
        """For "contrast": normalised, `(C, D)` float32."""


def all_gathered(mine: Value, world_size: int) -> list[Value]:
    """What every process has, in the order of their ranks."""
    everyone: list[Any] = [mine]
    if world_size > 1:
        everyone = [None] * world_size
        torch.distributed.all_gather_object(everyone, mine)
    return everyone


def gathered(rows: dict[int, Value], world_size: int) -> dict[int, Value]:
    """Results by a sample's place in the file order (`Batch.indices`) from all processes, in that order: the same on
    any number of them. Every process gets all. Raises ValueError if a sample was evaluated twice.
    """
    parts = all_gathered(rows, world_size)
    merged = {index: value for part in parts for index, value in part.items()}
    if len(merged) != sum(map(len, parts)):
        raise ValueError("two processes evaluated the same sample")
    return {index: merged[index] for index in sorted(merged)}
