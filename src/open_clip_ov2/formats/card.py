"""The model card: what the run's own files say of it, and how to use the format at hand."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.encoder import Encoder

_LIBRARY = {
    "hf": "transformers", "llava": "transformers", "timm": "timm", "open-clip": "open_clip", "ov2": "open_clip",
    "released": "open_clip", "onnx": "onnx",
}  # fmt: skip
_USE = {
    "hf": """from transformers import AutoImageProcessor, AutoModel

processor, model = AutoImageProcessor.from_pretrained("{name}"), AutoModel.from_pretrained("{name}")
out = model(**processor(image, return_tensors="pt"), output_hidden_states=True)
tokens = out.hidden_states[-1][:, 1:]  # patch tokens before the final norm""",
    "llava": """from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("{name}")
model = LlavaForConditionalGeneration.from_pretrained("{name}")  # the projector is untrained""",
    "timm": """import timm

model = timm.create_model("{schema}{name}", pretrained=True)
tokens = model.forward_features(images)[:, 1:]  # patch tokens before the final norm""",
    "open-clip": """import open_clip

model, preprocess = open_clip.create_model_from_pretrained("{schema}{name}")
out = model.visual.forward_intermediates(images, indices=1, output_fmt="NLC")
tokens = out["image_intermediates"][0]  # patch tokens before the final norm; the text tower is a stub""",
    "ov2": """import open_clip, open_clip_ov2

model, preprocess = open_clip.create_model_from_pretrained("{schema}{name}")
tokens = model.encode_image_tokens(images)  # patch tokens before the final norm
ids = model.generate(images)""",
    "released": """import open_clip, open_clip_ov2

model, preprocess = open_clip.create_model_from_pretrained("{schema}{name}")
tokens = model.encode_image_tokens(images)  # patch tokens before the final norm""",
    "onnx": """import onnxruntime

session = onnxruntime.InferenceSession("encoder.onnx")
tokens, pooled = session.run(["tokens", "pooled"], {{"images": images}})""",
}
# Of a stage's configuration, what a reader of the card wants; by the names that run.json has.
_RECIPE = {
    "force_image_size": "resolution", "samples": "samples", "global_batch": "global batch", "lr": "peak lr",
    "wd": "weight decay", "keep_ratio": "keep ratio", "precision": "precision",
}  # fmt: skip


@dataclass(frozen=True)
class RunFacts:
    """Of a run's folder; empty where there is no run behind a model. `stages` are run.json's, as far as reached."""

    model: str | None
    stages: Sequence[Mapping[str, Any]]
    samples_seen: int | None
    metrics: Mapping[str, float]
    versions: Mapping[str, str]


def run_facts(folder: Path, checkpoint: Path) -> RunFacts:
    """From run.json and results.jsonl, up to the checkpoint. Raises UserError for files that cannot be read."""
    about = _read(folder / "run.json")
    stages = list(about.get("config", {}).get("stages", []))
    name = re.fullmatch(r"stage_(\d+)(?:_samples_(\d+))?\.pt", checkpoint.name)
    last = int(name[1]) if name else len(stages)
    until = int(name[2]) if name and name[2] else None
    samples_seen, metrics = _results(folder / "results.jsonl", last, until)
    return RunFacts(
        model=stages[0].get("model") if stages else None,
        stages=stages[:last],
        samples_seen=samples_seen,
        metrics=metrics,
        versions=about.get("versions", {}),
    )


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from error


