"""What one process keeps over all stages of a run: its rank, log, monitor, checkpoint writer and signals."""

from __future__ import annotations

import argparse
import contextlib
import logging
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from open_clip_train.distributed import init_distributed_device
from rich.console import Console

from open_clip_ov2.data import storage
from open_clip_ov2.errors import Interrupted
from open_clip_ov2.evaluate.gathering import gathered_counts
from open_clip_ov2.locks import FolderLock
from open_clip_ov2.openclip.command.data_flags import data_kind
from open_clip_ov2.openclip.command.run_plan import RunPlan, hyperparameters
from open_clip_ov2.openclip.run.run_folder import RUN_FILE, enter_run_folder
from open_clip_ov2.tracking.log import FILE_ONLY, LOG, setup_logging
from open_clip_ov2.tracking.monitor import RunMonitor
from open_clip_ov2.tracking.sinks import TrackedRun, tracker_names
from open_clip_ov2.tracking.status import EARLIER
from open_clip_ov2.train.checkpoint import RESUME_KEY, CheckpointWriter, list_checkpoints, newest_readable
from open_clip_ov2.train.parallel import Layout
from open_clip_ov2.train.remote_sync import ON_SIGNAL_S, RemoteSync
from open_clip_ov2.train.sharded import ShardWriter
from open_clip_ov2.train.signals import Agreement, StopSignals, first_of_all, on_rank_0, waiting_group

logger = logging.getLogger("open_clip_ov2")

STOP, SAVE = 0, 1  # the flags that ranks agree on at each step


