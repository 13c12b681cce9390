"""A parsed command line of `ov2 train`: for each stage our options (frozen), and what OpenCLIP's `main` gets."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.argv import without
from open_clip_ov2.data.order.layout import Layout
from open_clip_ov2.openclip.command.flags import RunOptions, TrainOptions
from open_clip_ov2.recipe import Recipe

# What `main` does not get, because it is done here: flags with a value, and switches.
OURS = ("--report-to", "--resume", "--name", "--remote-sync", "--remote-sync-frequency", "--remote-sync-protocol")
SWITCHES = ("--save-most-recent", "--copy-codebase")


@dataclass(frozen=True)
class StagePlan:
    """One call of OpenCLIP's `main`. `index` counts from 0; `args` is its argv, parsed.

    `title` is short ("84 px"), `summary` one line for logs.
    """

    index: int
    title: str
    summary: str
    options: TrainOptions
    args: argparse.Namespace
    argv: tuple[str, ...]
    precision_given: bool
    layout: Layout

    @property
    def number(self) -> int:
        """As users count: from 1."""
        return self.index + 1

    def main_argv(self, is_ov2: bool) -> list[str]:
        """`argv` as OpenCLIP's `main` gets it."""
        switches = (*SWITCHES, *(("--torchcompile",) if is_ov2 else ()))  # StageModel compiles blocks
        return [word for word in without(self.argv, OURS) if word not in switches]

    @property
    def image_size(self) -> int | list[int] | None:
        """--force-image-size: one number for a square, [height, width], or None for the model's own."""
        size = self.args.force_image_size
        return size[0] if isinstance(size, list) and len(size) == 1 else size


@dataclass(frozen=True)
class RunPlan:
    """A whole run. `config` is what makes it this run and no other; `name` says so in eight digits if none is given."""

    name: str
    folder: Path
    model: str
    is_ov2: bool  # whether the model is an ov2 model; CLIP and CoCa take OpenCLIP's own step
    stages: tuple[StagePlan, ...]
    carry_optimizer: bool
    options: RunOptions
    config: dict[str, object]
    recipe: Recipe | None
    argv: tuple[str, ...]

    def shards(self, world_size: int) -> int:
        """Processes that share one copy of the model."""
        return (self.options.fsdp_hybrid or world_size) if self.options.fsdp else 1
