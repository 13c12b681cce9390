"""The keys of a stage, the same in a recipe file and after `--stage`, and what each may be."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from difflib import get_close_matches
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe.counts import parse_samples
from open_clip_ov2.recipe.stage import Augmentation, Stage

# What OpenCLIP 3.3 takes (a test compares them with its parser and scheduler).
SCHEDULES = ("cosine", "const", "const-cooldown")
PRECISIONS = ("amp", "amp_bf16", "amp_bfloat16", "bf16", "fp16", "pure_bf16", "pure_fp16", "fp32")
_WORDS = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}


def kebab(key: str) -> str:
    return key.strip().replace("_", "-")


def _whole(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            raise UserError(f"{value!r} is not a whole number")
        try:
            number = int(value)
        except ValueError:
            raise UserError(f"{value!r} is not a whole number (K, M and B are for samples)") from None
        if number < least:
            raise UserError(f"{number} is less than {least}")
        return number

    return read


def _samples(least: int) -> Callable[[Any], int]:
    def read(value: Any) -> int:
        number = parse_samples(value)
        if number < least:
            raise UserError(f"{number} is less than {least}")
        return number

    return read


def _real(low: float, high: float, *, above: bool) -> Callable[[Any], float]:
    """A number in [low, high], or in (low, high] if it must lie `above` low."""

    def read(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float, str)):
            raise UserError(f"{value!r} is not a number")
        try:
            number = float(value)
        except (ValueError, OverflowError):
            raise UserError(f"{value!r} is not a number") from None
        if not math.isfinite(number) or number < low or (above and number == low) or number > high:
            limits = f"more than {low:g}" if above else f"at least {low:g}"
            raise UserError(f"{value} must be {limits}" + ("" if math.isinf(high) else f" and at most {high:g}"))
        return number

    return read


def _range(value: Any) -> tuple[float, float]:
    """0.35, "0.35", "0.25:1.0" or [0.25, 1.0], in (0, 1]."""
    parts = value.split(":") if isinstance(value, str) else value if isinstance(value, (list, tuple)) else [value]
    if len(parts) not in (1, 2):
        raise UserError(f"{value!r} is neither a number (0.35) nor a range low:high (0.25:1.0)")
    share = _real(0, 1, above=True)
    low, high = share(parts[0]), share(parts[-1])
    if low > high:
        raise UserError(f"range {low:g}:{high:g} has its greater end first")
    return low, high


def _keep_ratio(value: Any) -> str:
    low, high = _range(value)
    return repr(low) if low == high else f"{low!r}:{high!r}"


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{value!r} is not a text" if not isinstance(value, str) else "is empty")
    return value


def _switch(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in _WORDS:
        return _WORDS[value.lower()]
    raise UserError(f"{value!r} is neither true nor false")


def _one_of(choices: tuple[str, ...]) -> Callable[[Any], str]:
    def read(value: Any) -> str:
        if value not in choices:
            raise UserError(f"{value!r} is not one of {', '.join(choices)}")
        return str(value)

    return read


_READERS: dict[str, Callable[[Any], Any]] = {
    "resolution": _whole(1),
    "samples": _samples(1),
    "global-batch": _whole(1),
    "batch-size": _whole(1),
    "lr": _real(0, math.inf, above=True),
    "base-lr": _real(0, math.inf, above=True),
    "warmup-samples": _samples(0),
    "schedule": _one_of(SCHEDULES),
    "keep-ratio": _keep_ratio,
    "eval-keep-ratio": _real(0, 1, above=True),
    "weight-decay": _real(0, math.inf, above=False),
    "crop-scale": _range,
    "color-jitter": _switch,
    "precision": _one_of(PRECISIONS),
    "grad-checkpointing": _switch,
    "context-length": _whole(2),  # the begin-of-text id and one target
    "train-data": _text,
    "name": _text,
}
STAGE_KEYS = tuple(_READERS)
_REQUIRED = {"resolution": "84", "samples": '2_000_000 or "2M"'}


def unknown_key(where: str, key: str, known: Iterable[str]) -> UserError:
    known = tuple(known)
    near = get_close_matches(kebab(key).lower(), known, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return UserError(f"{where}: unknown key {key!r}{hint} (known: {', '.join(known)})")


def read_values(where: str, items: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Checked values by kebab-case key, from kebab- or snake-case ones. Raises UserError that begins with `where`."""
    values: dict[str, Any] = {}
    for written, value in items:
        key = kebab(written)
        if key not in _READERS:
            raise unknown_key(where, written, STAGE_KEYS)
        if key in values:
            raise UserError(f"{where}: {key} is said twice; leave one out")
        try:
            values[key] = _READERS[key](value)
        except UserError as error:
            raise UserError(f"{where}: {key}: {error}") from None
    return values


def read_stage(where: str, items: Iterable[tuple[str, Any]]) -> Stage:
    """A stage from its keys and values. Raises UserError that begins with `where`."""
    values = read_values(where, items)
    for key, example in _REQUIRED.items():
        if key not in values:
            raise UserError(f"{where}: {key} is missing, for example {key} = {example}")
    crop, jitter = values.pop("crop-scale", None), values.pop("color-jitter", None)
    if crop is not None or jitter is not None:
        values["augmentation"] = Augmentation(crop, jitter)
    try:
        return Stage(**{key.replace("-", "_"): value for key, value in values.items()})
    except UserError as error:
        raise UserError(f"{where}: {error}") from None


def stage_items(stage: Stage) -> Mapping[str, Any]:
    """The inverse of `read_stage`: what the stage says, by key, in the order of STAGE_KEYS."""
    augmentation = stage.augmentation or Augmentation()
    special = {"crop-scale": augmentation.scale, "color-jitter": augmentation.color_jitter}
    values = {key: special[key] if key in special else getattr(stage, key.replace("-", "_")) for key in STAGE_KEYS}
    return {key: value for key, value in values.items() if value is not None}


def parse_stage(text: str) -> Stage:
    """`112:samples=2M,base-lr=8e-6,keep-ratio=0.35`, as after `--stage`. Raises UserError.

    Commas within braces belong to the value: `train-data=shards/{0,7}.tar`.
    """
    where = f"--stage {text}"
    resolution, colon, rest = text.partition(":")
    if not colon or "=" in resolution:
        raise UserError(f"{where}: begins with its resolution and a colon, for example 112:samples=2M,base-lr=8e-6")
    items: list[tuple[str, Any]] = [("resolution", resolution.strip())]
    for item in _split(rest):
        key, equals, value = item.partition("=")
        if not equals:
            raise UserError(f"{where}: {item.strip() or 'nothing'!r} where KEY=VALUE is expected, such as samples=2M")
        items.append((key, value.strip()))
    return read_stage(where, items)


def _split(text: str) -> list[str]:
    parts, depth = [""], 0
    for letter in text:
        depth += (letter == "{") - (letter == "}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts if text.strip() else []
