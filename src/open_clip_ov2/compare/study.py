"""From comparisons to a page: measure, train what is not trained, evaluate what is not evaluated, gather, write."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from open_clip_ov2.argv import to_argv
from open_clip_ov2.compare import page, plots, speed, tables, trainer
from open_clip_ov2.compare.config import Arm, Comparison, Evaluation
from open_clip_ov2.compare.kept import key_of
from open_clip_ov2.compare.measuring import Costs, Speeds, measure_costs, measure_speeds
from open_clip_ov2.compare.plan import Run, Study, arm_words, global_batch, runs
from open_clip_ov2.compare.processes import Command, run_all
from open_clip_ov2.compare.results import (
    ArmResult,
    Found,
    as_json,
    by_metric,
    check_metrics,
    flatten,
    learning_curve,
    read_evaluations,
)
from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.figures import read_results

FlopsByArm = Mapping[str, tuple[float, ...]]  # the same of an image


@dataclass(frozen=True)
class Trained:
    """A run, where it lies, and its evaluations' files."""

    run: Run
    known: trainer.Known
    evaluations: tuple[Path, ...]
    names: tuple[str, ...]


def carry_out(study: Study, say: Callable[[str], None]) -> list[Found]:
    """All of it; what is there already is read. Raises UserError."""
    flops = {one.name: {arm.name: _flops(study, one, arm) for arm in one.arms} for one in study.comparisons}
    _check_tasks(study)
    costs = measure_costs(study, say)  # before the speeds: what does not fit is told first
    speeds = measure_speeds(study, say)
    planned = {one.name: _plan(study, one, speeds[one.name], flops[one.name]) for one in study.comparisons}
    _train(study, [run for group in planned.values() for run in group], say)
    _evaluate(study, [(one, run) for one in study.comparisons for run in planned[one.name]], say)
    found = [
        _gather(one, costs[one.name], planned[one.name], speeds[one.name], flops[one.name]) for one in study.comparisons
    ]
    write(study, found)
    return found


# --- plan ----------------------------------------------------------------------------------------------


def _check_tasks(study: Study) -> None:
    """Raises UserError for a task that `ov2 eval` does not have."""
    for comparison in study.comparisons:
        for evaluation in comparison.evaluations:
            try:
                trainer.check_tasks(evaluation.tasks)
            except UserError as error:
                raise UserError(f"{comparison.name}: [[evaluate]] {error}") from error


def _flops(study: Study, comparison: Comparison, arm: Arm) -> tuple[float, ...]:
    """Of one image by stage; flags and model are looked at before anything is measured. Raises UserError."""
    stages = [(stage.resolution, global_batch(comparison, arm)) for stage in arm.stages]
    argv = [*arm_words(comparison, arm, study.data, stages), "--val-data", study.data.val]
    try:
        return trainer.look_at(argv, study.logs).flops
    except UserError as error:
        raise UserError(f"{comparison.name}: arm {arm.name}: {error}") from error


def _plan(study: Study, comparison: Comparison, speeds: Speeds, flops: FlopsByArm) -> list[Trained]:
    rates = {name: [one.median for one in by_stage] for name, by_stage in speeds.items()}
    out = []
    for run in runs(comparison, study.data, comparison.seeds, rates, flops):
        known = trainer.look_at(run.argv, study.logs)
        files = [
            study.folder / "evaluations" / f"{known.name}-{key_of(_eval_words(study, evaluation))}.json"
            for evaluation in _evaluations(comparison, run)
        ]
        names = tuple(evaluation.name for evaluation in _evaluations(comparison, run))
        out.append(Trained(run, known, tuple(files), names))
    return out


# --- training and evaluating ---------------------------------------------------------------------------


def _train(study: Study, trained: Sequence[Trained], say: Callable[[str], None]) -> None:
    jobs = {}
    for one in trained:
        if trainer.is_finished(one.known.run_dir):
            other = trainer.validated_otherwise(one.known.run_dir, one.run.argv)
            if other:
                raise UserError(
                    f"{one.known.run_dir}: a run of another comparison, validated with another {', '.join(other)}; "
                    "give --out or --logs another folder, or remove the run"
                )
        else:
            title = f"{one.run.arm.name}, seed {one.run.seed}"
            command = trainer.train_command(one.run.argv, study.logs, one.known.name)
            jobs[one.known.name] = Command(title, tuple(command), study.folder / "logs" / f"{one.known.name}.txt")
    _run("training", list(jobs.values()), len({one.known.name for one in trained}), study, say)


def _evaluations(comparison: Comparison, run: Run) -> list[Evaluation]:
    return [one for one in comparison.evaluations if not one.arms or run.arm.name in one.arms]


def _eval_words(study: Study, evaluation: Evaluation) -> list[str]:
    """Flags of `ov2 eval` but for --out."""
    given = ["--data", study.data.val, "--tasks", ",".join(evaluation.tasks)]
    given += ["--train-data", study.data.probe] if evaluation.train_data else []
    return [*given, *to_argv(evaluation.flags)]


