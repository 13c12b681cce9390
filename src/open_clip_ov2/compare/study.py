"""From comparisons to a page: measure, train what is not trained, evaluate what is not evaluated, gather, write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from open_clip_ov2 import training
from open_clip_ov2.argv import to_argv, value_of
from open_clip_ov2.compare import page, plan, results
from open_clip_ov2.compare.answers import Outcomes, answers, stacked
from open_clip_ov2.compare.bench.turns import Log
from open_clip_ov2.compare.config import Comparison, Evaluation, Variant
from open_clip_ov2.compare.measuring import Costs, Speeds, key_of, measure_costs, measure_speeds
from open_clip_ov2.compare.plan import ByStage, Losses, Run, Study, global_batch, mean_over_stages, train_argv
from open_clip_ov2.compare.results import Found, VariantResult
from open_clip_ov2.compare.subprocesses import Command, run_all
from open_clip_ov2.errors import UserError, naming
from open_clip_ov2.evaluate.text.outcomes import outcomes_file, read_outcomes
from open_clip_ov2.files import read_json, write_json, write_text
from open_clip_ov2.locks import FolderLock
from open_clip_ov2.tracking.figures import read_results
from open_clip_ov2.tracking.status import FINISHED, read_status

# Differences that a table shows, or that follow from what it shows.
SHOWN = ("model", "force_image_size", "train_num_samples", "epochs", "seed", "warmup", "caption_keys_given")
VALIDATION = ("--val-data", "--val-num-samples", "--val-every-samples", "--eval", "--eval-every-samples")


@dataclass(frozen=True)
class PlannedRun:
    """A run of a comparison, where it is or will be, and the files of its evaluations."""

    run: Run
    known: training.PlannedRun
    evaluations: Mapping[Path, Evaluation]

    def numbers(self) -> dict[str, float]:
        """Of its evaluations and, under `run.`, of its last validation in training. Raises UserError."""
        validations = [row for row in read_results(self.known.run_dir) if row["kind"] == "val"]
        found = results.read_evaluations({file: one.name for file, one in self.evaluations.items()})
        return found | (results.flatten(validations[-1], "run") if validations else {})

    def outcomes(self) -> dict[str, tuple[Any, Any]]:
        """Keys and values of each image, by the key of the metric that they are averaged in. Raises UserError."""
        return {
            f"{one.name}.{name}" if one.name else name: values
            for file, one in self.evaluations.items()
            for name, values in read_outcomes(outcomes_file(file)).items()
        }


def carry_out(study: Study, log: Log) -> list[Found]:
    """Measure, train, evaluate and write the page, alone in the study's folder. Results that exist are read, not made
    again. Raises UserError, RunFailed."""
    flops = [_check(study, one) for one in study.comparisons]
    with FolderLock(study.folder):
        costs = [measure_costs(study, one, log) for one in study.comparisons]  # first: a batch may not fit
        speeds = [measure_speeds(study, one, log) for one in study.comparisons]
        searched = [_search(study, *of_one, log) for of_one in zip(study.comparisons, speeds, flops, strict=True)]
        comparisons = [plan.with_rates(*of_one) for of_one in zip(study.comparisons, searched, strict=True)]
        planned = [_plan(study, *of_one) for of_one in zip(comparisons, speeds, flops, strict=True)]
        every = [run for of_one in planned for run in of_one]
        _train(study, every, log)
        _evaluate(study, every, log)
        gathered = zip(comparisons, planned, costs, speeds, flops, searched, strict=True)
        found = [replace(_gather(*of_one), searched=losses) for *of_one, losses in gathered]
        write_text(study.folder / "index.html", page.page(study.title, found, study.command))
        write_text(study.folder / "results.md", page.results_md(study.title, found, study.command))
        write_text(study.folder / "answers.md", page.summary_md(found))
        write_text(study.folder / "results.csv", results.as_csv(found))
        write_json(study.folder / "results.json", results.as_json(found))
    return found


def _check(study: Study, comparison: Comparison) -> ByStage:
    """Flags, models and tasks, before anything is measured: FLOPs of an image. Raises UserError."""
    _baselines(comparison)
    for evaluation in comparison.evaluations:
        with naming(f"{comparison.name}: evaluate"):
            training.check_evaluation(_eval_argv(study, evaluation))
    flops = {}
    for variant in comparison.variants:
        stages = [(stage.resolution, global_batch(comparison, variant)) for stage in variant.stages]
        argv = [*train_argv(study, comparison, variant, stages), "--val-data", study.val, "--logs", str(study.logs)]
        with naming(f"{comparison.name}: variant {variant.name}"):
            flops[variant.name] = training.planned_run(argv).flops
    return flops


def _search(study: Study, comparison: Comparison, speeds: Speeds, flops: ByStage, log: Log) -> Losses:
    """The loss of a run at each learning rate. Raises UserError."""
    tried = plan.search_runs(study, comparison, speeds.medians, flops)
    planned = [PlannedRun(run, training.planned_run([*run.argv, "--logs", str(study.logs)]), {}) for _, _, run in tried]
    _train(study, planned, log)
    found: dict[str, dict[float, float]] = {}
    for (name, lr, _), one in zip(tried, planned, strict=True):
        found.setdefault(name, {})[lr] = plan.final_loss(read_results(one.known.run_dir))
    for name, by_rate in found.items():
        shown = ", ".join(f"{lr:g} {loss:.3f}" for lr, loss in by_rate.items())
        log(f"learning rate of {name}: {plan.best_rate(by_rate):g} (loss {shown})")
    return found


def _plan(study: Study, comparison: Comparison, speeds: Speeds, flops: ByStage) -> list[PlannedRun]:
    out = []
    for run in plan.runs(study, comparison, speeds.medians, flops):
        known = training.planned_run([*run.argv, "--logs", str(study.logs)])
        files = {
            study.folder / "evaluations" / f"{known.name}-{key_of(_eval_argv(study, one))}.json": one
            for one in comparison.evaluations
            if not one.variants or run.variant.name in one.variants
        }
        out.append(PlannedRun(run, known, files))
    return out


def _train(study: Study, planned: Sequence[PlannedRun], log: Log) -> None:
    commands: dict[str, Command | None] = {}
    for one in planned:
        name, folder, status = one.known.name, one.known.run_dir, read_status(one.known.run_dir)
        argv = ["train", *one.run.argv, "--logs", str(study.logs), "--name", name]
        commands[name] = Command.ov2(one.run.title, argv, study.folder / "logs" / f"{name}.txt")
        if status is not None and status.state == FINISHED and status.stage == status.stages:
            commands[name] = None
            before = read_json(folder / "run.json", dict, "what `ov2 train` writes").get("command", [])
            other = [flag for flag in VALIDATION if value_of(before, flag) != value_of(argv, flag)]
            if other:
                raise UserError(
                    f"{folder}: a run of another comparison, validated with another {', '.join(other)}; give --out or "
                    "--logs another folder, or remove the run"
                )
    _run("training", list(commands.values()), study, log)


def _eval_argv(study: Study, evaluation: Evaluation) -> list[str]:
    """Flags of `ov2 eval` except --out."""
    argv = ["--data", study.val, "--tasks", ",".join(evaluation.tasks)]
    argv += ["--train-data", study.probe] if evaluation.train_data else []
    return [*argv, *to_argv(evaluation.flags)]


def _evaluate(study: Study, planned: Sequence[PlannedRun], log: Log) -> None:
    commands: dict[Path, Command | None] = {}
    for one in planned:
        for file, evaluation in one.evaluations.items():
            argv = ["eval", str(one.known.run_dir), *_eval_argv(study, evaluation), "--out", str(file)]
            title = f"{one.run.title}: {', '.join(evaluation.tasks)}"
            command = Command.ov2(title, argv, study.folder / "logs" / f"{file.stem}.txt")
            commands[file] = None if file.is_file() else command
    (study.folder / "evaluations").mkdir(parents=True, exist_ok=True)
    _run("evaluation", list(commands.values()), study, log)


def _run(what: str, commands: Sequence[Command | None], study: Study, log: Log) -> None:
    """Run the commands; None stands for one whose result exists."""
    waiting = [command for command in commands if command is not None]
    if len(waiting) < len(commands):
        log(f"{what}: {len(commands) - len(waiting)} of {len(commands)} are done already")
    for number, (command, seconds) in enumerate(run_all(waiting, study.at_once), 1):
        log(f"{what} {number} of {len(waiting)}: {command.title} ({seconds:.0f} s)")


def _gather(
    comparison: Comparison, planned: Sequence[PlannedRun], costs: Costs, speeds: Speeds, flops: ByStage
) -> Found:
    rates = {variant.name: _rates(variant, speeds) for variant in comparison.variants}
    reference = next((one for one in planned if one.run.variant.name == comparison.reference), None)
    variants, known, outcomes = [], set[str](), {}
    for variant in comparison.variants:
        name, own = variant.name, [one for one in planned if one.run.variant is variant]
        numbers = [one.numbers() for one in own]
        known.update(*numbers)
        shared = set(numbers[0]).intersection(*numbers) if numbers else set[str]()
        over = {**comparison.flags, **variant.flags}.get(comparison.curve_over or "")
        result = VariantResult(
            name=name,
            model=variant.model,
            trained=variant.trained,
            seeds=tuple(one.run.seed for one in own),
            stage_samples=own[0].run.stage_samples if own else (),
            flops=mean_over_stages(variant, flops[name]),
            rates=rates[name],
            stage_rates=tuple(speeds.medians[name]),
            ratios=tuple(a / b for a, b in zip(rates[name], rates[comparison.reference], strict=True)),
            cost=costs[name],
            unlike=unlike(own[0].known.config, reference.known.config) if own and reference else (),
            over=float(over) if isinstance(over, (int, float)) and not isinstance(over, bool) else None,
            values={one.key: tuple(n[one.key] for n in numbers) for one in comparison.metrics if one.key in shared},
            learning=results.learning_curves(comparison.metrics, [read_results(one.known.run_dir) for one in own]),
        )
        variants.append(result)
        outcomes[name] = _outcomes(result, own)
    results.check_metrics(comparison, known, variants)
    found, baselines = answers(comparison, outcomes), _baselines(comparison)
    return Found(comparison, tuple(variants), speeds.machine, found, baselines=baselines)


def _baselines(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Numbers of each by dotted path. Raises UserError."""
    found = {}
    for one in comparison.baselines:
        with naming(f"{comparison.name}: baseline {one.name}"):
            found[one.name] = results.read_evaluations({Path(one.results): ""})
    return found


