"""`ov2 train`: argv -> RunPlan -> Session -> StageRun, stage by stage, from where the run was stopped."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.command.run_plan import RunPlan
from open_clip_ov2.openclip.run.loaders import make_source, samples_per_epoch
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_run import StageRun
from open_clip_ov2.train.signals import StopSignals

logger = logging.getLogger("open_clip_ov2")


def train(argv: Sequence[str]) -> Path:
    """Run a training command on this rank; every rank calls it alike. Returns the run's folder. Raises UserError (a
    mistake of the user's), RunFailed (the run cannot continue), Interrupted (a signal; all saved)."""
    plan = parse(argv)
    with StopSignals() as signals, Session(plan, signals) as session, session.monitor.status.outcome():
        _run_stages(plan, session)
    return plan.folder


def _run_stages(plan: RunPlan, session: Session) -> None:
    state = session.state
    first = 0 if state is None else state["stage"] - 1 + bool(state["stage_done"])
    stop = plan.options.until_stage or len(plan.stages)
    if first >= stop:
        _refuse_a_longer_stage(plan, state)
        logger.info("nothing left to do: %s has finished stage %d of %d", plan.folder, first, len(plan.stages))
        session.monitor.status.update(stage=first, stages=len(plan.stages))
        return
    if state is not None:
        session.samples_before = state["samples_seen"] - (0 if state["stage_done"] else state["stage_samples"])
    for stage in plan.stages[first:stop]:
        if len(plan.stages) > 1:
            logger.info("stage %d of %d: %s", stage.number, len(plan.stages), stage.summary)
        StageRun(session, stage).run()
        if stage.args.torchcompile:
            torch.compiler.reset()  # what was compiled for the model of this stage
    session.check_saved(f"training is over after {session.samples_before:,} samples")
    session.monitor.finish()


def _refuse_a_longer_stage(plan: RunPlan, state: dict[str, Any] | None) -> None:
    """A finished stage has decayed its learning rate. Raises UserError if --override asks for more samples of it."""
    last = plan.stages[-1]
    if state is None or state["stage"] != last.number or not plan.options.override:
        return
    source = make_source(last.args, last.options, train=True)
    asked = samples_per_epoch(last.args, source) * last.args.epochs if source else 0
    if asked > state["stage_samples"]:
        raise UserError(
            f"{plan.folder}: stage {last.number} is finished: its learning rate has come to the end of its schedule "
            f"after {state['stage_samples']:,} samples; to train on {asked:,} start another run (--name) from its last "
            "checkpoint (--pretrained)"
        )
