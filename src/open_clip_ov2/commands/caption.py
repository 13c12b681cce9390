"""`ov2 caption`: captions of images, on the terminal and as a contact sheet."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, add_flags
from open_clip_ov2.commands.options import add_device, paths_checked
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.options import GenerationOptions
from open_clip_ov2.evaluate.pictures import SUFFIXES, pictures


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.out and args.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: not an image file ({', '.join(SUFFIXES)})")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} does not exist")
    for flag, value in (("--every", args.every), ("--limit", args.limit)):
        if value is not None and value < 1:
            raise UserError(f"{flag} {value}: expected an integer >= 1")
    with paths_checked():
        _caption_all(args)


def _caption_all(args: argparse.Namespace) -> None:
    from open_clip_ov2.tracking.sheet import Captioned, contact_sheet

    names = ("images", "checkpoint", "out", "limit", "every", "caption_keys", "device")
    generation = {name: value for name, value in vars(args).items() if name not in names}
    images = islice(pictures(args.images, args.caption_keys, args.every), args.limit)
    cells: list[Captioned] = []
    for picture, text in training.caption(args.checkpoint, images, device=args.device, **generation):
        print(f"{picture.name}\t{text}", flush=True)
        if args.out:
            true = text if text in picture.captions else next(iter(picture.captions), None)
            cells.append(Captioned(picture.image, text, true))
    if args.out and cells:
        contact_sheet(cells).save(args.out)
        print(f"contact sheet: {args.out}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 caption", description="Caption images with a trained model.")
    parser.add_argument(
        "images", nargs="+", metavar="IMAGE", help="an image, a folder of images, or a tar of a dataset"
    )
    parser.add_argument(
        "--checkpoint", required=True, metavar="RUN", help="a run, a .pt of it, a model folder, hf-hub: or NAME:TAG"
    )
    parser.add_argument("--out", type=Path, metavar="SHEET.png", help="also draw a contact sheet")
    parser.add_argument("--limit", type=int, metavar="N", help="only the first N images")
    parser.add_argument("--every", type=int, default=1, metavar="N", help="of a tar, every Nth image")
    parser.add_argument("--caption-keys", default="txt", help="true captions of a tar, for the sheet (default: txt)")
    add_device(parser)
    add_flags(parser, GenerationOptions)
    return parser
