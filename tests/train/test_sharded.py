"""Sharded checkpoints that go wrong. Oracle: torch's own writer and reader, on files that are really damaged."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from open_clip_ov2.errors import UserError
from open_clip_ov2.train.sharded import ShardWriter, read_sharded


@pytest.fixture
def one_process() -> Iterator[None]:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


def test_a_damaged_part_is_told_and_replaced_and_a_failed_write_too(
    one_process: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch's CheckpointException is a BaseException, which nothing that reports errors would catch."""
    tensor = distribute_tensor(torch.arange(8.0), init_device_mesh("cpu", (1,)), [Shard(0)])
    writer = ShardWriter(tmp_path)

    def save(name: str) -> None:
        rest, finish = writer.begin(name, {"state_dict": {"w": tensor}})
        finish(rest)

    save("stage_1.dcp")
    for part in (tmp_path / "stage_1.dcp").glob("*.distcp"):
        part.write_bytes(b"x" * part.stat().st_size)
    with pytest.raises(UserError, match="a part is damaged"):
        read_sharded(tmp_path / "stage_1.dcp")
    save("stage_1.dcp")
    assert read_sharded(tmp_path / "stage_1.dcp")["state_dict"]["w"].tolist() == list(range(8))
    (tmp_path / ".tmp-stage_2.dcp").touch()  # where torch makes a folder
    with pytest.raises(OSError, match="exists"):
        save("stage_2.dcp")
    (tmp_path / ".tmp-stage_2.dcp").unlink()
    monkeypatch.setattr(torch, "save", lambda *_: exec("raise OSError(28, 'No space left on device')"))
    with pytest.raises(OSError, match="No space"):
        save("stage_2.dcp")
    assert [path.name for path in tmp_path.iterdir()] == ["stage_1.dcp"]
    writer.wait()
