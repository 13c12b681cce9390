"""What a stage will do and cost, from sizes and settings alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.counts import parse_samples
from open_clip_ov2.recipe.flops import CaptionSizes, ClipSizes, CocaSizes, Encoder, Flops, ModelSizes, Tokens, flops
from open_clip_ov2.recipe.memory import PRECISION, Memory, activation_bytes, fixed_bytes, loss_bytes
from open_clip_ov2.recipe.stage import LR_BATCH, Stage

H100_TFLOPS = 790.0  # dense bf16, measured on an H100; a data sheet promises 989
UTILISATION = 0.5  # ours: between what is common (12-30%) and the best published dense runs (57-68%)
H100_MEMORY_GB = 80.0
OPEN_CLIP_BATCH = 64  # OpenCLIP's default --batch-size
OPEN_CLIP_WARMUP_STEPS = 10_000  # OpenCLIP's default --warmup
CLIP_CONTEXT = 77  # OpenCLIP's text towers


@dataclass(frozen=True)
class Machine:
    """`images_per_second` per GPU, one for all stages or one each; none: from FLOPs at `utilisation` of `tflops`."""

    gpus: int = 1
    tflops: float = H100_TFLOPS
    utilisation: float = UTILISATION
    memory_gb: float = H100_MEMORY_GB
    images_per_second: tuple[float, ...] = ()

    def speed(self, index: int, num_stages: int) -> float | None:
        """Images a second of one GPU in a stage, where given. Raises UserError."""
        given = self.images_per_second
        if given and len(given) not in (1, num_stages):
            raise UserError(f"--images-per-second: {len(given)} numbers for {num_stages} stages; give one, or one each")
        return given[min(index, len(given) - 1)] if given else None


@dataclass(frozen=True)
class Settings:
    """A stage with every value said: its own, or the run's flag, or the default."""

    global_batch: int
    batch_size: int
    accum_freq: int
    lr: float | None
    warmup_steps: int
    precision: str
    grad_checkpointing: bool
    context_length: int
    keep: tuple[float, float]
    patch_dropout: float
    mean_caption_tokens: float | None


@dataclass(frozen=True)
class StageCost:
    """`parts`: FLOPs of one image. `images_per_second`, `hours` and `utilisation` are of all GPUs together."""

    stage: Stage
    settings: Settings
    tokens: Tokens
    steps: int
    parts: Mapping[str, Flops]
    memory: Memory
    images_per_second: float
    hours: float
    gpu_hours: float
    utilisation: float

    @property
    def flops_per_image(self) -> float:
        return sum(part.total for part in self.parts.values())

    @property
    def total_flops(self) -> float:
        return self.flops_per_image * self.stage.samples


def resolve(
    stage: Stage,
    flags: Mapping[str, Any],
    gpus: int,
    *,
    family: bool,
    context_length: int,
    keep_ratio: tuple[float, float] | None,
    patch_dropout: float,
) -> Settings:
    """What `ov2 train` will run a stage with on `gpus` GPUs. The last three are the model's own. Raises UserError."""
    global_batch, batch_size, accum_freq = _batch(stage, flags, gpus)
    ratio = stage.keep_ratio or flags.get("keep-ratio")
    parts = [float(part) for part in str(ratio).split(":")] if ratio else list(keep_ratio or (1.0, 1.0))
    precision = stage.precision or flags.get("precision") or ("amp_bf16" if family else "amp")
    dropout = flags.get("force-patch-dropout")
    return Settings(
        global_batch=global_batch,
        batch_size=batch_size,
        accum_freq=accum_freq,
        lr=_lr(stage, flags, global_batch),
        warmup_steps=_warmup_steps(stage, flags, global_batch),
        precision=str(precision),
        grad_checkpointing=bool(
            flags.get("grad-checkpointing") if stage.grad_checkpointing is None else stage.grad_checkpointing
        ),
        context_length=context_length,
        keep=(parts[0], parts[-1]),
        patch_dropout=patch_dropout if dropout is None else float(dropout),
        mean_caption_tokens=flags.get("mean-caption-tokens"),
    )


def _batch(stage: Stage, flags: Mapping[str, Any], gpus: int) -> tuple[int, int, int]:
    """(global batch, images at once on a GPU, micro-batches in a step), as `ov2 train` divides them."""
    given, accum = stage.batch_size or flags.get("batch-size"), flags.get("accum-freq")
    total = stage.global_batch or flags.get("global-batch")
    if total is None:
        size, accum_freq = int(given or OPEN_CLIP_BATCH), int(accum or 1)
        return size * accum_freq * gpus, size, accum_freq
    total = parse_samples(total)
    if total % gpus:
        raise UserError(f"global batch {total:,}: not divisible by {gpus} GPUs; change --gpus or the batch")
    each = total // gpus
    if accum is not None:
        if each % int(accum) or (given is not None and int(given) * int(accum) != each):
            batch = "" if given is None else f" x batch-size {given}"
            raise UserError(
                f"global batch {total:,}: {each:,} for each of {gpus} GPUs, which is not accum-freq {accum}{batch}"
            )
        return total, each // int(accum), int(accum)
    size = largest_divisor(each, each if given is None else int(given))
    return total, size, each // size


