"""Sharded checkpoints: a folder in which each process has written its part, by torch.distributed.checkpoint.

`content.pt` has all that is not sharded, with {SHARDED: key} where a sharded tensor belongs; the other files are
torch's. They hold the weights in training (`state_dict`), their average, and the optimizer's state. The folder gets its
name when every process has written.
"""

from __future__ import annotations

import contextlib
import shutil
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import async_save
from torch.distributed.tensor import DTensor

from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import TEMPORARY, sync_folder, written_whole
from open_clip_ov2.train.parallel import Layout

Write = Callable[[dict[str, Any]], None]
CONTENT, SHARDED = "content.pt", "open_clip_ov2_sharded"


class ShardWriter:
    """Of every process: `begin` copies its shards to memory and writes them in the background, one checkpoint at a
    time. All processes have to call it alike."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._group: Any = torch.distributed.new_group(backend="gloo")  # training goes on in the other one meanwhile
        self._writing: Any = None

    def begin(self, name: str, content: dict[str, Any]) -> tuple[dict[str, Any], Write]:
        """The content without its shards, and what finishes the checkpoint on rank 0, given all that is not sharded."""
        self.wait()
        shards: dict[str, DTensor] = {}
        rest = _without_shards(content, "", shards)
        temporary = self._folder / f"{TEMPORARY}{name}"
        self._writing = writing = async_save(shards, checkpoint_id=temporary, process_group=self._group)

        def finish(content: dict[str, Any]) -> None:
            try:
                _result(writing)
                with written_whole(temporary / CONTENT) as file:
                    torch.save(content, file)
                shutil.rmtree(self._folder / name, ignore_errors=True)  # one that could not be read
                temporary.rename(self._folder / name)
            except BaseException:
                shutil.rmtree(temporary, ignore_errors=True)  # every process has ended its part
                raise
            sync_folder(self._folder)

        return rest, finish

    def wait(self) -> None:
        """Until this process has nothing more to write. Errors are those of every process, and rank 0 reports them."""
        if self._writing is not None:
            with contextlib.suppress(Exception):
                _result(self._writing)
            self._writing = None


def _result(writing: Any) -> None:
    """Of `async_save`, which returns a future, or two of them in newer versions of torch."""
    future: Future[Any] = getattr(writing, "upload_completion", writing)
    try:
        future.result()
    except CheckpointException as error:
        raise _cause(error) from error


def _cause(error: CheckpointException) -> Exception:
    """The first process's error. torch's own is no `Exception`, so that nobody who reports errors would catch it."""
    cause = next(iter(error.failures.values()))[0]
    return cause if isinstance(cause, Exception) else RuntimeError(first_line(cause))


def _without_shards(tree: Any, path: str, shards: dict[str, DTensor]) -> Any:
    if isinstance(tree, DTensor):
        shards[path] = tree
        return {SHARDED: path}
    if isinstance(tree, Mapping):
        return {key: _without_shards(value, f"{path}/{key}", shards) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_without_shards(value, f"{path}/{index}", shards) for index, value in enumerate(tree))
    return tree


def read_sharded(folder: Path, layout: Layout | None = None) -> dict[str, Any]:
    """The content of a sharded checkpoint; `average` is there if training had one. With a layout, whatever the number
    of processes was, each reads its own part alone: DTensors. Otherwise whole tensors on the CPU. Raises UserError for
    a folder that is incomplete or damaged."""
    content = torch.load(folder / CONTENT, map_location="cpu", weights_only=True)
    reader = FileSystemReader(folder)
    metadata: Any = reader.read_metadata()
    for part in metadata.storage_data.values():
        file = folder / part.relative_path
        if not file.is_file() or file.stat().st_size < part.offset + part.length:
            raise UserError(f"{file}: missing or incomplete")
    shards = {
        key: _room(about.size, about.properties.dtype, layout) for key, about in metadata.state_dict_metadata.items()
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it says that it reads without the other processes
        try:
            load(shards, storage_reader=reader, no_dist=True)
        except CheckpointException as error:
            raise UserError(f"{folder}: a part is damaged ({first_line(_cause(error))})") from error
    return {key: _with_shards(value, shards) for key, value in content.items()}


def _room(shape: torch.Size, dtype: torch.dtype, layout: Layout | None) -> Tensor:
    if layout is None:
        return torch.empty(shape, dtype=dtype)
    own = layout.part(shape[0])
    room = torch.empty(own.stop - own.start, *shape[1:], dtype=dtype, device=layout.mesh.device_type)
    return layout.wrap(room, shape)


def _with_shards(tree: Any, shards: Mapping[str, Tensor]) -> Any:
    if isinstance(tree, Mapping):
        if SHARDED not in tree:
            return {key: _with_shards(value, shards) for key, value in tree.items()}
        value = shards[tree[SHARDED]]
        return value.reshape(()) if value.shape == (1,) and not isinstance(value, DTensor) else value
    if isinstance(tree, (list, tuple)):
        return type(tree)(_with_shards(value, shards) for value in tree)
    return tree
