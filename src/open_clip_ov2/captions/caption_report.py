"""`ov2 captions report`: what is in a caption set, as a short table and as one page that needs no other file.

Texts are those of all sidecars. Alt-texts and pictures are read from the first tars alone, as far as they can be
opened: reading a tar takes as long as training on it.
"""

from __future__ import annotations

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jinja2 import Environment, StrictUndefined

from open_clip_ov2.argv import flag
from open_clip_ov2.captions.filter import usable
from open_clip_ov2.captions.repetition import LIMIT, is_refusal, later_duplicates, repetition, signature, words
from open_clip_ov2.captions.requests import read_condition
from open_clip_ov2.captions.shards_of import shards_of
from open_clip_ov2.data.captions import CaptionKey, group_text
from open_clip_ov2.data.samples import Decoder
from open_clip_ov2.data.sidecars import read_settings, read_sidecar, shard_name, sidecars_in
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import write_text
from open_clip_ov2.tables import text, whole

PAGE = "report.html"
SIDE_PX, BARS = 224, 40
WITH_PICTURES = 2000  # samples of the first tars whose alt-texts are compared
STOPWORDS = frozenset("a an and are as at be by for from in is it its of on or that the this to with".split())  # noqa: SIM905


@dataclass(frozen=True)
class ReportOptions:
    """What the report shows."""

    samples: int = flag("N", whole(0), "samples with pictures on the page (default: 24)", default=24)
    alt_text: CaptionKey = flag(
        "KEY", read_condition, "where alt-texts are: txt, json:caption (default: txt)", default=CaptionKey("txt")
    )
    shards: str | None = flag("IN", text, "the tars, if they have moved (default: as the set notes them)")


@dataclass
class Texts:
    """Figures of the captions that are used, and counts of the others."""

    lines: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    repetitions: list[float] = field(default_factory=list)
    refusals: int = 0
    signatures: list[np.ndarray] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        self.lines += 1
        caption = usable(line)
        if not caption:
            verdict = line.get("dropped")
            (self.dropped if verdict else self.errors)[str(verdict or line.get("error", "no caption"))] += 1
            return
        self.lengths.append(len(caption.split()))
        self.repetitions.append(repetition(caption))
        self.refusals += is_refusal(caption)
        self.signatures.append(signature(caption, near=False))
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.scores.setdefault(name, []).append(value)

    def table(self) -> Iterator[tuple[str, str]]:
        yield "samples", f"{self.lines:,}"
        count = len(self.lengths)
        yield "captions", f"{count:,}"
        for verdict, number in self.dropped.most_common():
            yield f"dropped: {verdict}", f"{number:,}"
        for error, number in self.errors.most_common(5):
            yield f"no caption: {error}", f"{number:,}"
        if not count:
            return
        low, median, high = np.percentile(self.lengths, (5, 50, 95))
        yield "words, mean", f"{np.mean(self.lengths):.1f}"
        yield "words, 5% / median / 95%", f"{low:.0f} / {median:.0f} / {high:.0f}"
        yield f"repetition above {LIMIT:g}", _percent(float(np.mean(np.array(self.repetitions) > LIMIT)))
        yield "refusals", _percent(self.refusals / count)
        yield "said before, word for word", _percent(float(later_duplicates(np.array(self.signatures)).mean()))
        for name, values in self.scores.items():
            yield f"{name}, mean", f"{np.mean(values):.3f}"


