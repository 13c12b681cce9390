"""Tokenizers: OpenCLIP's built-in one (the default, no download), or the reference's BERT word pieces.

Shapes: B captions, L caption tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip.tokenizer import SimpleTokenizer, get_clean_fn, whitespace_clean
from torch import Tensor

from open_clip_ov2.data.captions import PROMPT_END
from open_clip_ov2.errors import UserError
from open_clip_ov2.openclip.models.factory import is_ov2_config
from open_clip_ov2.openclip.models.released import check_tokenizer_folder

VOCAB = "vocab.txt"
MODE = "ov2"  # text_cfg.tokenizer_mode that asks for WordPieceTokenizer
MOST_WORDS = 1 << 18  # of a CachingTokenizer's cache, about 50 MB; web captions never run out of new words
LONGEST_WORD = 32  # characters; text without spaces, such as Chinese, would fill the cache and never be used again
REFERENCE_VOCAB_SIZE = 32_000  # docs/reference.md: the head's size over BERT's 30,522 word pieces
PAD_ID, BOS_ID, EOS_ID = 0, 1, 2  # docs/reference.md: [PAD] and the first two unused slots


class WordPieceTokenizer:
    """The reference's ids: BERT's uncased word pieces, [PAD] = 0, bos = 1, eos = 2. `source`: see `find_vocab`;
    `vocabulary` is the file's text. Texts are not cleaned and never parsed for special tokens, as in the reference's
    TensorFlow op; a truncated caption keeps eos as its last id."""

    def __init__(self, source: str | Path, context_length: int = 128, cache_dir: str | None = None) -> None:
        self.source = str(source)
        self.context_length = context_length
        self.vocabulary = find_vocab(self.source, cache_dir).read_text(encoding="utf-8")  # the folder may go away
        self.all_special_ids = [PAD_ID, BOS_ID, EOS_ID]

    def __getstate__(self) -> dict[str, Any]:  # the Rust object is rebuilt in each data worker
        return {key: value for key, value in self.__dict__.items() if key != "_pieces"}

    @cached_property
    def _pieces(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers

        vocab = {line.rstrip(): index for index, line in enumerate(StringIO(self.vocabulary))}
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
        """Int64 `(B, L)`, padded with [PAD]."""
        texts = [texts] if isinstance(texts, str) else list(texts)
        length = context_length or self.context_length
        ids_BL = torch.full((len(texts), length), PAD_ID, dtype=torch.long)
        for row, text in zip(ids_BL, texts, strict=True):
            ids = [BOS_ID, *self.encode(text)[: length - 2], EOS_ID]
            row[: len(ids)] = torch.tensor(ids)
        return ids_BL


class CachingTokenizer(SimpleTokenizer):
    """OpenCLIP's built-in tokenizer with a cache: the same ids, faster. The tokenizer that it is made of must have only
    the usual two special tokens: then no token contains a space, so text may be split at spaces first."""

    def __init__(self, original: SimpleTokenizer) -> None:
        self.__dict__.update(original.__dict__)
        self._ids: dict[str, tuple[int, ...]] = {}
        self._lowers = self.clean_fn is get_clean_fn("lower")

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ids": {}}

    def __call__(self, texts: str | list[str], context_length: int | None = None) -> Tensor:
        """Int64 `(B, L)`, zeros after the end token."""
        length = context_length or self.context_length
        if self.reduction_fn is not None or isinstance(texts, str) or not length:
            return super().__call__(texts, context_length)
        ids_BL = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(ids_BL, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text)][: length - 1]
            row[: len(ids) + 1] = *ids, self.eot_token_id
        return torch.from_numpy(ids_BL)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = []
        for word in self._cleaned(text).split(" "):
            known = self._ids.get(word)
            ids += self._encode_word(word) if known is None else known
        return ids

    def _cleaned(self, text: str) -> str:
        # In printable ASCII, ftfy and html.unescape change only entities, which have an ampersand.
        if self._lowers and text.isascii() and text.isprintable() and "&" not in text:
            return whitespace_clean(text).lower()
        return self.clean_fn(text)

    def _encode_word(self, word: str) -> tuple[int, ...]:
        ids = tuple(
            self.encoder[piece]
            for part in self.pat.findall(word)
            for piece in self.bpe("".join(self.byte_encoder[byte] for byte in part.encode())).split(" ")
        )
        if len(word) <= LONGEST_WORD:
            if len(self._ids) >= MOST_WORDS:
                self._ids.clear()
            self._ids[word] = ids
        return ids


def caching(tokenizer: Any) -> Any:
    """A CachingTokenizer of OpenCLIP's built-in one; any other tokenizer unchanged."""
    plain = type(tokenizer) is SimpleTokenizer and len(tokenizer.all_special_ids) == 2
    return CachingTokenizer(tokenizer) if plain else tokenizer


def find_vocab(source: str, cache_dir: str | None = None) -> Path:
    """vocab.txt: this file itself, or that of a folder or of a hub repository (`bert-base-uncased`). Raises
    UserError."""
    path = Path(source).expanduser()
    for file in (path, path / VOCAB):
        if file.is_file():
            return file
    if path.is_dir() or source.startswith((".", "/", "~")):
        raise UserError(f"--tokenizer {source}: {'no vocab.txt in this folder' if path.is_dir() else 'no such folder'}")
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(source, VOCAB, cache_dir=cache_dir))
    except Exception as error:
        raise UserError(
            f"--tokenizer {source}: not a local folder, and vocab.txt of the hub's {source!r} could not be downloaded "
            f"({type(error).__name__}); without a network, give a folder that holds vocab.txt"
        ) from error


