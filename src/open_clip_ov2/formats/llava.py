"""LLaVA in transformers: a LlavaForConditionalGeneration ready for alignment training.

The vision tower is the ViT of `export.hf`, the projector is new, the language model is the user's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import UserError
from open_clip_ov2.formats import hf
from open_clip_ov2.formats.encoder import Encoder

IMAGE_TOKEN = "<image>"
# The last block before the final norm: what the caption loss trains, and what our decoder reads. LLaVA's -2 is for
# contrastive encoders, whose last block serves the pooled feature.
FEATURE_LAYER = -1


def write(
    encoder: Encoder, folder: Path, language_model: Path, feature_layer: int = FEATURE_LAYER, seed: int = 0
) -> str:
    """The model, its tokenizer with an image token, and its processor. Raises UserError.

    Returns the name of the dtype of all weights, which is the language model's: LLaVA's code runs in one dtype.
    `feature_layer` is transformers' `vision_feature_layer`: -1 the last block, -2 the one before.
    """
    if not -encoder.layers <= feature_layer <= -1:
        raise UserError(f"--feature-layer {feature_layer}: it is -{encoder.layers} (first block) to -1 (last)")
    from tokenizers import AddedToken

    transformers = _transformers()
    text_model, tokenizer = _language_model(transformers, language_model)
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True)])  # beside its own special tokens
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > text_model.get_input_embeddings().num_embeddings:
        text_model.resize_token_embeddings(len(tokenizer))
    config = transformers.LlavaConfig(
        vision_config=transformers.ViTConfig(**hf.config(encoder)),
        text_config=text_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=encoder.num_tokens,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy="default",  # without the class token
    )
    torch.manual_seed(seed)  # the projector's weights
    model = transformers.LlavaForConditionalGeneration(config)
    _take_weights(transformers, model, encoder, text_model)
    model.save_pretrained(folder)
    _write_processor(transformers, encoder, tokenizer, folder)
    return str(model.dtype).removeprefix("torch.")


def _transformers() -> Any:
    import transformers

    if not hasattr(transformers, "LlavaModel"):  # 4.52: the first with the layout that weights are put into below
        raise UserError(f"--to llava needs transformers 4.52 or newer, and found {transformers.__version__}")
    return transformers


def _language_model(transformers: Any, source: Path) -> tuple[Any, Any]:
    if not source.is_dir():
        raise UserError(f"--language-model {source}: no such folder (it holds config, weights and tokenizer)")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, torch_dtype="auto", local_files_only=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, safetensors', pickle's and torch's own
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"--language-model {source}: cannot be loaded ({reason})") from error
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        lack = "no output embeddings" if head is None else "a bias in its output embeddings"
        raise UserError(f"--language-model {source}: {type(model).__name__} has {lack}, which LLaVA has no place for")
    return model, tokenizer


def _take_weights(transformers: Any, model: Any, encoder: Encoder, text_model: Any) -> None:
    """Encoder and language model, strictly; the projector stays as it was drawn."""
    model.to(next(text_model.parameters()).dtype)
    # transformers' own loader turns the names on disk into those in memory, which differ between its versions.
    vit = transformers.ViTModel.from_pretrained(
        None, config=model.config.vision_config, state_dict=hf.state_dict(encoder)
    )
    with torch.no_grad():
        model.model.vision_tower.load_state_dict(vit.state_dict())
        model.model.language_model.load_state_dict(text_model.base_model.state_dict())
        model.lm_head.load_state_dict(text_model.get_output_embeddings().state_dict())


def _write_processor(transformers: Any, encoder: Encoder, tokenizer: Any, folder: Path) -> None:
    settings = {key: value for key, value in hf.image_processor(encoder).items() if key != "image_processor_type"}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**settings),
        tokenizer=tokenizer,
        patch_size=encoder.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy then drops
    )
    processor.save_pretrained(folder)
