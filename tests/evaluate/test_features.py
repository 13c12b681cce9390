"""Features of a set. Oracle: each picture encoded on its own."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing
import webdataset as wds
from PIL import Image
from probe_sets import CLS, PatchModel, about, encoded, extract_on_rank, loader_of, to_integers, write_folder

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.sources import ImageFolderSource
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate import extraction as features_module
from open_clip_ov2.evaluate.attentive import AttentiveTraining, attentive_probe
from open_clip_ov2.evaluate.extraction import Features, available_bytes, cache_file, extract, stamp, zeros


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Seven pictures of three classes, one of them broken; a file that is no picture."""
    folder = write_folder(tmp_path / "set", {"cat": 3, "dog": 2, "eel": 2})
    (folder / "dog" / "00.png").write_bytes(b"not a picture")
    (folder / "dog" / "notes.txt").write_text("no picture")
    return folder


def assert_same(one: Features, other: Features) -> None:
    assert (one.keys, one.labels, one.skips) == (other.keys, other.labels, other.skips)
    assert torch.equal(one.values, other.values)


@pytest.mark.parametrize("kind", ["pooled", "tokens"])
@pytest.mark.parametrize("batch_size", [1, 3, 7])
def test_every_usable_picture_in_file_order(pictures: Path, kind: Any, batch_size: int) -> None:
    source, model = ImageFolderSource(pictures), PatchModel()
    found = extract(model, loader_of(source, batch_size=batch_size), kind=kind)
    assert found.keys == ("cat/00.png", "cat/01.png", "cat/02.png", "dog/01.png", "eel/00.png", "eel/01.png")
    assert found.labels == ("cat", "cat", "cat", "dog", "eel", "eel")
    assert found.skips == {"undecodable image": ["dog/00.png"]}
    encode = model.pooled if kind == "pooled" else model.tokens
    numbers = [0, 1, 2, 101, 200, 201]
    for value, number in zip(found.values, numbers, strict=True):
        image = to_integers(Image.open(io.BytesIO(encoded(number))))
        assert torch.equal(value, encode(image[None])[0])


def test_labels_from_tars_and_from_folders_are_the_same(tmp_path: Path) -> None:
    """Oracle: the same pictures by another source; a label in an entry, in JSON as text and as a number, and none."""
    folder = write_folder(tmp_path / "set", {"3": 2, "4": 1})
    numbers = [("3", 0), ("3", 1), ("4", 100)]
    tar = str(tmp_path / "a.tar")
    with wds.TarWriter(tar) as writer:
        for label, number in numbers:
            entries = {"png": encoded(number), "cls": label.encode(), "json": about(int(label))}
            writer.write({"__key__": f"{number:03d}", **entries})
    by_folder = extract(PatchModel(), loader_of(ImageFolderSource(folder)))
    for key in (CLS, CaptionKey("json", ("about", "label"))):
        by_tar = extract(PatchModel(), loader_of(WebDatasetSource((tar,)), group_by=key))
        assert by_tar.labels == by_folder.labels == ("3", "3", "4")
        assert torch.equal(by_tar.values, by_folder.values)
    assert extract(PatchModel(), loader_of(WebDatasetSource((tar,)), group_by=CaptionKey("none"))).labels == ("",) * 3


def test_two_processes_give_what_one_gives(pictures: Path, tmp_path: Path) -> None:
    """Oracle: one process, bit for bit, on both ranks."""
    torch.multiprocessing.start_processes(extract_on_rank, (2, pictures, tmp_path), nprocs=2, start_method="forkserver")
    for name, limit in (("all", None), ("one", 1)):
        for kind in ("pooled", "tokens"):
            alone = extract(PatchModel(), loader_of(ImageFolderSource(pictures), num_samples=limit), kind=kind)
            for rank in range(2):
                assert_same(Features(**torch.load(tmp_path / f"{name}-{kind}-{rank}.pt")), alone)
    assert len(list((tmp_path / "cache-0").iterdir())) == 2
    assert not (tmp_path / "cache-1").exists()


