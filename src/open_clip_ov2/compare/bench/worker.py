"""The process that one contender lives in: a job on stdin's first line, then questions, a line of JSON each.

    peak                  -> {"flops": measured dense matrix rate, "machine": in words}
    memory                -> {"step_bytes", "fixed_bytes"}
    time STEPS            -> {"step_s", "cpu_s"}: seconds of one of them, by the clock and of all processors
    fits BATCH_SIZE       -> {"fits": bool}
Running out of memory is answered with {"out_of_memory": true}, and ends the process: what an allocator holds
afterwards says nothing of a fresh one.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from open_clip_ov2.compare.bench.cases import OWN_MODELS, CaptionLengths, Case, Job
from open_clip_ov2.compare.bench.machine import machine_facts
from open_clip_ov2.compare.bench.step_memory import fixed_bytes, step_bytes
from open_clip_ov2.compare.bench.synthetic import Vocabulary, synthetic_batch
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.run import bench_arm as seam
from open_clip_ov2.tracking.peak import measured_peak

POOL = 4  # different batches, taken in turns: lengths of captions vary from step to step
GB = 1e9


class Worker:
    def __init__(self, job: Job) -> None:
        self.job, self.device = job, torch.device(job.device)
        seam.enter_main(self.device)
        if job.threads is not None:
            torch.set_num_threads(job.threads)
        if self.device.type == "cuda" and job.memory_limit_gb is not None:
            total = torch.cuda.get_device_properties(self.device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, job.memory_limit_gb * GB / total))
        torch.manual_seed(0)
        self.words = Vocabulary(*seam.caption_ids(job.words_of, job.tokenizer))
        self.contender = seam.Contender(
            seam.ContenderOptions(
                model=job.model,
                resolution=job.case.resolution,
                precision=job.case.precision,
                batch_size=job.case.batch_size,
                device=job.device,
                compile=job.compile,
                keep_ratio=job.keep_ratio,
                memory_budget=job.memory_budget,
                tokenizer=job.tokenizer,
                context_length=job.context_length,
                patch_dropout=job.patch_dropout,
                fusion=job.fusion,
                grad_checkpointing=job.grad_checkpointing,
            )
        )
        if self.words.size > self.contender.vocabulary:
            raise UserError(
                f"{job.model}: a vocabulary of {self.contender.vocabulary:,}, and captions are drawn from the "
                f"{self.words.size:,} of {job.words_of}: give all of them one, by --tokenizer"
            )
        self._pool: list[tuple[Tensor, Tensor]] = []
        self._timed = 0

    def about(self) -> dict[str, Any]:
        return {"image_flops": self.contender.image_flops(self.job.lengths.mean_targets)}

    def peak(self) -> dict[str, Any]:
        flops = measured_peak(self.device, self.job.case.precision).flops
        return {"flops": flops, "machine": machine_facts(self.job.device)}

    def memory(self) -> dict[str, Any]:
        pairs = self._pairs(1, self.job.case.batch_size)
        found = {"step_bytes": self._step_bytes(pairs), "fixed_bytes": self._fixed()}
        self._yield()
        return found

    def time(self, steps: int) -> dict[str, Any]:
        """The first time all batches of the pool go before, which compiles what is to be compiled, then one does."""
        if not self._pool:
            self._pool = self._pairs(POOL, self.job.case.batch_size)
        self.contender.run(self._pool[:1] if self._timed else self._pool)
        pairs = [self._pool[(self._timed + index) % POOL] for index in range(steps)]
        self._timed += steps
        self._wait()
        begin, worked = time.perf_counter(), time.process_time()
        self.contender.run(pairs)
        self._wait()
        found = {
            "step_s": (time.perf_counter() - begin) / steps,
            "cpu_s": (time.process_time() - worked) / steps,
        }
        self._yield()
        return found

    def fits(self, batch_size: int) -> dict[str, Any]:
        """Whether two steps run; on a CPU, whether a step stays below the limit by its allocator's count."""
        pairs = self._pairs(1, batch_size)
        if self.device.type == "cuda":
            self.contender.run([*pairs, *pairs])
            self._wait()
            return {"fits": True}
        assert self.job.memory_limit_gb is not None
        used = self._step_bytes(pairs) + self._fixed()
        return {"fits": used <= self.job.memory_limit_gb * GB}

    def _pairs(self, count: int, batch_size: int) -> list[tuple[Tensor, Tensor]]:
        job, context = self.job, self.contender.context_length
        pairs = [
            self.contender.loaded(
                *synthetic_batch(batch_size, job.case.resolution, context, job.lengths, self.words, seed)
            )
            for seed in range(count)
        ]
        pinned = self.device.type == "cuda"  # as the loaders of both do there
        return [(images.pin_memory(), texts.pin_memory()) for images, texts in pairs] if pinned else pairs

    def _step_bytes(self, pairs: Sequence[tuple[Tensor, Tensor]]) -> int:
        self.contender.run(pairs)
        gc.collect()
        return step_bytes(lambda: self.contender.run(pairs), self.contender.optimizer, self.device)

    def _fixed(self) -> int:
        return fixed_bytes(self.contender.model, self.contender.optimizer)

    def _yield(self) -> None:
        """The others' turn: what the allocator keeps for later goes back to the GPU."""
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def job_from(text: str) -> Job:
    plain = json.loads(text)
    return Job(**{**plain, "case": Case(**plain["case"]), "lengths": CaptionLengths(**plain["lengths"])})


def answer(worker: Worker, question: Sequence[Any]) -> dict[str, Any]:
    name, *values = question
    known: dict[str, Callable[..., dict[str, Any]]] = {
        "peak": worker.peak,
        "memory": worker.memory,
        "time": worker.time,
        "fits": worker.fits,
    }
    return known[name](*values)


def main() -> None:
    """Stdout is the line to the other side; whatever a library prints goes to stderr."""
    replies = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)

    def reply(value: dict[str, Any]) -> None:
        replies.write(json.dumps(value) + "\n")

    try:
        seam.add_models(OWN_MODELS)
        worker = Worker(job_from(sys.stdin.readline()))
        reply(worker.about())
        for line in sys.stdin:
            reply(answer(worker, json.loads(line)))
    except UserError as error:
        reply({"error": str(error)})
    except (torch.cuda.OutOfMemoryError, MemoryError):
        reply({"out_of_memory": True})
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # the CPU allocator's words
            raise
        reply({"out_of_memory": True})


if __name__ == "__main__":
    main()
