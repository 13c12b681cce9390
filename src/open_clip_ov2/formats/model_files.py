"""Writing a model's folder: all of it or nothing, never over another; weights as safetensors."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from open_clip_ov2.errors import UserError
from open_clip_ov2.files import TEMPORARY


@contextlib.contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to write into, which becomes `path` when the block ends, and is removed if the block fails.

    Raises UserError if there is something at `path` already.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path}: exists and is not an empty folder; name another, or remove it")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{path.name}-", dir=path.parent))
    temporary.chmod(0o755)  # mkdtemp makes it readable by its owner only
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write safetensors with the `format` that transformers and timm look for."""
    plain = {key: value.detach().cpu().clone().contiguous() for key, value in tensors.items()}
    save_file(plain, str(path), metadata={"format": "pt"})
