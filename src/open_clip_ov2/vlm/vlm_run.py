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


def train(plan: VlmPlan) -> Path:
    """Train on this rank; every rank calls it alike. Returns the run's folder, which is then a model of transformers.

    Raises UserError (a mistake of the user's), RunFailed (the run cannot continue), Interrupted (a signal; all saved).
    """
    with StopSignals() as signals, contextlib.ExitStack() as opened:
        device, rank, world_size = join_processes()
        run = _Run(plan, signals, device, rank, world_size, opened)
        with run.monitor.status.outcome():
            run.go()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    return plan.folder


def join_processes() -> tuple[torch.device, int, int]:
    """(device, rank, world size) from the variables of torchrun or the launcher; the group is made for all stages."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if world_size > 1 and not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world_size


class _Run:
    """What one process keeps over all stages."""

    def __init__(
        self, plan: VlmPlan, signals: StopSignals, device: torch.device, rank: int, world_size: int,
        opened: contextlib.ExitStack,
    ) -> None:  # fmt: skip
        self.plan, self.signals, self.folder = plan, signals, plan.folder
        self.rank, self.world_size = rank, world_size
        self._opened, self._waiting = opened, waiting_group(world_size)
        with quiet():
            for stage in plan.recipe.stages:  # now, not when the stages before it are over
                stage_config(plan, stage, self.folder, world_size)
        console = Console()
        self._lock: FolderLock | None = None
        self.on_rank_0(self._enter)
        log = setup_logging(self.folder / LOG if rank == 0 else None, rank, console if rank == 0 else None)
        opened.callback(log.close)
        logger.info("command: ov2 vlm train %s", " ".join(plan.argv), extra={FILE_ONLY: True})
        self.samples = self.on_rank_0(self._prepare_data)
        done = self.stages_done
        self.monitor = RunMonitor(
            TrackedRun(self.folder, self._seen(max(done, 0))),
            rank,
            log_every_n_steps=plan.options.log_every_n_steps,
            trackers=tracker_names(plan.options.report_to),
            model_name=Path(plan.encoder).name,
            device_type=device.type,
            console=console,
        )
        opened.callback(self.monitor.close)
        self.agreement = Agreement(world_size, device, flags=2)

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
            found[name] = conversations.prepare(file, images, self.folder / "data" / name).used
        return found

    @property
    def stages_done(self) -> int:
        stages = len(self.plan.recipe.stages)
        finished = (self.folder / vlm_folder.MODEL_CONFIG).is_file()
        return int(self.on_rank_0(lambda: stages if finished else vlm_folder.stages_done(self.folder)))

    def _steps(self, number: int) -> int:
        stage = self.plan.recipe.stages[number - 1]
        return stage.steps(self.samples[stage.data])

    def _seen(self, done: int) -> int:
        """Samples seen at the newest checkpoint, or at the end of the stages that are done."""
        stages = self.plan.recipe.stages
        seen = sum(self._steps(number) * stages[number - 1].global_batch for number in range(1, done + 1))
        within = vlm_folder.complete_checkpoints(vlm_folder.stage_checkpoints(self.folder, done + 1))
        return int(read_json(within[-1] / vlm_folder.COMPLETE, dict)["samples_seen"]) if within else seen

    def go(self) -> None:
        plan, done = self.plan, self.stages_done
        last = min(plan.options.until_stage or len(plan.recipe.stages), len(plan.recipe.stages))
        if done < 0:
            self.on_rank_0(self._build)
            done = 0
        if done >= last:
            logger.info("nothing left to do: %s has finished stage %d", self.folder, done)
        for number in range(done + 1, last + 1):
            self._stage(number)
        if last == len(plan.recipe.stages):
            self.on_rank_0(self._finish)

    def _build(self) -> None:
        logger.info("building the model: %s and %s", self.plan.encoder, self.plan.language_model)
        with new_folder(vlm_folder.stage_model(self.folder, 0)) as folder:
            assemble.build(
                self.plan.encoder, self.plan.language_model, self.plan.recipe, folder, self.plan.options.seed
            )

    def _stage(self, number: int) -> None:
        plan, stage = self.plan, self.plan.recipe.stages[number - 1]
        output, before = vlm_folder.stage_checkpoints(self.folder, number), self._samples_before(number)
        found: list[str] = self.on_rank_0(lambda: [str(path) for path in vlm_folder.complete_checkpoints(output)])
        checkpoint = found[-1] if found else None
        watch = RunWatch(
            self.monitor,
            self.signals,
            self.agreement,
            number,
            before,
            stage.global_batch,
            plan.options.save_every_minutes,
        )
        dataset = conversations.open_prepared(self.folder / "data" / stage.data)
        model = Path(checkpoint) if checkpoint else vlm_folder.stage_model(self.folder, number - 1)
        logger.info("stage %d of %d: %s, from %s", number, len(plan.recipe.stages), stage.summary, model)
        trainer = make_trainer(plan, number, model, dataset, output, watch, self.world_size)
        step = int(read_json(Path(checkpoint) / vlm_folder.COMPLETE, dict)["step"]) if checkpoint else 0
        self.monitor.begin_stage(
            StageInfo(
                number=number, of=len(plan.recipe.stages), title=stage.data, first_step=step,
                first_sample=step * stage.global_batch, samples=self._steps(number) * stage.global_batch,
                samples_before=before, workers=plan.options.workers,
            )
        )  # fmt: skip
        with worker_errors():
            trainer.train(resume_from_checkpoint=checkpoint)
        if watch.stopped:
            seen = f"{before + trainer.state.global_step * stage.global_batch:,}"
            raise Interrupted(f"{watch.stopped}: saved at {seen} samples; the same command resumes the run")
        self._keep(trainer, number)

    def _samples_before(self, number: int) -> int:
        stages = self.plan.recipe.stages
        return sum(self._steps(one) * stages[one - 1].global_batch for one in range(1, number))

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
        if (self.folder / vlm_folder.MODEL_CONFIG).is_file() or not source.is_dir():
            return
        config = read_json(source / vlm_folder.MODEL_CONFIG, dict)
        with contextlib.ExitStack() as made:
            temporary = self.folder / f"{TEMPORARY}model"
            made.callback(shutil.rmtree, temporary, ignore_errors=True)
            open_llava(source, config["text_config"].get("dtype") or "float32").save_pretrained(temporary)
            open_processor(source, self.plan.recipe, stages[-1]).save_pretrained(temporary)
            names = sorted(
                (path.name for path in temporary.iterdir()), key=lambda name: name == vlm_folder.MODEL_CONFIG
            )
            for name in names:  # the config last: with it the model is there
                os.replace(temporary / name, self.folder / name)
        shutil.rmtree(source, ignore_errors=True)
        logger.info("the model is in %s: transformers opens it", self.folder)
