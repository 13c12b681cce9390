"""The training loader of `ov2 train`'s flags, for `ov2 bench data`; the model is built without memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any

import open_clip
import torch

from open_clip_ov2.data.loader import STALL_WARNING_S, TrainLoader
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.run.loaders import make_data
from open_clip_ov2.openclip.run.stage_model import StageModel
from open_clip_ov2.quiet import quiet


def train_loaders(argv: Sequence[str]) -> Callable[[int], TrainLoader]:
    """For a number of data workers, the loader that a run's first stage would have. Raises UserError. `argv`: flags of
    `ov2 train`."""
    plan = parse(argv, world_size=1, gpu=False)
    stage = plan.stages[0]
    args = stage.args
    args.rank, args.world_size, args.device = 0, 1, "cpu"
    session: Any = SimpleNamespace(plan=plan, checkpoint=None)
    built = StageModel(session, stage)
    with quiet(), torch.device("meta"):
        _, *transforms = built.create_model(open_clip.create_model_and_transforms)(
            args.model, None, device="meta", force_image_size=stage.image_size, aug_cfg=args.aug_cfg,
            image_mean=args.image_mean, image_std=args.image_std, image_interpolation=args.image_interpolation,
            force_context_length=args.force_context_length,
        )  # fmt: skip
    tokenizer = built.get_tokenizer(open_clip.get_tokenizer)(args.model, context_length=args.force_context_length)

    def loader(workers: int) -> TrainLoader:
        args.workers = workers
        pair = transforms[0], transforms[1]
        return make_data(args, pair, tokenizer, stage.options, 0, STALL_WARNING_S)["train"].dataloader

    return loader
