"""The model card: what the run's own files say of the model, and how to use the format at hand."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.target import Target

# What the card tells of a stage's configuration, by the names that run.json has.
_RECIPE = {
    "force_image_size": "resolution", "samples": "samples", "global_batch": "global batch", "lr": "peak lr",
    "wd": "weight decay", "keep_ratio": "keep ratio", "precision": "precision",
}  # fmt: skip
_TEMPLATE = """\
---
{{ card_data }}
---

# {{ title }}

A vision encoder pre-trained with a caption loss only, as OpenVision 2
([arXiv 2509.01644](https://arxiv.org/abs/2509.01644)), by open_clip_ov2.

| encoder | |
|---|---|
| model | {{ facts.model or "not recorded" }} |
| width / layers / heads / MLP | {{ [encoder.width, encoder.layers, encoder.heads, encoder.mlp_width] | join(" / ") }} |
| parameters | {{ "{:,}".format(parameters) }} |
| image | {{ image_size }} px, patches of {{ encoder.patch_size }} px, {{ encoder.num_tokens }} tokens |
| preprocessing | {{ pre.interpolation }}, {{ resize }}, mean {{ pre.mean }}, std {{ pre.std }} |

## Use
```python
{{ example }}
```

## Training
{% if facts.stages -%}
Data: {{ data }}. Samples seen: {{ seen }}.

| stage | {{ columns | join(" | ") }} |
|---{{ "|---" * columns | length }}|
{% for row in rows -%}
| {{ loop.index }} | {{ row | join(" | ") }} |
{% endfor -%}
{% if versions %}
Versions: {{ versions }}.
{% endif -%}
{% else -%}
No run is recorded beside this model.
{% endif %}
{%- if facts.metrics %}
## Held-out metrics
| | |
|---|---|
{% for name, value in facts.metrics.items() -%}
| {{ name.replace("_", " ") }} | {{ "%.4g" | format(value) }} |
{% endfor -%}
{% endif %}
## License
{{ license or "Whoever wrote this card did not state a license." }}

"""


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
    file = folder / "run.json"
    about = read_json(file, dict) if file.is_file() else {}
    stages = list(about.get("config", {}).get("stages", []))
    last = len(stages) if stage is None else stage
    seen, metrics = _results(folder / "results.jsonl", last, samples)
    return RunFacts(stages[:last], seen, metrics, about.get("versions", {}))


def _results(path: Path, stage: int, until: int | None) -> tuple[int | None, dict[str, float]]:
    """(samples seen, the last validation's metrics) of the records up to a stage and a number of samples."""
    samples: int | None = None
    metrics: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the incomplete last line of a run that was killed
            continue
        if record.get("stage", 1) > stage or (until is not None and record["samples_seen"] > until):
            continue
        samples = max(samples or 0, record["samples_seen"])
        if record["kind"] == "val":
            skipped = ("samples_seen", "stage", "time", "epoch")
            metrics = {k: v for k, v in record.items() if isinstance(v, (int, float)) and k not in skipped}
    return samples if until is None else until, metrics


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
    return ModelCard.from_template(
        _metadata(title, target, facts, license),
        template_str=_TEMPLATE,
        title=title,
        encoder=encoder,
        parameters=sum(tensor.numel() for tensor in encoder.state.values()),
        pre=encoder.preprocessing,
        resize="to the image size" if encoder.preprocessing.resize_mode == "squash" else "short side, center crop",
        example=target.example_for(location),
        facts=facts,
        versions=", ".join(f"{name} {version}" for name, version in facts.versions.items()),
        image_size=" x ".join(map(str, encoder.image_size)),
        data=dataset or _shard_names(facts.stages),
        seen="not recorded" if facts.samples_seen is None else f"{facts.samples_seen:,}",
        columns=[_RECIPE[key] for key in columns],
        rows=[[_recipe_value(stage, key) for key in columns] for stage in facts.stages],
    )


def _metadata(title: str, target: Target, facts: RunFacts, license: str | None) -> ModelCardData:
    """The front matter that the hub reads."""
    return ModelCardData(
        library_name=target.library,
        pipeline_tag="image-feature-extraction",
        license=license,
        tags=["openvision2", "vision-encoder"],
        model_name=title,
        eval_results=[
            EvalResult("image-to-text", "held-out", "Held-out images with captions", name, value)
            for name, value in facts.metrics.items()
            if name != "num_samples"
        ] or None,
    )  # fmt: skip


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
