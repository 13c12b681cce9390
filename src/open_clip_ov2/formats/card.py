"""The model card: what the run's own files say of the model, and how to use the format at hand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, read_json_lines
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.target import Target

# What the card tells of a stage's configuration, by the names that run.json has.
_RECIPE = {
    "force_image_size": "resolution", "samples": "samples", "global_batch": "global batch", "lr": "peak lr",
    "wd": "weight decay", "keep_ratio": "keep ratio", "precision": "precision",
}  # fmt: skip
_TEMPLATE = Path(__file__).with_name("card.md.jinja")


@dataclass(frozen=True)
class RunFacts:
    """What a run's folder says, empty where there is no run. `stages` are run.json's, up to the checkpoint's."""

    stages: Sequence[Mapping[str, Any]] = ()
    samples_seen: int | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def model(self) -> str | None:
        return self.stages[0].get("model") if self.stages else None


def run_facts(folder: Path, stage: int | None = None, samples: int | None = None) -> RunFacts:
    """From run.json and results.jsonl, up to a stage's end or a number of samples in it. Raises UserError."""
    file, results = folder / "run.json", folder / "results.jsonl"
    about = read_json(file, dict) if file.is_file() else {}
    stages = list(about.get("config", {}).get("stages", []))
    last = len(stages) if stage is None else stage
    records = [
        record
        for record in (read_json_lines(results) if results.is_file() else ())
        if record.get("stage", 1) <= last and (samples is None or record["samples_seen"] <= samples)
    ]
    if samples is None:
        samples = max((record["samples_seen"] for record in records), default=None)
    validation: dict[str, Any] = next((record for record in reversed(records) if record["kind"] == "val"), {})
    others = ("samples_seen", "stage", "time", "epoch")
    metrics = {k: v for k, v in validation.items() if isinstance(v, (int, float)) and k not in others}
    return RunFacts(stages[:last], samples, metrics, about.get("versions", {}))


def card(
    title: str,
    location: str,
    target: Target,
    encoder: Encoder,
    facts: RunFacts,
    *,
    license: str | None = None,
    dataset: str | None = None,
) -> ModelCard:
    """`location` is what a user loads: ORG/NAME on the hub, or a folder. Raises UserError."""
    for flag, value in (("--license", license), ("--dataset", dataset)):
        if value is not None and ("\n" in value or not value.strip()):
            raise UserError(f"{flag} {value!r}: expected one line of text")
    columns = [key for key in _RECIPE if any(_recipe_value(stage, key) for stage in facts.stages)]
    results = [
        EvalResult("image-to-text", "held-out", "Held-out images with captions", name, value)
        for name, value in facts.metrics.items()
        if name != "num_samples"
    ]
    about = ModelCardData(  # the front matter, which the hub reads
        library_name=target.library,
        pipeline_tag="image-feature-extraction",
        license=license,
        tags=["openvision2", "vision-encoder"],
        model_name=title,
        eval_results=results or None,
    )
    return ModelCard.from_template(
        about,
        template_path=str(_TEMPLATE),
        title=title,
        encoder=encoder,
        parameters=sum(tensor.numel() for tensor in encoder.state.values()),
        example=target.example_for(location),
        facts=facts,
        data=dataset or _shard_names(facts.stages),
        columns=[_RECIPE[key] for key in columns],
        rows=[[_recipe_value(stage, key) for key in columns] for stage in facts.stages],
    )


def _recipe_value(stage: Mapping[str, Any], key: str) -> str:
    """A cell of the table of stages, empty for a value that the stage does not have."""
    if key == "samples":
        samples, epochs = stage.get("train_num_samples"), stage.get("epochs")
        return f"{samples * epochs:,}" if samples and epochs else ""
    value = stage.get(key)
    if isinstance(value, list):
        return " x ".join(str(side) for side in value)
    return "" if value is None else f"{value:,}" if key == "global_batch" else str(value)


def _shard_names(stages: Sequence[Mapping[str, Any]]) -> str:
    """Names of the shards, without their folders, which are private."""
    sources = [source for stage in stages for source in str(stage.get("train_data") or "").split("::")]
    names = dict.fromkeys(source.rstrip("/").rsplit("/", 1)[-1] for source in sources)
    return ", ".join(f"`{name}`" for name in names if name) or "not recorded"
