"""A parsed command line of `ov2 train`: for each stage our options (frozen), and what OpenCLIP's `main` gets; and what
makes a run this run.

That is the configuration, which a resumed run must share, and its signature. Where a run is written, how it is watched
and how often it is saved is not part of it; nor is the number of processes and data workers, as long as the global
batch is the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import without
from open_clip_ov2.data.order.layout import Layout
from open_clip_ov2.openclip.command.flags import RunOptions, TrainOptions
from open_clip_ov2.recipe import Recipe

# What `main` does not get, because it is done here: flags with a value, and switches.
OURS = ("--report-to", "--resume", "--name", "--remote-sync", "--remote-sync-frequency", "--remote-sync-protocol")
SWITCHES = ("--save-most-recent", "--copy-codebase")
# StageModel locks towers: OpenCLIP's `main` does so later, and would train again what --freeze has frozen of them.
LOCKS = ("--lock-image", "--lock-image-freeze-bn-stats", "--lock-text", "--lock-text-freeze-layer-norm")
LOCK_COUNTS = ("--lock-image-unlocked-groups", "--lock-text-unlocked-layers")

# Of OpenCLIP's flags, what does not change the weights that come out (batch size and accumulation: global_batch).
NOT_CONFIG = (
    "accum_freq", "batch_size", "cache_dir", "copy_codebase", "debug", "ddp_static_graph",
    "delete_previous_checkpoint", "device", "dist_backend", "dist_url", "gather_with_grad", "horovod",
    "imagenet_v2", "imagenet_val", "local_loss", "log_every_n_steps", "log_local", "logs", "name",
    "no_set_device_rank", "remote_sync", "remote_sync_frequency", "remote_sync_protocol", "report_to", "resume",
    "save_frequency", "save_most_recent", "val_data", "val_frequency", "val_num_samples", "wandb_notes",
    "wandb_project_name", "workers", "zeroshot_frequency",
)  # fmt: skip

# Flags that came later: as long as they are left out, a run has the configuration, and so the name, that it had before.
ADDED = (
    "captions", "prompt_keys", "ema_decay", "lr_layer_decay", "wd_exclude", "freeze", "lora_rank", "lora_alpha",
    "tokens_per_step", "elastic", "aspect", "max_tokens", "compile_encoder", "recompute_elementwise",
    "attention_kernel", "fp8",
)  # fmt: skip


@dataclass(frozen=True)
class StagePlan:
    """One call of OpenCLIP's `main`. `index` counts from 0; `args` is its argv, parsed. `title` is short ("84 px"),
    `summary` one line for logs."""

    index: int
    title: str
    summary: str
    options: TrainOptions
    args: argparse.Namespace
    argv: tuple[str, ...]
    precision_given: bool
    layout: Layout

    @property
    def number(self) -> int:
        """As users count: from 1."""
        return self.index + 1

    def main_argv(self, by_block: bool) -> list[str]:
        """`argv` as OpenCLIP's `main` gets it; with `by_block`, StageModel compiles the model."""
        switches = (*SWITCHES, *LOCKS, *(("--torchcompile",) if by_block else ()))
        return [word for word in without(self.argv, (*OURS, *LOCK_COUNTS)) if word not in switches]

    @property
    def image_size(self) -> int | list[int] | None:
        """--force-image-size: one number for a square, [height, width], or None for the model's own."""
        size = self.args.force_image_size
        return size[0] if isinstance(size, list) and len(size) == 1 else size


@dataclass(frozen=True)
class RunPlan:
    """A whole run. `config` is what makes it this run and no other; `name` says so in eight digits if none is given."""

    name: str
    folder: Path
    model: str
    is_ov2: bool  # whether the model is an ov2 model; CLIP and CoCa take OpenCLIP's own step
    stages: tuple[StagePlan, ...]
    carry_optimizer: bool
    options: RunOptions
    config: dict[str, object]
    recipe: Recipe | None
    argv: tuple[str, ...]

    def shards(self, world_size: int) -> int:
        """Processes that share one copy of the model."""
        return (self.options.fsdp_hybrid or world_size) if self.options.fsdp else 1


def run_config(stages: Sequence[StagePlan], world_size: int, carry_optimizer: bool) -> dict[str, Any]:
    """The configuration that a resumed run must share, JSON-ready."""
    return {"stages": [_stage_config(stage, world_size) for stage in stages], "carry_optimizer": carry_optimizer}


def _stage_config(stage: StagePlan, world_size: int) -> dict[str, Any]:
    args = stage.args
    config = {key: value for key, value in vars(args).items() if key not in NOT_CONFIG}
    if not stage.precision_given:  # the default depends on the machine, and a login node is not a compute node
        config["precision"] = "default"
    config["global_batch"] = args.batch_size * args.accum_freq * world_size
    for field in fields(stage.options):
        value = getattr(stage.options, field.name)
        if field.name == "val_captions" or (field.name in ADDED and value in (field.default, ())):
            continue  # so that runs of before these flags keep their names
        if field.name == "captions":
            value = {one.name: one.identity() for one in value}
        elif field.name in ("caption_keys", "prompt_keys"):
            value = [f"{key}={key.weight:g}" for key in value]
        config[field.name] = value
    return json.loads(json.dumps(config, default=str))  # a keep ratio as its text


def signature(config: dict[str, Any]) -> str:
    """Eight hexadecimal digits that identify a configuration."""
    return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:8]


def hyperparameters(plan: RunPlan) -> dict[str, Any]:
    """The flags of the last stage that trackers show beside its metrics."""
    last = plan.stages[-1]
    theirs = ("model", "lr", "wd", "batch_size", "accum_freq", "warmup", "epochs", "precision", "seed")
    values: dict[str, Any] = {name: getattr(last.args, name) for name in theirs}
    return values | {name: str(getattr(last.options, name)) for name in ("keep_ratio", "fusion", "tokenizer")}
