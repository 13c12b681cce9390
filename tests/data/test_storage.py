"""Tars and sidecars in object stores. Oracle: the same files read from disk.

The store is moto's server, a real HTTP server that speaks S3, in a process of its own, and a proxy in front of it that
answers every tenth request with an error or breaks it off in the middle.
"""

from __future__ import annotations

import itertools
import os
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest
from square_shards import write_square_shards

from open_clip_ov2.cli import main as ov2
from open_clip_ov2.data import retries
from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import EvalLoader
from open_clip_ov2.data.shards import WebDatasetSource, expand_shards
from open_clip_ov2.data.sidecars import CaptionSet, begin_set, sidecar_path, write_sidecar
from open_clip_ov2.data.skips import SkipCounter
from open_clip_ov2.data.tars import read_tar
from open_clip_ov2.errors import UserError

BUCKET, EVERY = "shards", 10
ENVIRONMENT = {
    "AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_DEFAULT_REGION": "us-east-1",
    "AWS_MAX_ATTEMPTS": "1",  # so that it is our retries that are tested, not botocore's
}  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    """Address of an S3 server."""
    port = free_port()
    command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(address, timeout=1).close()
            break
        except (urllib.error.URLError, OSError):
            time.sleep(0.1)
    yield address
    process.kill()
    process.wait()


class Unreliable(ThreadingHTTPServer):
    """Passes GET and HEAD on to a server; of every EVERY requests one is answered with 500 or half its body."""

    def __init__(self, behind: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.behind, self.broken, self.numbers = behind, 0, itertools.count(1)
        self.always = False
        threading.Thread(target=self.serve_forever, daemon=True).start()


class _Handler(BaseHTTPRequestHandler):
    server: Unreliable
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        number = next(self.server.numbers)
        fails = number % EVERY == 0 or self.server.always
        self.server.broken += fails
        if fails and number // EVERY % 2 == 0:
            self.send_error(500)
            return
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        request = urllib.request.Request(self.server.behind + self.path, headers=headers, method=self.command)
        try:
            answer = urllib.request.urlopen(request)
        except urllib.error.HTTPError as error:
            answer = error
        body = answer.read()
        self.send_response(answer.status)
        for name, value in answer.headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body[: len(body) // 2] if fails else body)
        if fails:
            self.close_connection = True

    do_HEAD = do_GET

    def log_message(self, *_: Any) -> None:
        pass


def make_set(folder: Path, tars: list[Path]) -> None:
    begin_set(folder, {"made_by": "a test"})
    for tar in tars:
        keys = [sample["__key__"] for sample in read_tar(str(tar), pytest.fail)]
        write_sidecar(sidecar_path(folder, str(tar)), ({"key": key, "caption": f"{key} in words"} for key in keys))


@pytest.fixture
def stored(moto: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Unreliable]:
    """A folder with in/*.tar and captions/, which are in the bucket too; the proxy that s3fs reads through."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    tars = write_square_shards(tmp_path / "in", 3, 8)
    make_set(tmp_path / "captions", tars)
    upload = fsspec.filesystem("s3", endpoint_url=moto, skip_instance_cache=True)
    if not upload.exists(BUCKET):
        upload.mkdir(BUCKET)
    for path in (*tars, *(tmp_path / "captions").iterdir()):
        upload.put_file(str(path), f"{BUCKET}/{path.parent.name}/{path.name}")
    proxy = Unreliable(moto)
    monkeypatch.setenv("AWS_ENDPOINT_URL_S3", f"http://127.0.0.1:{proxy.server_port}")
    monkeypatch.setattr(retries, "WAITS_S", (0.01, 0.02, 0.04, 0.08))
    monkeypatch.setattr(retries, "BUFFER", 4096)
    fsspec.filesystem("s3").clear_instance_cache()
    return tmp_path, proxy


def test_every_tenth_request_fails_and_every_sample_arrives(stored: tuple[Path, Unreliable]) -> None:
    folder, proxy = stored
    urls = expand_shards(f"s3://{BUCKET}/in/{{00000..00002}}.tar")[0]
    skips = SkipCounter(log=False)
    found = list(WebDatasetSource(urls, captions=(CaptionSet("recap", f"s3://{BUCKET}/captions/"),)).in_order(skips))
    local = tuple(str(folder / "in" / f"0000{number}.tar") for number in range(3))
    wanted = list(WebDatasetSource(local, captions=(CaptionSet("recap", f"{folder}/captions"),)).in_order())
    assert [one | {"__url__": ""} for one in found] == [one | {"__url__": ""} for one in wanted]
    assert not skips.total
    assert proxy.broken >= 3
    loader = EvalLoader(
        WebDatasetSource(urls), lambda image: storage_tensor(), batch_size=4, num_workers=2,
        caption_keys=parse_caption_keys("txt"),
    )  # fmt: skip
    assert sum(len(batch.keys) for batch in loader) == 24  # data workers open the store anew


def storage_tensor() -> Any:
    import torch

    return torch.zeros(3, 2, 2)


def test_a_store_that_does_not_recover_costs_its_shards(stored: tuple[Path, Unreliable]) -> None:
    _, proxy = stored
    proxy.always = True
    skips = SkipCounter(log=False, keep_keys=True)
    urls = (f"s3://{BUCKET}/in/00000.tar", f"s3://{BUCKET}/in/nowhere.tar")
    assert list(WebDatasetSource(urls).in_order(skips)) == []
    assert skips.take_keys() == {"broken shard": list(urls)}


def test_a_join_reads_tars_and_tables_from_a_store(
    moto: str, stored: tuple[Path, Unreliable], capsys: pytest.CaptureFixture[str]
) -> None:
    """Oracle: the same join from disk, byte for byte; every tenth request fails, those of the tables too."""
    import pandas as pd

    folder, proxy = stored
    upload = fsspec.filesystem("s3", endpoint_url=moto, skip_instance_cache=True)
    (folder / "recap").mkdir()
    for number, sample in enumerate(read_tar(str(folder / "in" / "00000.tar"), pytest.fail)):
        table = pd.DataFrame({"key": [sample["__key__"]], "re_caption": [f"{sample['__key__']} again"]})
        table.to_parquet(folder / "recap" / f"{number}.parquet")
        upload.put_file(str(folder / "recap" / f"{number}.parquet"), f"{BUCKET}/recap/{number}.parquet")
    for out, shards in (("from-disk", str(folder)), ("from-store", f"s3://{BUCKET}")):
        command = ["captions", "join", f"{shards}/in/00000.tar", "--captions", f"{shards}/recap/*.parquet"]
        assert ov2([*command, "--column", "re_caption", "--out", str(folder / out)]) == 0, capsys.readouterr().err
    name = "00000.jsonl.gz"
    assert (folder / "from-store" / name).read_bytes() == (folder / "from-disk" / name).read_bytes()
    assert proxy.broken >= 3


def test_mistakes_are_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the message. A package that is not installed is named."""
    monkeypatch.setitem(sys.modules, "adlfs", None)
    with pytest.raises(UserError, match=r"abfs: is read with adlfs, which is not installed.*pip install adlfs"):
        expand_shards("abfs://c/0.tar")
    with pytest.raises(UserError, match="nfs4: cannot be opened"):
        expand_shards("nfs4://c/0.tar")
    fsspec.filesystem("memory").pipe_file("/set/0.jsonl.gz", b"")
    with pytest.raises(UserError, match=r"has no settings\.json"):
        WebDatasetSource(("0.tar",), captions=(CaptionSet("recap", "memory://set"),))
    assert os.environ.get("AWS_ENDPOINT_URL_S3") is None
