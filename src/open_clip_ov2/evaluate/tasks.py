"""The tasks of `ov2 eval`: what each needs of model and flags, what it computes (JSON-ready), and what it prints.

The floats at the top of a result are what an evaluation during training reports. CONTRIBUTING.md adds a task.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from typing import Any

from open_clip_ov2.data.crop import as_batch
from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.evaluate.answering import answer_questions, answers_line
from open_clip_ov2.evaluate.attentive import attentive_probe
from open_clip_ov2.evaluate.caption_loss import caption_loss
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.eval_model import Ability, EvalModel, lacking
from open_clip_ov2.evaluate.extraction import Kind
from open_clip_ov2.evaluate.gathering import gathered_keys
from open_clip_ov2.evaluate.knn import knn
from open_clip_ov2.evaluate.options import ALL, EvalOptions
from open_clip_ov2.evaluate.probes import linear_probe
from open_clip_ov2.evaluate.read_probe import read_probe, read_probe_line, read_probe_table
from open_clip_ov2.evaluate.text.captioning import caption_scores
from open_clip_ov2.evaluate.text.outcomes import OUTCOMES
from open_clip_ov2.evaluate.text.questions import read_questions
from open_clip_ov2.evaluate.text.reading import reading_scores
from open_clip_ov2.evaluate.zero_shot import (
    RECALL_AT,
    contrastive_retrieval,
    likelihood_retrieval,
    zero_shot_contrastive,
    zero_shot_likelihood,
)

Result = Mapping[str, Any]
KEEP_RATIOS = (1.0, 0.5, 0.35, 0.25, 0.1)  # 0.35 and 0.25 are the paper's
DEPENDS_NATS = 0.01  # ours: a loss that shuffling the images raises by less hardly depends on them


@dataclass(frozen=True)
class Task:
    """`line`: one line of a result, given the results of all tasks so far. `table`: rows of equal keys, where a line is
    not enough. `needs`: abilities of the model. `flags`: fields of EvalOptions that must be given. `module`: what must
    be installed. `labels`: needs --label-key, unless the data are folders of classes. `named_only`: left out of `all`,
    because it takes minutes."""

    compute: Callable[[EvalJob], dict[str, Any]]
    line: Callable[[Result, Mapping[str, Result]], str]
    needs: tuple[Ability, ...]
    table: Callable[[Result], list[dict[str, str]]] | None = None
    flags: tuple[str, ...] = ()
    module: str | None = None
    labels: bool = False
    named_only: bool = False

    def obstacle(self, name: str, abilities: frozenset[Ability], options: EvalOptions) -> str | None:
        """Why a model of this name and these abilities cannot do it with these options; None if it can."""
        lacks = lacking(name, abilities, self.needs)
        missing = [f"--{flag.replace('_', '-')}" for flag in self.flags if not getattr(options, flag)]
        if self.labels and not options.label_key and not os.path.isdir(options.data):
            missing.append("--label-key")
        if lacks or missing:
            return lacks or f"{' and '.join(missing)} must be given"
        if self.module is not None and find_spec(self.module) is None:
            return f"{self.module} is not installed; pip install 'open_clip_ov2[eval]'"
        return None


def _on(
    samples: Callable[[EvalJob], EvalLoader], measure: Callable[[EvalModel, EvalLoader, EvalOptions], dict[str, Any]]
) -> Callable[[EvalJob], dict[str, Any]]:
    """A task that measures something on a job's captioned or labelled samples, with the keys of unusable ones."""

    def compute(job: EvalJob) -> dict[str, Any]:
        loader = samples(job)
        found = measure(job.model, loader, job.options)
        return {**found, "skipped_samples": gathered_keys(loader.skipped_keys)}

    return compute


def _caption_loss(model: EvalModel, loader: EvalLoader, options: EvalOptions) -> dict[str, Any]:
    return caption_loss(model, loader)


def _loss_line(found: Result, results: Mapping[str, Result]) -> str:
    return f"{found['caption_loss']:.3f} nats per token, perplexity {found['perplexity']:.2f}"


def _shuffled_loss(job: EvalJob) -> dict[str, Any]:
    return caption_loss(job.model, job.with_shuffled_images())


