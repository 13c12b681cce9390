"""`ov2 caption`: captions of images, on the terminal, as JSON lines, and as a contact sheet."""

from __future__ import annotations

import argparse
import json
import logging
import math
import sys
from collections.abc import Sequence
from itertools import islice
from pathlib import Path

from open_clip_ov2 import training
from open_clip_ov2.argv import Parser, add_flags, flag_type, flag_values
from open_clip_ov2.commands.options import add_captions, add_device, paths_checked
from open_clip_ov2.data.samples import SUFFIXES
from open_clip_ov2.data.sidecars import caption_sets
from open_clip_ov2.data.skips import SkipCounter, describe
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.options import CaptionOptions
from open_clip_ov2.evaluate.pictures import Picture, pictures
from open_clip_ov2.tables import whole
from open_clip_ov2.tracking.sheet import CELL_PX, Captioned, contact_sheet, dropped_gray


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if args.out and args.out.suffix.lower() not in SUFFIXES:
        raise UserError(f"--out {args.out}: not an image file ({', '.join(SUFFIXES)})")
    if args.out and not args.out.parent.is_dir():
        raise UserError(f"--out {args.out}: the folder {args.out.parent} does not exist")
    if args.show_tokens and not args.out:
        raise UserError("--show-tokens: the tokens are shown on the contact sheet; add --out SHEET.png")
    logging.basicConfig(format="ov2: %(message)s")
    with paths_checked():
        _caption_all(args)


def _caption_all(args: argparse.Namespace) -> None:
    generation = flag_values(CaptionOptions, args)
    if args.json:
        generation["log_likelihood"] = True
    skips = SkipCounter(lines=math.inf)
    captions = caption_sets(args.captions or ())
    images = islice(pictures(args.images, args.caption_keys, args.every, skips, captions), args.limit)
    model = args.checkpoint or training.shipped_model()
    count, cells = 0, list[Captioned]()
    try:
        for picture, text in training.caption(model, images, device=args.device, skips=skips, **generation):
            count += 1
            print("\n".join([_as_json(picture)] if args.json else _as_text(picture, text)), flush=True)
            if args.out:
                cells.append(_cell(picture, text))
    finally:  # also of what there is when something ends the command early
        if cells:
            contact_sheet(cells).save(args.out)
            print(f"contact sheet: {args.out}", file=sys.stderr if args.json else sys.stdout)
    if skips.total:
        causes, left_out = describe(skips.total), skips.total.total()
        why = f"{causes}; for example {skips.example}"
        raise UserError(f"{count} images were captioned and {left_out} left out, named above ({why})")


def _as_text(picture: Picture, text: str) -> list[str]:
    name = picture.name.encode("utf-8", "backslashreplace").decode()  # a file's name may be any bytes
    if not picture.generated:
        return [f"{name}\t{_one_line(text)}"]
    return [f"{name}\t{_one_line(one.text)}\t{one.log_likelihood:.4f}" for one in picture.generated]


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _as_json(picture: Picture) -> str:
    found = [vars(one) for one in picture.generated]
    return json.dumps({"image": picture.name, "captions": found, "references": picture.captions})


def _cell(picture: Picture, text: str) -> Captioned:
    """Small at once, so that a long sheet fits into memory."""
    picture.image.thumbnail((2 * CELL_PX, 2 * CELL_PX))
    image = dropped_gray(picture.seen.pixels, picture.seen.kept) if picture.seen else picture.image
    return Captioned(image, text, text if text in picture.captions else next(iter(picture.captions), None))


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 caption", description="Caption images with a trained model.")
    add, count = parser.add_argument, flag_type(whole(1))
    images = "an image, a folder of images, tars as for ov2 train --val-data, a csv, or - for standard input"
    add("images", nargs="+", metavar="IMAGE", help=images)
    model = "a run, a .pt of it, a model folder, hf-hub: or NAME:TAG (default: the model that the package holds)"
    add("--checkpoint", metavar="MODEL", help=model)
    add("--json", action="store_true", help="a line of JSON for each image, with log-likelihoods")
    add("--out", type=Path, metavar="SHEET.png", help="also draw a contact sheet")
    add("--limit", type=count, metavar="N", help="only the first N images that can be decoded")
    add("--every", type=count, default=1, metavar="N", help="only every Nth image")
    add("--caption-keys", default="txt", help="true captions, for the sheet and JSON (default: txt)")
    add_captions(parser, "true captions beside the tars, for --caption-keys")
    add_device(parser)
    add_flags(parser, CaptionOptions)
    return parser
