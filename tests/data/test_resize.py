"""`ov2 shards resize` on real tars, whole, stopped and broken."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset as wds
from broken_shards import cut, write_tar
from PIL import Image, ImageOps

from open_clip_ov2.cli import main
from open_clip_ov2.data.resize import LEDGER, SIZES, Resize, Shrink
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sidecars import shard_names
from open_clip_ov2.errors import InUse, UserError

SIDE = 32
SHRINK = Shrink(SIDE, 90, 10**6)


def gradient(number: int, width: int, height: int) -> Image.Image:
    """Smooth, so that a second resampling of it comes out alike; lighter to the right, greener downwards."""
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    pixels = np.stack([200 * across, 180 * down, np.full_like(across, 20 * (number % 10))], axis=-1)
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def turned(width: int, height: int, orientation: int) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(gradient(3, width, height), "jpeg", quality=95, exif=exif)


GOOD: dict[str, tuple[str, bytes]] = {
    "a/jpg": ("jpg", encoded(gradient(0, 300, 200), "jpeg", quality=95)),
    "a/upper": ("JPEG", encoded(gradient(1, 100, 333), "jpeg", quality=95)),
    "a/png": ("png", encoded(gradient(2, 90, 70), "png")),
    "a/clear": ("png", encoded(gradient(2, 90, 70).convert("RGBA"), "png")),
    "a/palette": ("png", encoded(gradient(2, 90, 70).convert("P"), "png")),
    "a/grey": ("jpg", encoded(gradient(3, 80, 80).convert("L"), "jpeg", quality=95)),
    "a/cmyk": ("jpg", encoded(gradient(3, 80, 80).convert("CMYK"), "jpeg", quality=95)),
    "a/webp": ("webp", encoded(gradient(4, 64, 128), "webp", quality=95)),
    "a/strip": ("png", encoded(gradient(5, 2000, 33), "png")),
    "a/small": ("jpg", encoded(gradient(6, 40, 31), "jpeg")),
    "a/turned": ("jpg", turned(120, 60, 6)),
    "a/small turned": ("jpg", turned(20, 30, 8)),
}
BAD = {
    "b/cut": GOOD["a/jpg"][1][:-200],
    "b/nonsense": b"nonsense",
    "b/too large": encoded(Image.new("1", (1001, 1000)), "png"),
}


def tar_of(path: Path, pictures: dict[str, tuple[str, bytes]]) -> Path:
    about = b'{"width": 300,  "note": "spaces  stay"}\n'
    return write_tar(
        path,
        [
            [
                (f"{key}.{suffix}", data),
                (f"{key}.txt", f"caption of {key} \xe9\n".encode("latin-1")),
                (f"{key}.json", about),
            ]
            for key, (suffix, data) in pictures.items()
        ],
    )


def read(*tars: Path) -> dict[str, dict[str, bytes]]:
    """By webdataset's own reader: key -> entries."""
    samples = list(wds.WebDataset([str(tar) for tar in tars], shardshuffle=False))
    return {s["__key__"]: {k: v for k, v in s.items() if not k.startswith("__")} for s in samples}


def many(folder: Path, shards: int = 3, samples: int = 6) -> list[Path]:
    data = [encoded(gradient(n, 200, 150), "jpeg") for n in range(shards * samples)]
    return [
        tar_of(folder / f"{s:03d}.tar", {f"{s}-{n}": ("jpg", data[s * samples + n]) for n in range(samples)})
        for s in range(shards)
    ]


def resized(urls: list[str], out: Path, workers: int = 1) -> Resize:
    with Resize(urls, out, SHRINK) as resize:
        list(resize.run(workers))
        resize.finish()
    return resize


