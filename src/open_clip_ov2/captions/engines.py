"""The models that write captions, behind one interface."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from PIL import Image

from open_clip_ov2.captions.requests import Request
from open_clip_ov2.errors import UserError

OV2, TRANSFORMERS, VLLM = "ov2", "transformers", "vllm"
ENGINES = (OV2, TRANSFORMERS, VLLM)


class Engine(Protocol):
    """A model that is open. Equal requests in equal batches give equal captions."""

    @property
    def model(self) -> str:
        """What the settings of a set call it: where its weights are."""

    @property
    def special(self) -> Sequence[str]:
        """Strings that its tokenizer takes for something else than text."""

    def captions(self, requests: Sequence[Request]) -> list[str]:
        """One for each request. May raise anything for a request that it cannot take."""


@dataclass(frozen=True)
class Defaults:
    """What an engine takes where a flag is not given. `with_text` has `{text}` in it."""

    batch_size: int
    with_text: str
    without: str


INSTRUCTION = "Describe the image in one paragraph."
WITH_TEXT = f"{INSTRUCTION} Its alt-text, which may be wrong or incomplete, is: {{text}}"


def engine_of(engine: str | None, model: str | None) -> str:
    """The engine that is asked for: `ov2` for models of ours, which are the default, else transformers. Raises
    UserError."""
    if engine is not None:
        if model is None and engine != OV2:
            raise UserError(f"--engine {engine}: name its model with --model, for example llava-hf/llava-1.5-7b-hf")
        return engine
    if model is None or _is_ours(model):
        return OV2
    return TRANSFORMERS


def _is_ours(model: str) -> bool:
    """A run, a checkpoint, an exported folder or NAME:TAG of OpenCLIP's registry."""
    path = Path(model)
    if path.is_dir():
        return (path / "open_clip_config.json").is_file() or not (path / "config.json").is_file()
    return path.is_file() or ":" in model


def small(image: Image.Image, short_side: int | None) -> Image.Image:
    """The image with at most this short side in px, its proportions kept."""
    side = min(image.size)
    if short_side is None or side <= short_side:
        return image
    width, height = (max(1, round(length * short_side / side)) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def needs(extra: str, error: ModuleNotFoundError) -> UserError:
    return UserError(f"--engine {extra} needs {error.name}: pip install 'open_clip_ov2[{extra}]'")


def seen_size(processor: Any) -> int | None:
    """The short side in px to which a processor of transformers resizes pictures; None if it is not fixed."""
    size = getattr(getattr(processor, "image_processor", None), "size", None) or {}
    found = [dict(size).get(name) for name in ("shortest_edge", "height", "width")]
    sides = [side for side in found if side]
    return int(max(sides)) if sides and not dict(size).get("longest_edge") else None
