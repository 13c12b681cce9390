"""A recipe of `ov2 vlm train` as frozen data: what model is made, and what each stage trains on which data.

The recipes of the package are in `recipes/`, with the source of every number. Durations are in epochs of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from open_clip_ov2.errors import UserError, unknown_key
from open_clip_ov2.tables import each, from_table, key, one_of, read_toml, real, switch, table, text, whole

FOLDER = Path(__file__).parent / "recipes"
TEMPLATES = Path(__file__).parent / "templates"
LLAVA, LLAVA_NEXT = "llava", "llava-next"
MLP, LINEAR = "mlp", "linear"
TOWER, PROJECTOR, LANGUAGE_MODEL = "tower", "projector", "language-model"
PARTS = (TOWER, PROJECTOR, LANGUAGE_MODEL)
DATA = ("align", "knowledge", "tune")  # the stages' data sets, each with flags --NAME-data and --NAME-images


def _layer(value: Any) -> int:
    """Of transformers' `vision_feature_layer`: -1 is the last block."""
    if isinstance(value, bool) or not isinstance(value, (int, str)) or not str(value).lstrip("-").isdigit():
        raise UserError(f"{value!r}: expected an integer <= -1")
    if int(value) > -1:
        raise UserError(f"{value}: expected an integer <= -1 (-1: the last block, -2: the one before)")
    return int(value)


def _cells(value: Any) -> tuple[int, int]:
    """[rows, columns] of an any-resolution grid."""
    cells = each(whole(1))(value)
    if len(cells) != 2:
        raise UserError(f"{value!r}: expected [rows, columns]")
    return cells[0], cells[1]


def template_names() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in TEMPLATES.glob("*.jinja")))


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
        if self.template not in template_names():
            raise unknown_key("template", self.template, template_names(), "template")

    def steps(self, samples: int) -> int:
        """Optimizer steps over so many samples; the last batch of an epoch may be smaller."""
        return math.ceil(samples / self.global_batch) * self.epochs

    @property
    def summary(self) -> str:
        rates = f"lr {self.lr:g}" + (f", tower {self.tower_lr:g}" if self.tower_lr else "")
        return f"{self.data}: {' and '.join(self.trains)}, batch {self.global_batch:,}, {rates}"


@dataclass(frozen=True)
class VlmRecipe:
    """`feature_layer`: transformers' `vision_feature_layer`. `grids`: rows and columns of llava-next's any-resolution
    grids, in images of the encoder. `system`: the sentence before a conversation (empty: none)."""

    kind: str = key(one_of(LLAVA, LLAVA_NEXT), example='"llava"')
    feature_layer: int = key(_layer, example="-2")
    stage: tuple[Mapping[str, Any], ...] = key(each(table), default=())
    projector: str = key(one_of(MLP, LINEAR), default=MLP)
    grids: tuple[tuple[int, int], ...] = key(each(_cells), default=())
    language_model: str | None = key(text, default=None)
    image_size: int | None = key(whole(1), default=None)
    system: str = key(str, default="")
    stages: tuple[VlmStage, ...] = ()

    def __post_init__(self) -> None:
        if (self.kind == LLAVA_NEXT) != bool(self.grids):
            raise UserError(f"grids are for kind {LLAVA_NEXT}, which needs them; this one is of kind {self.kind}")

    @property
    def chat_template(self) -> str:
        """The template that the finished model answers with: the last stage's."""
        return self.stages[-1].template


def known_recipes() -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in FOLDER.glob("*.toml")))


def load_vlm_recipe(name: str, **changes: Any) -> VlmRecipe:
    """A recipe of the package by its name, or of a TOML file. `changes` replace its keys; one that is None does not,
    and `template` is that of all stages but those with `plain`. Raises UserError."""
    path = Path(name) if name.endswith(".toml") else FOLDER / f"{name}.toml"
    if not path.is_file():
        raise unknown_key("--recipe", name, known_recipes(), "recipe")
    given = {field: value for field, value in changes.items() if value is not None}
    template = given.pop("template", None)
    content = read_toml(path)
    tables = content.get("stage")
    if not isinstance(tables, list) or not tables:
        raise UserError(f"{path}: no stage; a recipe has at least one [[stage]]")
    stages = []
    for number, values in enumerate(tables, 1):
        own = (
            table(values) if template is None or values.get("template") == "plain" else {**values, "template": template}
        )
        stages.append(from_table(VlmStage, f"{path}: stage {number}", own))
    recipe = from_table(VlmRecipe, str(path), {**_plain(content), **given})
    return VlmRecipe(**{**vars(recipe), "stages": tuple(stages)})


def _plain(content: Mapping[str, Any]) -> dict[str, Any]:
    return {name.replace("-", "_"): value for name, value in content.items()}
