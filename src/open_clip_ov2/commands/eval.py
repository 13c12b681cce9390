"""`ov2 eval`: what a model knows of held-out pictures. Under torchrun on several processes, with the same result."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import add_device, paths_checked, values_checked
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.options import EvalOptions, add_eval_flags, eval_options

Result = Mapping[str, Any]


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    options = eval_options(args)
    from open_clip_ov2.evaluate.tasks import check_tasks
    from open_clip_ov2.openclip.processes import processes

    check_tasks(options.tasks)
    path = args.out or _beside(args.run)
    _check_writable(path)
    with values_checked(), processes(args.device) as place:
        results = _evaluate(args.run, options, place, path)
    if place.rank != 0:
        return
    show(results, Console())
    print(path)


def _check_writable(path: Path) -> None:
    """Before hours of work. Raises UserError."""
    folder = path.parent
    if path.is_dir() or not folder.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise UserError(f"{path}: cannot be written there; name a file in a folder that exists and is yours (--out)")


def _write(path: Path, of: dict[str, str], results: Mapping[str, Result]) -> None:
    """What the file has of other tasks on the same model and data stays in it."""
    before: dict[str, Any] = {}
    if path.is_file():
        try:
            before = json.loads(path.read_text())
        except ValueError:
            before = {}
    if not isinstance(before, dict) or any(before.get(key) != value for key, value in of.items()):
        before = {}
    part = path.with_name(f".{path.name}.part")
    with paths_checked():
        part.write_text(json.dumps({**before, **of, **results}, indent=2) + "\n")
        part.replace(path)


def _parser() -> Parser:
    parser = Parser(
        prog="ov2 eval",
        description="Evaluate a model on held-out pictures; docs/evaluation.md defines each task.",
    )
    parser.add_argument("run", metavar="MODEL", help="a run, a .pt of it, a model folder, hf-hub: or NAME:WEIGHTS")
    add_eval_flags(parser)
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: eval.json in the run, or here")
    add_device(parser)
    return parser


def _evaluate(source: str, options: EvalOptions, place: Any, path: Path) -> dict[str, Any]:
    """Results by task, written after each."""
    from open_clip_ov2.evaluate.eval_job import EvalJob, Evaluated, eval_compute
    from open_clip_ov2.evaluate.tasks import run_tasks
    from open_clip_ov2.openclip.models.open_model import open_model

    def opened(image_size: int | None = None) -> Evaluated:
        run = open_model(source, str(place.device), image_size=image_size)
        return Evaluated(run.model, run.preprocess, run.tokenizer, str(source), run.checkpoint, opened)

    model = opened()
    compute = eval_compute(model.model, model.tokenizer, place.device, place.world_size)
    say = partial(print, file=sys.stderr) if place.rank == 0 else _nothing
    assert model.checkpoint is not None
    of = {"checkpoint": str(model.checkpoint), "data": options.data}
    done = partial(_write, path, of) if place.rank == 0 else _nothing
    return run_tasks(EvalJob(model, compute, options, place.rank), say, done)


def _beside(source: str) -> Path:
    path = Path(source)
    folder = path if path.is_dir() else path.parent.parent if path.is_file() else Path()
    return folder / "eval.json"


def _nothing(_: Any) -> None:
    pass


def show(results: Mapping[str, Result], console: Console) -> None:
    """One line a task, and tables of what goes by kind."""
    for task, found in results.items():
        line = LINES.get(task, _top1)
        console.print(f"[bold]{task:<20}[/] {escape(line(found, results))}", highlight=False)
        _show_skipped(found, console)
    if "read-text" in results:
        console.print(_reading_table(results["read-text"]))


def _loss(found: Result, results: Mapping[str, Result]) -> str:
    return f"{found['caption_loss']:.3f} nats a token, perplexity {found['perplexity']:.2f}"


def _shuffled(found: Result, results: Mapping[str, Result]) -> str:
    loss = f"{found['caption_loss']:.3f} nats a token"
    if "caption-loss" not in results:
        return loss
    gap = found["caption_loss"] - results["caption-loss"]["caption_loss"]
    return f"{loss} ({gap:+.3f}: what the pictures are worth)"


def _scores(found: Result, results: Mapping[str, Result]) -> str:
    return (
        f"CIDEr {found['cider']:.3f}, BLEU-4 {found['bleu4']:.3f}, ROUGE-L {found['rouge_l']:.3f} "
        f"of {found['pictures']:,} pictures"
    )


def _reading(found: Result, results: Mapping[str, Result]) -> str:
    return (
        f"exactly right {100 * found['exact_match']:.1f}% of {found['pictures']:,} pictures, "
        f"character error rate {found['character_error_rate']:.3f}"
    )


def _answers(found: Result, results: Mapping[str, Result]) -> str:
    rules = ", ".join(f"{rule} {row['score']:.3f} ({row['questions']:,})" for rule, row in found["by_rule"].items())
    return f"score {found['score']:.3f}: {rules}"


def _top1(found: Result, results: Mapping[str, Result]) -> str:
    top5 = "" if found["top5"] is None else f", top-5 {100 * found['top5']:.1f}%"
    return f"top-1 {100 * found['top1']:.1f}%{top5} of {found['n_test']:,} pictures, {found['n_classes']} classes"


def _recalls(found: Result, results: Mapping[str, Result]) -> str:
    ways = {"picture to text": "image_to_text", "text to picture": "text_to_image"}
    return "; ".join(f"{way} {_recall(found, name)}" for way, name in ways.items())


def _recall(found: Result, name: str) -> str:
    shares = {k: found[f"{name}_recall_at_{k}"] for k in (1, 5, 10)}
    return ", ".join(f"R@{k} {100 * share:.1f}%" for k, share in shares.items() if share is not None)


def _keep_ratios(found: Result, results: Mapping[str, Result]) -> str:
    rows = found["by_keep_ratio"].items()
    return "nats a token: " + ", ".join(f"{row['caption_loss']:.3f} at {ratio}" for ratio, row in rows)


def _image_sizes(found: Result, results: Mapping[str, Result]) -> str:
    said = []
    for size, row in found["by_image_size"].items():
        parts = [f"{row['caption-loss']['caption_loss']:.3f} nats"] if "caption-loss" in row else []
        parts += [f"k-NN {100 * row['knn']['top1']:.1f}%"] if "knn" in row else []
        said.append(f"{size} px: {' and '.join(parts) or 'no task'}")
    return ", ".join(said)


LINES: dict[str, Callable[[Result, Mapping[str, Result]], str]] = {
    "caption-loss": _loss,
    "shuffled-loss": _shuffled,
    "caption": _scores,
    "read-text": _reading,
    "questions": _answers,
    "likelihood-retrieval": _recalls,
    "retrieval": _recalls,
    "keep-ratios": _keep_ratios,
    "image-sizes": _image_sizes,
}


def _show_skipped(found: Result, console: Console) -> None:
    said = [text for name in ("skipped", "skipped_samples") for text in _causes(found.get(name) or {})]
    if said:
        console.print(f"{'':<20} not counted: {escape(', '.join(said))}", highlight=False)


def _causes(skipped: Any) -> list[str]:
    if isinstance(skipped, Mapping):
        parts = {why: len(keys) if isinstance(keys, list) else keys for why, keys in skipped.items()}
        nested = [text for part in parts.values() if isinstance(part, Mapping) for text in _causes(part)]
        return [f"{count} {why}" for why, count in parts.items() if not isinstance(count, Mapping) and count] + nested
    first = skipped[0]
    key, cause = (first["key"], first["cause"]) if isinstance(first, Mapping) else (first.key, first.cause)
    return [f"{len(skipped)}, the first: {key} ({cause})"]


def _reading_table(found: Result) -> Table:
    table = Table("kind", "pictures", "exactly right", "times guessing", "character errors", "numbers right")
    for kind, row in found["by_kind"].items():
        right = round(row["exact_match"] * row["pictures"])
        times = "" if row["times_guessing"] is None else f"{row['times_guessing']:.0f}"
        numbers = "" if row["number_accuracy"] is None else f"{100 * row['number_accuracy']:.1f}%"
        errors = "" if row["character_error_rate"] is None else f"{row['character_error_rate']:.3f}"
        table.add_row(
            escape(kind), f"{row['pictures']:,}", f"{100 * row['exact_match']:.1f}% ({right})", times, errors, numbers
        )
    return table
