"""How likely an image makes each of many captions: keys and values of the image once, captions as a tree.

Shapes: B images, C candidates, L caption tokens, K kept image tokens, T nodes, E edges, M most edges of a candidate,
D width, V vocabulary. Captions that begin alike ("a photo of a ...") have the same hidden states there, so each
beginning is computed once: a node sees the image and its own ancestors, and nothing else, because text has no position
embedding and attention alone orders it (core/decoder.py).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from open_clip_ov2.core.decoder import DecoderCache, TextDecoder
from open_clip_ov2.core.linear_loss import CPU_ROWS, GPU_ROWS
from open_clip_ov2.core.loss import IGNORE_INDEX, caption_targets

# Ours. Nodes at once, each of which is scored against all others: few beside the decoder's width.
MAX_NODES = 256
MAX_TOKENS = 16_384  # ours: nodes times images at once; enough to fill a GPU's matrix units


@dataclass(frozen=True)
class CaptionTree:
    """`ids_T` int64: one token a node, ancestors first. `sees_TT`: boolean, ancestors and itself. `node_E`, `target_E`:
    at which node which token follows, in the order of the nodes. `edges_CM`: those of each candidate, E for none.
    `candidates_C`: their places in the list that was given."""

    ids_T: Tensor
    sees_TT: Tensor
    node_E: Tensor
    target_E: Tensor
    edges_CM: Tensor
    candidates_C: Tensor

    def to(self, device: torch.device) -> CaptionTree:
        return CaptionTree(**{name: value.to(device, non_blocking=True) for name, value in vars(self).items()})


def caption_trees(texts_CL: Tensor, eos_id: int, max_nodes: int) -> list[CaptionTree]:
    """Trees of at most `max_nodes` nodes, unless one caption has more. Equal captions are in the same tree.

    `texts_CL` int64 on the CPU, [bos] caption [eos] padding. The last trees are cached, since the same candidates come
    with every batch of images.
    """
    return _trees(texts_CL.contiguous().numpy().tobytes(), texts_CL.shape[1], eos_id, max_nodes)


@functools.lru_cache(maxsize=1)
def _trees(ids: bytes, length: int, eos_id: int, max_nodes: int) -> list[CaptionTree]:
    texts_CL = torch.frombuffer(bytearray(ids), dtype=torch.int64).view(-1, length)
    lengths = (caption_targets(texts_CL, eos_id) != IGNORE_INDEX).sum(dim=1).tolist()
    rows = [row[: length + 1] for row, length in zip(texts_CL.tolist(), lengths, strict=True)]
    order = sorted(range(len(rows)), key=rows.__getitem__)
    trees: list[CaptionTree] = []
    growing = _Growing()
    for place in order:
        if growing.with_row(rows[place]) > max_nodes and growing.places:
            trees.append(growing.tree())
            growing = _Growing()
        growing.add(rows[place], place)
    return [*trees, growing.tree()] if growing.places else trees


class _Growing:
    """A tree of captions that come in the order of their ids: each shares most with the one before it."""

    def __init__(self) -> None:
        self.places: list[int] = []
        self._ids: list[int] = []
        self._parents: list[int] = []
        self._path: list[int] = []  # nodes of the last caption
        self._edges: dict[tuple[int, int], int] = {}
        self._of_candidate: list[list[int]] = []

    def _shared(self, row: list[int]) -> int:
        shared = 0
        for node, token in zip(self._path, row[:-1], strict=False):
            if self._ids[node] != token:
                break
            shared += 1
        return shared

    def with_row(self, row: list[int]) -> int:
        """The number of nodes if this caption were added."""
        return len(self._ids) + len(row) - 1 - self._shared(row)

    def add(self, row: list[int], place: int) -> None:
        """Add a caption. Its last token is only predicted, so it has an edge and no node."""
        self._path = self._path[: self._shared(row)]
        for token in row[len(self._path) : -1]:
            self._parents.append(self._path[-1] if self._path else -1)
            self._path.append(len(self._ids))
            self._ids.append(token)
        steps = zip(self._path, row[1:], strict=True)
        self._of_candidate.append([self._edges.setdefault(step, len(self._edges)) for step in steps])
        self.places.append(place)

    def tree(self) -> CaptionTree:
        sees_TT = torch.eye(len(self._ids), dtype=torch.bool)
        for node, parent in enumerate(self._parents):
            if parent >= 0:
                sees_TT[node] |= sees_TT[parent]
        edges = sorted(self._edges)
        number = {old: new for new, old in enumerate(self._edges[edge] for edge in edges)}
        most = max(map(len, self._of_candidate))
        edges_CM = [[number[edge] for edge in of] + [len(edges)] * (most - len(of)) for of in self._of_candidate]
        node_E, target_E = torch.tensor(edges).T
        ids_T, places = torch.tensor(self._ids), torch.tensor(self.places)
        return CaptionTree(ids_T, sees_TT, node_E.contiguous(), target_E.contiguous(), torch.tensor(edges_CM), places)


def candidate_nll(decoder: TextDecoder, cache: DecoderCache, texts_CL: Tensor, eos_id: int) -> Tensor:
    """Sum of the nll of each candidate's real targets given each image, `(B, C)` float32, nats.

    `cache`: of `decoder.image_cache`. `texts_CL` int64, on any device; equal candidates get equal values.
    """
    images, device = len(cache.entries[0].key), cache.entries[0].key.device
    nll_BC = torch.zeros(images, len(texts_CL), device=device)
    for tree in caption_trees(texts_CL.cpu(), eos_id, max(1, min(MAX_NODES, MAX_TOKENS // images))):
        tree = tree.to(device)
        nll_BC[:, tree.candidates_C] = _tree_nll(decoder, cache, tree)
    return nll_BC


def _tree_nll(decoder: TextDecoder, cache: DecoderCache, tree: CaptionTree) -> Tensor:
    """`(B, C)`; logits exist for a part of the nodes at a time."""
    hidden_BTD = decoder.after_image(tree.ids_T, cache, tree.sees_TT)
    images, nodes, _ = hidden_BTD.shape
    step = max(1, (CPU_ROWS if hidden_BTD.device.type == "cpu" else GPU_ROWS) // images)
    parts = []
    for first in range(0, nodes, step):
        logits_BtV = decoder.lm_head(hidden_BTD[:, first : first + step]).float()
        log_p_BtV = logits_BtV.log_softmax(dim=-1)
        here = (tree.node_E >= first) & (tree.node_E < first + step)
        parts.append(-log_p_BtV[:, tree.node_E[here] - first, tree.target_E[here]])
    nll_BE = torch.nn.functional.pad(torch.cat(parts, dim=1), (0, 1))
    return nll_BE[:, tree.edges_CM].sum(dim=-1)
