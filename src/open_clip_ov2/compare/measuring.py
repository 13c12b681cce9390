"""Before anything is trained: images/s of each stage of each arm, memory of each arm's last one."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from open_clip_ov2.compare import costs, speed, trainer
from open_clip_ov2.compare.config import Arm, Comparison
from open_clip_ov2.compare.plan import Study, arm_words, global_batch
from open_clip_ov2.compare.processes import threads_each
from open_clip_ov2.compare.results import Cost
from open_clip_ov2.errors import UserError

Speeds = Mapping[str, tuple[speed.Speed, ...]]  # of each arm, by stage
Costs = Mapping[str, Cost]  # of a step of each arm


def _stage_lines(study: Study, comparison: Comparison) -> dict[tuple[str, int], list[str]]:
    """What is measured: each stage of each arm by itself."""
    out = {}
    for arm in comparison.arms:
        batch = global_batch(comparison, arm)
        samples = max(4, comparison.measure.samples // batch) * batch
        for index, stage in enumerate(arm.stages):
            argv = arm_words(comparison, arm, study.data, [(stage.resolution, samples)])
            out[arm.name, index] = without_tasks(argv)
    return out


def measure_speeds(study: Study, say: Callable[[str], None]) -> dict[str, Speeds]:
    """By comparison, whose arms take turns."""
    study.folder.mkdir(parents=True, exist_ok=True)
    out: dict[str, Speeds] = {}
    for comparison in study.comparisons:
        lines = _stage_lines(study, comparison)
        titles = {where: _stage_title(comparison.arm(where[0]), where[1]) for where in lines}
        measured = speed.measure(
            {titles[where]: line for where, line in lines.items()},
            samples=comparison.measure.samples,
            batches={titles[where]: global_batch(comparison, comparison.arm(where[0])) for where in lines},
            repetitions=comparison.measure.repetitions,
            folder=study.folder,
            at_once=study.at_once,
            say=say,
        )
        out[comparison.name] = {
            arm.name: tuple(measured[titles[arm.name, index]] for index in range(len(arm.stages)))
            for arm in comparison.arms
        }
    return out


def measure_costs(study: Study, say: Callable[[str], None]) -> dict[str, Costs]:
    """By comparison. An arm that `ov2 bench` could not train alike has no costs. Raises UserError, RunFailed."""
    study.folder.mkdir(parents=True, exist_ok=True)
    threads = threads_each(study.at_once)
    out: dict[str, Costs] = {}
    for comparison in study.comparisons:
        models, measure = [arm.model for arm in comparison.arms], comparison.measure
        found = {}
        for arm in comparison.arms:
            argv = arm_words(comparison, arm, study.data, [(arm.stages[-1].resolution, global_batch(comparison, arm))])
            job = trainer.contender(arm, without_tasks(argv), study.logs, models, measure, threads)
            if isinstance(job, str):
                say(f"{comparison.name}: memory of {arm.name} is not measured: {job}")
            try:
                wanted = measure.largest_batch
                found[arm.name] = Cost() if isinstance(job, str) else costs.measure_cost(job, wanted, study.folder, say)
            except UserError as error:
                raise UserError(f"{comparison.name}: {error}") from error
        out[comparison.name] = found
    return out


def _stage_title(arm: Arm, index: int) -> str:
    return arm.name if len(arm.stages) == 1 else f"{arm.name} at {arm.stages[index].resolution} px"


def without_tasks(argv: list[str]) -> list[str]:
    """Without `--eval` and its interval, for which there is nothing to validate on here."""
    out, words = [], iter(argv)
    for word in words:
        if word in ("--eval", "--eval-every-samples"):
            next(words, None)
        elif not word.startswith(("--eval=", "--eval-every-samples=")):
            out.append(word)
    return out
