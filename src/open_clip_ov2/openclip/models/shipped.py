"""Checkpoints that this package holds: pretrained tags of OpenCLIP's, loaded offline. `NAME:TAG` stands for one
wherever a model is named.

To add one, put the folder `pretrained/TAG`, as `ov2 export --to ov2` writes it, into the package (weights in float16,
to be small) and a line into SHIPPED.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from open_clip import pretrained as open_clip_pretrained

FOLDER = Path(__file__).parents[2] / "pretrained"
WEIGHTS = "open_clip_model.safetensors"


class Shipped(NamedTuple):
    """Weights for the model `name` of OpenCLIP's registry, in the folder `tag`: lower case, with _ for -."""

    name: str
    tag: str

    @property
    def folder(self) -> Path:
        return FOLDER / self.tag


SHIPPED: tuple[Shipped, ...] = (Shipped("ov2-vit-nano-8", "rendered"),)


def shipped_folder(source: str) -> Path | None:
    """The folder of `NAME:TAG`; None for any other name."""
    return next((one.folder for one in _present() if f"{one.name}:{one.tag}" == source), None)


def _present() -> list[Shipped]:
    """A checkout may lack the weights."""
    return [one for one in SHIPPED if (one.folder / WEIGHTS).is_file()]


def add_shipped() -> None:
    """List them in `open_clip.list_pretrained()`."""
    for one in _present():
        open_clip_pretrained._PRETRAINED.setdefault(one.name, {})[one.tag] = {"file": str(one.folder / WEIGHTS)}


def remove_shipped() -> None:
    """Undo add_shipped."""
    for one in SHIPPED:
        open_clip_pretrained._PRETRAINED.get(one.name, {}).pop(one.tag, None)
        if not open_clip_pretrained._PRETRAINED.get(one.name):
            open_clip_pretrained._PRETRAINED.pop(one.name, None)


def resolve_shipped(original: Callable[[str], tuple[str | None, str]]) -> Callable[[str], tuple[str | None, str]]:
    """NAME:TAG of weights that the package holds is their folder, for create_model and get_tokenizer alike."""

    def parse_model_name(model_name: str) -> tuple[str | None, str]:
        folder = shipped_folder(model_name)
        return original(model_name) if folder is None else ("local-dir", str(folder))

    return parse_model_name
