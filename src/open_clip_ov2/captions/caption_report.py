"""`ov2 captions report`: what is in a caption set, as a short table and as one page that needs no other file.

Texts are those of all sidecars. Alt-texts and pictures are read from the first tars alone, as far as they can be
opened: reading a tar takes as long as training on it.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.resources import files
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, StrictUndefined

from open_clip_ov2.argv import flag
from open_clip_ov2.captions.filter import usable
from open_clip_ov2.captions.repetition import LIMIT, is_refusal, later_duplicates, repetition, signature, words
from open_clip_ov2.captions.tars_of import tars_of, with_samples
from open_clip_ov2.data.captions import CaptionKey, group_text, parse_caption_keys
from open_clip_ov2.data.samples import rgb_image
from open_clip_ov2.data.sidecars import read_settings, read_sidecar, sidecars_in
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import write_text
from open_clip_ov2.tables import text, whole

PAGE, TXT = "report.html", CaptionKey("txt")
SIDE_PX, REASONS = 224, 20
WITH_PICTURES = 2000  # samples of the first tars whose alt-texts are compared
STOPWORDS = frozenset("a an and are as at be by for from in is it its of on or that the this to with".split())  # noqa: SIM905


@dataclass(frozen=True)
class ReportOptions:
    """What the report shows."""

    samples: int = flag("N", whole(0), "samples with pictures on the page", default=24)
    alt_text: tuple[CaptionKey, ...] = flag(
        "KEY,...", parse_caption_keys, "where alt-texts are: txt, json:caption (default: txt)", default=(TXT,)
    )
    shards: str | None = flag("IN", text, "the tars, if they have moved (default: as the set notes them)")

    def alt_text_of(self, sample: Mapping[str, Any]) -> str:
        return " ".join(group_text(sample, key) for key in self.alt_text).strip()


@dataclass
class Texts:
    """Figures of the captions that are used, and counts of the others by reason."""

    unused: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    repetitive: int = 0
    refusals: int = 0
    signatures: list[np.ndarray] = field(default_factory=list)
    scores: dict[str, list[float]] = field(default_factory=dict)

    def add(self, line: Mapping[str, Any]) -> None:
        caption = usable(line)
        if not caption:
            dropped = line.get("dropped")
            self.unused[f"dropped: {dropped}" if dropped else f"no caption: {line.get('error', 'it is empty')}"] += 1
            return
        self.lengths.append(len(caption.split()))
        self.repetitive += repetition(caption) > LIMIT
        self.refusals += is_refusal(caption)
        self.signatures.append(signature(caption, near=False))
        for name, value in line.items():
            if isinstance(value, (int, float)) and not isinstance(value, bool):
                self.scores.setdefault(name, []).append(value)

    def table(self) -> Iterator[tuple[str, str]]:
        count = len(self.lengths)
        yield "samples", f"{count + self.unused.total():,}"
        yield "captions", f"{count:,}"
        for reason, number in self.unused.most_common(REASONS):
            yield reason, f"{number:,}"
        if not count:
            return
        yield "words, mean", f"{np.mean(self.lengths):.1f}"
        yield "words, 5% / median / 95%", _spread(self.lengths, ".0f")
        yield f"repetition above {LIMIT:g}", _percent(self.repetitive / count)
        yield "refusals", _percent(self.refusals / count)
        yield "said before, word for word", _percent(float(later_duplicates(np.array(self.signatures)).mean()))
        for name, values in self.scores.items():
            yield f"{name}, mean", f"{np.mean(values):.3f}"
            yield f"{name}, 5% / median / 95%", _spread(values, ".3f")


def write_report(folder: Path, options: ReportOptions) -> list[tuple[str, str]]:
    """Write FOLDER/report.html; the rows of the table. Raises UserError."""
    sidecars, texts = sidecars_in(folder), Texts()
    if not sidecars:
        raise UserError(f"{folder}: no sidecar is finished in this set")
    for line in chain.from_iterable(map(read_sidecar, sidecars)):
        texts.add(line)
    pairs, note = _with_samples(folder, sidecars, options)
    table = list(texts.table())
    if agreement := _agreement(pairs, options):
        label = f"words of the alt-text that the caption has, of {len(agreement):,}"
        table.append((label, _percent(float(np.mean(agreement)))))
    chosen = pairs[:: max(1, len(pairs) // max(1, options.samples))][: options.samples]
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    page = environment.from_string(files(__package__).joinpath(PAGE).read_text(encoding="utf-8")).render(
        name=folder.resolve().name,
        table=table,
        samples=[_shown(line, sample, options) for line, sample in chosen],
        note=note,
        settings=json.dumps(read_settings(folder), indent=1),
    )
    write_text(folder / PAGE, page)
    return table


def _percent(share: float) -> str:
    return f"{100 * share:.1f}%"


def _spread(values: Sequence[float], digits: str) -> str:
    return " / ".join(f"{value:{digits}}" for value in np.percentile(values, (5, 50, 95)))


def _with_samples(
    folder: Path, sidecars: Sequence[Path], options: ReportOptions
) -> tuple[list[tuple[dict[str, Any], dict[str, Any]]], str]:
    """(lines with their samples of the known tars, "") or (lines with empty samples, why). Raises UserError."""
    try:
        tars = tars_of(folder, options.shards)
    except UserError as error:
        return [(line, {}) for line in islice(read_sidecar(sidecars[0]), options.samples)], f"No pictures: {error}"
    known = (with_samples(path, tars[path.name], lambda _: None) for path in sidecars if path.name in tars)
    return list(islice(chain.from_iterable(known), WITH_PICTURES)), ""


def _agreement(pairs: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]], options: ReportOptions) -> list[float]:
    """The share of the alt-text's words in each caption, where there are both."""
    found = []
    for line, sample in pairs:
        wanted, caption = _content(options.alt_text_of(sample)), usable(line)
        if wanted and caption:
            found.append(len(wanted & _content(caption)) / len(wanted))
    return found


def _content(caption: str) -> set[str]:
    return {word for word in map(str.lower, words(caption)) if word[0].isalnum()} - STOPWORDS


def _shown(line: Mapping[str, Any], sample: Mapping[str, Any], options: ReportOptions) -> dict[str, str]:
    """What the page has of a sample."""
    caption, picture = line.get("caption"), io.BytesIO()
    with contextlib.suppress(SkipSample):
        image = rgb_image(sample)
        image.thumbnail((SIDE_PX, SIDE_PX))
        image.save(picture, "JPEG", quality=80)
    return {
        "key": line["key"],
        "caption": " · ".join(caption) if isinstance(caption, list) else str(caption or line.get("error", "")),
        "dropped": str(line.get("dropped", "")),
        "alt": options.alt_text_of(sample),
        "picture": base64.b64encode(picture.getvalue()).decode(),
    }
