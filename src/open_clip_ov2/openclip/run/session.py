"""What one process keeps over all stages of a run: its rank, log, monitor, checkpoint writer and signals."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch
from open_clip_train.distributed import init_distributed_device
from rich.console import Console

from open_clip_ov2.errors import Interrupted
from open_clip_ov2.evaluate.gathering import gathered_counts
from open_clip_ov2.openclip.command.run_plan import RunPlan
from open_clip_ov2.openclip.run.run_folder import enter_run_folder
from open_clip_ov2.tracking.log import FILE_ONLY, setup_logging
from open_clip_ov2.tracking.monitor import RunMonitor
from open_clip_ov2.tracking.sinks import tracker_names
from open_clip_ov2.train.checkpoint import RESUME_KEY, CheckpointWriter, newest_checkpoint
from open_clip_ov2.train.signals import Agreement, StopSignals

logger = logging.getLogger("open_clip_ov2")

STOP, SAVE = 0, 1  # the flags that ranks agree on at each step


class Session:
    """Entered once in a run, by every rank alike.

    `checkpoint` is what the run resumes from; None for a new run. `previous_stage` has the weights, and with
    --carry-optimizer the optimizer state, that a finished stage hands to the next.
    """

    def __init__(self, plan: RunPlan, signals: StopSignals) -> None:
        self.plan = plan
        self.signals = signals
        self.console = Console()
        self.checkpoint: dict[str, Any] | None = None
        self.previous_stage: dict[str, Any] | None = None
        self.samples_before = 0  # samples seen in the stages before the present one
        self.trains = bool(plan.stages[0].args.train_data) or plan.stages[0].args.dataset_type == "synthetic"

    def __enter__(self) -> Session:
        self._ranks = argparse.Namespace(**vars(self.plan.stages[0].args))
        self.device = init_distributed_device(self._ranks)
        self.rank, self.world_size = int(self._ranks.rank), int(self._ranks.world_size)
        try:
            self._open()
        except BaseException:
            self._leave()
            raise
        return self

    def _open(self) -> None:
        plan, folder = self.plan, self.plan.folder
        existed = self.on_rank_0(enter_run_folder, plan, self.trains)
        self._log = setup_logging(
            folder if self.rank == 0 else None, self.rank, self.console if self.rank == 0 else None,
            debug=plan.stages[0].args.debug,
        )  # fmt: skip
        self.writer = (
            CheckpointWriter(folder / "checkpoints", plan.options.keep_checkpoints) if self.rank == 0 else None
        )
        if existed and self.trains:
            self._find_checkpoint()
        state = self.state
        self.monitor = RunMonitor(
            folder,
            self.rank,
            log_every_n_steps=plan.stages[0].args.log_every_n_steps,
            trackers=tracker_names(plan.stages[0].args.report_to),
            model_name=plan.model,
            device_type=self.device.type,
            resumed_at=(state["samples_seen"] if state else 0) if existed and self.trains else None,
            console=self.console,
            gather=gathered_counts,
        )
        if state:
            self.monitor.restore(state["monitor"])
        self.agreement = Agreement(self.world_size, self.device, flags=2)
        logger.info("command: ov2 train %s", " ".join(plan.argv), extra={FILE_ONLY: True})

    @property
    def state(self) -> dict[str, Any] | None:
        """The training state in the checkpoint that the run resumes from."""
        return self.checkpoint and self.checkpoint[RESUME_KEY]

    def _find_checkpoint(self) -> None:
        """Rank 0 looks for the newest checkpoint, and all ranks load it."""
        path = self.on_rank_0(self._newest)
        if path is None:
            logger.info("no checkpoint in %s yet: training starts from the beginning", self.plan.folder)
            return
        if self.checkpoint is None:
            self.checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        logger.info("resuming from %s: %s samples seen", path, f"{self.checkpoint[RESUME_KEY]['samples_seen']:,}")

    def _newest(self) -> str | None:
        found = newest_checkpoint(self.plan.folder / "checkpoints")
        if found is None:
            return None
        self.checkpoint = found[1]
        return str(found[0])

    def on_rank_0(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """Call the function on rank 0. Its result is returned, or its exception raised, on every rank."""
        result: tuple[Any, Exception | None] = (None, None)
        if self.rank == 0:
            try:
                result = (function(*arguments), None)
            except Exception as error:
                result = (None, error)
        value, problem = self._shared(result)
        if problem is not None:
            raise problem
        return value

    def check_saved(self, what: str) -> None:
        """Wait for rank 0's file. Raises RunFailed on every rank if the newest checkpoint was not written."""
        self.on_rank_0(self.writer.check_saved if self.writer else str, what)

    def _shared(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        torch.distributed.broadcast_object_list(box, src=0)
        return box[0]

    def enter_main(self, args: argparse.Namespace) -> torch.device:
        """In the place of OpenCLIP's init_distributed_device: the process group is made once for all stages."""
        vars(args).update(
            {name: getattr(self._ranks, name) for name in ("device", "rank", "local_rank", "world_size", "distributed")}
        )
        return self.device

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.writer is not None:
            self.writer.wait()
        self.monitor.close()
        self._leave(others_are_there=kind is None or issubclass(kind, Interrupted))

    def _leave(self, others_are_there: bool = False) -> None:
        if hasattr(self, "_log"):
            self._log.close()
        # After an error the other ranks may be gone, and destroying the group would wait for them.
        if others_are_there and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
