"""`ov2 captions filter`: a caption set without the captions that break a rule, whose lines say which.

A line of the new set is the old one, with `dropped` where a rule drops it and with the scores that were computed. Where
duplicates are dropped, all sidecars are read once before: the first of several that pass the rules of text is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from open_clip_ov2.captions.filter_options import LIKELIHOOD, NEAR, FilterOptions
from open_clip_ov2.captions.likelihood import Gaps
from open_clip_ov2.captions.repetition import later_duplicates, signature
from open_clip_ov2.captions.tars_of import note_shards, noted_shards, tars_of, with_samples
from open_clip_ov2.captions.write import task_here
from open_clip_ov2.data.captions import CaptionKey, group_text
from open_clip_ov2.data.sidecars import begin_set, read_settings, read_sidecar, sidecars_in, write_sidecar
from open_clip_ov2.errors import UserError

UID = re.compile(r"([0-9a-f]{16})([0-9a-f]{16})(?:-\d+)?")
Line = dict[str, Any]
Rules = Mapping[str, Callable[[str], bool]]  # by verdict: whether a text breaks the rule


def filter_set(source: Path, out: Path, options: FilterOptions) -> Counter[str]:
    """Write the sidecars that are missing in `out`; lines of the whole set by verdict, "kept" and "no caption".

    Raises UserError: no set, no rule, other settings, tars that are gone, a list of uids that is none.
    """
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out}: is the set itself; name another folder")
    made = _Filter(source, options)
    begin_set(out, made.settings())
    for shards in noted_shards(source) if options.shards is None else [options.shards]:
        note_shards(out, shards)
    duplicates = made.duplicates() if options.duplicates else {}
    task = options.task or task_here()
    for path in made.sidecars[task.place :: task.tasks]:
        if not (out / path.name).is_file():
            write_sidecar(out / path.name, map(_ordered, made.judged(path, duplicates.get(path.name, ()))))
    written = chain.from_iterable(map(read_sidecar, sidecars_in(out)))
    return Counter(line.get("dropped") or ("no caption" if not line.get("caption") else "kept") for line in written)


class _Filter:
    """A set and its rules, with what they need: a list of uids, models, and the tars by sidecar. Raises UserError."""

    def __init__(self, source: Path, options: FilterOptions) -> None:
        self.source, self.options, self.sidecars = source, options, sidecars_in(source)
        self.rules, self.scores = options.text_rules(), options.score or []
        if not (self.rules or options.duplicates or options.uids or self.scores):
            raise UserError("ov2 captions filter: no rule is given, for example --min-words 5 (--help lists them)")
        if not self.sidecars:
            raise UserError(f"{source}: no sidecar is finished in this set")
        self.uids = None if options.uids is None else Uids(options.uids)
        self.tars = self._tars()
        self.gaps = [Gaps(rule.model, options.device) for rule in self.scores if rule.model is not None]

    def _tars(self) -> dict[str, str]:
        """Addresses by sidecar, if they have to be read."""
        keys = (line["key"] for line in read_sidecar(self.sidecars[0]))
        uids_of_json = self.uids is not None and not all(map(UID.fullmatch, keys))
        if not uids_of_json and not any(rule.model for rule in self.scores):
            return {}
        tars = tars_of(self.source, self.options.shards)
        if missing := [path.name for path in self.sidecars if path.name not in tars]:
            raise UserError(
                f"{self.source}: no tar is known for {missing[0]}, one of {len(missing)}; name them all with --shards"
            )
        return tars

    def settings(self) -> dict[str, Any]:
        options = self.options
        names = ("min_words", "max_words", "max_repetition", "refusals", "language", "duplicates")
        return {
            "made_by": "ov2 captions filter",
            "of": str(self.source.absolute()),
            "of_settings": read_settings(self.source),
            **{name: getattr(options, name) for name in names},
            "uids": str(options.uids.absolute()) if options.uids else None,
            "score": [str(one) for one in self.scores],
            # Which of several is the first depends on all of them.
            **({"sidecars": len(self.sidecars)} if options.duplicates else {}),
        }

    def duplicates(self) -> dict[str, set[int]]:
        """Places of the captions, by sidecar, that an earlier one makes superfluous."""
        places: list[tuple[str, int]] = []
        found: list[np.ndarray] = []
        for path in self.sidecars:
            for place, line in enumerate(read_sidecar(path)):
                _judge_text(line, self.rules)
                if text := usable(line):
                    places.append((path.name, place))
                    found.append(signature(text, near=self.options.duplicates == NEAR))
        later: dict[str, set[int]] = {}
        for (name, place), superfluous in zip(places, later_duplicates(np.array(found)) if found else (), strict=True):
            if superfluous:
                later.setdefault(name, set()).add(place)
        return later

    def judged(self, path: Path, duplicates: Collection[int]) -> list[Line]:
        """The lines of a sidecar, with the first verdict on each and all likelihoods."""
        lines = []
        for place, (line, sample) in enumerate(self._with_samples(path)):
            _judge_text(line, self.rules)
            if place in duplicates:
                _drop(line, "duplicate")
            if self.uids is not None and usable(line):
                key_is_uid = UID.fullmatch(line["key"])
                if not self.uids.has(line["key"] if key_is_uid else group_text(sample, CaptionKey("json", ("uid",)))):
                    _drop(line, "uids")
            if text := usable(line):
                for gap in self.gaps:
                    gap.add(line, sample, text)
            lines.append(line)
        for gap in self.gaps:
            gap.finish(LIKELIHOOD)
        for line in lines:
            for rule in self.scores:
                if usable(line) and not rule.keeps(line.get(rule.name)):
                    _drop(line, rule.name)
        return lines

    def _with_samples(self, path: Path) -> Iterable[tuple[Line, Mapping[str, Any]]]:
        """The lines of a sidecar with their samples, which are empty without a tar."""

        def refuse(reason: str) -> None:
            raise UserError(f"{self.tars[path.name]} is broken ({reason}): its captions cannot be filtered")

        if not self.tars:
            return ((line, {}) for line in read_sidecar(path))
        return with_samples(path, self.tars[path.name], refuse)


def _drop(line: Line, verdict: str) -> None:
    """The first verdict stays."""
    line.setdefault("dropped", verdict)


def _ordered(line: Line) -> Line:
    """Key first, then the verdict, as sidecars have it."""
    return {name: line[name] for name in ("key", "dropped") if name in line} | line


def usable(line: Mapping[str, Any]) -> str:
    """The caption of a line that was not dropped, of several the first; "" if it has none."""
    caption = line.get("caption")
    first = next(iter(caption), "") if isinstance(caption, list) else caption
    return "" if "dropped" in line or not isinstance(first, str) else first


def _judge_text(line: Line, rules: Rules) -> None:
    """Drop a caption by its text alone; of a list of captions those that break a rule, if another one is left."""
    caption = line.get("caption")
    texts: list[str] = caption if isinstance(caption, list) else [usable(line)] if usable(line) else []
    broken = [next((name for name, breaks in rules.items() if breaks(text)), None) for text in texts]
    if broken and all(broken):
        _drop(line, str(broken[0]))
    elif isinstance(caption, list) and "dropped" not in line:
        line["caption"] = [text for text, verdict in zip(texts, broken, strict=True) if verdict is None]


class Uids:
    """A sorted list of 128-bit uids as DataComp hands it out: a numpy array of dtype `u8,u8`. Raises UserError."""

    def __init__(self, path: Path) -> None:
        try:
            table = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise UserError(f"--uids {path}: cannot be read ({error})") from error
        if table.dtype != np.dtype("u8,u8") or table.ndim != 1:
            raise UserError(
                f"--uids {path}: expected a list of dtype u8,u8, found {table.dtype} of shape {table.shape}"
            )
        if np.any(table["f0"][1:] < table["f0"][:-1]):
            raise UserError(f"--uids {path}: is not sorted; write np.sort of it")
        self._table = table

    def has(self, uid: str) -> bool:
        """Of 32 hexadecimal digits, with or without `-N` after them."""
        found = UID.fullmatch(uid)
        if found is None:
            return False
        wanted = np.array(tuple(int(part, 16) for part in found.groups()), self._table.dtype)
        place = np.searchsorted(self._table, wanted)
        return bool(place < len(self._table) and self._table[place] == wanted)