def test_pictures_shrink_and_all_else_stays(tmp_path: Path) -> None:
    """Oracles: webdataset's reader; PIL's own bicubic resize of the upright original."""
    before, out = tar_of(tmp_path / "in" / "000.tar", GOOD), tmp_path / "out"
    resized([str(before)], out)
    old, new = read(before), read(out / "000.tar")
    assert list(old) == list(new) == list(GOOD)
    assert json.loads((out / SIZES).read_text()) == {"000.tar": len(GOOD)}
    assert WebDatasetSource((str(out / "000.tar"),)).count() == len(GOOD)
    for key, entries in new.items():
        assert entries.keys() == old[key].keys()
        assert all(entries[name] == old[key][name] for name in ("txt", "json"))
        suffix = GOOD[key][0].lower()
        was, now = Image.open(io.BytesIO(old[key][suffix])), Image.open(io.BytesIO(entries[suffix]))
        assert now.format == was.format
        assert now.getexif().get(0x0112, 1) == 1
        upright = ImageOps.exif_transpose(was)
        scale = min(1.0, SIDE / min(upright.size))
        assert now.size == tuple(round(side * scale) for side in upright.size)
        over_white = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright.convert("RGBA"))
        expected = np.asarray(over_white.convert("RGB").resize(now.size, Image.Resampling.BICUBIC), dtype=int)
        assert np.abs(np.asarray(now.convert("RGB"), dtype=int) - expected).mean() < 6, key
    assert new["a/small"] == old["a/small"]  # nothing to do: the same bytes
    assert Image.open(io.BytesIO(new["a/clear"]["png"])).mode == "RGB"


def test_what_cannot_be_decoded_is_left_out_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the keys put in."""
    pictures = {"a/jpg": GOOD["a/jpg"], **{key: ("jpg", data) for key, data in BAD.items()}, "b/none": ("cls", b"1")}
    source, out = tar_of(tmp_path / "000.tar", pictures), tmp_path / "out"
    flags = ["--short-side", str(SIDE), "--max-image-pixels", "1000000"]
    assert main(["shards", "resize", *flags, str(source), str(out)]) == 0
    assert list(read(out / "000.tar")) == ["a/jpg"]
    assert json.loads((out / SIZES).read_text()) == {"000.tar": 1}
    report = json.loads((out / LEDGER).read_text().splitlines()[1])
    assert {key: cause for key, cause, _ in report["dropped"]} == {
        "b/cut": "undecodable image", "b/nonsense": "undecodable image", "b/too large": "too many pixels",
        "b/none": "missing image",
    }  # fmt: skip
    shown = " ".join(capsys.readouterr().out.split())
    assert "2 undecodable image" in shown
    assert "b/nonsense" in shown
    assert "5 read = 1 written + 4 left out" in shown


def in_a_child(work: Callable[..., Any], *args: Any) -> int | None:
    child = multiprocessing.get_context("fork").Process(target=work, args=args)
    child.start()
    child.join(60)
    return child.exitcode


def test_killed_in_the_middle_of_a_shard_the_same_command_goes_on(tmp_path: Path) -> None:
    """Oracle: the run that was not killed, byte for byte; the shard that was whole is not made again."""
    tars = many(tmp_path / "in")
    flag, second = tmp_path / "flag", tars[1]
    # The first time it is read, half of it comes, and then KILL for whoever reads.
    pipe = (
        f"pipe:if mkdir {flag} 2>/dev/null; then head -c {second.stat().st_size // 2} {second}; sleep 0.3; "
        f"kill -9 $PPID; else cat {second}; fi; : {second}"
    )
    urls, out = [str(tars[0]), pipe, str(tars[2])], tmp_path / "out"
    assert in_a_child(resized, urls, out) == -9
    left = sorted(path.name for path in out.iterdir())
    assert left[0] == ".lock"
    assert left[1].startswith(".tmp-001.tar.")
    assert left[2:] == ["000.tar", LEDGER]
    first = (out / "000.tar").stat()
    with open(out / LEDGER, "a") as ledger:
        ledger.write('{"name": "001.tar", "sour')  # killed while a line was written
    resized(urls, out)
    assert (out / "000.tar").stat() == first
    resized([str(tar) for tar in tars], tmp_path / "whole")
    assert sorted(path.name for path in out.iterdir()) == ["000.tar", "001.tar", "002.tar", LEDGER, SIZES]
    for name in ("000.tar", "001.tar", "002.tar", SIZES):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert len((out / LEDGER).read_text().splitlines()) == 4


def test_any_number_of_processes_gives_the_same(tmp_path: Path) -> None:
    """Oracle: one process, byte for byte."""
    tars = [str(tar) for tar in many(tmp_path / "in")]
    for workers in (1, 2):
        resized(tars, tmp_path / str(workers), workers)
    for name in ("000.tar", "001.tar", "002.tar", SIZES):
        assert (tmp_path / "1" / name).read_bytes() == (tmp_path / "2" / name).read_bytes()


def fill_the_disk(urls: list[str], out: Path) -> None:
    """A limit on the size of files: the real error of a write, without a disk to fill."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
    try:
        resized(urls, out)
    except UserError as error:
        raise SystemExit(3 if "001.tar: cannot be written" in str(error) and "\n" not in str(error) else 4) from None


