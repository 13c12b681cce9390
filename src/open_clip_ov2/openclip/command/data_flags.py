"""Flags of data: what kind of data OpenCLIP's name, errors for those that it ignores, and for those that do not go with
images of any shape."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from open_clip_ov2.argv import is_given
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.flags import NATIVE, TrainOptions
from open_clip_ov2.openclip.models.factory import is_contrastive

NOT_NATIVE = {
    "--force-patch-dropout": "it drops equally many patches of each image; --keep-ratio drops after the encoder",
    "--lora-rank": "the adapters are for the encoder's attention over images of one shape",
    "--compile-encoder": "the blocks are compiled for any number of tokens; leave it out",
}
CSV_FLAGS = ("--csv-separator", "--csv-img-key", "--csv-caption-key")


def data_kind(args: argparse.Namespace, train: bool) -> str | None:
    """`webdataset`, `csv` or `synthetic`, from --dataset-type or the file's suffix, as OpenCLIP does it; None if there
    is no such data. Raises UserError."""
    path, asked = args.train_data if train else args.val_data, args.dataset_type
    if asked == "synthetic" and train:
        return asked
    if not path or asked not in ("auto", "synthetic"):
        return asked if path else None
    ending = path.rsplit(".", 1)[-1].rstrip("'\"")
    if path.startswith("pipe:") or ending in ("tar", "gz", "tgz"):
        return "webdataset"
    if ending in ("csv", "tsv"):
        return "csv"
    if Path(path).is_dir():
        raise UserError(f"{path}: a folder; make tars or a csv of it (docs/data.md, 'Your own folder')")
    raise UserError(f"{path}: neither a tar nor a csv; give --dataset-type webdataset, csv or synthetic")


def check_data(argv: Sequence[str], args: argparse.Namespace) -> None:
    """`argv` is all of a stage's flags, `args` what OpenCLIP's parser made of them. Raises UserError."""
    for flag, folder in (("--imagenet-val", args.imagenet_val), ("--imagenet-v2", args.imagenet_v2)):
        if folder and not Path(folder).is_dir():
            raise UserError(f"{flag} {folder}: no such folder")
    train, val = data_kind(args, train=True), data_kind(args, train=False)
    if not (train or val or args.imagenet_val or args.imagenet_v2):
        raise UserError("ov2 train: --train-data is missing, for example --train-data 'shards/{00000..00999}.tar'")
    if train == "synthetic" and args.train_data:
        raise UserError(
            "--dataset-type synthetic generates its data, so --train-data would be ignored; leave one of the two out"
        )
    for flag in ("--dataset-resampled", "--train-data-upsampling-factors"):
        if is_given(argv, flag) and train not in (None, "webdataset"):
            raise UserError(f"{flag} is for tars, and the training data is {train}; leave the flag out")
    if args.train_data_upsampling_factors is not None and not args.dataset_resampled:
        raise UserError("--train-data-upsampling-factors works only with --dataset-resampled")
    for flag in CSV_FLAGS:
        if is_given(argv, flag) and "csv" not in (train, val):
            raise UserError(f"{flag} is for a csv, and no data is one (--caption-keys says where tars have captions)")
    for flag in ("--captions", "--val-captions"):
        if is_given(argv, flag) and "webdataset" not in (train, val):
            raise UserError(f"{flag}: captions stand beside tars, and no data is tars; leave the flag out")
    if is_given(argv, "--csv-caption-key") and is_given(argv, "--caption-keys"):
        raise UserError("--csv-caption-key and --caption-keys: give one or the other; --caption-keys names columns too")


def check_aspect(argv: Sequence[str], options: TrainOptions, args: argparse.Namespace) -> None:
    """Raises UserError for flags that --aspect native does not go with, or that need it."""
    if options.aspect != NATIVE:
        if options.max_tokens is not None:
            raise UserError(f"--max-tokens is the budget of images that keep their shapes; add --aspect {NATIVE}")
        return
    for flag, why in NOT_NATIVE.items():
        if is_given(argv, flag):
            raise UserError(f"{flag} with --aspect {NATIVE}: {why}")
    if args.aug_cfg.get("use_timm"):
        raise UserError(f"--aug-cfg use_timm=True with --aspect {NATIVE}: timm's crop gives squares; leave it out")
    if is_contrastive(args.model):
        raise UserError(f"--aspect {NATIVE}: the contrastive loss of {args.model} takes images of one shape")
