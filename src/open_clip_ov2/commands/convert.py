"""`ov2 convert`: the authors' checkpoints into a model folder of ours, and a model back into their Flax parameters."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from open_clip_ov2.argv import Parser
from open_clip_ov2.commands.options import paths_checked
from open_clip_ov2.errors import UserError

CONTEXT_LENGTH, IMAGE_SIZE = 128, 224  # docs/reference.md: the reference's caption length, the published resolution


def main(argv: Sequence[str]) -> None:
    args = _parser().parse_args(argv)
    with paths_checked():
        if args.to.suffix == ".npz":
            _to_flax(args)
        elif Path(args.source).suffix == ".npz" or _is_orbax(Path(args.source)):
            _from_flax(args)
        else:
            _from_released(args)


def _parser() -> argparse.ArgumentParser:
    from open_clip_ov2.core import FUSIONS

    parser = Parser(
        prog="ov2 convert",
        description="Flax parameters or a released checkpoint -> a model folder; a model -> Flax parameters.",
    )
    parser.add_argument("source", metavar="SOURCE", help=".npz, Orbax folder; or a run, folder or hf-hub: name")
    parser.add_argument(
        "--to", type=Path, required=True, metavar="FOLDER|FILE.npz", help="a new folder, or Flax's .npz"
    )
    group = parser.add_argument_group("what Flax parameters do not say")
    group.add_argument("--image-size", type=int, metavar="N", help=f"default: {IMAGE_SIZE}, or the model's own")
    group.add_argument("--fusion", choices=FUSIONS, help="default: prefix, or cross_attn where the blocks are")
    group.add_argument("--heads", type=int, metavar="N", help="of the encoder (default: as published for its width)")
    group.add_argument("--decoder-heads", type=int, metavar="N", help="default: as published for the decoder's width")
    group.add_argument("--context-length", type=int, metavar="N", help=f"default: {CONTEXT_LENGTH}")
    group.add_argument("--tokenizer", metavar="NAME|FILE", help="its vocabulary: vocab.txt, its folder, or a hub name")
    return parser


def _is_orbax(path: Path) -> bool:
    return path.is_dir() and not (path / "open_clip_config.json").is_file()


def _from_flax(args: argparse.Namespace) -> None:
    from open_clip_ov2.formats import flax_sizes, from_flax, read_flax
    from open_clip_ov2.formats.model_files import new_folder
    from open_clip_ov2.openclip.models.from_flax import build_from_flax
    from open_clip_ov2.openclip.models.model_folder import encoder_of, write_model_folder
    from open_clip_ov2.openclip.models.tokenizer import WordPieceTokenizer

    length = CONTEXT_LENGTH if args.context_length is None else args.context_length
    image_size = IMAGE_SIZE if args.image_size is None else args.image_size
    if length < 2 or image_size < 1:
        raise UserError(f"--context-length {length} --image-size {image_size}: at least 2 (bos, eos) and 1")
    flat = read_flax(Path(args.source))
    sizes = flax_sizes(flat, args.heads, args.decoder_heads)
    model = build_from_flax(sizes, from_flax(flat), image_size, length, args.fusion)
    tokenizer = WordPieceTokenizer(args.tokenizer, length) if args.tokenizer else None
    encoder = encoder_of(model, model.visual.preprocess_cfg)
    with new_folder(args.to) as folder:
        write_model_folder(model, encoder, tokenizer, folder, args.to.resolve().name)
    _tell(args, model)
    if tokenizer is None:
        print("no --tokenizer given: the folder has no vocabulary, so it cannot caption in words")


def _from_released(args: argparse.Namespace) -> None:
    from open_clip_ov2.formats.model_files import new_folder
    from open_clip_ov2.openclip.models.model_folder import encoder_of, write_model_folder
    from open_clip_ov2.openclip.models.open_model import caption_model, open_model

    _refuse(args, "is for Flax parameters", but=("--image-size",))
    run = open_model(args.source, image_size=args.image_size)
    model = caption_model(run)
    with new_folder(args.to) as folder:
        write_model_folder(model, encoder_of(model, run.preprocess_cfg), run.tokenizer, folder, args.to.resolve().name)
    _tell(args, model)


def _tell(args: argparse.Namespace, model: Any) -> None:
    count = sum(parameter.numel() for parameter in model.parameters())
    print(f"{args.to}: {count:,} parameters, encoder and decoder, from {args.source}")


def _refuse(args: argparse.Namespace, why: str, but: tuple[str, ...] = ()) -> None:
    """No flag is dropped in silence."""
    given = {"--image-size": args.image_size, "--fusion": args.fusion, "--heads": args.heads,
             "--decoder-heads": args.decoder_heads, "--context-length": args.context_length,
             "--tokenizer": args.tokenizer}  # fmt: skip
    for flag, value in given.items():
        if value is not None and flag not in but:
            raise UserError(f"{flag}: {why}, and {args.source} says it itself; leave the flag out")


def _to_flax(args: argparse.Namespace) -> None:
    import numpy as np

    from open_clip_ov2.formats import to_flax
    from open_clip_ov2.openclip.models.open_model import caption_model, open_model

    source, target = args.source, args.to
    _refuse(args, "is for what is made of Flax parameters")
    if target.exists():
        raise UserError(f"{target}: exists already; name another file")
    model = caption_model(open_model(source))
    flat = to_flax(model.state_dict(), model.text_decoder.config.heads)
    target.parent.mkdir(parents=True, exist_ok=True)
    np.savez(target, **{f"params/{name}": value for name, value in flat.items()})  # type: ignore[arg-type]
    print(f"{target}: {len(flat)} Flax parameters from {source}")
