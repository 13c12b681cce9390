"""Names and layouts: Flax `img_encoder/...`, `txt_decoder/...` on one side, `visual.*`, `text_decoder.*` on the other.

Flax kernels are (in, out), convolutions (height, width, in, out), the class token (1, 1, D). Query, key and value are
apart there and one `in_proj` here. The cross-attention decoder keeps heads apart, (D, H, D/H), the others do not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.errors import UserError

ENCODER, DECODER = "img_encoder", "txt_decoder"
_TOP_NAMES = {
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
_SELF_PARTS = {
    "LayerNorm_0": "ln_1", "LayerNorm_1": "ln_2", "MlpBlock_0/Dense_0": "mlp.c_fc", "MlpBlock_0/Dense_1": "mlp.c_proj",
}  # fmt: skip
_CROSS_PARTS = {
    "ln_x": "ln_1", "ln_u": "ln_context", "ln_mlp": "ln_2", "MlpBlock_0/Dense_0": "mlp.c_fc",
    "MlpBlock_0/Dense_1": "mlp.c_proj",
}  # fmt: skip
_BLOCK_NAME = re.compile(
    rf"({ENCODER}|{DECODER})/Transformer/(encoderblock|self_attn_block|cross_attn_block)_(\d+)/(.+)/(kernel|scale|bias)"
)
_PROJECTIONS = ("query", "key", "value")
_ATTENTION = "MultiHeadDotProductAttention_0"
_NORMS = ("ln_1", "ln_2", "ln_context")
# Not in the reference's parameters: the fixed table, and a projection that is the identity there.
NOT_IN_FLAX = ("visual.positional_embedding", "visual.proj")


class _Block(NamedTuple):
    """One block's place on both sides: `img_encoder/Transformer/encoderblock_3` and `visual...resblocks.3`."""

    flax: str
    torch: str
    cross: bool


def _block(tower: str, kind: str, index: int) -> _Block:
    path = f"{tower}/Transformer/{kind}_{index}"
    if tower == ENCODER:
        return _Block(path, f"visual.transformer.resblocks.{index}", False)
    number = {"encoderblock": index, "self_attn_block": 2 * index, "cross_attn_block": 2 * index + 1}[kind]
    return _Block(path, f"text_decoder.blocks.{number}", kind == "cross_attn_block")


