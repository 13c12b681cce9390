"""A run's folder as OpenCLIP's `local-dir:` model: config, preprocessing and tokenizer beside the checkpoints."""

from __future__ import annotations

import json
import shutil
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from typing import Any

from open_clip_ov2.data.crop import TokenBudget
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import TEMPORARY, copy_package, read_json, write_json, write_text
from open_clip_ov2.locks import LOCK
from open_clip_ov2.openclip.command.run_plan import RunPlan, StagePlan
from open_clip_ov2.openclip.models.factory import config_named, is_ov2_config
from open_clip_ov2.openclip.models.own_config import MAX_TOKENS, OwnConfig
from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer
from open_clip_ov2.openclip.run.resume_file import put_beginning, read_beginning
from open_clip_ov2.recipe import dump_recipe
from open_clip_ov2.recipe.run_difference import differences
from open_clip_ov2.train.checkpoint import list_checkpoints
from open_clip_ov2.train.remote_sync import RemoteSync

RUN_FILE = "run.json"  # what makes this run this run; a resumed one must agree
EARLIER = ("submit", "status.json")  # the launcher's, there before the run itself


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
        copy_package(Path(str(import_module(package).__file__)).parent, made)
    made.rename(folder)


def own_config(
    stage: StagePlan,
    model_options: dict[str, Any],
    preprocess_cfg: dict[str, Any],
    tokenizer: Any,
    budget: TokenBudget | None = None,
) -> OwnConfig:
    """The configuration of the model in training, with every flag that changed it folded in."""
    args = stage.args
    cfg = config_named(args.model)
    cfg.update({key: str(value) if key == "keep_ratio" else value for key, value in model_options.items()})
    if stage.image_size is not None:
        cfg["vision_cfg"]["image_size"] = stage.image_size
    if args.force_context_length is not None:
        cfg["text_cfg"]["context_length"] = args.force_context_length
    if not is_ov2_config(cfg):  # without these the weights do not fit, or compute something else
        cfg |= {"quick_gelu": True} if args.force_quick_gelu else {}
        cfg |= {"custom_text": True} if args.force_custom_text else {}
        cfg |= {"init_logit_bias": -10} if args.siglip else {}  # whatever number: the weights have the trained one
    plain = json.loads(json.dumps({"model": cfg, "preprocess": preprocess_cfg}))
    if budget is not None:
        plain["preprocess"][MAX_TOKENS] = budget.most
    vocabulary = tokenizer.vocabulary if isinstance(tokenizer, WordPieceTokenizer) else None
    return OwnConfig(plain["model"], plain["preprocess"], vocabulary)