def _results(path: Path, stage: int, until: int | None) -> tuple[int | None, dict[str, float]]:
    """(samples seen, the last validation's figures) of the records up to a stage and a number of samples."""
    samples: int | None = None
    metrics: dict[str, float] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            record = json.loads(line)
        except ValueError:  # the torn last line of a killed run
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
    target: str,
    encoder: Encoder,
    facts: RunFacts,
    *,
    licence: str | None = None,
    dataset: str | None = None,
) -> str:
    """Markdown with the hub's front matter. `location`: what a user loads, ORG/NAME on the hub, or a folder."""
    for flag, value in (("--licence", licence), ("--dataset", dataset)):
        if value is not None and ("\n" in value or not value.strip()):
            raise UserError(f"{flag} {value!r}: one line, and not an empty one")
    schema = "hf-hub:" if "/" in location else "local-dir:"
    sections = [
        _front_matter(target, licence),
        f"# {title}\n",
        "A vision encoder pre-trained with a caption loss alone, as OpenVision 2 "
        "([arXiv 2509.01644](https://arxiv.org/abs/2509.01644)), by open_clip_ov2.\n",
        _encoder_table(encoder, facts),
        f"## Use\n```python\n{_USE[target].format(name=location, schema=schema)}\n```\n",
        _training(facts, dataset),
        _metrics(facts),
        f"## Licence\n{licence or 'Not stated by whoever wrote this card.'}\n",
    ]
    return "\n".join(section for section in sections if section)


def _front_matter(target: str, licence: str | None) -> str:
    lines = ["---", f"library_name: {_LIBRARY[target]}", "pipeline_tag: image-feature-extraction"]
    if licence:
        lines.append(f"license: {json.dumps(licence)}")
    return "\n".join([*lines, "tags:", "- openvision2", "- vision-encoder", "---", ""])


def _encoder_table(encoder: Encoder, facts: RunFacts) -> str:
    pre, (rows, columns) = encoder.preprocessing, encoder.image_size
    parameters = sum(tensor.numel() for tensor in encoder.state.values())
    sizes = f"{encoder.width} / {encoder.layers} / {encoder.heads} / {encoder.mlp_width}"
    resize = "to the image size" if pre.resize_mode == "squash" else "short side, centre crop"
    lines = [
        "| encoder | |", "|---|---|",
        f"| model | {facts.model or 'not recorded'} |",
        f"| width / layers / heads / MLP | {sizes} |",
        f"| parameters | {parameters:,} |",
        f"| image | {rows} x {columns} px, patches of {encoder.patch_size} px, {encoder.num_tokens} tokens |",
        f"| preprocessing | {pre.interpolation}, {resize}, mean {pre.mean}, std {pre.std} |",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _training(facts: RunFacts, dataset: str | None) -> str:
    if not facts.stages:
        return "## Training\nNo run is recorded beside this model.\n"
    seen = f"{facts.samples_seen:,}" if facts.samples_seen is not None else "not recorded"
    lines = ["## Training", f"Data: {dataset or _shard_names(facts.stages)}. Samples seen: {seen}.", ""]
    columns = [key for key in _RECIPE if any(_recipe_value(stage, key) is not None for stage in facts.stages)]
    lines += ["| stage | " + " | ".join(_RECIPE[key] for key in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for number, stage in enumerate(facts.stages, 1):
        values = [_recipe_value(stage, key) for key in columns]
        lines.append(f"| {number} | " + " | ".join("" if value is None else str(value) for value in values) + " |")
    if facts.versions:
        lines += ["", "Versions: " + ", ".join(f"{key} {value}" for key, value in facts.versions.items()) + "."]
    return "\n".join(lines) + "\n"


def _recipe_value(stage: Mapping[str, Any], key: str) -> Any:
    if key == "samples":
        samples, epochs = stage.get("train_num_samples"), stage.get("epochs")
        return f"{samples * epochs:,}" if samples and epochs else None
    value = stage.get(key)
    if isinstance(value, list):
        return " x ".join(str(side) for side in value)
    return f"{value:,}" if key == "global_batch" and isinstance(value, int) else value


def _shard_names(stages: Sequence[Mapping[str, Any]]) -> str:
    """File names alone: where they lie is nobody's business."""
    names: list[str] = []
    for stage in stages:
        for source in str(stage.get("train_data") or "").split("::"):
            name = source.rstrip("/").rsplit("/", 1)[-1]
            if name and name not in names:
                names.append(name)
    return ", ".join(f"`{name}`" for name in names) or "not recorded"


def _metrics(facts: RunFacts) -> str:
    if not facts.metrics:
        return ""
    rows = [f"| {key.replace('_', ' ')} | {value:.4g} |" for key, value in facts.metrics.items()]
    return "\n".join(["## Held-out figures", "| | |", "|---|---|", *rows]) + "\n"
