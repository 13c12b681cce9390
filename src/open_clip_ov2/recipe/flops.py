"""Floating-point operations of one image, from plain sizes.

A multiply-add counts as two; backward is twice forward, but for the pixels, which want no gradient. Attention counts
whole rows, as torch's FlopCounterMode does and as a kernel with a mask computes it; an ov2 decoder's image tokens see
those of the image alone. An ov2 model's last encoder block is computed for the kept tokens alone, its last decoder
block for the caption. `published` counts as published tables
do: last blocks at all positions, and of the decoder's and text tower's attention the half that a causal mask needs.
Left out, being less than 1%: norms, activations, the optimizer, and the matrix of a contrastive loss.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Tower:
    """A stack of pre-norm transformer blocks."""

    width: int
    layers: int
    heads: int
    mlp_width: int


@dataclass(frozen=True)
class Encoder:
    """A ViT. Its pooled output is projected from `pooled_width` to `embed_dim`; `trained_head`: the loss reaches it."""

    tower: Tower
    patch_size: int
    pooled_width: int
    embed_dim: int
    trained_head: bool = True

    def patches(self, resolution: int) -> int:
        return (resolution // self.patch_size) ** 2


@dataclass(frozen=True)
class CaptionSizes:
    """An ov2 model: encoder, then a decoder over [kept image tokens ; caption tokens]."""

    encoder: Encoder
    decoder: Tower
    vocab: int
    fusion: str = "prefix"


@dataclass(frozen=True)
class ClipSizes:
    """Two towers and a contrastive loss."""

    encoder: Encoder
    text: Tower
    vocab: int


@dataclass(frozen=True)
class CocaSizes:
    """CLIP, and a decoder whose blocks attend to the text and then to `queries` - 1 pooled image tokens."""

    encoder: Encoder
    text: Tower
    decoder: Tower
    vocab: int
    queries: int = 256


ModelSizes = CaptionSizes | ClipSizes | CocaSizes


@dataclass(frozen=True)
class Tokens:
    """Tokens of one image and its caption.

    `encoder`: all that the ViT sees, class token included. `kept`: image tokens that a decoder sees. `text`: caption
    positions computed, padding included where it is. `targets`: positions whose logits are computed.
    """

    encoder: int
    kept: int
    text: int
    targets: float


@dataclass(frozen=True)
class Flops:
    """Of one image. `blocks` is the part of `forward` that gradient checkpointing computes again."""

    forward: float
    backward: float
    blocks: float = 0.0

    @property
    def total(self) -> float:
        return self.forward + self.backward

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.blocks + other.blocks)


def linear(rows: float, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def _mlp(tower: Tower, rows: int) -> float:
    return 2 * linear(rows, tower.width, tower.mlp_width)


def _self_block(tower: Tower, rows: int, pairs: float, read: int | None = None) -> float:
    """`pairs` of a query and a key are computed; `read`: the rows whose output somebody reads, all by default."""
    read = rows if read is None else read
    attention = 4.0 * pairs * tower.width  # weights, then values
    projections = 2 * linear(read, tower.width, tower.width) + 2 * linear(rows, tower.width, tower.width)
    return projections + attention + _mlp(tower, read)


def _cross_block(tower: Tower, rows: int, context: int) -> float:
    projections = 2 * linear(rows, tower.width, tower.width) + 2 * linear(context, tower.width, tower.width)
    return projections + 4.0 * rows * context * tower.width + _mlp(tower, rows)


def _trained(forward: float) -> Flops:
    return Flops(forward, 2 * forward)


def _blocks(forward: float) -> Flops:
    return Flops(forward, 2 * forward, blocks=forward)


def encoder_flops(encoder: Encoder, patches: int, tokens: int, read: int | None = None) -> Flops:
    """`patches` are embedded, `tokens` go through the blocks: fewer with patch dropout. `read` as for `_self_block`."""
    embedding = linear(patches, 3 * encoder.patch_size**2, encoder.tower.width)
    head = linear(1, encoder.pooled_width, encoder.embed_dim)
    tower, whole = encoder.tower, _self_block(encoder.tower, tokens, tokens * tokens)
    last = whole if read is None else _self_block(tower, tokens, read * tokens, read)
    blocks = _blocks((tower.layers - 1) * whole + last)
    return blocks + Flops(embedding, embedding) + (_trained(head) if encoder.trained_head else Flops(head, 0.0))


def decoder_flops(sizes: CaptionSizes, tokens: Tokens, *, published: bool = False) -> Flops:
    tower, image_width, text, image = sizes.decoder, sizes.encoder.tower.width, tokens.text, tokens.kept
    share = 0.5 if published else 1.0
    both = image + text
    if sizes.fusion == "cross_attn":  # self- and cross-attention blocks in turn, `layers` of them together
        pair = _self_block(tower, text, share * text * text) + _cross_block(tower, text, image)
        blocks = tower.layers // 2 * pair
    elif published:
        blocks = tower.layers * _self_block(tower, both, share * both * both)
    else:
        whole = _self_block(tower, both, image * image + text * both)
        blocks = (tower.layers - 1) * whole + _self_block(tower, both, text * both, text)
    return _blocks(blocks) + _trained(linear(image, image_width, tower.width))


def _text_flops(text: Tower, length: int, embed_dim: int, share: float) -> Flops:
    blocks = text.layers * _self_block(text, length, share * length * length)
    return _blocks(blocks) + _trained(linear(1, text.width, embed_dim))


def _pooler_flops(sizes: CocaSizes, tokens: int) -> Flops:
    """Attention of learned queries, of the embedding's width, to all encoder tokens."""
    width, queries = sizes.encoder.embed_dim, sizes.queries
    keys_values = 2 * linear(tokens, sizes.encoder.tower.width, width)
    return _trained(2 * linear(queries, width, width) + keys_values + 4.0 * queries * tokens * width)


def flops(sizes: ModelSizes, patches: int, tokens: Tokens, *, published: bool = False) -> dict[str, Flops]:
    """Of one image, by part of the model."""
    share = 0.5 if published else 1.0
    encoder = sizes.encoder
    part = isinstance(sizes, CaptionSizes) and not published
    dropped = tokens.kept < tokens.encoder - 1  # the class token aside
    parts = {"encoder": encoder_flops(encoder, patches, tokens.encoder, tokens.kept if part and dropped else None)}
    if isinstance(sizes, ClipSizes):
        return parts | {"text encoder": _text_flops(sizes.text, tokens.text, encoder.embed_dim, share)}
    if isinstance(sizes, CocaSizes):
        tower = sizes.decoder
        pair = _self_block(tower, tokens.text, share * tokens.text**2) + _cross_block(tower, tokens.text, tokens.kept)
        parts |= {
            "pooler": _pooler_flops(sizes, tokens.encoder),
            # Its class token, and the last token, which the decoder only predicts.
            "text encoder": _text_flops(sizes.text, tokens.text + 2, encoder.embed_dim, share),
            "decoder": _blocks(tower.layers * pair),
        }
    else:
        parts["decoder"] = decoder_flops(sizes, tokens, published=published)
    parts["head"] = _trained(linear(tokens.targets, sizes.decoder.width, sizes.vocab))
    return parts
