"""`ov2 eval`: what a trained model knows of held-out pictures."""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from open_clip_ov2.commands.options import (
    Parser,
    add_device,
    add_generation,
    existing,
    generation_options,
    values_checked,
)
from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import Batch, EvalLoader
from open_clip_ov2.data.sources import WebDatasetSource, expand_shards
from open_clip_ov2.errors import UserError

TASKS = ("caption-loss", "shuffled-loss", "exact-match")


@dataclass(frozen=True)
class Exact:
    """Captions exactly right, of one group of pictures."""

    right: int
    pictures: int
    guess: float | None  # probability that a uniform guess over the captions of this kind is right

    @property
    def share(self) -> float:
        return self.right / self.pictures

    @property
    def times_guessing(self) -> float | None:
        return self.share / self.guess if self.guess else None


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    tasks = args.tasks.split(",")
    unknown = [task for task in tasks if task not in TASKS]
    if unknown:
        raise UserError(f"--tasks {unknown[0]}: no such task (there are: {', '.join(TASKS)})")
    guess = json.loads(existing(args.guess).read_text()) if args.guess else {}
    from open_clip_ov2.core import CaptionModel
    from open_clip_ov2.seam.sources import open_model

    run = open_model(args.run, args.device)
    if not isinstance(run.model, CaptionModel):
        raise UserError(f"{run.folder}: not an ov2 model, which is what `ov2 eval` knows so far")
    with values_checked():
        results = evaluate(run, _loader(run, args), tasks, args, guess)
    _print(results, Console())
    text = json.dumps({"checkpoint": str(run.checkpoint), "data": args.data, **results}, indent=2)
    (args.out or run.folder / "eval.json").write_text(text + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 eval", description="Evaluate a trained model on held-out pictures.", allow_abbrev=False)
    parser.add_argument("run", type=Path, metavar="RUN", help="a run, a .pt of it, a model folder or hf-hub: name")
    parser.add_argument("--data", required=True, metavar="SHARDS", help="tars, as for ov2 train --val-data")
    parser.add_argument("--tasks", default=",".join(TASKS), help="default: %(default)s")
    parser.add_argument("--caption-keys", default="txt", help="default: %(default)s")
    parser.add_argument("--group-by", metavar="json:FIELD", help="exact matches by the value of this field")
    parser.add_argument("--guess", type=Path, metavar="FILE.json", help="chance of a right guess for each group")
    parser.add_argument("--batch-size", type=int, default=64, help="default: %(default)s")
    parser.add_argument("--workers", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE.json", help="default: RUN/eval.json")
    add_device(parser)
    add_generation(parser)
    return parser


def _loader(run: Any, args: argparse.Namespace) -> EvalLoader:
    urls, _ = expand_shards(args.data)
    return EvalLoader(
        WebDatasetSource(urls=urls, weights=None, resampled=False),
        run.preprocess,
        run.tokenizer,
        batch_size=args.batch_size,
        num_workers=args.workers,
        caption_keys=parse_caption_keys(args.caption_keys),
        group_by=parse_caption_keys(args.group_by)[0] if args.group_by else None,
    )


def evaluate(
    run: Any, loader: EvalLoader, tasks: Sequence[str], args: argparse.Namespace, guess: dict[str, float]
) -> dict[str, Any]:
    """Results by task; JSON-ready."""
    import torch

    from open_clip_ov2.seam.evaluate import caption_loss
    from open_clip_ov2.seam.step import StepSettings

    eos_id = run.model.text_config.eos_id
    settings = StepSettings(torch.device(args.device), "fp32", 1, 1, None, 1.0, eos_id)
    results: dict[str, Any] = {}
    if "caption-loss" in tasks:
        results["caption_loss"] = caption_loss(run.model, loader, settings, args.keep_ratio)["caption_loss"]
    if "shuffled-loss" in tasks:
        shuffled = caption_loss(run.model, shuffle_pictures(loader), settings, args.keep_ratio)
        results["shuffled_caption_loss"] = shuffled["caption_loss"]
    if "exact-match" in tasks:
        results["exact_match"] = exact_match(run, loader, settings, generation_options(args), guess)
    return results


def shuffle_pictures(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Each caption with the picture of the sample before it; the first batch turns round in itself."""
    import torch

    last = None
    for batch in batches:
        before = batch.images_BCHW[-1:] if last is None else last
        last = batch.images_BCHW[-1:]
        yield batch._replace(images_BCHW=torch.cat([before, batch.images_BCHW[:-1]]))


def exact_match(
    run: Any, loader: EvalLoader, settings: Any, options: dict[str, Any], guess: dict[str, float]
) -> dict[str, Any]:
    """Share of pictures whose generated caption is the true one, letter by letter but for spaces, by group."""
    from open_clip_ov2.seam.evaluate import generate_captions

    right: dict[str, int] = defaultdict(int)
    pictures: dict[str, int] = defaultdict(int)
    for batch in loader:
        generated = generate_captions(run.model, batch.images_BCHW, batch.keys, run.tokenizer, settings, **options)
        for group, text, true in zip(batch.groups, generated, batch.captions, strict=True):
            pictures[group] += 1
            right[group] += "".join(text.split()) == "".join(true.lower().split())
    rows = {group: Exact(right[group], pictures[group], guess.get(group)) for group in sorted(pictures)}
    return {
        group or "all": {
            "right": row.right,
            "pictures": row.pictures,
            "share": row.share,
            "times_guessing": row.times_guessing,
        }
        for group, row in rows.items()
    }


def _print(results: dict[str, Any], console: Console) -> None:
    if "caption_loss" in results:
        console.print(f"held-out caption loss            {results['caption_loss']:.3f} nats a token")
    if "shuffled_caption_loss" in results:
        gap = results["shuffled_caption_loss"] - results.get("caption_loss", float("nan"))
        console.print(
            f"the same, pictures shuffled      {results['shuffled_caption_loss']:.3f} nats a token "
            f"({gap:+.3f}: what the pictures are worth)"
        )
    if "exact_match" in results:
        table = Table("kind", "pictures", "captioned exactly right", "times guessing")
        for group, row in results["exact_match"].items():
            times = "" if row["times_guessing"] is None else f"{row['times_guessing']:.0f}"
            table.add_row(group, str(row["pictures"]), f"{100 * row['share']:.1f}% ({row['right']})", times)
        console.print(table)
