"""How well a run uses its devices, and what holds it back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

# Ours. A pipeline that keeps up waits for less than a few percent; a fifth of the time is worth a line.
WAIT_SHARE = 0.2
# Ours: a GPU below this share of its matrix rate, with most of its memory free, has too little to do at once.
LOW_UTILISATION, LOW_MEMORY = 0.2, 0.5
JUDGED_S = 30.0  # steps of so long are looked at together: single slow batches are no bottleneck


@dataclass(frozen=True)
class Meter:
    """`image_flops`: model FLOPs (forward and backward) of an image whose caption has so many real target tokens;
    None: of the model's whole context. `peak_flops`: a second, of all devices of the run together.
    """

    image_flops: Callable[[float | None], float]
    peak_flops: float

    def utilisation(self, images: float, tokens: float | None, seconds: float) -> float:
        """Model FLOPs of the images over what the devices could have done meanwhile: nothing is counted for padding,
        for what checkpointing computes again, or for dropped tokens."""
        mean = None if tokens is None else tokens / max(images, 1.0)
        return images * self.image_flops(mean) / (max(seconds, 1e-9) * self.peak_flops)


@dataclass(frozen=True)
class DeviceMemory:
    """Of the fullest moment so far. `total` 0: not a GPU."""

    peak: float = 0.0
    total: float = 0.0


def bottleneck(
    wait_share: float, utilisation: float | None, memory: DeviceMemory, workers: int | None
) -> tuple[str, str] | None:
    """(cause, one line that says what to do), or None if nothing stands out."""
    if wait_share > WAIT_SHARE:
        now = "" if workers is None else f" (now {workers})"
        return "data", (
            f"waiting for data {wait_share:.0%} of the time: more --workers{now}, or smaller pictures "
            "(`ov2 shards resize`); `ov2 bench data` says which part is slow"
        )
    used = memory.peak / memory.total if memory.total else 1.0
    if utilisation is not None and utilisation < LOW_UTILISATION and used < LOW_MEMORY:
        return "batch", (
            f"the GPU works at {utilisation:.0%} of its matrix rate with {used:.0%} of its memory used: a larger "
            "--batch-size, and --torchcompile, give it more to do at once"
        )
    return None


@dataclass
class BottleneckWatch:
    """Each cause is said once a stage, of JUDGED_S of steps. What comes before `begin`'s first window (workers start,
    blocks compile) is not looked at."""

    workers: int | None = None
    _warm: bool = False
    _said: set[str] = field(default_factory=set)
    _seconds: float = 0.0
    _sums: dict[str, float] = field(default_factory=dict)

    def begin(self, workers: int | None) -> None:
        self.workers, self._warm, self._seconds = workers, False, 0.0
        self._said, self._sums = set(), {}

    def note(self, speed: Mapping[str, float], seconds: float, memory: DeviceMemory) -> str | None:
        """Of one window: `data_wait_share`, and `utilisation` where known. A line to say, or None."""
        if not self._warm:
            self._warm = True
            return None
        for name in ("data_wait_share", "utilisation"):
            if name in speed:
                self._sums[name] = self._sums.get(name, 0.0) + seconds * speed[name]
        self._seconds += seconds
        if self._seconds < JUDGED_S:
            return None
        mean = {name: value / self._seconds for name, value in self._sums.items()}
        self._seconds, self._sums = 0.0, {}
        found = bottleneck(mean["data_wait_share"], mean.get("utilisation"), memory, self.workers)
        if found is None or found[0] in self._said:
            return None
        self._said.add(found[0])
        return found[1]


def device_memory(device_type: str) -> DeviceMemory:
    if device_type != "cuda":
        return DeviceMemory()
    total = torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory
    return DeviceMemory(float(torch.cuda.max_memory_allocated()), float(total))
