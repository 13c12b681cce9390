"""One stage on TRL's SFTTrainer: the model is opened from a folder, trained, and written to another.

transformers 5.24 resumes a LLaVA without its weights (its issue 43701: checkpoints have the hub's names, and are loaded
with `strict=False` into a model that has others, so that no name matches). So a stage opens the model from the
checkpoint's folder before the trainer is made, and the trainer loads everything else.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from torch.distributed.fsdp import FSDPModule
from torch.utils.data import Sampler
from transformers.trainer_callback import PrinterCallback
from trl import SFTConfig, SFTTrainer

from open_clip_ov2.errors import UserError, first_line, naming, nearest
from open_clip_ov2.quiet import quiet
from open_clip_ov2.vlm.batches import ConversationCollator, GroupedByLength
from open_clip_ov2.vlm.reporting import RunWatch
from open_clip_ov2.vlm.trained_parts import always_run_tower, freeze_others, groups
from open_clip_ov2.vlm.vlm_options import BF16, VlmPlan
from open_clip_ov2.vlm.vlm_recipe import LLAVA, VlmRecipe, VlmStage, chat_template

logger = logging.getLogger(__name__)
transformers.utils.logging.disable_progress_bar()

SETTINGS = {
    "save_strategy": "steps",
    "logging_steps": 1,
    "logging_nan_inf_filter": False,  # a loss that is not finite has to be seen
    "assistant_only_loss": True,
    "max_length": None,  # the collator cuts
    "ddp_find_unused_parameters": False,  # all that could be unused is frozen, and the tower always runs
    "report_to": "none",
    "disable_tqdm": True,
}


class StageTrainer(SFTTrainer):
    """SFTTrainer with the encoder's own rate, an order of samples that a resumed run repeats, and no telemetry."""

    def __init__(self, *args: Any, stage: VlmStage, watch: RunWatch, **options: Any) -> None:
        self._stage, self._watch = stage, watch
        self.optimizer: Any = None
        super().__init__(*args, callbacks=[watch], **options)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        if self.optimizer is None:
            trained = self.model if model is None else model
            kind, options = self.get_optimizer_cls_and_kwargs(self.args, trained)
            decaying = set(self.get_decay_parameter_names(trained))
            self.optimizer = kind(groups(trained, self._stage, decaying), **options)
        return self.optimizer

    def _get_train_sampler(self, train_dataset: Any = None) -> Sampler[int] | None:
        if not self._stage.group_by_length:
            return super()._get_train_sampler(train_dataset)
        lengths = [int(length) for length in self.train_dataset["length"]]
        return GroupedByLength(lengths, self._stage.global_batch, self.args.seed)

    def compute_loss(self, model: Any, *args: Any, **options: Any) -> Any:
        """TRL reads the head's weight outside of the head's own forward. Where accelerate has made the head a unit of
        FSDP, the weight is gathered here, since its gradient would otherwise be that of this process alone."""
        head = self.model.get_output_embeddings()
        if isinstance(head, FSDPModule):
            head.unshard()
        return super().compute_loss(model, *args, **options)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing: the model has been opened from this folder (see above)."""

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        start = time.perf_counter()
        found = super().get_batch_samples(*args, **options)
        self._watch.wait_s += time.perf_counter() - start
        return found

    def _send_telemetry(self) -> None:
        """Nothing: a run tells nobody that it runs."""


def open_llava(folder: Path, dtype: Any = torch.float32) -> Any:
    """The model in `dtype`. Its config keeps the language model's own, which transformers overwrites as it loads."""
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    model = transformers.AutoModelForImageTextToText.from_pretrained(folder, dtype=dtype, **options)
    model.config.text_config.dtype = transformers.AutoConfig.from_pretrained(folder, **options).text_config.dtype
    return model


def open_processor(folder: Path, recipe: VlmRecipe, stage: VlmStage) -> Any:
    """With the stage's own template and padding."""
    found = transformers.AutoProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    found.chat_template = chat_template(stage.template, recipe.system)
    if recipe.kind == LLAVA:
        found.image_processor.do_pad = stage.pad
    return found


