"""Captions beside tars: a caption set is a folder with one NAME.jsonl.gz, a sidecar, for each NAME.tar.

A sidecar has exactly one line for each sample of its tar, in the tar's order, and each line is a JSON object that
begins with the sample's key, as `read_tar` gives it:

    {"key": "000001", "caption": "a red square", "likelihood": 0.7}   a caption, or a list of them; scores by name
    {"key": "000002", "error": "not in the tables"}                   why there is none
    {"key": "000003", "dropped": "min-words", "caption": "red"}       the name of the rule that dropped it

`settings.json`, an object, says what made the set. Sidecars are written whole or not at all. The tars stay as they are,
so that order, counts and resuming do not depend on a set: a sample gets its line as one more entry, called after the
set (`captions.Line`), and `captions.py` reads it as it reads other entries.
"""

from __future__ import annotations

import contextlib
import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from json.encoder import encode_basestring_ascii
from pathlib import Path
from typing import Any

from open_clip_ov2.data import storage
from open_clip_ov2.data.captions import Line
from open_clip_ov2.data.samples import IMAGE_SUFFIXES
from open_clip_ov2.errors import UserError
from open_clip_ov2.files import read_json, write_json, written_whole

SETTINGS, SUFFIX, SHARD = "settings.json", ".jsonl.gz", "{shard}"
TAR = re.compile(r"\.(tar(\.(gz|bz2|xz))?|tgz)$", re.IGNORECASE)
NAME = re.compile(r"[a-z][a-z0-9_-]*")
LEVEL = 1  # of gzip: twice as fast as 6, and captions are small beside their pictures
EXAMPLE = "for example --captions recap=captions/"
UNREADABLE = (OSError, EOFError, zlib.error)


def shard_name(url: str) -> str:
    """`00017` of `data/00017.tar`, of `s3://b/00017.tar.gz` and of `pipe:aws s3 cp s3://b/00017.tar -`. Raises
    UserError."""
    words = [word.strip("'\"") for word in url.split()]
    tars = [word for word in words if TAR.search(word)]
    name = TAR.sub("", (tars or words or [""])[-1].rsplit("/", 1)[-1])
    if not name or name.startswith((".", "-")):
        raise UserError(f"{url}: does not end in a tar's name, after which other files are named")
    return name


def shard_names(urls: Sequence[str]) -> dict[str, str]:
    """Name of each shard -> its address. Raises UserError: no name, or one name twice."""
    names: dict[str, str] = {}
    for url in urls:
        if (name := shard_name(url)) in names:
            raise UserError(f"{url} and {names[name]} have the same name; give each a folder of its own")
        names[name] = url
    return names


