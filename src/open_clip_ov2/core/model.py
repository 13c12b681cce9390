"""CaptionModel: vision encoder, token dropping, text decoder; trained by the caption loss alone.

Shapes: B batch, N image tokens, K kept image tokens, L caption tokens, D width, V vocabulary.
Source: OpenVision 2 (arXiv 2509.01644); docs/reference.md.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from open_clip_ov2.core.compute import compile_backend
from open_clip_ov2.core.decoder import DecoderConfig, TextDecoder
from open_clip_ov2.core.generate import CaptionStream, GenerationConfig, generate
from open_clip_ov2.core.loss import CaptionLoss, CaptionLossSums, caption_targets
from open_clip_ov2.core.native import BlockParts, Images, NativeImages
from open_clip_ov2.core.native import kept_tokens as native_kept_tokens
from open_clip_ov2.core.packing import PackedCaptions
from open_clip_ov2.core.rows import RaggedTokens
from open_clip_ov2.core.tokens import KeepRatio, TokenDrop, num_kept
from open_clip_ov2.core.vision import ImageModel
from open_clip_ov2.core.vit_fast import block_at, check_tower, kept_tokens, recompute_elementwise, through_blocks

KeptIdx = Tensor | Sequence[Tensor]  # `(B, K)` int64, or `(K,)` for each of NativeImages


@dataclass(frozen=True)
class TextConfig:
    """Ids and lengths of the tokenizer that the model is trained with."""

    context_length: int
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int = 0


class CaptionModel(ImageModel):
    """A "CoCa without contrastive": no text encoder, no logit scale, no trained pooling head. The pooled output of
    `visual` is for use after training: its norm and projection are frozen at one and the identity, since the caption
    loss never reaches them."""

    def __init__(
        self,
        visual: nn.Module,
        decoder: DecoderConfig,
        text: TextConfig,
        *,
        keep_ratio: KeepRatio,
        eval_keep_ratio: float | None = None,
    ) -> None:
        super().__init__(visual)
        check_tower(visual)
        self.token_drop = TokenDrop(keep_ratio, eval_keep_ratio)
        self.text_decoder = TextDecoder(decoder, int(self.visual.positional_embedding.shape[1]), text.vocab_size)
        self.text_config = text
        self.context_length = text.context_length
        self.vocab_size = text.vocab_size
        self._through_blocks: Any = through_blocks
        self._block_parts = BlockParts()
        self.reset_position_table()
        self._freeze_untrained()
        rows, columns = self.visual.grid_size
        num_kept(rows * columns, min(keep_ratio.low, self.token_drop.eval_keep_ratio))  # raises if none are left

    def __getstate__(self) -> dict[str, Any]:  # compiled code is neither copied nor pickled
        return {**super().__getstate__(), "_through_blocks": through_blocks, "_block_parts": BlockParts()}

    def _freeze_untrained(self) -> None:
        """What the caption loss cannot reach must not be trainable: DDP would wait for it for ever."""
        self.visual.positional_embedding.requires_grad_(False)
        self.visual.ln_post.requires_grad_(False)
        if self.visual.proj is not None:
            self.visual.proj.requires_grad_(False)

    def encode_kept_tokens(
        self, image: Images, *, kept_idx: KeptIdx | None = None, keep_ratio: float | None = None
    ) -> Tensor | RaggedTokens:
        """The patch tokens that the decoder gets, `(B, 3, H, W)` -> `(B, K, D)`, with the model's own token dropping
        unless `kept_idx` `(B, K)` int64 or a ratio is given. Of NativeImages as many as each has, side by side."""
        drop: dict[str, Any] = {"kept_idx": kept_idx, "keep_ratio": keep_ratio}
        if isinstance(image, NativeImages):
            return native_kept_tokens(self.visual, image, self.token_drop, self._block_parts, **drop)
        return kept_tokens(self.visual, image, self.token_drop, self._through_blocks, **drop)

    def stacked_kept_tokens(self, image: Images, **drop: Any) -> Tensor:
        """The same as `(B, K, D)`. Raises ValueError for NativeImages that differ in their number of tokens."""
        kept = self.encode_kept_tokens(image, **drop)
        return kept.stacked() if isinstance(kept, RaggedTokens) else kept

    def forward(
        self,
        image: Images | None = None,
        text: Tensor | None = None,
        *,
        kept_idx: KeptIdx | None = None,
        keep_ratio: float | None = None,
        captions: PackedCaptions | None = None,
        caption_loss: CaptionLoss | None = None,
    ) -> dict[str, Tensor] | CaptionLossSums:
        """One pass over images `(B, 3, H, W)` and ids `(B, L)` int64:
        `{"logits": (B, L - 1, V), "labels": (B, L - 1) int64, IGNORE_INDEX where padded}`.

        Without text see `image_outputs`. With `captions` and `caption_loss` in place of text, the sums of the loss,
        computed inside so that DDP sees every parameter at work; NativeImages take these alone. `kept_idx` `(B, K)` or
        `keep_ratio` replace the model's own token dropping.
        """
        if image is None:
            raise ValueError("an ov2 model has no text encoder: give it images, or images and text")
        if (captions is None) != (caption_loss is None):
            raise ValueError("packed captions and a loss go together: give both or neither")
        if captions is not None and (text is not None or len(captions.order_B) != len(image)):
            raise ValueError("packed captions stand in place of text, one for each image")
        if text is None and captions is None:
            return self.image_outputs(image)
        if captions is not None and caption_loss is not None:
            if isinstance(image, NativeImages):  # equal sizes then stand together
                kept_idx = None if kept_idx is None else [kept_idx[row] for row in captions.order]
                image = image[captions.order]
            kept = self.encode_kept_tokens(image, kept_idx=kept_idx, keep_ratio=keep_ratio)
            return self._loss_sums(kept, captions, caption_loss)
        assert text is not None
        kept_BKD = self.stacked_kept_tokens(image, kept_idx=kept_idx, keep_ratio=keep_ratio)
        logits_BLV = self.text_decoder.lm_head(self.text_decoder(kept_BKD, text[:, :-1]))
        return {"logits": logits_BLV, "labels": caption_targets(text, self.text_config.eos_id)}

    def _loss_sums(
        self, kept: Tensor | RaggedTokens, captions: PackedCaptions, caption_loss: CaptionLoss
    ) -> CaptionLossSums:
        """`kept` `(B, K, D)`, or tokens that are in the order of the captions already."""
        kept = kept.index_select(0, captions.order_B) if isinstance(kept, Tensor) else kept
        hidden_tD = self.text_decoder.packed(kept, captions.ids_t, captions.parts)
        hidden_RD = hidden_tD.index_select(0, captions.index_R)
        return caption_loss.from_hidden(hidden_RD, self.text_decoder.lm_head, captions.labels_R)

    @torch.no_grad()
    def generate(
        self,
        image: Images,
        text: Tensor | None = None,
        *,
        seq_len: int | None = None,
        kept_idx: KeptIdx | None = None,
        keep_ratio: float | None = None,
        fixed_output_length: bool = False,
        **options: Any,
    ) -> Tensor:
        """Captions of `(B, 3, H, W)` images, or of NativeImages with equally many patches: ids `(B, T)` int64, bos
        first, padded after eos. Raises ValueError.

        `text` is a prompt of ids `(B, T)` or `(T,)`, bos included, without padding. `seq_len` is the longest result,
        the context length by default and at most. Further options are GenerationConfig's: generation_type ("greedy",
        "top_k", "top_p", "beam_search"), temperature, top_k, top_p, num_beams, length_penalty, min_seq_len,
        repetition_penalty, generator, num_captions (then `(B * num_captions, T)`).
        """
        ids_BT = self._prompt(image, text)
        seq_len = self.context_length if seq_len is None else seq_len
        if not ids_BT.shape[1] < seq_len <= self.context_length:
            raise ValueError(
                f"seq_len must be more than the prompt's {ids_BT.shape[1]} tokens and at most the context length "
                f"{self.context_length}, got {seq_len}"
            )
        ids = self.text_config
        config = GenerationConfig(seq_len=seq_len, eos_id=ids.eos_id, pad_id=ids.pad_id, **options)
        was_training = self.training
        self.eval()
        try:
            kept_BKD = self.stacked_kept_tokens(image, kept_idx=kept_idx, keep_ratio=keep_ratio)
            out_BT = generate(CaptionStream(self.text_decoder, kept_BKD, ids_BT), ids_BT, config)
        finally:
            self.train(was_training)
        return F.pad(out_BT, (0, seq_len - out_BT.shape[1]), value=ids.pad_id) if fixed_output_length else out_BT

    def _prompt(self, image: Images, text: Tensor | None) -> Tensor:
        if text is None:
            device = self.text_decoder.lm_head.weight.device
            return torch.full((len(image), 1), self.text_config.bos_id, dtype=torch.long, device=device)
        text = text.expand(len(image), -1) if text.ndim == 1 else text
        if len(text) != len(image):
            raise ValueError(f"{len(text)} prompts for {len(image)} images")
        return text

    def set_grad_checkpointing(self, enable: bool = True, **options: Any) -> None:
        super().set_grad_checkpointing(enable, **options)
        self.text_decoder.grad_checkpointing = enable

    def lock_image_tower(self, unlocked_groups: int = 0, freeze_bn_stats: bool = False) -> None:
        super().lock_image_tower(unlocked_groups, freeze_bn_stats)
        self._freeze_untrained()

    def no_weight_decay(self) -> set[str]:
        return super().no_weight_decay() | {"text_decoder.token_embedding.weight"}

    def recompute_elementwise(self) -> None:
        """Keep the inputs alone of each block's norms and GELU, and recompute them in the backward pass, but no matrix
        product. For a model that is not compiled."""
        recompute_elementwise(self.visual)
        for block in self.text_decoder.blocks:
            block.recompute_elementwise = True

    def hook_blocks(self, hook: Callable[[nn.Module, str], None]) -> None:
        """`hook(block, name)` for each method of a block that runs in the place of its `forward`: FSDP gathers the
        block's parameters around it."""
        last: Any = self.visual.transformer.resblocks[-1]
        last.at = partial(getattr(self._through_blocks, "keywords", {}).get("last_block", block_at), last)
        self._through_blocks = partial(through_blocks, last_block=_at)
        for block, name in [(last, "at"), *((block, "packed") for block in self.text_decoder.blocks)]:
            hook(block, name)

    def compile_blocks(
        self, *, memory_budget: float | None = None, elementwise: bool = False, encoder: str = "blocks", **options: Any
    ) -> None:
        """Compile each block in place, with torch.compile's `options`; of the decoder's only what works token by token.
        `memory_budget` and `elementwise`: see `compile_backend`. `encoder`: its "blocks", the "whole" of them as one
        graph, or that replayed as "cuda-graphs"."""
        less = memory_budget is not None or elementwise
        options = {"backend": compile_backend(memory_budget, elementwise) if less else "inductor"} | options
        self._block_parts = BlockParts.compiled(**options)
        for block in self.text_decoder.blocks:
            block.compile_tokenwise(**options)
        if encoder == "blocks":
            for block in self.visual.transformer.resblocks:
                block.compile(**options)
            self._through_blocks = partial(through_blocks, last_block=torch.compile(block_at, **options))
            return
        if encoder == "cuda-graphs":
            options["backend"] = compile_backend(memory_budget, elementwise, cuda_graphs=True)
        self._through_blocks = torch.compile(through_blocks, **options)


def _at(block: Any, x_BSD: Tensor, index_BK: Tensor) -> Tensor:
    """`block_at` as a method of the block, which `hook_blocks` has given it."""
    return block.at(x_BSD, index_BK)
