"""A model folder: written as a whole or not at all, never over another, weights as safetensors; and its upload."""

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


def upload(folder: Path, repository: str, private: bool = False) -> str:
    """Upload a folder to ORG/NAME, which is made if it does not exist. Returns the commit's URL. Raises UserError."""
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        api.create_repo(repository, private=private or None, exist_ok=True)
        message = "Model written by ov2 push"
        return str(api.upload_folder(repo_id=repository, folder_path=str(folder), commit_message=message))
    except Exception as error:  # network, permissions, names: each has a class of its own
        reason = " ".join(str(error).split())[:300]
        raise UserError(
            f"{repository}: not pushed ({type(error).__name__}: {reason}); log in with `hf auth login`, or write what "
            "would be pushed to a folder with --dry-run FOLDER"
        ) from error
