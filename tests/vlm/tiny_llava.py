"""A tiny LLaVA's parts: an encoder's run folder, a language model with a tokenizer of bytes, LLaVA's JSON, a recipe."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from PIL import Image

SPECIAL = [
    "<s>", "</s>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>", "<|im_start|>", "<|im_end|>",
]  # fmt: skip
RECIPE = """
kind = "{kind}"
feature-layer = -2
system = "Answer briefly."
{more}
[[stage]]
data = "align"
trains = ["projector"]
template = "plain"
global-batch = 4
lr = 1e-2
warmup-ratio = 0.03
max-length = 512

[[stage]]
data = "tune"
trains = {trains}
template = "vicuna-v1"
global-batch = 4
lr = 1e-2
{tower_lr}
warmup-ratio = 0.03
max-length = 512
pad = true
group-by-length = true
"""


def byte_tokenizer():
    """Every byte is a token, beside the special ones: any text can be read, and templates keep their marks."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *alphabet])}
    made = Tokenizer(models.BPE(vocabulary, []))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    made.add_special_tokens(SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>")


def make_language_model(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = byte_tokenizer()
    tokenizer.save_pretrained(folder)
    torch.manual_seed(1)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **sizes)).save_pretrained(folder)


def make_conversations(folder: Path, count: int) -> None:
    """`count` rows in align.json and tune.json, and their pictures: colored rectangles of many sizes. Every fourth row
    of tune.json has no picture."""
    (folder / "pictures").mkdir(parents=True)
    colors = ["red", "green", "blue", "yellow"]
    align, tune = [], []
    for index in range(count):
        color, name = colors[index % 4], f"{index}.png"
        Image.new("RGB", (40 + 9 * (index % 12), 90 - 5 * (index % 12)), color).save(folder / "pictures" / name)
        asked = [{"from": "human", "value": "<image>\nwhat color?"}, {"from": "gpt", "value": f"it is {color}"}]
        more = [{"from": "human", "value": "sure?" * (1 + index % 3)}, {"from": "gpt", "value": "yes"}]
        align.append({"id": str(index), "image": name, "conversations": asked})
        if index % 4 == 3:
            tune.append({"id": str(index), "conversations": more})
        else:
            tune.append({"id": str(index), "image": name, "conversations": [*asked, *more * (index % 2)]})
    (folder / "align.json").write_text(json.dumps(align))
    (folder / "tune.json").write_text(json.dumps(tune))


def write_recipe(
    file: Path, kind: str = "llava", trains: str = '["projector", "language-model"]', more: str = ""
) -> None:
    tower = "tower-lr = 1e-3" if "tower" in trains else ""
    file.write_text(RECIPE.format(kind=kind, trains=trains, tower_lr=tower, more=more))
