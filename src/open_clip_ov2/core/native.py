"""Images of any shape in one batch: their patches lie side by side, without padding (NaViT, arXiv 2307.06304).

The weights are those of the square path (vit_fast.py); only how images are cut and their positions differ. `encode` in
core/reference.py on one image, with the position table of its grid, is the oracle of all of this.

Shapes: B images, P patch size, N patches of one image and n of all, K kept patches of one image and I of all, T = B + n
tokens, each image's class token before its patches; D width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from open_clip_ov2.core.compute import recompute
from open_clip_ov2.core.positions import sincos_at
from open_clip_ov2.core.rows import RaggedTokens, RowAttention, by_row, on_device
from open_clip_ov2.core.tokens import TokenDrop, num_kept, sample_kept_of_rows
from open_clip_ov2.core.vit_fast import after_attention, normed_projections


@dataclass(frozen=True)
class NativeImages:
    """`patches_nCPP`: of all images side by side, row by row of each grid; uint8, or floats that are normalized.
    `grids`: (rows, columns) of each image."""

    patches_nCPP: Tensor
    grids: tuple[tuple[int, int], ...]

    @classmethod
    def of(cls, images: Sequence[Tensor], patch_size: int) -> NativeImages:
        """Of images `(C, rows x P, columns x P)`."""
        grids = tuple((image.shape[1] // patch_size, image.shape[2] // patch_size) for image in images)
        whole = [image.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)) for image in images]
        return cls(torch.cat([image.permute(1, 3, 0, 2, 4).flatten(0, 1) for image in whole]), grids)

    @property
    def counts(self) -> tuple[int, ...]:
        """Patches of each image."""
        return tuple(rows * columns for rows, columns in self.grids)

    def __len__(self) -> int:
        return len(self.grids)

    def __getitem__(self, rows: slice | Sequence[int] | Tensor) -> NativeImages:
        """Some of the images, in this order."""
        chosen = range(len(self))[rows] if isinstance(rows, slice) else [int(row) for row in rows]
        grids = tuple(self.grids[row] for row in chosen)
        parts = self.patches_nCPP.split(self.counts)
        return NativeImages(torch.cat([self.patches_nCPP[:0], *(parts[row] for row in chosen)]), grids)

    def images(self) -> list[Tensor]:
        """Whole again: `(C, rows x P, columns x P)` each."""
        parts = zip(self.patches_nCPP.split(self.counts), self.grids, strict=True)
        return [part.unflatten(0, grid).permute(2, 0, 3, 1, 4).flatten(3).flatten(1, 2) for part, grid in parts]

    def to(self, *args: Any, **options: Any) -> NativeImages:
        """As a tensor's."""
        return replace(self, patches_nCPP=self.patches_nCPP.to(*args, **options))

    def pin_memory(self) -> NativeImages:
        return replace(self, patches_nCPP=self.patches_nCPP.pin_memory())


Images = Tensor | NativeImages  # `(B, 3, H, W)`, or images that differ in their shapes


def stacked(images: Sequence[Tensor], patch_size: int | None) -> Images:
    """A batch of images `(C, H, W)`, which are of one shape unless they are cut into patches of `patch_size`."""
    return torch.stack(list(images)) if patch_size is None else NativeImages.of(images, patch_size)


def concatenated(batches: Sequence[Images]) -> Images:
    """Batches as one."""
    native = [batch for batch in batches if isinstance(batch, NativeImages)]
    if not native:
        return torch.cat([batch for batch in batches if isinstance(batch, Tensor)])
    grids = tuple(grid for batch in native for grid in batch.grids)
    return NativeImages(torch.cat([batch.patches_nCPP for batch in native]), grids)


# --- the encoder ---------------------------------------------------------------------------------------