def _shuffled_line(found: Result, results: Mapping[str, Result]) -> str:
    loss = f"{found['caption_loss']:.3f} nats per token"
    if "caption-loss" not in results:
        return loss
    gap = found["caption_loss"] - results["caption-loss"]["caption_loss"]
    depend = "captions depend on the image" if gap >= DEPENDS_NATS else "captions hardly depend on the image"
    return f"{loss}. Shuffling the images costs {gap:.3f} nats per token, so {depend}."


def _caption(job: EvalJob) -> dict[str, Any]:
    rows, skipped = job.generated
    generated, keys = ({index: row[at] for index, row in rows.items()} for at in (3, 0))
    scores = caption_scores(generated, {index: job.references[index] for index in rows}, keys)
    return {**scores, "skipped_samples": skipped}


def _caption_line(found: Result, results: Mapping[str, Result]) -> str:
    scores = f"CIDEr {found['cider']:.3f}, BLEU-4 {found['bleu4']:.3f}, ROUGE-L {found['rouge_l']:.3f}"
    return f"{scores} of {found['pictures']:,} images"


def _read_text(job: EvalJob) -> dict[str, Any]:
    rows, skipped = job.generated
    scores = reading_scores(rows.values())
    for kind, found in scores["by_kind"].items():
        guess = (job.options.guess or {}).get(kind)
        found["times_guessing"] = found["exact_match"] / guess if guess else None
    return {**scores, "skipped_samples": skipped}


def _reading_line(found: Result, results: Mapping[str, Result]) -> str:
    exact = f"{100 * found['exact_match']:.1f}% of {found['pictures']:,} captions are exactly right"
    return f"{exact}, character error rate {found['character_error_rate']:.3f}"


