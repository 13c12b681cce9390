"""Memory of one training step on one GPU, estimated from plain sizes. Bytes.

Counted: what autograd keeps of blocks and logits, weights, gradients, Adam's moments. An estimate for code without
fusion; allocator slack and the framework's own gigabyte come on top.
"""

from __future__ import annotations

from dataclasses import dataclass

from open_clip_ov2.recipe.flops import CaptionSizes, ClipSizes, CocaSizes, ModelSizes, Tokens, Tower

LOSS_ROWS = 4096  # of logits at once in an ov2 loss on a GPU (core/linear_loss.py)
LOGIT_BYTES = 12  # held at once for one logit, when backward begins: log-probability and two gradients, in fp32


@dataclass(frozen=True)
class Precision:
    """Bytes of one number. `norm`: kept of a LayerNorm's input (a GPU's autocast norms in fp32); `weight`: of a trained
    parameter, its gradient, and each of Adam's moments; `copy`: of autocast's low-precision weight."""

    activation: int
    norm: int
    weight: int
    copy: int


_FULL = Precision(activation=4, norm=4, weight=4, copy=0)
_AUTOCAST = Precision(activation=2, norm=4, weight=4, copy=2)
_PURE = Precision(activation=2, norm=2, weight=2, copy=0)
PRECISION = {
    "fp32": _FULL,
    "amp": _AUTOCAST,
    "amp_bf16": _AUTOCAST,
    "amp_bfloat16": _AUTOCAST,
    "bf16": _PURE,
    "fp16": _PURE,
    "pure_bf16": _PURE,
    "pure_fp16": _PURE,
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


def loss_bytes(sizes: ModelSizes, precision: Precision) -> float:
    """Of an ov2 loss, whatever the batch: one chunk of logits, the same in float32, and their gradient."""
    if not isinstance(sizes, CaptionSizes):
        return 0.0
    return LOSS_ROWS * sizes.vocab * (4.0 + 2 * precision.activation)


def activation_bytes(
    sizes: ModelSizes, tokens: Tokens, resolution: int, precision: Precision, *, grad_checkpointing: bool
) -> float:
    """What the backward pass needs of one image."""
    stacks = _stacks(sizes, tokens)
    if grad_checkpointing:
        # The input of each block, and one block at a time in full.
        kept = 1.0 * sum(layers * rows * tower.width * precision.activation for tower, layers, rows, _ in stacks)
        kept += max(_block_bytes(tower, rows, context, precision) for tower, _, rows, context in stacks)
    else:
        kept = sum(layers * _block_bytes(tower, rows, context, precision) for tower, layers, rows, context in stacks)
    pixels = 3 * resolution**2 * (4 + (precision.activation if precision.activation < 4 else 0))
    return kept + pixels + _head_bytes(sizes, tokens, precision)


def _head_bytes(sizes: ModelSizes, tokens: Tokens, precision: Precision) -> float:
    if isinstance(sizes, CaptionSizes):  # its logits never exist together: hidden states, and their gradient
        return tokens.targets * sizes.decoder.width * 2 * precision.activation
    return 0.0 if isinstance(sizes, ClipSizes) else tokens.targets * sizes.vocab * LOGIT_BYTES


def _stacks(sizes: ModelSizes, tokens: Tokens) -> list[tuple[Tower, int, int, int]]:
    """(tower, blocks, rows, context rows of cross-attention) of each kind of block."""
    stacks = [(sizes.encoder.tower, sizes.encoder.tower.layers, tokens.encoder, 0)]
    if isinstance(sizes, ClipSizes):
        return [*stacks, (sizes.text, sizes.text.layers, tokens.text, 0)]
    tower = sizes.decoder
    if isinstance(sizes, CocaSizes):
        stacks.append((sizes.text, sizes.text.layers, tokens.text + 2, 0))
        pairs = tower.layers
    elif isinstance(sizes, CaptionSizes) and sizes.fusion == "cross_attn":
        pairs = tower.layers // 2
    else:
        return [*stacks, (tower, tower.layers, tokens.kept + tokens.text, 0)]
    return [*stacks, (tower, pairs, tokens.text, 0), (tower, pairs, tokens.text, tokens.kept)]


def _block_bytes(tower: Tower, rows: int, context: int, precision: Precision) -> float:
    """Inputs of two norms; then, in low precision, both norms' outputs, query, key, value, what attention gives, and
    the MLP before and after its activation. A context adds its norm and moves key and value there."""
    low, norm = precision.activation, precision.norm
    own = rows * (tower.width * (2 * norm + 6 * low) + 2 * tower.mlp_width * low + 4 * tower.heads)
    if context:
        own += (context - rows) * tower.width * 2 * low + context * tower.width * (norm + low)
    return float(own)
