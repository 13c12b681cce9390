"""Checkpoints into our models: every key is accounted for, nothing is unpickled, no tower is partly loaded.

A file may hold a whole ov2 model (`visual.*`, `text_decoder.*`), a bare encoder as released (`conv1.weight`, without
prefix), or an encoder beside a text tower (OpenVision 1, other CLIPs).
"""

from __future__ import annotations

import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from open_clip import factory as open_clip_factory
from torch import Tensor, nn

from open_clip_ov2.core import CaptionModel, VisionModel, sincos_2d
from open_clip_ov2.errors import first_line

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
    """The state dict of a .safetensors, .bin, .pt or .pth file, on the CPU. Raises ValueError. Only tensors and plain
    containers are read: a pickle that holds anything else is refused, and nothing of it runs."""
    if Path(path).suffix in (".npz", ".npy"):
        raise ValueError(f"{path}: Flax parameters; make a model of them with `ov2 convert {path} --to FOLDER`")
    try:
        state = open_clip_factory.load_state_dict(str(path), device="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file") from None
    except Exception as error:  # torch, zipfile, pickle and safetensors each have their own
        why = why_unreadable(Path(path), error)
        raise ValueError(f"{path}: cannot be read as a file of tensors only ({why})") from error
    strange = [str(key) for key, value in state.items() if not (isinstance(key, str) and isinstance(value, Tensor))]
    if strange:
        raise ValueError(f"{path}: not a state dict ({listed(strange)}: not a tensor)")
    return dict(state)


def why_unreadable(path: Path, error: Exception) -> str:
    """Why a file of weights cannot be read, and what to do; torch's own words if the file itself looks whole."""
    try:
        with open(path, "rb") as file:
            head = file.read(4)
    except OSError as unreadable:  # a folder, or no permission
        return unreadable.strerror or first_line(unreadable)
    if not head:
        return "it is empty; write or copy it again, or give another checkpoint"
    if head == b"PK\x03\x04" and not zipfile.is_zipfile(path):
        return f"it ends too early, after {path.stat().st_size:,} bytes; copy it again, or give another checkpoint"
    if path.suffix != ".safetensors" and head[:1] != b"\x80" and not zipfile.is_zipfile(path):
        return "it is not a file that torch.save wrote; give a checkpoint"
    return "it holds more than tensors" if isinstance(error, UnpicklingError) else first_line(error)


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
    found = [f"{len(names)} {problem} ({listed(names)})" for problem, names in problems.items() if names]
    if found:
        raise ValueError(f"{what}: {'; '.join(found)}")


@torch.no_grad()
def load_weights(model: VisionModel | CaptionModel, path: str, encoder_only: bool = False) -> None:
    """Load all of an ov2 model if the file has a decoder, or its encoder; the decoder then stays as it is. With
    `encoder_only`, whatever else the file holds is left out. Raises ValueError."""
    state = read_tensors(path)
    if not any(key.startswith(VISION) for key in state):  # a bare encoder
        state = {VISION + key: value for key, value in state.items()}
    encoder = {key: value for key, value in state.items() if key.startswith(VISION)}
    rest = [key for key in state if key not in encoder]
    if strange := [key for key in rest if not key.startswith((DECODER, *TEXT_TOWER))]:
        raise ValueError(f"{path}: {len(strange)} unexpected ({listed(strange)})")
    if encoder_only or not isinstance(model, CaptionModel) or not any(key.startswith(DECODER) for key in rest):
        _load_encoder(model, encoder, rest, path)
        return
    open_clip_factory.resize_pos_embed(state, model)
    check_fit(path, state, model.state_dict())
    model.load_state_dict(state)


