"""Parameter names and layouts: Flax `img_encoder/...`, `txt_decoder/...` and our `visual.*`, `text_decoder.*`.

Flax kernels are (in, out), convolutions (height, width, in, out), the class token (1, 1, D). Flax keeps query, key and
value apart, and we have one `in_proj`. The cross-attention decoder also keeps heads apart, (D, H, D/H). Everything else
has the same layout on both sides.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from open_clip_ov2.errors import UserError

ENCODER, DECODER = "img_encoder", "txt_decoder"
# The fixed position table, and a projection that is the identity, are not among the reference's parameters.
NOT_IN_FLAX = ("visual.positional_embedding", "visual.proj")
_QKV = ("query", "key", "value")
_ATTENTION = "MultiHeadDotProductAttention_0"
_MLP = {"MlpBlock_0/Dense_0": "mlp.c_fc", "MlpBlock_0/Dense_1": "mlp.c_proj"}
_NORMS = {"LayerNorm_0": "ln_1", "LayerNorm_1": "ln_2"}
_CROSS_NORMS = {"ln_x": "ln_1", "ln_u": "ln_context", "ln_mlp": "ln_2"}
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
    for index in range(encoder_layers):
        yield from _block_names(
            f"visual.transformer.resblocks.{index}", f"{ENCODER}/Transformer/encoderblock_{index}", _NORMS
        )
    for index in range(decoder_layers):
        kind, number, norms = "encoderblock", index, _NORMS
        if cross:  # self- and cross-attention blocks alternate, and are counted apart
            kind, number = ("self_attn_block", "cross_attn_block")[index % 2], index // 2
            norms = _CROSS_NORMS if index % 2 else _NORMS
        yield from _block_names(f"text_decoder.blocks.{index}", f"{DECODER}/Transformer/{kind}_{number}", norms)


def _block_names(ours: str, theirs: str, norms: Mapping[str, str]) -> Iterator[tuple[str, tuple[str, ...]]]:
    for kind, leaf in (("weight", "kernel"), ("bias", "bias")):
        yield f"{ours}.attn.in_proj_{kind}", tuple(f"{theirs}/{_ATTENTION}/{part}/{leaf}" for part in _QKV)
        yield f"{ours}.attn.out_proj.{kind}", (f"{theirs}/{_ATTENTION}/out/{leaf}",)
        for flax_part, part in _MLP.items():
            yield f"{ours}.{part}.{kind}", (f"{theirs}/{flax_part}/{leaf}",)
        for flax_part, part in norms.items():
            yield f"{ours}.{part}.{kind}", (f"{theirs}/{flax_part}/{leaf.replace('kernel', 'scale')}",)


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