def run(folder: Path, options: ReportOptions) -> list[tuple[str, str]]:
    """Write FOLDER/report.html; the rows of the table. Raises UserError."""
    sidecars, texts = sidecars_in(folder), Texts()
    if not sidecars:
        raise UserError(f"{folder}: no sidecar is finished in this set")
    for path in sidecars:
        for line in read_sidecar(path):
            texts.add(line)
    samples, agreement, note = _from_tars(folder, sidecars, options)
    table = list(texts.table())
    if agreement:
        table.append(
            (f"words of the alt-text that the caption has, of {len(agreement):,}", _percent(float(np.mean(agreement))))
        )
    charts = [_chart("Words of a caption", texts.lengths), _chart("Repetition", texts.repetitions)]
    charts += [_chart("Words of the alt-text that the caption has, share", agreement)] if agreement else []
    charts += [_chart(name, values) for name, values in texts.scores.items()]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files(__package__).joinpath(PAGE).read_text(encoding="utf-8"))
    settings = json.dumps(read_settings(folder), indent=1)
    shown = page.render(
        name=folder.resolve().name, table=table, charts=charts, samples=samples, note=note, settings=settings
    )
    write_text(folder / PAGE, shown)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _chart(title: str, values: Sequence[float]) -> dict[str, Any]:
    """A histogram; the highest bar is 100%."""
    if not values:
        return {"title": title, "bars": [], "low": "", "high": ""}
    counts, edges = np.histogram(values, bins=BARS)
    bars = [
        {"percent": round(100 * int(count) / int(counts.max()), 1), "label": f"{low:.4g} to {high:.4g}: {count:,}"}
        for count, low, high in zip(counts, edges, edges[1:], strict=False)
    ]
    return {"title": title, "bars": bars, "low": f"{edges[0]:.4g}", "high": f"{edges[-1]:.4g}"}


def _from_tars(
    folder: Path, sidecars: Sequence[Path], options: ReportOptions
) -> tuple[list[dict[str, str]], list[float], str]:
    """(samples for the page, share of the alt-text's words in each caption, what is missing and why)."""
    try:
        tars = {f"{shard_name(url)}.jsonl.gz": url for url in shards_of(folder, options.shards)}
    except UserError as error:
        return _without_pictures(sidecars, options.samples), [], f"No pictures: {error}"
    pairs = list(islice(_pairs(sidecars, tars), WITH_PICTURES))
    agreement = []
    for line, sample in pairs:
        wanted = _content(group_text(sample, options.alt_text))
        if wanted and usable(line):
            agreement.append(len(wanted & _content(usable(line))) / len(wanted))
    step = max(1, len(pairs) // max(1, options.samples))
    chosen = pairs[::step][: options.samples]
    return [_sample(line, sample, options.alt_text) for line, sample in chosen], agreement, ""


def _pairs(sidecars: Iterable[Path], tars: Mapping[str, str]) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
    """Lines with their samples, of the tars that are known."""
    for path in sidecars:
        if path.name in tars:
            samples = read_tar(tars[path.name], lambda _: None)
            for line, sample in zip(read_sidecar(path), samples, strict=False):
                if line["key"] != sample["__key__"]:
                    raise UserError(f"{tars[path.name]}: has {sample['__key__']!r} where {path} has {line['key']!r}")
                yield line, sample


def _content(caption: str) -> set[str]:
    return {word for word in map(str.lower, words(caption)) if word[0].isalnum()} - STOPWORDS


def _without_pictures(sidecars: Sequence[Path], count: int) -> list[dict[str, str]]:
    return [_texts_of(line) for line in islice(read_sidecar(sidecars[0]), count)]


def _texts_of(line: Mapping[str, Any]) -> dict[str, str]:
    caption = line.get("caption")
    shown = " · ".join(caption) if isinstance(caption, list) else str(caption or line.get("error", ""))
    return {"key": line["key"], "caption": shown, "dropped": str(line.get("dropped", "")), "alt": "", "picture": ""}


def _sample(line: Mapping[str, Any], sample: Mapping[str, Any], alt_text: CaptionKey) -> dict[str, str]:
    found = {**_texts_of(line), "alt": group_text(sample, alt_text), "picture": ""}
    try:
        image = Decoder(torch.as_tensor, ()).image(sample)
    except SkipSample:
        return found
    image.thumbnail((SIDE_PX, SIDE_PX))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    return {**found, "picture": base64.b64encode(buffer.getvalue()).decode()}
