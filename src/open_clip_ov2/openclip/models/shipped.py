"""Checkpoints that this package holds: pretrained tags of OpenCLIP's, loaded offline. `NAME:TAG` stands for one
wherever a model is named.

To add one, put the folder `pretrained/TAG`, as `ov2 export --to ov2` writes it, into the package (weights in float16,
to be small) and a line into SHIPPED.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from open_clip import pretrained as open_clip_pretrained

FOLDER = Path(__file__).parents[2] / "pretrained"
WEIGHTS = "open_clip_model.safetensors"

SHIPPED = (("ov2-vit-nano-8", "rendered"),)  # a model of OpenCLIP's registry, and its folder: lower case, with _ for -


def shipped_folder(source: str) -> Path | None:
    """The folder of `NAME:TAG`; None for any other name, and where the weights are missing, as in a checkout."""
    tag = next((tag for name, tag in SHIPPED if f"{name}:{tag}" == source), None)
    return FOLDER / tag if tag and (FOLDER / tag / WEIGHTS).is_file() else None


def add_shipped() -> None:
    """List them in `open_clip.list_pretrained()`."""
    for name, tag in SHIPPED:
        if (folder := shipped_folder(f"{name}:{tag}")) is not None:
            open_clip_pretrained._PRETRAINED.setdefault(name, {})[tag] = {"file": str(folder / WEIGHTS)}


def remove_shipped() -> None:
    """Undo add_shipped."""
    for name, tag in SHIPPED:
        open_clip_pretrained._PRETRAINED.get(name, {}).pop(tag, None)
        if not open_clip_pretrained._PRETRAINED.get(name):
            open_clip_pretrained._PRETRAINED.pop(name, None)


def resolve_shipped(original: Callable[[str], tuple[str | None, str]]) -> Callable[[str], tuple[str | None, str]]:
    """NAME:TAG of weights that the package holds is their folder, for create_model and get_tokenizer alike."""

    def parse_model_name(model_name: str) -> tuple[str | None, str]:
        folder = shipped_folder(model_name)
        return original(model_name) if folder is None else ("local-dir", str(folder))

    return parse_model_name
