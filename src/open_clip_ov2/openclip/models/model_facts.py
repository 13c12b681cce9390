"""Plain sizes and parameter counts of OpenCLIP's models, for `recipe`; built on the meta device, without memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.coca_model import CoCa
from open_clip.transformer import VisionTransformer
from torch import nn

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.openclip.models.factory import config_named
from open_clip_ov2.openclip.models.related import OneTransformerModel
from open_clip_ov2.openclip.models.tokenizer import REFERENCE_VOCAB_SIZE, text_cfg_for, text_options
from open_clip_ov2.quiet import quiet
from open_clip_ov2.recipe.model_costs import Encoder, ModelSizes, Tokens, Tower, count_tokens

# Parts of a model by the beginning of a parameter's name, in ov2 models, CLIP and CoCa; what remains is a text encoder.
PARTS = (
    ("visual.", "encoder"),
    ("token_embedding.", "token embedding"),
    ("text_decoder.token_embedding.", "token embedding"),
    ("text_decoder.lm_head.", "head"),
    ("text_decoder.text_projection", "head"),
    ("text_decoder.", "decoder"),
    ("", "text encoder"),
)


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model. `parameters` by part, in the order in which data passes through them."""

    sizes: ModelSizes
    parameters: dict[str, int]
    trained: int
    frozen: int
    resolution: int
    context_length: int
    keep_ratio: tuple[float, float] | None
    patch_dropout: float

    def tokens(self, mean_caption_tokens: float | None = None) -> Tokens:
        """Tokens of one image and its caption; `mean_caption_tokens` are real targets, by default all positions."""
        return count_tokens(
            self.sizes,
            self.resolution,
            self.context_length,
            keep=self.keep_ratio,
            patch_dropout=self.patch_dropout,
            mean_caption_tokens=mean_caption_tokens,
        )


def model_facts(
    name: str, *, context_length: int | None = None, tokenizer: str | None = None, **options: Any
) -> ModelFacts:
    """Facts of a model that OpenCLIP can create; `options` as for `meta_model`. Raises UserError."""
    config = config_named(name)
    if config.get("text_cfg", {}).get("hf_model_name"):  # building it would ask the hub
        raise UserError(f"--model {name}: costs are known for OpenCLIP's own text towers, which this model has not")
    if tokenizer:
        length = context_length or config["text_cfg"].get("context_length", 77)
        if Path(tokenizer).expanduser().exists():
            text_cfg = text_cfg_for(tokenizer, length)
        else:  # a hub name: no need to download its vocabulary to know the head's size
            text_cfg = {"context_length": length, "vocab_size": REFERENCE_VOCAB_SIZE, "bos_id": 1, "eos_id": 2}
        options |= text_options(name, config, text_cfg)
    return facts_of(name, meta_model(name, context_length=context_length, **options))


def meta_model(
    name: str,
    *,
    resolution: int | Sequence[int] | None = None,
    context_length: int | None = None,
    patch_dropout: float | None = None,
    **options: Any,
) -> nn.Module:
    """A model without memory, on the meta device; `options` are further ones of `create_model`. Raises UserError."""
    try:
        with quiet(), torch.device("meta"):
            return open_clip.create_model(
                name, device="meta", load_weights=False, pretrained_hf=False, force_image_size=resolution,
                force_context_length=context_length, force_patch_dropout=patch_dropout, **options,
            )  # fmt: skip
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"--model {name}: {first_line(error)}") from error


def facts_of(name: str, model: Any) -> ModelFacts:
    """Facts of a model that exists. Raises UserError for one that is not made of plain transformers."""
    if not isinstance(model.visual, VisionTransformer):
        raise UserError(f"--model {name}: costs are known for plain ViTs, which its image tower is not")
    text = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    ratio, size = model.token_drop.keep_ratio if isinstance(model, CaptionModel) else None, model.visual.image_size
    return ModelFacts(
        sizes=_sizes(model, text),
        parameters=_parameters(model),
        trained=trained,
        frozen=sum(parameter.numel() for parameter in model.parameters()) - trained,
        resolution=int(size[0] if isinstance(size, (tuple, list)) else size),
        context_length=_context_length(name, model),
        keep_ratio=(ratio.low, ratio.high) if ratio else None,
        patch_dropout=float(getattr(model.visual.patch_dropout, "prob", 0.0)),
    )


def _context_length(name: str, model: Any) -> int:
    if not isinstance(model, CoCa):
        return int(model.context_length)
    forced, most = int(model.text.context_length), int(model.text_decoder.context_length)
    if forced > most:
        raise UserError(f"--model {name}: context-length {forced}: OpenCLIP's CoCa decoder ends at {most}")
    return forced


def _sizes(model: Any, text: Any) -> ModelSizes:
    visual, contrastive = model.visual, text is not None
    (pooled_width, embed_dim), patch_size = visual.proj.shape, visual.conv1.kernel_size[0]
    # The encoder's head is trained with a text encoder.
    encoder = Encoder(_tower(visual.transformer.resblocks), patch_size, pooled_width, embed_dim, contrastive)
    tower = _tower(text.transformer.resblocks) if contrastive else None
    if isinstance(model, CaptionModel):
        decoder, one = model.text_decoder, isinstance(model, OneTransformerModel)
        head, fusion = decoder.lm_head.out_features, decoder.config.fusion
        return ModelSizes(encoder, head, _tower(decoder.blocks), tower, fusion, one_transformer=one)
    if not isinstance(model, CoCa):
        return ModelSizes(encoder, int(text.token_embedding.num_embeddings), text=tower)
    vocab, queries = model.text_decoder.text_projection.shape[1], visual.attn_pool.query.shape[0]
    return ModelSizes(encoder, vocab, _tower(model.text_decoder.resblocks), tower, queries=queries)


def _tower(blocks: Any) -> Tower:
    attention, fc = blocks[0].attn, blocks[0].mlp.c_fc
    heads = attention.num_heads if hasattr(attention, "num_heads") else attention.heads
    return Tower(fc.in_features, len(blocks), heads, fc.out_features)


def _parameters(model: nn.Module) -> dict[str, int]:
    """Parameters by part; embedding and head of a decoder on their own, since a vocabulary can outweigh it."""
    counts = dict.fromkeys(("encoder", "text encoder", "decoder", "token embedding", "head"), 0)
    for name, parameter in model.named_parameters():
        part = next(part for prefix, part in PARTS if name.removeprefix("text.").startswith(prefix))
        counts[part] += parameter.numel()
    return {part: count for part, count in counts.items() if count}
