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
    """Trees of at most `max_nodes` nodes, unless one caption has more, from `texts_CL` int64 on the CPU, [bos] caption
    [eos] padding. Equal captions are in the same tree. The last trees are cached, since the same candidates come with
    every batch of images."""
    return _trees(texts_CL.contiguous().numpy().tobytes(), texts_CL.shape[1], eos_id, max_nodes)


@functools.lru_cache(maxsize=1)
def _trees(ids: bytes, length: int, eos_id: int, max_nodes: int) -> list[CaptionTree]:
    texts_CL = torch.frombuffer(bytearray(ids), dtype=torch.int64).view(-1, length)
    lengths = (caption_targets(texts_CL, eos_id) != IGNORE_INDEX).sum(dim=1).tolist()
    rows = [tuple(row[: length + 1]) for row, length in zip(texts_CL.tolist(), lengths, strict=True)]
    trees: list[CaptionTree] = []
    nodes: dict[tuple[int, ...], int] = {}  # by the beginning of a caption that each stands for
    places: list[int] = []
    for place in sorted(range(len(rows)), key=rows.__getitem__):  # those that begin alike, one after the other
        beginnings = [rows[place][:end] for end in range(1, len(rows[place]))]
        added = sum(beginning not in nodes for beginning in beginnings)
        if added and places and len(nodes) + added > max_nodes:
            trees.append(_tree(nodes, rows, places))
            nodes, places = {}, []
        for beginning in beginnings:
            nodes.setdefault(beginning, len(nodes))
        places.append(place)
    return [*trees, _tree(nodes, rows, places)] if places else trees


def _tree(nodes: dict[tuple[int, ...], int], rows: list[tuple[int, ...]], places: list[int]) -> CaptionTree:
    sees_TT = torch.eye(len(nodes), dtype=torch.bool)
    for beginning, node in nodes.items():
        if len(beginning) > 1:
            sees_TT[node] |= sees_TT[nodes[beginning[:-1]]]
    steps = [[(nodes[rows[place][:end]], rows[place][end]) for end in range(1, len(rows[place]))] for place in places]
    edges = sorted({step for of in steps for step in of})
    number, most = {edge: index for index, edge in enumerate(edges)}, max(map(len, steps))
    edges_CM = [[number[step] for step in of] + [len(edges)] * (most - len(of)) for of in steps]
    node_E, target_E = torch.tensor(edges).T.contiguous()
    ids_T = torch.tensor([beginning[-1] for beginning in nodes])
    return CaptionTree(ids_T, sees_TT, node_E, target_E, torch.tensor(edges_CM), torch.tensor(places))


def candidate_nll(decoder: TextDecoder, cache: DecoderCache, texts_CL: Tensor, eos_id: int) -> Tensor:
    """Sum of the nll of each candidate's real targets given each image, `(B, C)` float32, nats. `cache`: of
    `decoder.image_cache`. `texts_CL` int64, on any device; equal candidates get equal values."""
    images, device = len(cache[0].key), cache[0].key.device
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
