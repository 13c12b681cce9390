"""LLaVA in transformers: a LlavaForConditionalGeneration ready for alignment training.

The vision tower is the ViT of `hf.py`, the projector is new, and the language model is the user's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
    transformers = library()
    text_model, tokenizer = open_language_model(Path(language_model))
    tower = vision_tower(encoder)
    tower.model.to(next(text_model.parameters()).dtype)
    torch.manual_seed(seed)  # the projector's weights
    model = assembled(tower, text_model, tokenizer, feature_layer)
    model.save_pretrained(folder)
    processor = processor_of(tower, tokenizer, transformers.CLIPImageProcessor, transformers.LlavaProcessor)
    processor.save_pretrained(folder)
    dtype = str(model.dtype).removeprefix("torch.")
    return [
        f"the projector is new; it sees {encoder.num_tokens} image tokens of vision_feature_layer {feature_layer}; all "
        f"weights are {dtype}, as the language model's"
    ]


def library() -> Any:
    """transformers. Raises UserError if it is too old."""
    import transformers

    if not hasattr(transformers, "LlavaModel"):  # 4.52: the first with the layout that weights are put into below
        raise UserError(f"LLaVA needs transformers 4.52 or newer, and found {transformers.__version__}")
    return transformers


@dataclass(frozen=True)
class VisionTower:
    """A vision model of transformers for images of `image_size` px, with the settings of its image processor.
    `class_token`: whether its first token is one, which LLaVA drops."""

    model: Any
    image_processor: Mapping[str, Any]
    image_size: int
    patch_size: int
    class_token: bool = True

    @property
    def num_tokens(self) -> int:
        """Patch tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def select_strategy(self) -> str:
        """transformers' `vision_feature_select_strategy`."""
        return "default" if self.class_token else "full"


def vision_tower(encoder: Encoder) -> VisionTower:
    """Our encoder as transformers' ViTModel, in float32. Raises UserError for images that are not square."""
    transformers = library()
    settings = hf.image_settings(encoder.image_size, encoder.preprocessing)
    # Names in memory differ between versions of transformers; its own loader maps the names on disk to them.
    vit = transformers.ViTModel.from_pretrained(
        None, config=transformers.ViTConfig(**hf.config(encoder)), state_dict=hf.state_dict(encoder)
    )
    return VisionTower(vit, settings, encoder.image_size[0], encoder.patch_size)


def open_language_model(source: Path | str, gguf_file: str | None = None) -> tuple[Any, Any]:
    """A causal language model and its tokenizer with an image token, from a folder or, if there is none of this name,
    from the hub. Raises UserError."""
    from tokenizers import AddedToken

    transformers = library()
    if isinstance(source, Path) and not source.is_dir():
        raise UserError(f"--language-model {source}: no such folder (it holds config, weights and tokenizer)")
    options: dict[str, Any] = {"local_files_only": isinstance(source, Path), "trust_remote_code": False}
    options |= {} if gguf_file is None else {"gguf_file": gguf_file}
    # transformers 5.24 would keep the file's blocks, and calls the model quantized, which Trainer does not train.
    gguf = getattr(transformers, "GgufConfig", None) if gguf_file else None
    dense = {"quantization_config": gguf(dequantize=True)} if gguf else {}
    try:
        model = transformers.AutoModelForCausalLM.from_pretrained(source, torch_dtype="auto", **dense, **options)
        tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    except Exception as error:  # OSError, ValueError, safetensors', pickle's and torch's own
        raise UserError(f"--language-model {source}: cannot be loaded ({first_line(error)})") from error
    head = model.get_output_embeddings()
    if head is None or getattr(head, "bias", None) is not None:
        problem = "no output embeddings" if head is None else "a bias in its output embeddings"
        raise UserError(f"--language-model {source}: {type(model).__name__} has {problem}, which LLaVA cannot use")
    tokenizer.add_tokens([AddedToken(IMAGE_TOKEN, special=True)])  # keeps its own special tokens
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    return model, tokenizer


def assembled(
    tower: VisionTower,
    text_model: Any,
    tokenizer: Any,
    feature_layer: int,
    grid_pinpoints: Sequence[Sequence[int]] = (),
) -> Any:
    """LLaVA of these parts, with a new projector; each part keeps its dtype. With `grid_pinpoints` (heights and widths
    in px) it is a LLaVA-NeXT."""
    transformers = library()
    family = "LlavaNext" if grid_pinpoints else "Llava"
    more = {"image_grid_pinpoints": [list(sides) for sides in grid_pinpoints]} if grid_pinpoints else {}
    config = getattr(transformers, f"{family}Config")(
        vision_config=tower.model.config,
        text_config=text_model.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=tower.num_tokens,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=tower.select_strategy,
        **more,
    )
    model = getattr(transformers, f"{family}ForConditionalGeneration")(config)
    dtype = next(text_model.parameters()).dtype
    model.to(dtype).model.vision_tower.to(next(tower.model.parameters()).dtype)
    with torch.no_grad():
        model.model.vision_tower.load_state_dict(tower.model.state_dict())
        model.model.language_model.load_state_dict(text_model.base_model.state_dict())
        model.lm_head.load_state_dict(text_model.get_output_embeddings().state_dict())
    return model


def processor_of(
    tower: VisionTower, tokenizer: Any, images: Any, processor: Any, settings: Mapping[str, Any] | None = None
) -> Any:
    """The processor of a model of `assembled`; `images` and `processor` are transformers' classes, and `settings` are
    added to those of the image processor."""
    return processor(
        image_processor=images(**{**tower.image_processor, **(settings or {})}),
        tokenizer=tokenizer,
        patch_size=tower.patch_size,
        vision_feature_select_strategy=tower.select_strategy,
        num_additional_image_tokens=int(tower.class_token),  # which the strategy then drops
    )


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
