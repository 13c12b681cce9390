"""`ov2 caption`: captions of pictures, on the terminal and as a contact sheet."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import (
    add_device,
    existing,
    paths_checked,
    values_checked,
)
from open_clip_ov2.data.captions import CaptionKey, all_captions, parse_caption_keys
from open_clip_ov2.data.decode import decode_image
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.options import add_generation, generation_options

if TYPE_CHECKING:
    from open_clip_ov2.openclip.models.open_model import LoadedModel

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp")
BATCH_SIZE = 32


@dataclass
class Picture:
    name: str
    image: Image.Image
    captions: tuple[str, ...] = ()


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.every < 1:
        raise UserError(f"--every {args.every}: it is 1 or more")
    if args.limit is not None and args.limit < 1:
        raise UserError(f"--limit {args.limit}: it is 1 or more")
    if args.out and args.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: no kind of picture ({', '.join(SUFFIXES)})")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: no such folder as {args.out.parent}")
    with paths_checked():
        _caption_all(args)


def _caption_all(args: argparse.Namespace) -> None:
    from open_clip_ov2.openclip.models.open_model import open_model
    from open_clip_ov2.tracking.sheet import Captioned, contact_sheet

    run = open_model(args.checkpoint, args.device)
    keys = parse_caption_keys(args.caption_keys)
    pictures = islice(_pictures(args.images, keys, args.every), args.limit)
    cells: list[Captioned] = []
    while batch := list(islice(pictures, BATCH_SIZE)):
        with values_checked():
            texts = _caption(run, batch, args)
        for picture, text in zip(batch, texts, strict=True):
            print(f"{picture.name}\t{text}", flush=True)
            if args.out:
                true = text if text in picture.captions else next(iter(picture.captions), None)
                cells.append(Captioned(picture.image, text, true))
    if args.out and cells:
        contact_sheet(cells).save(args.out)
        print(f"contact sheet: {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 caption", description="Caption pictures with a trained model.")
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="picture, folder of pictures, or tar of a dataset")
    parser.add_argument(
        "--checkpoint",
        type=Path,
        required=True,
        metavar="RUN",
        help="a run, a .pt of it, a model folder or hf-hub: name",
    )
    parser.add_argument("--out", type=Path, metavar="SHEET.png", help="also draw a contact sheet")
    parser.add_argument("--limit", type=int, metavar="N", help="the first N pictures only")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a tar, every Nth picture")
    parser.add_argument("--caption-keys", default="txt", help="true captions of a tar, for the sheet (default: txt)")
    add_device(parser)
    add_generation(parser)
    return parser


def _caption(run: LoadedModel, batch: list[Picture], args: argparse.Namespace) -> list[str]:
    import torch

    from open_clip_ov2.evaluate.eval_job import eval_compute
    from open_clip_ov2.openclip.models.eval_models import subject_of

    settings = eval_compute(run.model, run.tokenizer, torch.device(args.device), world_size=1)
    subject = subject_of(run.model, run.tokenizer, settings, name=str(args.checkpoint))
    if "caption" not in subject.abilities:
        raise UserError(f"{args.checkpoint}: a model without a caption decoder, so it cannot caption")
    images = torch.stack([run.preprocess(picture.image) for picture in batch])
    return subject.generate(images, [picture.name for picture in batch], **generation_options(args))


def _pictures(paths: Sequence[str], keys: tuple[CaptionKey, ...], every: int) -> Iterator[Picture]:
    for path in paths:
        if path.endswith(".tar"):
            yield from _from_tar(path, keys, every)
            continue
        found = existing(Path(path))
        files = sorted(f for f in found.rglob("*") if f.suffix.lower() in SUFFIXES) if found.is_dir() else [found]
        if not files:
            raise UserError(f"{path}: no picture in this folder ({', '.join(SUFFIXES)})")
        for file in files:
            try:
                yield Picture(str(file), decode_image(file.read_bytes()))
            except SkipSample as error:
                raise UserError(f"{file}: {error.cause} ({error.detail})") from error


def _from_tar(path: str, keys: tuple[CaptionKey, ...], every: int) -> Iterator[Picture]:
    urls, _ = expand_shards(path)
    source = WebDatasetSource(urls=urls, weights=None, resampled=False)
    for index, raw in enumerate(source.in_order()):
        if index % every:
            continue
        data = next((raw[suffix] for suffix in ("jpg", "jpeg", "png", "webp") if suffix in raw), None)
        if data is None:
            continue
        try:
            yield Picture(raw["__key__"], decode_image(data), tuple(all_captions(raw, keys)))
        except SkipSample as error:
            raise UserError(f"{path}: sample {raw['__key__']}: {error.cause} ({error.detail})") from error