def _outcomes(variant: VariantResult, runs: Sequence[PlannedRun]) -> dict[str, Outcomes]:
    """By metric: of each image where the evaluation has them, of each seed otherwise. Raises UserError."""
    by_seed = [run.outcomes() for run in runs]
    return {
        key: stacked([one[key] for one in by_seed], f"{variant.name}: {key}")
        if all(key in one for one in by_seed)
        else Outcomes(None, np.array(values)[:, None])
        for key, values in variant.values.items()
    }


def _rates(variant: Variant, speeds: Speeds) -> tuple[float, ...]:
    """Images/s over all stages, by repetition."""
    by_repetition = zip(*speeds.rates[variant.name], strict=True)
    return tuple(1 / mean_over_stages(variant, [1 / rate for rate in rates]) for rates in by_repetition)


def unlike(config: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[str, ...]:
    """`flag value (the other's)` for each flag of a stage that differs and that a comparison's table does not show."""
    out = {}
    for mine, theirs in zip(config["stages"], other["stages"], strict=False):
        for key in sorted(mine.keys() | theirs.keys()):
            values = ["none" if one.get(key) is None else str(one[key]) for one in (mine, theirs)]
            if mine.get(key) != theirs.get(key) and key not in SHOWN:
                name = key.replace("_", "-")
                out[name] = f"{name} {values[0]} ({values[1]})"
    return tuple(out.values())