def text_cfg_for(source: str, context_length: int, cache_dir: str | None = None) -> dict[str, Any]:
    """The `text_cfg` of a model trained with word pieces from `source`."""
    entries = len(find_vocab(source, cache_dir).read_text(encoding="utf-8").splitlines())
    is_reference = 30_000 <= entries <= REFERENCE_VOCAB_SIZE
    path = Path(source).expanduser()
    return {
        "context_length": context_length,
        "vocab_size": REFERENCE_VOCAB_SIZE if is_reference else -(-entries // 64) * 64,  # a multiple of 64 is faster
        "bos_id": BOS_ID,
        "eos_id": EOS_ID,
        "pad_id": PAD_ID,
        "hf_tokenizer_name": str(path.resolve()) if path.exists() else source,
        "tokenizer_mode": MODE,
    }


def text_options(name: str, config: Mapping[str, Any], words: Mapping[str, Any]) -> dict[str, Any]:
    """Options of `create_model` for any model that is to read word pieces: the text sections of its config; `words`
    comes from text_cfg_for. Raises UserError.

    OpenCLIP pools a CLIP's text at the largest id, which is the end of a caption in its own vocabulary only, so here it
    pools at the first eos. Its CoCa pools at a class token, and ignores [PAD], whose id 0 its own padding has too.
    """
    if is_ov2_config(config):
        return {"text_cfg": dict(words)}
    text_cfg = config["text_cfg"]
    if text_cfg.get("hf_model_name"):
        raise UserError(f"--tokenizer: the text tower of {name} comes from the hub, with a tokenizer of its own")
    words = {key: value for key, value in words.items() if key != "bos_id"}  # which OpenCLIP does not know
    pooling = {} if text_cfg.get("embed_cls") else {"pool_type": "eos"}
    sections: dict[str, Any] = {"text_cfg": {**text_cfg, **words, **pooling}}
    if "multimodal_cfg" in config:
        sizes = {key: words[key] for key in ("context_length", "vocab_size")}
        sections["multimodal_cfg"] = {**config["multimodal_cfg"], **sizes}
    return sections


def eos_id_of(tokenizer: Any) -> int:
    """The id of the token that ends a caption."""
    if isinstance(tokenizer, WordPieceTokenizer):
        return EOS_ID
    if isinstance(tokenizer, SimpleTokenizer):
        return tokenizer.eot_token_id
    inner = tokenizer.tokenizer  # OpenCLIP's HFTokenizer
    return inner.eos_token_id if inner.eos_token_id is not None else inner.sep_token_id


def decode_caption(tokenizer: Any, ids: Sequence[int] | Tensor, bos_id: int, eos_id: int) -> str:
    """Text of one row of ids, between bos and the first eos."""
    ids = [int(token) for token in ids]
    ids = ids[1:] if ids[:1] == [bos_id] else ids
    ids = ids[: ids.index(eos_id)] if eos_id in ids else ids
    if isinstance(tokenizer, (WordPieceTokenizer, SimpleTokenizer)):
        known = tokenizer.vocab_size
        return tokenizer.decode([token for token in ids if token < known]).strip()
    return tokenizer.tokenizer.decode(ids, skip_special_tokens=True).strip()


def dispatch_tokenizer(original: Callable[..., Any]) -> Callable[..., Any]:
    """text_cfg.tokenizer_mode ov2 gives word pieces with the reference's ids: no text cleaning, bos 1, eos 2."""

    def hf_tokenizer(
        tokenizer_name: Any, context_length: int | None = None, *args: Any, tokenizer_mode: str | None = None, **kw: Any
    ) -> Any:
        if isinstance(tokenizer_name, Path):  # the folder of a local-dir: name
            check_tokenizer_folder(tokenizer_name)
        if tokenizer_mode == MODE:
            return WordPieceTokenizer(tokenizer_name, context_length or 128, kw.get("cache_dir"))
        return original(tokenizer_name, context_length, *args, tokenizer_mode=tokenizer_mode, **kw)

    return hf_tokenizer


# --- captions with a prompt before them: [bos] prompt caption [eos] padding, with the prompt's ids as -1 - id, which
# the decoder reads and which are no targets of the loss (core/loss.py, core/packing.py) ---


def most_prompt_ids(context_length: int) -> int:
    """Tokens that a prompt has at most, bos included: half of the context, so that the caption has the other half."""
    return context_length // 2


def without_end(row_L: Tensor, eos_id: int) -> Tensor:
    """Bos and text, without the end and what follows it."""
    ends = (row_L == eos_id).nonzero()
    return row_L[: int(ends[0])] if len(ends) else row_L


class PromptTokenizer:
    """Ids of texts that the decoder of samples joins as prompt, PROMPT_END and caption."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self._eos_id = tokenizer, eos_id_of(tokenizer)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        """Int64 `(B, L)`; a caption that is cut ends in eos."""
        parts = [text.partition(PROMPT_END) for text in texts]
        out_BL = self._tokenizer([caption for _, _, caption in parts])
        prompts_BL = self._tokenizer([prompt for prompt, _, _ in parts])
        for row_L, prompt_L in zip(out_BL, prompts_BL, strict=True):
            prompt = without_end(prompt_L, self._eos_id)[1 : most_prompt_ids(len(row_L))]
            caption_L = row_L[1:].clone()
            row_L[1 : 1 + len(prompt)] = -1 - prompt
            row_L[1 + len(prompt) :] = caption_L[: len(row_L) - 1 - len(prompt)]
            if not bool((row_L == self._eos_id).any()):
                row_L[-1] = self._eos_id
        return out_BL
