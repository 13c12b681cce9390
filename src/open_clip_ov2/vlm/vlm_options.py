"""The flags of `ov2 vlm train`, and the plan that follows from them."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser, add_flags, flag, flag_values, switch_flag
from open_clip_ov2.errors import UserError
from open_clip_ov2.tables import one_of, read_toml, real, text, whole
from open_clip_ov2.tracking.sinks import tracker_names
from open_clip_ov2.vlm.vlm_recipe import LINEAR, MLP, VlmRecipe, VlmStage, known_recipes, layer, load_vlm_recipe

BF16, FP32 = "bf16", "fp32"
MODEL, DATA, RUN = "model", "data", "run"


@dataclass(frozen=True)
class VlmOptions:
    """Flags of `ov2 vlm train`."""

    out: Path | None = flag("FOLDER", Path, "the run, and at its end the model, e.g. vlm/NAME", group=RUN)
    recipe: str = flag("NAME|FILE", text, f"{', '.join(known_recipes())}, or a .toml file", default="llava-1.5")
    language_model: str | None = flag(
        "FOLDER|NAME", text, "a folder, a hub name or smollm2-135m (default: the recipe's)", group=MODEL
    )
    feature_layer: int | None = flag(
        "N", layer, "the encoder's layer: -1 last block, -2 the one before (default: the recipe's)", group=MODEL
    )
    projector: str | None = flag(
        "KIND", one_of(MLP, LINEAR), "mlp, or linear as in MiniGPT-4 (default: the recipe's)", group=MODEL
    )
    template: str | None = flag(
        "NAME", text, "chat template of all stages but those with plain (default: the recipe's)", group=MODEL
    )
    system: str | None = flag("TEXT", str, "the sentence before a conversation (default: the recipe's)", group=MODEL)
    image_size: int | None = flag("N", whole(1), "the encoder's resolution (default: its own)", group=MODEL)
    align_data: Path | None = flag("FILE", Path, "LLaVA's JSON (or .jsonl) of the stages with align data", group=DATA)
    align_images: Path | None = flag("FOLDER", Path, "its pictures", group=DATA)
    knowledge_data: Path | None = flag("FILE", Path, "the same for knowledge data", group=DATA)
    knowledge_images: Path | None = flag("FOLDER", Path, "its pictures", group=DATA)
    tune_data: Path | None = flag("FILE", Path, "the same for tune data", group=DATA)
    tune_images: Path | None = flag("FOLDER", Path, "its pictures", group=DATA)
    batch_size: int = flag("N", whole(1), "conversations at once in a process", default=16, group=RUN)
    workers: int = flag("N", whole(0), "data workers of each process", default=4, group=RUN)
    precision: str | None = flag("P", one_of(BF16, FP32), "bf16 or fp32 (default: bf16 on GPUs)", group=RUN)
    grad_checkpointing: bool = switch_flag("recompute activations in the backward pass, to save memory", group=RUN)
    save_every_steps: int = flag("N", whole(1), "a checkpoint after every N steps", default=500, group=RUN)
    save_every_minutes: float | None = flag("M", real(0, above=True), "and after every M minutes", group=RUN)
    log_every_n_steps: int = flag("N", whole(1), "a record after every N steps", default=10, group=RUN)
    report_to: str = flag(
        "NAME,NAME", str, "tensorboard, wandb or trackio (results.jsonl is always written)", default="", group=RUN
    )
    seed: int = flag("N", whole(0), "of projector and order of the data", default=0, group=RUN)
    trainer: Path | None = flag(
        "FILE.toml", Path, "further settings of TRL's SFTConfig, such as fsdp and deepspeed", group=RUN
    )
    until_stage: int | None = flag("N", whole(1), "stop when stage N is done", group=RUN)
    gpus: int | None = flag("N", whole(1), "for --dry-run: on so many GPUs (default: one process)", group=RUN)
    dry_run: bool = switch_flag("show stages, steps, memory, hours and commands; train nothing", group=RUN)


@dataclass(frozen=True)
class VlmPlan:
    """A checked command line. `config` is what a resumed run must share."""

    encoder: str
    recipe: VlmRecipe
    options: VlmOptions
    language_model: str
    folder: Path
    argv: tuple[str, ...]

    @property
    def config(self) -> dict[str, Any]:
        recipe = {**dataclasses.asdict(self.recipe), "language_model": self.language_model}
        names = (f"{name}_{kind}" for name in self.data_names for kind in ("data", "images"))
        paths = {name: getattr(self.options, name) for name in names}
        about = {"encoder": self.encoder, "seed": self.options.seed, **recipe, **paths}
        return json.loads(json.dumps(about, default=str))

    @property
    def data_names(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(stage.data for stage in self.recipe.stages))

    @property
    def trainer_settings(self) -> dict[str, Any]:
        """The content of --trainer. Raises UserError."""
        return {} if self.options.trainer is None else read_toml(self.options.trainer)

    @property
    def sharded(self) -> bool:
        """Whether weights, gradients and moments are split over the processes."""
        return any(self.trainer_settings.get(name) for name in ("fsdp", "deepspeed"))

    def accumulation(self, stage: VlmStage, world_size: int) -> tuple[int, int]:
        """(conversations at once in a process, how often until a step). Raises UserError if they do not give the
        stage's global batch."""
        per_process, rest = divmod(stage.global_batch, world_size)
        if rest or not per_process:
            raise UserError(
                f"stage {stage.data}: its global batch, {stage.global_batch}, is no multiple of {world_size} processes"
            )
        batch = min(self.options.batch_size, per_process)
        if per_process % batch:
            raise UserError(
                f"--batch-size {batch}: each process has {per_process} conversations of the global batch of "
                f"{stage.global_batch}; give a divisor of that"
            )
        return batch, per_process // batch


DESCRIPTION = "Train a multimodal model on an encoder: its projector first, then the language model too."


def add_train_flags(parser: argparse.ArgumentParser, *, needs_encoder: bool = True) -> None:
    count = None if needs_encoder else "?"
    parser.add_argument("encoder", metavar="ENCODER", help="what `ov2 export` takes", nargs=count)
    add_flags(parser, VlmOptions)


def parse(argv: Sequence[str]) -> VlmPlan:
    """`argv` without `vlm train`. Raises UserError."""
    parser = Parser(prog="ov2 vlm train")
    add_train_flags(parser)
    return plan_of(parser.parse_args(list(argv)), argv)


def plan_of(parsed: argparse.Namespace, argv: Sequence[str], *, needs_data: bool = True) -> VlmPlan:
    """Raises UserError."""
    options = VlmOptions(**flag_values(VlmOptions, parsed))
    changes = {
        name: getattr(options, name) for name in ("feature_layer", "projector", "template", "system", "image_size")
    }
    recipe = load_vlm_recipe(options.recipe, **changes)
    language_model = options.language_model or recipe.language_model
    if language_model is None:
        raise UserError(f"--language-model is missing: recipe {options.recipe} names none")
    if options.out is None:
        raise UserError("--out is missing: the folder of the run, for example --out vlm/NAME")
    tracker_names(options.report_to)
    plan = VlmPlan(parsed.encoder, recipe, options, language_model, options.out, tuple(argv))
    for name in plan.data_names if needs_data else ():
        file, images = getattr(options, f"{name}_data"), getattr(options, f"{name}_images")
        if file is None:
            raise UserError(f"--{name}-data is missing: recipe {options.recipe} has a stage on it")
        if not file.is_file():
            raise UserError(f"--{name}-data {file}: no such file")
        if images is not None and not images.is_dir():
            raise UserError(f"--{name}-images {images}: no such folder")
    return plan
