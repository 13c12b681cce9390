"""What `ov2 bench` measures, and on which machine."""

from __future__ import annotations

import os
import platform
import shlex
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.argv import flag, switch_flag, to_argv
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.model_costs import PRECISION
from open_clip_ov2.tables import comma_separated, one_of, real, text, whole

BENCH_MODELS = Path(__file__).parent / "models"


@dataclass(frozen=True)
class CaptionLengths:
    """Tokens of a caption, begin and end of text included: between `low` and `high`, `mean` on average."""

    low: int = 12
    high: int = 128
    mean: float = 64.0

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
    of torch on a CPU. `memory_limit_gb`: what a GPU lets the process have, and what a batch may use on a CPU."""

    name: str
    argv: tuple[str, ...]
    captions_of: str
    device: str
    lengths: CaptionLengths
    flags_of_ov2: tuple[str, ...] = ()
    memory_limit_gb: float | None = None
    threads: int | None = None


# Defaults by the name of --setting.
SETTINGS: dict[str, dict[str, Any]] = {
    # Small enough for two CPU cores: encoder 384 x 6, decoder 256 x 4, a vocabulary of 32,000.
    "small": {
        "model": "ov2-bench-small", "resolution": (112,), "precision": ("amp_bf16", "fp32"), "batch_size": (16,),
        "steps": 2,
    },
    # The smallest model of the paper's main table, at the resolutions of its two stages.
    "large": {
        "model": "ov2-vit-l-14", "resolution": (84, 224), "precision": ("amp_bf16",), "batch_size": (256,), "steps": 10,
    },
}  # fmt: skip


_numbers = comma_separated(whole(1))
_count = whole(1)


@dataclass(frozen=True)
class BenchSettings:
    """Flags of `ov2 bench`, and the device. Raises UserError for flags that need others."""

    model: str = flag("NAME", text, "an ov2 model")
    variants: tuple[str, ...] = flag(
        "A,B,...", comma_separated(text), default=("ov2", "coca", "clip"),
        help="ov2; coca, clip: around the encoder of --model; names of OpenCLIP's registry (default: ov2,coca,clip)",
    )  # fmt: skip
    resolution: tuple[int, ...] = flag("PX,...", _numbers, "one case each")
    precision: tuple[str, ...] = flag("P,...", comma_separated(one_of(*PRECISION)), "one case each")
    batch_size: tuple[int, ...] = flag("N,...", _numbers, "one case each; of several, the best is reported too")
    keep_ratio: float | None = flag("R", real(0, 1, above=True), "of ov2 (default: the model's)")
    caption_tokens: CaptionLengths = flag(
        "LOW:HIGH:MEAN", CaptionLengths.parse, default=CaptionLengths(),
        help="tokens of a caption, begin and end included (default: 12:128:64)",
    )  # fmt: skip
    compile: bool = switch_flag("ov2 block by block, the others as OpenCLIP's --torchcompile does it")
    memory_budget: float | None = flag("F", real(0, 1), "with --compile: ov2 train's --activation-memory-budget")
    ov2_flags: tuple[str, ...] = flag(
        "'FLAGS'", lambda value: tuple(shlex.split(value)), default=(),
        help="further flags of `ov2 train` for ov2 models: --ov2-flags='--recompute-elementwise'",
    )  # fmt: skip
    device: str = "cpu"
    threads: int | None = flag("N", _count, "torch's threads on a CPU")
    repetitions: int = flag("N", _count, "of each variant, in turns", default=5)
    steps: int = flag("N", _count, "timed together in a repetition (default: by --setting)")
    largest_batch: bool = switch_flag("find the largest batch of each variant, at each resolution")
    memory_limit_gb: float | None = flag(
        "G", real(0, above=True), "GPU memory that a process may use; on a CPU, what a batch of --largest-batch may use"
    )

    def __post_init__(self) -> None:
        if self.largest_batch and self.device == "cpu" and self.memory_limit_gb is None:
            raise UserError("--largest-batch: on a CPU it needs --memory-limit-gb, the memory that a batch may use")
        if self.memory_budget is not None and not self.compile:
            raise UserError(f"--memory-budget {self.memory_budget:g}: it needs --compile")

    @property
    def cases(self) -> list[Case]:
        return [Case(*values) for values in product(self.resolution, self.precision, self.batch_size)]

    def job(self, variant: str, case: Case) -> Job:
        argv = {
            "model": model_of(variant, self.model), "force-image-size": case.resolution, "precision": case.precision,
            "batch-size": case.batch_size, "torchcompile": self.compile, "device": self.device,
            "dataset-type": "synthetic", "train-num-samples": case.batch_size,
        }  # fmt: skip
        flags_of_ov2 = {"activation-memory-budget": self.memory_budget, "keep-ratio": self.keep_ratio}
        of_ov2 = (*to_argv(flags_of_ov2), *self.ov2_flags)
        return Job(
            variant, tuple(to_argv(argv)), self.model, self.device, self.caption_tokens, of_ov2, self.memory_limit_gb,
            self.threads,
        )  # fmt: skip


def model_of(variant: str, model: str) -> str:
    """`coca` and `clip` are the baselines of the ov2 model; anything else is a name of OpenCLIP's registry."""
    return {"ov2": model, "coca": f"coca-of-{model}", "clip": f"clip-of-{model}"}.get(variant, variant)


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
