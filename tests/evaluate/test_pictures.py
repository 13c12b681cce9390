"""Every way to name images for `ov2 caption`. Oracle: the color of each image, and the bad ones by name."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from open_clip_ov2.data.skips import SkipCounter
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.pictures import pictures

RED, BLUE = (255, 0, 0), (0, 0, 255)


def png(color: tuple[int, int, int]) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), color).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {"a.png": png(RED), "b.png": b"no image", "c.png": b"", "d.png": png(BLUE)}


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("place")
    for name, data in FILES.items():
        for file in (place / "folder" / name[0] / name, place / "files" / name):
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_bytes(data)
    (place / "folder" / ".hidden").mkdir()
    (place / "folder" / ".hidden" / "x.png").write_bytes(b"of a viewer")
    (place / "folder" / "._a.png").write_bytes(b"of a Mac")
    (place / "bare").write_bytes(FILES["a.png"])
    (place / "0.tar").write_bytes(tar_of({name: FILES[name] for name in ("a.png", "b.png")}))
    (place / "1.tar").write_bytes(tar_of({name: FILES[name] for name in ("c.png", "d.png")}))
    (place / "upper.tar").write_bytes(
        tar_of({"a.JPG": FILES["a.png"], "b.txt": b"alone", "c.jpg": b"", "d.jpg": png(BLUE)})
    )
    (place / "all.tar.gz").write_bytes(tar_of(FILES, "w:gz"))
    (place / "tar with no ending").write_bytes(tar_of(FILES))
    (place / "torn.tar").write_bytes(tar_of({"a.png": png(RED), "d.png": png(BLUE)})[: 512 * 3 + 9])
    for name, separator in (("tab.csv", "\t"), ("comma.csv", ","), ("tab.tsv", "\t")):
        rows = [separator.join(("filepath", "title")), *(f"files/{file}{separator}of {file}" for file in FILES)]
        (place / name).write_text("\n".join(rows) + "\n")
    (place / "plain.csv").write_text("picture\n" + "\n".join(f"files/{file}" for file in FILES) + "\n")
    (place / "empty").mkdir()
    return place


TWO_BAD = {"undecodable image": 2}


@pytest.mark.parametrize(
    ("paths", "bad"),
    [
        (["files/a.png", "files/b.png", "files/c.png", "files/d.png"], TWO_BAD),
        (["bare", "files/d.png"], {}),
        (["folder"], TWO_BAD),
        (["0.tar", "1.tar"], TWO_BAD),
        (["{0..1}.tar"], TWO_BAD),
        (["0.tar::1.tar"], TWO_BAD),
        (["upper.tar"], {"undecodable image": 1, "missing image": 1}),
        (["all.tar.gz"], TWO_BAD),
        (["tar with no ending"], TWO_BAD),
        (["pipe:cat 0.tar", "pipe:cat 1.tar"], TWO_BAD),
        (["torn.tar", "files/d.png"], {"broken shard": 1}),
        (["tab.csv"], TWO_BAD),
        (["comma.csv"], TWO_BAD),
        (["tab.tsv"], TWO_BAD),
        (["plain.csv"], TWO_BAD),
    ],
    ids=lambda value: " ".join(value),
)
def test_every_way_in(
    place: Path,
    paths: list[str],
    bad: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No sample has a caption, and in each place two cannot be used."""
    monkeypatch.chdir(place)
    skips = SkipCounter(keep_keys=True)
    found = list(pictures(paths, skips=skips))
    assert [one.image.getpixel((10, 10)) for one in found] == [RED, BLUE]
    assert skips.total == bad
    named = [key for keys in skips.take_keys().values() for key in keys]
    assert len(named) == len(caplog.records) == sum(bad.values())
    assert all(any(key in record.getMessage() for record in caplog.records) for key in named)


@pytest.fixture
def standard_input() -> Iterator[int]:
    """What is written to it comes from file descriptor 0."""
    read, write = os.pipe()
    before = os.dup(0)
    os.dup2(read, 0)
    os.close(read)
    yield write
    os.dup2(before, 0)
    os.close(before)


@pytest.mark.parametrize("data", [FILES["a.png"], tar_of({"a.png": FILES["a.png"], "b.png": b""})], ids=["png", "tar"])
def test_standard_input_and_pipes(data: bytes, standard_input: int) -> None:
    """As `ov2 caption - < FILE` and `ov2 caption <(COMMAND)` have them."""
    os.write(standard_input, data)
    os.close(standard_input)
    (one,) = pictures(["-"])
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    (other,) = pictures([f"/dev/fd/{read}"])
    assert one.image.getpixel((0, 0)) == other.image.getpixel((0, 0)) == RED


def test_true_captions_are_those_that_there_are(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    assert [one.captions for one in pictures(["comma.csv"], "title")] == [("of a.png",), ("of d.png",)]
    assert [one.captions for one in pictures(["comma.csv", "0.tar", "files/a.png"])] == [()] * 4


def test_every_nth_of_all(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Those between are not even decoded."""
    monkeypatch.chdir(place)
    skips = SkipCounter()
    assert len(list(pictures(["files", "{0..1}.tar"], every=3, skips=skips))) == 2
    assert skips.total == {"undecodable image": 1}


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nowhere.png", "nowhere.png: no such file or folder"),
        ("nowhere.tar", "do not exist: nowhere.tar"),
        ("empty", "empty: no image in this folder"),
        ("nowhere://a.tar", "nowhere: cannot be opened"),
    ],
)
def test_a_path_that_cannot_be_is_an_error_before_anything_is_captioned(
    place: Path, path: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(place)
    with pytest.raises(UserError, match=message):
        pictures(["files/a.png", path])
