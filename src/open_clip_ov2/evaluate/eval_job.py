"""A model under evaluation and its data; what several tasks need is computed once.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import cached_property
from itertools import chain
from pathlib import Path
from typing import NamedTuple

from open_clip_ov2.core.native import concatenated
from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import Batch, EvalLoader, Watched
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import rows_of
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.extraction import Features, Kind, cache_file, extract, stamp
from open_clip_ov2.evaluate.gathering import gathered, gathered_keys, place
from open_clip_ov2.evaluate.options import EvalOptions, source_of

WEIGHTS = (".pt", ".bin", ".safetensors")


class Captioned(NamedTuple):
    """One image's key, kind, true and generated caption."""

    key: str
    kind: str
    true: str
    generated: str


class Readable(NamedTuple):
    """Patch tokens with what is to be read: of each usable sample its row of `tokens.values`, its kind and caption."""

    tokens: Features
    rows: list[int]
    kinds: list[str]
    captions: list[str]


class EvalJob:
    def __init__(self, model: EvalModel, options: EvalOptions, watched: Watched | None = None) -> None:
        """`watched` passes on the batches of every pass over data, and may end it early. Raises UserError if the
        options do not fit the model."""
        self.model = model if options.keep_ratio is None else model.with_keep_ratio(options.keep_ratio)
        self.options, self.watched = options, watched
        self._features: dict[tuple[str, Kind], Features] = {}

    def captioned(self, workers: int | None = None) -> EvalLoader:
        """Images with their captions, and what `group_by` finds as `Batch.groups`."""
        return self._loader(self.options.data, self.options.caption_keys, self.options.group_by, workers)

    def labelled(self, data: str | None = None) -> EvalLoader:
        """Images with their class as `Batch.groups`; of the evaluation's own data by default."""
        return self._loader(data or self.options.data, (), self.options.label_key or CaptionKey("cls"))

    def _loader(
        self, data: str, caption_keys: tuple[CaptionKey, ...], group_by: CaptionKey | None, workers: int | None = None
    ) -> EvalLoader:
        rank, world_size = place()
        return EvalLoader(
            source_of(data, self.options.captions if data == self.options.data else ()),
            self.model.preprocess,
            self.model.tokenizer if caption_keys else None,
            batch_size=self.options.batch_size,
            num_workers=self.options.workers if workers is None else workers,
            caption_keys=caption_keys,
            group_by=group_by,
            rank=rank,
            world_size=world_size,
            named=("evaluation", "--data" if data == self.options.data else "--train-data"),
            watched=self.watched,
        )

    def features(self, data: str, kind: Kind) -> Features:
        if (data, kind) not in self._features:
            loader = self.labelled(data)
            cache = self._cache(data, kind, loader) if self.options.cache else None
            self._features[data, kind] = extract(self.model, loader, kind, cache=cache, disk=self.options.feature_disk)
        return self._features[data, kind]

    def _cache(self, data: str, kind: Kind, loader: EvalLoader) -> Path:
        """A file of its own for each model, preprocessing, and state of the files of both checkpoint and data."""
        checkpoint = self.model.checkpoint
        assert self.options.cache is not None
        if checkpoint is None:
            raise UserError("--cache: the features of a model in training are not kept; leave the flag out")
        weights = [path for path in checkpoint.rglob("*") if path.suffix in WEIGHTS] if checkpoint.is_dir() else []
        images = [path for path in Path(data).rglob("*") if path.is_file()] if os.path.isdir(data) else []
        files = stamp([*(sorted(weights) or [checkpoint]), *(sorted(images) or expand_shards(data)[0])])
        return cache_file(
            self.options.cache, kind, self.model.name, repr(self.model.preprocess), files, loader.fingerprint()
        )

    def readable(self, data: str, kind: Kind) -> tuple[Readable, dict[str, list[str]]]:
        """Token features with captions, and the keys of samples that count nowhere, by cause."""
        features = self.features(data, kind)
        skipped: dict[str, list[str]] = {"sample without a caption": [], "features not finite": []}
        described = iter(self._loader(data, self.options.caption_keys, self.options.group_by).described())
        found = Readable(features, [], [], [])
        for row, (key, at) in enumerate(zip(features.keys, features.places, strict=True)):
            sample = next(one for one in described if one.place == at)  # both are in file order
            if not sample.captions:
                skipped["sample without a caption"].append(key)
            elif not features.values[row].isfinite().all():
                skipped["features not finite"].append(key)
            else:
                found.rows.append(row)
                found.kinds.append(sample.group)
                found.captions.append(sample.captions[0])
        return found, {**features.skips, **skipped}

    @cached_property
    def references(self) -> dict[int, tuple[str, ...]]:
        """All captions of each sample by its place in file order; of samples that prove unusable too."""
        return {sample.place: sample.captions for sample in self.captioned().described()}

    @cached_property
    def generated(self) -> tuple[dict[int, Captioned], dict[str, list[str]]]:
        """Captions by place in file order, and the keys of what was skipped by cause; the same on any number of
        processes."""
        rows: dict[int, Captioned] = {}
        loader = self.captioned()
        for batch in loader:
            texts = self.model.generate(batch.images_BCHW, batch.keys, **self.options.generation)
            found = zip(batch.keys, batch.groups, batch.captions, texts, strict=True)
            rows |= {index: Captioned(*row) for index, row in zip(batch.indices, found, strict=True)}
        return gathered(rows), gathered_keys(loader.skipped_keys)

    def with_shuffled_images(self) -> Iterator[Batch]:
        """Each caption with the image of the sample before it in file order, the first with that of the last. This
        process's share of batches; every process decodes all images, because workers would bring them in another order.
        Raises UserError for a single sample."""
        rank, world_size = place()
        whole = self.captioned(workers=0).full()
        begin = next(whole)
        first, rest, count = rows_of(begin, [0]), rows_of(begin, range(1, len(begin.keys))), 0
        before = first.images_BCHW
        for number, batch in enumerate(chain([rest], whole, [first])):
            images_BCHW = concatenated([before, batch.images_BCHW])
            before, count = images_BCHW[-1:], count + len(batch.keys)
            if len(batch.keys) and number % world_size == rank:
                yield batch._replace(images_BCHW=images_BCHW[:-1])
        if count < 2:
            raise UserError(f"{self.options.data}: shuffling the images needs at least two samples")
