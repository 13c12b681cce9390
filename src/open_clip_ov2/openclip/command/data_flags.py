"""Flags of data: what kind of data OpenCLIP's name, and errors for data that is not there."""

from __future__ import annotations

import argparse
from pathlib import Path

from open_clip_ov2.errors import UserError


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


def check_data(args: argparse.Namespace) -> None:
    """`args` is what OpenCLIP's parser made of a stage's flags. Raises UserError."""
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
