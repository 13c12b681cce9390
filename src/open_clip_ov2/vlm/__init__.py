"""From an encoder to a multimodal model: LLaVA's recipes on TRL's SFTTrainer (`ov2 vlm`).

A run is a list of stages (`vlm_recipe.py`) over LLaVA's JSON (`conversations.py`). `assemble.py` puts encoder,
projector and language model together; each stage opens the model of the stage before and writes its own
(`vlm_run.py`), so that in the end the run's folder is a model that transformers opens. Importing this package imports
neither transformers nor TRL.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from types import ModuleType

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.costs import Checked
from open_clip_ov2.vlm.vlm_costs import samples_of
from open_clip_ov2.vlm.vlm_folder import check_same_run
from open_clip_ov2.vlm.vlm_options import VlmPlan, parse


def load() -> ModuleType:
    """Import what training needs (seconds). Raises UserError if it is not installed."""
    try:
        from open_clip_ov2.vlm import vlm_run
    except ImportError as error:
        raise UserError(
            f"ov2 vlm train needs {error.name}: pip install 'open_clip_ov2[vlm]' (Python 3.11 or newer)"
        ) from error
    return vlm_run


def train(plan: VlmPlan) -> None:
    """Train on this rank. Raises UserError, RunFailed and Interrupted."""
    load().train(plan)


def check(argv: Sequence[str], world_size: int = 1) -> Checked:
    """Check the flags of `ov2 vlm train` on so many processes without training. Raises UserError."""
    plan = parse(argv)
    load()
    check_same_run(plan)
    stages = plan.recipe.stages
    for stage in stages:
        plan.accumulation(stage, world_size)
    return Checked(
        name=plan.folder.name,
        run_dir=plan.folder,
        signature=json.dumps(plan.config),
        model=f"{plan.encoder} and {plan.language_model}",
        stages=tuple(stage.data for stage in stages),
        summaries=tuple(stage.summary for stage in stages),
        total_samples=sum(samples_of(plan, stage) for stage in stages),
        parameters=0,  # known when the parts have been opened
    )