def _evaluate(study: Study, trained: Sequence[tuple[Comparison, Trained]], say: Callable[[str], None]) -> None:
    jobs, total = {}, set()
    for comparison, one in trained:
        for evaluation, file in zip(_evaluations(comparison, one.run), one.evaluations, strict=True):
            total.add(file)
            if not file.is_file():
                argv = [*_eval_words(study, evaluation), "--out", str(file)]
                title = f"{one.run.arm.name}, seed {one.run.seed}: {', '.join(evaluation.tasks)}"
                log = study.folder / "logs" / f"{file.stem}.txt"
                jobs[file] = Command(title, tuple(trainer.eval_command(one.known.run_dir, argv)), log)
    (study.folder / "evaluations").mkdir(parents=True, exist_ok=True)
    _run("evaluation", list(jobs.values()), len(total), study, say)


def _run(what: str, jobs: Sequence[Command], total: int, study: Study, say: Callable[[str], None]) -> None:
    if total > len(jobs):
        say(f"{what}: {total - len(jobs)} of {total} are done already")
    finished = 0

    def done(job: Command, seconds: float) -> None:
        nonlocal finished
        finished += 1
        say(f"{what} {finished} of {len(jobs)}: {job.title} ({seconds:.0f} s)")

    run_all(jobs, study.at_once, done)


# --- gathering and writing -----------------------------------------------------------------------------


def _gather(
    comparison: Comparison, costs: Costs, trained: Sequence[Trained], speeds: Speeds, flops: FlopsByArm
) -> Found:
    evaluated = {id(one): _figures(one) for one in trained}
    rates = {arm.name: _rates(arm, speeds[arm.name]) for arm in comparison.arms}
    first = {arm.name: [one for one in trained if one.run.arm.name == arm.name][:1] for arm in comparison.arms}
    arms = []
    for arm in comparison.arms:
        own = [one for one in trained if one.run.arm.name == arm.name]
        records = [read_results(one.known.run_dir) for one in own]
        result = ArmResult(
            name=arm.name,
            model=arm.model,
            trained=arm.trained,
            seeds=tuple(one.run.seed for one in own),
            stage_samples=own[0].run.stage_samples if own else (),
            flops=sum(stage.share * value for stage, value in zip(arm.stages, flops[arm.name], strict=True)),
            rates=rates[arm.name],
            stage_rates=tuple(one.median for one in speeds[arm.name]),
            ratios=tuple(
                mine / theirs for mine, theirs in zip(rates[arm.name], rates[comparison.reference], strict=True)
            ),
            memory_mb=max(one.memory_mb for one in speeds[arm.name]),
            cost=costs[arm.name],
            unlike=tuple(
                text
                for mine, theirs in zip(first[arm.name], first[comparison.reference], strict=False)
                for text in trainer.unlike(mine.known, theirs.known)
            ),
            over=_number({**comparison.flags, **arm.flags}.get(comparison.curve_over or "")),
            values=by_metric(comparison.metrics, [evaluated[id(one)] for one in own]) if own else {},
            learning={
                metric.key: tuple(learning_curve(rows, metric.learning) for rows in records)
                for metric in comparison.metrics
                if metric.learning
            },
        )
        arms.append(result)
    check_metrics(comparison, {key for values in evaluated.values() for key in values}, arms)
    return Found(comparison, tuple(arms), next(iter(speeds.values()))[0].machine)


def _figures(one: Trained) -> dict[str, float]:
    """Of its evaluations, and under `run.` those of its last validation in training."""
    validations = [row for row in read_results(one.known.run_dir) if row["kind"] == "val"]
    return read_evaluations(one.evaluations, one.names) | (flatten(validations[-1], "run") if validations else {})


def _rates(arm: Arm, by_stage: Sequence[speed.Speed]) -> tuple[float, ...]:
    """Images/s over all stages, by repetition: the shares' harmonic mean."""
    each = zip(*(one.images_per_second for one in by_stage), strict=True)
    return tuple(1 / sum(s.share / rate for s, rate in zip(arm.stages, rates, strict=True)) for rates in each)


def _number(value: object) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def write(study: Study, found: Sequence[Found]) -> list[Path]:
    """index.html, results.md, results.csv and results.json."""
    drawn = [(one, plots.plots(one)) for one in found]
    told = [f"# {study.title}", "", f"    {study.command}", "", *(f"- {term}" for term in page.TERMS)]
    for one in found:
        told += ["", f"## {one.comparison.title}", "", one.comparison.about, "", page.budget(one), ""]
        told += [
            tables.markdown(one),
            *(line for note in (*one.comparison.notes, *page.terms(one)) for line in (note, "")),
        ]
    texts = {
        "index.html": page.page(study.title, drawn, study.command),
        "results.md": "\n".join(told) + "\n",
        "results.csv": tables.csv_text(found),
        "results.json": as_json(found),
    }
    study.folder.mkdir(parents=True, exist_ok=True)
    for name, text in texts.items():
        (study.folder / name).write_text(text, encoding="utf-8")
    return [study.folder / name for name in texts]


def as_asked(comparison: Comparison, seeds: Sequence[int] | None, scale: float) -> Comparison:
    """The command line's seeds in the file's place, and so many times the file's samples or seconds."""
    changed = replace(comparison, seeds=tuple(seeds)) if seeds else comparison
    return replace(changed, budget=scale * comparison.budget)
