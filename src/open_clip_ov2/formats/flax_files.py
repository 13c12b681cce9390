"""Flax parameters on disk, a big_vision .npz or an Orbax folder, and the model config that they imply.

Nothing is unpickled. Orbax folders are read with tensorstore, which wrote them; orbax-checkpoint would bring in JAX.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.files import read_json
from open_clip_ov2.formats.encoder import mlp_ratio
from open_clip_ov2.formats.flax import DECODER, ENCODER, count_blocks, has_cross_attention

_METADATA = "_METADATA"
# docs/reference.md: heads by width, for parameters that keep heads together. The two towers share widths and heads.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16}
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16}


def read_flax(path: Path) -> dict[str, np.ndarray]:
    """Parameters by path, `img_encoder/...` and `txt_decoder/...`, without optimizer state. Raises UserError."""
    if not path.exists():
        raise UserError(f"{path}: no such file or folder")
    flat: dict[str, np.ndarray] = {}
    for name, value in _read_orbax(path) if path.is_dir() else _read_npz(path):
        if name in flat:
            raise UserError(f"{path}: two sets of parameters in it (two {name}); keep one")
        if value.dtype.kind == "V" and value.dtype.itemsize == 2:  # bfloat16, widened exactly
            value = (value.view(np.uint16).astype(np.uint32) << 16).view(np.float32)
        flat[name] = value
    if not any(name.startswith(f"{ENCODER}/") for name in flat):
        raise UserError(f"{path}: no parameters of the reference in it (names begin with params/{ENCODER}/)")
    return flat


def _parameter(name: str) -> str | None:
    """`params/img_encoder/...` at any depth -> `img_encoder/...`; None for gradients, optimizer state and the rest."""
    found = re.fullmatch(rf"(|.*?params/)((?:{ENCODER}|{DECODER})/.*)", name)
    return found[2] if found and "opt" not in found[1] else None


def _read_npz(path: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            for name in file.files:
                if ours := _parameter(name):
                    yield ours, file[name]
    except (ValueError, OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{path}: not a readable .npz of plain arrays ({first_line(error)})") from error


def _read_orbax(folder: Path) -> Iterator[tuple[str, np.ndarray]]:
    # The folder itself, or the one item of a step (`default`, `params`, `state`) in it.
    found = [folder] if (folder / _METADATA).is_file() else [file.parent for file in folder.glob(f"*/{_METADATA}")]
    if len(found) != 1:
        where = f"{len(found)} of its folders have one" if found else "nor in a folder of it"
        raise UserError(f"{folder}: not an Orbax checkpoint (no {_METADATA} in it, {where}); name the item's folder")
    (root,) = found
    metadata = read_json(root / _METADATA, dict, "Orbax's metadata")
    try:
        paths = [tuple(str(key["key"]) for key in leaf["key_metadata"]) for leaf in metadata["tree_metadata"].values()]
    except (AttributeError, KeyError, TypeError) as error:
        raise UserError(f"{root / _METADATA}: not Orbax's metadata ({error!r})") from error
    for keys in paths:
        if ours := _parameter("/".join(keys)):
            yield ours, _read_array(root, keys, "zarr3" if metadata.get("use_zarr3") else "zarr")


def _read_array(root: Path, keys: tuple[str, ...], driver: str) -> np.ndarray:
    try:
        import tensorstore
    except ImportError:
        raise UserError("an Orbax checkpoint needs tensorstore: pip install 'open_clip_ov2[export]'") from None
    if any(not key or "/" in key or "\\" in key or key in (".", "..") for key in keys):
        raise UserError(f"{root}: {keys!r} is not the name of a parameter")
    # Orbax stores all arrays in one database, or each in a folder.
    name, files = ".".join(keys), {"driver": "file", "path": f"{root.resolve()}/"}
    store: dict[str, Any] = {**files, "path": f"{files['path']}{name}/"}
    if (root / "manifest.ocdbt").is_file():
        store = {"driver": "ocdbt", "base": files, "path": f"{name}/"}
    try:
        array = tensorstore.open({"driver": driver, "kvstore": store}, open=True, read=True).result()
        return np.asarray(array.read().result())
    except ValueError as error:
        raise UserError(f"{root}: {name} cannot be read ({first_line(error)[:200]})") from error


def write_npz(path: Path, flat: Mapping[str, np.ndarray]) -> None:
    """Write parameters as big_vision does, in a new file. Raises UserError if there is one."""
    if path.exists():
        raise UserError(f"{path}: exists already; name another file")
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **{f"params/{name}": value for name, value in flat.items()})  # type: ignore[arg-type]


def flax_model_cfg(
    flat: Mapping[str, np.ndarray], heads: int | None = None, decoder_heads: int | None = None
) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` as far as the parameters imply it: no image size, context length, or token ids.

    Raises UserError for missing parameters, and for widths whose number of heads is neither known nor given.
    """
    cross = has_cross_attention(flat)
    first = "self_attn_block" if cross else "encoderblock"
    try:
        patch_size, columns, _, width = flat[f"{ENCODER}/embedding/kernel"].shape
        vocab_size, decoder_width = flat[f"{DECODER}/Embed_0/embedding"].shape
        mlp_width = flat[f"{ENCODER}/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1]
        decoder_mlp_width = flat[f"{DECODER}/Transformer/{first}_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    except (KeyError, ValueError) as error:
        raise UserError(f"the Flax parameters are incomplete: {error}") from error
    if patch_size != columns:
        raise UserError(f"patches of {patch_size} x {columns} pixels: expected square patches")
    if cross:
        query = flat[f"{DECODER}/Transformer/cross_attn_block_0/MultiHeadDotProductAttention_0/query/kernel"]
        decoder_heads = query.shape[1] if query.ndim == 3 else decoder_heads
    heads = _heads(heads, width, ENCODER_HEADS, "--heads", "encoder")
    return {
        "embed_dim": width,
        "vision_cfg": {
            "patch_size": patch_size,
            "width": width,
            "layers": count_blocks(flat, ENCODER),
            "head_width": width // heads,
            "mlp_ratio": mlp_ratio(width, mlp_width),
        },
        "text_cfg": {"vocab_size": vocab_size},
        "decoder_cfg": {
            "width": decoder_width,
            "layers": count_blocks(flat, DECODER),
            "heads": _heads(decoder_heads, decoder_width, DECODER_HEADS, "--decoder-heads", "decoder"),
            "mlp_width": decoder_mlp_width,
        },
        "fusion": "cross_attn" if cross else "prefix",
    }


def _heads(given: int | None, width: int, known: Mapping[int, int], flag: str, tower: str) -> int:
    heads = given or known.get(width)
    if heads is None:
        raise UserError(f"{flag} is missing: the parameters do not say how many heads the {tower} of width {width} has")
    if width % heads:
        raise UserError(f"{flag} {heads}: does not divide the {tower}'s width {width}")
    return heads