def largest_divisor(number: int, limit: int) -> int:
    """The largest divisor of `number` up to `limit`, at least 1."""
    return max(size for size in range(1, max(1, min(number, limit)) + 1) if number % size == 0)


def _lr(stage: Stage, flags: Mapping[str, Any], global_batch: int) -> float | None:
    said = stage.peak_lr(global_batch)
    if said is None and "lr" in flags:
        return float(flags["lr"])
    if said is None and "base-lr" in flags:
        return float(flags["base-lr"]) * global_batch / LR_BATCH
    return said


def _warmup_steps(stage: Stage, flags: Mapping[str, Any], global_batch: int) -> int:
    samples = stage.warmup_samples
    if samples is None and "warmup-samples" in flags:
        samples = parse_samples(flags["warmup-samples"])
    if samples is None:
        return int(flags.get("warmup", OPEN_CLIP_WARMUP_STEPS))
    return -(-samples // global_batch)


def count_tokens(sizes: ModelSizes, resolution: int, settings: Settings) -> Tokens:
    """Tokens of one image and caption; the mean of a range of keep ratios."""
    seen = sizes.encoder.patches(resolution)
    if settings.patch_dropout:
        seen = max(1, int(seen * (1 - settings.patch_dropout)))
    text = settings.context_length - 1
    if isinstance(sizes, ClipSizes):
        return Tokens(seen + 1, 0, settings.context_length, 0.0)
    if isinstance(sizes, CocaSizes):  # its loss computes every position, padding too
        return Tokens(seen + 1, sizes.queries - 1, text, float(text))
    kept = int(seen * sum(settings.keep) / 2)
    if kept < 1:
        raise UserError(f"keep-ratio {settings.keep[0]:g} keeps none of {seen} image tokens at {resolution} px")
    targets = min(float(text), settings.mean_caption_tokens or text)
    return Tokens(seen + 1, kept, math.ceil(targets), targets)  # captions are packed: next to no padding is computed


def stage_cost(
    stage: Stage,
    settings: Settings,
    sizes: ModelSizes,
    trained: int,
    frozen: int,
    machine: Machine,
    speed: float | None,
) -> StageCost:
    """`speed`: measured images a second of one GPU, or None."""
    tokens = count_tokens(sizes, stage.resolution, settings)
    parts = flops(sizes, sizes.encoder.patches(stage.resolution), tokens)
    precision = PRECISION[settings.precision]
    most_kept = int((tokens.encoder - 1) * settings.keep[1]) if isinstance(sizes, CaptionSizes) else tokens.kept
    memory = Memory(
        fixed_bytes(trained, frozen, precision, machine.gpus) + loss_bytes(sizes, precision),
        activation_bytes(
            sizes,
            replace(tokens, kept=most_kept),
            stage.resolution,
            precision,
            grad_checkpointing=settings.grad_checkpointing,
        ),
    )
    useful = sum(part.total for part in parts.values())
    done = useful + (sum(part.blocks for part in parts.values()) if settings.grad_checkpointing else 0.0)
    ceiling = machine.tflops * 1e12
    speed = speed or machine.utilisation * ceiling / done
    hours = stage.samples / (speed * machine.gpus) / 3600
    steps = stage.steps(settings.global_batch)
    return StageCost(
        stage, settings, tokens, steps, parts, memory,
        speed * machine.gpus, hours, hours * machine.gpus, speed * useful / ceiling,
    )  # fmt: skip


def baselines(sizes: CaptionSizes) -> dict[str, ModelSizes]:
    """CoCa and CLIP around the same encoder: text towers and decoder as wide and deep as ours, which for L makes
    OpenCLIP's coca_ViT-L-14 and ViT-L-14; the same vocabulary."""
    tower, decoder = sizes.encoder.tower, sizes.decoder
    clip = Encoder(tower, sizes.encoder.patch_size, tower.width, decoder.width)
    coca = replace(clip, pooled_width=decoder.width)
    return {
        "CoCa": CocaSizes(coca, decoder, decoder, sizes.vocab),
        "CLIP": ClipSizes(clip, decoder, sizes.vocab),
    }


def baseline_flops(sizes: ModelSizes, cost: StageCost) -> float:
    """FLOPs of one image of a baseline in a stage; CLIP reads 77 tokens of text, CoCa the whole caption."""
    length = CLIP_CONTEXT if isinstance(sizes, ClipSizes) else cost.settings.context_length
    settings = replace(cost.settings, context_length=length)
    resolution = cost.stage.resolution
    tokens = count_tokens(sizes, resolution, settings)
    return sum(part.total for part in flops(sizes, sizes.encoder.patches(resolution), tokens).values())


@dataclass(frozen=True)
class Plan:
    """A whole run. `parameters` by part of the model; `baselines`: FLOPs of one image, by name, for each stage."""

    model: str
    parameters: Mapping[str, int]
    stages: tuple[StageCost, ...]
    baselines: Mapping[str, tuple[float, ...]]
    machine: Machine

    @property
    def total_flops(self) -> float:
        return sum(cost.total_flops for cost in self.stages)

    @property
    def hours(self) -> float:
        return sum(cost.hours for cost in self.stages)

    def baseline_total(self, name: str) -> float:
        """FLOPs of a baseline over the same samples."""
        return sum(each * cost.stage.samples for each, cost in zip(self.baselines[name], self.stages, strict=True))
