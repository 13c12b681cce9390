"""Addresses of files: paths, `file:`, `pipe:` and http(s) as webdataset opens them, object stores through fsspec, which
are written too.

Importing this module teaches webdataset the schemes of the stores, in data workers too. Credentials and endpoints are
the libraries' business (for s3:// the environment and files of the AWS command line), and so are their errors, which
come through where no UserError is promised.
"""

from __future__ import annotations

import contextlib
import glob as local_glob
import importlib.util
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any
from urllib.parse import urlparse

import fsspec
from webdataset.gopen import Pipe, gopen, gopen_schemes, rewrite_url

from open_clip_ov2.data.retries import open_stored, retried
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import written_whole

# By scheme the package that reads it. `gs` stays with webdataset's gsutil where gcsfs is not installed.
STORES = {
    "s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "hf": "huggingface_hub", "abfs": "adlfs",
    "abfss": "adlfs", "az": "adlfs", "oss": "ossfs", "oci": "ocifs", "memory": "fsspec",
}  # fmt: skip
KNOWN = ", ".join(f"{store}:" for store in STORES if store != "memory")


def is_store(address: str) -> bool:
    """Whether fsspec reads it."""
    return gopen_schemes.get(scheme(address)) is open_stored


def scheme(address: str) -> str:
    """`s3`, `pipe`; empty for a path."""
    return "pipe" if address.startswith("pipe:") else urlparse(rewrite_url(address)).scheme


def local_path(address: str) -> str:
    """A path as it is, or that of a `file:` address."""
    return address.removeprefix("file:").removeprefix("//") if scheme(address) == "file" else address


def open_address(address: str) -> IO[bytes]:
    """Open for reading from the beginning to the end."""
    stream: IO[bytes] = gopen(address)
    return stream


def abandon(stream: Any) -> None:
    """Close a stream that need not be at its end, without waiting for what a command has still to do."""
    if isinstance(stream, Pipe):
        stream.proc.terminate()
    with contextlib.suppress(Exception):  # a pipe's exit status; what matters of it showed while reading
        stream.close()


for _scheme, _package in STORES.items():
    if _scheme != "gs" or importlib.util.find_spec(_package):
        gopen_schemes[_scheme] = open_stored


def check_readable(addresses: Sequence[str], what: str, hint: str) -> None:
    """Raises UserError: a local file that is missing or a folder, a scheme that cannot be opened here."""
    missing: list[str] = []
    for address in addresses:
        if (name := scheme(address)) not in ("", "file"):
            if name not in gopen_schemes:
                raise UserError(
                    f"{address}: {name}: cannot be opened (known: {KNOWN}); use 'pipe:COMMAND' that prints the file"
                )
            if is_store(address):
                _check_installed(address)
            continue
        path = local_path(address)
        if os.path.isdir(path):
            raise UserError(f"{address} is a folder; {hint.format(address)}")
        if not os.path.exists(path):
            missing.append(address)
    if missing:
        shown = ", ".join(missing[:3]) + (", ..." if len(missing) > 3 else "")
        raise UserError(
            f"{len(missing)} of {len(addresses)} {what} do not exist: {shown}; check the path and the braces"
        )


def check_there(addresses: Sequence[str], what: str) -> None:
    """Raises UserError for what is not in the listings of an object store, and for a first command that fails."""
    folders = {address.rpartition("/")[0] for address in addresses if is_store(address)}
    listed = {f"{folder}/{name}" for folder in folders for name in names_in(folder)}
    if missing := [address for address in addresses if is_store(address) and address not in listed]:
        raise UserError(f"{missing[0]}: one of the {what} is not there; check the address")
    if scheme(addresses[0]) == "pipe":
        stream = open_address(addresses[0])
        try:
            problem = "" if stream.read(1) else "it is empty"
        except Exception as error:  # the command's exit status
            problem = first_line(error)
        finally:
            abandon(stream)
        if problem:
            raise UserError(f"{addresses[0]}: the first of the {what} cannot be read ({problem}); check the command")


def _check_installed(address: str) -> None:
    name = scheme(address)
    try:
        fsspec.get_filesystem_class(name)
    except (ImportError, ValueError) as error:
        package = STORES[name]
        raise UserError(
            f"{address}: {name}: is read with {package}, which is not installed, or cannot be imported "
            f"({first_line(error)}): pip install {package}"
        ) from None


