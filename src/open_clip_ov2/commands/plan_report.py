"""A plan as tables for people, and as JSON."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from rich.console import Console
from rich.table import Table

from open_clip_ov2.recipe import short_count
from open_clip_ov2.recipe.costs import Plan, StageCost, largest_divisor

GB, GFLOP = 1e9, 1e9


def show(plan: Plan, console: Console | None = None) -> None:
    console = console or Console(highlight=False)
    total = sum(plan.parameters.values())
    parts = ", ".join(f"{name} {_millions(count)}" for name, count in plan.parameters.items())
    console.print(f"{plan.model}: {_millions(total)} parameters ({parts})")
    console.print(_stages(plan))
    console.print(_whole_run(plan))
    for line in _advice(plan):
        console.print(line)
    if plan.baselines:
        console.print(_comparison(plan))
        console.print(
            "CoCa and CLIP: the same encoder, text towers as wide and deep as the decoder, captions as long for CoCa, "
            "77 tokens for CLIP."
        )


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M"


def _duration(hours: float) -> str:
    if hours < 1:
        return f"{60 * hours:.0f} minutes"
    return f"{hours:,.1f} hours"


def _row_makers(plan: Plan) -> dict[str, Callable[[StageCost], str]]:
    machine = plan.machine
    rows: dict[str, Callable[[StageCost], str]] = {
        "samples": lambda cost: short_count(cost.stage.samples),
        "tokens: encoder / kept / text": _tokens,
        "tokens to the head": lambda cost: f"{cost.tokens.targets:g}",
        "global batch": lambda cost: f"{cost.settings.global_batch:,}",
        f"per GPU ({machine.gpus:,})": _per_gpu,
        "steps": lambda cost: f"{cost.steps:,}",
        "warm-up steps": lambda cost: f"{cost.settings.warmup_steps:,}",
        "learning rate": lambda cost: "default" if cost.settings.lr is None else f"{cost.settings.lr:.2e}",
        "precision": lambda cost: (
            cost.settings.precision + (", recomputed" if cost.settings.grad_checkpointing else "")
        ),
        "GFLOP per image": lambda cost: f"{cost.flops_per_image / GFLOP:,.4g}",
    }
    for part in plan.stages[0].parts:
        rows[f"  of it {part}"] = partial(_share, part)
    return rows | {
        "FLOP": lambda cost: f"{cost.total_flops:.2e}",
        "memory: weights and optimizer": lambda cost: f"{cost.memory.fixed / GB:.1f} GB",
        "memory: activations": lambda cost: f"{cost.settings.batch_size * cost.memory.per_image / GB:,.1f} GB",
        "images/s of all GPUs": lambda cost: f"{cost.images_per_second:,.0f}",
        f"of {machine.tflops:g} TFLOP/s a GPU": lambda cost: f"{cost.utilisation:.0%}",
        "time": lambda cost: _duration(cost.hours),
        "GPU-hours": lambda cost: f"{cost.gpu_hours:,.3g}" if cost.gpu_hours < 100 else f"{cost.gpu_hours:,.0f}",
    }


def _share(part: str, cost: StageCost) -> str:
    return f"{cost.parts[part].total / cost.flops_per_image:.0%}"


def _stages(plan: Plan) -> Table:
    table = Table("", *(_title(index, cost) for index, cost in enumerate(plan.stages)))
    for column in table.columns[1:]:
        column.justify = "right"
    for name, make in _row_makers(plan).items():
        table.add_row(name, *(make(cost) for cost in plan.stages))
    return table


def _title(index: int, cost: StageCost) -> str:
    return f"{cost.stage.name or f'stage {index + 1}'}: {cost.stage.resolution} px"


def _tokens(cost: StageCost) -> str:
    tokens = cost.tokens
    return f"{tokens.encoder} / {tokens.kept or '-'} / {tokens.text}"


def _per_gpu(cost: StageCost) -> str:
    settings = cost.settings
    each = f"{settings.batch_size * settings.accum_freq:,}"
    return each if settings.accum_freq == 1 else f"{each} = {settings.accum_freq} x {settings.batch_size:,}"


def _whole_run(plan: Plan) -> str:
    machine, hours = plan.machine, plan.hours
    how = (
        "from the images per second given"
        if machine.images_per_second
        else f"from FLOPs at {machine.utilisation:.0%} of {machine.tflops:g} TFLOP/s a GPU (an H100's measured dense "
        "bf16 ceiling is 790)"
    )
    gpus = "1 GPU" if machine.gpus == 1 else f"{machine.gpus:,} GPUs"
    spent = f"{hours * machine.gpus:,.4g} GPU-hours"
    return f"whole run: {plan.total_flops:.2e} FLOP, {_duration(hours)} on {gpus}, {spent}, {how}"


def _advice(plan: Plan) -> list[str]:
    """What does not fit the GPU, and what would."""
    lines, limit = [], plan.machine.memory_gb * GB
    for index, cost in enumerate(plan.stages):
        settings = cost.settings
        needed = cost.memory.of(settings.batch_size)
        if needed <= limit:
            continue
        fits = cost.memory.most_images(limit)
        each = settings.batch_size * settings.accum_freq
        way = (
            f"--batch-size {largest_divisor(each, fits)} fits (about {fits:,} images would)"
            if fits
            else "not one image fits; use --grad-checkpointing or more memory"
        )
        lines.append(
            f"{_title(index, cost)}: {settings.batch_size:,} images at once on a GPU need about {needed / GB:,.0f} GB, "
            f"more than {plan.machine.memory_gb:g}; {way}"
        )
    return lines


def _comparison(plan: Plan) -> Table:
    table = Table("GFLOP per image", *(f"{cost.stage.resolution} px" for cost in plan.stages), "whole run", "relative")
    for column in table.columns[1:]:
        column.justify = "right"
    ours = tuple(cost.flops_per_image for cost in plan.stages)
    rows = {plan.model: (ours, plan.total_flops)}
    rows |= {name: (each, plan.baseline_total(name)) for name, each in plan.baselines.items()}
    for name, (each, total) in rows.items():
        numbers = (f"{value / GFLOP:,.4g}" for value in each)
        table.add_row(name, *numbers, f"{total:.2e} FLOP", f"{total / plan.total_flops:.2f} x")
    return table


def as_json(plan: Plan) -> dict[str, Any]:
    """Plain numbers: FLOP, bytes, hours."""
    machine = plan.machine
    return {
        "model": plan.model,
        "parameters": {**plan.parameters, "total": sum(plan.parameters.values())},
        "machine": {
            "gpus": machine.gpus,
            "tflops_per_gpu": machine.tflops,
            "utilisation_assumed": None if machine.images_per_second else machine.utilisation,
            "memory_gb_per_gpu": machine.memory_gb,
        },
        "stages": [_stage_json(cost) for cost in plan.stages],
        "total": {"flop": plan.total_flops, "hours": plan.hours, "gpu_hours": plan.hours * machine.gpus},
        "baselines": {
            name: {"flop_per_image": list(each), "total_flop": plan.baseline_total(name)}
            for name, each in plan.baselines.items()
        },
    }


def _stage_json(cost: StageCost) -> dict[str, Any]:
    settings, tokens = cost.settings, cost.tokens
    return {
        "resolution": cost.stage.resolution,
        "samples": cost.stage.samples,
        "tokens": {"encoder": tokens.encoder, "kept": tokens.kept, "text": tokens.text, "targets": tokens.targets},
        "global_batch": settings.global_batch,
        "batch_size": settings.batch_size,
        "accum_freq": settings.accum_freq,
        "steps": cost.steps,
        "warmup_steps": settings.warmup_steps,
        "lr": settings.lr,
        "precision": settings.precision,
        "grad_checkpointing": settings.grad_checkpointing,
        "flop_per_image": cost.flops_per_image,
        "flop_per_image_by_part": {name: part.total for name, part in cost.parts.items()},
        "flop": cost.total_flops,
        "memory_bytes": {
            "fixed": cost.memory.fixed,
            "activations": settings.batch_size * cost.memory.per_image,
            "per_image": cost.memory.per_image,
        },
        "images_per_second": cost.images_per_second,
        "utilisation": cost.utilisation,
        "hours": cost.hours,
        "gpu_hours": cost.gpu_hours,
    }
