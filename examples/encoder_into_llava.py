"""Put a trained encoder into LLaVA, and train the projector for one step on a picture and a question about it.

    python examples/encoder_into_llava.py logs/RUN --language-model vicuna-7b picture.jpg "what is this ?" "a cat"

`vicuna-7b` is a folder with any causal language model of transformers. The first stage of LLaVA is this step, repeated
over a set of captions: encoder and language model stay as they are, and only the projector between them learns.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from open_clip_ov2.cli import main as ov2_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("question")
    parser.add_argument("answer")
    parser.add_argument("--language-model", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("llava"))
    args = parser.parse_args()

    if not args.out.exists():  # what `ov2 export RUN --to llava --language-model DIR --out llava` does
        export = ["export", str(args.run), "--to", "llava", "--language-model", str(args.language_model)]
        if ov2_command([*export, "--out", str(args.out)]):
            raise SystemExit(2)
    processor = AutoProcessor.from_pretrained(args.out)
    model = LlavaForConditionalGeneration.from_pretrained(args.out)

    model.requires_grad_(False)
    projector = model.model.multi_modal_projector.requires_grad_(True).train()
    optimizer = torch.optim.AdamW(projector.parameters(), lr=1e-3)

    image = Image.open(args.picture).convert("RGB")
    text = f"<image> {args.question} {args.answer}"
    batch = processor(images=image, text=text, return_tensors="pt")
    before = model(**batch, labels=answer_alone(batch["input_ids"], args, processor)).loss
    before.backward()
    optimizer.step()
    with torch.no_grad():
        after = model(**batch, labels=answer_alone(batch["input_ids"], args, processor)).loss
    print(f"loss of the answer before the step {before.item():.3f}, after it {after.item():.3f}")


def answer_alone(ids: torch.Tensor, args: argparse.Namespace, processor: AutoProcessor) -> torch.Tensor:
    """The ids `(1, L)` as labels: the loss ignores all but the answer."""
    length = len(processor.tokenizer(args.answer, add_special_tokens=False)["input_ids"])
    labels = torch.full_like(ids, -100)  # transformers' value for "no target"
    labels[:, -length:] = ids[:, -length:]
    return labels


if __name__ == "__main__":
    main()
