"""A run as frozen data: a recipe, and its stages. None always means "not said": the run's flag or its default holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.counts import short_count

LR_BATCH = 256  # lr = base_lr x global batch / 256 (docs/reference.md, "Recipe")

FlagScalar = str | int | float | bool
FlagValue = FlagScalar | tuple[FlagScalar, ...]


@dataclass(frozen=True)
class Augmentation:
    """`scale`: the least and the greatest share of the area that a training crop takes."""

    scale: tuple[float, float] | None = None
    color_jitter: bool | None = None


@dataclass(frozen=True)
class Stage:
    """One resolution's training. Durations are in samples; `batch_size` is the most images at once in a process;
    `keep_ratio` is "0.35" or a range, "0.25:1.0".

    Raises UserError for values that contradict each other.
    """

    resolution: int
    samples: int
    global_batch: int | None = None
    batch_size: int | None = None
    lr: float | None = None
    base_lr: float | None = None
    warmup_samples: int | None = None
    schedule: str | None = None
    keep_ratio: str | None = None
    eval_keep_ratio: float | None = None
    weight_decay: float | None = None
    augmentation: Augmentation | None = None
    precision: str | None = None
    grad_checkpointing: bool | None = None
    context_length: int | None = None
    train_data: str | None = None
    name: str | None = None

    def __post_init__(self) -> None:
        if self.lr is not None and self.base_lr is not None:
            raise UserError(f"lr and base-lr both given; base-lr is lr at a global batch of {LR_BATCH}, leave one out")
        if self.warmup_samples is not None and self.warmup_samples > self.samples:
            raise UserError(f"warmup-samples {self.warmup_samples:,} is more than the stage's samples {self.samples:,}")

    def steps(self, global_batch: int) -> int:
        """Optimizer steps; the last one is made up to a whole batch."""
        return -(-self.samples // global_batch)

    def peak_lr(self, global_batch: int) -> float | None:
        """The learning rate after warm-up, if the stage says one."""
        return self.lr if self.base_lr is None else self.base_lr * global_batch / LR_BATCH

    def described(self, global_batch: int | None = None) -> str:
        """One line for logs. `global_batch`: the run's, where the stage says none."""
        batch = self.global_batch or global_batch
        parts = [f"{self.resolution} px", f"{short_count(self.samples)} samples"]
        if batch is not None:
            parts.append(f"batch {batch:,}")
        if self.base_lr is not None and batch is None:
            parts.append(f"base lr {_scientific(self.base_lr)}")
        elif (lr := self.peak_lr(batch or LR_BATCH)) is not None:
            parts.append(f"lr {_scientific(lr)}")
        if self.keep_ratio is not None:
            parts.append(f"keep {self.keep_ratio}")
        return (f"{self.name}: " if self.name else "") + ", ".join(parts)


def _scientific(value: float) -> str:
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa}e{int(exponent)}"


@dataclass(frozen=True)
class Recipe:
    """A model, its stages, and any other flags of `ov2 train` by name, without dashes in front: {"beta2": 0.95}.

    `source` is the file it was read from, and no part of what it says.
    """

    model: str | None
    flags: Mapping[str, FlagValue]
    stages: tuple[Stage, ...]
    source: Path | None = field(default=None, compare=False)
