"""The data pipeline of `ov2 train`'s flags in its parts, for `ov2 bench data`; the model is built without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import open_clip
import torch

from open_clip_ov2.data.loader import TrainLoader
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.sources import Source
from open_clip_ov2.data.streams import Tokenizer
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.run.loaders import caption_keys, dataset_type, make_data, make_source
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.quiet import quiet

STALL_WARNING_S = 60.0


@dataclass(frozen=True)
class DataParts:
    """`loader` makes a TrainLoader with so many workers, as a run's first stage would have it."""

    source: Source
    decoder: Decoder
    tokenizer: Tokenizer
    batch_size: int
    resolution: int
    _made: tuple[Any, ...]

    def loader(self, workers: int) -> TrainLoader:
        args, transforms, options = self._made
        args.workers = workers
        loader = make_data(args, transforms, self.tokenizer, options, 0, STALL_WARNING_S)["train"].dataloader
        assert isinstance(loader, TrainLoader)
        return loader


def data_parts(argv: Sequence[str]) -> DataParts:
    """`argv`: flags of `ov2 train`. Raises UserError."""
    plan = parse(argv, world_size=1, gpu=False)
    stage = plan.stages[0]
    args, options = stage.args, stage.options
    args.rank, args.world_size, args.device = 0, 1, "cpu"
    size = args.force_image_size
    size = size[0] if isinstance(size, list) and len(size) == 1 else size  # as OpenCLIP's `main` reads it
    session: Any = SimpleNamespace(plan=plan, previous_stage=None)
    built = StageModel(session, stage, None)
    with quiet(), torch.device("meta"):
        _, *transforms = built.create_model(open_clip.create_model_and_transforms)(
            args.model, None, device="meta", force_image_size=size, aug_cfg=args.aug_cfg,
            force_context_length=args.force_context_length,
        )  # fmt: skip
    tokenizer = built.get_tokenizer(open_clip.get_tokenizer)(args.model, context_length=args.force_context_length)
    kind = dataset_type(args.train_data or "", args.dataset_type)
    decoder = Decoder(transforms[0], caption_keys(args, options, kind), options.max_image_pixels)
    source = make_source(args.train_data or "", kind, args, options, train=True)
    resolution = int(built.model.visual.image_size[0])
    return DataParts(source, decoder, tokenizer, args.batch_size, resolution, (args, transforms, options))
