"""Our models and OpenCLIP's as `evaluate.eval_model.EvalModel`: one class for each thing that a model can do.

Shapes: B batch, C candidates, N image tokens, K kept image tokens, L caption tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NoReturn

import torch
from open_clip import CLIP, CoCa, CustomTextCLIP
from torch import Tensor, nn

from open_clip_ov2.core import (
    IGNORE_INDEX,
    CaptionLoss,
    CaptionModel,
    VisionModel,
    caption_targets,
    image_features,
    num_kept,
)
from open_clip_ov2.core.candidates import candidate_nll
from open_clip_ov2.core.compute import Compute
from open_clip_ov2.core.decoder import DecoderCache
from open_clip_ov2.core.generate import RowSampler
from open_clip_ov2.core.native import Images, NativeImages
from open_clip_ov2.errors import UserError
from open_clip_ov2.evaluate.caption_loss import eval_kept_idx
from open_clip_ov2.evaluate.eval_model import Ability, EvalModel
from open_clip_ov2.openclip.models.factory import OV2_ABILITIES, caption_model_class, is_ov2_config
from open_clip_ov2.openclip.models.related import CocaImages, coca_captions, coca_nll
from open_clip_ov2.openclip.models.tokenizer import decode_caption, most_prompt_ids, without_end

NO_TEXT = -1  # the end-of-text id of a model without text


def unwrap(model: nn.Module) -> nn.Module:
    """The model inside torch.compile and DDP."""
    model = getattr(model, "_orig_mod", model)
    return getattr(model, "module", model)


def as_eval_model(
    model: nn.Module, tokenizer: Any, compute: Compute, *, name: str | None = None, **more: Any
) -> EvalModel:
    """`more`: the last fields of FeatureModel. Raises UserError for a model of another kind."""
    model = unwrap(model).eval()
    kinds: list[tuple[Any, type[FeatureModel]]] = [
        (CaptionModel, Ov2Model), (CoCa, CocaModel), ((CLIP, CustomTextCLIP), ContrastModel),
        (VisionModel, FeatureModel),
    ]  # fmt: skip
    for kind, wrapper in kinds:
        if isinstance(model, kind):
            return wrapper(model, tokenizer, compute, name or type(model).__name__, **more)
    raise UserError(f"{type(model).__name__}: cannot be evaluated; ov2 models, CoCa and CLIP can")


def _cannot(what: str) -> Any:
    """A method of a model that lacks this ability."""

    def refuse(self: FeatureModel, *_: Any, **__: Any) -> NoReturn:
        raise UserError(f"{self.name}: a {type(self.model).__name__} cannot {what}")

    return refuse


def _sizes(images: Images) -> list[tuple[int, ...]]:
    """Patches of each image, where they differ."""
    return [(count,) for count in images.counts] if isinstance(images, NativeImages) else [()] * len(images)


def _alike(values: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """The places of equal values, with the first number of each (0 without one), in ascending order."""
    groups = sorted(set(values))
    return [(next(iter(one), 0), [place for place, value in enumerate(values) if value == one]) for one in groups]


@dataclass(frozen=True)
class FeatureModel:
    """An encoder. What it cannot do (`abilities`) raises UserError. `preprocess` of an image; `checkpoint` with its
    weights; `reopen` at an image size in px, where that can be done."""

    model: Any
    tokenizer: Any
    compute: Compute
    name: str
    keep_ratio: float | None = None
    preprocess: Callable[[Any], Tensor] = torch.as_tensor
    checkpoint: Path | None = None
    reopen: Callable[[int], EvalModel] | None = None
    can: ClassVar[tuple[Ability, ...]] = ("features",)

    @property
    def abilities(self) -> frozenset[Ability]:
        can = OV2_ABILITIES.get(type(self.model), self.can)
        return frozenset((*can, *(("resizing",) if self.reopen else ())))

    @property
    def device(self) -> torch.device:
        return self.compute.device

    def pooled(self, images_BCHW: Images) -> Tensor:
        """What `encode_image` gives: CLIP's and CoCa's with their projection."""
        images = self.compute.pixels(images_BCHW)
        with self.compute.evaluating():
            return self.model.encode_image(images, normalize=False).float()

    def tokens(self, images_BCHW: Images, layer: int = -1) -> Tensor:
        """Patch tokens after a block, without norm or pooler; of timm's encoders that are no ViTs the places of a
        feature map. Raises UserError for images that differ in their number, and for an encoder that has neither."""
        if isinstance(images_BCHW, NativeImages):
            raise UserError("probes of patch tokens take images of one shape; give --aspect square")
        images, visual = self.compute.pixels(images_BCHW), self.model.visual
        with self.compute.evaluating():
            if hasattr(visual, "transformer"):
                return image_features(visual, images, layer=layer).float()
            if not hasattr(getattr(visual, "trunk", None), "forward_intermediates"):
                raise UserError(f"{self.name}: has no patch tokens; the ViTs of OpenCLIP and the encoders of timm have")
            # Places by rows and columns: the layout that all of timm's encoders know.
            (found_BDHW,) = visual.trunk.forward_intermediates(
                images, indices=[layer], norm=False, intermediates_only=True, output_fmt="NCHW"
            )
        return found_BDHW.flatten(2).mT.float()

    def tokenize(self, texts: Sequence[str]) -> Tensor:
        if "caption" not in self.abilities and "contrast" not in self.abilities:
            _cannot("read text")(self)
        return self.tokenizer(list(texts))

    def num_targets(self, texts_CL: Tensor) -> Tensor:
        return (caption_targets(texts_CL, self.compute.eos_id) != IGNORE_INDEX).sum(dim=1)

    loss_sums = prefix = nll = generate = _cannot("caption")
    contrast_images = contrast_texts = _cannot("compare pictures and texts")
    with_keep_ratio = _cannot("drop tokens (--keep-ratio)")
    kept = _cannot("drop tokens")

    def with_image_size(self, image_size: int) -> EvalModel:
        if self.reopen is None:
            raise UserError(f"{self.name}: a model in training keeps its resolution; evaluate its checkpoint")
        return self.reopen(image_size)


class ContrastModel(FeatureModel):
    """CLIP, and what CoCa has of it."""

    can: ClassVar[tuple[Ability, ...]] = ("features", "contrast")

    def contrast_images(self, images_BCHW: Images) -> Tensor:
        return nn.functional.normalize(self.pooled(images_BCHW), dim=-1)

    def contrast_texts(self, texts_CL: Tensor) -> Tensor:
        with self.compute.evaluating():
            texts_CD = self.model.encode_text(texts_CL.to(self.device), normalize=False)
        return nn.functional.normalize(texts_CD.float(), dim=-1)


class _Captions(ContrastModel):
    """For models that caption: prompts of unequal length in groups, ids to text."""

    def generate(
        self, images_BCHW: Images, keys: Sequence[str], prompts: Sequence[str] | None = None, **options: Any
    ) -> list[str]:
        """With prompts, the text that follows each. The tokenizer cuts a prompt that fills the context. With
        `num_captions` as many texts for each image, side by side. `sampling`: a RowSampling for each image;
        `short_prompts`: cut prompts as training does; `max_new_tokens`: after the prompt."""
        sampling, short, new = (options.pop(name, None) for name in ("sampling", "short_prompts", "max_new_tokens"))
        prompts = [""] * len(keys) if prompts is None else prompts
        if not len(images_BCHW) == len(keys) == len(prompts):
            raise ValueError(f"{len(images_BCHW)} images, {len(keys)} keys, {len(prompts)} prompts")
        ids = [without_end(row, self.compute.eos_id) for row in self.tokenizer(list(prompts))]
        ids = [row[: most_prompt_ids(self.model.context_length)] for row in ids] if short else ids
        each = options.get("num_captions", 1)
        texts = [""] * len(keys) * each
        for length, rows in _alike([(len(given), *size) for given, size in zip(ids, _sizes(images_BCHW), strict=True)]):
            prompt_BT = torch.stack([ids[row] for row in rows]).to(self.compute.device)
            images = self.compute.pixels(images_BCHW[rows])
            if new is not None:
                options["seq_len"] = min(length + new, self.model.context_length)
            if sampling is not None:
                options["logits_processor"] = RowSampler([sampling[row] for row in rows])
            with self.compute.evaluating():
                out_BT = self._continued(images, [keys[row] for row in rows], prompt_BT, **options)
            bos_id = int(prompt_BT[0, 0])
            places = [row * each + number for row in rows for number in range(each)]
            for place, out in zip(places, out_BT[:, length:].cpu(), strict=True):
                texts[place] = decode_caption(self.tokenizer, out, bos_id, self.compute.eos_id)
        return texts

    def _continued(self, images: Tensor, keys: Sequence[str], prompt_BT: Tensor, **options: Any) -> Tensor:
        raise NotImplementedError


class Ov2Model(_Captions):
    """An ov2 model with its decoder; token dropping by key. What else it can do depends on its class."""

    def with_keep_ratio(self, keep_ratio: float) -> EvalModel:
        if "dropping" not in self.abilities:
            return _cannot("drop tokens (--keep-ratio)")(self)
        rows, columns = self.model.visual.grid_size
        try:
            num_kept(rows * columns, keep_ratio)
        except ValueError as error:
            raise UserError(f"keep ratio {keep_ratio:g}: {error}") from error
        return replace(self, keep_ratio=keep_ratio)

    def kept(self, keys: Sequence[str], grid: tuple[int, int] | None = None) -> Tensor:
        rows, columns = grid or self.model.visual.grid_size
        images = None if grid is None else NativeImages(torch.empty(0), (grid,) * len(keys))
        kept_idx = eval_kept_idx(self.model, keys, self.keep_ratio, images)
        if kept_idx is None:
            return torch.ones(len(keys), rows, columns, dtype=torch.bool)
        kept_BK = torch.stack(list(kept_idx)).cpu()
        kept_BN = torch.zeros(len(keys), rows * columns, dtype=torch.bool).scatter_(1, kept_BK, True)
        return kept_BN.view(-1, rows, columns)

    def loss_sums(self, images_BCHW: Images, texts_BL: Tensor, keys: Sequence[str]) -> tuple[float, float]:
        images = self.compute.pixels(images_BCHW)
        with self.compute.evaluating():
            captions = self.compute.packed(texts_BL, images).to(self.device)
            kept_idx = eval_kept_idx(self.model, keys, self.keep_ratio, images)
            sums = self.model(images, kept_idx=kept_idx, captions=captions, caption_loss=CaptionLoss())
        return float(sums.nll), float(sums.num_targets)

    def prefix(self, images_BCHW: Images, keys: Sequence[str]) -> list[tuple[list[int], DecoderCache]]:
        """Of images of equal size together, with their places in the batch."""
        caches = []
        with self.compute.evaluating():
            for _, rows in _alike(_sizes(images_BCHW)):
                images = self.compute.pixels(images_BCHW[rows])
                kept_idx = eval_kept_idx(self.model, [keys[row] for row in rows], self.keep_ratio, images)
                kept_BKD = self.model.stacked_kept_tokens(images, kept_idx=kept_idx)
                caches.append((rows, self.model.text_decoder.image_cache(kept_BKD)))
        return caches

    def nll(self, prefix: list[tuple[list[int], DecoderCache]], texts_CL: Tensor) -> Tensor:
        with self.compute.evaluating():
            parts = [
                candidate_nll(self.model.text_decoder, cache, texts_CL, self.compute.eos_id) for _, cache in prefix
            ]
        places = torch.tensor([row for rows, _ in prefix for row in rows], device=self.device)
        return torch.cat(parts)[places.argsort()]

    def _continued(self, images: Tensor, keys: Sequence[str], prompt_BT: Tensor, **options: Any) -> Tensor:
        kept_idx = eval_kept_idx(self.model, keys, self.keep_ratio, images)
        return self.model.generate(images, prompt_BT, kept_idx=kept_idx, **options)


class CocaModel(_Captions):
    """Stock CoCa through its own forward; images encoded once."""

    can: ClassVar[tuple[Ability, ...]] = ("features", "caption", "contrast")

    def loss_sums(self, images_BCHW: Images, texts_BL: Tensor, keys: Sequence[str]) -> tuple[float, float]:
        images, texts = self.compute.pixels(images_BCHW), texts_BL.to(self.device)
        with self.compute.evaluating():
            logits = self.model(images, texts)["logits"][:, : texts.shape[1] - 1]  # aligned with texts[:, 1:]
            sums = CaptionLoss()(logits, caption_targets(texts, self.compute.eos_id))
        return float(sums.nll), float(sums.num_targets)

    def prefix(self, images_BCHW: Images, keys: Sequence[str]) -> CocaImages:
        images = self.compute.pixels(images_BCHW)
        with self.compute.evaluating():
            out = self.model(images)
        return CocaImages(out["image_features"], out["image_embs"])

    def nll(self, prefix: CocaImages, texts_CL: Tensor) -> Tensor:
        return coca_nll(self.model, self.compute, prefix, texts_CL)

    def _continued(self, images: Tensor, keys: Sequence[str], prompt_BT: Tensor, **options: Any) -> Tensor:
        return coca_captions(self.model, self.compute.eos_id, self.prefix(images, keys), prompt_BT, **options)


def abilities_of(config: Mapping[str, Any]) -> frozenset[Ability]:
    """What a model with such a config of OpenCLIP's factory can do, before it is made and while it is in training."""
    if is_ov2_config(config):
        return frozenset(OV2_ABILITIES[caption_model_class(config)])
    return frozenset((CocaModel if "multimodal_cfg" in config else ContrastModel).can)
