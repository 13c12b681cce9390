"""Pictures by class, and evaluation without captions."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_shards import TXT, byte_tokens, good_tars, picture, settings, to_tensor

from open_clip_ov2.data.captions import CaptionKey
from open_clip_ov2.data.loader import EvalLoader, TrainLoader
from open_clip_ov2.data.order.assignment import Assignment
from open_clip_ov2.data.shards import WebDatasetSource
from open_clip_ov2.data.skips import MISSING_CAPTION, UNDECODABLE_IMAGE, SkipCounter
from open_clip_ov2.data.sources import ImageFolderSource
from open_clip_ov2.errors import UserError

CLS = CaptionKey("cls")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two classes with pictures, one of which is broken, some deeper; files and folders that are none."""
    pictures = ["b/1.png", "b/deep/2.PNG", "a/3.png", "a/bad.jpg", "a/.hidden.png", ".hid/4.png", "5.png", "c/no.txt"]
    for number, name in enumerate(pictures):
        path = tmp_path / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"none" if "bad" in name else picture(number))
    return tmp_path / "set"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_classes_are_folders(folder: Path, num_workers: int) -> None:
    """Oracle: the files, by hand."""
    source = ImageFolderSource(folder)
    assert source.count() == 4
    loader = EvalLoader(source, to_tensor, batch_size=2, num_workers=num_workers, group_by=CLS)
    batches = list(loader)
    rows = [
        row for batch in batches for row in zip(batch.indices, batch.keys, batch.groups, batch.captions, strict=True)
    ]
    assert sorted(rows) == [(0, "a/3.png", "a", ""), (2, "b/1.png", "b", ""), (3, "b/deep/2.PNG", "b", "")]
    assert loader.skips == {UNDECODABLE_IMAGE: 1}
    assert all(batch.texts_BL.shape == (len(batch.keys), 0) for batch in batches)
    assert source.place(3) == str(folder / "b/deep/2.PNG")


def test_a_folder_trains_like_any_source(folder: Path) -> None:
    """Oracle: every picture once in a pass over two consumers; classes as captions."""
    source = ImageFolderSource(folder)
    shares = [Assignment(0, 0, 0, consumer, 2, 4) for consumer in range(2)]
    keys = [raw["__key__"] for share in shares for raw in source.train_samples(share, SkipCounter())]
    assert sorted(keys) == source.names
    (batch,) = TrainLoader(source, to_tensor, byte_tokens, **settings(batch_size=3, num_samples=3, caption_keys=(CLS,)))
    assert sorted(batch.captions) == ["a", "b", "b"]
    before = source.fingerprint()
    assert ImageFolderSource(folder).fingerprint() == before
    (folder / "b" / "1.png").rename(folder / "b" / "7.png")
    assert ImageFolderSource(folder).fingerprint() != before


def test_a_set_without_captions_is_evaluated_only_where_none_are_asked_for(tmp_path: Path) -> None:
    """Oracle: pictures of a set with captions, without them; the same loader with caption keys skips what has none."""
    source = WebDatasetSource(good_tars(tmp_path, [3]))
    (plain,) = EvalLoader(source, to_tensor, batch_size=8, num_workers=0)
    (captioned,) = EvalLoader(source, to_tensor, byte_tokens, batch_size=8, num_workers=0, caption_keys=TXT)
    assert plain.keys == captioned.keys
    assert plain.images_BCHW.equal(captioned.images_BCHW)
    assert plain.captions == ["", "", ""]
    assert captioned.captions[0] == "caption 0"
    loader = EvalLoader(source, to_tensor, batch_size=8, num_workers=0, caption_keys=(CLS,))
    with pytest.raises(UserError, match=f"3 {MISSING_CAPTION}"):
        list(loader)


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such folder; expected a folder with one folder for each class"):
        ImageFolderSource(tmp_path / "none")
    (tmp_path / "x.png").write_bytes(picture())
    with pytest.raises(UserError, match=r"no image \(jpg, .*\) in its subfolders"):
        ImageFolderSource(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.png").write_bytes(picture())
    with pytest.raises(UserError, match="1 samples for 2 data workers"):
        ImageFolderSource(tmp_path).check_consumers(2)
