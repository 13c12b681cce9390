"""OpenCLIP's data flags -> our loaders."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.data.captions import NO_PROMPT, CaptionKey
from open_clip_ov2.data.loader import EvalLoader, TrainLoader
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.sources import CsvSource, Source, SyntheticSource
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.command.data_flags import data_kind
from open_clip_ov2.openclip.command.flags import TrainOptions
from open_clip_ov2.openclip.models.tokenizer import PromptTokenizer


@dataclass
class LoaderInfo:
    """An entry of OpenCLIP's `data`."""

    dataloader: Any


def caption_keys(args: argparse.Namespace, options: TrainOptions, train: bool) -> tuple[CaptionKey, ...]:
    if data_kind(args, train) == "csv" and not options.caption_keys_given:
        return (CaptionKey(args.csv_caption_key),)  # a column's name, whatever signs are in it
    return options.caption_keys


def make_source(args: argparse.Namespace, options: TrainOptions, train: bool) -> Source | None:
    """The samples of --train-data or --val-data, checked: files exist, columns exist. Raises UserError."""
    path, kind = args.train_data if train else args.val_data, data_kind(args, train)
    if kind is None:
        return None
    if kind == "csv":
        keys = (
            *caption_keys(args, options, train),
            *(key for key in options.prompt_keys or () if str(key) != NO_PROMPT),
        )
        return CsvSource(
            Path(path),
            separator=args.csv_separator,
            image_column=args.csv_img_key,
            caption_columns=tuple(key.entry for key in keys),
        )
    if kind == "synthetic":
        return SyntheticSource(num_samples=args.train_num_samples or 100, image_size=(224, 224))
    urls, weights = expand_shards(path, args.train_data_upsampling_factors if train else None)
    captions = options.captions if train else options.val_captions
    return WebDatasetSource(urls, weights, resampled=train and args.dataset_resampled, captions=captions)


def samples_per_epoch(args: argparse.Namespace, source: Source) -> int:
    if args.train_num_samples is not None:
        return args.train_num_samples
    found = source.count()
    if found is None:
        raise UserError(
            f"--train-data {args.train_data}: its number of samples is not known (no sizes.json or __len__ beside "
            "the shards); give --train-num-samples"
        )
    return found


def _shared_options(args: argparse.Namespace, options: TrainOptions, train: bool) -> dict[str, Any]:
    """Options of both loaders."""
    return {
        "batch_size": args.batch_size,
        "num_workers": args.workers,
        "rank": args.rank,
        "world_size": args.world_size,
        "caption_keys": caption_keys(args, options, train),
        "max_image_pixels": options.max_image_pixels,
        "prompt_keys": options.prompt_keys or (),
        "pin_memory": str(args.device).startswith("cuda"),
    }


def make_data(
    args: argparse.Namespace,
    transforms: tuple[Any, Any],
    tokenizer: Any,
    options: TrainOptions,
    epoch: int,
    stall_warning_s: float,
) -> dict[str, LoaderInfo]:
    """`{"train": ..., "val": ...}`, each only if its data flag is given. Raises UserError."""
    data: dict[str, LoaderInfo] = {}
    tokenizer = PromptTokenizer(tokenizer) if options.prompt_keys else tokenizer
    source = make_source(args, options, train=True)
    if source is not None:
        loader = TrainLoader(
            source,
            transforms[0],
            tokenizer,
            seed=args.seed,
            num_samples=samples_per_epoch(args, source),
            accum_freq=args.accum_freq,
            shuffle_buffer=options.shuffle_buffer,
            elastic=options.elastic,
            stall_warning_s=stall_warning_s,
            **_shared_options(args, options, train=True),
        )
        loader.set_epoch(epoch)
        data["train"] = LoaderInfo(loader)
    source = make_source(args, options, train=False)
    if source is not None:
        shared = _shared_options(args, options, train=False)
        data["val"] = LoaderInfo(
            EvalLoader(source, transforms[1], tokenizer, num_samples=args.val_num_samples, **shared)
        )
    return data
