"""Our models and OpenCLIP's as `evaluate.subject.Subject`: one class for each thing that a model can do.

Shapes: B batch, C candidates, N image tokens, K kept image tokens, L caption tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from torch import Tensor, nn

from open_clip_ov2.core import IGNORE_INDEX, CaptionModel, VisionModel, caption_targets, image_features
from open_clip_ov2.core.candidates import candidate_nll
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.core.decoder import DecoderCache
from open_clip_ov2.core.generate import CaptionStream, GenerationConfig, generate
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import eval_kept_idx, unwrap
from open_clip_ov2.evaluate.eval_model import Ability, Subject
from open_clip_ov2.openclip.models.tokenizer import decode_caption

HEAD_BYTES = 1 << 28  # ours: logits held at once, float32


def subject_of(
    model: nn.Module,
    tokenizer: Any,
    compute: Compute,
    *,
    name: str | None = None,
    keep_ratio: float | None = None,
) -> Subject:
    """`keep_ratio`: of a CaptionModel's image tokens, its own for evaluation by default. Raises UserError for a model
    that is none of CaptionModel, VisionModel, CoCa and CLIP.
    """
    model = unwrap(model).eval()
    kinds: list[tuple[Any, type[FeatureSubject]]] = [
        (CaptionModel, CaptionSubject), (CoCa, CocaSubject), ((CLIP, CustomTextCLIP), ContrastSubject),
        (VisionModel, FeatureSubject),
    ]  # fmt: skip
    for kind, subject in kinds:
        if isinstance(model, kind):
            name = type(model).__name__ if name is None else name
            return subject(model, tokenizer, compute, name, keep_ratio)
    raise UserError(f"{type(model).__name__}: no model that can be evaluated; ov2 models, CoCa and CLIP can")


@dataclass(frozen=True)
class FeatureSubject:
    """An encoder; what cannot be done raises UserError, as no caller should come to it (`abilities`)."""

    model: Any
    tokenizer: Any
    compute: Compute
    name: str
    keep_ratio: float | None = None

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({"features"})

    @property
    def device(self) -> torch.device:
        return self.compute.device

    @torch.no_grad()
    def pooled(self, images_BCHW: Tensor) -> Tensor:
        """What `encode_image` gives: CLIP's and CoCa's with their projection."""
        images = self.compute.pixels(images_BCHW)
        with self.compute.attention(), self.compute.autocast():
            return self.model.encode_image(images, normalize=False).float()

    @torch.no_grad()
    def tokens(self, images_BCHW: Tensor) -> Tensor:
        """Patch tokens after the last block, without norm or pooler."""
        if not hasattr(self.model.visual, "transformer"):
            raise UserError(f"{self.name}: patch tokens are those of OpenCLIP's own ViTs, and this encoder is another")
        images = self.compute.pixels(images_BCHW)
        with self.compute.attention(), self.compute.autocast():
            return image_features(self.model.visual, images).float()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        if "caption" not in self.abilities and "contrast" not in self.abilities:
            raise self._cannot("read text")
        return self.tokenizer(list(texts))

    def num_targets(self, texts_CL: Tensor) -> Tensor:
        return (caption_targets(texts_CL, self.compute.eos_id) != IGNORE_INDEX).sum(dim=1)

    def prefix(self, images_BCHW: Tensor, keys: Sequence[str]) -> Any:
        raise self._cannot("caption")

    def nll(self, prefix: Any, texts_CL: Tensor) -> Tensor:
        raise self._cannot("caption")

    def generate(
        self, images_BCHW: Tensor, keys: Sequence[str], prompts: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        raise self._cannot("caption")

    def contrast_images(self, images_BCHW: Tensor) -> Tensor:
        raise self._cannot("compare pictures and texts")

    def contrast_texts(self, texts_CL: Tensor) -> Tensor:
        raise self._cannot("compare pictures and texts")

    def _cannot(self, what: str) -> UserError:
        return UserError(f"{self.name}: a {type(self.model).__name__} cannot {what}")


@dataclass(frozen=True)
class ContrastSubject(FeatureSubject):
    """CLIP, and what CoCa has of it."""

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({"features", "contrast"})

    @torch.no_grad()
    def contrast_images(self, images_BCHW: Tensor) -> Tensor:
        return nn.functional.normalize(self.pooled(images_BCHW), dim=-1)

    @torch.no_grad()
    def contrast_texts(self, texts_CL: Tensor) -> Tensor:
        with self.compute.attention(), self.compute.autocast():
            texts_CD = self.model.encode_text(texts_CL.to(self.device), normalize=False)
        return nn.functional.normalize(texts_CD.float(), dim=-1)


class _Captions:
    """Of a subject that captions: prompts of unequal length in groups, ids to text."""

    model: Any
    tokenizer: Any
    compute: Compute

    @torch.no_grad()
    def generate(
        self, images_BCHW: Tensor, keys: Sequence[str], prompts: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """With prompts, the text that follows each. One that fills the context is cut by the tokenizer."""
        prompts = [""] * len(keys) if prompts is None else prompts
        if not len(images_BCHW) == len(keys) == len(prompts):
            raise ValueError(f"{len(images_BCHW)} images, {len(keys)} keys, {len(prompts)} prompts")
        ids = [self._prompt_ids(row) for row in self.tokenizer(list(prompts))]
        texts = [""] * len(keys)
        for length in sorted({len(row) for row in ids}):
            rows = [row for row, given in enumerate(ids) if len(given) == length]
            prompt_BT = torch.stack([ids[row] for row in rows]).to(self.compute.device)
            images = self.compute.pixels(images_BCHW[rows])
            with self.compute.attention(), self.compute.autocast():
                out_BT = self._continued(images, [keys[row] for row in rows], prompt_BT, **options)
            bos_id = int(prompt_BT[0, 0])
            for row, out in zip(rows, out_BT[:, length:].cpu(), strict=True):
                texts[row] = decode_caption(self.tokenizer, out, bos_id, self.compute.eos_id)
        return texts

    def _prompt_ids(self, row_L: Tensor) -> Tensor:
        """Bos and the prompt, without the end and what follows it."""
        ends = (row_L == self.compute.eos_id).nonzero()
        return row_L[: int(ends[0])] if len(ends) else row_L

    def _continued(self, images: Tensor, keys: Sequence[str], prompt_BT: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError


def _row_nll(logits_RLV: Tensor, labels_RL: Tensor) -> Tensor:
    """`(R, L, V)`, `(R, L)` -> `(R,)` float32."""
    nll_RL = nn.functional.cross_entropy(
        logits_RLV.float().flatten(0, 1), labels_RL.flatten(), ignore_index=IGNORE_INDEX, reduction="none"
    )
    return nll_RL.view(labels_RL.shape).sum(dim=1)


def _chunked(texts_CL: Tensor, eos_id: int, images: int, vocab: int) -> list[Tensor]:
    """Candidates whose logits for all images fit into HEAD_BYTES, without the padding that all of them have."""
    longest = 1 + int((caption_targets(texts_CL, eos_id) != IGNORE_INDEX).sum(dim=1).max())
    return list(texts_CL[:, :longest].split(max(1, HEAD_BYTES // (4 * images * longest * vocab))))


@dataclass(frozen=True)
class CaptionSubject(_Captions, FeatureSubject):
    """An ov2 model with its decoder; token dropping by key."""

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({"features", "caption"})

    @torch.no_grad()
    def prefix(self, images_BCHW: Tensor, keys: Sequence[str]) -> DecoderCache:
        images = self.compute.pixels(images_BCHW)
        with self.compute.attention(), self.compute.autocast():
            kept_idx = eval_kept_idx(self.model, keys, self.keep_ratio)
            return self.model.text_decoder.image_cache(self.model.encode_kept_tokens(images, kept_idx=kept_idx))

    @torch.no_grad()
    def nll(self, prefix: DecoderCache, texts_CL: Tensor) -> Tensor:
        with self.compute.attention(), self.compute.autocast():
            return candidate_nll(self.model.text_decoder, prefix, texts_CL, self.compute.eos_id)

    def _continued(self, images: Tensor, keys: Sequence[str], prompt_BT: Tensor, **options: Any) -> Tensor:
        keep_ratio = options.pop("keep_ratio", None)
        kept_idx = eval_kept_idx(self.model, keys, self.keep_ratio if keep_ratio is None else keep_ratio)
        return self.model.generate(images, prompt_BT, kept_idx=kept_idx, **options)


class CocaImages(NamedTuple):
    """What CoCa's forward takes in the place of images: `(B, D)`, `(B, N, D)`."""

    latent_BD: Tensor
    tokens_BND: Tensor

    def rows(self, rows: Tensor) -> CocaImages:
        return CocaImages(self.latent_BD.index_select(0, rows), self.tokens_BND.index_select(0, rows))


