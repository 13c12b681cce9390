"""LLaVA's JSON as it is published -> messages and paths of pictures, in a table on disk that all ranks share.

A row is `{"id", "image": "a.jpg" (or a list), "conversations": [{"from": "human", "value": "<image>..."}, ...]}`. As in
LLaVA, a picture stands first in its turn, wherever `<image>` is in it. Rows that cannot be used are left out, counted
by cause and listed. Nothing in the file is executed, and no path leaves the folder of the pictures.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from open_clip_ov2.data.decode import MAX_IMAGE_PIXELS, odd_shape
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, write_json
from open_clip_ov2.formats.llava import IMAGE_TOKEN

logger = logging.getLogger(__name__)

MAX_CHARACTERS, MAX_TURNS, MAX_PICTURES = 200_000, 512, 64  # ours: of one conversation
LISTED = 20  # ours: so many rows of each cause are named in the log; all of them are in skipped.json
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
PICTURE_WORDS = 128  # of a picture, beside the words of the text, as LLaVA counts lengths for grouping
REPORT, SKIPPED = "report.json", "skipped.json"


class _Skip(Exception):
    """Why a row is left out."""


@dataclass
class DataReport:
    """Rows of one file: `used` of `rows`; of these without a picture, and with several; `skipped` by cause."""

    rows: int = 0
    used: int = 0
    text_only: int = 0
    several_pictures: int = 0
    moved_pictures: int = 0
    skipped: dict[str, int] = field(default_factory=dict)

    def __str__(self) -> str:
        kinds = {
            "without a picture": self.text_only,
            "with several pictures": self.several_pictures,
            "whose pictures are named without <image> in the text, and stand first": self.moved_pictures,
        }
        parts = [f"{count:,} {kind}" for kind, count in kinds.items() if count]
        left_out = ", ".join(f"{count:,} {cause}" for cause, count in self.skipped.items())
        return (
            f"{self.used:,} of {self.rows:,} conversations"
            + (f" ({', '.join(parts)})" if parts else "")
            + (f"; left out: {left_out}" if left_out else "")
        )


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
    """Reads rows; `report` counts them. `images` is the folder that names of pictures are relative to."""

    def __init__(self, images: Path | None) -> None:
        self._images = None if images is None else Path(os.path.realpath(images))
        self._usable: dict[str, str] = {}  # path -> why it cannot be used, or ""
        self.report = DataReport()
        self.skipped: list[dict[str, str]] = []

    def __call__(self, rows: list[Any]) -> Iterator[dict[str, Any]]:
        """The usable rows as `messages`, `images` (paths), `length` (words) and `id`."""
        causes: Counter[str] = Counter()
        for index, row in enumerate(rows):
            self.report.rows += 1
            name = str(row.get("id", index) if isinstance(row, Mapping) else index)[:100]
            try:
                found = self._read(row)
            except _Skip as skip:
                cause = str(skip.args[0])
                causes[cause] += 1
                self.skipped.append({"row": str(index), "id": name, "cause": cause, "what": str(skip.args[1])[:300]})
                continue
            self.report.used += 1
            yield {"id": name, **found}
        self.report.skipped = dict(causes.most_common())

    def _read(self, row: Any) -> dict[str, Any]:
        turns = row.get("conversations") if isinstance(row, Mapping) else None
        if not isinstance(turns, list) or not turns:
            raise _Skip("without conversations", "")
        if len(turns) > MAX_TURNS:
            raise _Skip(f"with more than {MAX_TURNS} turns", len(turns))
        pictures = self._pictures(row)
        messages: list[dict[str, Any]] = []
        length, marks = PICTURE_WORDS * len(pictures), 0
        texts = [_said(turn) for turn in turns]
        if sum(len(text) for _, text in texts) > MAX_CHARACTERS:
            raise _Skip(f"with more than {MAX_CHARACTERS:,} characters", sum(len(text) for _, text in texts))
        if texts[0][0] == "assistant":  # LLaVA leaves such a turn out too
            texts = texts[1:]
        for role, text in texts:
            count = text.count(IMAGE_TOKEN)
            if count and role != "user":
                raise _Skip(f"with {IMAGE_TOKEN} outside a question", text)
            text = text.replace(IMAGE_TOKEN, "").strip() if count else text
            marks += count
            length += len(text.split())
            messages.append({"role": role, "content": _content(count, text)})
        roles = [message["role"] for message in messages if message["role"] != "system"]
        if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
            raise _Skip("whose turns do not alternate between question and answer", " ".join(roles)[:100])
        if pictures and not marks:
            first = next(place for place, message in enumerate(messages) if message["role"] == "user")
            messages[first]["content"] = [*_content(len(pictures), ""), *messages[first]["content"]]
            self.report.moved_pictures += 1
        elif marks != len(pictures):
            raise _Skip(f"with another number of {IMAGE_TOKEN} than of pictures", f"{marks}, {len(pictures)} pictures")
        self.report.text_only += not pictures
        self.report.several_pictures += len(pictures) > 1
        return {"messages": messages, "images": pictures, "length": length}

    def _pictures(self, row: Mapping[str, Any]) -> list[str]:
        """Absolute paths, each checked."""
        value = row.get("image", row.get("images")) or []
        names = value if isinstance(value, list) else [value]
        if len(names) > MAX_PICTURES:
            raise _Skip(f"with more than {MAX_PICTURES} pictures", len(names))
        return [self._picture(name) for name in names]

    def _picture(self, name: Any) -> str:
        if not isinstance(name, str) or "\0" in name:
            raise _Skip("whose picture has no name", repr(name))
        if self._images is None:
            raise _Skip("with a picture, but no folder of pictures was given", name)
        path = os.path.realpath(self._images / name)
        if not Path(path).is_relative_to(self._images):
            raise _Skip("whose picture is outside the folder of pictures", name)
        if path not in self._usable:
            self._usable[path] = _why_unusable(path)
        if self._usable[path]:
            raise _Skip(self._usable[path], name)
        return path


def _why_unusable(path: str) -> str:
    """From the header alone: the pixels are decoded in training."""
    from PIL import Image, UnidentifiedImageError

    if not os.path.isfile(path):
        return "whose picture is missing"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # it is refused below
            with Image.open(path) as picture:
                width, height = picture.size
    except Image.DecompressionBombError:
        return f"whose picture has more than {MAX_IMAGE_PIXELS:,} pixels"
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        return "whose picture cannot be read"
    if width * height > MAX_IMAGE_PIXELS:
        return f"whose picture has more than {MAX_IMAGE_PIXELS:,} pixels"
    return "whose picture is too long for its width" if odd_shape(width, height) else ""


def _said(turn: Any) -> tuple[str, str]:
    """(role, text) of a turn."""
    speaker, text = (turn.get("from"), turn.get("value")) if isinstance(turn, Mapping) else (None, None)
    if speaker not in ROLES or not isinstance(text, str):
        raise _Skip("with a turn that is not from human or gpt", repr(turn))
    return ROLES[speaker], text


def _content(pictures: int, text: str) -> list[dict[str, str | None]]:
    parts: list[dict[str, str | None]] = [{"type": "image", "text": None}] * pictures
    return [*parts, {"type": "text", "text": text}] if text or not parts else parts


def prepare(file: Path, images: Path | None, folder: Path) -> DataReport:
    """Write the table of a file's usable rows into `folder`, unless it is there; its report. Raises UserError."""
    from datasets import Dataset, disable_progress_bars

    stamp = file.stat()
    about = [str(file.resolve()), str(images), stamp.st_size, stamp.st_mtime]
    own = folder / hashlib.sha256(json.dumps(about).encode()).hexdigest()[:12]
    if not (folder / REPORT).is_file() or read_json(folder / REPORT, dict)["table"] != own.name:
        reader = Conversations(images)
        rows = list(reader(read_rows(file)))
        _tell(file, reader)
        if not rows:
            raise UserError(f"{file}: no conversation can be used: {reader.report}")
        folder.mkdir(parents=True, exist_ok=True)
        disable_progress_bars()
        Dataset.from_list(rows).save_to_disk(own)
        write_json(folder / SKIPPED, reader.skipped)
        write_json(folder / REPORT, {"table": own.name, **vars(reader.report)})
    found = read_json(folder / REPORT, dict)
    return DataReport(**{name: value for name, value in found.items() if name != "table"})


def open_prepared(folder: Path) -> Any:
    """The table that `prepare` has written there, as a Dataset that is memory-mapped."""
    from datasets import Dataset

    return Dataset.load_from_disk(folder / read_json(folder / REPORT, dict)["table"])


def _tell(file: Path, reader: Conversations) -> None:
    """Log what was read, and which rows were left out."""
    logger.info("%s: %s", file, reader.report)
    for cause in reader.report.skipped:
        rows = [row for row in reader.skipped if row["cause"] == cause]
        shown = ", ".join(f"row {row['row']} (id {row['id']}) {row['what']}".strip() for row in rows[:LISTED])
        more = f", and {len(rows) - LISTED:,} more in {SKIPPED}" if len(rows) > LISTED else ""
        logger.warning("%s: left out %s: %s%s", file, cause, shown, more)
