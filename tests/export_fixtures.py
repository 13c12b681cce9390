"""What exports start from: a run's folder with a model of random weights, and a small language model."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from torch import Tensor

from open_clip_ov2.cli import main
from open_clip_ov2.core import CaptionModel

WORDS = ["[PAD]", "[bos]", "[eos]", "[UNK]", *(f"word{index}" for index in range(36))]


@dataclass(frozen=True)
class Run:
    """`model` is what the folder's checkpoint holds."""

    folder: Path
    model: CaptionModel

    def export(self, target: str, out: Path, *flags: str) -> Path:
        assert main(["export", str(self.folder), "--to", target, "--out", str(out), *flags]) == 0
        return out

    def at(self, size: int) -> CaptionModel:
        """The same weights at another resolution, in OpenCLIP's own way."""
        (checkpoint,) = (self.folder / "checkpoints").glob("*.pt")
        model = open_clip.create_model(f"local-dir:{self.folder}", load_weights=False, force_image_size=size)
        open_clip.load_checkpoint(model, str(checkpoint))
        return model.eval()


def images(size: int = 56, batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(batch))


def make_run(folder: Path, patch_size: int = 14, mean: float | None = None, sides: list[int] | None = None) -> Run:
    """Word pieces and a prefix decoder, so that every target takes all of it. MLP ratio as So400m's. With `mean`, that
    of all channels in place of ImageNet's; `sides`: height and width of an image."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n")
    model_cfg = {
        "embed_dim": 64,
        "vision_cfg": {
            "image_size": sides or 4 * patch_size, "layers": 3, "width": 64, "head_width": 16, "mlp_ratio": 3.7362,
            "patch_size": patch_size,
        },
        "text_cfg": {
            "context_length": 12, "vocab_size": len(WORDS), "bos_id": 1, "eos_id": 2, "pad_id": 0,
            "hf_tokenizer_name": "words", "tokenizer_mode": "ov2",
        },
        "decoder_cfg": {"width": 32, "layers": 2, "heads": 2, "mlp_width": 64},
        "fusion": "prefix",
        "keep_ratio": "0.25:1.0",
        "custom_text": True,
    }  # fmt: skip
    preprocess_cfg = {} if mean is None else {"mean": [mean] * 3, "std": [0.25] * 3}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess_cfg})
    )
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}", load_weights=False)
    for name, parameter in model.named_parameters():
        if "positional" not in name:
            norm = "ln_" in name and name.endswith("weight")
            torch.nn.init.normal_(parameter, mean=1.0 if norm else 0.0, std=0.1)
    torch.save({"epoch": 1, "name": "run", "state_dict": model.state_dict()}, folder / "checkpoints" / "stage_1.pt")
    return Run(folder, model.eval())


def make_language_model(folder: Path) -> None:
    """A Llama of two narrow layers with ten words."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", "what", "is", "this", "?", "a", "red", "square"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **sizes)).save_pretrained(folder)
