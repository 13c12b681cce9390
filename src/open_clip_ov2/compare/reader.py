"""Reads a comparison's file (config.py says what stands in it)."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from open_clip_ov2.compare.bench.cases import CaptionLengths
from open_clip_ov2.compare.config import MODES, Arm, ArmStage, Comparison, Evaluation, Flags, Measure, Metric
from open_clip_ov2.errors import UserError
from open_clip_ov2.recipe import parse_samples
from open_clip_ov2.tables import read_toml

BATCH = ("batch-size", "accum-freq", "global-batch")
BETTER = ("higher", "lower")
SET_BY_US = ("name", "logs", "model", "seed", "stage", "recipe", "train-data", "val-data", "force-image-size", "epochs")


def load_comparison(path: Path) -> Comparison:
    """Raises UserError."""
    return _Reader(str(path)).comparison(read_toml(path), path.stem)


class _Reader:
    """Checks as it reads; each error says where in the file."""

    def __init__(self, where: str) -> None:
        self.where = where

    def fail(self, what: str) -> UserError:
        return UserError(f"{self.where}: {what}")

    def known(self, table: Any, keys: Sequence[str], section: str) -> Mapping[str, Any]:
        if not isinstance(table, dict):
            raise self.fail(f"{section or 'the file'}: must be a table")
        for key in table:
            if key not in keys:
                near = get_close_matches(key, keys, n=1, cutoff=0.0)[0]
                raise self.fail(f"{section + ': ' if section else ''}{key}: no such key; near: {near}")
        return table

    def value(self, table: Mapping[str, Any], key: str, kind: Any, default: Any = None) -> Any:
        """Of a type; a missing one without a default is an error."""
        if key not in table:
            if default is None:
                raise self.fail(f"{key} is missing")
            return default
        value = table[key]
        if not isinstance(value, kind) or isinstance(value, bool) != (kind is bool):
            raise self.fail(f"{key} = {value!r}: not of the right type")
        return value

    def comparison(self, table: Any, stem: str) -> Comparison:
        keys = (
            "title", "about", "notes", "mode", "samples", "seconds", "seeds", "reference", "resolution", "flags",
            "measure", "arm", "evaluate", "metric", "curve",
        )  # fmt: skip
        self.known(table, keys, "")
        mode = self.value(table, "mode", str, "samples")
        if mode not in MODES:
            raise self.fail(f"mode = {mode!r}: one of {', '.join(MODES)}")
        arms = self.arms(table)
        names = [arm.name for arm in arms]
        reference = self.value(table, "reference", str, names[0])
        if reference not in names:
            raise self.fail(f"reference = {reference!r}: no such arm; near: {_near(reference, names)}")
        curve = self.known(table.get("curve", {}), ("over",), "[curve]")
        if curve and not table.get("metric"):
            raise self.fail("[curve]: there is no [[metric]] to draw")
        return Comparison(
            name=stem,
            title=self.value(table, "title", str, stem),
            about=" ".join(self.value(table, "about", str, " ").split()),
            notes=tuple(" ".join(str(note).split()) for note in self.value(table, "notes", list, [])),
            mode=mode,
            budget=self.budget(table, mode),
            seeds=self.seeds(table),
            reference=reference,
            flags=self.flags(table.get("flags", {}), "[flags]"),
            arms=arms,
            measure=self.measure(table.get("measure", {})),
            evaluations=tuple(self.evaluation(item, names) for item in self.tables(table, "evaluate")),
            metrics=tuple(self.metric(item) for item in self.tables(table, "metric")),
            curve_over=self.value(curve, "over", str).replace("_", "-") if curve else None,
        )

    def measure(self, item: Any) -> Measure:
        keys = ("repetitions", "samples", "caption-tokens", "largest-batch", "memory-limit-gb")
        self.known(item, keys, "[measure]")
        default, limit = Measure(), item.get("memory-limit-gb")
        if limit is not None and not (isinstance(limit, (int, float)) and 0 < limit < math.inf):
            raise self.fail(f"[measure] memory-limit-gb = {limit!r}: a positive number")
        repetitions = self.value(item, "repetitions", int, default.repetitions)
        if repetitions < 1:
            raise self.fail("[measure] repetitions: at least 1")
        try:
            text = self.value(item, "caption-tokens", str, "")
            lengths = CaptionLengths.parse(text) if text else default.lengths
        except UserError as error:
            raise self.fail(f"[measure] {str(error).removeprefix('--')}") from None
        return Measure(
            repetitions,
            self.samples(self.value(item, "samples", (int, str), default.samples)),
            lengths,
            self.value(item, "largest-batch", bool, default.largest_batch),
            limit,
        )

    def tables(self, table: Mapping[str, Any], key: str) -> list[Any]:
        value = table.get(key, [])
        if not isinstance(value, list):
            raise self.fail(f"{key}: write it as [[{key}]]")
        return value

    def budget(self, table: Mapping[str, Any], mode: str) -> float:
        wanted, other = ("seconds", "samples") if mode == "seconds" else ("samples", "seconds")
        if other in table:
            raise self.fail(f"{other}: mode {mode!r} goes by {wanted}")
        if wanted == "samples":
            return float(self.samples(self.value(table, "samples", (int, str))))
        seconds = float(self.value(table, "seconds", (int, float)))
        if not seconds > 0 or math.isinf(seconds):
            raise self.fail(f"seconds = {seconds:g}: must be positive")
        return seconds

    def samples(self, value: int | str) -> int:
        try:
            found = parse_samples(str(value))
        except UserError as error:
            raise self.fail(f"samples: {error}") from None
        if found < 1:
            raise self.fail("samples: at least 1")
        return found

    def seeds(self, table: Mapping[str, Any]) -> tuple[int, ...]:
        seeds = self.value(table, "seeds", list, [0, 1, 2])
        if not seeds or len(set(seeds)) < len(seeds) or not all(type(seed) is int and seed >= 0 for seed in seeds):
            raise self.fail(f"seeds = {seeds}: different whole numbers, at least one")
        return tuple(seeds)

    def arms(self, table: Mapping[str, Any]) -> tuple[Arm, ...]:
        arms = tuple(self.arm(item, table.get("resolution")) for item in self.tables(table, "arm"))
        if not arms:
            raise self.fail("no [[arm]]: nothing to compare")
        names = [arm.name for arm in arms]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice:
            raise self.fail(f"two arms are called {twice!r}")
        return arms

    def arm(self, item: Any, resolution: Any) -> Arm:
        self.known(item, ("name", "model", "flags", "stages", "train"), "[[arm]]")
        name = self.value(item, "name", str)
        told = self.value(item, "stages", list, [])
        stages = [self.known(s, ("resolution", "share"), f"arm {name}: stages") for s in told]
        if not stages:
            if type(resolution) is not int:
                raise self.fail(f"arm {name}: neither stages nor a resolution (px) for all arms")
            stages = [{"resolution": resolution, "share": 1.0}]
        parsed = tuple(
            ArmStage(self.value(s, "resolution", int), float(self.value(s, "share", (int, float)))) for s in stages
        )
        if any(not stage.share > 0 for stage in parsed) or not math.isclose(sum(s.share for s in parsed), 1.0):
            raise self.fail(f"arm {name}: the shares of its stages are positive and add up to 1")
        flags = self.flags(item.get("flags", {}), f"arm {name}: flags")
        return Arm(name, self.value(item, "model", str), flags, parsed, self.value(item, "train", bool, True))

    def flags(self, table: Any, section: str) -> Flags:
        if not isinstance(table, dict):
            raise self.fail(f"{section}: must be a table of flags")
        flags = {key.replace("_", "-"): value for key, value in table.items()}
        for key, value in flags.items():
            if key in SET_BY_US:
                raise self.fail(f"{section} {key}: `ov2 compare` sets it itself; leave it out")
            if isinstance(value, dict):
                raise self.fail(f"{section} {key}: a flag has no table")
        return flags

    def evaluation(self, item: Any, names: list[str]) -> Evaluation:
        self.known(item, ("name", "tasks", "flags", "train-data", "arms"), "[[evaluate]]")
        arms = self.value(item, "arms", list, [])
        for arm in arms:
            if arm not in names:
                raise self.fail(f"[[evaluate]] arms: {arm!r}: no such arm; near: {_near(str(arm), names)}")
        tasks = self.value(item, "tasks", list)
        flags = {key.replace("_", "-"): value for key, value in self.value(item, "flags", dict, {}).items()}
        name, train_data = self.value(item, "name", str, ""), self.value(item, "train-data", bool, False)
        return Evaluation(name, tuple(map(str, tasks)), flags, train_data, tuple(arms))

    def metric(self, item: Any) -> Metric:
        names = ("key", "title", "unit", "scale", "better", "digits", "learning")
        self.known(item, names, "[[metric]]")
        key = self.value(item, "key", str)
        better = self.value(item, "better", str, "higher")
        if better not in BETTER:
            raise self.fail(f"metric {key}: better = {better!r}: one of {', '.join(BETTER)}")
        return Metric(
            key=key,
            title=self.value(item, "title", str, re.sub(r"[._-]+", " ", key)),
            unit=item.get("unit", ""),
            scale=float(self.value(item, "scale", (int, float), 1.0)),
            better=better,
            digits=max(0, self.value(item, "digits", int, 1)),
            learning=item.get("learning"),
        )


def _near(name: str, names: Sequence[str]) -> str:
    return get_close_matches(name, names, n=1, cutoff=0.0)[0]
