"""A recipe of `ov2 vlm train` as frozen data: what model is made, and what each stage trains on which data.

The recipes of the package are in `recipes/`, with the source of every number. Durations are in epochs of the data. Chat
templates, in `templates/`, have generation marks as transformers reads them: what is between the marks is trained on.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.tables import each, from_table, kebab, key, one_of, read_toml, real, switch, table, text, whole

FOLDER = Path(__file__).parent / "recipes"
TEMPLATES = Path(__file__).parent / "templates"
LLAVA, LLAVA_NEXT = "llava", "llava-next"
# Tokens that a template needs beyond the tokenizer's begin and end of text; the first ends a turn.
TOKENS = {
    "llama-3": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "chatml": ("<|im_end|>", "<|im_start|>"),
}
MLP, LINEAR = "mlp", "linear"
TOWER, PROJECTOR, LANGUAGE_MODEL = "tower", "projector", "language-model"
PARTS = (TOWER, PROJECTOR, LANGUAGE_MODEL)
DATA = ("align", "knowledge", "tune")  # the stages' data sets, each with flags --NAME-data and --NAME-images


def layer(value: Any) -> int:
    """Of transformers' `vision_feature_layer`."""
    if not re.fullmatch(r"-[1-9]\d*", str(value)):
        raise UserError(f"{value!r}: expected an integer <= -1 (-1: the last block, -2: the one before)")
    return int(value)


def _cells(value: Any) -> tuple[int, int]:
    """[rows, columns] of an any-resolution grid."""
    cells = each(whole(1))(value)
    if len(cells) != 2:
        raise UserError(f"{value!r}: expected [rows, columns]")
    return cells[0], cells[1]


def _names(folder: Path) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in folder.glob("*.*")))


@dataclass(frozen=True)
class VlmStage:
    """One stage. `samples`: how many its published data has, for plans without the data. `max_length`: tokens of a
    conversation, those of its pictures included. `pad`: make pictures square by padding with the mean color (else the
    center is cropped). `group_by_length`: put conversations of similar length into a batch.
    """

    data: str = key(one_of(*DATA), example='"tune"')
    trains: tuple[str, ...] = key(each(one_of(*PARTS)), example='["projector"]')
    template: str = key(text, example='"vicuna-v1"')
    global_batch: int = key(whole(1), example="128")
    lr: float = key(real(0, above=True), example="2e-5")
    max_length: int = key(whole(8), example="2048")
    samples: int | None = key(whole(1), default=None)
    tower_lr: float | None = key(real(0, above=True), default=None)
    warmup_ratio: float = key(real(0, 1), default=0.0)
    schedule: str = key(one_of("cosine", "linear", "constant"), default="cosine")
    weight_decay: float = key(real(0), default=0.0)
    grad_clip_norm: float = key(real(0, above=True), default=1.0)  # the default of transformers' Trainer
    epochs: int = key(whole(1), default=1)
    pad: bool = key(switch, default=False)
    group_by_length: bool = key(switch, default=False)

    def __post_init__(self) -> None:
        if not self.trains:
            raise UserError(f"trains is empty; name at least one of {', '.join(PARTS)}")
        if self.tower_lr is not None and TOWER not in self.trains:
            raise UserError('tower-lr is given, but "tower" is not in trains')
        if self.template not in _names(TEMPLATES):
            raise unknown_key("template", self.template, _names(TEMPLATES), "template")

    def steps(self, samples: int) -> int:
        """Optimizer steps over so many samples; the last batch of an epoch may be smaller."""
        return math.ceil(samples / self.global_batch) * self.epochs

    @property
    def summary(self) -> str:
        rates = f"lr {self.lr:g}" + (f", tower {self.tower_lr:g}" if self.tower_lr else "")
        return f"{self.data}: {' and '.join(self.trains)}, batch {self.global_batch:,}, {rates}"


def _stages(value: Any) -> tuple[VlmStage, ...]:
    return tuple(from_table(VlmStage, f"stage {number}", one) for number, one in enumerate(each(table)(value), 1))


@dataclass(frozen=True)
class VlmRecipe:
    """`feature_layer`: transformers' `vision_feature_layer`. `grids`: rows and columns of llava-next's any-resolution
    grids, in images of the encoder. `system`: the sentence before a conversation (empty: none)."""

    kind: str = key(one_of(LLAVA, LLAVA_NEXT), example='"llava"')
    feature_layer: int = key(layer, example="-2")
    stages: tuple[VlmStage, ...] = key(_stages, name="stage", default=())
    projector: str = key(one_of(MLP, LINEAR), default=MLP)
    grids: tuple[tuple[int, int], ...] = key(each(_cells), default=())
    language_model: str | None = key(text, default=None)
    image_size: int | None = key(whole(1), default=None)
    system: str = key(str, default="")

    def __post_init__(self) -> None:
        if not self.stages:
            raise UserError("no stage; a recipe has at least one [[stage]]")
        if (self.kind == LLAVA_NEXT) != bool(self.grids):
            raise UserError(f"grids are for kind {LLAVA_NEXT}, which needs them; this one is of kind {self.kind}")

    @property
    def chat_template(self) -> str:
        """The template that the finished model answers with: the last stage's."""
        return self.stages[-1].template


def known_recipes() -> tuple[str, ...]:
    return _names(FOLDER)


def load_vlm_recipe(name: str, template: str | None = None, **changes: Any) -> VlmRecipe:
    """A recipe of the package by its name, or of a TOML file. `changes` replace its keys; one that is None does not.
    `template` is that of all stages but those with `plain`. Raises UserError."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise unknown_key("--recipe", name, known_recipes(), "recipe")
    given = {field: value for field, value in changes.items() if value is not None}
    content = {kebab(field): value for field, value in {**read_toml(path), **given}.items()}
    stages = content.get("stage")
    for stage in stages if template is not None and isinstance(stages, list) else []:
        if isinstance(stage, dict) and stage.get("template") != "plain":
            stage["template"] = template
    return from_table(VlmRecipe, str(path), content)


def chat_template(name: str, system: str) -> str:
    """The template's text, with a sentence that stands before every conversation that brings none."""
    head = f"{{%- set system = {json.dumps(system)} -%}}\n"
    content = (TEMPLATES / "parts" / "content.jinja").read_text(encoding="utf-8")
    return head + content + (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def check_template(name: str, tokenizer: Any) -> None:
    """Raises UserError if the language model does not know the template's tokens, and would read them as letters."""
    missing = [token for token in TOKENS.get(name, ()) if token not in tokenizer.get_vocab()]
    if name == "vicuna-v1" and tokenizer.eos_token is None:
        missing = ["an end of text"]
    if missing:
        raise UserError(
            f"the template {name} needs {', '.join(missing)}, which the language model's tokenizer lacks; name the "
            "template that fits it (--template)"
        )


def end_of_turn(name: str, tokenizer: Any) -> str:
    """The token after which generation stops."""
    return TOKENS[name][0] if name in TOKENS else str(tokenizer.eos_token)
