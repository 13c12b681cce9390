"""Checkpoints into our models: every key accounted for, nothing unpickled, never a partly loaded tower.

What a file may hold: a whole ov2 model (`visual.*`, `text_decoder.*`), a bare encoder as released (`conv1.weight`, no
prefix), or an encoder beside a text tower (OpenVision 1, other CLIPs).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from open_clip import factory as open_clip_factory
from torch import Tensor, nn

from open_clip_ov2.core import CaptionModel, VisionModel, sincos_2d

logger = logging.getLogger(__name__)

VISION, DECODER = "visual.", "text_decoder."
POSITIONS, PROJECTION = VISION + "positional_embedding", VISION + "proj"
# What a CLIP holds beside its encoder: OpenCLIP's CLIP and CustomTextCLIP.
TEXT_TOWER = (
    "text.", "transformer.", "token_embedding.", "positional_embedding", "ln_final.", "text_projection", "logit_scale",
    "logit_bias", "attn_mask",
)  # fmt: skip
# A released table may come from another float32 sine than ours; OpenCLIP's own table is 0.021 away (docs/reference.md).
TABLE_TOLERANCE = 1e-3
_SHOWN = 6  # names of keys in an error; the rest is counted


def read_tensors(path: str | Path) -> dict[str, Tensor]:
    """The state dict of a .safetensors, .bin, .pt or .pth file, on the CPU. Raises ValueError.

    Only tensors and plain containers are read: a pickle that holds anything else is refused, and nothing of it runs.
    """
    if Path(path).suffix in (".npz", ".npy"):
        raise ValueError(f"{path}: Flax parameters; make a model of them with `ov2 convert {path} --to FOLDER`")
    try:
        state = open_clip_factory.load_state_dict(str(path), device="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # torch, zipfile, pickle and safetensors each have their own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(f"{path}: cannot be read as tensors alone, and nothing else is read ({reason})") from error
    strange = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f"{path}: not a state dict ({listed(strange)}: no tensor)")
    return dict(state)


def listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(sorted(names)[:_SHOWN]) + more


def check_fit(what: str, given: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    """Raises ValueError, in one line, for missing and unexpected keys and for other shapes."""
    shapes = [
        f"{key} {tuple(given[key].shape)}, not {tuple(value.shape)}"
        for key, value in expected.items()
        if key in given and given[key].shape != value.shape
    ]
    problems = {
        "missing": sorted(expected.keys() - given.keys()),
        "unexpected": sorted(given.keys() - expected.keys()),
        "of another shape": shapes,
    }
    told = [f"{len(names)} {problem} ({listed(names)})" for problem, names in problems.items() if names]
    if told:
        raise ValueError(f"{what}: {'; '.join(told)}")


def split_encoder(what: str, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(encoder with `visual.` in front of each key, the rest). A state without prefixes is an encoder as a whole."""
    if not any(key.startswith(VISION) for key in state):
        return {VISION + key: value for key, value in state.items()}, {}
    encoder = {key: value for key, value in state.items() if key.startswith(VISION)}
    rest = {key: value for key, value in state.items() if key not in encoder}
    strange = [key for key in rest if not key.startswith((DECODER, *TEXT_TOWER))]
    if strange:
        raise ValueError(f"{what}: {len(strange)} unexpected ({listed(strange)})")
    return encoder, rest


def load_weights(model: VisionModel | CaptionModel, state: Mapping[str, Tensor], what: str) -> None:
    """All of an ov2 model, or its encoder alone; the decoder then stays as it is. Raises ValueError."""
    encoder, rest = split_encoder(what, state)
    if isinstance(model, CaptionModel) and any(key.startswith(DECODER) for key in rest):
        whole = {**encoder, **rest}
        open_clip_factory.resize_pos_embed(whole, model)
        check_fit(what, whole, model.state_dict())
        model.load_state_dict(whole)
        return
    _load_encoder(model, encoder, rest, what)


def _load_encoder(
    model: VisionModel | CaptionModel, encoder: dict[str, Tensor], rest: Mapping[str, Tensor], what: str
) -> None:
    if rest and isinstance(model, VisionModel) and model.alone_by_layout:
        raise ValueError(
            f"{what}: holds a text tower, and its config reads as an encoder's alone (vision_cfg.output_tokens: true); "
            'for the CLIP set that to false, for its encoder add "decoder_cfg": null to model_cfg'
        )
    expected = {VISION + key: value for key, value in model.visual.state_dict().items()}
    left = sorted({key.split(".")[0] for key in rest})
    if isinstance(model, CaptionModel) and rest and PROJECTION in encoder:  # into CLIP's space; ours is untrained
        del encoder[PROJECTION], expected[PROJECTION]
        left.append(PROJECTION)
    if POSITIONS in encoder:
        _fit_table(model, encoder, what)
    check_fit(what, encoder, expected)
    model.visual.load_state_dict({key.removeprefix(VISION): value for key, value in encoder.items()}, strict=False)
    logger.info("%s: %d encoder keys taken, all that there are", what, len(encoder))
    if left:
        logger.info("%s: left out: %s", what, ", ".join(left))
    if isinstance(model, CaptionModel):
        logger.warning("%s: encoder only; the text decoder starts from new weights", what)


def _fit_table(model: VisionModel | CaptionModel, encoder: dict[str, Tensor], what: str) -> None:
    """The stored table for the model's grid. One that is no table of this width is left for check_fit to name."""
    stored, expected = encoder[POSITIONS], model.visual.positional_embedding
    grid, fits = model.visual.grid_size, stored.shape == expected.shape
    side = round(max(len(stored) - 1, 0) ** 0.5) if stored.ndim == 2 else 0
    if not fits and (side < 1 or stored.shape != (1 + side**2, expected.shape[1])):
        return
    if isinstance(model, CaptionModel):
        table = sincos_2d(grid if fits else (side, side), expected.shape[1])
        if (stored.float() - table).abs().max() <= TABLE_TOLERANCE:
            encoder[POSITIONS] = table
        open_clip_factory.resize_pos_embed(encoder, model)  # raises for any other table
    elif not fits:
        if model.position_table_mode == "recompute":
            encoder[POSITIONS] = model.position_table()
        else:
            open_clip_factory.resize_pos_embed(encoder, model)
        logger.info("%s: table of %d positions %sd for %s", what, len(stored), model.position_table_mode, grid)


def load_encoder_file(model: VisionModel | CaptionModel, path: str) -> None:
    """The encoder of a file, whatever else the file holds. Raises ValueError."""
    encoder, rest = split_encoder(path, read_tensors(path))
    with torch.no_grad():
        _load_encoder(model, encoder, rest, path)


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def load_strictly(original: Callable[..., Any]) -> Callable[..., Any]:
    def load_checkpoint(
        model: nn.Module, checkpoint_path: str, strict: bool = True, weights_only: bool = True, device: Any = "cpu"
    ) -> Any:
        if not isinstance(model, (VisionModel, CaptionModel)):
            return original(model, checkpoint_path, strict=strict, weights_only=weights_only, device=device)
        with torch.no_grad():
            load_weights(model, read_tensors(checkpoint_path), str(checkpoint_path))
        return torch.nn.modules.module._IncompatibleKeys([], [])

    return load_checkpoint
