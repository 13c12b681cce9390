"""Floating-point operations and memory of one training step, from a model's plain sizes.

A multiply-add counts as two operations. The backward pass costs twice the forward pass, except for the patch embedding,
whose pixels need no gradient. Attention counts whole rows, as torch's FlopCounterMode does and as a kernel with a mask
computes it; the image tokens of an ov2 decoder attend to image tokens alone. An ov2 model computes its last encoder
block for the kept tokens alone and its last decoder block for the caption alone. Left out, being less than 1%: norms,
activations, the optimizer, and the similarity matrix of a contrastive loss.

Memory, in bytes: what autograd keeps of blocks and logits, weights, gradients, Adam's moments. It is an estimate for
code without fusion; allocator slack and the framework's own gigabyte come on top.

Tests hold both to FlopCounterMode and to what autograd really keeps, on real models.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from open_clip_ov2.errors import UserError

PARTS = ("encoder", "pooler", "text encoder", "decoder", "head")  # in the order in which data passes through them
LOSS_ROWS = 4096  # of logits at once in an ov2 loss on a GPU (core/linear_loss.py)
LOGIT_BYTES = 12  # held at once for one logit, when backward begins: log-probability and two gradients, in fp32


@dataclass(frozen=True)
class Tower:
    """Equal pre-norm transformer blocks."""

    width: int
    layers: int
    heads: int
    mlp_width: int

    @property
    def block_parameters(self) -> int:
        """Matrices of attention and MLP; biases and norms are 0.1% of that."""
        return 4 * self.width**2 + 2 * self.width * self.mlp_width


@dataclass(frozen=True)
class Encoder:
    """A ViT. Its pooled output is projected from `pooled_width` to `embed_dim`; `trained_head`: the loss reaches it.
    `budget`: patches of one image at most, where images keep their shapes; costs are those of all of it."""

    tower: Tower
    patch_size: int
    pooled_width: int
    embed_dim: int
    trained_head: bool = True
    budget: int | None = None

    def patches(self, resolution: int) -> int:
        return self.budget or (resolution // self.patch_size) ** 2


@dataclass(frozen=True)
class ModelSizes:
    """An ov2 model has a decoder over [kept image tokens ; caption tokens]; CLIP has a text encoder; CoCa has both, and
    its decoder's blocks attend to the text and then to `queries` - 1 pooled image tokens. OpenVision 1's has ov2's
    decoder and a text encoder; in `one_transformer` the decoder's blocks are the encoder's."""

    encoder: Encoder
    vocab: int
    decoder: Tower | None = None
    text: Tower | None = None
    fusion: str = "prefix"
    queries: int = 0
    one_transformer: bool = False

    @property
    def is_ov2(self) -> bool:
        return self.decoder is not None and not self.queries


@dataclass(frozen=True)
class Tokens:
    """Tokens of one image and its caption.

    `encoder`: all that the ViT sees, class token included. `kept`: image tokens that a decoder sees. `text`: caption
    positions computed, padding included where it is. `targets`: positions whose logits are computed. `context`: what
    OpenVision 1's text encoder sees, padding included.
    """

    encoder: int
    kept: int
    text: float
    targets: float
    context: int = 0


def count_tokens(
    sizes: ModelSizes,
    resolution: int,
    context_length: int,
    *,
    keep: tuple[float, float] | None = None,
    patch_dropout: float = 0.0,
    mean_caption_tokens: float | None = None,
) -> Tokens:
    """Tokens of one image and caption; the mean of a range of keep ratios. Raises UserError if no token is kept."""
    seen = sizes.encoder.patches(resolution)
    if patch_dropout:
        seen = max(1, int(seen * (1 - patch_dropout)))
    text = context_length - 1
    if sizes.decoder is None:
        return Tokens(seen + 1, 0, context_length, 0.0)
    if not sizes.is_ov2:  # CoCa's loss computes every position, padding too
        return Tokens(seen + 1, sizes.queries - 1, text, float(text))
    low, high = keep or (1.0, 1.0)
    kept = int(seen * (low + high) / 2)
    if kept < 1:
        raise UserError(f"keep-ratio {low:g} keeps none of {seen} image tokens at {resolution} px")
    targets = min(float(text), mean_caption_tokens or text)
    kept = seen + 1 if sizes.one_transformer else kept  # with the class token
    context = context_length if sizes.text else 0
    # Captions are packed: almost no padding is computed.
    return Tokens(seen + 1, kept, math.ceil(targets), targets, context)


@dataclass(frozen=True)
class Stack:
    """Equal blocks of one part of the model: `queries` rows attend to `keys` rows, computing `pairs` of a query and a
    key; in cross-attention the keys belong to another sequence. In self-attention fewer queries than keys mean that
    only the output of those rows is read."""

    part: str
    tower: Tower
    blocks: int
    queries: float
    keys: float
    pairs: float
    cross: bool = False

    def flops(self) -> float:
        """Of the forward pass: four projections, attention (weights, then values), and the MLP."""
        width = self.tower.width
        projections = 4.0 * (self.queries + self.keys) * width**2
        mlp = 4.0 * self.queries * width * self.tower.mlp_width
        return self.blocks * (projections + 4.0 * self.pairs * width + mlp)

    def block_bytes(self, precision: Precision) -> float:
        """What autograd keeps of one block: inputs of two norms; then, in low precision, both norms' outputs, query,
        key, value, what attention gives, and the MLP before and after its activation. Cross-attention adds the norm of
        its keys' rows, and moves key and value there."""
        low, norm, width = precision.activation, precision.norm, self.tower.width
        rows = self.queries if self.cross else self.keys
        own = rows * (width * (2 * norm + 6 * low) + 2 * self.tower.mlp_width * low + 4 * self.tower.heads)
        if self.cross:
            own += (self.keys - rows) * width * 2 * low + self.keys * width * (norm + low)
        return float(own)