class Session:
    """Entered once in a run, by every rank alike. `checkpoint` is what the next stage begins from, until it has begun:
    what the run resumes from, or the weights, and with --carry-optimizer the optimizer state, of the stage before; None
    for the first stage of a new run."""

    def __init__(self, plan: RunPlan, signals: StopSignals) -> None:
        self.plan, self.signals, self.console = plan, signals, Console()
        self.checkpoint: dict[str, Any] | None = None
        self._lock: FolderLock | None = None  # of rank 0, as is `sync`
        self.sync: RemoteSync | None = None
        self.samples_before = 0  # samples seen in the stages before the present one
        self.trains = data_kind(plan.stages[0].args, train=True) is not None

    def __enter__(self) -> Session:
        self._ranks = argparse.Namespace(**vars(self.plan.stages[0].args))
        self.device = init_distributed_device(self._ranks)
        self.rank, self.world_size = int(self._ranks.rank), int(self._ranks.world_size)
        self._waiting = waiting_group(self.world_size)
        with contextlib.ExitStack() as self._opened:  # closes what is open if this fails
            self._open()
            self._opened = self._opened.pop_all()
        return self

    def _open(self) -> None:
        plan, args = self.plan, self.plan.stages[0].args
        existed, notes = self.on_rank_0(self._enter_folder)
        first = self.rank == 0
        local = args.log_local and self._ranks.local_rank == 0
        file = plan.folder / (LOG if first else f"out-{self.rank}.log") if first or local else None
        log = setup_logging(file, self.rank, self.console if first else None, args.debug)
        self._opened.callback(log.close)
        for note in notes:
            logger.info("%s", note)
        if self.sync is not None:
            self._opened.callback(self.sync.close)
        checkpoints = plan.folder / "checkpoints"
        keep = 0 if args.delete_previous_checkpoint else plan.options.keep_checkpoints
        self.writer = CheckpointWriter(checkpoints, keep, latest=args.save_most_recent) if first else None
        if self.writer is not None:
            self._opened.callback(self.writer.wait)
        self._open_layout(checkpoints)
        if existed and self.trains:
            self._find_checkpoint(checkpoints)
        state = self.state
        resumed_at = (state["samples_seen"] if state else 0) if existed and self.trains else None
        self.monitor = RunMonitor(
            TrackedRun(plan.folder, resumed_at, hyperparameters(plan), args.wandb_project_name, args.wandb_notes),
            self.rank,
            log_every_n_steps=args.log_every_n_steps,
            trackers=tracker_names(args.report_to),
            model_name=plan.model,
            device_type=self.device.type,
            console=self.console,
            gather=gathered_counts,
        )
        self._opened.callback(self.monitor.close)
        if state:
            self.monitor.restore(state["monitor"])
        self.agreement = Agreement(self.world_size, self.device, flags=2)
        self.on_rank_0(self.sync.start if self.sync else str, RUN_FILE)
        logger.info("command: ov2 train %s", " ".join(plan.argv), extra={FILE_ONLY: True})

    def _open_layout(self, checkpoints: Path) -> None:
        """With --fsdp: how the model is split, and what writes shards of it."""
        self.layout: Layout | None = None
        self.shards: ShardWriter | None = None
        options = self.plan.options
        if options.fsdp and self.world_size == 1:
            logger.info("--fsdp: there is one process, so all of the model is on it")
        elif options.fsdp:
            self.layout = Layout.over(self.device, self.world_size, options.fsdp_hybrid)
            if options.fsdp_checkpoint == "sharded":
                self.shards = ShardWriter(checkpoints)
                self._opened.callback(self.shards.wait)

    def _enter_folder(self) -> tuple[bool, list[str]]:
        """Of rank 0: lock the run's folder, fetch it if --remote-sync alone has it, and enter it. Returns whether it
        existed, and lines for the log. Raises UserError."""
        plan, args = self.plan, self.plan.stages[0].args
        self._lock = self._opened.enter_context(FolderLock(plan.folder))
        if args.remote_sync is not None:
            address = storage.join(args.remote_sync, plan.name)
            signalled = lambda: self.signals.name is not None  # noqa: E731
            self.sync = RemoteSync(plan.folder, address, args.remote_sync_frequency, signalled)
        fetched = self.sync.fetch(RUN_FILE, EARLIER, self.trains) if self.sync else ""
        existed, begun = enter_run_folder(plan, self.trains, self.sync)
        return existed, [note for note in (fetched, begun) if note]

    def check_lock(self) -> None:
        """Raises InUse on rank 0 if another process has taken the folder over."""
        if self._lock is not None:
            self._lock.check()

    @property
    def state(self) -> dict[str, Any] | None:
        """The training state in the checkpoint that the run resumes from."""
        return self.checkpoint and self.checkpoint.get(RESUME_KEY)

    @property
    def state_within(self) -> dict[str, Any] | None:
        """The same if the checkpoint is from within the stage, and not from the end of the one before."""
        return self.state if self.state and not self.state["stage_done"] else None

    def _find_checkpoint(self, folder: Path) -> None:
        """All ranks load the newest checkpoint that each of them can read."""
        found = self.on_rank_0(list_checkpoints, folder)
        newest = newest_readable(found, self.layout, partial(first_of_all, self._waiting))
        if newest is None:
            logger.info("no checkpoint in %s yet: training starts from the beginning", self.plan.folder)
            return
        path, self.checkpoint = newest
        logger.info("resuming from %s: %s samples seen", path, f"{self.checkpoint[RESUME_KEY]['samples_seen']:,}")

    def on_rank_0(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """`signals.on_rank_0` on this session's ranks."""
        return on_rank_0(self.rank, self._waiting, function, *arguments)

    def check_saved(self, what: str) -> None:
        """Wait for rank 0's file. Raises RunFailed on every rank if the newest checkpoint was not written."""
        self.on_rank_0(self.writer.check_saved if self.writer else str, what)

    def enter_main(self, args: argparse.Namespace) -> torch.device:
        """In the place of OpenCLIP's init_distributed_device: the process group is made once for all stages."""
        vars(args).update(
            {name: getattr(self._ranks, name) for name in ("device", "rank", "local_rank", "world_size", "distributed")}
        )
        return self.device

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self.sync is not None and kind is not None:
            self.sync.within_s = ON_SIGNAL_S
        self._opened.close()
        # After an error the other ranks may be gone, and destroying the group would wait for them.
        if (kind is None or issubclass(kind, Interrupted)) and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
