"""A model under evaluation and its data; what several tasks need is computed once.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import Batch, EvalLoader
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import rows_of
from open_clip_ov2.evaluate.eval_model import EvalModel
from open_clip_ov2.evaluate.extraction import Cache, Features, Kind, extract, stamp
from open_clip_ov2.evaluate.gathering import gathered, gathered_keys
from open_clip_ov2.evaluate.options import EvalOptions, source_of

WEIGHTS = (".pt", ".bin", ".safetensors")


class Captioned(NamedTuple):
    """One image's key, kind, true and generated caption."""

    key: str
    kind: str
    true: str
    generated: str


@dataclass(frozen=True)
class Place:
    """This process among all of torch.distributed."""

    rank: int = 0
    world_size: int = 1


class EvalJob:
    def __init__(self, model: EvalModel, options: EvalOptions, place: Place | None = None) -> None:
        """Raises UserError if the options do not fit the model."""
        if options.keep_ratio is not None:
            if "dropping" not in model.abilities:
                raise UserError(f"--keep-ratio: {model.name} drops no tokens; leave the flag out")
            model = model.with_keep_ratio(options.keep_ratio)
        self.model, self.options, self.place = model, options, place or Place()
        self._features: dict[tuple[str, Kind], Features] = {}

    def of(self, model: EvalModel) -> EvalJob:
        """The same evaluation of another model."""
        return EvalJob(model, self.options, self.place)

    def captioned(self) -> EvalLoader:
        """Images with their captions, and what `group_by` finds as `Batch.groups`."""
        return self._loader(self.options.data, self.options.caption_keys, self.options.group_by)

    def labelled(self, data: str | None = None) -> EvalLoader:
        """Images with their class as `Batch.groups`; of the evaluation's own data by default."""
        return self._loader(data or self.options.data, (), self.options.label_key or CaptionKey("cls"))

    def _loader(
        self, data: str, caption_keys: tuple[CaptionKey, ...], group_by: CaptionKey | None, workers: int | None = None
    ) -> EvalLoader:
        return EvalLoader(
            source_of(data),
            self.model.preprocess,
            self.model.tokenizer if caption_keys else None,
            batch_size=self.options.batch_size,
            num_workers=self.options.workers if workers is None else workers,
            caption_keys=caption_keys,
            group_by=group_by,
            rank=self.place.rank,
            world_size=self.place.world_size,
        )

    def with_skips(self, loader: EvalLoader, found: dict[str, Any]) -> dict[str, Any]:
        """A result with the keys of samples that its loader could not use, of all processes."""
        return {**found, "skipped_samples": gathered_keys(loader.skipped_keys, self.place.world_size)}

    def features(self, data: str, kind: Kind) -> Features:
        if (data, kind) not in self._features:
            cache, disk = self._cache(data), self.options.feature_disk
            loader, world_size = self.labelled(data), self.place.world_size
            self._features[data, kind] = extract(self.model, loader, world_size, kind, cache=cache, disk=disk)
        return self._features[data, kind]

    def _cache(self, data: str) -> Cache | None:
        if self.options.cache is None:
            return None
        checkpoint = self.model.checkpoint
        if checkpoint is None:
            raise UserError("--cache: the features of a model in training are not kept; leave the flag out")
        weights = sorted(path for path in checkpoint.rglob("*") if path.suffix in WEIGHTS)
        files = stamp([*(weights if checkpoint.is_dir() else [checkpoint]), *_files(data)])
        identity = {"model": self.model.name, "files": files, "preprocess": repr(self.model.preprocess)}
        return Cache(self.options.cache, identity)

    @cached_property
    def references(self) -> dict[int, tuple[str, ...]]:
        """All captions of each sample by its place in file order; of samples that prove unusable too."""
        return {sample.place: sample.captions for sample in self.captioned().described()}

    @cached_property
    def generated(self) -> dict[int, Captioned]:
        """By place in file order; the same on any number of processes."""
        rows: dict[int, Captioned] = {}
        loader = self.captioned()
        for batch in loader:
            texts = self.model.generate(batch.images_BCHW, batch.keys, **self.options.generation)
            found = zip(batch.keys, batch.groups, batch.captions, texts, strict=True)
            rows |= {index: Captioned(*row) for index, row in zip(batch.indices, found, strict=True)}
        self.caption_skips = gathered_keys(loader.skipped_keys, self.place.world_size)
        return gathered(rows, self.place.world_size)

    def with_shuffled_images(self) -> Iterator[Batch]:
        """Each caption with the image of the sample before it in file order, the first with that of the last.

        This process's share of batches; every process decodes all images, because workers would bring them in another
        order. Raises UserError for a single sample.
        """
        loader = self._loader(self.options.data, self.options.caption_keys, self.options.group_by, workers=0)
        first = last = None
        for number, batch in enumerate(loader.full()):
            images_BCHW = batch.images_BCHW
            if last is None:
                first, rest = rows_of(batch, [0]), rows_of(batch, range(1, len(batch.keys)))
                shifted = images_BCHW[:-1]
            else:
                rest, shifted = batch, torch.cat([last, images_BCHW[:-1]])
            last = images_BCHW[-1:]
            if len(rest.keys) and number % self.place.world_size == self.place.rank:
                yield rest._replace(images_BCHW=shifted)
        if first is None or last is None or (number == 0 and len(batch.keys) == 1):
            raise UserError(f"{self.options.data}: shuffling the images needs at least two samples")
        if self.place.rank == 0:
            yield first._replace(images_BCHW=last)


def _files(data: str) -> list[str | Path]:
    if os.path.isdir(data):
        return sorted(path for path in Path(data).rglob("*") if path.is_file())
    return list(expand_shards(data)[0])