def stacks(sizes: ModelSizes, tokens: Tokens) -> list[Stack]:
    """All transformer blocks of a model."""
    tower, rows, text = sizes.encoder.tower, tokens.encoder, tokens.text
    kept = rows if sizes.one_transformer else tokens.kept
    read = kept if sizes.is_ov2 and sizes.text is None and kept < rows - 1 else rows  # the class token aside
    found = [
        Stack("encoder", tower, tower.layers - 1, rows, rows, rows * rows),
        Stack("encoder", tower, 1, read, rows, read * rows),
    ]
    if sizes.one_transformer:  # as its decoder
        found.clear()
    if sizes.text is not None:
        # CoCa's text encoder also has its class token, and the last token, which the decoder only predicts.
        length = tokens.context or (text + 2 if sizes.decoder else text)
        found.append(Stack("text encoder", sizes.text, sizes.text.layers, length, length, length * length))
    if sizes.decoder is None:
        return found
    tower, both = sizes.decoder, kept + text
    if sizes.is_ov2 and sizes.fusion != "cross_attn":
        whole = Stack("decoder", tower, tower.layers - 1, both, both, kept**2 + text * both)
        return [*found, whole, Stack("decoder", tower, 1, text, both, text * both)]
    pairs = tower.layers // 2 if sizes.is_ov2 else tower.layers  # self- and cross-attention blocks in turn
    found.append(Stack("decoder", tower, pairs, text, text, text * text))
    return [*found, Stack("decoder", tower, pairs, text, tokens.kept, text * tokens.kept, cross=True)]


class Flops(NamedTuple):
    """Of one image, forward and backward. `blocks` is the part of its forward pass that gradient checkpointing computes
    again."""

    total: float
    blocks: float


def flops(sizes: ModelSizes, resolution: int, tokens: Tokens) -> dict[str, Flops]:
    """Of one image, by part of the model."""
    encoder, found = sizes.encoder, stacks(sizes, tokens)
    image_width = encoder.tower.width
    # (part, FLOPs of the forward pass, those of the backward pass in multiples of it)
    others = [
        ("encoder", _linear(encoder.patches(resolution), 3 * encoder.patch_size**2, image_width), 1),
        ("encoder", _linear(1, encoder.pooled_width, encoder.embed_dim), 2 if encoder.trained_head else 0),
    ]
    if sizes.queries:  # attention of learned queries, of the embedding's width, to all encoder tokens
        width, queries = encoder.embed_dim, sizes.queries
        pooler = 2 * _linear(queries, width, width) + 2 * _linear(tokens.encoder, image_width, width)
        others.append(("pooler", pooler + 4.0 * queries * tokens.encoder * width, 2))
    if sizes.text is not None:
        others.append(("text encoder", _linear(1, sizes.text.width, encoder.embed_dim), 2))
    if sizes.decoder is not None:
        if sizes.is_ov2 and not sizes.one_transformer:
            others.append(("decoder", _linear(tokens.kept, image_width, sizes.decoder.width), 2))
        others.append(("head", _linear(tokens.targets, sizes.decoder.width, sizes.vocab), 2))
    parts = {}
    for part in sorted({stack.part for stack in found} | {part for part, *_ in others}, key=PARTS.index):
        blocks = sum(stack.flops() for stack in found if stack.part == part)
        rest = sum((1 + backward) * forward for name, forward, backward in others if name == part)
        parts[part] = Flops(3 * blocks + rest, blocks)
    return parts


