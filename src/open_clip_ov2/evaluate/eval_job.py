"""A model and the data that it is evaluated on; what several tasks need is computed once.

Shapes: B batch, C channels, H and W pixels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import Batch, EvalLoader
from open_clip_ov2.data.shards import expand_shards
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import gathered_keys, rows_of
from open_clip_ov2.evaluate.eval_model import Subject, gathered
from open_clip_ov2.evaluate.extraction import Cache, Features, Kind, extract, stamp
from open_clip_ov2.evaluate.options import EvalOptions, source_of
from open_clip_ov2.openclip.models.eval_models import subject_of
from open_clip_ov2.openclip.models.tokenizer import eos_id_of

NO_TEXT = -1  # the end of text of a model without any
WEIGHTS = (".pt", ".bin", ".safetensors")


@dataclass(frozen=True)
class Evaluated:
    """A model with what belongs to it. `at_size` opens it anew at an image size in px, where that can be done."""

    model: nn.Module
    preprocess: Callable[[Any], torch.Tensor]
    tokenizer: Any
    name: str
    checkpoint: Path | None = None
    at_size: Callable[[int], Evaluated] | None = None


def eval_compute(model: nn.Module, tokenizer: Any, device: torch.device, world_size: int) -> Compute:
    """float32, which every result of `ov2 eval` is in."""
    if isinstance(model, CaptionModel):
        eos_id = model.text_config.eos_id
    else:
        eos_id = NO_TEXT if isinstance(model, VisionModel) else eos_id_of(tokenizer)
    return Compute(device, "fp32", world_size, eos_id)


class Captioned(NamedTuple):
    """One picture's key, kind, true and generated caption."""

    key: str
    kind: str
    true: str
    generated: str


class EvalJob:
    """`rank` and `world_size` are those of `compute` and torch.distributed."""

    def __init__(self, evaluated: Evaluated, compute: Compute, options: EvalOptions, rank: int = 0) -> None:
        self.evaluated, self.compute, self.options = evaluated, compute, options
        self.rank, self.world_size = rank, compute.world_size
        self._features: dict[tuple[str, Kind], Features] = {}

    @cached_property
    def subject(self) -> Subject:
        at = self.evaluated
        if self.options.keep_ratio is not None and not isinstance(at.model, CaptionModel):
            raise UserError(f"--keep-ratio: {at.name} drops no tokens; leave the flag out")
        return subject_of(at.model, at.tokenizer, self.compute, name=at.name, keep_ratio=self.options.keep_ratio)

    def captioned(self) -> EvalLoader:
        """Pictures with their caption, and what `group_by` finds as `Batch.groups`."""
        return self._loader(self.options.data, self.options.caption_keys, self.options.group_by)

    def labelled(self, data: str | None = None) -> EvalLoader:
        """Pictures with their class as `Batch.groups`; of the evaluation's own data by default."""
        return self._loader(data or self.options.data, (), self.label_key)

    @property
    def label_key(self) -> CaptionKey:
        return self.options.label_key or CaptionKey("cls")

    def _loader(
        self, data: str, caption_keys: tuple[CaptionKey, ...], group_by: CaptionKey | None, workers: int | None = None
    ) -> EvalLoader:
        return EvalLoader(
            source_of(data),
            self.evaluated.preprocess,
            self.evaluated.tokenizer if caption_keys else None,
            batch_size=self.options.batch_size,
            num_workers=self.options.workers if workers is None else workers,
            caption_keys=caption_keys,
            group_by=group_by,
            rank=self.rank,
            world_size=self.world_size,
        )

    def features(self, data: str, kind: Kind) -> Features:
        if (data, kind) not in self._features:
            self._features[data, kind] = extract(
                self.subject,
                self.labelled(data),
                self.world_size,
                kind,
                cache=self._cache(data),
                disk=self.options.feature_disk,
            )
        return self._features[data, kind]

    def _cache(self, data: str) -> Cache | None:
        if self.options.cache is None:
            return None
        at = self.evaluated
        if at.checkpoint is None:
            raise UserError("--cache: features of a model in training are not kept")
        weights = _weights(at.checkpoint) if at.checkpoint.is_dir() else [at.checkpoint]
        files = stamp([*weights, *_files(data)])
        identity = {"model": at.name, "files": files, "preprocess": repr(at.preprocess)}
        return Cache(self.options.cache, identity)

    @cached_property
    def references(self) -> dict[int, tuple[str, ...]]:
        """All captions of each sample, by place in the file order; of samples that prove unusable too."""
        return {sample.place: sample.captions for sample in self.captioned().described()}

    @cached_property
    def generated(self) -> dict[int, Captioned]:
        """By place in the file order; the same on any number of processes."""
        rows: dict[int, Captioned] = {}
        loader = self.captioned()
        for batch in loader:
            texts = self.subject.generate(batch.images_BCHW, batch.keys, **self.options.generation)
            found = zip(batch.keys, batch.groups, batch.captions, texts, strict=True)
            rows |= {index: Captioned(*row) for index, row in zip(batch.indices, found, strict=True)}
        self.caption_skips = gathered_keys(loader.skipped_keys, self.world_size)
        return gathered(rows, self.world_size)

    def with_shuffled_pictures(self) -> Iterator[Batch]:
        """Each caption with the picture of the sample before it in file order, the first with the last's. This
        process's share of batches; all decode all pictures, since workers would bring them in another order.
        Raises UserError for a single sample."""
        loader = self._loader(self.options.data, self.options.caption_keys, self.options.group_by, workers=0)
        first = last = None
        for number, batch in enumerate(loader.full()):
            pictures_BCHW = batch.images_BCHW
            if last is None:
                first, rest = rows_of(batch, [0]), rows_of(batch, range(1, len(batch.keys)))
                shifted = pictures_BCHW[:-1]
            else:
                rest, shifted = batch, torch.cat([last, pictures_BCHW[:-1]])
            last = pictures_BCHW[-1:]
            if len(rest.keys) and number % self.world_size == self.rank:
                yield rest._replace(images_BCHW=shifted)
        if first is None or last is None or (number == 0 and len(batch.keys) == 1):
            raise UserError(f"{self.options.data}: shuffled pictures want at least two")
        if self.rank == 0:
            yield first._replace(images_BCHW=last)


def _weights(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.suffix in WEIGHTS)


def _files(data: str) -> list[str | Path]:
    if os.path.isdir(data):
        folder = Path(data)
        return sorted(path for path in folder.rglob("*") if path.is_file())
    return list(expand_shards(data)[0])
