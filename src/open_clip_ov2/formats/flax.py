"""The reference's Flax parameters: read from a big_vision .npz or an Orbax folder, to our `visual.*` and
`text_decoder.*` and back, and the model config that they imply.

Flax kernels are (in, out), convolutions (height, width, in, out), the class token (1, 1, D). Flax keeps query, key and
value apart, and we have one `in_proj`. The cross-attention decoder also keeps heads apart, (D, H, D/H). Everything else
has the same layout on both sides. Nothing is unpickled. Orbax folders are read with tensorstore, which wrote them;
orbax-checkpoint would bring in JAX.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.errors import UserError, first_line, from_extra
from open_clip_ov2.files import read_json
from open_clip_ov2.formats.encoder import PUBLISHED_SIZES, mlp_ratio

ENCODER, DECODER = "img_encoder", "txt_decoder"
# The fixed position table, and a projection that is the identity, are not among the reference's parameters.
NOT_IN_FLAX = ("visual.positional_embedding", "visual.proj")
_METADATA = "_METADATA"
# docs/reference.md: heads by width, for parameters that keep heads together.
ENCODER_HEADS = {width: heads for width, (heads, _) in PUBLISHED_SIZES.items()}
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16}
_QKV = ("query", "key", "value")
_ATTENTION = "MultiHeadDotProductAttention_0"
# Of one block: our modules, and those of Flax, which keeps query, key and value apart.
_PARTS = {
    "attn.in_proj_": tuple(f"{_ATTENTION}/{part}" for part in _QKV),
    "attn.out_proj.": (f"{_ATTENTION}/out",),
    "mlp.c_fc.": ("MlpBlock_0/Dense_0",),
    "mlp.c_proj.": ("MlpBlock_0/Dense_1",),
}
_NORMS = {"ln_1.": ("LayerNorm_0",), "ln_2.": ("LayerNorm_1",)}
_CROSS_NORMS = {"ln_1.": ("ln_x",), "ln_context.": ("ln_u",), "ln_2.": ("ln_mlp",)}
_TOP = {
    f"{ENCODER}/cls": "visual.class_embedding",
    f"{ENCODER}/embedding/kernel": "visual.conv1.weight",
    f"{ENCODER}/encoder_norm/scale": "visual.ln_post.weight",
    f"{ENCODER}/encoder_norm/bias": "visual.ln_post.bias",
    f"{DECODER}/Embed_0/embedding": "text_decoder.token_embedding.weight",
    f"{DECODER}/image_projection_layer/kernel": "text_decoder.image_projection.weight",
    f"{DECODER}/decoder_norm/scale": "text_decoder.ln_final.weight",
    f"{DECODER}/decoder_norm/bias": "text_decoder.ln_final.bias",
    f"{DECODER}/head/kernel": "text_decoder.lm_head.weight",
}


def count_blocks(flat: Mapping[str, Any], tower: str) -> int:
    """Blocks of a tower; a cross-attention decoder's blocks of both kinds."""
    return len({found[0] for name in flat if (found := re.match(rf"{tower}/Transformer/\w+_\d+/", name))})


def has_cross_attention(flat: Mapping[str, Any]) -> bool:
    return any("/cross_attn_block_" in name for name in flat)


