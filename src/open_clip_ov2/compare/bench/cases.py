"""What is to be measured, in plain values that go to a worker as JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from open_clip_ov2.errors import UserError

OWN_MODELS = Path(__file__).parent / "models"
ARMS = ("ov2", "coca", "clip")


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
        except ValueError:
            raise UserError(f"--caption-tokens {text!r}: LOW:HIGH:MEAN is wanted, for example 12:128:64") from None
        if not 2 <= lengths.low <= lengths.mean <= lengths.high:
            raise UserError(f"--caption-tokens {text}: 2 <= LOW <= MEAN <= HIGH must hold")
        return lengths


@dataclass(frozen=True)
class Case:
    resolution: int
    precision: str
    batch_size: int


@dataclass(frozen=True)
class Job:
    """One contender in one case. `arm` is its short name, `model` the one in OpenCLIP's registry, or
    `local-dir:FOLDER`; `words_of`: the ov2 model whose vocabulary the captions are drawn from; `tokenizer`: a folder of
    word pieces that all have in the place of theirs."""

    arm: str
    model: str
    words_of: str
    case: Case
    device: str
    compile: bool
    memory_budget: float | None
    keep_ratio: float | None
    lengths: CaptionLengths
    memory_limit_gb: float | None
    threads: int | None
    tokenizer: str | None = None
    context_length: int | None = None
    patch_dropout: float | None = None
    fusion: str | None = None
    grad_checkpointing: bool = False


@dataclass(frozen=True)
class BenchSettings:
    """`steps`: timed together in one repetition."""

    model: str
    arms: tuple[str, ...]
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

    def job(self, arm: str, case: Case) -> Job:
        return Job(
            arm=arm,
            model=model_of(arm, self.model),
            words_of=self.model,
            case=case,
            device=self.device,
            compile=self.compile,
            memory_budget=self.memory_budget,
            keep_ratio=self.keep_ratio if arm == "ov2" else None,
            lengths=self.lengths,
            memory_limit_gb=self.memory_limit_gb,
            threads=self.threads,
        )


def model_of(arm: str, model: str) -> str:
    """`coca` and `clip` are the counterparts of the ov2 model; anything else is a name of OpenCLIP's registry."""
    return {"ov2": model, "coca": f"coca-of-{model}", "clip": f"clip-of-{model}"}.get(arm, arm)


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