def make_trainer(
    plan: VlmPlan, number: int, model_folder: Path, dataset: Any, output: Path, watch: RunWatch, world_size: int
) -> StageTrainer:
    """Stage `number` (from 1), which begins from the model in `model_folder` and writes checkpoints into `output`."""
    stage = plan.recipe.stages[number - 1]
    with quiet():
        config = stage_config(plan, stage, output, world_size)
        model = open_llava(model_folder)
    base = getattr(torch, str(model.config.text_config.dtype).removeprefix("torch."))
    one_dtype = plan.sharded or not config.bf16
    trained = freeze_others(model, stage, None if one_dtype else base)
    always_run_tower(model)
    if config.fsdp_plugin_args:  # accelerate's own list has classes that a tower lacks, which it refuses
        blocks = {type(one[0]).__name__ for one in model.modules() if isinstance(one, torch.nn.ModuleList)}
        config.fsdp_plugin_args.setdefault("transformer_cls_names_to_wrap", ",".join(sorted(blocks)))
    count = sum(value.numel() for value in model.parameters() if value.requires_grad)
    logger.info("stage %d trains %s parameters in %d tensors", number, f"{count:,}", len(trained))
    processor = open_processor(model_folder, plan.recipe, stage)
    collator = ConversationCollator(processor, stage.max_length)
    with quiet():  # TRL misses an end of turn in `plain`, which has none
        trainer = StageTrainer(
            model, config, collator, dataset, processing_class=processor, stage=stage, watch=watch
        )  # fmt: skip
    if config.fsdp_plugin_args and not trainer.is_fsdp_enabled:
        raise UserError(f"--trainer {plan.options.trainer}: fsdp: accelerate splits weights over GPUs, and has none")
    trainer.remove_callback(PrinterCallback)  # the monitor prints
    return trainer


def stage_config(plan: VlmPlan, stage: VlmStage, output: Path, world_size: int) -> SFTConfig:
    """Raises UserError for a setting of --trainer that is unknown, or that a flag or the recipe sets."""
    options, settings, gpu = plan.options, plan.trainer_settings, torch.cuda.is_available()
    batch, accumulation = plan.accumulation(stage, world_size)
    own: dict[str, Any] = {
        "output_dir": str(output),
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": accumulation,
        "learning_rate": stage.lr,
        "lr_scheduler_type": stage.schedule,
        "warmup_steps": stage.warmup_ratio,  # below 1 it is a share of the steps
        "weight_decay": stage.weight_decay,
        "max_grad_norm": stage.grad_clip_norm,
        "num_train_epochs": stage.epochs,
        "seed": options.seed,
        "data_seed": options.seed,
        "bf16": options.precision == BF16 or (options.precision is None and gpu),
        "use_cpu": not gpu,
        "gradient_checkpointing": options.grad_checkpointing,
        "dataloader_num_workers": options.workers,
        "dataloader_pin_memory": gpu,
        "save_steps": options.save_every_steps,
        **SETTINGS,
    }
    with naming(f"--trainer {options.trainer}"):
        known = {field.name for field in dataclasses.fields(SFTConfig)}
        for name in settings:
            if name not in known:
                raise UserError(f"{name!r} is no setting of TRL's SFTConfig{nearest(name, known)}")
            if name in own:
                raise UserError(f"{name}: a flag or the recipe sets it; leave it out")
        try:
            made = SFTConfig(**own, **settings)
        except (ValueError, TypeError, ImportError, OSError) as error:
            raise UserError(first_line(error)) from error
        _check_fsdp(made.fsdp_plugin_args or {}, world_size)
    return made


def _check_fsdp(fsdp: Mapping[str, Any], world_size: int) -> None:
    if fsdp and (fsdp["fsdp_version"] != 2 or fsdp["state_dict_type"].upper() != "FULL_STATE_DICT"):
        raise UserError("fsdp: only version 2 with FULL_STATE_DICT (the defaults) writes checkpoints that are models")
    if fsdp and world_size == 1:
        raise UserError("fsdp splits weights over processes, and there is only one")


@contextlib.contextmanager
def worker_errors() -> Iterator[None]:
    """A UserError of a data worker as it was: torch puts it into a page of traceback."""
    try:
        yield
    except UserError as error:
        lines = str(error).splitlines()
        if len(lines) < 2:
            raise
        raise UserError(lines[-1].partition("UserError: ")[2] or lines[-1]) from None
