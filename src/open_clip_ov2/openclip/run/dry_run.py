"""Everything about a run that can be checked before it starts, on a machine that need not be the one it runs on."""

from __future__ import annotations

from collections.abc import Sequence

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.data_flags import data_kind
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.command.run_plan import StagePlan, signature
from open_clip_ov2.openclip.models.model_facts import meta_model
from open_clip_ov2.openclip.run.loaders import make_source, samples_per_epoch
from open_clip_ov2.openclip.run.run_folder import check_same_run
from open_clip_ov2.openclip.run.stage_costs import stage_cost, stage_facts
from open_clip_ov2.openclip.run.stage_model import model_options
from open_clip_ov2.recipe.costs import Checked, Machine


def check_run(argv: Sequence[str], world_size: int, gpu: bool, gpu_memory_gb: float | None) -> Checked:
    """Parse the flags, read the recipe, find the data, and build the model without memory. Raises UserError.
    `world_size`, `gpu` and `gpu_memory_gb` are what the run will have, not what this machine has."""
    plan = parse(argv, world_size, gpu)
    samples = sum(_check_data(stage) for stage in plan.stages)
    parameters = [_check_model(stage) for stage in plan.stages]
    if data_kind(plan.stages[0].args, train=True) is None:
        raise UserError("--train-data is missing after `--`: there is nothing to train on")
    check_same_run(plan)
    if gpu_memory_gb is not None:
        for stage in plan.stages:
            _check_memory(stage, Machine(world_size, memory_gb=gpu_memory_gb), plan.shards(world_size))
    return Checked(
        name=plan.name,
        run_dir=plan.folder,
        signature=signature(plan.config),
        model=plan.model,
        stages=tuple(stage.title for stage in plan.stages),
        summaries=tuple(stage.summary for stage in plan.stages),
        total_samples=samples,
        parameters=parameters[-1],
    )


def _check_data(stage: StagePlan) -> int:
    """Samples that the stage will see."""
    args, samples = stage.args, 0
    source = make_source(args, stage.options, train=True)
    if source is not None:
        source.check_consumers(stage.layout.streams)
        samples = samples_per_epoch(args, source) * args.epochs
    make_source(args, stage.options, train=False)
    return samples


def _check_model(stage: StagePlan) -> int:
    """Number of parameters of the stage's model."""
    args = stage.args
    options = model_options(stage.options, args)
    model = meta_model(args.model, resolution=stage.image_size, context_length=args.force_context_length, **options)
    return sum(parameter.numel() for parameter in model.parameters())


def _check_memory(stage: StagePlan, machine: Machine, shards: int) -> None:
    try:
        advice = stage_cost(stage, stage_facts(stage), machine, shards=shards).memory_advice()
    except UserError as error:
        print(f"memory    not estimated: {error}")
        return
    if advice:
        raise UserError(f"{advice} (--gpu-memory-gb {machine.memory_gb:g})")