def before(block: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Queries `(..., D)`, and keys and values `(..., 2 D)`, of an encoder's block."""
    width = x.shape[-1]
    q, kv = normed_projections(block, x).split([width, 2 * width], dim=-1)
    return q, kv


def after(block: Any, x: Tensor, attended: Tensor) -> Tensor:
    """The rest of the block, after attention."""
    return after_attention(block, x, block.attn.out_proj(attended))


class BlockParts(NamedTuple):
    """What works token by token in a block, compiled or not; attention depends on the rows."""

    before: Callable[..., tuple[Tensor, Tensor]] = before
    after: Callable[..., Tensor] = after

    @classmethod
    def compiled(cls, **options: Any) -> BlockParts:
        return cls(torch.compile(before, dynamic=True, **options), torch.compile(after, dynamic=True, **options))

    def run(self, block: Any, x_TD: Tensor, rows: RowAttention, index_I: Tensor | None = None) -> Tensor:
        """`(T, D)` -> the same, or `(I, D)` at the positions `index_I` int64, of which `rows` has the queries."""
        q, kv = self.before(block, x_TD)
        if index_I is not None:
            x_TD, q = x_TD.index_select(0, index_I), q.index_select(0, index_I)
        return self.after(block, x_TD, rows(q, kv, block.attn.num_heads))


def embedded(visual: Any, images: NativeImages) -> Tensor:
    """What the first block gets, `(T, D)`: class token and patches of each image, with the positions of its grid."""
    x_nD = visual.conv1(images.patches_nCPP).flatten(1)
    places = [torch.cartesian_prod(torch.arange(rows), torch.arange(columns)) for rows, columns in images.grids]
    x_nD = x_nD + sincos_at(on_device(torch.cat(places).T, x_nD.device), x_nD.shape[1]).to(x_nD.dtype)
    classes_BD = visual.class_embedding.to(x_nD.dtype).expand(len(images), -1)
    _, source_T = by_row((1,) * len(images), images.counts, x_nD.device)
    return torch.cat([classes_BD, x_nD]).index_select(0, source_T)


def kept_tokens(
    visual: Any,
    images: NativeImages,
    token_drop: TokenDrop | None = None,
    parts: BlockParts = BlockParts(),  # noqa: B008  immutable
    *,
    kept_idx: Sequence[Tensor] | None = None,
    keep_ratio: float | None = None,
) -> RaggedTokens:
    """What `token_drop` keeps of each image's patch tokens after the last block, all of them without it. `kept_idx`:
    `(K,)` int64 for each image, in place of a ratio. Of the last block only these outputs are computed."""
    blocks, recomputes = visual.transformer.resblocks, visual.transformer.grad_checkpointing and visual.training
    x_TD, tokens = embedded(visual, images), [count + 1 for count in images.counts]
    heads = blocks[0].attn.num_heads
    rows = RowAttention.of(tokens, tokens, x_TD, x_TD.shape[1] // heads)
    for block in blocks[:-1]:
        x_TD = recompute(recomputes, parts.run, block, x_TD, rows)
    if kept_idx is not None:
        kept = tuple(len(each) for each in kept_idx)
        begins = [sum(images.counts[:row]) for row in range(len(images))]
        places = [each.cpu() + begin for each, begin in zip(kept_idx, begins, strict=True)]
        places_I = on_device(torch.cat(places), x_TD.device)
    else:
        ratio = 1.0 if token_drop is None else token_drop.ratio(keep_ratio)
        kept = tuple(num_kept(count, ratio) for count in images.counts)
        places_I = sample_kept_of_rows(images.counts, kept, x_TD.device)
    # Of the tokens, one class token for each image so far comes before a patch.
    numbers_B = torch.arange(1, len(images) + 1, device=x_TD.device)
    index_I = places_I + torch.repeat_interleave(numbers_B, on_device(kept, x_TD.device), output_size=sum(kept))
    rows = RowAttention.of(kept, tokens, x_TD, x_TD.shape[1] // heads)
    return RaggedTokens(recompute(recomputes, parts.run, blocks[-1], x_TD, rows, index_I), kept)


def pooled(visual: Any, images: NativeImages) -> Tensor:
    """`(B, D)`: final norm of each image's mean patch token, times the projection."""
    tokens_nD, counts = kept_tokens(visual, images)
    means_BD = torch.stack([tokens.mean(dim=0) for tokens in tokens_nD.split(counts)])
    return visual.ln_post(means_BD) @ visual.proj