def test_a_cache_is_read_only_for_the_same_thing(pictures: Path, tmp_path: Path) -> None:
    """Oracle: a model that cannot encode gets the features all the same, but for another identity, kind or label."""

    class Mute(PatchModel):
        def pooled(self, images_BCHW: torch.Tensor) -> torch.Tensor:
            raise AssertionError("not from the cache")

    def cached(model: PatchModel, checkpoint: str = "one", **changed: Any) -> Features:
        loader = loader_of(ImageFolderSource(pictures), **changed)
        return extract(model, loader, cache=cache_file(tmp_path / "cache", "pooled", checkpoint, loader.fingerprint()))

    first = cached(PatchModel())
    assert_same(cached(Mute()), first)
    for changed in ({"checkpoint": "two"}, {"num_samples": 4}, {"group_by": CaptionKey("other")}):
        with pytest.raises(AssertionError, match="not from the cache"):
            cached(Mute(), **changed)
    for file in (tmp_path / "cache").iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(UserError, match=r"pooled-.*cannot be read.*delete the file"):
        cached(Mute())


def test_a_stamp_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "a"
    file.write_text("one")
    before = stamp([file, "pipe:cat a"])
    assert stamp([file, "pipe:cat a"]) == before
    file.write_text("three")
    assert stamp([file, "pipe:cat a"]) != before


def test_memory_that_is_not_there_is_said_before_it_is_taken(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: 7 samples x 4 tokens x 5 x 4 bytes = 560; without a count, each doubling is looked at."""
    model = PatchModel()
    monkeypatch.setattr(features_module, "available_bytes", lambda: 559)
    with pytest.raises(UserError, match=r"tokens features of 7 x 4 x 5 need .* free; keep them on disk"):
        extract(model, loader_of(ImageFolderSource(pictures)), kind="tokens")
    monkeypatch.setattr(features_module, "available_bytes", lambda: 560)
    assert len(extract(model, loader_of(ImageFolderSource(pictures)), kind="tokens")) == 6
    uncounted = loader_of(ImageFolderSource(pictures))
    uncounted.num_samples = 0  # as of a source that nobody has counted
    monkeypatch.setattr(features_module, "available_bytes", lambda: 479)
    with pytest.raises(UserError, match="tokens features of 6 x 4 x 5"):
        extract(model, uncounted, kind="tokens")


def test_features_on_disk_need_no_memory(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Oracle: those in memory; probes take them; no file is left; a disk too small, by the system's word."""
    usual = extract(PatchModel(), loader_of(ImageFolderSource(pictures)), kind="tokens")
    monkeypatch.setattr(features_module, "available_bytes", lambda: 0)
    found = extract(PatchModel(), loader_of(ImageFolderSource(pictures)), kind="tokens", disk=tmp_path / "disk")
    assert_same(found, usual)
    short = AttentiveTraining(epochs=1)
    assert attentive_probe(found, found, training=short) == attentive_probe(usual, usual, training=short)
    assert list((tmp_path / "disk").iterdir()) == []
    with pytest.raises(UserError, match=r"disk: no room for .* GB of features \(.*\); name another folder"):
        zeros((1 << 58,), tmp_path / "disk")


def test_available_memory_is_the_lesser_of_machine_and_container(tmp_path: Path) -> None:
    """Oracle: files as the kernel writes them."""
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal:  100 kB\nMemAvailable:   50 kB\n")
    assert available_bytes(meminfo, tmp_path) == 50 * 1024
    (tmp_path / "memory.current").write_text("20000\n")
    (tmp_path / "memory.stat").write_text("anon 1\ninactive_file 5000\n")
    for limit, free in (("max", 51200), ("30000", 15000), ("90000", 51200)):
        (tmp_path / "memory.max").write_text(limit + "\n")
        assert available_bytes(meminfo, tmp_path) == free
    assert available_bytes(tmp_path / "none", tmp_path / "none") is None
