"""LLaVA's JSON as it is published -> messages and paths of pictures, in a table on disk that all ranks share.

A row is `{"id", "image": "a.jpg" (or a list), "conversations": [{"from": "human", "value": "<image>..."}, ...]}`. As in
LLaVA, a picture stands first in its turn, wherever `<image>` is in it. Rows that cannot be used are left out. They are
counted and listed, and so are rows without a picture or with several. Nothing in the file is executed, and no path
leaves the folder of the pictures.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS, bounded, pil_errors_skip
from open_clip_ov2.data.skips import MISSING_IMAGE, TOO_MANY_PIXELS, SkipSample
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.formats.llava import IMAGE_TOKEN

logger = logging.getLogger(__name__)

MAX_CHARACTERS, MAX_TURNS, MAX_PICTURES = 200_000, 512, 64  # ours: of one conversation
NAMED = 20  # ours: so many rows that are left out for one cause are named in the log; LISTED has all of them
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PICTURE_WORDS = 128  # of a picture, beside the words of the text, as LLaVA counts lengths for grouping
REPORT, LISTED = "report.json", "listed.json"
TEXT_ONLY, SEVERAL = "without a picture", "with several pictures"
MOVED = "whose pictures the text does not name, so that they stand first"


def read_rows(file: Path) -> list[Any]:
    """The rows of a JSON list, or of JSON lines. Raises UserError."""
    what = "LLaVA's list of conversations"
    if file.suffix != ".jsonl":
        rows: list[Any] = read_json(file, list, what)
    else:
        try:
            rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        except OSError as error:
            raise UserError(f"{file}: cannot be read ({error.strerror})") from error
        except ValueError as error:
            raise UserError(f"{file}: not JSON lines ({error}); expected {what}") from error
    if not rows:
        raise UserError(f"{file}: empty; expected {what}")
    return rows


class Conversations:
    """Reads rows. `images` is the folder that names of pictures are relative to. `listed` has what is to be known of
    rows: of those that are left out the cause, and of others that they have no picture or several."""

    def __init__(self, images: Path | None) -> None:
        self._images = None if images is None else Path(os.path.realpath(images))
        self._fault = functools.cache(_fault)  # many rows may have one picture
        self.listed: list[dict[str, Any]] = []

    def __call__(self, rows: list[Any]) -> Iterator[dict[str, Any]]:
        """The usable rows as `messages`, `images` (paths), `length` (words) and `id`."""
        for index, row in enumerate(rows):
            name = str(row.get("id", index) if isinstance(row, Mapping) else index)[:100]
            about = {"row": index, "id": name}
            try:
                found, kinds = self._read(row)
            except SkipSample as skip:
                self.listed.append({**about, "used": False, "cause": skip.cause, "what": skip.detail[:300]})
                continue
            self.listed += [{**about, "used": True, "cause": kind} for kind in kinds]
            yield {"id": name, **found}

    def counts(self, used: bool) -> dict[str, int]:
        """Listed rows by cause, the most frequent first."""
        return dict(Counter(row["cause"] for row in self.listed if row["used"] == used).most_common())

    def _read(self, row: Any) -> tuple[dict[str, Any], list[str]]:
        """(the row as it is used, what is listed of it)."""
        turns = row.get("conversations") if isinstance(row, Mapping) else None
        if not isinstance(turns, list) or not turns:
            raise SkipSample("no conversations")
        if len(turns) > MAX_TURNS:
            raise SkipSample(f"more than {MAX_TURNS} turns", str(len(turns)))
        pictures = self._pictures(row)
        texts = [_said(turn) for turn in turns]
        if (characters := sum(len(text) for _, text in texts)) > MAX_CHARACTERS:
            raise SkipSample(f"more than {MAX_CHARACTERS:,} characters", str(characters))
        if texts[0][0] == "assistant":  # LLaVA leaves such a turn out too
            texts = texts[1:]
        roles = [role for role, _ in texts if role != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
            raise SkipSample("turns that do not alternate between question and answer", " ".join(roles)[:100])
        if wrong := [text for role, text in texts if IMAGE_TOKEN in text and role != "user"]:
            raise SkipSample(f"{IMAGE_TOKEN} outside a question", wrong[0])
        marks = [text.count(IMAGE_TOKEN) for _, text in texts]
        kinds = {TEXT_ONLY: not pictures, SEVERAL: len(pictures) > 1, MOVED: bool(pictures) and not any(marks)}
        if kinds[MOVED]:
            marks[[role for role, _ in texts].index("user")] = len(pictures)
        elif sum(marks) != len(pictures):
            raise SkipSample(f"another number of {IMAGE_TOKEN} than of images", f"{sum(marks)}, {len(pictures)} images")
        words = sum(len(text.replace(IMAGE_TOKEN, "").split()) for _, text in texts)
        messages = [
            {"role": role, "content": _content(count, text)} for count, (role, text) in zip(marks, texts, strict=True)
        ]
        found = {"messages": messages, "images": pictures, "length": PICTURE_WORDS * len(pictures) + words}
        return found, [kind for kind, true in kinds.items() if true]

    def _pictures(self, row: Mapping[str, Any]) -> list[str]:
        """Absolute paths, each checked."""
        value = row.get("image", row.get("images")) or []
        names = value if isinstance(value, list) else [value]
        if len(names) > MAX_PICTURES:
            raise SkipSample(f"more than {MAX_PICTURES} images", str(len(names)))
        return [self._picture(name) for name in names]

    def _picture(self, name: Any) -> str:
        if not isinstance(name, str) or "\0" in name:
            raise SkipSample("image without a name", repr(name))
        if self._images is None:
            raise SkipSample("image, but no folder of images was given", name)
        path = os.path.realpath(self._images / name)
        if not Path(path).is_relative_to(self._images):
            raise SkipSample("image outside the folder of images", name)
        if fault := self._fault(path):
            raise SkipSample(fault.cause, f"{name} {fault.detail}".strip())
        return path


def _fault(path: str) -> SkipSample | None:
    """Why a picture cannot be used, from its header alone: the pixels are decoded in training."""
    if not os.path.isfile(path):
        return SkipSample(MISSING_IMAGE)
    try:
        with pil_errors_skip(), Image.open(path) as picture:
            if picture.width * picture.height > MAX_IMAGE_PIXELS:
                raise SkipSample(TOO_MANY_PIXELS, f"{picture.width} x {picture.height}, at most {MAX_IMAGE_PIXELS:,}")
            bounded(picture)
    except SkipSample as skip:
        return skip
    return None


def _said(turn: Any) -> tuple[str, str]:
    """(role, text) of a turn."""
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    if speaker not in ROLES or not isinstance(text, str):
        raise SkipSample("turn that is not from human or gpt", repr(turn))
    return ROLES[speaker], text


def _content(pictures: int, text: str) -> list[dict[str, str | None]]:
    text = text.replace(IMAGE_TOKEN, "").strip() if IMAGE_TOKEN in text else text
    parts: list[dict[str, str | None]] = [{"type": "image", "text": None}] * pictures
    return [*parts, {"type": "text", "text": text}] if text or not parts else parts


def prepare(file: Path, images: Path | None, folder: Path) -> int:
    """Write the table of a file's usable rows into `folder`, unless it is there; their number. Raises UserError."""
    from datasets import Dataset, disable_progress_bars

    stamp = file.stat()
    about = [str(file.resolve()), str(images), stamp.st_size, stamp.st_mtime]
    own = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    if not (folder / REPORT).is_file() or read_json(folder / REPORT, dict)["table"] != own.name:
        reader, rows = Conversations(images), read_rows(file)
        usable = list(reader(rows))
        _tell(file, reader, len(usable), len(rows))
        folder.mkdir(parents=True, exist_ok=True)
        disable_progress_bars()
        Dataset.from_list(usable).save_to_disk(own)
        write_json(folder / LISTED, reader.listed)
        counts = {"rows": len(rows), "used": len(usable), "kinds": reader.counts(True), "skipped": reader.counts(False)}
        write_json(folder / REPORT, {"table": own.name, **counts})
    return int(read_json(folder / REPORT, dict)["used"])


def open_prepared(folder: Path) -> Any:
    """The table that `prepare` has written there, as a Dataset that is memory-mapped."""
    from datasets import Dataset

    return Dataset.load_from_disk(folder / read_json(folder / REPORT, dict)["table"])


def _tell(file: Path, reader: Conversations, used: int, rows: int) -> None:
    """Log what was read, and which rows were left out. Raises UserError if all were."""
    causes, kinds = reader.counts(False), reader.counts(True)
    report = f"{used:,} of {rows:,} conversations"
    report += f" ({_listed(kinds)})" if kinds else ""
    report += f"; left out: {_listed(causes)}" if causes else ""
    logger.info("%s: %s", file, report)
    for cause in causes:
        left_out = [row for row in reader.listed if row["cause"] == cause]
        shown = ", ".join(f"row {row['row']} (id {row['id']}) {row['what']}".strip() for row in left_out[:NAMED])
        more = f", and {len(left_out) - NAMED:,} more in {LISTED}" if len(left_out) > NAMED else ""
        logger.warning("%s: left out %s: %s%s", file, cause, shown, more)
    if not used:
        raise UserError(f"{file}: no conversation can be used: {report}")


def _listed(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {cause}" for cause, count in counts.items())
