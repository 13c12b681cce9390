"""`ov2 export`: a trained encoder in the format of another library."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import paths_checked
from open_clip_ov2.errors import UserError

TARGETS = {
    "hf": "transformers: AutoModel.from_pretrained(FOLDER), a ViTModel with its image processor",
    "llava": "transformers: LlavaForConditionalGeneration.from_pretrained(FOLDER), projector new",
    "timm": "timm.create_model('local-dir:FOLDER', pretrained=True)",
    "open-clip": "OpenCLIP without this plugin: create_model_from_pretrained('local-dir:FOLDER')",
    "ov2": "OpenCLIP with this plugin: the whole model, decoder included, in safetensors",
    "released": "the authors' format: the encoder and, if it is of their kind, the caption decoder",
    "onnx": "ONNX with a dynamic batch, checked with onnxruntime",
}
_ONLY_FOR = {"language_model": "llava", "feature_layer": "llava", "int8": "onnx"}


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    _check(args)
    with paths_checked():
        _export(args)


def _export(args: argparse.Namespace) -> None:
    from open_clip_ov2.formats.model_files import new_folder
    from open_clip_ov2.openclip.models.model_folder import encoder_of
    from open_clip_ov2.openclip.models.open_model import open_model

    run = open_model(args.run, image_size=args.image_size, position_table=args.position_table)
    encoder = encoder_of(run.model, run.preprocess_cfg)
    target = args.out or _default_folder(args, run.folder)
    with new_folder(target) as folder:
        lines = _write(args, run, encoder, folder, target.resolve().name)
        write_card(args, run, folder, run.folder.resolve().name, target.name)
    for line in lines:
        print(line)
    print(f"{args.to}: {target}")


def _parser() -> argparse.ArgumentParser:
    targets = "\n".join(f"  {name:<10}{what}" for name, what in TARGETS.items())
    parser = Parser(
        prog="ov2 export",
        description=f"Write a trained encoder for another library.\n\ntargets:\n{targets}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", help="a run's folder or checkpoint, a model folder, or hf-hub:ORG/NAME")
    parser.add_argument("--to", required=True, choices=TARGETS, metavar="TARGET", help=", ".join(TARGETS))
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="a new folder (default: RUN/export/TARGET)")
    parser.add_argument("--image-size", type=int, metavar="N", help="export for this resolution (default: the model's)")
    parser.add_argument(
        "--position-table",
        choices=("interpolate", "recompute"),
        help="how a released encoder's table is fitted to --image-size (default: interpolate; ov2 models recompute)",
    )
    parser.add_argument("--language-model", type=Path, metavar="DIR", help="llava: a causal language model's folder")
    parser.add_argument(
        "--feature-layer", type=int, metavar="N", help="llava: -1 the last block (default), -2 the one before"
    )
    parser.add_argument("--int8", action="store_true", help="onnx: also int8, with its measured error")
    parser.add_argument("--licence", metavar="ID", help="for the model card, such as apache-2.0")
    parser.add_argument("--dataset", metavar="NAME", help="for the model card (default: the names of the shards)")
    return parser


def _check(args: argparse.Namespace) -> None:
    for name, target in _ONLY_FOR.items():
        if getattr(args, name) not in (None, False) and args.to != target:
            raise UserError(f"--{name.replace('_', '-')} is for --to {target}, and this is --to {args.to}")
    if args.to == "llava" and args.language_model is None:
        raise UserError("--to llava needs --language-model DIR, the folder of a causal language model")


def _default_folder(args: argparse.Namespace, folder: Path) -> Path:
    if args.run.startswith("hf-hub:"):
        raise UserError(f"--out is missing: {args.run} has no folder to write beside")
    return folder / "export" / args.to


def _write(args: argparse.Namespace, run: Any, encoder: Any, folder: Path, name: str) -> list[str]:
    """Lines worth telling. `name`: what the folder will be called."""
    if args.to == "onnx":
        from open_clip_ov2.core.vit_fast import stock_patches
        from open_clip_ov2.formats import onnx

        # int8 is for matrix products, and the patch embedding is to stay as it is.
        with stock_patches(run.model.visual):
            measured = onnx.write(encoder, run.model.visual, folder, args.int8)
        return [
            f"{name}: largest difference to torch {values.tokens:.1e} (patch tokens, {values.tokens_relative:.1e} "
            f"relative), {values.pooled:.1e} (pooled, {values.pooled_relative:.1e} relative)"
            for name, values in measured.items()
        ]
    if args.to == "llava":
        from open_clip_ov2.formats import llava

        layer = llava.FEATURE_LAYER if args.feature_layer is None else args.feature_layer
        dtype = llava.write(encoder, folder, args.language_model, layer)
        return [
            f"{encoder.num_tokens} image tokens, from vision_feature_layer {layer}; the projector is new; the encoder "
            f"is {dtype} as the language model is"
        ]
    return write_target(args.to, run, encoder, folder, name)


def write_target(target: str, run: Any, encoder: Any, folder: Path, name: str) -> list[str]:
    """The targets that need nothing but the model. `name`: the folder's, or its hub name. Lines worth telling."""
    from open_clip_ov2.formats import authors as released
    from open_clip_ov2.formats import hf, open_clip, timm
    from open_clip_ov2.openclip.models.model_folder import released_decoder, write_model_folder
    from open_clip_ov2.openclip.models.open_model import caption_model

    if target == "ov2":
        write_model_folder(caption_model(run), encoder, run.tokenizer, folder, name)
    elif target == "released":
        decoder, why_not = released_decoder(run.model, run.tokenizer)
        released.write(encoder, folder, decoder)
        return [f"encoder alone, without the caption decoder: {why_not}"] if decoder is None else []
    else:
        {"hf": hf, "timm": timm, "open-clip": open_clip}[target].write(encoder, folder)
    return []


def write_card(args: argparse.Namespace, run: Any, folder: Path, title: str, location: str) -> None:
    """FOLDER/README.md."""
    from open_clip_ov2.formats.card import card, run_facts
    from open_clip_ov2.openclip.models.model_folder import encoder_of

    encoder = encoder_of(run.model, run.preprocess_cfg)
    facts = run_facts(run.folder, run.checkpoint)
    text = card(title, location, args.to, encoder, facts, licence=args.licence, dataset=args.dataset)
    (folder / "README.md").write_text(text, encoding="utf-8")
