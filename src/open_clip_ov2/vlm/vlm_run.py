"""`ov2 vlm train`: build the model, train stage by stage from where the run was stopped, write the finished model."""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from open_clip_ov2.errors import Interrupted
from open_clip_ov2.files import TEMPORARY, read_json
from open_clip_ov2.formats.model_files import new_folder
from open_clip_ov2.locks import FolderLock
from open_clip_ov2.quiet import quiet
from open_clip_ov2.tracking.log import FILE_ONLY, LOG, setup_logging
from open_clip_ov2.tracking.monitor import RunMonitor, StageInfo
from open_clip_ov2.tracking.sinks import TrackedRun, tracker_names
from open_clip_ov2.train.signals import Agreement, StopSignals, on_rank_0, waiting_group
from open_clip_ov2.vlm import assemble, conversations, vlm_folder
from open_clip_ov2.vlm.reporting import RunWatch
from open_clip_ov2.vlm.vlm_options import VlmPlan
from open_clip_ov2.vlm.vlm_stage import make_trainer, open_llava, open_processor, stage_config, worker_errors

logger = logging.getLogger("open_clip_ov2")


def train(plan: VlmPlan) -> None:
    """Train on this rank; every rank calls it alike. The run's folder is then a model of transformers.

    Raises UserError (a mistake of the user's), RunFailed (the run cannot continue), Interrupted (a signal; all saved).
    """
    with StopSignals() as signals, contextlib.ExitStack() as opened:
        run = _Run(plan, signals, opened)
        with run.monitor.status.outcome():
            run.go()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def join_processes() -> tuple[torch.device, int, int]:
    """(device, rank, world size) from the variables of torchrun or the launcher; the group is made for all stages."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device, backend = torch.device("cpu"), "gloo"
    if torch.cuda.is_available():
        device, backend = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))), "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group(backend)
    return device, rank, world_size


class _Run:
    """What one process keeps over all stages."""

    def __init__(self, plan: VlmPlan, signals: StopSignals, opened: contextlib.ExitStack) -> None:
        self.plan, self.signals, self.folder, self._opened = plan, signals, plan.folder, opened
        device, self.rank, self.world_size = join_processes()
        self._waiting = waiting_group(self.world_size)
        with quiet():
            for stage in plan.recipe.stages:  # now, not when the stages before it are over
                stage_config(plan, stage, self.folder, self.world_size)
        console = Console()
        self._lock: FolderLock | None = None
        self.on_rank_0(self._enter)
        first = self.rank == 0
        log = setup_logging(self.folder / LOG if first else None, self.rank, console if first else None)
        opened.callback(log.close)
        logger.info("command: ov2 vlm train %s", " ".join(plan.argv), extra={FILE_ONLY: True})
        self.usable: dict[str, int] = self.on_rank_0(self._prepare_data)
        self.done: int = self.on_rank_0(vlm_folder.stages_done, self.folder, len(plan.recipe.stages))
        self.monitor = RunMonitor(
            TrackedRun(self.folder, self._seen()),
            self.rank,
            log_every_n_steps=plan.options.log_every_n_steps,
            trackers=tracker_names(plan.options.report_to),
            model_name=Path(plan.encoder).name,
            device_type=device.type,
            console=console,
        )
        opened.callback(self.monitor.close)
        self.agreement = Agreement(self.world_size, device, flags=2)

    def on_rank_0(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return on_rank_0(self.rank, self._waiting, function, *arguments)

    def _enter(self) -> None:
        self._lock = self._opened.enter_context(FolderLock(self.folder))
        vlm_folder.enter(self.plan)

    def _prepare_data(self) -> dict[str, int]:
        """Usable conversations by data set."""
        options, found = self.plan.options, {}
        for name in self.plan.data_names:
            file, images = getattr(options, f"{name}_data"), getattr(options, f"{name}_images")
            found[name] = conversations.prepare(file, images, self.folder / "data" / name)
        return found

    def _samples(self, stages: int) -> int:
        """Samples that the first so many stages see."""
        return sum(
            stage.steps(self.usable[stage.data]) * stage.global_batch for stage in self.plan.recipe.stages[:stages]
        )

    def _seen(self) -> int:
        """Samples seen at the newest checkpoint, or at the end of the stages that are done."""
        done = max(self.done, 0)
        within = vlm_folder.complete_checkpoints(vlm_folder.stage_checkpoints(self.folder, done + 1))
        return vlm_folder.progress(within[-1], "samples_seen") if within else self._samples(done)

    def go(self) -> None:
        stages = len(self.plan.recipe.stages)
        last = min(self.plan.options.until_stage or stages, stages)
        if self.done < 0:
            self.on_rank_0(self._build)
        if self.done >= last:
            logger.info("nothing left to do: %s has finished stage %d", self.folder, self.done)
        for number in range(max(self.done, 0) + 1, last + 1):
            self._stage(number)
        if last == stages:
            self.on_rank_0(self._finish)

    def _build(self) -> None:
        logger.info("building the model: %s and %s", self.plan.encoder, self.plan.language_model)
        with new_folder(vlm_folder.stage_model(self.folder, 0)) as folder:
            assemble.build(
                self.plan.encoder, self.plan.language_model, self.plan.recipe, folder, self.plan.options.seed
            )

    def _stage(self, number: int) -> None:
        plan, stage = self.plan, self.plan.recipe.stages[number - 1]
        output, before = vlm_folder.stage_checkpoints(self.folder, number), self._samples(number - 1)
        found: list[Path] = self.on_rank_0(vlm_folder.complete_checkpoints, output)
        checkpoint = found[-1] if found else None
        step = vlm_folder.progress(checkpoint, "step") if checkpoint else 0
        info = StageInfo(
            number=number, of=len(plan.recipe.stages), title=stage.data, first_step=step,
            first_sample=step * stage.global_batch, samples=self._samples(number) - before, samples_before=before,
            workers=plan.options.workers,
        )  # fmt: skip
        minutes = plan.options.save_every_minutes
        watch = RunWatch(self.monitor, self.signals, self.agreement, info, stage.global_batch, minutes)
        dataset = conversations.open_prepared(self.folder / "data" / stage.data)
        model = checkpoint or vlm_folder.stage_model(self.folder, number - 1)
        logger.info("stage %d of %d: %s, from %s", number, len(plan.recipe.stages), stage.summary, model)
        trainer = make_trainer(plan, number, model, dataset, output, watch, self.world_size)
        self.monitor.begin_stage(info)
        with worker_errors():
            trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        if watch.stopped:
            seen = f"{before + trainer.state.global_step * stage.global_batch:,}"
            raise Interrupted(f"{watch.stopped}: saved at {seen} samples; the same command resumes the run")
        self._keep(trainer, number)

    def _keep(self, trainer: Any, number: int) -> None:
        """Write the stage's model, whole or not at all; then what led to it can go."""
        final = vlm_folder.stage_model(self.folder, number)
        temporary = final.with_name(f"{TEMPORARY}{number}")
        trainer.save_model(str(temporary))

        def rename() -> None:
            if self._lock is not None:
                self._lock.check()
            os.replace(temporary, final)
            shutil.rmtree(vlm_folder.stage_checkpoints(self.folder, number), ignore_errors=True)
            if number == 1:
                shutil.rmtree(vlm_folder.stage_model(self.folder, 0), ignore_errors=True)

        self.on_rank_0(rename)

    def _finish(self) -> None:
        """The last stage's model, in the language model's dtype, as the content of the run's folder."""
        stages = self.plan.recipe.stages
        source = vlm_folder.stage_model(self.folder, len(stages))
        temporary, finished = self.folder / f"{TEMPORARY}model", (self.folder / vlm_folder.MODEL_CONFIG).is_file()
        for left in [temporary, *([source] if finished else [])]:  # by a kill
            shutil.rmtree(left, ignore_errors=True)
        if finished or not source.is_dir():
            return
        dtype = read_json(source / vlm_folder.MODEL_CONFIG, dict)["text_config"].get("dtype") or "float32"
        open_llava(source, dtype).save_pretrained(temporary)
        open_processor(source, self.plan.recipe, stages[-1]).save_pretrained(temporary)
        files = sorted(temporary.iterdir(), key=lambda path: path.name == vlm_folder.MODEL_CONFIG)
        for path in files:  # the config last: with it the model is there
            os.replace(path, self.folder / path.name)
        temporary.rmdir()
        shutil.rmtree(source, ignore_errors=True)
        logger.info("the model is in %s: transformers opens it", self.folder)