class CocaStream(CaptionStream):
    """Stock CoCa at work on one batch, for our generation: it has no cache, so each token is a whole forward."""

    def __init__(self, model: Any, images: CocaImages, ids_BT: Tensor) -> None:
        self._model, self._images, self._ids_BT = model, images, ids_BT
        self._forward()

    def _forward(self) -> None:
        latent, tokens = self._images
        out = self._model(None, self._ids_BT, image_latent=latent, image_embs=tokens, output_labels=False)
        self.logits_BV = out["logits"][:, -1].float()

    def advance(self, ids_B: Tensor) -> None:
        self._ids_BT = torch.cat([self._ids_BT, ids_B[:, None]], dim=1)
        self._forward()

    def select(self, rows: Tensor) -> None:
        self._images, self._ids_BT = self._images.rows(rows), self._ids_BT.index_select(0, rows)
        self.logits_BV = self.logits_BV.index_select(0, rows)


@dataclass(frozen=True)
class CocaSubject(_Captions, ContrastSubject):
    """Stock CoCa through its own forward; images encoded once."""

    @property
    def abilities(self) -> frozenset[Ability]:
        return frozenset({"features", "caption", "contrast"})

    @torch.no_grad()
    def prefix(self, images_BCHW: Tensor, keys: Sequence[str]) -> CocaImages:
        images = self.compute.pixels(images_BCHW)
        with self.compute.attention(), self.compute.autocast():
            out = self.model(images)
        return CocaImages(out["image_features"], out["image_embs"])

    @torch.no_grad()
    def nll(self, prefix: CocaImages, texts_CL: Tensor) -> Tensor:
        """Its text tower sees no image, so each candidate goes through it once."""
        found, batch = [], len(prefix.latent_BD)
        vocab = self.model.text_decoder.text_projection.shape[1]
        for ids_cL in _chunked(texts_CL, self.compute.eos_id, batch, vocab):
            ids_cL = ids_cL.to(self.device)
            images_RND = prefix.tokens_BND.repeat_interleave(len(ids_cL), dim=0)
            with self.compute.attention(), self.compute.autocast():
                words_cLD = self.model.text(ids_cL)[1][:, :-1]
                logits_RLV = self.model.text_decoder(images_RND, words_cLD.repeat(batch, 1, 1))
            labels_RL = caption_targets(ids_cL, self.compute.eos_id).repeat(batch, 1)
            found.append(_row_nll(logits_RLV, labels_RL).view(batch, -1))
        return torch.cat(found, dim=1)

    def _continued(self, images: Tensor, keys: Sequence[str], prompt_BT: Tensor, **options: Any) -> Tensor:
        options.pop("keep_ratio", None)  # CoCa drops no tokens
        seq_len = options.pop("seq_len", None) or self.model.context_length
        if not prompt_BT.shape[1] < seq_len <= self.model.context_length:
            raise ValueError(
                f"seq_len must be more than the prompt's {prompt_BT.shape[1]} tokens and at most the context length "
                f"{self.model.context_length}, got {seq_len}"
            )
        config = GenerationConfig(seq_len=seq_len, eos_id=self.compute.eos_id, pad_id=self.model.pad_id, **options)
        out = self.model(images)
        stream = CocaStream(self.model, CocaImages(out["image_features"], out["image_embs"]), prompt_BT)
        return generate(stream, prompt_BT, config)
