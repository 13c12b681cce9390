"""What a run will cost: FLOPs, memory and hours of each stage on a given machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.counts import largest_divisor
from open_clip_ov2.recipe.model_costs import Encoder, Flops, Memory, ModelSizes, Tokens, count_tokens, total_flops

H100_TFLOPS = 790.0  # dense bf16, measured on an H100; a data sheet promises 989
MFU = 0.5  # ours: between what is common (12-30%) and the best published dense runs (57-68%)
H100_MEMORY_GB = 80.0
CLIP_CONTEXT = 77  # OpenCLIP's text towers


@dataclass(frozen=True)
class Machine:
    """`tflops`, `memory_gb` and `images_per_second` are of one GPU; without measured `images_per_second` (one for all
    stages or one each) the speed follows from FLOPs at `mfu` of `tflops`."""

    gpus: int = 1
    tflops: float = H100_TFLOPS
    mfu: float = MFU
    memory_gb: float = H100_MEMORY_GB
    images_per_second: tuple[float, ...] = ()

    def speed(self, index: int, num_stages: int) -> float | None:
        """Measured images per second of one GPU in a stage, if given. Raises UserError."""
        given = self.images_per_second
        if given and len(given) not in (1, num_stages):
            raise UserError(f"--images-per-second: {len(given)} numbers for {num_stages} stages; give one, or one each")
        return given[min(index, len(given) - 1)] if given else None


@dataclass(frozen=True)
class StageCost:
    """`parts` holds FLOPs of one image by part of the model. `images_per_second` and `hours` are of all GPUs together;
    `batch_size` images are computed at once on a GPU, `accum_freq` times in a step."""

    title: str
    images: str  # "84 px", or "256 tokens" at most
    resolution: int
    samples: int
    tokens: Tokens
    batch_size: int
    accum_freq: int
    lr: float
    warmup_steps: int
    precision: str
    grad_checkpointing: bool
    context_length: int
    parts: Mapping[str, Flops]
    memory: Memory
    machine: Machine
    speed: float | None  # measured images per second of one GPU
    remedy: str = "--grad-checkpointing"  # where not even one image fits

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accum_freq * self.machine.gpus

    @property
    def steps(self) -> int:
        """Optimizer steps; the last one is filled up to a whole batch."""
        return -(-self.samples // self.global_batch)

    @property
    def flops_per_image(self) -> float:
        return sum(part.total for part in self.parts.values())

    @property
    def total_flops(self) -> float:
        return self.flops_per_image * self.samples

    @property
    def images_per_second(self) -> float:
        recomputed = sum(part.blocks for part in self.parts.values()) if self.grad_checkpointing else 0.0
        computed = self.machine.mfu * self.machine.tflops * 1e12 / (self.flops_per_image + recomputed)
        return (self.speed or computed) * self.machine.gpus

    @property
    def fits(self) -> bool:
        """Whether a batch fits into a GPU's memory."""
        return self.memory.of(self.batch_size) <= self.machine.memory_gb * 1e9

    def memory_advice(self) -> str:
        """What does not fit into a GPU's memory and what would; empty if it fits."""
        if self.fits:
            return ""
        needed, fits = self.memory.of(self.batch_size), self.memory.most_images(self.machine.memory_gb * 1e9)
        way = f"not even one image fits; use {self.remedy} or more memory"
        if fits:
            size = largest_divisor(self.batch_size * self.accum_freq, fits)
            way = f"--batch-size {size} fits (about {fits:,} images would); --grad-checkpointing makes room for more"
        return (
            f"{self.title}: --batch-size {self.batch_size} needs about {needed / 1e9:,.1f} GB on each GPU, more than "
            f"{self.machine.memory_gb:g}; {way}"
        )

    @property
    def mfu(self) -> float:
        """Without what checkpointing computes again."""
        return self.images_per_second * self.flops_per_image / (self.machine.gpus * self.machine.tflops * 1e12)

    @property
    def hours(self) -> float:
        return self.samples / self.images_per_second / 3600

    @property
    def gpu_hours(self) -> float:
        return self.hours * self.machine.gpus


@dataclass(frozen=True)
class Checked:
    """What a command line will do, checked before it runs. `stages` are their titles, `summaries` a line for each."""

    name: str
    run_dir: Path
    signature: str
    model: str
    stages: tuple[str, ...]
    summaries: tuple[str, ...]
    total_samples: int
    parameters: int


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


def baseline_flops(sizes: ModelSizes, cost: StageCost) -> dict[str, float]:
    """FLOPs of one image of CoCa and CLIP around the encoder of an ov2 model, in a stage.

    Their text towers and CoCa's decoder are as wide and deep as our decoder, which for L makes OpenCLIP's coca_ViT-L-14
    and ViT-L-14; the vocabulary is the same. CoCa reads the whole caption, CLIP 77 tokens.
    """
    decoder = sizes.decoder
    assert decoder is not None
    clip = Encoder(sizes.encoder.tower, sizes.encoder.patch_size, sizes.encoder.tower.width, decoder.width)
    coca = replace(clip, pooled_width=decoder.width)
    found = {}
    for name, baseline, length in (
        ("CoCa", ModelSizes(coca, sizes.vocab, decoder, decoder, queries=256), cost.context_length),
        ("CLIP", ModelSizes(clip, sizes.vocab, text=decoder), CLIP_CONTEXT),
    ):
        found[name] = total_flops(baseline, cost.resolution, count_tokens(baseline, cost.resolution, length))
    return found
