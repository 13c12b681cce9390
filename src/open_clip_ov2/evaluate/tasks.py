"""The tasks of `ov2 eval`, by name: what each needs of model and data, and what it gives (docs/evaluation.md).

A result is JSON-ready. The numbers at its top are what an evaluation during training reports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from typing import Any, cast

from torch import Tensor

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.data.eval_loader import EvalLoader
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.attentive import attentive_probe
from open_clip_ov2.evaluate.caption_loss import caption_loss, gathered_keys
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.eval_model import Ability
from open_clip_ov2.evaluate.extraction import Features, Kind
from open_clip_ov2.evaluate.knn import knn
from open_clip_ov2.evaluate.likelihood import likelihood_retrieval, zero_shot_likelihood
from open_clip_ov2.evaluate.options import KEEP_RATIOS, EvalOptions
from open_clip_ov2.evaluate.probes import linear_probe
from open_clip_ov2.evaluate.robustness import keep_ratio_curve, resolution_curve
from open_clip_ov2.evaluate.text.answering import answer_questions
from open_clip_ov2.evaluate.text.captioning import caption_scores
from open_clip_ov2.evaluate.text.questions import read_questions
from open_clip_ov2.evaluate.text.reading import reading_scores
from open_clip_ov2.evaluate.zero_shot import contrastive_retrieval, zero_shot_contrastive

ALL = "all"
CONSTANTS = ("temperature", "regulariser", "num_samples")  # numbers of a result that measure nothing


@dataclass(frozen=True)
class Task:
    """`ability`: what the model must be able to do; `options`: fields of EvalOptions that must be given; `module`: what
    must be installed; `named_only`: left out of `all`, for it takes pictures x texts; `labels`: wants labels, which a
    folder has; `drops_tokens`: of ov2 models alone."""

    run: Callable[[EvalJob], dict[str, Any]]
    ability: Ability
    options: tuple[str, ...] = ()
    module: str | None = None
    named_only: bool = False
    labels: bool = False
    drops_tokens: bool = False

    def lacks(self, job: EvalJob) -> str | None:
        """Why it cannot be run, if so."""
        if self.ability not in job.subject.abilities:
            can = ", ".join(sorted(job.subject.abilities))
            return f"{job.evaluated.name} has no {self.ability} (it has: {can})"
        if self.drops_tokens and not isinstance(job.evaluated.model, CaptionModel):
            return f"{job.evaluated.name} drops no tokens"
        return self.lacks_flags(job.options)

    def lacks_flags(self, options: EvalOptions) -> str | None:
        """The part that no model is wanted for."""
        missing = [f"--{name.replace('_', '-')}" for name in self.options if not getattr(options, name)]
        if missing:
            return f"{' and '.join(missing)} must be given"
        if self.labels and not options.label_key and not os.path.isdir(options.data):
            return "--label-key must be given"
        if self.module is not None and find_spec(self.module) is None:
            return f"{self.module} is not installed (pip install 'open_clip_ov2[eval]')"
        return None


def _caption_loss(job: EvalJob) -> dict[str, Any]:
    loader = job.captioned()
    found = caption_loss(job.evaluated.model, loader, job.compute, job.options.keep_ratio)
    return _with_skips(job, loader, found)


def _shuffled_loss(job: EvalJob) -> dict[str, Any]:
    pairs = job.with_shuffled_pictures()
    return dict(caption_loss(job.evaluated.model, pairs, job.compute, job.options.keep_ratio))


def _caption(job: EvalJob) -> dict[str, Any]:
    rows = job.generated
    scores = caption_scores(
        {index: row.generated for index, row in rows.items()},
        {index: job.references[index] for index in rows},
        {index: row.key for index, row in rows.items()},
    )
    return {**asdict(scores), "skipped_samples": job.caption_skips}


def _read_text(job: EvalJob) -> dict[str, Any]:
    rows = job.generated
    scores = reading_scores(
        {index: row.generated for index, row in rows.items()},
        {index: row.true for index, row in rows.items()},
        {index: row.kind for index, row in rows.items()},
        {index: row.key for index, row in rows.items()},
    ).as_json()
    for kind, found in scores["by_kind"].items():
        guess = job.options.guess.get(kind)
        found["times_guessing"] = found["exact_match"] / guess if guess else None
    return {**scores.pop("overall"), **scores, "skipped_samples": job.caption_skips}


def _questions(job: EvalJob) -> dict[str, Any]:
    options = job.options
    assert options.questions is not None
    generation = dict(options.generation)

    def answer(images_BCHW: Tensor, keys: Sequence[str], prompts: Sequence[str]) -> Sequence[str]:
        return job.subject.generate(images_BCHW, keys, prompts, **generation)

    longest = generation.get("seq_len") or job.subject.tokenize([""]).shape[1]

    def room(prompt: str) -> int:
        """A prompt that fills the context was cut by the tokenizer, and has its end at the last place."""
        ends = (job.subject.tokenize([prompt])[0] == job.compute.eos_id).nonzero()
        return longest - (int(ends[0]) if len(ends) else longest)

    scores = answer_questions(
        read_questions(options.questions, options.question_images, options.question_rule),
        answer,
        job.evaluated.preprocess,
        batch_size=options.batch_size,
        prompt=options.prompt,
        room=room,
        rank=job.rank,
        world_size=job.world_size,
    )
    found = scores.as_json()
    return {**found.pop("overall"), **found}


def _probe(probe: Callable[..., dict[str, Any]], kind: Kind) -> Callable[[EvalJob], dict[str, Any]]:
    def run(job: EvalJob) -> dict[str, Any]:
        assert job.options.train_data is not None
        train, test = (job.features(data, kind) for data in (job.options.train_data, job.options.data))
        found = probe(train, test, device=job.compute.device)
        return {**found, "skipped_samples": _skips(train, test)}

    return run


def _with_skips(job: EvalJob, loader: EvalLoader, found: dict[str, Any]) -> dict[str, Any]:
    return {**found, "skipped_samples": gathered_keys(loader.skipped_keys, job.world_size)}


def _likelihood(job: EvalJob) -> dict[str, Any]:
    options, loader = job.options, job.labelled()
    found = zero_shot_likelihood(
        job.subject, loader, options.classes, options.templates,
        length_normalise=options.length_normalise, world_size=job.world_size,
    )  # fmt: skip
    return _with_skips(job, loader, found)


def _zero_shot(job: EvalJob) -> dict[str, Any]:
    options, loader = job.options, job.labelled()
    found = zero_shot_contrastive(job.subject, loader, options.classes, options.templates, world_size=job.world_size)
    return _with_skips(job, loader, found)


def _likelihood_retrieval(job: EvalJob) -> dict[str, Any]:
    loader, normalise = job.captioned(), job.options.length_normalise
    found = likelihood_retrieval(job.subject, loader, length_normalise=normalise, world_size=job.world_size)
    return _with_skips(job, loader, found)


def _retrieval(job: EvalJob) -> dict[str, Any]:
    loader = job.captioned()
    return _with_skips(job, loader, contrastive_retrieval(job.subject, loader, world_size=job.world_size))


def _keep_ratios(job: EvalJob) -> dict[str, Any]:
    """Caption loss by share of kept tokens."""
    model = job.evaluated.model

    def measure(ratio: float) -> dict[str, Any]:
        loader = job.captioned()
        return _with_skips(job, loader, caption_loss(model, loader, job.compute, ratio))

    rows, columns = cast(CaptionModel, model).visual.grid_size
    ratios = job.options.keep_ratios or [ratio for ratio in KEEP_RATIOS if ratio * rows * columns >= 1]
    return {"by_keep_ratio": keep_ratio_curve(measure, ratios)}


def _image_sizes(job: EvalJob) -> dict[str, Any]:
    """Caption loss where the model captions, and k-NN where there is labelled training data, by resolution."""
    open_at = job.evaluated.at_size
    if open_at is None:
        raise UserError("image-sizes: a model in training keeps its resolution; evaluate its checkpoint")

    def measure(image_size: int) -> dict[str, Any]:
        at = EvalJob(open_at(image_size), job.compute, job.options, job.rank)
        found, errors = {}, []
        for name in ("caption-loss", "knn"):
            if TASKS[name].lacks(at) is None:
                try:
                    found[name] = TASKS[name].run(at)
                except UserError as error:  # labelled pictures need no captions, nor the other way round
                    errors.append(error)
        if not found and errors:
            raise errors[0]
        return found

    return {"by_image_size": resolution_curve(measure, job.options.image_sizes)}


def _skips(train: Features, test: Features) -> dict[str, dict[str, list[str]]]:
    return {"train": dict(train.skips), "test": dict(test.skips)}


TASKS: Mapping[str, Task] = {
    "caption-loss": Task(_caption_loss, "caption"),
    "shuffled-loss": Task(_shuffled_loss, "caption"),
    "caption": Task(_caption, "caption", module="pycocoevalcap"),
    "read-text": Task(_read_text, "caption"),
    "likelihood": Task(_likelihood, "caption", labels=True),
    "likelihood-retrieval": Task(_likelihood_retrieval, "caption", named_only=True),
    "zero-shot": Task(_zero_shot, "contrast", labels=True),
    "retrieval": Task(_retrieval, "contrast"),
    "questions": Task(_questions, "caption", ("questions",)),
    "linear-probe": Task(_probe(linear_probe, "pooled"), "features", ("train_data",)),
    "knn": Task(_probe(knn, "pooled"), "features", ("train_data",)),
    "attentive-probe": Task(_probe(attentive_probe, "tokens"), "features", ("train_data",)),
    "keep-ratios": Task(_keep_ratios, "caption", drops_tokens=True),
    "image-sizes": Task(_image_sizes, "features", ("image_sizes",)),
}


def check_tasks(text: str) -> tuple[str, ...]:
    """Names of tasks; empty for all. Raises UserError for an unknown one."""
    if text == ALL:
        return ()
    names = tuple(part.strip() for part in text.split(","))
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks {name}: no such task (there are: {', '.join(TASKS)}; or {ALL})")
    return names


def run_tasks(
    job: EvalJob,
    say: Callable[[str], None] = lambda line: None,
    done: Callable[[dict[str, Any]], None] = lambda results: None,
) -> dict[str, Any]:
    """Results by task; `done` gets them after each. Raises UserError: a task that was named cannot be done, which is
    found before the first one as far as it can be; of `all`, what cannot is said."""
    names = check_tasks(job.options.tasks)
    for name in names:
        reason = TASKS[name].lacks(job)
        if reason:
            raise UserError(f"--tasks {name}: {reason}")
    results: dict[str, Any] = {}
    for name in names or [name for name, task in TASKS.items() if not task.named_only]:
        reason = TASKS[name].lacks(job)
        if reason:
            say(f"{name}: left out, {reason}")
            continue
        try:
            results[name] = TASKS[name].run(job)
            done(results)
        except UserError as error:  # of the data, which is the same on all ranks
            if names:
                raise
            say(f"{name}: left out, {error}")
    if not results:
        raise UserError(f"no task can be done on {job.evaluated.name}; name one with --tasks to see why")
    return results


def headlines(results: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """`task/metric` -> number, of the numbers at the top of each result."""
    return {
        f"{task}/{name}": float(value)
        for task, found in results.items()
        for name, value in found.items()
        if isinstance(value, float) and name not in CONSTANTS
    }