def _linear(rows: float, inputs: int, outputs: int) -> float:
    return 2.0 * rows * inputs * outputs


def total_flops(sizes: ModelSizes, resolution: int, tokens: Tokens) -> float:
    """Forward and backward of one image."""
    return sum(part.total for part in flops(sizes, resolution, tokens).values())


@dataclass(frozen=True)
class Precision:
    """Bytes of one number. `norm`: kept of a LayerNorm's input (a GPU's autocast norms in fp32); `weight`: of a trained
    parameter, its gradient, and each of Adam's moments; `copy`: of autocast's low-precision weight."""

    activation: int
    norm: int
    weight: int
    copy: int


_AUTOCAST = Precision(activation=2, norm=4, weight=4, copy=2)
_PURE = Precision(activation=2, norm=2, weight=2, copy=0)
PRECISION = {
    "fp32": Precision(activation=4, norm=4, weight=4, copy=0),
    **dict.fromkeys(("amp", "amp_bf16", "amp_bfloat16"), _AUTOCAST),
    **dict.fromkeys(("bf16", "fp16", "pure_bf16", "pure_fp16"), _PURE),
}


@dataclass(frozen=True)
class Memory:
    """Of one GPU: `fixed`, whatever the batch, and `per_image`."""

    fixed: float
    per_image: float

    def of(self, images: int) -> float:
        return self.fixed + images * self.per_image

    def most_images(self, limit: float) -> int:
        return max(0, int((limit - self.fixed) / self.per_image))


def fixed_bytes(trained: int, frozen: int, precision: Precision, gpus: int) -> float:
    """Weights, gradients, two moments; with several GPUs also DDP's buckets, as large as the gradients."""
    buckets = precision.weight if gpus > 1 else 0
    each = 4 * precision.weight + precision.copy + buckets
    return float(trained * each + frozen * (precision.weight + precision.copy))


def sharded_bytes(sizes: ModelSizes, trained: int, frozen: int, precision: Precision, shards: int) -> float:
    """The same of one of `shards` processes under FSDP2: its part of all that; and gathered, with their gradients, what
    is in no block, a block that computes, and the parameters of the next one, fetched meanwhile."""
    towers = (sizes.encoder.tower, sizes.decoder, sizes.text)
    blocks = [(tower.layers, tower.block_parameters) for tower in towers if tower is not None]
    rest = trained + frozen - sum(layers * one for layers, one in blocks)
    largest, gathered = max(one for _, one in blocks), precision.copy or precision.weight
    own = (4 * trained + frozen) * precision.weight / shards
    return own + 2.0 * (rest + largest) * gathered + largest * (gathered + precision.weight)


def loss_bytes(sizes: ModelSizes, precision: Precision) -> float:
    """Of an ov2 loss, whatever the batch: one chunk of logits, the same in float32, and their gradient."""
    return LOSS_ROWS * sizes.vocab * (4.0 + 2 * precision.activation) if sizes.is_ov2 else 0.0


def activation_bytes(
    sizes: ModelSizes, tokens: Tokens, resolution: int, precision: Precision, *, grad_checkpointing: bool
) -> float:
    """What the backward pass needs of one image."""
    found, low = stacks(sizes, tokens), precision.activation
    if grad_checkpointing:  # the input of each block, and one block at a time in full
        rows = sum(stack.blocks * (stack.queries if stack.cross else stack.keys) * stack.tower.width for stack in found)
        kept = 1.0 * rows * low + max(stack.block_bytes(precision) for stack in found)
    else:
        kept = sum(stack.blocks * stack.block_bytes(precision) for stack in found)
    pixels = 3 * resolution**2 * (4 + (low if low < 4 else 0))
    if sizes.decoder is None:
        return kept + pixels
    if sizes.is_ov2:  # its logits never exist together: hidden states, and their gradient
        return kept + pixels + tokens.targets * sizes.decoder.width * 2 * low
    return kept + pixels + tokens.targets * sizes.vocab * LOGIT_BYTES
