"""The whole method in plain torch: image -> patch tokens -> kept tokens -> text decoder -> loss. Read this first.

Everything else in this package computes the same faster: tests hold it to these lines, and tests/core/test_reference.py
holds these lines to numbers recorded from the authors' code. OV2 is OpenVision 2 (arXiv 2509.01644); docs/reference.md
cites the other facts, and the files of the authors' release. `params` is the state dict of a `CaptionModel`.

Shapes: B batch, N patch tokens, K kept tokens, L caption tokens, S queries, C keys, D width, H heads, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

Params = Mapping[str, Tensor]
IGNORE_INDEX = -100  # F.cross_entropy's default


def caption_loss(
    params: Params, images: Tensor, ids_BL: Tensor, kept_BK: Tensor, *, heads: tuple[int, int], fusion: str, eos_id: int
) -> Tensor:
    """Nats per target token, a scalar, of images `(B, 3, H, W)` with captions `[bos] words [eos] padding`, int64.

    `kept_BK` int64: the patch tokens that are kept of each image. `heads`: of the encoder and of the decoder.
    """
    tokens_BND = encode(params, images, heads[0])
    kept_BKD = torch.stack([tokens[kept] for tokens, kept in zip(tokens_BND, kept_BK, strict=True)])
    logits_BLV = decode(params, kept_BKD, ids_BL[:, :-1], heads[1], fusion)
    return F.cross_entropy(logits_BLV.flatten(0, 1), targets(ids_BL, eos_id).flatten(), ignore_index=IGNORE_INDEX)


def encode(params: Params, images: Tensor, heads: int) -> Tensor:
    """A pre-norm ViT, `(B, 3, H, W)` -> `(B, N, D)`: no norm before its blocks or after them (vit.py:786)."""
    kernel = params["visual.conv1.weight"]
    x_BND = F.conv2d(images, kernel, stride=kernel.shape[-1]).flatten(2).mT
    class_token_B1D = params["visual.class_embedding"].expand(len(images), 1, -1)
    x_BSD = torch.cat([class_token_B1D, x_BND], dim=1) + params["visual.positional_embedding"]  # core/positions.py
    for block in _blocks(params, "visual.transformer.resblocks."):
        x_BSD = _mlp(block, _attend(block, x_BSD, x_BSD, heads), approximate="none")
    return x_BSD[:, 1:]


def keep(batch: int, num_tokens: int, keep_ratio: float) -> Tensor:
    """A random subset of each image's patch tokens, `(B, int(N * keep_ratio))` (OV2, section 3)."""
    return torch.rand(batch, num_tokens).argsort(dim=1)[:, : int(num_tokens * keep_ratio)]


def decode(params: Params, kept_BKD: Tensor, ids_BL: Tensor, heads: int, fusion: str) -> Tensor:
    """Logits of the next token at each caption position, `(B, L, V)`. There is no position embedding for text.

    `prefix`: image tokens see the image; caption tokens see the image and the caption up to themselves. `causal`: each
    token sees those before it, image tokens first. `cross_attn`: every second block attends from captions to the image.
    """
    image_BKD = F.linear(kept_BKD, params["text_decoder.image_projection.weight"])
    x = text_BLD = params["text_decoder.token_embedding.weight"][ids_BL]
    num_image = 0 if fusion == "cross_attn" else image_BKD.shape[1]
    if num_image:
        x = torch.cat([image_BKD, text_BLD], dim=1)
    sees = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
    if fusion == "prefix":
        sees[:, :num_image] = True
    for block in _blocks(params, "text_decoder.blocks."):
        if "ln_context.weight" in block:
            x = _attend(block, x, image_BKD, heads)
        else:
            x = _attend(block, x, x, heads, sees)
        x = _mlp(block, x, approximate="tanh")
    hidden_BLD = _norm(params, "text_decoder.ln_final", x[:, num_image:])
    return F.linear(hidden_BLD, params["text_decoder.lm_head.weight"])


def targets(ids_BL: Tensor, eos_id: int) -> Tensor:
    """The next token at each position but the last, `(B, L - 1)`; IGNORE_INDEX after the first end of text."""
    ended_BL = (ids_BL == eos_id).cumsum(dim=1) > 0
    return ids_BL[:, 1:].masked_fill(ended_BL[:, :-1], IGNORE_INDEX)


def _attend(block: Params, x_BSD: Tensor, context_BCD: Tensor, heads: int, sees_SC: Tensor | None = None) -> Tensor:
    """`x` plus what each of its tokens finds among those of the context that it sees (all of them by default)."""
    normed_BSD = _norm(block, "ln_1", x_BSD)
    normed_BCD = normed_BSD if context_BCD is x_BSD else _norm(block, "ln_context", context_BCD)
    weights, biases = block["attn.in_proj_weight"].chunk(3), block["attn.in_proj_bias"].chunk(3)
    inputs = (normed_BSD, normed_BCD, normed_BCD)
    q, k, v = (
        F.linear(y, w, b).unflatten(-1, (heads, -1)).transpose(1, 2)
        for y, w, b in zip(inputs, weights, biases, strict=True)
    )
    scores_BHSC = q @ k.mT * q.shape[-1] ** -0.5
    if sees_SC is not None:
        scores_BHSC = scores_BHSC.masked_fill(~sees_SC, -torch.inf)
    found_BSD = (scores_BHSC.softmax(dim=-1) @ v).transpose(1, 2).flatten(2)
    return x_BSD + F.linear(found_BSD, block["attn.out_proj.weight"], block["attn.out_proj.bias"])


def _mlp(block: Params, x: Tensor, approximate: str) -> Tensor:
    """GELU is exact in the encoder and the tanh approximation in the decoder, as flax has it by default."""
    hidden = F.linear(_norm(block, "ln_2", x), block["mlp.c_fc.weight"], block["mlp.c_fc.bias"])
    return x + F.linear(F.gelu(hidden, approximate=approximate), block["mlp.c_proj.weight"], block["mlp.c_proj.bias"])


def _norm(params: Params, name: str, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], params[f"{name}.weight"], params[f"{name}.bias"], eps=1e-6)


def _blocks(params: Params, prefix: str) -> list[Params]:
    """The parameters of each block in order, by their names within the block."""
    names = [name.removeprefix(prefix) for name in params if name.startswith(prefix)]
    numbers = sorted({int(name.split(".")[0]) for name in names})
    return [
        {name.removeprefix(f"{n}."): params[prefix + name] for name in names if name.startswith(f"{n}.")}
        for n in numbers
    ]