def join(folder: str, name: str) -> str:
    return f"{folder.rstrip('/') or '/'}/{name}"


def read_bytes(address: str) -> bytes:
    """A whole file."""
    with open_address(address) as stream:
        return stream.read()


def names_in(folder: str) -> set[str]:
    """Names of what is in a folder, of an object store too. Raises UserError."""
    if is_store(folder):
        _check_installed(folder)
    try:
        if not is_store(folder):
            return set(os.listdir(local_path(folder)))
        fs, path = fsspec.url_to_fs(folder)
        found = retried(folder, lambda: fs.ls(path, detail=False))
        return {str(name).rstrip("/").rpartition("/")[2] for name in found}
    except FileNotFoundError:
        raise UserError(f"{folder}: no such folder") from None
    except Exception as error:  # whatever a store's library raises
        raise UserError(f"{folder}: cannot be listed ({first_line(error)})") from error


def matching(pattern: str) -> list[str]:
    """Addresses of the files that a pattern with `*`, `**`, `?` and `[...]` matches, sorted. Raises UserError."""
    if not is_store(pattern):
        return sorted(path for path in local_glob.glob(local_path(pattern), recursive=True) if os.path.isfile(path))
    _check_installed(pattern)
    fs, path = fsspec.url_to_fs(pattern)
    try:
        return sorted(str(fs.unstrip_protocol(name)) for name in retried(pattern, lambda: fs.glob(path)))
    except Exception as error:
        raise UserError(f"{pattern}: cannot be listed ({first_line(error)})") from error


def check_writable(address: str) -> None:
    """Raises UserError unless it is a path, `file:` or in an object store whose library is installed."""
    if scheme(address) in STORES:
        _check_installed(address)
    elif scheme(address) not in ("", "file"):
        raise UserError(f"{address}: cannot be written; expected a folder or one of {KNOWN}")


def check_apart(address: str, logs: Path, name: str | None) -> None:
    """Raises UserError if a copy in a folder would be the run's folder LOGS/NAME, or in it."""
    copies = Path(local_path(address)).resolve()
    own = copies == logs.resolve() or (name and copies.is_relative_to(logs.resolve() / name))
    if own and scheme(address) in ("", "file"):
        raise UserError(f"{address}: this is where the run itself is; choose another folder")


def names_below(folder: str) -> list[str]:
    """All files of a folder, with what leads to each; none where there is no such folder."""
    fs, path = fsspec.url_to_fs(folder)
    return [str(name)[len(path) :].lstrip("/") for name in retried(folder, lambda: fs.find(path))]


def put(path: Path, address: str) -> None:
    """Copy a file to where `check_writable` allows, whole or not at all."""
    fs, place = fsspec.url_to_fs(address)
    if is_store(address):
        fs.put_file(str(path), place)
        return
    Path(place).parent.mkdir(parents=True, exist_ok=True)
    with open(path, "rb") as source, written_whole(Path(place)) as file:
        shutil.copyfileobj(source, file)


def get(address: str, path: Path) -> None:
    """Copy a file from there, whole or not at all."""
    fs, place = fsspec.url_to_fs(address)
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as file:
        retried(address, lambda: fs.get_file(place, file.name))


def is_current(path: Path, address: str) -> bool:
    """Whether the file is there: as large, and not older (the rule of `aws s3 sync`)."""
    fs, place = fsspec.url_to_fs(address)
    with contextlib.suppress(Exception):  # it is not there, or the store does not say
        stat = path.stat()
        return bool(fs.info(place)["size"] == stat.st_size and fs.modified(place).timestamp() >= stat.st_mtime)
    return False


def copy(address: str, to: str) -> None:
    """Copy a file within a store or folder."""
    fs, place = fsspec.url_to_fs(address)
    target = fsspec.url_to_fs(to)[1]
    if not is_store(address):
        Path(target).parent.mkdir(parents=True, exist_ok=True)
    fs.cp_file(place, target)


def remove(address: str) -> None:
    """Delete a file."""
    fs, place = fsspec.url_to_fs(address)
    fs.rm_file(place)
