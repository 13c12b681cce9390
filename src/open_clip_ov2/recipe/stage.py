"""A run as frozen data: a recipe and its stages. None means that the run's flag, or its default, holds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import to_argv
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.counts import sample_count, short_count
from open_clip_ov2.tables import from_table, key, keys_of, one_of, pairs, real, switch, text, whole

# What OpenCLIP 3.3 accepts (a test compares them with its parser and scheduler).
SCHEDULES = ("cosine", "const", "const-cooldown")
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")

FlagScalar = str | int | float | bool
FlagValue = FlagScalar | tuple[FlagScalar, ...]
_fraction = real(0, 1, above=True)


def _range(value: Any) -> tuple[float, float]:
    """0.35, "0.35", "0.25:1.0" or [0.25, 1.0], in (0, 1]."""
    parts = value.split(":") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if len(parts) not in (1, 2):
        raise UserError(f"{value!r}: expected a number (0.35) or a range low:high (0.25:1.0)")
    low, high = _fraction(parts[0]), _fraction(parts[-1])
    if low > high:
        raise UserError(f"{low:g}:{high:g}: expected the lower end of the range first")
    return low, high


def _keep_ratio(value: Any) -> str:
    low, high = _range(value)
    return repr(low) if low == high else f"{low!r}:{high!r}"


@dataclass(frozen=True)
class Stage:
    """Training at one resolution, or with images that keep their shapes and have at most `tokens` patches.

    The fields are the keys of `[[stage]]` and `--stage`; `flag` is the flag of `ov2 train` that a key stands for, if it
    has another name.

    Durations are in samples; `batch_size` is the largest number of images at once in a process; `keep_ratio` is "0.35"
    or a range, "0.25:1.0"; `crop_scale` is the smallest and the largest fraction of the area that a training crop
    takes. Raises UserError for values that contradict each other.
    """

    resolution: int | None = key(whole(1), default=None, flag="force-image-size")
    samples: int = key(sample_count(1), default=0, flag="train-num-samples")
    global_batch: int | None = key(whole(1), default=None)
    batch_size: int | None = key(whole(1), default=None)
    lr: float | None = key(real(0, above=True), default=None)
    base_lr: float | None = key(real(0, above=True), default=None)
    warmup_samples: int | None = key(sample_count(0), default=None)
    schedule: str | None = key(one_of(*SCHEDULES), default=None, flag="lr-scheduler")
    keep_ratio: str | None = key(_keep_ratio, default=None)
    eval_keep_ratio: float | None = key(_fraction, default=None)
    weight_decay: float | None = key(real(0), default=None, flag="wd")
    crop_scale: tuple[float, float] | None = key(_range, default=None, flag="aug-cfg")
    color_jitter: bool | None = key(switch, default=None)
    precision: str | None = key(one_of(*PRECISIONS), default=None)
    grad_checkpointing: bool | None = key(switch, default=None)
    context_length: int | None = key(whole(2), default=None, flag="force-context-length")  # begin of text, one target
    train_data: str | None = key(text, default=None)
    tokens: int | None = key(whole(1), default=None, flag="max-tokens")
    name: str | None = key(text, default=None)

    def __post_init__(self) -> None:
        if self.resolution is None and self.tokens is None:
            raise UserError("resolution is missing, for example resolution = 84 (or tokens, for images of any shape)")
        if self.resolution is not None and self.tokens is not None:
            raise UserError("resolution and tokens are both given; a resolution is for squares, leave one out")
        if not self.samples:
            raise UserError('samples is missing, for example samples = 2_000_000 or "2M"')
        if self.lr is not None and self.base_lr is not None:
            raise UserError("lr and base-lr are both given; base-lr is the lr at a global batch of 256, leave one out")
        if self.warmup_samples is not None and self.warmup_samples > self.samples:
            raise UserError(f"warmup-samples {self.warmup_samples:,} is more than the stage's samples {self.samples:,}")

    @property
    def title(self) -> str:
        return self.name or self._images

    @property
    def _images(self) -> str:
        return f"{self.tokens} tokens" if self.resolution is None else f"{self.resolution} px"

    def items(self) -> dict[str, Any]:
        """The values that are given, by key."""
        values = {name: getattr(self, field.name) for name, field in keys_of(Stage).items()}
        return {name: value for name, value in values.items() if value is not None}

    def added_to(self, flags: list[str]) -> list[str]:
        """argv of `ov2 train` for this stage: `flags`, overridden by what the stage says."""
        values = {FLAGS[name]: value for name, value in self.items().items() if name != "name"}
        if self.crop_scale is not None:
            values["aug-cfg"] = f"scale=({self.crop_scale[0]},{self.crop_scale[1]})"
        if self.tokens is not None:
            values["aspect"] = "native"
        off = {f"--{flag}" for flag, value in values.items() if value is False}
        return [*(word for word in flags if word not in off), *to_argv({**values, "epochs": 1})]

    def described(self, global_batch: int, lr: float) -> str:
        """One line for logs."""
        mantissa, exponent = f"{lr:.1e}".split("e")
        parts = [self._images, f"{short_count(self.samples)} samples", f"batch {global_batch:,}"]
        parts += [f"lr {mantissa}e{int(exponent)}", *([f"keep {self.keep_ratio}"] if self.keep_ratio else [])]
        return (f"{self.name}: " if self.name else "") + ", ".join(parts)


# The flag of each key of a stage.
FLAGS = {name: field.metadata["flag"] or name for name, field in keys_of(Stage).items()}


def parse_stage(text: str) -> Stage:
    """`112:samples=2M,base-lr=8e-6,keep-ratio=0.35`, or `tokens=256:samples=2M`, as after `--stage`. Raises UserError.

    Commas within braces belong to the value: `train-data=shards/{0,7}.tar`.
    """
    where = f"--stage {text}"
    resolution, colon, rest = text.partition(":")
    if resolution.startswith("tokens="):
        return from_table(Stage, where, [("tokens", resolution.removeprefix("tokens=").strip()), *pairs(where, rest)])
    if not colon or "=" in resolution:
        raise UserError(f"{where}: begin with the resolution and a colon, for example 112:samples=2M,base-lr=8e-6")
    return from_table(Stage, where, [("resolution", resolution.strip()), *pairs(where, rest)])


@dataclass(frozen=True)
class Recipe:
    """A model, its stages, and any other flags of `ov2 train` by name without dashes: {"beta2": 0.95}.

    `source` is the file it was read from; it does not matter for equality.
    """

    model: str | None
    flags: Mapping[str, FlagValue]
    stages: tuple[Stage, ...]
    source: Path | None = field(default=None, compare=False)
