"""Time and memory of one model's training step, on images and captions that are the same for every variant.

Shapes: B batch, R resolution in px, L caption tokens. Memory is in bytes, by the allocator's own count.
"""

from __future__ import annotations

import gc
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from open_clip_ov2 import training
from open_clip_ov2.compare.bench.settings import BENCH_MODELS, CaptionLengths, Job, machine_facts
from open_clip_ov2.errors import UserError
from open_clip_ov2.tracking.throughput import measured_peak

CONCENTRATION = 4.0  # of the Beta distribution of lengths, ours: most captions near the mean, all lengths occur
POOL = 4  # different batches, used in turns: caption lengths vary from step to step
GB = 1e9
Pair = tuple[Tensor, Tensor]  # images and captions


@dataclass(frozen=True)
class Vocabulary:
    """Ids of the tokenizer; the tokens of captions are drawn from all others."""

    size: int
    bos_id: int
    eos_id: int
    pad_id: int


def caption_lengths(count: int, lengths: CaptionLengths, seed: int) -> list[int]:
    """Lengths from `low` to `high`, from a Beta distribution whose mean is `mean`."""
    span = lengths.high - lengths.low
    share = (lengths.mean - lengths.low) / span if span else 0.0
    if share in (0.0, 1.0):
        return [lengths.low if share == 0.0 else lengths.high] * count
    rng = random.Random(seed)
    a, b = CONCENTRATION * share, CONCENTRATION * (1 - share)
    return [round(lengths.low + span * rng.betavariate(a, b)) for _ in range(count)]


