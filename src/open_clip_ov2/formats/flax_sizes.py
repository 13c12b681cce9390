"""Sizes of a model from its Flax parameters. What they do not say is asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.flax import DECODER, ENCODER

# docs/reference.md: heads by width, for the parameters that keep heads together. The decoder's differ at 384 nowhere.
ENCODER_HEADS = {192: 3, 384: 6, 768: 12, 1024: 16, 1152: 16, 1280: 16, 1408: 16}
DECODER_HEADS = {192: 3, 384: 6, 512: 8, 768: 12, 1024: 16}


@dataclass(frozen=True)
class FlaxSizes:
    """`cross` decoders have self- and cross-attention blocks in turn; `decoder_layers` counts both."""

    width: int
    layers: int
    heads: int
    mlp_width: int
    patch_size: int
    decoder_width: int
    decoder_layers: int
    decoder_heads: int
    decoder_mlp_width: int
    vocab_size: int
    cross: bool


def flax_sizes(flat: Mapping[str, np.ndarray], heads: int | None = None, decoder_heads: int | None = None) -> FlaxSizes:
    """Raises UserError for what is missing, and for widths whose number of heads is not known and not given."""
    try:
        patch_size, columns, _, width = flat[f"{ENCODER}/embedding/kernel"].shape
        vocab_size, decoder_width = flat[f"{DECODER}/Embed_0/embedding"].shape
        cross = any("/cross_attn_block_" in name for name in flat)
        first = "self_attn_block" if cross else "encoderblock"
        mlp_width = flat[f"{ENCODER}/Transformer/encoderblock_0/MlpBlock_0/Dense_0/kernel"].shape[1]
        decoder_mlp_width = flat[f"{DECODER}/Transformer/{first}_0/MlpBlock_0/Dense_0/kernel"].shape[1]
    except (KeyError, ValueError) as error:
        raise UserError(f"the Flax parameters are not whole: {error}") from error
    if patch_size != columns:
        raise UserError(f"patches of {patch_size} x {columns} pixels: only square ones are known")
    if cross:
        query = flat[f"{DECODER}/Transformer/cross_attn_block_0/MultiHeadDotProductAttention_0/query/kernel"]
        decoder_heads = query.shape[1] if query.ndim == 3 else decoder_heads
    return FlaxSizes(
        width=width,
        layers=_count(flat, ENCODER),
        heads=_heads(heads, width, ENCODER_HEADS, "--heads", "encoder"),
        mlp_width=mlp_width,
        patch_size=patch_size,
        decoder_width=decoder_width,
        decoder_layers=_count(flat, DECODER),
        decoder_heads=_heads(decoder_heads, decoder_width, DECODER_HEADS, "--decoder-heads", "decoder"),
        decoder_mlp_width=decoder_mlp_width,
        vocab_size=vocab_size,
        cross=cross,
    )


def _count(flat: Mapping[str, np.ndarray], tower: str) -> int:
    return len({found[0] for name in flat if (found := re.match(rf"{tower}/Transformer/\w+_\d+/", name))})


def _heads(given: int | None, width: int, known: Mapping[int, int], flag: str, tower: str) -> int:
    heads = given or known.get(width)
    if heads is None:
        raise UserError(f"{flag} is missing: the parameters do not say how many heads the {tower} of width {width} has")
    if width % heads:
        raise UserError(f"{flag} {heads}: does not divide the {tower}'s width {width}")
    return heads
