"""Tokenizers: OpenCLIP's built-in one (the default, no download), or BERT word pieces as the reference has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from open_clip.tokenizer import SimpleTokenizer
from torch import Tensor

from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.factory import is_ov2_config
from open_clip_ov2.openclip.models.released import check_tokenizer_folder

MODE = "ov2"  # text_cfg.tokenizer_mode that asks for WordPieceTokenizer
REFERENCE_VOCAB_SIZE = 32_000  # docs/reference.md: the head's size over BERT's 30,522 word pieces
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # docs/reference.md: [PAD] and the first two unused slots


class WordPieceTokenizer:
    """The reference's ids: BERT's uncased word pieces, [PAD] = 0, bos = 1, eos = 2.

    `source` is a local folder with vocab.txt, that file itself, or a hub name (`bert-base-uncased`). Texts are
    not cleaned and never parsed for special tokens, as in the reference's TensorFlow op; a truncated caption
    keeps eos as its last id. Called on texts it gives `(B, context_length)` int64.
    The reference's `labels` have one more slot, a [CLS] that its decoder never reads.
    """

    def __init__(self, source: str | Path, context_length: int = 128, cache_dir: str | None = None) -> None:
        self.source = str(source)
        self.context_length = context_length
        self._vocab_file = find_vocab(self.source, cache_dir)
        self.all_special_ids = [PAD_ID, BOS_ID, EOS_ID]

    def __getstate__(self) -> dict[str, Any]:  # the Rust object is rebuilt in each data worker
        return {key: value for key, value in self.__dict__.items() if key != "_pieces"}

    @cached_property
    def _pieces(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        vocab = models.WordPiece.read_file(str(self._vocab_file))
        pieces = Tokenizer(models.WordPiece(vocab, unk_token="[UNK]", max_input_chars_per_word=200))
        pieces.normalizer = normalizers.BertNormalizer(lowercase=True)
        pieces.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        pieces.decoder = decoders.WordPiece()
        return pieces

    @property
    def vocab_size(self) -> int:
        return self._pieces.get_vocab_size()

    def encode(self, text: str) -> list[int]:
        return self._pieces.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        words = [int(token) for token in ids if int(token) not in self.all_special_ids]
        return self._pieces.decode(words, skip_special_tokens=False)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        ids_BL = torch.full((len(texts), length), PAD_ID, dtype=torch.long)
        for row, text in zip(ids_BL, texts, strict=True):
            ids = [BOS_ID, *self.encode(text)[: length - 2], EOS_ID]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BL


def find_vocab(source: str, cache_dir: str | None = None) -> Path:
    """vocab.txt of a file, a folder or a hub repository. Raises UserError."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        if (path / "vocab.txt").is_file():
            return path / "vocab.txt"
        raise UserError(f"--tokenizer {source}: no vocab.txt in this folder")
    if source.startswith((".", "/", "~")):
        raise UserError(f"--tokenizer {source}: no such folder")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, "vocab.txt", cache_dir=cache_dir))
    except Exception as error:
        raise UserError(
            f"--tokenizer {source}: not a local folder, and vocab.txt of the hub's {source!r} cannot be had "
            f"({type(error).__name__}); without a network give a folder that holds vocab.txt"
        ) from error


def text_cfg_for(source: str, context_length: int) -> dict[str, Any]:
    """The `text_cfg` of a model trained with word pieces from `source`."""
    entries = len(find_vocab(source).read_text(encoding="utf-8").splitlines())
    if 30_000 <= entries <= REFERENCE_VOCAB_SIZE:
        vocab_size = REFERENCE_VOCAB_SIZE
    else:
        vocab_size = -(-entries // 64) * 64  # matrix sizes the hardware likes
    path = Path(source).expanduser()
    return {
        "context_length": context_length,
        "vocab_size": vocab_size,
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": PAD_ID,
        "hf_tokenizer_name": str(path.resolve()) if path.exists() else source,
        "tokenizer_mode": MODE,
    }


def with_word_pieces(name: str, config: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """The text sections of a CLIP's or CoCa's config for word pieces; `words` is what text_cfg_for gives.

    OpenCLIP pools a CLIP's text at the largest id, which is the end of a caption in its own vocabulary alone: here at
    the first eos. Its CoCa pools at a class token, and leaves [PAD] out as it does its own id 0.
    Raises UserError.
    """
    text_cfg = config["text_cfg"]
    if text_cfg.get("hf_model_name"):
        raise UserError(f"--tokenizer: the text tower of {name} comes from the hub, with a tokenizer of its own")
    words = {key: value for key, value in words.items() if key != "bos_id"}  # which upstream does not ask for
    pooling = {} if text_cfg.get("embed_cls") else {"pool_type": "eos"}
    sections: dict[str, Any] = {"text_cfg": {**text_cfg, **words, **pooling}}
    if "multimodal_cfg" in config:
        sizes = {key: words[key] for key in ("context_length", "vocab_size")}
        sections["multimodal_cfg"] = {**config["multimodal_cfg"], **sizes}
    return sections


def text_options(name: str, config: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """What `create_model` gets for a model of any family that is to read word pieces. Raises UserError."""
    return {"text_cfg": dict(words)} if is_ov2_config(config) else with_word_pieces(name, config, words)


def eos_id_of(tokenizer: Any) -> int:
    """The id that ends a caption."""
    if isinstance(tokenizer, WordPieceTokenizer):
        return EOS_ID
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.eot_token_id
    inner = tokenizer.tokenizer  # OpenCLIP's HFTokenizer
    return inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id


def decode_caption(tokenizer: Any, ids: Sequence[int] | Tensor, bos_id: int, eos_id: int) -> str:
    """Text of one row of ids, from after bos to before the first eos."""
    ids = [int(token) for token in ids]
    if ids and ids[0] == bos_id:
        ids = ids[1:]
    if eos_id in ids:
        ids = ids[: ids.index(eos_id)]
    if isinstance(tokenizer, (WordPieceTokenizer, SimpleTokenizer)):
        known = tokenizer.vocab_size
        return tokenizer.decode([token for token in ids if token < known]).strip()
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip()


def dispatch_tokenizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """What patches.py puts into open_clip.factory in the place of HFTokenizer."""

    def hf_tokenizer(
        tokenizer_name: Any,
        context_length: int | None = None,
        *args: Any,
        tokenizer_mode: str | None = None,
        **kw: Any,
    ) -> Any:
        if isinstance(tokenizer_name, Path):  # the folder of a local-dir: name, whose config said the rest
            check_tokenizer_folder(tokenizer_name)
        if tokenizer_mode == MODE:
            return WordPieceTokenizer(tokenizer_name, context_length or 128, kw.get("cache_dir"))
        return original(tokenizer_name, context_length, *args, tokenizer_mode=tokenizer_mode, **kw)

    return hf_tokenizer
