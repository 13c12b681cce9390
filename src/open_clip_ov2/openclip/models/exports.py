"""A model as what `ov2 export` and `ov2 push` write, and as a folder that OpenCLIP loads with this plugin."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.tokenizer import HFTokenizer
from torch import nn

from open_clip_ov2.core import CaptionModel, VisionModel
from open_clip_ov2.core.vit_fast import stock_patches
from open_clip_ov2.errors import UserError
from open_clip_ov2.formats.card import card, run_facts
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.model_files import new_folder, upload, write_tensors
from open_clip_ov2.formats.open_clip import WEIGHTS, WHOLE_TARGET, vision_cfg
from open_clip_ov2.formats.target import CaptionDecoder, ExportSource, Target
from open_clip_ov2.formats.targets import target_of
from open_clip_ov2.openclip.models.factory import CONTRASTIVE_KEY, ONE_TRANSFORMER_KEY
from open_clip_ov2.openclip.models.open_model import HUB, LoadedModel, caption_model, open_model
from open_clip_ov2.openclip.models.own_config import MAX_TOKENS, OwnConfig
from open_clip_ov2.openclip.models.related import ContrastiveCaptionModel, OneTransformerModel
from open_clip_ov2.openclip.models.shipped import shipped_folder
from open_clip_ov2.openclip.models.tokenizer import MODE, WordPieceTokenizer
from open_clip_ov2.train.checkpoint import CheckpointName

# Not "for every shape": timm's and transformers' NaFlex models stretch one table over all grids, and the table of an
# ov2 model counts patches from the corner.
ONE_SHAPE = (
    "note: the model was trained with images of any shape, and {target} has one: images are squeezed to {height} x "
    "{width} px (--image-size HEIGHT WIDTH). For other grids its position table would be stretched, where an ov2 model "
    "counts patches; --to ov2 keeps all shapes"
)


def export(
    source: str,
    to: str,
    out: Path | None = None,
    *,
    image_size: int | tuple[int, int] | None = None,
    position_table: str | None = None,
    license: str | None = None,
    dataset: str | None = None,
    **options: Any,
) -> tuple[Path, list[str]]:
    """(new folder, lines for the user). `image_size`: of a square, or height and width. `options` are the target's own.
    Raises UserError."""
    target = target_of(to)
    run = open_model(source, image_size=image_size, position_table=position_table)
    if out is None:
        if source.startswith(HUB) or shipped_folder(source) is not None:
            raise UserError(f"--out is missing: {source} is not a folder of yours to write into")
        out = run.folder / "export" / to
    names = (out.resolve().name, run.folder.resolve().name, out.name)
    with new_folder(out) as folder:
        return out, _write(run, target, folder, options, *names, license=license, dataset=dataset)


def push(
    source: str,
    repository: str,
    to: str = "ov2",
    *,
    image_size: int | None = None,
    private: bool = False,
    license: str | None = None,
    dataset: str | None = None,
    dry_run: Path | None = None,
) -> list[str]:
    """Lines for the user, the last one with the commit's URL, or with `dry_run`, where all was written instead."""
    target, run = target_of(to), open_model(source, image_size=image_size)
    with new_folder(dry_run) if dry_run else tempfile.TemporaryDirectory() as temporary:
        folder, names = Path(temporary), (repository, repository.split("/")[1], repository)
        lines = _write(run, target, folder, {}, *names, license=license, dataset=dataset)
        done = f"not pushed; what would be: {dry_run}" if dry_run else f"pushed: {upload(folder, repository, private)}"
    return [*lines, done]


def _write(
    run: LoadedModel, target: Target, folder: Path, options: dict[str, Any], name: str, title: str, location: str,
    **about: str | None,
) -> list[str]:  # fmt: skip
    """Write what the target writes of a model of this name, and the model card. Returns lines for the user."""
    source = export_source(run, name)
    with stock_patches(source.visual):  # OpenCLIP's own convolution, which exporters know
        lines = list(target.write(source, folder, **options) or ())
    if run.max_tokens is not None and target is not WHOLE_TARGET:
        height, width = source.encoder.image_size
        lines.append(ONE_SHAPE.format(target=target.name, height=height, width=width))
    at, encoder = CheckpointName.of(run.checkpoint.name), encoder_of(run.model, run.preprocess_cfg)
    facts = run_facts(run.folder, at.stage if at else None, at.samples_seen if at and not at.done else None)
    card(title, location, target, encoder, facts, **about).save(folder / "README.md")
    return lines