def _reading_table(found: Result) -> list[dict[str, str]]:
    def shown(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    return [
        {
            "kind": kind,
            "images": f"{row['pictures']:,}",
            "exactly right": f"{row['exact_match']:.1%} ({round(row['exact_match'] * row['pictures'])})",
            "times guessing": shown(row["times_guessing"], ".0f"),
            "character error rate": shown(row["character_error_rate"], ".3f"),
            "numbers right": shown(row["number_accuracy"], ".1%"),
        }
        for kind, row in found["by_kind"].items()
    ]


def _questions(job: EvalJob) -> dict[str, Any]:
    options, model = job.options, job.model
    assert options.questions is not None
    longest = options.seq_len or model.tokenize([""]).shape[1]
    return answer_questions(
        read_questions(options.questions, options.question_images, options.question_rule),
        lambda images_BCHW, keys, prompts: model.generate(images_BCHW, keys, prompts, **options.generation),
        model.preprocess,
        batch_size=options.batch_size,
        collate=partial(as_batch, transform=model.preprocess),
        prompt=options.prompt,
        room=lambda prompt: longest - int(model.num_targets(model.tokenize([prompt]))),
    )


def _probe(probe: Callable[..., dict[str, Any]], kind: Kind) -> Task:
    def compute(job: EvalJob) -> dict[str, Any]:
        assert job.options.train_data is not None
        train, test = (job.features(data, kind) for data in (job.options.train_data, job.options.data))
        skipped = {"train": dict(train.skips), "test": dict(test.skips)}
        return {**probe(train, test, device=job.model.device), "skipped_samples": skipped}

    return Task(compute, _top1_line, needs=("features",), flags=("train_data",))


def _top1_line(found: Result, results: Mapping[str, Result]) -> str:
    top5 = "" if found["top5"] is None else f", top-5 {found['top5']:.1%}"
    return f"top-1 {found['top1']:.1%}{top5} of {found['n_test']:,} images, {found['n_classes']} classes"


def _recall_line(found: Result, results: Mapping[str, Result]) -> str:
    def recalls(name: str) -> str:
        shares = {k: found[f"{name}_recall_at_{k}"] for k in RECALL_AT}
        return ", ".join(f"R@{k} {share:.1%}" for k, share in shares.items() if share is not None)

    return f"image to text {recalls('image_to_text')}; text to image {recalls('text_to_image')}"


def _keep_ratios(job: EvalJob) -> dict[str, Any]:
    """Caption loss by keep ratio; the default ones as far as they keep a token."""
    rows = {}
    for ratio in sorted(set(job.options.keep_ratios or KEEP_RATIOS)):
        try:
            at = EvalJob(job.model, replace(job.options, keep_ratio=ratio), job.watched)
        except UserError:
            if job.options.keep_ratios:
                raise
            continue
        rows[f"{ratio:g}"] = TASKS["caption-loss"].compute(at)
    return {"by_keep_ratio": rows}


def _keep_ratios_line(found: Result, results: Mapping[str, Result]) -> str:
    rows = found["by_keep_ratio"].items()
    return "nats per token: " + ", ".join(f"{row['caption_loss']:.3f} at {ratio}" for ratio, row in rows)


def _image_sizes(job: EvalJob) -> dict[str, Any]:
    """By resolution: caption loss where the model captions, k-NN where there is labelled training data."""
    rows: dict[str, Any] = {}
    for size in sorted(set(job.options.image_sizes)):  # one model at a time in memory
        at, found, errors = EvalJob(job.model.with_image_size(size), job.options, job.watched), {}, []
        for name in ("caption-loss", "knn"):
            if TASKS[name].obstacle(at.model.name, at.model.abilities, at.options) is None:
                try:
                    found[name] = TASKS[name].compute(at)
                    found[name].pop(OUTCOMES, None)
                except UserError as error:  # labelled images need no captions, nor the other way round
                    errors.append(error)
        if not found and errors:
            raise errors[0]
        rows[str(size)] = found
    return {"by_image_size": rows}


def _image_sizes_line(found: Result, results: Mapping[str, Result]) -> str:
    sizes = []
    for size, row in found["by_image_size"].items():
        parts = [f"{row['caption-loss']['caption_loss']:.3f} nats per token"] if "caption-loss" in row else []
        parts += [f"k-NN {row['knn']['top1']:.1%}"] if "knn" in row else []
        sizes.append(f"{size} px: {' and '.join(parts) or 'no task'}")
    return ", ".join(sizes)


TASKS: Mapping[str, Task] = {
    "caption-loss": Task(_on(EvalJob.captioned, _caption_loss), _loss_line, needs=("caption",)),
    "shuffled-loss": Task(_shuffled_loss, _shuffled_line, needs=("caption",)),
    "caption": Task(_caption, _caption_line, needs=("caption",), module="pycocoevalcap"),
    "read-text": Task(_read_text, _reading_line, needs=("caption",), table=_reading_table),
    "likelihood": Task(_on(EvalJob.labelled, zero_shot_likelihood), _top1_line, needs=("caption",), labels=True),
    "likelihood-retrieval": Task(
        _on(EvalJob.captioned, likelihood_retrieval), _recall_line, needs=("caption",), named_only=True
    ),
    "zero-shot": Task(_on(EvalJob.labelled, zero_shot_contrastive), _top1_line, needs=("contrast",), labels=True),
    "retrieval": Task(_on(EvalJob.captioned, contrastive_retrieval), _recall_line, needs=("contrast",)),
    "questions": Task(_questions, lambda found, _: answers_line(found), needs=("caption",), flags=("questions",)),
    "linear-probe": _probe(linear_probe, "pooled"),
    "knn": _probe(knn, "pooled"),
    "attentive-probe": _probe(attentive_probe, "tokens"),
    "read-probe": Task(
        read_probe, read_probe_line, ("features",), read_probe_table, flags=("train_data",), named_only=True
    ),
    "keep-ratios": Task(_keep_ratios, _keep_ratios_line, needs=("caption", "dropping")),
    "image-sizes": Task(_image_sizes, _image_sizes_line, needs=("features", "resizing"), flags=("image_sizes",)),
}


def check_task_names(names: Sequence[str]) -> None:
    """Raises UserError for a task that does not exist."""
    for name in names:
        if name not in TASKS:
            raise unknown_key("--tasks", name, (*TASKS, ALL), "task")


def check_tasks(options: EvalOptions, model: str, abilities: frozenset[Ability]) -> None:
    """Raises UserError for a named task that a model of this name and these abilities cannot do."""
    check_task_names(options.tasks)
    for name in options.tasks:
        obstacle = TASKS[name].obstacle(model, abilities, options)
        if obstacle:
            raise UserError(f"--tasks {name}: {obstacle}")