def from_flax(flat: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """State dict from Flax parameters by path. Raises UserError for names that are not the reference's.

    `visual.positional_embedding` and `visual.proj` are not among them.
    """
    out: dict[str, Tensor] = {}
    stacked: dict[str, dict[str, Tensor]] = {}
    unknown: list[str] = []
    for name, value in flat.items():
        if name in _TOP_NAMES:
            out[_TOP_NAMES[name]] = _to_torch(name, value)
            continue
        found = _BLOCK_NAME.fullmatch(name)
        if found is None or not _place(found, value, out, stacked):
            unknown.append(name)
    for name, parts in stacked.items():
        if set(parts) == set(_PROJECTIONS):
            out[name] = torch.cat([parts[projection] for projection in _PROJECTIONS])
        else:
            unknown.append(f"{name} without {', '.join(sorted(set(_PROJECTIONS) - set(parts)))}")
    if unknown:
        shown = ", ".join(sorted(unknown)[:4])
        raise UserError(f"{len(unknown)} Flax parameters are not the reference's: {shown}")
    return out


def _place(
    found: re.Match[str], value: np.ndarray, out: dict[str, Tensor], stacked: dict[str, dict[str, Tensor]]
) -> bool:
    """Put one parameter of a block where it belongs; False if it has no place."""
    tower, kind, index, part, leaf = found.groups()
    block = _block(tower, kind, int(index))
    suffix = "bias" if leaf == "bias" else "weight"
    names = _CROSS_PARTS if block.cross else _SELF_PARTS
    if part in names:
        out[f"{block.torch}.{names[part]}.{suffix}"] = _to_torch(leaf, value)
        return True
    attention, _, projection = part.partition("/")
    if attention != _ATTENTION or projection not in (*_PROJECTIONS, "out"):
        return False
    if leaf == "kernel" and value.ndim == 3:  # (D, H, D/H), and (H, D/H, D) for `out`
        value = value.reshape(-1, value.shape[-1]) if projection == "out" else value.reshape(value.shape[0], -1)
    tensor = _to_torch(leaf, value.reshape(-1) if leaf == "bias" else value)
    if projection == "out":
        out[f"{block.torch}.attn.out_proj.{suffix}"] = tensor
    else:
        stacked.setdefault(f"{block.torch}.attn.in_proj_{suffix}", {})[projection] = tensor
    return True


def _to_torch(name: str, value: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.array(value))  # a copy: the source may be mapped from a file
    if name.endswith("kernel"):
        return (tensor.permute(3, 2, 0, 1) if tensor.ndim == 4 else tensor.T).contiguous()
    return tensor.flatten() if name.endswith("/cls") else tensor


def to_flax(state: Mapping[str, Tensor], decoder_heads: int) -> dict[str, np.ndarray]:
    """The reverse. `decoder_heads` are kept apart in a cross-attention decoder and nowhere else.

    The fixed position table is left out, as the reference does not store it; so is `visual.proj`, which must be the
    identity. Raises UserError.
    """
    identity = state.get("visual.proj")
    if identity is not None and not torch.equal(identity.float().cpu(), torch.eye(len(identity))):
        raise UserError("visual.proj is not the identity, and the reference's parameters have no place for it")
    cross = any(".ln_context." in name for name in state)
    top = {ours: theirs for theirs, ours in _TOP_NAMES.items()}
    out: dict[str, np.ndarray] = {}
    for name, tensor in state.items():
        if name in NOT_IN_FLAX:
            continue
        if name in top:
            out[top[name]] = _to_numpy(top[name], tensor)
            continue
        found = re.fullmatch(r"(visual\.transformer\.resblocks|text_decoder\.blocks)\.(\d+)\.(.+)", name)
        if found is None:
            raise UserError(f"{name}: no place for it among the reference's parameters")
        number = int(found[2])
        if found[1].startswith("visual"):
            block = _block(ENCODER, "encoderblock", number)
        elif cross:
            block = _block(DECODER, "cross_attn_block" if number % 2 else "self_attn_block", number // 2)
        else:
            block = _block(DECODER, "encoderblock", number)
        out.update(_block_to_flax(block, found[3], tensor, decoder_heads))
    return out


def _block_to_flax(block: _Block, part: str, tensor: Tensor, heads: int) -> dict[str, np.ndarray]:
    leaf = "bias" if part.endswith("bias") else "kernel"
    if part.startswith("attn.in_proj_"):
        pieces = dict(zip(_PROJECTIONS, tensor.chunk(3), strict=True))
    elif part.startswith("attn.out_proj."):
        pieces = {"out": tensor}
    else:
        names = {ours: theirs for theirs, ours in (_CROSS_PARTS if block.cross else _SELF_PARTS).items()}
        stem = part.rpartition(".")[0]
        if stem in _NORMS and leaf == "kernel":
            leaf = "scale"
        return {f"{block.flax}/{names[stem]}/{leaf}": _to_numpy(leaf, tensor)}
    out: dict[str, np.ndarray] = {}
    for projection, piece in pieces.items():
        value: Any = _to_numpy(leaf, piece)
        if block.cross and projection != "out":
            value = value.reshape(*value.shape[:-1], heads, -1)
        elif block.cross and leaf == "kernel":
            value = value.reshape(heads, -1, value.shape[-1])
        out[f"{block.flax}/{_ATTENTION}/{projection}/{leaf}"] = value
    return out


def _to_numpy(name: str, tensor: Tensor) -> np.ndarray:
    tensor = tensor.detach().cpu()
    if name.endswith("kernel"):
        tensor = tensor.permute(2, 3, 1, 0) if tensor.ndim == 4 else tensor.T
    if name.endswith("/cls"):
        tensor = tensor.reshape(1, 1, -1)
    return np.ascontiguousarray(tensor.numpy())