def export_source(run: LoadedModel, name: str) -> ExportSource:
    """What the formats may take from a model. Raises UserError for a model that is not ours."""
    whole = encoder = encoder_of(run.model, run.preprocess_cfg)
    visual = run.model.visual
    assert isinstance(visual, nn.Module)
    if run.max_tokens is not None:  # nothing is cut off where images keep their shapes
        encoder = replace(whole, preprocessing=replace(whole.preprocessing, resize_mode="squash"))

    def write_whole(folder: Path) -> None:
        write_model_folder(caption_model(run), whole, run.tokenizer, folder, name, run.max_tokens)

    decoder = released_decoder(run.model, run.tokenizer)
    return ExportSource(encoder, visual, name, clip_shapes, write_whole, decoder)


def clip_shapes(model_cfg: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters of OpenCLIP's own CLIP."""
    with torch.device("meta"):
        return {name: tuple(value.shape) for name, value in open_clip.CLIP(**model_cfg).state_dict().items()}


def encoder_of(model: Any, preprocess_cfg: dict[str, Any]) -> Encoder:
    """The encoder of an ov2 model or of a released encoder. Raises UserError for any other model."""
    if not isinstance(model, (CaptionModel, VisionModel)):
        raise UserError(f"{type(model).__name__} is not an ov2 model, so its encoder cannot be exported")
    return Encoder.of(model.visual, preprocess_cfg)


def released_decoder(model: Any, tokenizer: Any) -> CaptionDecoder | str:
    """The decoder in the authors' format, or the reason why it has no such form."""
    if not isinstance(model, CaptionModel):
        return "the model has none"
    if isinstance(model, OneTransformerModel):
        return "the model's decoder is its encoder"
    config, text = model.text_decoder.config, model.text_config
    if config.fusion != "prefix":
        return f"the authors' format has prefix decoders only, and this one's fusion is {config.fusion}"
    if not isinstance(tokenizer, WordPieceTokenizer):
        return "the authors' format has word pieces only (--tokenizer), and this one has OpenCLIP's tokenizer"
    about = {
        "width": config.width, "depth": config.layers, "num_heads": config.heads, "mlp_dim": config.mlp_width,
        "vocab_size": text.vocab_size, "pad_id": text.pad_id, "bos_id": text.bos_id, "eos_id": text.eos_id,
    }  # fmt: skip
    return CaptionDecoder(about, model.text_decoder.state_dict(), tokenizer.vocabulary)


def write_model_folder(
    model: CaptionModel, encoder: Encoder, tokenizer: Any, folder: Path, name: str, max_tokens: int | None = None
) -> None:
    """Write the whole model as OpenCLIP's `local-dir:` or hub folder; `max_tokens` of one trained with --aspect native.
    `name` is what the folder will be called, or its hub name; OpenCLIP looks for the tokenizer under it."""
    cfg, vocabulary = model_cfg(model, encoder), None
    if isinstance(tokenizer, WordPieceTokenizer):
        cfg["text_cfg"] |= {"hf_tokenizer_name": name, "tokenizer_mode": MODE}
        vocabulary = tokenizer.vocabulary
    elif isinstance(tokenizer, HFTokenizer):
        cfg["text_cfg"] |= {"hf_tokenizer_name": name}
        tokenizer.save_pretrained(str(folder))
    more = {} if max_tokens is None else {MAX_TOKENS: max_tokens}
    OwnConfig(cfg, {**asdict(encoder.preprocessing), **more}, vocabulary).write(folder)
    write_tensors(folder / WEIGHTS, model.state_dict())


def model_cfg(model: CaptionModel, encoder: Encoder) -> dict[str, Any]:
    """OpenCLIP's `model_cfg` that builds this model again."""
    decoder = asdict(model.text_decoder.config)
    fusion, more = decoder.pop("fusion"), dict[str, Any]()
    if isinstance(model, ContrastiveCaptionModel):
        blocks = model.text.transformer.resblocks
        sizes = {"width": blocks[0].attn.embed_dim, "layers": len(blocks), "heads": blocks[0].attn.num_heads}
        more[CONTRASTIVE_KEY] = sizes
    elif isinstance(model, OneTransformerModel):
        more[ONE_TRANSFORMER_KEY] = True
    return {
        "embed_dim": encoder.width,
        "vision_cfg": {**vision_cfg(encoder), "output_tokens": True},
        "text_cfg": asdict(model.text_config),
        "decoder_cfg": decoder,
        "fusion": fusion,
        "keep_ratio": str(model.token_drop.keep_ratio),
        "eval_keep_ratio": model.token_drop.eval_keep_ratio,
        "custom_text": True,
        **more,
    }