def _load_encoder(model: VisionModel | CaptionModel, encoder: dict[str, Tensor], rest: list[str], what: str) -> None:
    if rest and isinstance(model, VisionModel) and model.alone_by_layout:
        raise ValueError(
            f"{what}: holds a text tower, and its config reads as an encoder's alone (vision_cfg.output_tokens: true); "
            'for the CLIP set that to false, for its encoder add "decoder_cfg": null to model_cfg'
        )
    expected = {VISION + key: value for key, value in model.visual.state_dict().items()}
    left_out = sorted({key.split(".")[0] for key in rest})
    if isinstance(model, CaptionModel) and rest and PROJECTION in encoder:  # into CLIP's space; ours is untrained
        del encoder[PROJECTION], expected[PROJECTION]
        left_out.append(PROJECTION)
    if POSITIONS in encoder:
        _fit_table(model, encoder, what)
    check_fit(what, encoder, expected)
    model.visual.load_state_dict({key.removeprefix(VISION): value for key, value in encoder.items()}, strict=False)
    logger.info("%s: loaded all %d encoder keys of the file", what, len(encoder))
    if left_out:
        logger.info("%s: left out: %s", what, ", ".join(left_out))
    if isinstance(model, CaptionModel):
        logger.warning("%s: encoder only; the text decoder starts from new weights", what)


def _fit_table(model: VisionModel | CaptionModel, encoder: dict[str, Tensor], what: str) -> None:
    """Fit the stored position table to the model's grid; check_fit reports a table of another width or of no grid."""
    stored, expected = encoder[POSITIONS], model.visual.positional_embedding
    grid, fits = model.visual.grid_size, stored.shape == expected.shape
    side = round(max(len(stored) - 1, 0) ** 0.5) if stored.ndim == 2 else 0
    if not fits and (side < 1 or stored.shape != (1 + side**2, expected.shape[1])):
        return
    if isinstance(model, CaptionModel):
        open_clip_factory.resize_pos_embed(encoder, model)  # raises for a table that is not the fixed one
    elif not fits:
        if model.position_table_mode == "recompute":
            encoder[POSITIONS] = model.position_table()
        else:
            open_clip_factory.resize_pos_embed(encoder, model)
        logger.info("%s: table of %d positions %sd for %s", what, len(stored), model.position_table_mode, grid)


# --- what patches.py puts into open_clip.factory -------------------------------------------------------


def load_strictly(original: Callable[..., Any]) -> Callable[..., Any]:
    """Checkpoints of ov2 models must fit, and nothing is unpickled; OpenCLIP takes a bare encoder for a text tower."""

    def load_checkpoint(
        model: nn.Module, checkpoint_path: str, strict: bool = True, weights_only: bool = True, device: Any = "cpu"
    ) -> Any:
        if not isinstance(model, (VisionModel, CaptionModel)):
            return original(model, checkpoint_path, strict=strict, weights_only=weights_only, device=device)
        load_weights(model, str(checkpoint_path))
        return nn.Module().load_state_dict({})  # torch's report, which says that no key is missing or unexpected

    return load_checkpoint


def recompute_position_table(original: Callable[..., None]) -> Callable[..., None]:
    """The fixed sine-cosine table is recomputed for a new grid, which OpenCLIP interpolates; a checkpoint of an ov2
    model that holds any other is refused."""

    def resize_pos_embed(state_dict: dict[str, Tensor], model: nn.Module, *args: Any, **kwargs: Any) -> None:
        stored = state_dict.get(POSITIONS)
        if not isinstance(model, CaptionModel) or stored is None:
            original(state_dict, model, *args, **kwargs)
            return
        table = model.position_table()
        side = round((stored.shape[0] - 1) ** 0.5)
        grid = model.visual.grid_size if stored.shape == table.shape else (side, side)
        if stored.shape != (1 + grid[0] * grid[1], table.shape[1]) or not torch.allclose(
            stored.float().cpu(),
            sincos_2d(grid, table.shape[1]),
            atol=1e-2 if stored.dtype != torch.float32 else TABLE_TOLERANCE,
        ):
            raise ValueError(
                f"{POSITIONS} of shape {tuple(stored.shape)} is not the fixed 2-D sine-cosine table "
                f"of an ov2 model of width {table.shape[1]}"
            )
        if stored.shape != table.shape:
            logger.info("position table recomputed: grid %s -> %s", grid, model.visual.grid_size)
        state_dict[POSITIONS] = table.to(stored.device)

    return resize_pos_embed
