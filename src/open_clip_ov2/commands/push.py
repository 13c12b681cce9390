"""`ov2 push`: a model to the hub, with a card filled from its run."""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.export import write_card, write_target
from open_clip_ov2.errors import UserError

TARGETS = ("ov2", "hf", "timm", "open-clip", "released")


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    if not re.fullmatch(r"[\w][\w.-]*/[\w][\w.-]*", args.repository):
        raise UserError(f"{args.repository!r}: not the name of a repository, which is ORG/NAME")
    if args.dry_run:
        from open_clip_ov2.formats.model_files import new_folder

        with new_folder(args.dry_run) as folder:
            _stage(args, folder)
        print(f"not pushed; what would be: {args.dry_run}")
        return
    with tempfile.TemporaryDirectory() as temporary:
        _stage(args, Path(temporary))
        print(f"pushed: {_upload(args, Path(temporary))}")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(prog="ov2 push", description="Put a model on the Hugging Face hub.")
    parser.add_argument("run", metavar="RUN", help="a run's folder or checkpoint, or a model folder")
    parser.add_argument("repository", metavar="ORG/NAME")
    parser.add_argument("--to", choices=TARGETS, default="ov2", help="format, as of ov2 export (default: %(default)s)")
    parser.add_argument("--image-size", type=int, metavar="N", help="for this resolution (default: the model's)")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--licence", metavar="ID", help="for the model card, such as apache-2.0")
    parser.add_argument("--dataset", metavar="NAME", help="for the model card (default: the names of the shards)")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write what would be pushed there, and stop")
    return parser


def _stage(args: argparse.Namespace, folder: Path) -> None:
    from open_clip_ov2.openclip.models.model_folder import encoder_of
    from open_clip_ov2.openclip.models.open_model import open_model

    run = open_model(args.run, image_size=args.image_size)
    encoder = encoder_of(run.model, run.preprocess_cfg)
    for line in write_target(args.to, run, encoder, folder, args.repository):
        print(line)
    write_card(args, run, folder, args.repository.split("/")[1], args.repository)


def _upload(args: argparse.Namespace, folder: Path) -> str:
    """The address of the commit. Raises UserError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(args.repository, private=args.private or None, exist_ok=True)
        return str(
            api.upload_folder(
                repo_id=args.repository, folder_path=str(folder), commit_message="Model written by ov2 push"
            )
        )
    except Exception as error:  # network, rights, names: each its own class, and all end here
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{args.repository}: not pushed ({type(error).__name__}: {reason}); log in with `hf auth login`, or look "
            "at what would be pushed by --dry-run FOLDER"
        ) from error
