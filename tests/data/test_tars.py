"""Reading tars without tarfile. Oracle: webdataset's own reader on the same bytes."""

from __future__ import annotations

import io
import random
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import webdataset as wds
from broken_shards import byte_tokens, to_tensor
from webdataset.tariterators import group_by_keys, tar_file_expander

from open_clip_ov2.cli import main
from open_clip_ov2.data import tars
from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import EvalLoader, TrainLoader
from open_clip_ov2.data.samples import encoded_image
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.skips import SkipSample
from open_clip_ov2.data.tars import APART, TarStream, plain_files, read_tar
from open_clip_ov2.errors import UserError

FILES = [
    ("0.txt", b"zero"),
    ("0.jpg", bytes(range(1, 201)) * 4),
    ("1.txt", b""),
    ("1.jpg", b"x" * 512),
    ("dir/2.txt", b"two"),
]


def info_of(name: str, data: bytes, **changed: Any) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for key, value in changed.items():
        setattr(info, key, value)
    return info


def built(files: list[tuple[str, bytes]], tar_format: int, changes: dict[str, dict[str, Any]] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tar_format) as tar:
        for name, data in files:
            tar.addfile(info_of(name, data, **(changes or {}).get(name, {})), io.BytesIO(data))
    return buffer.getvalue()


def slow(data: bytes) -> list[dict[str, Any]]:
    """Samples by webdataset and tarfile alone."""
    found: list[dict[str, Any]] = []
    files = tar_file_expander([{"url": "u", "stream": io.BytesIO(data)}], handler=lambda _: True)
    found += group_by_keys(files, handler=lambda _: True)
    return found


def fast(data: bytes, folder: Path) -> tuple[list[dict[str, Any]], int]:
    (folder / "t.tar").write_bytes(data)
    broken: list[str] = []
    samples = list(read_tar(str(folder / "t.tar"), broken.append))
    return [{**sample, "__url__": "u"} for sample in samples], len(broken)


def not_read(data: bytes) -> bool:
    stream = TarStream(io.BytesIO(data), "u")
    list(plain_files(stream, "u"))
    return stream.put_back_some