@dataclass(frozen=True)
class CaptionSet:
    """A set by the name that samples get its lines under. `where`: a folder, or a template with `{shard}`."""

    name: str
    where: str

    @classmethod
    def of(cls, text: str) -> CaptionSet:
        """From NAME=FOLDER. Raises UserError."""
        name, equals, where = text.partition("=")
        if not equals or not NAME.fullmatch(name) or name in IMAGE_SUFFIXES or not where.strip():
            raise UserError(f"{text!r}: expected NAME=FOLDER, NAME of a-z, 0-9, _ and -, none like jpg, {EXAMPLE}")
        return cls(name, where.strip())

    def __str__(self) -> str:
        return f"{self.name}={self.where}"

    @property
    def is_folder(self) -> bool:
        return SHARD not in self.where

    def address(self, url: str) -> str:
        """Where the sidecar of a tar is."""
        template = storage.join(self.where, f"{SHARD}{SUFFIX}") if self.is_folder else self.where
        return template.replace(SHARD, shard_name(url))

    def identity(self) -> str:
        """What makes it this set and no other: a hash of its settings, or its address if they cannot be read."""
        settings = self.settings()
        if settings == self.where:
            return self.where
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]

    def settings(self) -> Any:
        """The content of settings.json, or the set's address if it cannot be read."""
        if self.is_folder:
            with contextlib.suppress(Exception):
                return json.loads(storage.read_bytes(storage.join(self.where, SETTINGS)))
        return self.where

    def check(self, urls: Sequence[str]) -> None:
        """Raises UserError unless each tar has a sidecar here, as far as can be told without reading any."""
        shard_names(tuple(dict.fromkeys(urls)))
        hint = f"--captions {self.name}: expected a folder of sidecars, or an address with {{shard}}"
        if not self.is_folder:
            addresses = [self.address(url) for url in urls]
            storage.check_readable(addresses, f"sidecars of --captions {self}", hint)
            return storage.check_there(addresses, f"sidecars of --captions {self}")
        names = storage.names_in(self.where)
        if SETTINGS not in names:
            raise UserError(f"--captions {self}: not a caption set, because it has no {SETTINGS}")
        missing = [url for url in urls if f"{shard_name(url)}{SUFFIX}" not in names]
        if missing:
            raise UserError(
                f"--captions {self}: {len(missing)} of {len(urls)} tars have no sidecar, the first is "
                f"{self.address(missing[0])} for {missing[0]}; `ov2 captions` makes them"
            )


def caption_sets(value: Any) -> tuple[CaptionSet, ...]:
    """From NAME=FOLDER, a set, or a list or mapping of them; of equal names the last counts. Raises UserError."""
    if isinstance(value, CaptionSet):
        return (value,)
    if isinstance(value, str):
        return (CaptionSet.of(value),)
    if isinstance(value, Mapping):
        value = [f"{name}={where}" for name, where in value.items()]
    if not isinstance(value, (list, tuple)):
        raise UserError(f"{value!r}: expected NAME=FOLDER, {EXAMPLE}")
    return tuple({one.name: one for item in value for one in caption_sets(item)}.values())


def with_lines(
    samples: Iterable[dict[str, Any]], url: str, sets: Sequence[CaptionSet], on_broken: Callable[[str], None]
) -> Iterator[dict[str, Any]]:
    """A tar's samples, each with its line of each set. Raises UserError for sidecars that are not this tar's.

    `on_broken` is called with the reason where a sidecar cannot be read; the samples end there.
    """
    with contextlib.ExitStack() as opened:
        lines = [opened.enter_context(contextlib.closing(read_lines(one.address(url)))) for one in sets]
        pairs = list(zip(sets, lines, strict=True))
        for number, sample in enumerate(samples, 1):
            begin = b'{"key": ' + encode_basestring_ascii(sample["__key__"]).encode()  # as write_sidecar begins a line
            for one, reader in pairs:
                try:
                    line = next(reader, None)
                except UNREADABLE as error:
                    return on_broken(f"its captions {one.address(url)}: {type(error).__name__}: {error}")
                if line is None or not line.startswith(begin) or one.name in sample:
                    _check_line(line, sample, one, number)
                sample[one.name] = line
            yield sample


def _check_line(line: Line | None, sample: Mapping[str, Any], one: CaptionSet, number: int) -> None:
    url, key = sample["__url__"], sample["__key__"]
    where = f"--captions {one.name}: {one.address(url)}"
    if line is None:
        raise UserError(
            f"{where}: ends after {number - 1} lines, and {url} has more samples; they do not belong together"
        )
    if one.name in sample:
        raise UserError(f"--captions {one}: {url} has an entry of this name; call the set something else")
    found = _parsed(line, where, number)["key"]
    if found != key:
        raise UserError(
            f"{where}: line {number} is for {found!r}, where {url} has {key!r}; they do not belong together"
        )


def _parsed(line: bytes, where: str, number: int) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:
        raise UserError(f"{where}: line {number} is not JSON ({error})") from None
    if not isinstance(value, dict) or not isinstance(value.get("key"), str):
        raise UserError(f"{where}: line {number} is not an object with a key")
    return value


