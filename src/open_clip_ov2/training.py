"""The Python API, and the only door to OpenCLIP for commands, `launch` and `compare`.

```python
import open_clip_ov2 as ov2

run = ov2.train({"model": "ov2-vit-nano-8", "train_data": "shards/{000..099}.tar", "train_num_samples": 50_000})
model = ov2.open_model(run).model
```

Flags are those of the `ov2` commands: a list as on the command line, or a mapping from names to values.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from open_clip_ov2.argv import to_argv, without
from open_clip_ov2.data.skips import SkipCounter
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.eval_job import EvalJob
from open_clip_ov2.evaluate.eval_model import EvalModel, lacking
from open_clip_ov2.evaluate.evaluation import check_writable, run_tasks
from open_clip_ov2.evaluate.options import CaptionOptions, EvalOptions, check_files, options_of, read_options
from open_clip_ov2.evaluate.pictures import Picture, captions_of
from open_clip_ov2.evaluate.tasks import check_task_names
from open_clip_ov2.openclip.command.parse import help_text as train_help
from open_clip_ov2.openclip.command.parse import parse
from open_clip_ov2.openclip.eval_processes import default_device, processes
from open_clip_ov2.openclip.models import conversion, exports, shipped
from open_clip_ov2.openclip.models import open_model as opening
from open_clip_ov2.openclip.models.factory import is_ov2_model
from open_clip_ov2.openclip.models.model_facts import ModelFacts, model_facts
from open_clip_ov2.openclip.models.open_evaluated import open_eval_model
from open_clip_ov2.openclip.run.data_parts import train_loaders
from open_clip_ov2.openclip.run.dry_run import check_run
from open_clip_ov2.openclip.run.stage_costs import plan_costs
from open_clip_ov2.openclip.version import check_can_train
from open_clip_ov2.recipe.costs import Checked, Machine, Plan

if TYPE_CHECKING:
    from open_clip_ov2.openclip.run.bench_model import BenchModel

__all__ = [
    "PlannedRun", "bench_model", "caption", "check", "check_evaluation", "convert", "default_device", "evaluate",
    "export", "is_lost_peer", "is_ov2_model", "load", "open_captioner", "open_model", "plan", "planned_run", "push",
    "registered_facts", "shipped_model", "train", "train_help", "train_loaders",
]  # fmt: skip
Flags = Sequence[str] | Mapping[str, Any]


def as_argv(flags: Flags) -> list[str]:
    """`["--lr", "0.001"]` from `{"lr": 1e-3}`; a list stays as it is. A list under "stage" is one --stage for each."""
    return to_argv(flags) if isinstance(flags, Mapping) else list(flags)


def _to_train(flags: Flags) -> list[str]:
    """Flags of `ov2 train` as argv. Raises UserError where OpenCLIP is one that cannot train here."""
    check_can_train()
    return as_argv(flags)


def train(flags: Flags) -> Path:
    """Train as `ov2 train` does; the same flags resume a run that was stopped. Returns the run's folder.

    ```python
    run = train(["--model", "ov2-vit-l-14", "--train-data", "shards/{000..099}.tar", "--epochs", "1"])
    ```

    Call it on every process of a distributed run. Raises UserError (a mistake in the flags or the data), RunFailed (the
    run cannot continue) and Interrupted (a signal asked it to stop; everything is saved).
    """
    from open_clip_ov2.openclip.run.runner import train as run

    return run(_to_train(flags))


def open_model(source: str | Path, device: str = "cpu", **options: Any) -> opening.LoadedModel:
    """A trained or released model in evaluation mode, with its `preprocess` and `tokenizer`. Raises UserError.

    ```python
    model = open_model("logs/RUN").model
    ```

    `source` is a run's folder, a checkpoint, an exported folder, `hf-hub:NAME`, or `NAME:PRETRAINED` of OpenCLIP's
    registry; `options` are `image_size` and `position_table`.
    """
    return opening.open_model(source, device, **options)


def evaluate(
    model: str | Path,
    *,
    data: str,
    tasks: str | Sequence[str] = "all",
    device: str | None = None,
    out: str | Path | None = None,
    say: Callable[[str], None] | None = None,
    done: Callable[[str, dict[str, Any]], None] | None = None,
    **flags: Any,
) -> dict[str, Any]:
    """Evaluate a model as `ov2 eval` does: results by task, as its file has them (docs/evaluation.md).

    ```python
    results = evaluate("logs/RUN", tasks=["caption-loss", "knn"], data="val.tar", train_data="train.tar")
    results["knn"]["top1"]
    ```

    `model` as `source` of `open_model`; `flags` are those of `ov2 eval` by name; `out`, `say` and `done` are those of
    `run_tasks`. Call it on every process of a distributed evaluation. Raises UserError.
    """
    options = read_options(EvalOptions, "evaluation", {"data": data, "tasks": tasks, **flags})
    check_task_names(options.tasks)
    if out is not None:
        check_writable(Path(out))
    with processes(device) as (own_device, world_size):
        aspect, tokens = options.aspect, options.max_tokens
        opened = open_eval_model(str(model), own_device, world_size, aspect=aspect, max_tokens=tokens)
        check_files(options)
        job = EvalJob(opened, options)
        try:
            return run_tasks(job, out=None if out is None else Path(out), say=say, done=done)
        except ValueError as error:  # the model's own, of an option out of its range
            raise UserError(str(error)) from error


def check_evaluation(argv: Sequence[str]) -> None:
    """Raises UserError for flags that `ov2 eval` would refuse, and for a task that does not exist."""
    options = without(argv, ["--device"])  # which is the command's own
    check_task_names(options_of(shlex.join(options), "the flags").tasks)


def caption(
    model: str | Path,
    images: Iterable[str | Path | Picture],
    *,
    device: str | None = None,
    skips: SkipCounter | None = None,
    **flags: Any,
) -> Iterator[tuple[Picture, str]]:
    """Caption images as `ov2 caption` does, a batch at a time: each image with its generated caption.

    ```python
    for picture, text in caption("logs/RUN", ["cat.jpg", "folder", "val.tar"], generation_type="beam_search"):
        print(picture.name, text)
    ```

    `images` are paths as `ov2 caption` takes them, or `Picture`s; `flags` are its flags for generation by name, and
    those that rank captions (`num_captions`, `draws`, `log_likelihood`) fill `picture.generated`. An image that cannot
    be used is left out, logged and counted in `skips`. Raises UserError.
    """
    options = read_options(CaptionOptions, "captions", flags)
    opened = open_eval_model(str(model), default_device(device), aspect=options.aspect, max_tokens=options.max_tokens)
    return captions_of(opened, images, options, skips)


def open_captioner(model: str, device: str | None, flag: str) -> EvalModel:
    """A model that captions, in float32 behind the interface of evaluations. Raises UserError; `flag` has named it."""
    opened = open_eval_model(model, default_device(device))
    if problem := lacking(model, opened.abilities, ("caption",)):
        raise UserError(f"{flag}: {problem}")
    return opened


def shipped_model() -> str:
    """The name of the model that this package holds. Raises UserError if the weights are not in this installation."""
    name = ":".join(shipped.SHIPPED[0])
    if shipped.shipped_folder(name) is None:
        raise UserError(f"this installation lacks the weights of {name}: name another model, a run or a folder")
    return name


def plan(flags: Flags, gpus: int = 1, *, mean_caption_tokens: float | None = None, **machine: Any) -> Plan:
    """What `ov2 train` with these flags will do and cost on so many GPUs: tokens, steps, FLOPs, memory, hours. Needs no
    data and no GPU. Raises UserError.

    ```python
    plan({"recipe": "configs/openvision2-patch14.toml", "model": "ov2-vit-l-14"}, gpus=64).hours
    ```

    `mean_caption_tokens` are real tokens of a caption, end of text included (default: the context length); `machine`
    takes `tflops`, `memory_gb` and `images_per_second` of one GPU, and `mfu`.
    """
    parsed = parse(_to_train(flags), world_size=gpus, gpu=True, needs_data=False)
    return plan_costs(parsed, Machine(gpus, **machine), mean_caption_tokens)


def registered_facts(model: str, image_size: int | None = None) -> ModelFacts | None:
    """Sizes of a model of OpenCLIP's registry, which is not loaded; None if there is none of this name, or if it is not
    made of plain transformers."""
    try:
        return model_facts(model, resolution=image_size)
    except UserError:
        return None


def check(flags: Flags, world_size: int = 1, gpus: bool = True, gpu_memory_gb: float | None = None) -> Checked:
    """Check flags, recipe, data and model without training; with `gpu_memory_gb` also whether a batch fits. Raises
    UserError.

    ```python
    check({"recipe": "run.toml", "train_data": "shards/{000..099}.tar"}, world_size=64, gpu_memory_gb=80).parameters
    ```
    """
    argv = _to_train(flags)
    if set(argv) & {"-h", "--help"}:
        raise UserError("after `--` come the flags of `ov2 train` (`ov2 train --help` lists them)")
    return check_run(argv, world_size, gpus, gpu_memory_gb)


def export(source: str | Path, to: str, out: str | Path | None = None, **options: Any) -> tuple[Path, list[str]]:
    """Write a trained encoder in the format of another library, as `ov2 export` does. Raises UserError.

    ```python
    folder, notes = export("logs/RUN", to="hf", out="encoder")
    ```

    `source` as for `open_model`; `options` are the other flags of `ov2 export`, such as `image_size`.
    """
    return exports.export(str(source), to, None if out is None else Path(out), **options)


def push(source: str | Path, repository: str, to: str = "ov2", **options: Any) -> list[str]:
    """Upload a model to ORG/NAME on the Hugging Face hub, as `ov2 push` does. Returns notes. Raises UserError."""
    return exports.push(str(source), repository, to, **options)


def convert(source: str | Path, to: Path, **options: Any) -> list[str]:
    """Convert checkpoints of the authors and back, as `ov2 convert` does. Returns notes. Raises UserError."""
    return conversion.convert(str(source), to, **options)


def load() -> None:
    """Import what training needs (seconds), so that `train` is at its own signal handlers at once."""
    import open_clip_ov2.openclip.run.runner  # noqa: F401


def is_lost_peer(error: BaseException) -> bool:
    """Whether an exception says no more than that another rank is gone."""
    import torch.distributed as dist

    kinds = (dist.DistBackendError, dist.DistNetworkError, dist.DistStoreError, ConnectionError)
    # gloo's messages (a plain RuntimeError) when a peer has ended, or does not come.
    messages = (
        "Connection closed by peer", "Connection reset by peer", "Socket closed", "Broken pipe", "Connection refused",
        "Timed out waiting", "Gloo connectFullMesh failed", "Read timeout",
    )  # fmt: skip
    is_gloo = isinstance(error, RuntimeError) and any(text in str(error) for text in messages)
    return is_gloo or isinstance(error, kinds)


# --- what `compare` measures ---------------------------------------------------------------------------


@dataclass(frozen=True)
class PlannedRun:
    """A run that `ov2 train` would make. Equal runs have one name, whoever asks for them.

    `flops`: forward and backward of one image with a full caption, by stage. `config`: what makes it this run.
    """

    name: str
    run_dir: Path
    flops: tuple[float, ...]
    config: Mapping[str, Any]


def planned_run(flags: Flags) -> PlannedRun:
    """Parse and check flags of `ov2 train` for one process, without looking at the data. Raises UserError."""
    plan = parse(_to_train(flags), world_size=1)
    flops = tuple(cost.flops_per_image for cost in plan_costs(plan, Machine()).stages)
    return PlannedRun(plan.name, plan.folder, flops, plan.config)


def bench_model(argv: Sequence[str], device: str, flags_of_ov2: Sequence[str], models: Path) -> BenchModel:
    """The model that `ov2 train ARGV` would train, with its optimizer and step, ready for batches.

    `flags_of_ov2` are added if it is an ov2 model; `models` is a folder of further configs. Raises UserError.
    """
    from open_clip_ov2.openclip.run import bench_model as bench

    bench.add_models(models)
    return bench.BenchModel(_to_train(argv), device, flags_of_ov2)
