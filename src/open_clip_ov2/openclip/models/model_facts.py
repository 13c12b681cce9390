"""Plain sizes and parameter counts of OpenCLIP's models, for `recipe`; built on the meta device, without memory."""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip import factory as open_clip_factory
from open_clip.coca_model import CoCa
from open_clip.model import CLIPVisionCfg
from open_clip.transformer import VisionTransformer
from torch import nn

from open_clip_ov2.core import CaptionModel
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.factory import is_ov2_config, known_models
from open_clip_ov2.openclip.models.tokenizer import REFERENCE_VOCAB_SIZE, text_cfg_for, text_options
from open_clip_ov2.quiet import quiet
from open_clip_ov2.recipe.flops import CaptionSizes, ClipSizes, CocaSizes, Encoder, ModelSizes, Tower


@dataclass(frozen=True)
class ModelFacts:
    """What planning needs to know of a model. `parameters` by part, in the order of the data's way through them."""

    name: str
    sizes: ModelSizes
    parameters: dict[str, int]
    trained: int
    frozen: int
    context_length: int
    keep_ratio: tuple[float, float] | None
    patch_dropout: float

    def settings(self) -> dict[str, Any]:
        """What `recipe.plan.resolve` wants to know of the model."""
        return {
            "family": isinstance(self.sizes, CaptionSizes),
            "context_length": self.context_length,
            "keep_ratio": self.keep_ratio,
            "patch_dropout": self.patch_dropout,
        }


def model_facts(
    name: str,
    *,
    resolution: int | None = None,
    context_length: int | None = None,
    tokenizer: str | None = None,
    fusion: str | None = None,
) -> ModelFacts:
    """Facts of a model of OpenCLIP's registry, or `local-dir:FOLDER`. Raises UserError."""
    config = _config(name)
    patch_size = config["vision_cfg"].get("patch_size", CLIPVisionCfg.patch_size)
    if resolution is not None and resolution < patch_size:
        raise UserError(f"resolution {resolution}: smaller than one patch of {patch_size} px")
    options: dict[str, Any] = {}
    if is_ov2_config(config):
        options = {} if fusion is None else {"fusion": fusion}
    if tokenizer:
        words = _text_cfg(tokenizer, context_length or config["text_cfg"].get("context_length", 77))
        options |= text_options(name, config, words)
    try:
        with quiet(), torch.device("meta"):
            model = open_clip.create_model(
                name,
                device="meta",
                load_weights=False,
                force_image_size=resolution,
                force_context_length=context_length,
                pretrained_hf=False,
                **options,
            )
    except (ValueError, RuntimeError, AssertionError) as error:
        raise UserError(f"--model {name}: {error}") from error
    return facts_of(name, model)


def _config(name: str) -> dict[str, Any]:
    if ":" in name and not name.startswith("local-dir:"):
        raise UserError(f"--model {name}: a plan is for models of OpenCLIP's registry and local-dir:FOLDER")
    if ":" not in name and name not in known_models():
        near = get_close_matches(name, known_models(), n=3, cutoff=0.5)
        hint = f"; near: {', '.join(near)}" if near else ""
        raise UserError(f"--model {name}: no such model{hint} (open_clip.list_models() lists them)")
    try:
        config = open_clip_factory.get_model_config(name)
    except OSError as error:
        raise UserError(f"--model {name}: no open_clip_config.json to be read there") from error
    if config is None:
        raise UserError(f"--model {name}: no config to be had")
    vision, text = config.get("vision_cfg", {}), config.get("text_cfg", {})
    if vision.get("timm_model_name") or not isinstance(vision.get("layers", 12), int):
        raise UserError(f"--model {name}: a plan is for plain ViTs, which its image tower is not")
    if text.get("hf_model_name"):  # building it would ask the hub
        raise UserError(f"--model {name}: a plan is for OpenCLIP's own text towers, which its is not")
    return config


def _text_cfg(tokenizer: str, context_length: int) -> dict[str, Any]:
    if Path(tokenizer).expanduser().exists():
        return text_cfg_for(tokenizer, context_length)
    # A hub name: no need to download its vocabulary to know the head's size.
    return {"context_length": context_length, "vocab_size": REFERENCE_VOCAB_SIZE, "bos_id": 1, "eos_id": 2}


def facts_of(name: str, model: Any) -> ModelFacts:
    """The same of a model that is there. Raises UserError for one that is not made of plain transformers."""
    if not isinstance(model.visual, VisionTransformer):
        raise UserError(f"--model {name}: a plan is for plain ViTs, which its image tower is not")
    text = model if hasattr(model, "token_embedding") else getattr(model, "text", None)
    counts = [(parameter.numel(), parameter.requires_grad) for parameter in model.parameters()]
    ratio = model.token_drop.keep_ratio if isinstance(model, CaptionModel) else None
    return ModelFacts(
        name=name,
        sizes=_sizes(model, text),
        parameters=_parameters(model, text),
        trained=sum(count for count, trained in counts if trained),
        frozen=sum(count for count, trained in counts if not trained),
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
    encoder = _encoder(model.visual, trained_head=not isinstance(model, CaptionModel))
    if isinstance(model, CaptionModel):
        decoder = model.text_decoder
        return CaptionSizes(encoder, _tower(decoder.blocks), decoder.lm_head.out_features, decoder.config.fusion)
    vocab, tower = int(text.token_embedding.num_embeddings), _tower(text.transformer.resblocks)
    if isinstance(model, CoCa):
        head = model.text_decoder.text_projection.shape[1]
        queries = model.visual.attn_pool.query.shape[0]
        return CocaSizes(encoder, tower, _tower(model.text_decoder.resblocks), head, queries)
    return ClipSizes(encoder, tower, vocab)


def _encoder(visual: Any, trained_head: bool) -> Encoder:
    pooled_width, embed_dim = visual.proj.shape
    return Encoder(
        _tower(visual.transformer.resblocks), visual.conv1.kernel_size[0], pooled_width, embed_dim, trained_head
    )


def _tower(blocks: Any) -> Tower:
    attention, fc = blocks[0].attn, blocks[0].mlp.c_fc
    heads = attention.num_heads if isinstance(attention, nn.MultiheadAttention) else attention.heads
    return Tower(fc.in_features, len(blocks), heads, fc.out_features)


def _count(*modules: nn.Module | nn.Parameter) -> int:
    return sum(
        module.numel() if isinstance(module, nn.Parameter) else sum(p.numel() for p in module.parameters())
        for module in modules
    )


def _parameters(model: Any, text: Any) -> dict[str, int]:
    """Parameters by part; embedding and head of a decoder on their own, since a vocabulary can outweigh it."""
    total, encoder = _count(model), _count(model.visual)
    if isinstance(model, CaptionModel):
        decoder = model.text_decoder
        head, embedding = _count(decoder.lm_head), _count(decoder.token_embedding)
        rest = {"decoder": total - encoder - head - embedding, "token embedding": embedding, "head": head}
    elif isinstance(model, CoCa):
        head, embedding = _count(model.text_decoder.text_projection), _count(text.token_embedding)
        rest = {
            "text encoder": _count(text) - embedding,
            "decoder": _count(model.text_decoder) - head,
            "token embedding": embedding,
            "head": head,
        }
    else:
        embedding = _count(text.token_embedding)
        rest = {"text encoder": total - encoder - embedding, "token embedding": embedding}
    return {"encoder": encoder, **rest}