def read_lines(address: str) -> Generator[Line, None, None]:
    """A sidecar's lines as they are. Raises UNREADABLE, or whatever a store's library raises as an OSError."""
    try:
        with contextlib.ExitStack() as opened:
            stream = storage.open_address(address)
            opened.callback(storage.abandon, stream)
            yield from map(Line, gzip.GzipFile(fileobj=stream))
            stream.close()  # where a command's exit status shows
    except (*UNREADABLE, GeneratorExit):
        raise
    except Exception as error:  # whatever a store's library raises
        raise OSError(f"{type(error).__name__}: {error}") from error


def read_sidecar(address: str | Path) -> Iterator[dict[str, Any]]:
    """A sidecar's lines, parsed. Raises UserError."""
    try:
        for number, line in enumerate(read_lines(str(address)), 1):
            yield _parsed(line, str(address), number)
    except UNREADABLE as error:
        raise UserError(f"{address}: cannot be read ({type(error).__name__}: {error})") from error


# --- a set on this machine, to be written -------------------------------------------------------------


def sidecar_path(folder: Path, shard: str) -> Path:
    """`shard`: a tar's address, or its name alone."""
    return folder / f"{shard_name(shard)}{SUFFIX}"


def write_sidecar(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Write a sidecar whole or not at all; equal lines give equal bytes. Returns their number. Raises OSError."""
    count = 0
    with written_whole(path) as file, gzip.GzipFile("", "wb", LEVEL, file, mtime=0) as packed:
        for count, line in enumerate(lines, 1):  # noqa: B007
            assert next(iter(line)) == "key", line
            packed.write(json.dumps(line, allow_nan=False).encode() + b"\n")
    return count


def begin_set(folder: Path, settings: Mapping[str, Any]) -> None:
    """Make the folder of a set, or continue one of the same settings. Raises UserError."""
    wanted = json.loads(json.dumps(settings))
    if (path := folder / SETTINGS).is_file():
        return check_same_settings(folder, read_settings(folder), wanted)
    if folder.is_dir():
        refuse_other_files(folder)
    folder.mkdir(parents=True, exist_ok=True)
    write_json(path, wanted)


def check_same_settings(folder: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raises UserError if a folder was begun with other settings than are wanted now."""
    keys = [key for key in dict.fromkeys((*wanted, *found)) if wanted.get(key) != found.get(key)]
    if keys:
        differ = ", ".join(f"{key} {found.get(key)}, not {wanted.get(key)}" for key in keys)
        raise UserError(f"{folder}: was begun with {differ}; give the same, or name another folder")


def refuse_other_files(folder: Path) -> None:
    """Raises UserError if a folder that is to be begun holds anything that is not hidden."""
    if others := sorted(path.name for path in folder.iterdir() if not path.name.startswith(".")):
        raise UserError(f"{folder}: holds other files ({', '.join(others[:3])}); name a folder of its own")


def read_settings(folder: Path) -> dict[str, Any]:
    """Raises UserError for a folder that is not a caption set."""
    if not (folder / SETTINGS).is_file():
        raise UserError(f"{folder}: not a caption set, because it has no {SETTINGS}")
    settings: dict[str, Any] = read_json(folder / SETTINGS, dict, "an object of settings")
    return settings


def sidecars_in(folder: Path) -> list[Path]:
    """The finished sidecars of a set, by name. Raises UserError for a folder that is not one."""
    read_settings(folder)
    return sorted(path for path in folder.iterdir() if path.name.endswith(SUFFIX) and not path.name.startswith("."))


def missing_sidecars(folder: Path, urls: Sequence[str]) -> dict[str, str]:
    """Name -> address of the tars that have no sidecar yet. Raises UserError: one name twice."""
    return {name: url for name, url in shard_names(urls).items() if not (folder / f"{name}{SUFFIX}").is_file()}
