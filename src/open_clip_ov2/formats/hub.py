"""Uploads to the Hugging Face hub."""

from __future__ import annotations

from pathlib import Path

from open_clip_ov2.errors import UserError


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
