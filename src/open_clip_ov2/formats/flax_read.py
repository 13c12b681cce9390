"""Flax parameters from disk: a big_vision .npz, or an Orbax folder. Nothing is unpickled.

Orbax folders are read with tensorstore, which they are written with; orbax-checkpoint itself would bring all of JAX.
"""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.flax import DECODER, ENCODER

_METADATA = "_METADATA"


def read_flax(path: Path) -> dict[str, np.ndarray]:
    """Parameters by path, `img_encoder/...` and `txt_decoder/...`; optimizer state and all else is left out.

    Raises UserError.
    """
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    flat = _read_orbax(path) if path.is_dir() else _read_npz(path)
    if not any(name.startswith(f"{ENCODER}/") for name in flat):
        raise UserError(f"{path}: no parameters of the reference in it (their names begin with params/{ENCODER}/)")
    return flat


def _parameter(name: str) -> str | None:
    """`params/img_encoder/...` at any depth -> `img_encoder/...`; none for gradients, optimizer state and the rest."""
    for tower in (ENCODER, DECODER):
        before, found, after = name.partition(f"{tower}/")
        if found and (not before or before.endswith("params/")) and "opt" not in before:
            return tower + "/" + after
    return None


def _add(out: dict[str, np.ndarray], name: str, value: np.ndarray, path: Path) -> None:
    if name in out:
        raise UserError(f"{path}: two sets of parameters in it (two {name}); keep one")
    if value.dtype.kind == "V" and value.dtype.itemsize == 2:  # bfloat16, which numpy does not know: widened, exactly
        value = (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
    out[name] = value


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    out: dict[str, np.ndarray] = {}
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                if (ours := _parameter(name)) is not None:
                    _add(out, ours, file[name], path)
        return out
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz of plain arrays ({str(error).splitlines()[0]})") from error


def _read_orbax(folder: Path) -> dict[str, np.ndarray]:
    root = _orbax_root(folder)
    try:
        metadata = json.loads((root / _METADATA).read_text(encoding="utf-8"))
        paths = [tuple(str(key["key"]) for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{root / _METADATA}: cannot be read ({error!r})") from error
    out: dict[str, np.ndarray] = {}
    for keys in paths:
        name = _parameter("/".join(keys))
        if name is not None:
            _add(out, name, _read_array(root, keys, metadata), root)
    return out


def _orbax_root(folder: Path) -> Path:
    """The folder itself, or the one item of a step (`default`, `params`, `state`) in it."""
    if (folder / _METADATA).is_file():
        return folder
    items = sorted(item.parent for item in folder.glob(f"*/{_METADATA}"))
    if len(items) != 1:
        found = f"{len(items)} of its folders have one" if items else "nor in a folder of it"
        raise UserError(f"{folder}: not an Orbax checkpoint (no {_METADATA} in it, {found}); name the item's folder")
    return items[0]


def _read_array(root: Path, keys: tuple[str, ...], metadata: dict[str, Any]) -> np.ndarray:
    try:
        import tensorstore
    except ImportError:
        raise UserError("an Orbax checkpoint needs tensorstore: pip install 'open_clip_ov2[export]'") from None
    if any(not key or "/" in key or "\\" in key or key in (".", "..") for key in keys):
        raise UserError(f"{root}: {keys!r} is not the name of a parameter")
    # Both kinds of storage that Orbax has: one database for all arrays, or a folder for each.
    name, files = ".".join(keys), {"driver": "file", "path": f"{root.resolve()}/"}
    if (root / "manifest.ocdbt").is_file():
        store: dict[str, Any] = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    else:
        store = {**files, "path": f"{files['path']}{name}/"}
    driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
    try:
        array = tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()
        return np.asarray(array.read().result())
    except ValueError as error:
        raise UserError(f"{root}: {name} cannot be read ({str(error).splitlines()[0][:200]})") from error
