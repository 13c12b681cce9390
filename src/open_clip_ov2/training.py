"""All that the launcher knows of `ov2 train`."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from open_clip_ov2.errors import UserError

if TYPE_CHECKING:
    from open_clip_ov2.openclip.command.run_plan import StagePlan


@dataclass(frozen=True)
class Checked:
    """What a command line will do. `stages` are their titles; `recipe` the file they stand in."""

    name: str
    run_dir: Path
    signature: str
    model: str
    stages: tuple[str, ...]
    summaries: tuple[str, ...]
    total_samples: int
    parameters: int
    recipe: Path | None


def check(argv: Sequence[str], world_size: int, gpus: bool, gpu_memory_gb: float | None = None) -> Checked:
    """Flags, recipe, data and model, without training; memory where a GPU's is given. Raises UserError."""
    from open_clip_ov2.openclip.run.dry_run import check_train
    from open_clip_ov2.openclip.run.run_folder import check_same_run

    if set(argv) & {"-h", "--help"}:
        raise UserError("after `--` come the flags of `ov2 train` (`ov2 train --help` lists them)")
    logging.disable(logging.WARNING)  # "no pretrained weights", of a model that is made to be looked at
    try:
        found = check_train(argv, world_size, gpus)
    finally:
        logging.disable(logging.NOTSET)
    plan = found.plan
    if not plan.stages[0].args.train_data and plan.stages[0].args.dataset_type != "synthetic":
        raise UserError("--train-data is missing after `--`: there is nothing to train on")
    check_same_run(plan)
    if gpu_memory_gb is not None:
        for stage in plan.stages:
            _check_memory(stage, world_size, gpu_memory_gb)
    return Checked(
        name=plan.name,
        run_dir=plan.folder,
        signature=found.signature,
        model=plan.model,
        stages=tuple(stage.title for stage in plan.stages),
        summaries=tuple(stage.summary for stage in plan.stages),
        total_samples=found.total_samples,
        parameters=found.parameters,
        recipe=plan.recipe.source if plan.recipe else None,
    )


def _check_memory(stage: StagePlan, world_size: int, limit_gb: float) -> None:
    from open_clip_ov2.openclip.run.run_memory import stage_memory

    try:
        memory = stage_memory(stage, world_size)
    except UserError as error:
        print(f"memory    not estimated: {error}")
        return
    batch = stage.args.batch_size
    needed_gb = memory.of(batch) / 1e9
    if needed_gb > limit_gb:
        where = f"stage {stage.number} ({stage.title}): " if stage.title else ""
        raise UserError(
            f"{where}--batch-size {batch} needs about {needed_gb:.1f} GB on each GPU (--gpu-memory-gb {limit_gb:g}): "
            f"at most {memory.most_images(limit_gb * 1e9)} fit (--accum-freq, --grad-checkpointing)"
        )


def load() -> None:
    """Import what training needs (seconds), so that `train` is at its own signal handlers at once."""
    import open_clip_ov2.openclip.run.runner  # noqa: F401


def train(argv: Sequence[str]) -> None:
    """Raises UserError, RunFailed, Interrupted."""
    from open_clip_ov2.openclip.run.runner import train as run

    run(argv)


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank is gone."""
    import torch.distributed as dist

    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError, ConnectionError)
    # What gloo says (a plain RuntimeError) when a peer has ended, or does not come.
    said = (
        "Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe", "Connection refused",
        "Timed out waiting", "Gloo connectFullMesh failed", "Read timeout",
    )  # fmt: skip
    return isinstance(error, kinds) or (isinstance(error, RuntimeError) and any(text in str(error) for text in said))
