"""What `ov2 bench` measures, and on which machine."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

from open_clip_ov2.argv import to_argv
from open_clip_ov2.errors import UserError

BENCH_MODELS = Path(__file__).parent / "models"
VARIANTS = ("ov2", "coca", "clip")


@dataclass(frozen=True)
class CaptionLengths:
    """Tokens of a caption, begin and end of text included: between `low` and `high`, `mean` on average."""

    low: int = 12
    high: int = 128
    mean: float = 64.0

    @property
    def mean_targets(self) -> float:
        """Tokens that are predicted: all but the first."""
        return self.mean - 1

    @classmethod
    def parse(cls, text: str) -> CaptionLengths:
        """LOW:HIGH:MEAN. Raises UserError."""
        try:
            low, high, mean = text.split(":")
            lengths = cls(int(low), int(high), float(mean))
        except (ValueError, AttributeError):
            raise UserError(f"{text!r}: expected LOW:HIGH:MEAN, for example 12:128:64") from None
        if not 2 <= lengths.low <= lengths.mean <= lengths.high:
            raise UserError(f"{text}: expected 2 <= LOW <= MEAN <= HIGH")
        return lengths


@dataclass(frozen=True)
class Case:
    resolution: int
    precision: str
    batch_size: int


@dataclass(frozen=True)
class Job:
    """One variant, measured in one process. `argv`: flags of `ov2 train`; `flags_of_ov2` are added for ov2 models.

    `captions_of`: the ov2 model whose vocabulary captions are drawn from, unless `argv` has a --tokenizer. `threads`
    of torch on a CPU. `memory_limit_gb`: what a GPU lets the process have, and what a batch may use on a CPU.
    """

    name: str
    argv: tuple[str, ...]
    captions_of: str
    device: str
    lengths: CaptionLengths
    flags_of_ov2: tuple[str, ...] = ()
    memory_limit_gb: float | None = None
    threads: int | None = None


@dataclass(frozen=True)
class BenchSettings:
    """`steps`: timed together in one repetition."""

    model: str
    variants: tuple[str, ...]
    cases: tuple[Case, ...]
    device: str
    compile: bool
    memory_budget: float | None
    keep_ratio: float | None
    lengths: CaptionLengths
    repetitions: int
    steps: int
    largest_batch: bool
    memory_limit_gb: float | None
    threads: int | None

    def job(self, variant: str, case: Case) -> Job:
        argv = {
            "model": model_of(variant, self.model), "force-image-size": case.resolution, "precision": case.precision,
            "batch-size": case.batch_size, "torchcompile": self.compile, "device": self.device,
            "dataset-type": "synthetic", "train-num-samples": case.batch_size,
        }  # fmt: skip
        flags_of_ov2 = {"activation-memory-budget": self.memory_budget, "keep-ratio": self.keep_ratio}
        return Job(
            variant, tuple(to_argv(argv)), self.model, self.device, self.lengths, tuple(to_argv(flags_of_ov2)),
            self.memory_limit_gb, self.threads,
        )  # fmt: skip


def model_of(variant: str, model: str) -> str:
    """`coca` and `clip` are the baselines of the ov2 model; anything else is a name of OpenCLIP's registry."""
    return {"ov2": model, "coca": f"coca-of-{model}", "clip": f"clip-of-{model}"}.get(variant, variant)


@dataclass(frozen=True)
class Setting:
    """Defaults under a name."""

    model: str
    resolutions: tuple[int, ...]
    precisions: tuple[str, ...]
    batch_sizes: tuple[int, ...]
    steps: int


SETTINGS = {
    # Small enough for two CPU cores: encoder 384 x 6, decoder 256 x 4, a vocabulary of 32,000.
    "small": Setting("ov2-bench-small", (112,), ("amp_bf16", "fp32"), (16,), steps=2),
    # The smallest model of the paper's main table, at the resolutions of its two stages.
    "large": Setting("ov2-vit-l-14", (84, 224), ("amp_bf16",), (256,), steps=10),
}


def default_device() -> str:
    """torch's name of the device that commands use by default."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def machine_facts(device: str) -> dict[str, str]:
    """What a benchmark ran on, for people: the device, and the versions of torch, Python and CUDA."""
    facts = {"torch": torch.__version__, "python": platform.python_version()}
    if torch.device(device).type == "cuda":
        gpu = torch.cuda.get_device_properties(device)
        return {"device": f"{gpu.name}, {gpu.total_memory / 1e9:.0f} GB", "cuda": str(torch.version.cuda), **facts}
    try:  # Linux names the CPU here; elsewhere its architecture has to do
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return {"device": f"{(names or [platform.machine()])[0]}, {cores()} cores", **facts}
