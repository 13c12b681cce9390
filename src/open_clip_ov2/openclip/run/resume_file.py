"""`--resume FILE`: the checkpoint is copied among the run's own, and then the run resumes as it always does.

What comes after it in that run is moved aside. A command that is repeated continues where it was stopped instead.
"""

from __future__ import annotations

import io
import math
import time
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from open_clip_ov2.data import storage
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import TEMPORARY, written_whole
from open_clip_ov2.openclip.command.run_plan import RunPlan
from open_clip_ov2.openclip.run.loaders import make_source, samples_per_epoch
from open_clip_ov2.recipe.run_difference import differences
from open_clip_ov2.train.checkpoint import (
    ASIDE,
    BEST_FILE,
    LATEST_FILE,
    RESUME_KEY,
    CheckpointName,
    list_checkpoints,
    read_best,
)
from open_clip_ov2.train.remote_sync import RemoteSync

NEEDED = ("epoch", "state_dict", "optimizer")


def read_beginning(plan: RunPlan, address: str) -> dict[str, Any]:
    """The content of the checkpoint that the run begins from, of ours or OpenCLIP's. Raises UserError."""
    try:
        source: Any = io.BytesIO(storage.read_bytes(address)) if storage.is_store(address) else address
        content: dict[str, Any] = torch.load(source, map_location="cpu", weights_only=True)
        missing = [key for key in NEEDED if key not in content]
    except Exception as error:  # zip, pickle and I/O errors, and whatever a store's library raises
        torchs = isinstance(error, (RuntimeError, TypeError, EOFError, UnpicklingError))  # whose texts are of no help
        problem = "not a checkpoint" if torchs else f"cannot be read ({first_line(error)})"
        raise UserError(f"--resume {address}: {problem}; expected one such as RUN/checkpoints/stage_1.pt") from error
    if missing:
        raise UserError(f"--resume {address}: has no {missing[0]}; --pretrained {address} loads weights alone")
    if RESUME_KEY not in content:
        content[RESUME_KEY] = _state_of_open_clip(plan, address, content)
    before = content[RESUME_KEY].get("config")  # which the first versions did not write
    changes = differences(before, plan.config) if before is not None else []
    if changes and not plan.options.override:
        raise UserError(
            f"--resume {address}: is from a run with another configuration ({'; '.join(changes)}); give the flags of "
            "that run, or continue it with the new ones (--override)"
        )
    return content


def _state_of_open_clip(plan: RunPlan, address: str, content: dict[str, Any]) -> dict[str, Any]:
    """Of a checkpoint that OpenCLIP wrote after an epoch: the next one begins with data and random numbers of its own.
    The names that DDP gives its weights are taken off."""
    stage, epochs = plan.stages[0], int(content["epoch"])
    source = make_source(stage.args, stage.options, train=True)
    if len(plan.stages) > 1 or epochs >= stage.args.epochs or source is None:
        raise UserError(
            f"--resume {address}: a checkpoint of OpenCLIP's own after epoch {epochs}, which continues a run of one "
            f"stage with more --epochs than that; --pretrained {address} begins another run with its weights"
        )
    content["state_dict"] = {name.removeprefix("module."): value for name, value in content["state_dict"].items()}
    config: Any = plan.config
    steps = epochs * math.ceil(samples_per_epoch(stage.args, source) / config["stages"][0]["global_batch"])
    samples = steps * config["stages"][0]["global_batch"]
    counts = {"samples_seen": samples, "stage_samples": samples, "stage_steps": steps, "bad_in_a_row": 0}
    return {"stage": 1, "stage_done": False, **counts, "monitor": {"total_skips": {}, "epoch_images": 0}, "ranks": []}


def put_beginning(plan: RunPlan, address: str, content: dict[str, Any], sync: RemoteSync | None) -> str:
    """Make it the newest checkpoint of the run's folder, and of its copy. Returns a line for the log."""
    folder, state = plan.folder / "checkpoints", content[RESUME_KEY]
    name = CheckpointName(state["stage"], state["stage_done"], 0 if state["stage_done"] else state["samples_seen"])
    folder.mkdir(parents=True, exist_ok=True)
    made, target = folder / f"{TEMPORARY}begin", folder / name.file
    with written_whole(made) as file:
        torch.save(content, file)
    stay = target if Path(address).resolve() == target.resolve() else None
    later = [p for p in list_checkpoints(folder) if p != stay and not (CheckpointName.of(p.name) or name) < name]
    aside = folder / f"{ASIDE}{time.strftime('%Y-%m-%d_%H-%M-%S')}"
    best = read_best(folder)
    at = CheckpointName.of(best[0]) if best else None
    noted = [folder / BEST_FILE] if at and not at < name and (stay is None or at.file != stay.name) else []
    for path in (*noted, *later):
        aside.mkdir(exist_ok=True)
        path.rename(aside / path.name)
    made.rename(target)
    latest = folder / LATEST_FILE
    if latest.is_symlink() and not latest.exists():
        latest.unlink()
    if sync:
        sync.set_aside(name, aside.name)
    moved = f"; {len(later)} checkpoints that this run had from there on are in {aside}" if later else ""
    return f"--resume: the run begins from {address}{moved}"
