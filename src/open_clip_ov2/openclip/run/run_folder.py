"""A run's folder: which run it is, and whether that run begins, continues, or begins from the file of --resume.

That checkpoint is copied among the run's own, and then the run resumes as it always does. What comes after it in that
run is moved aside. A command that is repeated continues where it was stopped instead.
"""

from __future__ import annotations

import io
import math
import shutil
import time
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from open_clip_ov2.data import storage
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import TEMPORARY, read_json, write_json, write_text, written_whole
from open_clip_ov2.locks import LOCK
from open_clip_ov2.openclip.command.run_plan import RunPlan
from open_clip_ov2.openclip.run.loaders import make_source, samples_per_epoch
from open_clip_ov2.recipe import dump_recipe
from open_clip_ov2.recipe.run_difference import differences
from open_clip_ov2.tracking.status import EARLIER
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

RUN_FILE = "run.json"  # what makes this run this run; a resumed one must agree
NEEDED = ("epoch", "state_dict", "optimizer")  # of a checkpoint that a run resumes from


def check_same_run(plan: RunPlan) -> bool:
    """Whether the run exists. Raises UserError if it has another configuration, and --override is not given."""
    file = plan.folder / RUN_FILE
    if not file.is_file():
        return False
    before = read_json(file, dict, "what `ov2 train` writes").get("config")
    if not isinstance(before, dict):
        raise UserError(f'{file}: not written by `ov2 train` (it has no "config"); give another --name')
    changes = differences(before, plan.config)
    if changes and not plan.options.override:
        raise UserError(
            f"{plan.folder}: this run has another configuration ({'; '.join(changes)}); give another "
            "--name, or continue the run with the new configuration (--override)"
        )
    return True


def enter_run_folder(plan: RunPlan, trains: bool, sync: RemoteSync | None) -> tuple[bool, str]:
    """Begin the run in its folder, which is locked, or find it again. Returns whether it existed, or begins from the
    file of --resume, and what the log should say of that. Raises UserError. A run that exists continues if its
    configuration is the same, or with --override."""
    file = plan.folder / RUN_FILE
    existed = check_same_run(plan) if trains else file.is_file()
    saved = list_checkpoints(plan.folder / "checkpoints")
    if existed and not trains and saved:
        raise UserError(
            f"{plan.folder}: this is a training run; give its validation another --name (or use `ov2 eval`)"
        )
    others = [path.name for path in plan.folder.glob("*") if not path.name.startswith((TEMPORARY, LOCK, *EARLIER))]
    if others and not existed:
        raise UserError(f"{plan.folder}: exists, but is not a run of ov2 (it has no {RUN_FILE}); choose another --name")
    versions = {name: version(name) for name in ("open_clip_torch", "torch", "open_clip_ov2")}
    args, note, command = plan.stages[0].args, "", ["ov2", "train", *plan.argv]
    about = {"config": plan.config, "command": command, "versions": versions, "resume": args.resume}
    begins = trains and args.resume not in (None, "latest")
    if begins and saved and existed and read_json(file, dict).get("resume") == args.resume:
        note = f"--resume {args.resume}: the run began from it before, and continues from its own newest checkpoint"
        begins = False
    if sync and not begins:
        sync.check_newest()
    if begins:
        content = read_beginning(plan, args.resume)
        if not existed:
            write_json(file, {**about, "resume": None})  # or it would be no run's folder, if the process is killed here
        note, existed = put_beginning(plan, args.resume, content, sync), True
    write_json(file, about)
    if plan.recipe is not None:
        write_text(plan.folder / "recipe.toml", dump_recipe(plan.recipe))
    if args.copy_codebase and not (plan.folder / "code").exists():
        _copy_code(plan.folder / "code")
    return existed, note


def _copy_code(folder: Path) -> None:
    made = folder.with_name(f"{TEMPORARY}{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    for package in ("open_clip_ov2", "open_clip", "open_clip_train"):
        source = Path(str(import_module(package).__file__)).parent
        shutil.copytree(source, made / package, ignore=shutil.ignore_patterns("__pycache__", "*.pyc"))
    made.rename(folder)


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