def _names(encoder_layers: int, decoder_layers: int, cross: bool) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Each parameter of ours with the one Flax parameter that it is, or the three that it joins."""
    for theirs, ours in _TOP.items():
        yield ours, (theirs,)
    blocks = [(f"visual.transformer.resblocks.{n}", f"{ENCODER}/Transformer/encoderblock_{n}", _NORMS)
              for n in range(encoder_layers)]  # fmt: skip
    for n in range(decoder_layers):
        kind, norms = f"encoderblock_{n}", _NORMS
        if cross:  # self- and cross-attention blocks alternate, and are counted apart
            kind = f"{('self', 'cross')[n % 2]}_attn_block_{n // 2}"
            norms = _CROSS_NORMS if n % 2 else _NORMS
        blocks.append((f"text_decoder.blocks.{n}", f"{DECODER}/Transformer/{kind}", norms))
    for ours, theirs, norms in blocks:
        for part, modules in (_PARTS | norms).items():
            for kind, leaf in (("weight", "scale" if part in norms else "kernel"), ("bias", "bias")):
                yield f"{ours}.{part}{kind}", tuple(f"{theirs}/{module}/{leaf}" for module in modules)


def from_flax(flat: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """A state dict from Flax parameters by path, without the names of NOT_IN_FLAX.

    Raises UserError for names that are not the reference's; a missing name is for the caller to find.
    """
    out, used, problems = {}, set(), []
    for ours, theirs in _names(count_blocks(flat, ENCODER), count_blocks(flat, DECODER), has_cross_attention(flat)):
        there = [name for name in theirs if name in flat]
        used |= set(there)
        if len(there) == len(theirs):
            parts = [_to_torch(name, flat[name]) for name in theirs]
            out[ours] = torch.cat(parts) if parts[1:] else parts[0]
        elif there:
            missing = [part for part, name in zip(_QKV, theirs, strict=True) if name not in flat]
            problems.append(f"{ours} without {', '.join(missing)}")
    problems += sorted(flat.keys() - used)
    if problems:
        raise UserError(f"{len(problems)} Flax parameters are not the reference's: {', '.join(problems[:4])}")
    return out


def to_flax(state: Mapping[str, Tensor], decoder_heads: int) -> dict[str, np.ndarray]:
    """The reverse; `decoder_heads` are kept apart in the blocks of a cross-attention decoder that have them apart.

    The names of NOT_IN_FLAX are left out; `visual.proj` must be the identity. Raises UserError.
    """
    identity = state.get("visual.proj")
    if identity is not None and not torch.equal(identity.float().cpu(), torch.eye(len(identity))):
        raise UserError("visual.proj is not the identity, and the reference's parameters have no place for it")
    encoder_layers = len({name.split(".")[3] for name in state if name.startswith("visual.transformer.resblocks.")})
    decoder_layers = len({name.split(".")[2] for name in state if name.startswith("text_decoder.blocks.")})
    names = dict(_names(encoder_layers, decoder_layers, cross=any(".ln_context." in name for name in state)))
    out: dict[str, np.ndarray] = {}
    for ours, tensor in state.items():
        if ours in NOT_IN_FLAX:
            continue
        if ours not in names:
            raise UserError(f"{ours}: no place for it among the reference's parameters")
        for name, piece in zip(names[ours], tensor.chunk(len(names[ours])), strict=True):
            out[name] = _to_numpy(name, piece, decoder_heads)
    return out


def _to_torch(name: str, value: np.ndarray) -> Tensor:
    value = np.array(value)  # a copy, because the source may be mapped from a file
    if name.endswith("/cls") or (f"/{_ATTENTION}/" in name and name.endswith("bias")):
        value = value.reshape(-1)
    elif f"/{_ATTENTION}/" in name and value.ndim == 3:  # (D, H, D/H), and (H, D/H, D) of the output projection
        value = value.reshape(-1, value.shape[-1]) if "/out/" in name else value.reshape(len(value), -1)
    if name.endswith("kernel"):
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
    return torch.from_numpy(np.ascontiguousarray(value))


def _to_numpy(name: str, tensor: Tensor, heads: int) -> np.ndarray:
    value = tensor.detach().cpu().numpy()
    if name.endswith("kernel"):
        value = value.transpose(2, 3, 1, 0) if value.ndim == 4 else value.T
    if name.endswith("/cls"):
        value = value.reshape(1, 1, -1)
    if "/cross_attn_block_" in name and f"/{_ATTENTION}/" in name:
        if "/out/" not in name:
            value = value.reshape(*value.shape[:-1], heads, -1)
        elif name.endswith("kernel"):
            value = value.reshape(heads, -1, value.shape[-1])
    return np.ascontiguousarray(value)


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
    with from_extra("export", "an Orbax checkpoint"):
        import tensorstore
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
