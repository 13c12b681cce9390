"""Tables and made-up samples."""

from __future__ import annotations

from pathlib import Path

import pytest
from broken_shards import TXT, byte_tokens, picture, settings, to_tensor

from open_clip_ov2.data.captions import parse_caption_keys
from open_clip_ov2.data.loader import EvalLoader, TrainLoader
from open_clip_ov2.data.order.assignment import Assignment
from open_clip_ov2.data.skips import BAD_UTF8, MISSING_CAPTION, MISSING_IMAGE, SkipCounter
from open_clip_ov2.data.sources import CsvSource, SyntheticSource
from open_clip_ov2.errors import UserError


def write_table(folder: Path, rows: list[bytes], header: bytes = b"file,text,other") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "table.csv"
    path.write_bytes(b"\n".join([header, *rows]) + b"\n")
    return path


def table(path: Path, *captions: str, separator: str = ",") -> CsvSource:
    return CsvSource(path, separator=separator, image_column="file", caption_columns=captions or ("text",))


def test_rows_become_samples_and_bad_ones_are_counted(tmp_path: Path) -> None:
    """Oracle: the table, by hand: a picture beside the csv, one by absolute path, quotes, three kinds of bad row."""
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "b.png").write_bytes(picture(2))
    rows = [
        b"a.png,first,x",
        str(tmp_path / "far" / "b.png").encode() + b',"second, quoted",y',
        b"none.png,third,z",
        b"a.png,caf\xe9,z",
        b"a.png",
    ]
    source = table(write_table(tmp_path / "t", rows, b"\xef\xbb\xbffile,text,other"), "text", "other")
    (tmp_path / "t" / "a.png").write_bytes(picture(1))
    assert source.count() == 5
    loader = EvalLoader(
        source, to_tensor, byte_tokens, batch_size=8, num_workers=0, caption_keys=parse_caption_keys("text")
    )
    (batch,) = list(loader)
    assert batch.captions == ["first", "second, quoted"]
    assert batch.keys == ["row 1", "row 2"]
    assert loader.skips == {MISSING_IMAGE: 1, BAD_UTF8: 1, MISSING_CAPTION: 1}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"image_column": "picture"}, r"--csv-img-key.*unknown column 'picture'.*known: file, text, other"),
        ({"caption_columns": ("title",)}, r"--caption-keys.*unknown column 'title'"),
        ({"separator": "\t"}, r"'\\t'.*unknown column 'file'"),
        ({"separator": ", "}, "one character"),
    ],
)
def test_what_is_wrong_with_a_table_is_said(tmp_path: Path, change: dict[str, str], says: str) -> None:
    """Oracle: one line that names flag and columns."""
    flags = {"separator": ",", "image_column": "file", "caption_columns": ("text",), **change}
    with pytest.raises(UserError, match=says):
        CsvSource(write_table(tmp_path, [b"a.png,b,c"]), **flags)
    with pytest.raises(UserError, match="no rows"):
        table(write_table(tmp_path, []))
    with pytest.raises(UserError, match="no such file"):
        table(tmp_path / "none.csv")
    (tmp_path / "empty.csv").touch()
    with pytest.raises(UserError, match="the file is empty"):
        table(tmp_path / "empty.csv")
    with pytest.raises(UserError, match="1 samples for 2 data workers"):
        table(write_table(tmp_path, [b"a.png,b,c"])).check_consumers(2)


def test_rows_are_shared_out_once_and_shuffled(tmp_path: Path) -> None:
    """Oracle: all rows, once; another order in another pass."""
    source = table(write_table(tmp_path, [b"%d.png,t,o" % n for n in range(11)]))

    def order(consumer: int, consumers: int, pass_index: int = 0) -> list[str]:
        share = Assignment(0, 0, pass_index, consumer, consumers, 4)
        return [raw["__key__"] for raw in source.train_samples(share, SkipCounter())]

    assert sorted(order(0, 3) + order(1, 3) + order(2, 3)) == sorted(f"row {n + 1}" for n in range(11))
    assert order(0, 1) != order(0, 1, pass_index=1)
    assert order(0, 1) != [f"row {n + 1}" for n in range(11)]


def test_synthetic_samples_train(tmp_path: Path) -> None:
    """Oracle: the size asked for, black, one caption; every sample once in a pass."""
    source = SyntheticSource(num_samples=6, image_size=(8, 4))
    batches = list(TrainLoader(source, to_tensor, byte_tokens, **settings(num_samples=6, caption_keys=TXT)))
    assert {tuple(batch.images_BCHW.shape) for batch in batches} == {(2, 3, 4, 8)}
    assert not any(batch.images_BCHW.any() for batch in batches)
    assert sorted(key for batch in batches for key in batch.keys) == [f"synthetic {n}" for n in range(6)]
    assert {caption for batch in batches for caption in batch.captions} == {"Dummy caption"}
    with pytest.raises(UserError, match=r"--train-num-samples.*6 samples for 7 data workers"):
        source.check_consumers(7)
