"""LLaVA in transformers: a LlavaForConditionalGeneration ready for alignment training.

The vision tower is the ViT of `hf.py`, the projector is new, and the language model is the user's.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import UserError, first_line
from open_clip_ov2.formats import hf
from open_clip_ov2.formats.encoder import Encoder
from open_clip_ov2.formats.target import ExportSource, Target

IMAGE_TOKEN = "<image>"
# The caption loss trains the last block's output, and our decoder reads it. LLaVA's usual -2 is for contrastive
# encoders, whose last block serves the pooled output.
FEATURE_LAYER = -1


def write(
    source: ExportSource,
    folder: Path,
    language_model: str | Path | None = None,
    feature_layer: int = FEATURE_LAYER,
    seed: int = 0,
) -> list[str]:
    """Write the model, its tokenizer with an image token, and its processor. Raises UserError.

    All weights get the language model's dtype, because LLaVA's code runs in one dtype. `feature_layer` is transformers'
    `vision_feature_layer`: -1 is the last block, -2 the one before. `seed` is for the projector's weights.
    """
    encoder = source.encoder
    if language_model is None:
        raise UserError("--to llava needs --language-model DIR, the folder of a causal language model")
    if not -encoder.layers <= feature_layer <= -1:
        raise UserError(f"--feature-layer {feature_layer}: expected -{encoder.layers} (first block) to -1 (last)")
    image_processor = hf.image_processor(encoder)
    transformers = _transformers()
    text_model, tokenizer = _language_model(transformers, Path(language_model))
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
    _write_processor(transformers, image_processor, encoder.patch_size, tokenizer, folder)
    dtype = str(model.dtype).removeprefix("torch.")
    return [
        f"the projector is new; it sees {encoder.num_tokens} image tokens of vision_feature_layer {feature_layer}; all "
        f"weights are {dtype}, as the language model's"
    ]


def _transformers() -> Any:
    import transformers

    if not hasattr(transformers, "LlavaModel"):  # 4.52: the first with the layout that weights are put into below
        raise UserError(f"--to llava needs transformers 4.52 or newer, and found {transformers.__version__}")
    return transformers


def _language_model(transformers: Any, source: Path) -> tuple[Any, Any]:
    """The model, and its tokenizer with an image token. Raises UserError."""
    from tokenizers import AddedToken

    if not source.is_dir():
        raise UserError(f"--language-model {source}: no such folder (it holds config, weights and tokenizer)")
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            source, torch_dtype="auto", local_files_only=True, trust_remote_code=False
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # OSError, ValueError, safetensors', pickle's and torch's own
        raise UserError(f"--language-model {source}: cannot be loaded ({first_line(error)})") from error
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        problem = "no output embeddings" if head is None else "a bias in its output embeddings"
        raise UserError(f"--language-model {source}: {type(model).__name__} has {problem}, which LLaVA cannot use")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True)])  # keeps its own special tokens
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def _take_weights(transformers: Any, model: Any, encoder: Encoder, text_model: Any) -> None:
    """Load encoder and language model strictly; the projector keeps its random weights."""
    model.to(next(text_model.parameters()).dtype)
    # Names in memory differ between versions of transformers; its own loader maps the names on disk to them.
    vit = transformers.ViTModel.from_pretrained(
        None, config=model.config.vision_config, state_dict=hf.state_dict(encoder)
    )
    with torch.no_grad():
        model.model.vision_tower.load_state_dict(vit.state_dict())
        model.model.language_model.load_state_dict(text_model.base_model.state_dict())
        model.lm_head.load_state_dict(text_model.get_output_embeddings().state_dict())


def _write_processor(
    transformers: Any, settings: dict[str, Any], patch_size: int, tokenizer: Any, folder: Path
) -> None:
    settings = {key: value for key, value in settings.items() if key != "image_processor_type"}
    processor = transformers.LlavaProcessor(
        image_processor=transformers.CLIPImageProcessor(**settings),
        tokenizer=tokenizer,
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which the strategy then drops
    )
    processor.save_pretrained(folder)


TARGET = Target(
    name="llava",
    summary="transformers: LlavaForConditionalGeneration.from_pretrained(FOLDER), with a new projector",
    library="transformers",
    example="""from transformers import AutoProcessor, LlavaForConditionalGeneration

processor = AutoProcessor.from_pretrained("{name}")
model = LlavaForConditionalGeneration.from_pretrained("{name}")  # the projector is untrained""",
    write=write,
    options={
        "--language-model": {"type": Path, "metavar": "DIR", "help": "the folder of a causal language model"},
        "--feature-layer": {
            "type": int,
            "metavar": "N",
            "help": "which block's tokens: -1 the last (default), -2 the one before",
        },
    },
)
