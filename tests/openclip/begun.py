"""Runs up to their first step: what OpenCLIP's `main` has made of its flags by then."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import open_clip.factory

from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.run.session import Session
from open_clip_ov2.openclip.run.stage_run import StageRun
from open_clip_ov2.train.signals import StopSignals

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 3}
VIT = {"image_size": 24, "layers": 3, "width": 32, "head_width": 16, "patch_size": 8}
TOWERS: dict[str, dict[str, Any]] = {
    "tiny_clip": VIT,
    "tiny_resnet": {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8},
    "tiny_timm": {"image_size": 160, "timm_model_name": "test_vit", "timm_pool": "", "timm_proj": "linear"},
}


class _Stop(Exception):
    pass


class Begun(StageRun):
    """`model` is in DDP if there are several processes; `built` is what checkpoints are made of."""

    model: Any
    loss: Any
    optimizer: Any
    scheduler: Any
    teacher: Any
    args: Any

    def train_one_epoch(self, *made: Any, **_: Any) -> None:  # type: ignore[override]
        _, self.model, _, self.loss, _, self.optimizer, _, self.scheduler, self.teacher, self.args = made
        raise _Stop


def begin(logs: Path, *flags: str, processes: int = 1, look: Callable[[Begun], Any] = lambda begun: begun) -> Any:
    """Four steps of 8 synthetic samples, of which none is made. Returns what `look` sees while ranks are connected."""
    common = ["--dataset-type", "synthetic", "--train-num-samples", "32", "--workers", "0", "--batch-size", "8"]
    plan = parse([*common, "--logs", str(logs), "--name", "run", *flags], world_size=processes, gpu=False)
    with StopSignals() as signals, Session(plan, signals) as session:
        begun = Begun(session, plan.stages[0])
        try:
            begun.run()
        except _Stop:
            return look(begun)
    raise AssertionError("no step")


@contextlib.contextmanager
def registered() -> Iterator[None]:
    """CLIP with each of TOWERS in OpenCLIP's registry, under their names."""
    registry = open_clip.factory._MODEL_CONFIGS
    registry.update(
        {name: {"embed_dim": 16, "vision_cfg": vision, "text_cfg": TEXT} for name, vision in TOWERS.items()}
    )
    try:
        yield
    finally:
        for name in TOWERS:
            del registry[name]