def synthetic_batch(
    batch_size: int, resolution: int, context_length: int, lengths: CaptionLengths, words: Vocabulary, seed: int
) -> tuple[Tensor, Tensor]:
    """Images `(B, 3, R, R)` uint8, noise, and ids `(B, L)` int64, padded; the same for the same seed."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch_size, 3, resolution, resolution)
    images_B3RR = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    special = {words.bos_id, words.eos_id, words.pad_id}
    usable = torch.tensor([word for word in range(words.size) if word not in special])
    drawn_BL = usable[torch.randint(len(usable), (batch_size, lengths.high), generator=generator)]
    texts_BL = torch.full((batch_size, context_length), words.pad_id)
    for row, length in enumerate(caption_lengths(batch_size, lengths, seed)):
        end = min(length, context_length)  # tokenizers put the end of text at the last place then
        texts_BL[row, :end] = drawn_BL[row, :end]
        texts_BL[row, 0], texts_BL[row, end - 1] = words.bos_id, words.eos_id
    return images_B3RR, texts_BL


class MeasuredStep:
    """The training step of one job. Raises UserError for a model that cannot be built or a vocabulary too small."""

    def __init__(self, job: Job) -> None:
        self.job, self.device = job, torch.device(job.device)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        self._on_gpu = self.device.type == "cuda"
        if self._on_gpu and job.memory_limit_gb is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_limit_gb * GB / total))
        self.trained = training.bench_model(job.argv, job.device, job.flags_of_ov2, BENCH_MODELS)
        self.words = Vocabulary(*self.trained.caption_ids(job.captions_of))
        if self.words.size > self.trained.vocabulary:
            raise UserError(
                f"{job.name}: captions are drawn from the {self.words.size:,} tokens of {job.captions_of}, and the "
                f"model has {self.trained.vocabulary:,}; give all variants the same --tokenizer"
            )
        self._pool: list[Pair] = []
        self._timed = 0

    def facts(self) -> dict[str, Any]:
        """`image_flops`: model FLOPs of an image and its caption, whose first token is not predicted."""
        return {"image_flops": self.trained.image_flops(self.job.lengths.mean - 1)}

    def peak(self) -> dict[str, Any]:
        """`flops`: the device's measured dense matrix rate, FLOP/s; `machine`: the device in words."""
        flops = measured_peak(self.device, self.trained.args.precision).flops
        return {"flops": flops, "machine": machine_facts(self.job.device)}

    def memory(self, batch_size: int | None = None) -> dict[str, int]:
        """`step_bytes`: the step's peak above weights, gradients and optimizer state, which are `fixed_bytes`; by
        default with the job's own batch."""
        pairs = self._pairs(1, batch_size or self.trained.args.batch_size)
        self.trained.run(pairs)
        gc.collect()
        above = step_bytes(lambda: self.trained.run(pairs), self.trained.optimizer, self.device)
        torch.cuda.empty_cache()  # for the other variants
        return {"step_bytes": above, "fixed_bytes": fixed_bytes(self.trained.model, self.trained.optimizer)}

    def time(self, steps: int) -> dict[str, Any]:
        """`step_s` and `cpu_s`: seconds of a step by the clock and on all processors, of so many timed together. All
        batches of the pool come first once, which compiles what is to be compiled; later one batch does."""
        self._pool = self._pool or self._pairs(POOL, self.trained.args.batch_size)
        self.trained.run(self._pool[:1] if self._timed else self._pool)
        pairs = [self._pool[(self._timed + index) % POOL] for index in range(steps)]
        self._timed += steps
        self._wait()
        begin, worked = time.perf_counter(), time.process_time()
        self.trained.run(pairs)
        self._wait()
        seconds, worked_s = time.perf_counter() - begin, time.process_time() - worked
        torch.cuda.empty_cache()
        return {"step_s": seconds / steps, "cpu_s": worked_s / steps}

    def kernels(self, rows: int) -> str:
        """torch.profiler's table of the kernels (on a CPU: operators) that take the most time in a step."""
        kind = "cuda" if self._on_gpu else "cpu"
        pairs = self._pool[:1] or self._pairs(1, self.trained.args.batch_size)
        with profile(activities=[getattr(ProfilerActivity, kind.upper())]) as profiler:
            self.trained.run(pairs)
            self._wait()
        return str(profiler.key_averages().table(sort_by=f"self_{kind}_time_total", row_limit=rows))

    def fits(self, batch_size: int) -> bool:
        """Whether two steps run; on a CPU, whether a step stays below the limit by its allocator's count."""
        if self._on_gpu:
            self.trained.run(2 * self._pairs(1, batch_size))
            self._wait()
            return True
        assert self.job.memory_limit_gb is not None
        return sum(self.memory(batch_size).values()) <= self.job.memory_limit_gb * GB

    def _pairs(self, count: int, batch_size: int) -> list[Pair]:
        context, resolution = self.trained.facts.context_length, int(self.trained.model.visual.image_size[0])
        pairs = []
        for seed in range(count):
            batch = synthetic_batch(batch_size, resolution, context, self.job.lengths, self.words, seed)
            images, texts = self.trained.loaded(*batch)
            # Pinned as the loaders of both have it there.
            pairs.append((images.pin_memory(), texts.pin_memory()) if self._on_gpu else (images, texts))
        return pairs

    def _wait(self) -> None:
        if self._on_gpu:
            torch.cuda.synchronize(self.device)


def fixed_bytes(model: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    """Weights, gradients of the trained ones, and what the optimizer keeps after its first step."""
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state = [value for values in optimizer.state.values() for value in values.values() if isinstance(value, Tensor)]
    return _bytes([*model.parameters(), *model.buffers(), *trained, *state])


def step_bytes(step: Callable[[], None], optimizer: torch.optim.Optimizer, device: torch.device) -> int:
    """The peak during `step` above weights, gradients and optimizer state. `step` must have run before, so that the
    optimizer has its state. Gradients are freed before it, and what they take afterwards is subtracted."""
    optimizer.zero_grad(set_to_none=True)
    above = _cuda_peak(step, device) if device.type == "cuda" else _cpu_peak(step)
    trained = (parameter for group in optimizer.param_groups for parameter in group["params"])
    return max(0, above - _bytes(p.grad for p in trained if p.grad is not None))


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _cuda_peak(step: Callable[[], None], device: torch.device) -> int:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def _cpu_peak(step: Callable[[], None]) -> int:
    """From torch's profiler, whose trace lists each allocation and release; buffers inside oneDNN are not seen."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it reports an error wherever there is no GPU
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        step()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        events: list[dict[str, Any]] = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    changes = [event for event in events if event["name"] == "[memory]" and event["args"]["Device Type"] == 0]
    by_time = sorted(changes, key=lambda event: event["ts"])
    return max(0, *accumulate(int(event["args"]["Bytes"]) for event in by_time))
