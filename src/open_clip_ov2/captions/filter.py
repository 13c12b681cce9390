"""`ov2 captions filter`: a caption set without the captions that break a rule, whose lines say which.

A line of the new set is the old one, with `dropped` where a rule drops it and with the scores that were computed. Where
duplicates are dropped, all sidecars are read once before: the first of several that pass the rules of text is kept.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from open_clip_ov2.captions.filter_options import LIKELIHOOD, NEAR, FilterOptions
from open_clip_ov2.captions.likelihood import Gaps
from open_clip_ov2.captions.repetition import later_duplicates, signature
from open_clip_ov2.captions.shards_of import copy_note, shards_of
from open_clip_ov2.captions.write import task_here
from open_clip_ov2.data.captions import CaptionKey, group_text
from open_clip_ov2.data.sidecars import (
    begin_set,
    read_settings,
    read_sidecar,
    shard_name,
    sidecars_in,
    write_sidecar,
)
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError

UID = re.compile(r"([0-9a-f]{16})([0-9a-f]{16})(?:-\d+)?")
Lines = list[dict[str, Any]]


def run(source: Path, out: Path, options: FilterOptions) -> Counter[str]:
    """Write the sidecars that are missing in `out`; lines of the whole set by verdict, "kept" and "no caption".

    Raises UserError: no set, no rule, other settings, tars that are gone, a list of uids that is none.
    """
    sidecars, rules = sidecars_in(source), options.text_rules()
    if not (rules or options.duplicates or options.uids or options.score):
        raise UserError("ov2 captions filter: no rule is given, for example --min-words 5 (--help lists them)")
    if not sidecars:
        raise UserError(f"{source}: no sidecar is finished in this set")
    if out.resolve() == source.resolve():
        raise UserError(f"--out {out}: is the set itself; name another folder")
    uids = None if options.uids is None else Uids(options.uids)
    tars = _tars(source, options, sidecars, uids)
    gaps = [Gaps(rule.model, options.device) for rule in options.score or () if rule.model is not None]
    begin_set(out, _settings(source, options, sidecars))
    copy_note(source, out, options.shards)
    duplicates = _duplicates(sidecars, rules, options.duplicates == NEAR) if options.duplicates else {}
    task = options.task or task_here()
    for path in sidecars[task.place :: task.tasks]:
        if (out / path.name).is_file():
            continue
        lines = list(read_sidecar(path))
        _judge_texts(lines, rules)
        for place in duplicates.get(path.name, ()):
            _drop(lines[place], "duplicate")
        samples = read_tar(tars[path.name], _broken(tars[path.name])) if path.name in tars else iter(())
        _judge_samples(lines, samples, tars.get(path.name, ""), options, uids, gaps)
        write_sidecar(out / path.name, map(_ordered, lines))
    return verdicts(out)


def verdicts(folder: Path) -> Counter[str]:
    """Lines of a set by what was decided on them."""
    lines = chain.from_iterable(map(read_sidecar, sidecars_in(folder)))
    return Counter(line.get("dropped") or ("no caption" if not line.get("caption") else "kept") for line in lines)


def _settings(source: Path, options: FilterOptions, sidecars: Sequence[Path]) -> dict[str, Any]:
    names = ("min_words", "max_words", "max_repetition", "refusals", "language", "duplicates")
    return {
        "made_by": "ov2 captions filter",
        "of": str(source.absolute()),
        "of_settings": read_settings(source),
        **{name: getattr(options, name) for name in names},
        "uids": str(options.uids.absolute()) if options.uids else None,
        "score": [str(one) for one in options.score or ()],
        **({"sidecars": len(sidecars)} if options.duplicates else {}),  # of which the first is kept depends on all
    }


def _tars(source: Path, options: FilterOptions, sidecars: Sequence[Path], uids: Uids | None) -> dict[str, str]:
    """Addresses by sidecar, of the tars that have to be read. Raises UserError."""
    needs_pictures = any(rule.model for rule in options.score or ())
    if not needs_pictures and (uids is None or all(UID.fullmatch(line["key"]) for line in read_sidecar(sidecars[0]))):
        return {}
    named = {f"{shard_name(url)}.jsonl.gz": url for url in shards_of(source, options.shards)}
    missing = [path.name for path in sidecars if path.name not in named]
    if missing:
        raise UserError(
            f"{source}: no tar is known for {missing[0]}, one of {len(missing)}; name them all with --shards"
        )
    return {path.name: named[path.name] for path in sidecars}


def _broken(url: str) -> Callable[[str], None]:
    def refuse(reason: str) -> None:
        raise UserError(f"{url} is broken ({reason}): its captions cannot be filtered")

    return refuse


def _drop(line: dict[str, Any], verdict: str) -> None:
    """The first verdict stays."""
    line.setdefault("dropped", verdict)


def _ordered(line: Mapping[str, Any]) -> dict[str, Any]:
    """Key first, then the verdict, as sidecars have it."""
    first = {name: line[name] for name in ("key", "dropped") if name in line}
    return {**first, **line}


def usable(line: Mapping[str, Any]) -> str:
    """The caption of a line that was not dropped, of several the first; "" if it has none."""
    caption = line.get("caption")
    first = next(iter(caption), "") if isinstance(caption, list) else caption
    return "" if "dropped" in line or not isinstance(first, str) else first


def _judge_texts(lines: Lines, rules: Mapping[str, Callable[[str], bool]]) -> None:
    """Drop captions by their text alone; of a list of captions those that break a rule, if another one is left."""
    for line in lines:
        caption = line.get("caption")
        texts: list[str] = caption if isinstance(caption, list) else [usable(line)] if usable(line) else []
        broken = [next((name for name, breaks in rules.items() if breaks(text)), None) for text in texts]
        if broken and all(broken):
            _drop(line, str(broken[0]))
        elif isinstance(caption, list) and "dropped" not in line:
            line["caption"] = [text for text, verdict in zip(texts, broken, strict=True) if verdict is None]


def _duplicates(
    sidecars: Sequence[Path], rules: Mapping[str, Callable[[str], bool]], near: bool
) -> dict[str, list[int]]:
    """Places of the captions, by sidecar, that an earlier one makes superfluous."""
    places: list[tuple[str, int]] = []
    found: list[np.ndarray] = []
    for path in sidecars:
        lines = list(read_sidecar(path))
        _judge_texts(lines, rules)
        for place, line in enumerate(lines):
            if text := usable(line):
                places.append((path.name, place))
                found.append(signature(text, near))
    later: dict[str, list[int]] = {}
    for (name, place), superfluous in zip(places, later_duplicates(np.array(found)) if found else (), strict=True):
        if superfluous:
            later.setdefault(name, []).append(place)
    return later


def _judge_samples(
    lines: Lines,
    samples: Iterator[dict[str, Any]],
    url: str,
    options: FilterOptions,
    uids: Uids | None,
    gaps: Sequence[Gaps],
) -> None:
    """Drop captions by their sample: its uid, its picture, and scores that the lines have."""
    for line, sample in _beside(lines, samples, url):
        if uids is not None and usable(line) and not uids.has(_uid(line["key"], sample)):
            _drop(line, "uids")
        for gap in gaps:
            if text := usable(line):
                gap.add(line, sample or {}, text)
    for gap in gaps:
        gap.finish(LIKELIHOOD)
    for rule in options.score or ():
        for line in lines:
            if usable(line) and not rule.keeps(line.get(rule.name)):
                _drop(line, rule.name)


def _beside(
    lines: Lines, samples: Iterator[dict[str, Any]], url: str
) -> Iterator[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Each line with its sample, None without a tar. Raises UserError if they do not belong together."""
    for number, line in enumerate(lines, 1):
        sample = next(samples, None) if url else None
        if url and (sample is None or sample["__key__"] != line["key"]):
            found = "no sample" if sample is None else repr(sample["__key__"])
            raise UserError(f"{url}: has {found} where line {number} of its sidecar has {line['key']!r}")
        yield line, sample


def _uid(key: str, sample: Mapping[str, Any] | None) -> str:
    return key if UID.fullmatch(key) else group_text(sample or {}, CaptionKey("json", ("uid",)))


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
        self._high, self._low = np.ascontiguousarray(table["f0"]), np.ascontiguousarray(table["f1"])
        if np.any(self._high[1:] < self._high[:-1]):
            raise UserError(f"--uids {path}: is not sorted; write np.sort of it")

    def has(self, uid: str) -> bool:
        """Of 32 hexadecimal digits, with or without `-N` after them."""
        found = UID.fullmatch(uid)
        if found is None:
            return False
        high, low = (np.uint64(int(part, 16)) for part in found.groups())
        first, last = (int(np.searchsorted(self._high, high, side)) for side in ("left", "right"))
        return bool(np.any(self._low[first:last] == low))
