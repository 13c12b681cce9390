"""Chat templates with generation marks, as transformers reads them: what is between the marks is trained on."""

from __future__ import annotations

import json
from typing import Any

from open_clip_ov2.errors import UserError
from open_clip_ov2.vlm.vlm_recipe import TEMPLATES

# Tokens that a template needs beyond the tokenizer's begin and end of text; the first ends a turn.
TOKENS = {
    "llama-3": ("<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"),
    "chatml": ("<|im_end|>", "<|im_start|>"),
}


def chat_template(name: str, system: str) -> str:
    """The template's text, with a sentence that stands before every conversation that brings none."""
    head = f"{{%- set system = {json.dumps(system)} -%}}\n"
    content = (TEMPLATES / "parts" / "content.jinja").read_text(encoding="utf-8")
    return head + content + (TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def check_template(name: str, tokenizer: Any) -> None:
    """Raises UserError if the language model does not know the template's tokens, and would read them as letters."""
    missing = [token for token in TOKENS.get(name, ()) if token not in tokenizer.get_vocab()]
    if name == "vicuna-v1" and tokenizer.eos_token is None:
        missing = ["an end of text"]
    if missing:
        raise UserError(
            f"the template {name} needs {', '.join(missing)}, which the language model's tokenizer lacks; name the "
            "template that fits it (--template)"
        )


def end_of_turn(name: str, tokenizer: Any) -> str:
    """The token after which generation stops."""
    return TOKENS[name][0] if name in TOKENS else str(tokenizer.eos_token)