def test_a_full_disk_is_one_line_and_what_is_whole_stays(tmp_path: Path) -> None:
    """Oracles: the exit status that the child chose by the message; the files."""
    small, large = many(tmp_path / "a", 1, 2)[0], many(tmp_path / "b", 2, 20)[1]
    out = tmp_path / "out"
    assert in_a_child(fill_the_disk, [str(small), str(large)], out) == 3
    assert sorted(path.name for path in out.iterdir()) == ["000.tar", LEDGER]
    resized([str(small), str(large)], out)
    assert json.loads((out / SIZES).read_text()) == {"000.tar": 2, "001.tar": 20}
    whole = (out / "001.tar").read_bytes()
    cut(out / "001.tar", 20_000)  # as an interrupted copy of the folder leaves it
    resized([str(small), str(large)], out)
    assert (out / "001.tar").read_bytes() == whole


def test_a_cut_shard_is_used_as_far_as_it_goes_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: the samples before the cut."""
    tar = many(tmp_path / "in", 1, 6)[0]
    cut(tar, tar.stat().st_size // 2)
    assert main(["shards", "resize", str(tar), str(tmp_path / "out")]) == 0
    assert "is broken" in " ".join(capsys.readouterr().out.split())
    found = list(read(tmp_path / "out" / "000.tar"))
    assert 0 < len(found) < 6
    assert found == [f"0-{n}" for n in range(len(found))]


def test_slips_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Oracle: what is wrong and what to do, in the message."""
    tars = many(tmp_path / "in", 2, 2)
    out = tmp_path / "out"
    resized([str(tars[0])], out)
    empty = tmp_path / "empty.tar"
    empty.write_bytes(b"nothing" * 300)
    (tmp_path / "file").write_text("")
    braces = str(tmp_path / "in" / "{000..001}.tar")
    same = ["--short-side", "32", "--max-image-pixels", "1000000"]
    cases = [
        ([braces, str(tmp_path / "in")], "holds other files"),
        ([braces, str(out), *same, "--quality", "80"], "was begun with quality 90, not 80"),
        ([str(many(tmp_path / "other", 1, 2)[0]), str(out), *same], "was made of"),
        ([f"{tars[0]}::{tars[0]}", str(tmp_path / "x")], "the same name"),
        ([str(tmp_path / "nowhere.tar"), str(out)], "do not exist"),
        ([braces, str(tmp_path / "x"), "--quality", "0"], "--quality: 0: expected an integer from 1 to 95"),
        ([braces, str(tmp_path / "file")], "cannot be used"),
        ([str(empty), str(tmp_path / "x")], "nothing in it can be read"),
        ([braces], "ov2 shards resize:"),
    ]
    for argv, message in cases:
        assert main(["shards", "resize", *argv]) == 2, argv
        error = capsys.readouterr().err.strip()
        assert message in error
        assert "\n" not in error
    with Resize([str(tars[0])], out, SHRINK), pytest.raises(InUse, match=f"process {os.getpid()} on "):
        Resize([str(tars[0])], out, SHRINK).__enter__()
    (out / LEDGER).write_text("nonsense\n")
    with pytest.raises(UserError, match=f"{LEDGER}: damaged; start again"):
        resized([str(tars[0])], out)


def test_more_shards_may_come_later_and_names_are_found(tmp_path: Path) -> None:
    """Oracles: the sizes of both sittings, and braces and :: as for --train-data; names written by hand."""
    tars = many(tmp_path / "in", 4, 2)
    flags = ["--short-side", str(SIDE), "--max-image-pixels", str(SHRINK.max_image_pixels)]
    resized([str(tars[0])], tmp_path / "out")
    several = [f"{tmp_path}/in/{{001..002}}.tar::{tars[0]}", str(tars[3])]
    assert main(["shards", "resize", *flags, *several, str(tmp_path / "out")]) == 0
    assert json.loads((tmp_path / "out" / SIZES).read_text()) == {f"00{n}.tar": 2 for n in range(4)}
    urls = ["https://x.org/a/0.tar", "pipe:aws s3 cp s3://b/1.tar -; : s3://b/1.tar", "2.tar.gz", "3.tgz"]
    assert list(shard_names(urls)) == ["0", "1", "2", "3"]
    with pytest.raises(UserError, match="does not end in a tar's name"):
        shard_names(["pipe:cat x/"])