LONG = "long/" + "n" * 150 + ".txt"
CASES: dict[str, tuple[Callable[[], bytes], bool]] = {  # bytes, and whether tarfile is asked
    "ustar": (lambda: built(FILES, tarfile.USTAR_FORMAT), False),
    "gnu": (lambda: built(FILES, tarfile.GNU_FORMAT), False),
    "pax": (lambda: built(FILES, tarfile.PAX_FORMAT), False),
    "pax with times": (lambda: built(FILES, tarfile.PAX_FORMAT, {n: {"mtime": 1.7e9 + 0.1} for n, _ in FILES}), False),
    "meta": (lambda: built([("__meta__", b"m"), ("__a__/b.txt", b"m"), *FILES], tarfile.USTAR_FORMAT), False),
    "folders": (lambda: built([("dir", b""), *FILES], tarfile.GNU_FORMAT, {"dir": {"type": tarfile.DIRTYPE}}), False),
    "umlaut": (lambda: built([("\u00e4.txt", b"a"), *FILES], tarfile.GNU_FORMAT), False),
    "old type": (lambda: built(FILES, tarfile.USTAR_FORMAT, {"0.jpg": {"type": tarfile.AREGTYPE}}), False),
    "pax umlaut": (lambda: built([*FILES, ("\u00e4.txt", b"a")], tarfile.PAX_FORMAT), True),
    "long name, pax": (lambda: built([*FILES, (LONG, b"long"), ("z.txt", b"z")], tarfile.PAX_FORMAT), True),
    "long name, gnu": (lambda: built([*FILES, (LONG, b"long"), ("z.txt", b"z")], tarfile.GNU_FORMAT), True),
    "prefix": (lambda: built([*FILES, (LONG.replace("nnn", "n/n"), b"p")], tarfile.USTAR_FORMAT), True),
    "link": (lambda: built(FILES, tarfile.GNU_FORMAT, {"1.txt": {"type": tarfile.SYMTYPE, "linkname": "0.txt"}}), True),
    "nothing": (lambda: bytes(10240), False),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_samples_are_webdatasets(name: str, tmp_path: Path) -> None:
    make, asked = CASES[name]
    data = make()
    assert fast(data, tmp_path) == (slow(data), 0)
    assert not_read(data) == asked


def test_what_the_writer_of_webdataset_makes_is_plain(tmp_path: Path) -> None:
    with wds.TarWriter(str(tmp_path / "w.tar")) as tar:
        for number in range(3):
            tar.write({"__key__": f"k{number}", "txt": f"text {number}", "jpg": bytes(600 * number)})
    data = (tmp_path / "w.tar").read_bytes()
    assert len(slow(data)) == 3
    assert fast(data, tmp_path) == (slow(data), 0)
    assert not not_read(data)


def test_damage_anywhere_is_judged_as_tarfile_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: the same with every byte left to tarfile, for cuts and flipped bits: its samples, and every break that
    it notices. (It reads 10 KB ahead, and so misses some that come shortly before the end.) A cut is always noticed.
    """
    whole = built(FILES, tarfile.PAX_FORMAT, {"0.jpg": {"mtime": 1.5}, "1.txt": {"mtime": 2.5}})
    end = len(whole.rstrip(b"\0"))
    rng, damaged = random.Random(0), []
    for place in [*range(0, end, 256), *rng.choices(range(end), k=200)]:
        flipped = bytearray(whole)
        flipped[place] ^= 1 << rng.randrange(8)
        damaged += [whole[:place], bytes(flipped)]
    found = [fast(data, tmp_path) for data in damaged]
    monkeypatch.setattr(tars, "plain_files", lambda stream, url: iter(stream.put_back(stream.read(1)) or ()))
    for index, data in enumerate(damaged):
        samples, broken = fast(data, tmp_path)
        assert found[index][0] == samples, index
        assert broken <= found[index][1] <= 1, index
        assert found[index][1] == 1 or index % 2 == 1, index
    assert {len(samples) for samples, _ in found} >= {0, 1, 2, 3}


def test_files_of_a_sample_that_are_apart_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All images first, then all captions. Oracle: the same files sorted, in which nothing is wrong."""
    files = [(f"{n:03d}.jpg", b"x" * 20) for n in range(3)] + [(f"{n:03d}.txt", b"a") for n in range(3)]
    for name, members, reasons in (("apart", files, 1), ("sorted", sorted(files), 0)):
        path = tmp_path / f"{name}.tar"
        path.write_bytes(built(members, tarfile.USTAR_FORMAT))
        broken: list[str] = []
        samples = list(read_tar(str(path), broken.append))
        assert len(samples) == (6 if reasons else 3)
        assert [APART in reason for reason in broken] == [True] * reasons
    assert main(["shards", "resize", str(tmp_path / "apart.tar"), str(tmp_path / "out")]) == 2
    assert "tar --sort=name" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


def test_names_with_dots_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`img.000.jpg` is the entry `000.jpg` of the sample `img`."""
    (tmp_path / "t.tar").write_bytes(built([(f"img.{n:03d}.jpg", b"x") for n in range(3)], tarfile.USTAR_FORMAT))
    (sample,) = read_tar(str(tmp_path / "t.tar"), pytest.fail)
    with pytest.raises(SkipSample, match=r"000\.jpg.*without further dots"):
        encoded_image(sample)
    assert main(["shards", "resize", str(tmp_path / "t.tar"), str(tmp_path / "out")]) == 2
    assert "without further dots" in capsys.readouterr().err
    assert not list((tmp_path / "out").glob("*.tar"))


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["{n:03d}.{suffix}", "img.{n:03d}.{suffix}"])
def test_the_last_error_says_how_to_write_the_tar(name: str, workers: int, tmp_path: Path) -> None:
    """All images first, then all captions; names with dots. Oracle: the remedy, by hand, of training and evaluation."""
    files = [(name.format(n=n, suffix=suffix), b"x") for suffix in ("jpg", "txt") for n in range(3)]
    (tmp_path / "t.tar").write_bytes(built(files, tarfile.USTAR_FORMAT))
    source = WebDatasetSource((str(tmp_path / "t.tar"),) * max(1, workers))
    usual: dict[str, Any] = {"batch_size": 2, "num_workers": workers, "caption_keys": (CaptionKey("txt"),)}
    loaders = (
        TrainLoader(source, to_tensor, byte_tokens, seed=0, rank=0, world_size=1, num_samples=4, **usual),
        EvalLoader(source, to_tensor, byte_tokens, named=("evaluation", "--data"), **usual),
    )
    for loader, flag in zip(loaders, ("--train-data", "--data"), strict=True):
        with pytest.raises(UserError, match="no usable sample") as caught:
            list(loader)
        assert ("without further dots" if "img" in name else "tar --sort=name") in str(caught.value)
        assert f"check {flag} and" in str(caught.value)
